"""Several tensors into one and back: concat and split, stack and unstack, interleave and deinterleave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckptkit.core.text import quoted
from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.operation import Int, Ints, Moving, Shape, Text, unflatten

__all__ = ["Concat", "Deinterleave", "FuseQkv", "Interleave", "Split", "SplitQkv", "Stack", "Unstack"]


_MOST_PARTS = 100_000  # an empty tensor divides into any number of them


@dataclass(frozen=True, slots=True)
class Split(Moving):
    """One tensor cut along a dim, into ``sizes`` or into equal ``parts``."""

    dim: Int = 0
    sizes: Ints | None = None
    parts: Int | None = None
    name: ClassVar[str] = "split"

    def __post_init__(self) -> None:
        """Refuse both ways of saying how many, and neither."""
        if (self.sizes is None) == (self.parts is None):
            raise self.refusal("needs either sizes or parts")
        if not 1 <= self.outputs <= _MOST_PARTS or any(size < 0 for size in self.sizes or ()):
            raise self.refusal(f"cannot cut into {self.parts if self.sizes is None else list(self.sizes[:8])}")

    @property
    def outputs(self) -> int:
        """Number of pieces."""
        return self.parts or 0 if self.sizes is None else len(self.sizes)

    def _sizes(self, shape: Shape, dim: int) -> tuple[int, ...]:
        if self.sizes is None:
            if shape[dim] % self.outputs:
                raise self.refusal(f"dim {self.dim} of {list(shape)} does not divide into {self.outputs} equal parts")
            return (shape[dim] // self.outputs,) * self.outputs
        if sum(self.sizes) != shape[dim]:
            total = f"{' + '.join(map(str, self.sizes))} = {sum(self.sizes)}"
            raise self.refusal(f"dim {self.dim} of {list(shape)} is {shape[dim]}, and {total}")
        return self.sizes

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return one shape a piece."""
        shape = self.only(inputs)
        dim = self.axis(self.dim, shape)
        return tuple((*shape[:dim], size, *shape[dim + 1 :]) for size in self._sizes(shape, dim))

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Cut."""
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
    """Tensors put one behind the other along a dim, in the order given."""

    dim: Int = 0
    name: ClassVar[str] = "concat"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the one shape, whose size along the dim is the sum."""
        if not inputs:
            raise self.refusal("there is nothing to join")
        first = inputs[0]
        dim = self.axis(self.dim, first)
        for shape in inputs:
            if len(shape) != len(first) or any(
                one != other for at, (one, other) in enumerate(zip(shape, first, strict=True)) if at != dim
            ):
                raise self.refusal(f"{list(first)} and {list(shape)} differ in more than dim {self.dim}")
        return ((*first[:dim], sum(shape[dim] for shape in inputs), *first[dim + 1 :]),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Join."""
        import torch

        return [torch.cat(list(tensors), self.dim)]

    def inverse(self, inputs: Sequence[Shape]) -> Split:
        """Return the split into the sizes that went in."""
        self.shapes(inputs)
        return Split(self.dim, tuple(shape[self.dim] for shape in inputs))


def _same(operation: Moving, inputs: Sequence[Shape]) -> Shape:
    if not inputs:
        raise operation.refusal("there is nothing to join")
    for shape in inputs:
        if shape != inputs[0]:
            raise operation.refusal(f"the tensors differ in shape: {list(inputs[0])} and {list(shape)}")
    return inputs[0]


@dataclass(frozen=True, slots=True)
class Stack(Moving):
    """Tensors of one shape along a new dim: the experts of a layer into one tensor."""

    dim: Int = 0
    name: ClassVar[str] = "stack"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the one shape, with the number of tensors as a new size."""
        shape = _same(self, inputs)
        dim = self.axis(self.dim, (*shape, 0))
        return ((*shape[:dim], len(inputs), *shape[dim:]),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Stack."""
        import torch

        return [torch.stack(list(tensors), self.dim)]

    def inverse(self, inputs: Sequence[Shape]) -> Unstack:
        """Return the taking apart along the same dim."""
        return Unstack(len(inputs), self.dim)


@dataclass(frozen=True, slots=True)
class Unstack(Moving):
    """One tensor taken apart along a dim of size ``parts``, which goes away."""

    parts: Int
    dim: Int = 0
    name: ClassVar[str] = "unstack"

    def __post_init__(self) -> None:
        """Refuse to make nothing."""
        if not 1 <= self.parts <= _MOST_PARTS:
            raise self.refusal(f"cannot take apart into {self.parts}")

    @property
    def outputs(self) -> int:
        """Number of pieces."""
        return self.parts

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape without the dim, once a piece."""
        shape = self.only(inputs)
        dim = self.axis(self.dim, shape)
        if shape[dim] != self.parts:
            raise self.refusal(f"dim {self.dim} of {list(shape)} is {shape[dim]}, not {self.parts}")
        return ((*shape[:dim], *shape[dim + 1 :]),) * self.parts

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take apart."""
        return tensors[0].unbind(self.dim)

    def inverse(self, inputs: Sequence[Shape]) -> Stack:
        """Return the stacking along the same dim."""
        del inputs
        return Stack(self.dim)


@dataclass(frozen=True, slots=True)
class Interleave(Moving):
    """Tensors of one shape taken in turns along a dim, ``block`` rows at a time: gate and up of a fused MLP."""

    dim: Int = 0
    block: Int = 1
    name: ClassVar[str] = "interleave"

    def __post_init__(self) -> None:
        """Refuse turns without a row."""
        if self.block < 1:
            raise self.refusal(f"cannot take turns of {self.block}")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the one shape, whose size along the dim is the sum."""
        shape = _same(self, inputs)
        dim = self.axis(self.dim, shape)
        if shape[dim] % self.block:
            raise self.refusal(f"dim {self.dim} of {list(shape)} is not made of blocks of {self.block}")
        return ((*shape[:dim], shape[dim] * len(inputs), *shape[dim + 1 :]),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take turns."""
        import torch

        dim = self.dim % tensors[0].dim()
        blocks = tensors[0].shape[dim] // self.block
        parts = [unflatten(tensor, dim, (blocks, self.block)) for tensor in tensors]
        return [torch.stack(parts, dim + 1).flatten(dim, dim + 2)]

    def inverse(self, inputs: Sequence[Shape]) -> Deinterleave:
        """Return the taking apart into as many tensors."""
        return Deinterleave(self.dim, len(inputs), self.block)


@dataclass(frozen=True, slots=True)
class Deinterleave(Moving):
    """One tensor dealt out along a dim into ``parts`` tensors, ``block`` rows at a time."""

    dim: Int = 0
    parts: Int = 2
    block: Int = 1
    name: ClassVar[str] = "deinterleave"

    def __post_init__(self) -> None:
        """Refuse turns without a row, and nobody to take them."""
        if not 1 <= self.parts <= _MOST_PARTS or self.block < 1:
            raise self.refusal(f"cannot deal out blocks of {self.block} into {self.parts}")

    @property
    def outputs(self) -> int:
        """Number of pieces."""
        return self.parts

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of each part."""
        shape = self.only(inputs)
        dim = self.axis(self.dim, shape)
        if shape[dim] % (self.parts * self.block):
            raise self.refusal(
                f"dim {self.dim} of {list(shape)} is not made of {self.parts} parts in blocks of {self.block}"
            )
        return ((*shape[:dim], shape[dim] // self.parts, *shape[dim + 1 :]),) * self.parts

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Deal out."""
        (tensor,) = tensors
        dim = self.dim % tensor.dim()
        blocks = tensor.shape[dim] // (self.parts * self.block)
        dealt = unflatten(tensor, dim, (blocks, self.parts, self.block)).unbind(dim + 1)
        return [part.flatten(dim, dim + 1) for part in dealt]

    def inverse(self, inputs: Sequence[Shape]) -> Interleave:
        """Return the taking in turns."""
        del inputs
        return Interleave(self.dim, self.block)


@dataclass(frozen=True, slots=True)
class _Qkv(Moving):
    """Where the rows of a fused projection lie.

    ``layout`` is ``concat`` (all queries, then all keys, then all values) or ``interleaved`` (for each key-value head
    its queries, its key, its value; with as many key-value heads as heads that is q, k, v of each head in turn).
    ``kv_heads`` is ``heads`` where not given. ``head_dim`` need not be given: it follows from the shape.
    ``dim`` is 0 for torch's Linear; 1 for a Conv1D weight as in GPT-2; -1 serves its weight and its bias.
    """

    heads: Int
    kv_heads: Int | None = None
    head_dim: Int | None = None
    layout: Text = "concat"
    dim: Int = 0

    def __post_init__(self) -> None:
        """Refuse heads that cannot share their keys evenly, and an unknown layout."""
        if self.layout not in ("concat", "interleaved"):
            raise self.refusal(f"layout is {quoted(self.layout)}", "it is concat or interleaved")
        if self.heads < 1 or self.groups < 1 or self.heads % self.groups:
            raise self.refusal(f"{self.heads} heads do not share {self.groups} key-value heads evenly")
        if self.head_dim is not None and self.head_dim < 1:
            raise self.refusal(f"a head is not {self.head_dim} rows")

    @property
    def groups(self) -> int:
        """Number of key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def counts(self) -> tuple[int, int, int]:
        """Return the number of heads in query, key and value."""
        return self.heads, self.groups, self.groups

    def head_size(self, shape: Shape, dim: int, heads: int) -> int:
        """Return the rows of a head; raises ``RuleError`` where the size of ``dim`` is not that many heads."""
        size = shape[dim] // heads
        if size * heads != shape[dim] or self.head_dim not in (None, size):
            each = "" if self.head_dim is None else f" of {self.head_dim}"
            raise self.refusal(f"dim {self.dim} of {list(shape)} is not {heads} heads{each}")
        return size


@dataclass(frozen=True, slots=True)
class SplitQkv(_Qkv):
    """A fused projection taken apart into query, key and value."""

    name: ClassVar[str] = "split_qkv"

    @property
    def outputs(self) -> int:
        """Query, key and value."""
        return 3

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shapes of query, key and value."""
        shape = self.only(inputs)
        dim = self.axis(self.dim, shape)
        size = self.head_size(shape, dim, sum(self.counts()))
        return tuple((*shape[:dim], size * count, *shape[dim + 1 :]) for count in self.counts())

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take apart."""
        import torch

        (tensor,) = tensors
        dim = self.dim % tensor.dim()
        size = tensor.shape[dim] // sum(self.counts())
        if self.layout == "concat":
            return torch.split(tensor, [size * count for count in self.counts()], dim)
        share = self.heads // self.groups
        grouped = unflatten(tensor, dim, (self.groups, share + 2, size))
        return [part.flatten(dim, dim + 2) for part in torch.split(grouped, [share, 1, 1], dim + 1)]

    def inverse(self, inputs: Sequence[Shape]) -> FuseQkv:
        """Return the fusion in the same layout."""
        del inputs
        return FuseQkv(self.heads, self.kv_heads, self.head_dim, self.layout, self.dim)


@dataclass(frozen=True, slots=True)
class FuseQkv(_Qkv):
    """Query, key and value, in this order, made one projection."""

    name: ClassVar[str] = "fuse_qkv"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the fused projection."""
        if len(inputs) != 3:
            raise self.refusal(f"takes query, key and value, and there are {len(inputs)}")
        dim = self.axis(self.dim, inputs[0])
        size = self.head_size(inputs[0], dim, self.heads)
        for part, shape in zip(("key", "value"), inputs[1:], strict=True):
            wanted = (*inputs[0][:dim], size * self.groups, *inputs[0][dim + 1 :])
            if shape != wanted:
                raise self.refusal(
                    f"the {part} is {list(shape)}, and a query of {list(inputs[0])} asks for {list(wanted)}"
                )
        return ((*inputs[0][:dim], size * sum(self.counts()), *inputs[0][dim + 1 :]),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Fuse."""
        import torch

        dim = self.dim % tensors[0].dim()
        if self.layout == "concat":
            return [torch.cat(list(tensors), dim)]
        size = tensors[0].shape[dim] // self.heads
        shares = (self.heads // self.groups, 1, 1)
        parts = [
            unflatten(tensor, dim, (self.groups, share, size)) for tensor, share in zip(tensors, shares, strict=True)
        ]
        return [torch.cat(parts, dim + 1).flatten(dim, dim + 2)]

    def inverse(self, inputs: Sequence[Shape]) -> SplitQkv:
        """Return the taking apart in the same layout."""
        del inputs
        return SplitQkv(self.heads, self.kv_heads, self.head_dim, self.layout, self.dim)
