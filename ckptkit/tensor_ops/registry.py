"""Operations by name, and chains of them: the outputs of one are the inputs of the next."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from ckptkit.core.text import quoted
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.arithmetic import Add, Cast, FoldBatchNorm, FoldMask, FoldSpectralNorm, FoldWeightNorm, Scale
from ckptkit.tensor_ops.joining import Concat, Deinterleave, FuseQkv, Interleave, Split, SplitQkv, Stack, Unstack
from ckptkit.tensor_ops.lora import ExtractLora, FoldLora
from ckptkit.tensor_ops.moving import Permute, Reshape, RopePermute, Slice, Transpose
from ckptkit.tensor_ops.operation import Operation, Shape, read_parameters
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
    Add, Cast, Concat, ConvInChannels, Deinterleave, ExtractLora, FoldBatchNorm, FoldLora, FoldMask, FoldSpectralNorm,
    FoldWeightNorm, FuseQkv, Interleave, Pad, Permute, Reshape, ResizePosEmbed, RopePermute, Scale, Slice, Split,
    SplitQkv, Stack, Transpose, Unstack,
)  # fmt: skip
_BY_NAME = {kind.name: kind for kind in _KINDS}
NAMES = tuple(sorted(_BY_NAME))
_NONE: Mapping[str, int] = MappingProxyType({})


def parse_operation(table: Mapping[str, object] | str, variables: Mapping[str, int] = _NONE) -> Operation:
    """Return the operation that a rule file describes: ``{"split": {"dim": 0, "parts": 3}}``, or just a name.

    Integers may be written as arithmetic with ``variables``. Raises ``RuleError`` for an unknown name, and for
    parameters that are unknown, missing, or of another type.
    """
    if isinstance(table, str):
        return read_parameters(_kind(table), {}, variables)
    if len(table) != 1:
        raise RuleError(
            f"an operation is a name and its parameters, and here are {len(table)} names",
            hint="for example op = { split = { dim = 0, parts = 3 } }; several operations are a list",
        )
    ((name, params),) = table.items()
    kind = _kind(name)
    if not isinstance(params, Mapping):
        raise RuleError(f"the parameters of {kind.name} are no table", hint=f"{kind.name} = {{ NAME = VALUE, ... }}")
    return read_parameters(kind, params, variables)


def _kind(name: str) -> type[Operation]:
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {quoted(near[0])}?" if near else f"known: {', '.join(NAMES)}"
    raise RuleError(f"there is no operation {quoted(name)}", hint=hint)


def parse_operations(value: object, variables: Mapping[str, int] = _NONE) -> tuple[Operation, ...]:
    """Return the chain that a rule file describes: an operation, or a list of them in order.

    Raises ``RuleError`` as ``parse_operation``, and for an empty list.
    """
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise RuleError("the list of operations is empty")
    made = []
    for item in items:
        if not isinstance(item, str | Mapping):
            raise RuleError(f"an operation is a name or a table, not {item!r}")
        made.append(parse_operation(item, variables))
    return tuple(made)


def chain_shapes(operations: Iterable[Operation], inputs: Sequence[Shape]) -> tuple[Shape, ...]:
    """Return the shapes that a chain makes; raises ``RuleError`` where one operation does not fit."""
    return _chain_shapes(tuple(operations), tuple(inputs))


@functools.lru_cache(maxsize=16)  # a layer of five hundred experts is asked for five hundred times in a row
def _chain_shapes(operations: tuple[Operation, ...], shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    for operation in operations:
        shapes = operation.shapes(shapes)
    return shapes


def chain_dtypes(operations: Iterable[Operation], inputs: Sequence[str]) -> tuple[str, ...]:
    """Return the dtypes that a chain makes; raises ``RuleError`` where one operation does not take them."""
    return _chain_dtypes(tuple(operations), tuple(inputs))


@functools.lru_cache(maxsize=16)
def _chain_dtypes(operations: tuple[Operation, ...], dtypes: tuple[str, ...]) -> tuple[str, ...]:
    for operation in operations:
        dtypes = operation.dtypes(dtypes)
    return dtypes


def apply_chain(operations: Iterable[Operation], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors that a chain makes; raises ``RuleError`` where one operation does not fit."""
    made = tuple(tensors)
    for operation in operations:
        made = operation.apply(made)
    return made


def invert_chain(operations: Iterable[Operation], inputs: Sequence[Shape]) -> tuple[Operation, ...] | None:
    """Return the chain that undoes this one on tensors that had these shapes, or None where one step is lossy."""
    shapes = tuple(inputs)
    back: list[Operation] = []
    for operation in operations:
        inverse = operation.inverse(shapes)
        if inverse is None:
            return None
        back.insert(0, inverse)
        shapes = operation.shapes(shapes)
    return tuple(back)
