"""Tensor operations: how the tensors of one layout become those of another, described before a byte is read."""

from __future__ import annotations

from ckptkit.tensor_ops.chains import (
    NAMES,
    apply_chain,
    chain_dtypes,
    chain_shapes,
    invert_chain,
    parse_operation,
    parse_operations,
)
from ckptkit.tensor_ops.fits import MISMATCH_NAMES, fitting, suggestions
from ckptkit.tensor_ops.operation import Operation, Shape

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
