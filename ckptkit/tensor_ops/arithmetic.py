"""Operations that compute new values: cast, scale, add, and the folding of norms, masks and batch norms."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckptkit.core.dtypes import DTYPES, dtype_code
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_bridge import CASTABLE
from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.casting import cast_tensor
from ckptkit.tensor_ops.operation import (
    Arithmetic,
    Flag,
    Int,
    Number,
    Operation,
    Rounded,
    Shape,
    Text,
    printable_code,
)

__all__ = ["Add", "Cast", "FoldBatchNorm", "FoldMask", "FoldSpectralNorm", "FoldWeightNorm", "Maximum", "Scale"]


@dataclass(frozen=True, slots=True)
class Cast(Operation):
    """Cast to another dtype, as ``Tensor.to`` does; ``dtype`` is a safetensors code or torch's name."""

    dtype: Text
    name: ClassVar[str] = "cast"

    def __post_init__(self) -> None:
        """Replace torch's name by the code; raise ``RuleError`` for a dtype that torch cannot cast to."""
        code = dtype_code(self.dtype)
        if code not in CASTABLE:
            raise self.refusal(f"{quoted(self.dtype)} is not a dtype to cast to", "for example F32, F16, BF16")
        object.__setattr__(self, "dtype", code)

    @property
    def lossy(self) -> bool:
        """Whether a cast loses bits; always true, because it depends on the dtype of the input."""
        return True

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the input."""
        return (self.only_shape(inputs),)

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the new dtype; raise ``RuleError`` where torch cannot cast or the imaginary part would be lost."""
        for code in inputs:
            if code not in CASTABLE:
                raise self.refusal(f"{printable_code(code)} cannot be cast to {self.dtype}")
            if DTYPES[code].parts > DTYPES[self.dtype].parts:
                raise self.refusal(f"{code} to {self.dtype} would lose the imaginary part")
        return (self.dtype,)

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Cast the tensor."""
        cast = cast_tensor(tensors[0], self.dtype)
        if rounded is not None:
            rounded(tensors, tensors[0], cast)
        return (cast,)


@dataclass(frozen=True, slots=True)
class Scale(Arithmetic):
    """Multiply every element by ``factor``."""

    factor: Number
    name: ClassVar[str] = "scale"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the input."""
        return (self.only_shape(inputs),)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply the tensor."""
        return [tensors[0] * self.factor]


@dataclass(frozen=True, slots=True)
class Add(Arithmetic):
    """Add ``value`` to every element; for example, 1 for the weight of a norm that is stored as an offset from 1."""

    value: Number
    name: ClassVar[str] = "add"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the input."""
        return (self.only_shape(inputs),)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add the number."""
        return [tensors[0] + self.value]


# Of numbers that torch can compare.
_COMPARED = frozenset({"BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"})


@dataclass(frozen=True, slots=True)
class Maximum(Operation):
    """Take the largest element of several tensors at each place; for integers too, such as counts of batches."""

    name: ClassVar[str] = "maximum"

    @property
    def lossy(self) -> bool:
        """Whether the inputs cannot be restored: they cannot."""
        return True

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the inputs; raise ``RuleError`` where they differ, or for no input."""
        if len(set(inputs)) != 1:
            raise self.refusal(f"the shapes differ: {', '.join(str(list(shape)) for shape in inputs)}")
        return (inputs[0],)

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtype of the inputs; raise ``RuleError`` where they differ, or cannot be compared."""
        for code in inputs:
            if code not in _COMPARED or code != inputs[0]:
                codes = ", ".join(dict.fromkeys(map(printable_code, inputs)))
                raise self.refusal(f"compares tensors of one dtype of numbers, not of {codes}", "cast them first")
        return (inputs[0],)

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Compare the tensors one after the other."""
        import torch

        del rounded
        return (functools.reduce(torch.maximum, tensors).contiguous(),)


