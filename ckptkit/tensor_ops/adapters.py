"""The folds of adapters other than plain LoRA: each is the published formula of one kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckptkit.core.text import plural
from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.lora import FoldLora
from ckptkit.tensor_ops.operation import Arithmetic, Flag, Int, Ints, Number, Shape

__all__ = ["FoldAdalora", "FoldDora", "FoldIa3", "FoldLocon", "FoldLoha", "FoldLokr", "FoldLoraExperts", "ReplaceRows"]


@dataclass(frozen=True, slots=True)
class FoldDora(Arithmetic):
    """Compute ``m * V / |V|`` with ``V = W + scale * B @ A``, from ``[W, A, B, m]`` (arXiv 2402.09353).

    The norm is taken for each output, over everything else; with ``per_input`` for each input, as LyCORIS does by
    default. ``m`` has one value for each of them, in any shape. ``fan_in_fan_out`` is as in ``fold_lora``.
    """

    scale: Number
    fan_in_fan_out: Flag = False
    per_input: Flag = False
    name: ClassVar[str] = "fold_dora"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of W; raise ``RuleError`` where the magnitudes or the factors do not fit it."""
        if len(inputs) != 4:
            raise self.refusal(f"takes W, A, B and the magnitude, not {plural(len(inputs), 'tensor')}")
        weight, *factors, magnitude = inputs
        _lora(self.scale, fan_in_fan_out=self.fan_in_fan_out).shapes([weight, *factors])
        if math.prod(magnitude) != weight[self._dim]:
            raise self.refusal(f"the magnitude is {list(magnitude)}, and W needs {weight[self._dim]} values")
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Fold the factors, and give each output its magnitude."""
        import torch

        (updated,) = _lora(self.scale, fan_in_fan_out=self.fan_in_fan_out).compute(tensors[:3])
        others = [dim for dim in range(updated.dim()) if dim != self._dim]
        norm = torch.linalg.vector_norm(updated, dim=others, keepdim=True)
        return [updated * (tensors[3].reshape(norm.shape) / norm)]

    @property
    def _dim(self) -> int:
        return int(self.fan_in_fan_out != self.per_input)


@dataclass(frozen=True, slots=True)
class FoldAdalora(Arithmetic):
    """Compute ``W + scale * B @ (A * E)`` from ``[W, A, B, E]`` (AdaLoRA, arXiv 2303.10512).

    ``E`` is ``[r, 1]``, the singular values. ``scale`` is alpha over the rank. ``fan_in_fan_out`` is as in
    ``fold_lora``.
    """

    scale: Number
    fan_in_fan_out: Flag = False
    name: ClassVar[str] = "fold_adalora"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of W; raise ``RuleError`` where the factors do not fit it."""
        if len(inputs) != 4:
            raise self.refusal(f"takes W, A, B and E, not {plural(len(inputs), 'tensor')}")
        weight, down, up, values = inputs
        if len(down) != 2 or values != (down[0], 1):
            raise self.refusal(f"A is {list(down)}, and E is {list(values)}")
        if len(up) == 2 and down[0] == up[1] == 0:  # every singular value was cut
            down, up = (1, down[1]), (up[0], 1)
        return _lora(self.scale, fan_in_fan_out=self.fan_in_fan_out).shapes([weight, down, up])

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Scale the rows of A, multiply and add."""
        weight, down, up, values = tensors
        return _lora(self.scale, fan_in_fan_out=self.fan_in_fan_out).compute([weight, down * values, up])


@dataclass(frozen=True, slots=True)
class FoldLoraExperts(Arithmetic):
    """Compute ``W[e] + scale * B_e @ A_e`` for each expert e of a stacked weight, from ``[W, A, B]``.

    W is ``[experts, out, in]``, A ``[experts * r, in]`` and B ``[out, r * experts]``, as PEFT stores the adapter of a
    parameter with three dims. With ``fan_in_fan_out`` W is ``[experts, in, out]``.
    """

    scale: Number
    fan_in_fan_out: Flag = False
    name: ClassVar[str] = "fold_lora_experts"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of W; raise ``RuleError`` where the factors do not fit it."""
        if len(inputs) != 3:
            raise self.refusal(f"takes W, A and B, not {plural(len(inputs), 'tensor')}")
        weight, down, up = inputs
        if len(weight) != 3 or len(down) != 2 or len(up) != 2 or down[0] != up[1] or not weight[0] or down[0] == 0:
            raise self.refusal(f"A of {list(down)} and B of {list(up)} do not fit {list(weight)}")
        sizes = (down[1], up[0]) if self.fan_in_fan_out else (up[0], down[1])
        if down[0] % weight[0] or sizes != weight[1:]:
            raise self.refusal(f"A of {list(down)} and B of {list(up)} do not fit {list(weight)}")
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply, scale and add, one expert after the other."""
        import torch

        weight, down, up = tensors
        experts = weight.shape[0]
        downs = down.reshape(experts, -1, down.shape[1])
        ups = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
        update = torch.bmm(ups, downs)
        return [weight + self.scale * (update.transpose(1, 2) if self.fan_in_fan_out else update)]


@dataclass(frozen=True, slots=True)
class FoldLocon(Arithmetic):
    """Compute ``W + scale * B @ M @ A`` of a convolution, the LoRA with a core that LyCORIS calls LoCon.

    The inputs are W ``[out, in, *kernel]``, A ``[r, in, 1, ...]``, B ``[out, r, 1, ...]``, and M ``[r, r, *kernel]``.
    """

    scale: Number
    name: ClassVar[str] = "fold_locon"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of W; raise ``RuleError`` where the factors do not fit it."""
        if len(inputs) != 4:
            raise self.refusal(f"takes W, A, B and M, not {plural(len(inputs), 'tensor')}")
        weight, down, up, core = inputs
        ones = (1,) * (len(weight) - 2)
        fits = len(weight) > 2 and len(down) > 1 and len(core) > 1 and down[0] == core[1]
        if not fits or down[1:] != (weight[1], *ones) or up != (weight[0], core[0], *ones) or core[2:] != weight[2:]:
            raise self.refusal(f"{_listed((down, up, core))} do not make {list(weight)}")
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply the core from both sides."""
        import torch

        weight, down, up, core = tensors
        update = torch.einsum("om,mnk,ni->oik", up.flatten(1), core.flatten(2), down.flatten(1))
        return [weight + self.scale * update.reshape(weight.shape)]


@dataclass(frozen=True, slots=True)
class FoldLoha(Arithmetic):
    """Compute ``W + scale * (w1_a @ w1_b) * (w2_a @ w2_b)``, the product of two low ranks (arXiv 2108.06098).

    The inputs are ``[W, w1_a, w1_b, w2_a, w2_b]``. For a convolution with effective kernels they are followed by
    ``t1`` and ``t2``, each ``[r, r, *kernel]``; then the factors ``a`` are ``[r, out]`` and ``b`` ``[r, in]``.
    """

    scale: Number
    name: ClassVar[str] = "fold_loha"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of W; raise ``RuleError`` where the factors do not fit it."""
        if len(inputs) not in (5, 7):
            raise self.refusal(f"takes W with four factors, and t1 and t2 or none, not {plural(len(inputs), 'tensor')}")
        weight, *pairs = inputs
        kernels: Sequence[Shape | None] = pairs[4:] or (None, None)
        for left, right, kernel in zip(pairs[0:4:2], pairs[1:4:2], kernels, strict=True):
            made = _product_shape(left, right, kernel)
            if made is None or math.prod(made) != math.prod(weight) or made[0] != weight[0]:
                raise self.refusal(f"{_listed((left, right, kernel))} do not make {list(weight)}")
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply the two products element by element."""
        weight, *pairs = tensors
        kernels: Sequence[Tensor | None] = pairs[4:] or (None, None)
        first = _product(pairs[0], pairs[1], kernels[0])
        second = _product(pairs[2], pairs[3], kernels[1])
        return [weight + self.scale * (first * second).reshape(weight.shape)]


@dataclass(frozen=True, slots=True)
class FoldLokr(Arithmetic):
    """Compute ``W + scale * kron(w1, w2)``, the Kronecker product of two small matrices (arXiv 2212.10650).

    The inputs are W, then the factors of ``w1`` and those of ``w2``. ``w1`` and ``w2`` are the numbers of these: 1 for
    the matrix itself, 2 for ``a @ b``. A third factor of ``w2`` is ``t2`` ``[r, r, *kernel]``, with ``a`` of
    ``[r, out]`` and ``b`` of ``[r, in]``.
    """

    scale: Number
    w1: Int = 1
    w2: Int = 1
    name: ClassVar[str] = "fold_lokr"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for a number of factors that the formula does not have."""
        if self.w1 not in (1, 2) or self.w2 not in (1, 2, 3):
            raise self.refusal(f"w1 has 1 or 2 factors and w2 1 to 3, not {self.w1} and {self.w2}")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of W; raise ``RuleError`` where the factors do not fit it."""
        if len(inputs) != 1 + self.w1 + self.w2:
            raise self.refusal(f"takes W and {self.w1 + self.w2} factors, not {plural(len(inputs), 'tensor')}")
        weight, factors = inputs[0], inputs[1:]
        first, second = _matrix_shape(factors[: self.w1]), _matrix_shape(factors[self.w1 :])
        if first is None or second is None or len(first) != 2 or len(second) < 2:
            raise self.refusal(f"{_listed(factors)} do not make two matrices")
        made = (first[0] * second[0], math.prod(first) * math.prod(second))
        if made != (weight[0] if weight else 0, math.prod(weight)):
            raise self.refusal(f"{_listed(factors)} do not make {list(weight)}")
        if len(second) > 2 and (first[1] * second[1] != weight[1] or math.prod(second[2:]) != math.prod(weight[2:])):
            raise self.refusal(f"{_listed(factors)} do not make {list(weight)}")
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Make both matrices, and multiply each element of the first with the second."""
        import torch

        weight, factors = tensors[0], tensors[1:]
        first, second = _matrix(factors[: self.w1]), _matrix(factors[self.w1 :])
        first = first.reshape(*first.shape, *(1 for _ in second.shape[2:]))
        return [weight + self.scale * torch.kron(first, second.contiguous()).reshape(weight.shape)]


