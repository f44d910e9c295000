"""Tensor operations: how the tensors of one layout become those of another, described before a byte is read."""

from __future__ import annotations

from ckptkit.tensor_ops.operation import Operation, Shape
from ckptkit.tensor_ops.registry import (
    NAMES,
    apply_chain,
    chain_dtypes,
    chain_shapes,
    invert_chain,
    parse_operation,
    parse_operations,
)
from ckptkit.tensor_ops.suggestions import MISMATCH_NAMES, fitting, suggestions

__all__ = [
    "MISMATCH_NAMES",
    "NAMES",
    "Operation",
    "Shape",
    "apply_chain",
    "chain_dtypes",
    "chain_shapes",
    "fitting",
    "invert_chain",
    "parse_operation",
    "parse_operations",
    "suggestions",
]
