"""Operations that join tensors and their inverses: concat, stack, interleave, and the fusion of qkv projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.operation import Int, Ints, Moving, Shape, Text, unflatten

__all__ = ["Concat", "Deinterleave", "FuseQkv", "Interleave", "Split", "SplitQkv", "Stack", "Unstack"]


_MAX_PARTS = 100_000  # an empty tensor can be split into any number of parts


@dataclass(frozen=True, slots=True)
class Split(Moving):
    """Split a tensor along a dim, into ``sizes`` or into equal ``parts``."""

    dim: Int = 0
    sizes: Ints | None = None
    parts: Int | None = None
    name: ClassVar[str] = "split"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` unless exactly one of ``sizes`` and ``parts`` is given, and valid."""
        if (self.sizes is None) == (self.parts is None):
            raise self.refusal("needs either sizes or parts")
        if not 1 <= self.outputs <= _MAX_PARTS or any(size < 0 for size in self.sizes or ()):
            raise self.refusal(f"cannot split into {self.parts if self.sizes is None else list(self.sizes[:8])}")

    @property
    def outputs(self) -> int:
        """Number of parts."""
        return self.parts or 0 if self.sizes is None else len(self.sizes)

    def _sizes(self, shape: Shape, dim: int) -> tuple[int, ...]:
        if self.sizes is None:
            if shape[dim] % self.outputs:
                raise self.refusal(f"dim {self.dim} of {list(shape)} cannot be divided into {self.outputs} equal parts")
            return (shape[dim] // self.outputs,) * self.outputs
        if sum(self.sizes) != shape[dim]:
            total = f"{' + '.join(map(str, self.sizes))} = {sum(self.sizes)}"
            raise self.refusal(f"dim {self.dim} of {list(shape)} is {shape[dim]}, but {total}")
        return self.sizes

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of each part."""
        shape = self.only_shape(inputs)
        dim = self.axis(self.dim, shape)
        return tuple((*shape[:dim], size, *shape[dim + 1 :]) for size in self._sizes(shape, dim))

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Split the tensor."""
        import torch

        (tensor,) = tensors
        shape = tuple(tensor.shape)
        return torch.split(tensor, list(self._sizes(shape, self.axis(self.dim, shape))), self.dim)

    def inverse(self, inputs: Sequence[Shape]) -> Concat:
        """Return the concatenation along the same dim."""
        del inputs
        return Concat(self.dim)


@dataclass(frozen=True, slots=True)
class Concat(Moving):
    """Concatenate tensors along a dim, in the order of the inputs."""

    dim: Int = 0
    name: ClassVar[str] = "concat"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the output; its size along the dim is the sum of the sizes."""
        if not inputs:
            raise self.refusal("there is no tensor to join")
        first = inputs[0]
        dim = self.axis(self.dim, first)
        for shape in inputs:
            if len(shape) != len(first) or any(size != first[at] for at, size in enumerate(shape) if at != dim):
                raise self.refusal(f"{list(first)} and {list(shape)} differ in more than dim {self.dim}")
        return ((*first[:dim], sum(shape[dim] for shape in inputs), *first[dim + 1 :]),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Concatenate the tensors."""
        import torch

        return [torch.cat(list(tensors), self.dim)]

    def inverse(self, inputs: Sequence[Shape]) -> Split:
        """Return the split into the sizes of the inputs."""
        self.shapes(inputs)
        return Split(self.dim, tuple(shape[self.dim] for shape in inputs))


def _common_shape(operation: Moving, inputs: Sequence[Shape]) -> Shape:
    if not inputs:
        raise operation.refusal("there is no tensor to join")
    for shape in inputs:
        if shape != inputs[0]:
            raise operation.refusal(f"the tensors differ in shape: {list(inputs[0])} and {list(shape)}")
    return inputs[0]


@dataclass(frozen=True, slots=True)
class Stack(Moving):
    """Stack tensors of one shape along a new dim, such as the experts of a layer."""

    dim: Int = 0
    name: ClassVar[str] = "stack"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the output; the new dim has the number of tensors as its size."""
        shape = _common_shape(self, inputs)
        dim = self.axis(self.dim, (*shape, 0))
        return ((*shape[:dim], len(inputs), *shape[dim:]),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Stack the tensors."""
        import torch

        return [torch.stack(list(tensors), self.dim)]

    def inverse(self, inputs: Sequence[Shape]) -> Unstack:
        """Return the unstack along the same dim."""
        return Unstack(len(inputs), self.dim)


@dataclass(frozen=True, slots=True)
class Unstack(Moving):
    """Split a tensor along a dim of size ``parts``, and remove the dim."""

    parts: Int
    dim: Int = 0
    name: ClassVar[str] = "unstack"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for a number of parts that is not valid."""
        if not 1 <= self.parts <= _MAX_PARTS:
            raise self.refusal(f"cannot unstack into {self.parts} parts")

    @property
    def outputs(self) -> int:
        """Number of parts."""
        return self.parts

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape without the dim, once for each part."""
        shape = self.only_shape(inputs)
        dim = self.axis(self.dim, shape)
        if shape[dim] != self.parts:
            raise self.refusal(f"dim {self.dim} of {list(shape)} is {shape[dim]}, not {self.parts}")
        return ((*shape[:dim], *shape[dim + 1 :]),) * self.parts

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Unbind the dim."""
        return tensors[0].unbind(self.dim)

    def inverse(self, inputs: Sequence[Shape]) -> Stack:
        """Return the stack along the same dim."""
        del inputs
        return Stack(self.dim)


@dataclass(frozen=True, slots=True)
class Interleave(Moving):
    """Interleave tensors of one shape along a dim, ``block`` rows of each in turn, such as gate and up of an MLP."""

    dim: Int = 0
    block: Int = 1
    name: ClassVar[str] = "interleave"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for a block without rows."""
        if self.block < 1:
            raise self.refusal(f"block is {self.block}, not at least 1")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the output; its size along the dim is the sum of the sizes."""
        shape = _common_shape(self, inputs)
        dim = self.axis(self.dim, shape)
        if shape[dim] % self.block:
            raise self.refusal(f"dim {self.dim} of {list(shape)} is not divisible into blocks of {self.block}")
        return ((*shape[:dim], shape[dim] * len(inputs), *shape[dim + 1 :]),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Interleave the blocks."""
        import torch

        dim = self.dim % tensors[0].dim()
        blocks = tensors[0].shape[dim] // self.block
        parts = [unflatten(tensor, dim, (blocks, self.block)) for tensor in tensors]
        return [torch.stack(parts, dim + 1).flatten(dim, dim + 2)]

    def inverse(self, inputs: Sequence[Shape]) -> Deinterleave:
        """Return the deinterleave into the same number of tensors."""
        return Deinterleave(self.dim, len(inputs), self.block)


@dataclass(frozen=True, slots=True)
class Deinterleave(Moving):
    """Distribute the rows of a tensor to ``parts`` tensors along a dim, ``block`` rows to each in turn."""

    dim: Int = 0
    parts: Int = 2
    block: Int = 1
    name: ClassVar[str] = "deinterleave"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for a block without rows, and for a number of parts that is not valid."""
        if not 1 <= self.parts <= _MAX_PARTS or self.block < 1:
            raise self.refusal(f"cannot distribute blocks of {self.block} to {self.parts} parts")

    @property
    def outputs(self) -> int:
        """Number of parts."""
        return self.parts

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of each part."""
        shape = self.only_shape(inputs)
        dim = self.axis(self.dim, shape)
        if shape[dim] % (self.parts * self.block):
            raise self.refusal(
                f"dim {self.dim} of {list(shape)} is not divisible into {self.parts} parts in blocks of {self.block}"
            )
        return ((*shape[:dim], shape[dim] // self.parts, *shape[dim + 1 :]),) * self.parts

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Distribute the blocks."""
        (tensor,) = tensors
        dim = self.dim % tensor.dim()
        blocks = tensor.shape[dim] // (self.parts * self.block)
        blocked = unflatten(tensor, dim, (blocks, self.parts, self.block)).unbind(dim + 1)
        return [part.flatten(dim, dim + 1) for part in blocked]

    def inverse(self, inputs: Sequence[Shape]) -> Interleave:
        """Return the interleave with the same blocks."""
        del inputs
        return Interleave(self.dim, self.block)


@dataclass(frozen=True, slots=True)
class _Qkv(Moving):
    """The order of the rows in a fused projection of query, key and value.

    ``layout`` is ``concat`` (all queries, then all keys, then all values) or ``interleaved`` (for each key-value head
    its queries, its key and its value). ``kv_heads`` is ``heads`` by default. ``head_dim`` follows from the shape and
    is checked where it is given. ``dim`` is 0 for a Linear. For a Conv1D as in GPT-2, -1 is correct for both the weight
    and the bias.
    """

    heads: Int
    kv_heads: Int | None = None
    head_dim: Int | None = None
    layout: Text = "concat"
    dim: Int = 0

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for numbers of heads that do not match, and for an unknown layout."""
        if self.layout not in ("concat", "interleaved"):
            raise self.refusal(f"layout is {quoted(self.layout)}", "it must be concat or interleaved")
        if self.heads < 1 or self.key_value_heads < 1 or self.heads % self.key_value_heads:
            raise self.refusal(f"{self.heads} heads cannot share {self.key_value_heads} key-value heads evenly")
        if self.head_dim is not None and self.head_dim < 1:
            raise self.refusal(f"head_dim is {self.head_dim}, not at least 1")

    @property
    def key_value_heads(self) -> int:
        """Number of key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def counts(self) -> tuple[int, int, int]:
        """Return the number of heads in query, key and value."""
        return self.heads, self.key_value_heads, self.key_value_heads

    def head_size(self, shape: Shape, dim: int, heads: int) -> int:
        """Return the number of rows of a head; raise ``RuleError`` where the size of ``dim`` does not match."""
        size = shape[dim] // heads
        if size * heads != shape[dim] or self.head_dim not in (None, size):
            each = "" if self.head_dim is None else f" of {self.head_dim}"
            raise self.refusal(f"dim {self.dim} of {list(shape)} is not {heads} heads{each}")
        return size


@dataclass(frozen=True, slots=True)
class SplitQkv(_Qkv):
    """Split a fused projection into query, key and value."""

    name: ClassVar[str] = "split_qkv"

    @property
    def outputs(self) -> int:
        """Three: query, key and value."""
        return 3

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shapes of query, key and value."""
        shape = self.only_shape(inputs)
        dim = self.axis(self.dim, shape)
        size = self.head_size(shape, dim, sum(self.counts()))
        return tuple((*shape[:dim], size * count, *shape[dim + 1 :]) for count in self.counts())

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Split the rows."""
        import torch

        (tensor,) = tensors
        dim = self.dim % tensor.dim()
        size = tensor.shape[dim] // sum(self.counts())
        if self.layout == "concat":
            return torch.split(tensor, [size * count for count in self.counts()], dim)
        share = self.heads // self.key_value_heads
        grouped = unflatten(tensor, dim, (self.key_value_heads, share + 2, size))
        return [part.flatten(dim, dim + 2) for part in torch.split(grouped, [share, 1, 1], dim + 1)]

    def inverse(self, inputs: Sequence[Shape]) -> FuseQkv:
        """Return the fusion with the same layout."""
        del inputs
        return FuseQkv(self.heads, self.kv_heads, self.head_dim, self.layout, self.dim)


@dataclass(frozen=True, slots=True)
class FuseQkv(_Qkv):
    """Fuse query, key and value, in this order, into one projection."""

    name: ClassVar[str] = "fuse_qkv"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the fused projection."""
        if len(inputs) != 3:
            raise self.refusal(f"takes query, key and value, not {plural(len(inputs), 'tensor')}")
        dim = self.axis(self.dim, inputs[0])
        size = self.head_size(inputs[0], dim, self.heads)
        for part, shape in zip(("key", "value"), inputs[1:], strict=True):
            wanted = (*inputs[0][:dim], size * self.key_value_heads, *inputs[0][dim + 1 :])
            if shape != wanted:
                raise self.refusal(
                    f"the {part} is {list(shape)}, but a query of {list(inputs[0])} needs {list(wanted)}"
                )
        return ((*inputs[0][:dim], size * sum(self.counts()), *inputs[0][dim + 1 :]),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Fuse the rows."""
        import torch

        dim = self.dim % tensors[0].dim()
        if self.layout == "concat":
            return [torch.cat(list(tensors), dim)]
        size = tensors[0].shape[dim] // self.heads
        shares = (self.heads // self.key_value_heads, 1, 1)
        parts = [
            unflatten(tensor, dim, (self.key_value_heads, share, size))
            for tensor, share in zip(tensors, shares, strict=True)
        ]
        return [torch.cat(parts, dim + 1).flatten(dim, dim + 2)]

    def inverse(self, inputs: Sequence[Shape]) -> SplitQkv:
        """Return the split with the same layout."""
        del inputs
        return SplitQkv(self.heads, self.kv_heads, self.head_dim, self.layout, self.dim)
