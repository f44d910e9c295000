"""Operations by name, and chains: the outputs of an operation are the inputs of the next."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from ckptkit.core.text import did_you_mean, quoted
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.adapters import (
    FoldAdalora,
    FoldDora,
    FoldIa3,
    FoldLocon,
    FoldLoha,
    FoldLokr,
    FoldLoraExperts,
    ReplaceRows,
)
from ckptkit.tensor_ops.arithmetic import (
    Add,
    Cast,
    FoldBatchNorm,
    FoldMask,
    FoldSpectralNorm,
    FoldWeightNorm,
    Maximum,
    Scale,
)
from ckptkit.tensor_ops.dequantize import Dequantize
from ckptkit.tensor_ops.joining import Concat, Deinterleave, FuseQkv, Interleave, Split, SplitQkv, Stack, Unstack
from ckptkit.tensor_ops.lora import ExtractLora, FoldLora, LoraAlpha
from ckptkit.tensor_ops.moving import Permute, Reshape, RopePermute, Slice, Transpose
from ckptkit.tensor_ops.operation import Operation, Rounded, Shape, read_parameters
from ckptkit.tensor_ops.quantize import Quantize
from ckptkit.tensor_ops.resizing import ConvInChannels, Pad, ResizePosEmbed

__all__ = [
    "NAMES",
    "apply_chain",
    "chain_dtypes",
    "chain_shapes",
    "invert_chain",
    "parse_operation",
    "parse_operations",
]

_KINDS: tuple[type[Operation], ...] = (
    Add, Cast, Concat, ConvInChannels, Deinterleave, Dequantize, ExtractLora, FoldAdalora, FoldBatchNorm, FoldDora,
    FoldIa3, FoldLocon, FoldLoha, FoldLokr, FoldLora, FoldLoraExperts, FoldMask, FoldSpectralNorm, FoldWeightNorm,
    FuseQkv, Interleave, LoraAlpha, Maximum, Pad, Permute, Quantize, ReplaceRows, Reshape, ResizePosEmbed, RopePermute,
    Scale, Slice, Split, SplitQkv, Stack, Transpose, Unstack,
)  # fmt: skip
_BY_NAME = {kind.name: kind for kind in _KINDS}
NAMES = tuple(sorted(_BY_NAME))
_NONE: Mapping[str, int] = MappingProxyType({})


def parse_operation(table: Mapping[str, object] | str, variables: Mapping[str, int] = _NONE) -> Operation:
    """Return the operation that a rule file describes: ``{"split": {"dim": 0, "parts": 3}}``, or only its name.

    Integers may be written as arithmetic with ``variables``. Raises ``RuleError`` for an unknown name, and for a
    parameter that is unknown, missing or not valid.
    """
    if isinstance(table, str):
        return read_parameters(_kind(table), {}, variables)
    if len(table) != 1:
        raise RuleError(
            f"an operation is one name with its parameters, not {len(table)} names",
            hint="for example op = { split = { dim = 0, parts = 3 } }; give several operations as a list",
        )
    ((name, params),) = table.items()
    kind = _kind(name)
    if not isinstance(params, Mapping):
        raise RuleError(f"the parameters of {kind.name} are not a table", hint=f"{kind.name} = {{ NAME = VALUE, ... }}")
    return read_parameters(kind, params, variables)


def _kind(name: str) -> type[Operation]:
    if name in _BY_NAME:
        return _BY_NAME[name]
    hint = did_you_mean(name, NAMES, f"known: {', '.join(NAMES)}")
    raise RuleError(f"there is no operation {quoted(name)}", hint=hint)


def parse_operations(value: object, variables: Mapping[str, int] = _NONE) -> tuple[Operation, ...]:
    """Return the chain that a rule file describes: an operation, or a list of operations in order.

    Raises ``RuleError`` for an empty list, and as ``parse_operation`` does.
    """
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise RuleError("the list of operations is empty")
    operations = []
    for item in items:
        if not isinstance(item, str | Mapping):
            raise RuleError(f"an operation must be a name or a table, not {item!r}")
        operations.append(parse_operation(item, variables))
    return tuple(operations)


def chain_shapes(operations: Iterable[Operation], inputs: Sequence[Shape]) -> tuple[Shape, ...]:
    """Return the shapes of the outputs of a chain; raise ``RuleError`` where an operation refuses its inputs."""
    return _chain_shapes(tuple(operations), tuple(inputs))


@functools.lru_cache(maxsize=16)  # a layer of 500 experts asks 500 times in a row
def _chain_shapes(operations: tuple[Operation, ...], shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    for operation in operations:
        shapes = operation.shapes(shapes)
    return shapes


def chain_dtypes(operations: Iterable[Operation], inputs: Sequence[str]) -> tuple[str, ...]:
    """Return the dtypes of the outputs of a chain; raise ``RuleError`` where an operation refuses its inputs."""
    return _chain_dtypes(tuple(operations), tuple(inputs))


@functools.lru_cache(maxsize=16)
def _chain_dtypes(operations: tuple[Operation, ...], dtypes: tuple[str, ...]) -> tuple[str, ...]:
    for operation in operations:
        dtypes = operation.dtypes(dtypes)
    return dtypes


def apply_chain(
    operations: Iterable[Operation], tensors: Sequence[Tensor], rounded: Rounded | None = None
) -> tuple[Tensor, ...]:
    """Return the outputs of a chain; raise ``RuleError`` where an operation refuses its inputs.

    ``rounded`` is called as ``Operation.apply`` says.
    """
    outputs = tuple(tensors)
    for operation in operations:
        outputs = operation.apply(outputs, rounded)
    return outputs


def invert_chain(operations: Iterable[Operation], inputs: Sequence[Shape]) -> tuple[Operation, ...] | None:
    """Return the inverse chain for inputs of these shapes, or None where an operation has no inverse."""
    shapes = tuple(inputs)
    inverses: list[Operation] = []
    for operation in operations:
        inverse = operation.inverse(shapes)
        if inverse is None:
            return None
        inverses.insert(0, inverse)
        shapes = operation.shapes(shapes)
    return tuple(inverses)