@dataclass(frozen=True, slots=True)
class FoldWeightNorm(Arithmetic):
    """Compute a weight from ``[g, v]`` of a weight norm.

    The inputs are ``weight_g`` and ``weight_v``, or ``parametrizations.weight.original0`` and ``original1``. ``dim`` is
    the ``dim`` of ``torch.nn.utils.weight_norm``; -1 means ``dim=None``, one norm over all elements.
    """

    dim: Int = 0
    name: ClassVar[str] = "fold_weight_norm"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for a dim below -1, which torch would interpret in another way."""
        if self.dim < -1:
            raise self.refusal(f"dim is {self.dim}", "count it from the front; -1 is one norm over all elements")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of v; raise ``RuleError`` where g does not have one length for each slice of v."""
        if len(inputs) != 2:
            raise self.refusal(f"takes g and v, not {plural(len(inputs), 'tensor')}")
        lengths, vectors = inputs
        wanted: Shape = ()
        if self.dim >= 0:
            dim = self.axis(self.dim, vectors)
            wanted = tuple(size if at == dim else 1 for at, size in enumerate(vectors))
        if lengths != wanted:
            raise self.refusal(
                f"g is {list(lengths)}, but a v of {list(vectors)} needs {list(wanted)}",
                "the order is g, v; dim is the dim of the weight norm",
            )
        return (vectors,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Scale each slice of v to its length in g."""
        import torch

        lengths, vectors = tensors
        return [torch._weight_norm(vectors, lengths, self.dim)]  # noqa: SLF001 - weight_norm calls it


@dataclass(frozen=True, slots=True)
class FoldSpectralNorm(Arithmetic):
    """Compute the weight of evaluation mode from ``[orig, u, v]`` of a spectral norm.

    The weight is ``orig`` divided by the singular value that u and v estimate. The inputs are ``weight_orig``,
    ``weight_u`` and ``weight_v``, or ``parametrizations.weight.original``, ``.0._u`` and ``.0._v``. ``dim`` is the dim
    of the spectral norm: 1 for a transposed convolution, else 0.
    """

    dim: Int = 0
    name: ClassVar[str] = "fold_spectral_norm"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of orig; raise ``RuleError`` where u and v do not have the sizes of its rows and columns."""
        if len(inputs) != 3:
            raise self.refusal(f"takes orig, u and v, not {plural(len(inputs), 'tensor')}")
        weight, *vectors = inputs
        dim = self.axis(self.dim, weight)
        rows, columns = weight[dim], math.prod(weight[:dim] + weight[dim + 1 :])
        if vectors != [(rows,), (columns,)]:
            raise self.refusal(
                f"an orig of {list(weight)} needs u of [{rows}] and v of [{columns}], not "
                f"{' and '.join(str(list(shape)) for shape in vectors)}",
                "the order is orig, u, v; dim is the dim of the spectral norm",
            )
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Divide orig by the singular value."""
        import torch

        weight, left, right = tensors
        matrix = weight.movedim(self.dim, 0).flatten(1)
        return [weight / torch.dot(left, torch.mv(matrix, right))]


@dataclass(frozen=True, slots=True)
class FoldMask(Arithmetic):
    """Multiply ``[orig, mask]``: ``weight_orig`` and ``weight_mask`` of ``torch.nn.utils.prune``."""

    name: ClassVar[str] = "fold_mask"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of orig; raise ``RuleError`` where the mask has another shape."""
        if len(inputs) != 2 or inputs[0] != inputs[1]:
            raise self.refusal(
                f"takes orig and a mask of its shape, not {', '.join(str(list(shape)) for shape in inputs)}"
            )
        return (inputs[0],)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply orig by the mask."""
        return [tensors[0] * tensors[1]]


@dataclass(frozen=True, slots=True)
class FoldBatchNorm(Arithmetic):
    """Fold a batch norm in evaluation mode into the layer before it; the outputs are a weight and a bias.

    The inputs are ``weight, [bias,] bn.weight, bn.bias, running_mean, running_var`` of a Linear or a convolution.
    ``transposed`` is true for a transposed convolution. The result is correct only where no other module reads the
    output of the layer.
    """

    eps: Number = 1e-5
    transposed: Flag = False
    name: ClassVar[str] = "fold_batch_norm"

    @property
    def outputs(self) -> int:
        """Two: weight and bias."""
        return 2

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shapes of weight and bias; raise ``RuleError`` where a vector has a wrong size."""
        if len(inputs) not in (5, 6):
            raise self.refusal(
                f"takes 5 or 6 tensors, not {len(inputs)}",
                "weight, [bias,] bn.weight, bn.bias, running_mean, running_var",
            )
        weight, *vectors = inputs
        channels = (weight[self.axis(int(self.transposed), weight)],)
        for shape in vectors:
            if shape != channels:
                raise self.refusal(f"a weight of {list(weight)} has {channels[0]} channels, not {list(shape)}")
        return weight, channels

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtypes of weight and bias; a bias in the inputs keeps its dtype."""
        (weight, _) = Arithmetic.dtypes(self, inputs)
        return weight, inputs[1] if len(inputs) == 6 else weight

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Scale the rows and shift the bias, in the order of operations that torch uses."""
        import torch

        weight, *bias, gain, shift, mean, variance = tensors
        inverse = torch.rsqrt(variance + self.eps)
        scale = gain * inverse
        shape = [1] * weight.dim()
        shape[int(self.transposed)] = -1
        centred = (bias[0] if bias else torch.zeros_like(mean)) - mean
        # torch multiplies in another order for a Linear than for a convolution; the last bit depends on it.
        moved = centred * scale if weight.dim() == 2 else centred * inverse * gain
        return [weight * scale.reshape(shape), moved + shift]
