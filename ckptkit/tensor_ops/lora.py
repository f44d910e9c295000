"""LoRA: the operations that fold and extract an adapter."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckptkit.core.text import plural
from ckptkit.core.torch_bridge import torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.operation import Arithmetic, Flag, Int, Number, Operation, Rounded, Shape, working_dtype

__all__ = ["ExtractLora", "FoldLora", "LoraAlpha", "as_f32", "largest_rank"]


@dataclass(frozen=True, slots=True)
class FoldLora(Arithmetic):
    """Compute ``W + scale * B @ A`` from ``[W, A, B]``, as peft merges an adapter, rounded once.

    A is ``[r, in]`` and B ``[out, r]``; for a convolution A is ``[r, in, *kernel]`` and B ``[out, r, 1, ...]``.
    ``fan_in_fan_out`` means that W is ``[in, out]``, as in a Conv1D of GPT-2 and in every embedding (A ``[r, vocab]``,
    B ``[dim, r]``). For two inputs ``[bias, lora_bias]`` the output is ``bias + scale * lora_bias``. Without ``scale``,
    the scale is ``alpha`` over the rank, or over the square root of the rank with ``rslora``. ``r`` is the expected
    rank.
    """

    scale: Number | None = None
    alpha: Number | None = None
    r: Int | None = None
    rslora: Flag = False
    fan_in_fan_out: Flag = False
    name: ClassVar[str] = "fold_lora"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` unless exactly one of ``scale`` and ``alpha`` is given, and for a rank below 1."""
        if (self.scale is None) == (self.alpha is None):
            raise self.refusal("needs either scale or alpha")
        if self.r is not None and self.r < 1:
            raise self.refusal(f"{self.r} is not a valid rank")

    def scale_for(self, rank: int) -> float:
        """Return the scale for a rank."""
        if self.scale is not None or self.alpha is None:
            return self.scale or 0.0
        return self.alpha / math.sqrt(rank) if self.rslora else self.alpha / rank

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of W; raise ``RuleError`` where ``B @ A`` does not have that shape."""
        if len(inputs) == 2:
            if self.scale is None and self.r is None:
                raise self.refusal("a bias does not tell the rank", "give r, or scale")
            if inputs[0] != inputs[1]:
                raise self.refusal(f"the bias is {list(inputs[0])}, but its update is {list(inputs[1])}")
            return (inputs[0],)
        if len(inputs) != 3:
            raise self.refusal(f"takes W, A and B, not {plural(len(inputs), 'tensor')}")
        weight, down, up = inputs
        if min(map(len, inputs)) < 2 or up[2:] != (1,) * (len(down) - 2) or up[1] != down[0] or down[0] < 1:
            raise self.refusal(f"A of {list(down)} and B of {list(up)} have no rank in common")
        if self.r not in (None, down[0]):
            raise self.refusal(f"A of {list(down)} has rank {down[0]}, not {self.r}")
        update = (up[0], *down[1:])
        if self.fan_in_fan_out:
            update = tuple(reversed(update))
        if update != weight or (self.fan_in_fan_out and len(weight) != 2):
            raise self.refusal(f"A of {list(down)} and B of {list(up)} make {list(update)}, but W is {list(weight)}")
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply, scale and add."""
        if len(tensors) == 2:
            return [tensors[1] * self.scale_for(self.r or 1) + tensors[0]]
        weight, down, up = tensors
        update = up.flatten(1) @ down.flatten(1)
        update = (update.T if self.fan_in_fan_out else update.reshape(weight.shape)) * self.scale_for(down.shape[0])
        return [update.add_(weight)]


