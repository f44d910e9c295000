"""Operations that resize a tensor: padding, position embeddings, and input channels of a convolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

from ckptkit.core.dtypes import DTYPES
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_bridge import CASTABLE
from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.joining import Concat
from ckptkit.tensor_ops.moving import Slice
from ckptkit.tensor_ops.operation import (
    ARITHMETIC,
    Arithmetic,
    Flag,
    Int,
    Ints,
    NumberOrText,
    Operation,
    Rounded,
    Shape,
    Text,
    grid_text,
    printable_code,
)

__all__ = ["ConvInChannels", "Pad", "ResizePosEmbed"]

_FILLS = ("zeros", "mean", "normal")
_CHUNK = 1 << 20
_LARGEST: Mapping[str, float] = MappingProxyType(
    {"F16": 65504.0, "BF16": 3.3895e38, "F32": 3.4028234e38, "F64": math.inf}
)


@dataclass(frozen=True, slots=True)
class Pad(Operation):
    """Add rows at the end of a dim up to ``size``; the rows of the input keep every bit.

    ``fill`` is ``zeros``, ``mean`` (the mean of the rows), ``normal``, or a number. With ``normal`` the rows are drawn
    with the mean and the standard deviation of each column, and with ``seed``.
    """

    size: Int
    dim: Int = 0
    fill: NumberOrText = "zeros"
    seed: Int = 0
    name: ClassVar[str] = "pad"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for an unknown fill and for a negative size."""
        if isinstance(self.fill, str) and self.fill not in _FILLS:
            raise self.refusal(f"fill is {quoted(self.fill)}", f"it must be {', '.join(_FILLS)}, or a number")
        if self.size < 0:
            raise self.refusal(f"{self.size} is not a valid size")

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape with the larger size."""
        shape = self.only_shape(inputs)
        dim = self.axis(self.dim, shape)
        if shape[dim] > self.size:
            raise self.refusal(f"dim {self.dim} of {list(shape)} is already larger than {self.size}", "use slice")
        if shape[dim] == 0 and self.fill in ("mean", "normal"):
            raise self.refusal(f"{list(shape)} has no rows to compute a mean of")
        return ((*shape[:dim], self.size, *shape[dim + 1 :]),)

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtype of the input; raise ``RuleError`` where it cannot hold the fill."""
        for code in inputs:
            if self.fill == "zeros":
                if code not in CASTABLE or code == "F8_E8M0":  # F8_E8M0 has only powers of two
                    raise self.refusal(f"{printable_code(code)} cannot hold zeros")
            elif isinstance(self.fill, str):
                if code not in ARITHMETIC:
                    raise self.refusal(f"fill cannot be {self.fill} for {printable_code(code)}", 'fill = "zeros"')
            elif not _holds(code, self.fill):
                raise self.refusal(f"{printable_code(code)} cannot hold {self.fill}")
        return (inputs[0],)

    def for_optimizer_state(self) -> Pad:
        """Return the operation with zeros, because the new rows have had no gradient yet."""
        return replace(self, fill="zeros")

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Add the rows."""
        (tensor,) = tensors
        dim = self.dim % tensor.dim()
        shape = [*tensor.shape[:dim], self.size - tensor.shape[dim], *tensor.shape[dim + 1 :]]
        rows = self._rows(tensor, dim, shape)
        made = rows.to(tensor.dtype)
        if rounded is not None and rows.dtype != made.dtype:
            rounded(tensors, rows, made)
        return Concat(dim).make([tensor, made])

    def _rows(self, tensor: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
        import torch

        if self.fill == "zeros":
            return (
                torch.zeros(*shape, tensor.itemsize, dtype=torch.uint8, device="cpu")
                .view(tensor.dtype)
                .reshape(list(shape))
            )
        if not isinstance(self.fill, str):
            return torch.full(list(shape), self.fill, dtype=tensor.dtype, device="cpu")
        mean, deviation = _moments(tensor.movedim(dim, 0))
        if self.fill == "mean":
            return mean.unsqueeze(dim).expand(*shape)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        noise = torch.randn(list(shape), generator=generator, dtype=torch.float64, device="cpu")
        return mean.unsqueeze(dim) + deviation.unsqueeze(dim) * noise

    def inverse(self, inputs: Sequence[Shape]) -> Slice:
        """Return the slice of the rows of the input."""
        shape = self.only_shape(inputs)
        return Slice(self.dim, 0, shape[self.axis(self.dim, shape)])


def _holds(code: str, value: float) -> bool:
    if code in _LARGEST:
        return abs(value) <= _LARGEST[code]
    if code == "BOOL":
        return value in (0, 1)
    bits = DTYPES[code].bits if code in CASTABLE else 0
    if code == f"I{bits}":
        return value == int(value) and -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)
    return code == f"U{bits}" and value == int(value) and 0 <= value < 2 ** min(bits, 63)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each column in F64, computed in pieces of bounded size."""
    import torch

    count = rows.shape[0]
    step = max(1, _CHUNK // max(1, rows[0].numel()))
    pieces = range(0, count, step)
    mean = torch.zeros(rows.shape[1:], dtype=torch.float64, device="cpu")
    for first in pieces:
        mean += rows[first : first + step].double().sum(0)
    mean /= count
    squares = torch.zeros_like(mean)
    for first in pieces:
        squares += (rows[first : first + step].double() - mean).square_().sum(0)
    return mean, (squares / max(1, count - 1)).sqrt_()


@dataclass(frozen=True, slots=True)
class ResizePosEmbed(Arithmetic):
    """Resize absolute position embeddings of shape ``[N, D]`` or ``[1, N, D]`` to another number of positions.

    ``new`` is a grid ``[height, width]``, interpolated bicubically, or a length ``[n]``, interpolated linearly.
    ``old`` is the grid or length of the input; by default the grid is square. The first ``prefix`` tokens (class,
    distillation) are not part of the grid and keep every bit.
    """

    new: Ints
    old: Ints | None = None
    prefix: Int = 0
    antialias: Flag = True
    name: ClassVar[str] = "resize_pos_embed"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for grids that do not have one or two sizes, and for a negative prefix."""
        for grid in (self.new, self.old or self.new):
            if len(grid) != len(self.new) or len(grid) not in (1, 2) or min(grid) < 1:
                raise self.refusal(f"{list(grid)} is not a valid grid", "[height, width], or [length]")
        if self.prefix < 0:
            raise self.refusal(f"prefix is {self.prefix}, not at least 0")

    def _old(self, shape: Shape) -> tuple[int, ...]:
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1) or not shape[-1]:
            raise self.refusal(f"{list(shape)} is neither [N, D] nor [1, N, D]")
        count = shape[-2] - self.prefix
        kept = f" after {plural(self.prefix, 'prefix token')}" if self.prefix else ""
        if self.old is not None:
            if math.prod(self.old) != count:
                raise self.refusal(f"{list(shape)} has {count} positions{kept}, not {grid_text(self.old)}")
            return self.old
        if len(self.new) == 1 and count > 0:
            return (count,)
        side = math.isqrt(max(count, 0))
        if count < 1 or side * side != count:
            raise self.refusal(
                f"{list(shape)} has {count} positions{kept}, which is not a square grid", "give old, or prefix"
            )
        return side, side

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape with the new number of positions."""
        shape = self.only_shape(inputs)
        self._old(shape)
        return ((*shape[:-2], self.prefix + math.prod(self.new), shape[-1]),)

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Resize the grid, and put the prefix tokens in front of it."""
        (tensor,) = tensors
        dim = tensor.dim() - 2
        if self._old(tuple(tensor.shape)) == self.new:
            return (tensor.contiguous(),)
        grid = tensor.narrow(dim, self.prefix, tensor.shape[dim] - self.prefix)
        (resized,) = Arithmetic.make(self, [grid], rounded)
        return Concat(dim).make([tensor.narrow(dim, 0, self.prefix), resized])

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Interpolate a grid without prefix tokens."""
        import torch

        (tensor,) = tensors
        width = tensor.shape[-1]
        old = self.old or ((tensor.shape[-2],) if len(self.new) == 1 else (math.isqrt(tensor.shape[-2]),) * 2)
        image = tensor.reshape(1, *old, width).movedim(-1, 1)
        resized = torch.nn.functional.interpolate(
            image,
            size=list(self.new),
            mode="linear" if len(self.new) == 1 else "bicubic",
            antialias=self.antialias and len(self.new) == 2,
        )
        return [resized.movedim(1, -1).reshape(*tensor.shape[:-2], -1, width)]


@dataclass(frozen=True, slots=True)
class ConvInChannels(Arithmetic):
    """Change the number of input channels of the first convolution of an image model.

    The mode ``sum`` adds all channels into one. The mode ``repeat`` repeats the channels in order and scales by old
    over new, so that equal channels give the same output as before. By default, the mode is ``sum`` for one new
    channel, else ``repeat``. ``base`` is the number of channels of the image, where space-to-depth multiplied the
    channels of the weight.
    """

    channels: Int
    mode: Text | None = None
    base: Int | None = None
    name: ClassVar[str] = "conv_in_channels"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for an unknown mode, for less than one channel, and for a sum of several channels."""
        if self.mode not in (None, "sum", "repeat"):
            raise self.refusal(f"mode is {quoted(self.mode or '')}", "it must be sum or repeat")
        if self.channels < 1 or (self.base is not None and self.base < 1):
            raise self.refusal(f"{self.channels if self.channels < 1 else self.base} is not a valid number of channels")
        if self.mode == "sum" and self.channels != 1:
            raise self.refusal(f"a sum has one channel, not {self.channels}")

    @property
    def sums(self) -> bool:
        """Whether all channels are added into one."""
        return self.mode == "sum" or (self.mode is None and self.channels == 1)

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape with the new number of input channels."""
        shape = self.only_shape(inputs)
        if len(shape) < 3:
            raise self.refusal(f"{list(shape)} is not the weight of a convolution")
        base = self.base or shape[1]
        if shape[1] == 0 or shape[1] % base or (shape[1] != base and not self.sums):
            raise self.refusal(f"dim 1 of {list(shape)} is not {plural(base, 'channel')}")
        return ((shape[0], shape[1] // base if self.sums else self.channels, *shape[2:]),)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add the channels up, or repeat and scale them."""
        (tensor,) = tensors
        outs, ins, *kernel = tensor.shape
        base = self.base or ins
        if base == self.channels:
            return [tensor]
        if self.sums:
            return [tensor.reshape(outs, ins // base, base, *kernel).sum(2)]
        repeats = math.ceil(self.channels / base)
        repeated = tensor.repeat(1, repeats, *(1 for _ in kernel))[:, : self.channels]
        return [repeated * (base / self.channels)]