@dataclass(frozen=True, slots=True)
class FoldIa3(Arithmetic):
    """Multiply each output of W with its value in ``l``, from ``[W, l]`` (arXiv 2205.05638).

    With ``per_input``, each input is multiplied. ``l`` may have any shape. ``fan_in_fan_out`` is as in ``fold_lora``.
    W may also be a bias, whose elements are outputs.
    """

    per_input: Flag = False
    fan_in_fan_out: Flag = False
    name: ClassVar[str] = "fold_ia3"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of W; raise ``RuleError`` where ``l`` does not fit it."""
        if len(inputs) != 2 or not inputs[0]:
            raise self.refusal(f"takes W and l, not {_listed(inputs)}")
        weight, values = inputs
        dim = self._dim(len(weight))
        if dim >= len(weight) or math.prod(values) != weight[dim]:
            raise self.refusal(f"l of {list(values)} does not fit {list(weight)}")
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply."""
        weight, values = tensors
        dim = self._dim(weight.dim())
        return [weight * values.reshape([-1 if each == dim else 1 for each in range(weight.dim())])]

    def _dim(self, dims: int) -> int:
        return int(self.fan_in_fan_out != self.per_input) if dims > 1 else int(self.per_input)


@dataclass(frozen=True, slots=True)
class ReplaceRows(Arithmetic):
    """Put new rows into a weight, from ``[W, rows]``: row i of ``rows`` becomes the row ``indices[i]`` of W."""

    indices: Ints
    name: ClassVar[str] = "replace_rows"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for no index, and for one that is negative or given twice."""
        if not self.indices or min(self.indices) < 0 or len(set(self.indices)) != len(self.indices):
            raise self.refusal("needs indices of rows, each once and counted from 0")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of W; raise ``RuleError`` where the rows do not fit it."""
        if len(inputs) != 2 or not inputs[0]:
            raise self.refusal(f"takes W and rows, not {_listed(inputs)}")
        weight, rows = inputs
        if rows != (len(self.indices), *weight[1:]):
            raise self.refusal(f"the rows are {list(rows)}, and {[len(self.indices), *weight[1:]]} fit {list(weight)}")
        if max(self.indices) >= weight[0]:
            raise self.refusal(f"there is no row {max(self.indices)} in {list(weight)}")
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Copy the weight, and write the rows."""
        import torch

        weight, rows = tensors
        return [weight.index_copy(0, torch.tensor(self.indices), rows)]


def _lora(scale: float, *, fan_in_fan_out: bool) -> FoldLora:
    return FoldLora(scale, fan_in_fan_out=fan_in_fan_out)


def _listed(shapes: Sequence[Shape | None]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes if shape is not None)


def _product_shape(left: Shape, right: Shape, kernel: Shape | None) -> Shape | None:
    """Return the shape of ``left @ right``, or of the three factors of a convolution; None where they do not fit."""
    if len(left) != 2 or len(right) != 2 or min(*left, *right) < 1:
        return None
    if kernel is None:
        return (left[0], right[1]) if left[1] == right[0] else None
    if len(kernel) < 3 or kernel[:2] != (right[0], left[0]):
        return None
    return left[1], right[1], *kernel[2:]


def _product(left: Tensor, right: Tensor, kernel: Tensor | None) -> Tensor:
    """Return ``left @ right``, or the Tucker product ``sum_ij kernel[i, j] * left[i, out] * right[j, in]``."""
    import torch

    if kernel is None:
        return left @ right
    return torch.einsum("ij...,jr,ip->pr...", kernel, right, left)


def _matrix_shape(factors: Sequence[Shape]) -> Shape | None:
    if len(factors) == 1:
        return factors[0]
    return _product_shape(factors[0], factors[1], factors[2] if len(factors) > 2 else None)


def _matrix(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else _product(factors[0], factors[1], factors[2] if factors[2:] else None)
