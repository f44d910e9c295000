"""One tensor, its values changed: cast, scale, add."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckptkit.core.checkpoint import DTYPES
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import CASTABLE, dtype_code, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.operation import (
    Arithmetic,
    Flag,
    Int,
    Number,
    Operation,
    Shape,
    Text,
    printable_code,
)

__all__ = ["Add", "Cast", "FoldBatchNorm", "FoldMask", "FoldSpectralNorm", "FoldWeightNorm", "Scale"]


@dataclass(frozen=True, slots=True)
class Cast(Operation):
    """Another dtype, by its safetensors code or torch's name, as ``Tensor.to`` makes it."""

    dtype: Text
    name: ClassVar[str] = "cast"

    def __post_init__(self) -> None:
        """Take torch's name for its code; refuse what is no dtype to cast to."""
        code = dtype_code(self.dtype)
        if code not in CASTABLE:
            raise self.refusal(f"{quoted(self.dtype)} is no dtype to cast to", "for example F32, F16, BF16")
        object.__setattr__(self, "dtype", code)

    @property
    def lossy(self) -> bool:
        """A cast cannot be undone where the new dtype holds less, which shapes do not tell."""
        return True

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape as it is."""
        return (self.only(inputs),)

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the new dtype; raises ``RuleError`` for what torch cannot cast, and for a lost imaginary part."""
        for code in inputs:
            if code not in CASTABLE:
                raise self.refusal(f"{printable_code(code)} cannot be cast to {self.dtype}")
            if DTYPES[code].parts > DTYPES[self.dtype].parts:
                raise self.refusal(f"{code} to {self.dtype} would lose the imaginary part")
        return (self.dtype,)

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Cast."""
        return (tensors[0].to(torch_dtype(self.dtype)).contiguous(),)


@dataclass(frozen=True, slots=True)
class Scale(Arithmetic):
    """Every element multiplied by a number."""

    factor: Number
    name: ClassVar[str] = "scale"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape as it is."""
        return (self.only(inputs),)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply."""
        return [tensors[0] * self.factor]


@dataclass(frozen=True, slots=True)
class Add(Arithmetic):
    """A number added to every element: 1 for a norm that is stored around zero, -1 for the way back."""

    value: Number
    name: ClassVar[str] = "add"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape as it is."""
        return (self.only(inputs),)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add."""
        return [tensors[0] + self.value]


@dataclass(frozen=True, slots=True)
class FoldWeightNorm(Arithmetic):
    """``[g, v]`` into the weight: ``weight_g``, ``weight_v``, or ``parametrizations.weight.original0``, ``original1``.

    ``dim`` is that of ``torch.nn.utils.weight_norm``; -1 stands for its ``dim=None``, a norm over everything.
    """

    dim: Int = 0
    name: ClassVar[str] = "fold_weight_norm"

    def __post_init__(self) -> None:
        """Refuse a dim below -1, which torch takes for another."""
        if self.dim < -1:
            raise self.refusal(f"dim is {self.dim}", "count it from the front; -1 is a norm over everything")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of v; raises ``RuleError`` where g is not one length for each of its slices."""
        if len(inputs) != 2:
            raise self.refusal(f"takes g and v, and there are {len(inputs)}")
        lengths, vectors = inputs
        wanted: Shape = ()
        if self.dim >= 0:
            dim = self.axis(self.dim, vectors)
            wanted = tuple(size if at == dim else 1 for at, size in enumerate(vectors))
        if lengths != wanted:
            raise self.refusal(
                f"g is {list(lengths)}, and a v of {list(vectors)} asks for {list(wanted)}",
                "the order is g, v; dim is that of the weight norm",
            )
        return (vectors,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Give each slice of v the length that g says."""
        import torch

        lengths, vectors = tensors
        return [torch._weight_norm(vectors, lengths, self.dim)]  # noqa: SLF001 - what weight_norm itself computes


@dataclass(frozen=True, slots=True)
class FoldSpectralNorm(Arithmetic):
    """``[orig, u, v]`` into the weight that evaluation takes: ``orig`` over the singular value that u and v point to.

    They are ``weight_orig``, ``weight_u``, ``weight_v``, or ``parametrizations.weight.original``, ``.0._u``, ``.0._v``.
    ``dim`` is that of the spectral norm: 1 for a transposed convolution, else 0.
    """

    dim: Int = 0
    name: ClassVar[str] = "fold_spectral_norm"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of orig; raises ``RuleError`` where u and v are not vectors of its two sides."""
        if len(inputs) != 3:
            raise self.refusal(f"takes orig, u and v, and there are {len(inputs)}")
        weight, *vectors = inputs
        dim = self.axis(self.dim, weight)
        rows, columns = weight[dim], math.prod(weight[:dim] + weight[dim + 1 :])
        if vectors != [(rows,), (columns,)]:
            raise self.refusal(
                f"an orig of {list(weight)} asks for u of [{rows}] and v of [{columns}], and here are "
                f"{' and '.join(str(list(shape)) for shape in vectors)}",
                "the order is orig, u, v; dim is that of the spectral norm",
            )
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Divide by the singular value."""
        import torch

        weight, left, right = tensors
        matrix = weight.movedim(self.dim, 0).flatten(1)
        return [weight / torch.dot(left, torch.mv(matrix, right))]


@dataclass(frozen=True, slots=True)
class FoldMask(Arithmetic):
    """``[orig, mask]`` into their product, the pruned weight: ``weight_orig``, ``weight_mask`` of ``utils.prune``."""

    name: ClassVar[str] = "fold_mask"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of orig; raises ``RuleError`` where the mask has another."""
        if len(inputs) != 2 or inputs[0] != inputs[1]:
            raise self.refusal(
                f"takes orig and a mask of its shape, and here are {', '.join(str(list(shape)) for shape in inputs)}"
            )
        return (inputs[0],)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply."""
        return [tensors[0] * tensors[1]]


@dataclass(frozen=True, slots=True)
class FoldBatchNorm(Arithmetic):
    """A batch norm into the layer before it, as it acts in evaluation: a weight and a bias.

    Takes ``weight, [bias,] bn.weight, bn.bias, running_mean, running_var`` of a convolution (``transposed`` where it is
    one) or a Linear. Right only where nothing else reads what lies between the two.
    """

    eps: Number = 1e-5
    transposed: Flag = False
    name: ClassVar[str] = "fold_batch_norm"

    @property
    def outputs(self) -> int:
        """Weight and bias."""
        return 2

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shapes of weight and bias; raises ``RuleError`` where a vector is not one number a channel."""
        if len(inputs) not in (5, 6):
            raise self.refusal(
                f"there are {len(inputs)} tensors", "weight, [bias,] bn.weight, bn.bias, running_mean, running_var"
            )
        weight, *vectors = inputs
        channels = (weight[self.axis(int(self.transposed), weight)],)
        for shape in vectors:
            if shape != channels:
                raise self.refusal(f"a weight of {list(weight)} has {channels[0]} channels, and here is {list(shape)}")
        return weight, channels

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtypes of weight and bias: a bias that there was keeps its own."""
        (weight, _) = Arithmetic.dtypes(self, inputs)
        return weight, inputs[1] if len(inputs) == 6 else weight

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Scale the rows and shift the bias, in torch's own order of operations."""
        import torch

        weight, *bias, gain, shift, mean, variance = tensors
        inverse = torch.rsqrt(variance + self.eps)
        scale = gain * inverse
        shape = [1] * weight.dim()
        shape[int(self.transposed)] = -1
        centred = (bias[0] if bias else torch.zeros_like(mean)) - mean
        # torch fuses a Linear with another association than a convolution; the last bit depends on it.
        moved = centred * scale if weight.dim() == 2 else centred * inverse * gain
        return [weight * scale.reshape(shape), moved + shift]