@dataclass(frozen=True, slots=True)
class LoraAlpha(Operation):
    """Make the tensor ``alpha`` of a file of kohya, a number without dims, beside the factor that is the input.

    The dtype is F32, or F64 where F32 does not hold the number.
    """

    alpha: Number
    name: ClassVar[str] = "lora_alpha"

    @property
    def lossy(self) -> bool:
        """Whether the input cannot be restored: it cannot."""
        return True

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape without dims."""
        self.only_shape(inputs)
        return ((),)

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtype that holds the number."""
        del inputs
        return ("F32" if as_f32(self.alpha) == self.alpha else "F64",)

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Make the tensor."""
        del rounded
        import torch

        return (torch.tensor(self.alpha, dtype=torch_dtype(self.dtypes([])[0]), device=tensors[0].device),)


def as_f32(number: float) -> float:
    """Return the number that F32 holds for ``number``, which is infinite where that is too large."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


@dataclass(frozen=True, slots=True)
class ExtractLora(Arithmetic):
    """Compute ``[A, B]`` of rank ``rank`` from ``[base, tuned]``, so that ``B @ A`` is nearest to ``tuned - base``.

    The scale is 1. By singular value decomposition, each factor gets the square root of the singular values. The
    largest entry of each column of B is positive, so the signs do not depend on the machine. For convolutions, A and B
    have the same shapes as in ``fold_lora``.
    """

    rank: Int
    fan_in_fan_out: Flag = False
    name: ClassVar[str] = "extract_lora"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for a rank below 1."""
        if self.rank < 1:
            raise self.refusal(f"{self.rank} is not a valid rank")

    @property
    def outputs(self) -> int:
        """Two: A and B."""
        return 2

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shapes of A and B."""
        if len(inputs) != 2 or inputs[0] != inputs[1]:
            raise self.refusal(f"takes two weights of one shape, not {', '.join(str(list(s)) for s in inputs)}")
        shape = inputs[0]
        if len(shape) < 2 or (self.fan_in_fan_out and len(shape) != 2):
            raise self.refusal(f"{list(shape)} is not a {'matrix' if self.fan_in_fan_out else 'weight'} to decompose")
        if self.rank > largest_rank(shape):
            raise self.refusal(f"an update of {list(shape)} has a rank of at most {largest_rank(shape)}")
        out, *ins = reversed(shape) if self.fan_in_fan_out else shape
        return (self.rank, *ins), (out, self.rank, *(1 for _ in ins[1:]))

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Decompose the difference."""
        import torch

        update = _difference(tensors, fan_in_fan_out=self.fan_in_fan_out)
        if not torch.isfinite(update).all():
            raise self.refusal("the change has values that are not finite")
        left, values, right = torch.linalg.svd(update.flatten(1), full_matrices=False)
        left, values, right = left[:, : self.rank], values[: self.rank].sqrt(), right[: self.rank]
        signs = torch.gather(left, 0, left.abs().argmax(0, keepdim=True)).sign()
        down = (right * signs.T) * values[:, None]
        up = (left * signs) * values
        return [
            down.reshape(self.rank, *update.shape[1:]),
            up.reshape(*up.shape, *(1 for _ in update.shape[2:])),
        ]

    def residual(self, tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> float:
        """Return the norm of ``tuned - base - B @ A`` divided by the norm of ``tuned - base``."""
        whole, left_out = self.norms(tensors, factors)
        return left_out / whole if whole else 0.0

    def norms(self, tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[float, float]:
        """Return the norms of ``tuned - base`` and of ``tuned - base - B @ A``."""
        wide = working_dtype(tensors)
        update = _difference([tensor.to(wide) for tensor in tensors], fan_in_fan_out=self.fan_in_fan_out).flatten(1)
        down, up = (factor.to(wide).flatten(1) for factor in factors)
        return float(update.norm()), float((update - up @ down).norm())


def largest_rank(shape: Shape) -> int:
    """Return the largest rank that the update of a weight of this shape can have."""
    out, *ins = shape
    return min(out, math.prod(ins))


def _difference(tensors: Sequence[Tensor], *, fan_in_fan_out: bool) -> Tensor:
    base, tuned = tensors
    return (tuned - base).T if fan_in_fan_out else tuned - base
