"""One tensor into one, its elements moved: transpose, permute, reshape, slice, RoPE rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckptkit.core.text import quoted
from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.operation import Int, Ints, Moving, Shape, Text, elements

__all__ = ["Permute", "Reshape", "RopePermute", "Slice", "Transpose"]


@dataclass(frozen=True, slots=True)
class Transpose(Moving):
    """Two dims exchanged; without parameters, the two of a matrix."""

    dim0: Int | None = None
    dim1: Int | None = None
    name: ClassVar[str] = "transpose"

    def __post_init__(self) -> None:
        """Refuse one dim without the other."""
        if (self.dim0 is None) != (self.dim1 is None):
            raise self.refusal("needs both dim0 and dim1, or neither")

    def _dims(self, shape: Shape) -> tuple[int, int]:
        if self.dim0 is None or self.dim1 is None:
            if len(shape) != 2:
                raise self.refusal(f"{list(shape)} is no matrix", "say which dims: dim0, dim1")
            return 0, 1
        return self.axis(self.dim0, shape), self.axis(self.dim1, shape)

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape with two sizes exchanged."""
        made = list(shape := self.only(inputs))
        one, other = self._dims(shape)
        made[one], made[other] = made[other], made[one]
        return (tuple(made),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Exchange the dims."""
        return [tensors[0].transpose(*self._dims(tuple(tensors[0].shape)))]

    def inverse(self, inputs: Sequence[Shape]) -> Transpose:
        """Return itself."""
        del inputs
        return self


@dataclass(frozen=True, slots=True)
class Permute(Moving):
    """All dims in another order: output dim ``i`` is input dim ``dims[i]``, as in torch."""

    dims: Ints
    name: ClassVar[str] = "permute"

    def _dims(self, shape: Shape) -> list[int]:
        dims = [self.axis(dim, shape) for dim in self.dims]
        if sorted(dims) != list(range(len(shape))):
            raise self.refusal(f"dims {list(self.dims)} do not name each dim of {list(shape)} once")
        return dims

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the sizes in the new order."""
        shape = self.only(inputs)
        return (tuple(shape[dim] for dim in self._dims(shape)),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Reorder the dims."""
        return [tensors[0].permute(self.dims)]

    def inverse(self, inputs: Sequence[Shape]) -> Permute:
        """Return the permutation back."""
        dims = self._dims(self.only(inputs))
        return Permute(tuple(dims.index(dim) for dim in range(len(dims))))


@dataclass(frozen=True, slots=True)
class Reshape(Moving):
    """The same elements in the same order under another shape; one size may be -1, as in torch."""

    shape: Ints
    name: ClassVar[str] = "reshape"

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        if any(size < -1 for size in self.shape) or self.shape.count(-1) > 1:
            raise self.refusal(f"{list(self.shape)} is no shape")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the new shape."""
        shape = self.only(inputs)
        count, rest = elements(shape), elements(tuple(size for size in self.shape if size != -1))
        if -1 in self.shape:
            if rest == 0 or count % rest:
                raise self.refusal(f"the {count:,} elements of {list(shape)} do not fill {list(self.shape)}")
            return (tuple(count // rest if size == -1 else size for size in self.shape),)
        if count != rest:
            raise self.refusal(f"{list(shape)} has {count:,} elements, and {list(self.shape)} has {rest:,}")
        return (self.shape,)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Give the elements the new shape."""
        return [tensors[0].reshape(self.shape)]

    def inverse(self, inputs: Sequence[Shape]) -> Reshape:
        """Return the reshape to what went in."""
        return Reshape(self.only(inputs))


@dataclass(frozen=True, slots=True)
class Slice(Moving):
    """The rows from ``start`` up to ``stop`` (its end where not given) of one dim; nothing beyond it is asked for."""

    dim: Int = 0
    start: Int = 0
    stop: Int | None = None
    name: ClassVar[str] = "slice"

    def __post_init__(self) -> None:
        """Refuse a range that runs backwards."""
        if self.start < 0 or (self.stop is not None and self.stop < self.start):
            raise self.refusal(f"{self.start} to {self.stop} is no range")

    @property
    def lossy(self) -> bool:
        """What is cut off is gone."""
        return True

    def _range(self, shape: Shape) -> tuple[int, int, int]:
        dim = self.axis(self.dim, shape)
        stop = shape[dim] if self.stop is None else self.stop
        if not self.start <= stop <= shape[dim]:
            raise self.refusal(f"dim {self.dim} of {list(shape)} does not reach from {self.start} to {stop}")
        return dim, self.start, stop - self.start

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape with one size cut."""
        shape = self.only(inputs)
        dim, _, length = self._range(shape)
        return ((*shape[:dim], length, *shape[dim + 1 :]),)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take the rows."""
        return [tensors[0].narrow(*self._range(tuple(tensors[0].shape)))]


@dataclass(frozen=True, slots=True)
class RopePermute(Moving):
    """Rows of a query or key projection between two orders of a head's rotated pairs; weights and biases.

    The original order of Meta's checkpoints puts the two rows of a pair side by side, the one of Hugging Face half a
    head apart. ``direction`` is ``to_hf`` or ``to_original``; ``heads`` counts the heads of this very tensor (the
    key-value heads for keys). A check of shapes cannot see whether it is needed.
    """

    heads: Int
    direction: Text
    name: ClassVar[str] = "rope_permute"

    def __post_init__(self) -> None:
        """Refuse an unknown direction."""
        if self.direction not in ("to_hf", "to_original"):
            raise self.refusal(f"direction is {quoted(self.direction)}", "it is to_hf or to_original")
        if self.heads < 1:
            raise self.refusal(f"there are no {self.heads} heads")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape as it is."""
        shape = self.only(inputs)
        if not shape or shape[0] % (2 * self.heads):
            raise self.refusal(f"the rows of {list(shape)} are not {self.heads} heads of pairs")
        return (shape,)

    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Reorder the rows of each head."""
        (tensor,) = tensors
        half = tensor.shape[0] // (2 * self.heads)
        inner = (half, 2) if self.direction == "to_hf" else (2, half)
        return [tensor.reshape(self.heads, *inner, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)]

    def inverse(self, inputs: Sequence[Shape]) -> RopePermute:
        """Return the other direction."""
        del inputs
        return RopePermute(self.heads, "to_original" if self.direction == "to_hf" else "to_hf")
