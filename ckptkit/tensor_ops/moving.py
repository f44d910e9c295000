"""Operations that move the elements of one tensor: transpose, permute, reshape, slice, and the order of RoPE rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckptkit.core.text import quoted
from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.operation import Int, Ints, Moving, Shape, Text

__all__ = ["Permute", "Reshape", "RopePermute", "Slice", "Transpose"]


@dataclass(frozen=True, slots=True)
class Transpose(Moving):
    """Exchange two dims; without parameters, the two dims of a matrix."""

    dim0: Int | None = None
    dim1: Int | None = None
    name: ClassVar[str] = "transpose"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for one dim without the other."""
        if (self.dim0 is None) != (self.dim1 is None):
            raise self.refusal("needs both dim0 and dim1, or neither")

    def _dims(self, shape: Shape) -> tuple[int, int]:
        if self.dim0 is None or self.dim1 is None:
            if len(shape) != 2:
                raise self.refusal(f"{list(shape)} is not a matrix", "give the dims: dim0, dim1")
            return 0, 1
        return self.axis(self.dim0, shape), self.axis(self.dim1, shape)

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape with two sizes exchanged."""
        sizes = list(shape := self.only_shape(inputs))
        first, second = self._dims(shape)
        sizes[first], sizes[second] = sizes[second], sizes[first]
        return (tuple(sizes),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Exchange the dims."""
        return [tensors[0].transpose(*self._dims(tuple(tensors[0].shape)))]

    def inverse(self, inputs: Sequence[Shape]) -> Transpose:
        """Return the operation itself, which is its own inverse."""
        del inputs
        return self


@dataclass(frozen=True, slots=True)
class Permute(Moving):
    """Reorder all dims: dim ``i`` of the output is dim ``dims[i]`` of the input, as in ``Tensor.permute``."""

    dims: Ints
    name: ClassVar[str] = "permute"

    def _dims(self, shape: Shape) -> list[int]:
        dims = [self.axis(dim, shape) for dim in self.dims]
        if sorted(dims) != list(range(len(shape))):
            raise self.refusal(f"dims {list(self.dims)} must name each dim of {list(shape)} once")
        return dims

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the sizes in the new order."""
        shape = self.only_shape(inputs)
        return (tuple(shape[dim] for dim in self._dims(shape)),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Reorder the dims."""
        return [tensors[0].permute(self.dims)]

    def inverse(self, inputs: Sequence[Shape]) -> Permute:
        """Return the inverse permutation."""
        dims = self._dims(self.only_shape(inputs))
        return Permute(tuple(dims.index(dim) for dim in range(len(dims))))


@dataclass(frozen=True, slots=True)
class Reshape(Moving):
    """Give the elements, in the same order, another shape; one size may be -1, as in ``Tensor.reshape``."""

    shape: Ints
    name: ClassVar[str] = "reshape"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for a shape that is not valid."""
        if any(size < -1 for size in self.shape) or self.shape.count(-1) > 1:
            raise self.refusal(f"{list(self.shape)} is not a valid shape")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the new shape."""
        shape = self.only_shape(inputs)
        count, rest = math.prod(shape), math.prod(size for size in self.shape if size != -1)
        if -1 in self.shape:
            if rest == 0 or count % rest:
                raise self.refusal(f"the {count:,} elements of {list(shape)} do not fill {list(self.shape)}")
            return (tuple(count // rest if size == -1 else size for size in self.shape),)
        if count != rest:
            raise self.refusal(f"{list(shape)} has {count:,} elements, but {list(self.shape)} has {rest:,}")
        return (self.shape,)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Give the elements the new shape."""
        return [tensors[0].reshape(self.shape)]

    def inverse(self, inputs: Sequence[Shape]) -> Reshape:
        """Return the reshape to the shape of the input."""
        return Reshape(self.only_shape(inputs))


@dataclass(frozen=True, slots=True)
class Slice(Moving):
    """Take the rows from ``start`` up to ``stop`` (by default, the end) of one dim; the rows must exist."""

    dim: Int = 0
    start: Int = 0
    stop: Int | None = None
    name: ClassVar[str] = "slice"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for a range that is not valid."""
        if self.start < 0 or (self.stop is not None and self.stop < self.start):
            raise self.refusal(f"{self.start} to {self.stop} is not a valid range")

    @property
    def lossy(self) -> bool:
        """Whether rows are lost; always true, because it depends on the shape of the input."""
        return True

    def _range(self, shape: Shape) -> tuple[int, int, int]:
        dim = self.axis(self.dim, shape)
        stop = shape[dim] if self.stop is None else self.stop
        if not self.start <= stop <= shape[dim]:
            raise self.refusal(f"dim {self.dim} of {list(shape)} does not have the rows from {self.start} to {stop}")
        return dim, self.start, stop - self.start

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape with the smaller size."""
        shape = self.only_shape(inputs)
        dim, _, length = self._range(shape)
        return ((*shape[:dim], length, *shape[dim + 1 :]),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take the rows."""
        return [tensors[0].narrow(*self._range(tuple(tensors[0].shape)))]


@dataclass(frozen=True, slots=True)
class RopePermute(Moving):
    """Reorder the rows of a query or key projection (weight or bias) between two conventions for rotary embeddings.

    In Meta's checkpoints, the two rows of a rotated pair are next to each other. In Hugging Face's checkpoints, the two
    rows are half a head apart. ``direction`` is ``to_hf`` or ``to_original``. ``heads`` is the number of heads of the
    tensor: for a key, the number of key-value heads. Shapes do not show whether a tensor needs this operation.
    """

    heads: Int
    direction: Text
    name: ClassVar[str] = "rope_permute"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for an unknown direction and for less than one head."""
        if self.direction not in ("to_hf", "to_original"):
            raise self.refusal(f"direction is {quoted(self.direction)}", "it must be to_hf or to_original")
        if self.heads < 1:
            raise self.refusal(f"heads is {self.heads}, not at least 1")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the input."""
        shape = self.only_shape(inputs)
        if not shape or shape[0] % (2 * self.heads):
            raise self.refusal(f"the rows of {list(shape)} cannot be divided into {self.heads} heads of pairs")
        return (shape,)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Reorder the rows of each head."""
        (tensor,) = tensors
        half = tensor.shape[0] // (2 * self.heads)
        inner = (half, 2) if self.direction == "to_hf" else (2, half)
        return [tensor.reshape(self.heads, *inner, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)]

    def inverse(self, inputs: Sequence[Shape]) -> RopePermute:
        """Return the operation in the other direction."""
        del inputs
        return RopePermute(self.heads, "to_original" if self.direction == "to_hf" else "to_hf")
