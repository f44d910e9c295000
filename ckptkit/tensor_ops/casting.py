"""Casts to another dtype, which count exactly the values that they change to inf, to 0, or to an integer."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptkit.core.cast_losses import CastLoss, largest_value
from ckptkit.core.checkpoint import Payload, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.torch_bridge import TensorPayload, code_of, tensor_of_bytes, torch_dtype
from ckptkit.core.torch_types import Tensor

if TYPE_CHECKING:
    import torch

__all__ = ["CastPayload", "LossCounter", "RecipeCounter", "can_overflow"]

_ROW = 1024  # values in a row that is looked at as a whole first
_FEW = 16  # of so many rows, one can be looked at value by value without a second look at all rows


def can_overflow(found: str, dtype: str) -> bool:
    """Return whether a cast between the dtypes of these codes can change a finite value to inf or to another number."""
    return LossCounter(TensorInfo("", found, ()), TensorInfo("", dtype, ())).can_overflow


class LossCounter:
    """The losses of the cast of one tensor, which are counted from its blocks.

    ``found`` describes the tensor before the cast, ``out`` after it. One pass over the bits finds the rows with a value
    that the new dtype cannot hold. Only these rows are compared value by value.
    """

    def __init__(self, found: TensorInfo, out: TensorInfo) -> None:
        """Start at zero; both dtypes must be castable."""
        import torch

        # Powers of two, without a sign and without 0; not every torch has a dtype for them.
        self._is_exponent = out.dtype == "F8_E8M0"
        self._found, self._out = (_real(torch_dtype(info.dtype)) for info in (found, out))
        self._parts = DTYPES[out.dtype].parts if DTYPES[found.dtype].parts > 1 else 1
        self._loss = CastLoss(out.key, found.dtype, out.dtype)
        self._is_mask = True
        self._lowest = {-largest_value(code) for code in ("F32", "BF16", "F64")}
        self.can_overflow = self._is_narrower()
        can_underflow = False
        self._bits: torch.dtype | None = None
        self._low, self._high = 0, 0
        if self._found.is_floating_point and self._out.is_floating_point:
            old, new = torch.finfo(self._found), torch.finfo(self._out)
            # No larger value becomes 0. torch gives half of the right eps for float8_e5m2fnuz.
            smallest = new.smallest_normal * new.eps * (2 if self._out == torch.float8_e5m2fnuz else 1)
            can_underflow = old.smallest_normal * old.eps < smallest
            if self._found.itemsize > 1 and not self._is_exponent:
                self._bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self._found.itemsize]
                largest = min(old.max, new.max)
                limits = torch.tensor([smallest if can_underflow else 0.0, largest], dtype=self._found, device="cpu")
                self._low, self._high = limits.view(self._bits).tolist()
                self._high -= float(limits[1]) > largest  # the largest value of F16 is not one of BF16
        to_integer = self._found.is_floating_point and not self._out.is_floating_point
        to_bool = self._out == torch.bool and self._found != torch.bool
        self.can_lose = self.can_overflow or can_underflow or to_integer or to_bool

    def _is_narrower(self) -> bool:
        import torch

        if self._found == self._out or torch.bool in (self._found, self._out):
            return False
        if self._is_exponent:
            return True
        if self._out.is_floating_point:
            old = torch.finfo(self._found).max if self._found.is_floating_point else torch.iinfo(self._found).max
            return old > torch.finfo(self._out).max
        if self._found.is_floating_point:
            return True
        old_range, new_range = torch.iinfo(self._found), torch.iinfo(self._out)
        return old_range.min < new_range.min or old_range.max > new_range.max

    @property
    def loss(self) -> CastLoss:
        """The losses of the blocks so far."""
        return replace(self._loss, is_mask=bool(self._loss.overflowed) and self._is_mask)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count the losses of a block: its values before and after the cast."""
        count = before.numel()
        self._loss = replace(self._loss, values=self._loss.values + count)
        if not self.can_lose or not count:
            return
        old, new = (_real_view(tensor.reshape(-1)) for tensor in (before, after))
        if new.numel() < old.numel():
            raise ValueError("a cast never drops imaginary parts")
        if new.numel() > old.numel():  # a real number becomes a complex one
            new = new[::2]
        if self._bits is None:
            self._count(old, new)
            return
        whole = len(old) // _ROW * _ROW if len(old) > _ROW else 0
        if whole:
            rows = self._rows_to_count(old[:whole])
            if len(rows):
                self._count(*(_rows_of(part[:whole], rows) for part in (old, new)))
        self._count(old[whole:], new[whole:])

    def _rows_to_count(self, values: Tensor) -> Tensor:
        """Return the numbers of the rows that can hold a value which the new dtype cannot hold."""
        import torch

        assert self._bits is not None  # noqa: S101 - the caller checked it
        mask = torch.iinfo(self._bits).max
        # Without their sign, the bits of floating-point numbers have the order of their magnitudes.
        bits = (values.view(self._bits) & mask).view(-1, _ROW)
        large, small = bits.amax(1) > self._high, bits.amin(1) < self._low
        rows = (large | small).nonzero().reshape(-1)
        if len(rows) * _FEW > len(bits):
            # A 0 stays 0, and is common: with 1 taken from its bits, it comes after all other values.
            small = ((bits - 1) & mask).amin(1) < self._low
            rows = (large | small).nonzero().reshape(-1)
        return rows

    def _count(self, before: Tensor, after: Tensor) -> None:
        import torch

        if not before.numel():
            return
        old, new = before.to(torch.float64), after.to(torch.float64)
        nothing = torch.zeros_like(old, dtype=torch.bool)
        over, truncated = nothing, nothing
        if self._out.is_floating_point:
            finite = torch.isfinite(old)
            over = finite & ~torch.isfinite(new)
            if self._out == torch.float8_e4m3fn:
                # Some versions of torch give the largest value, 448, in place of NaN; up to 464 it is the nearest one.
                over |= (new.abs() == largest_value("F8_E4M3")) & (old.abs() > 464)
            if self._is_exponent:
                over |= (old < 0) & torch.isfinite(new)
        elif self._out == torch.bool:
            truncated = old != new
        else:
            over = new != old.trunc()
            truncated = ~over & (old != new) & (new != 0)
        under = (old != 0) & (new == 0) & ~over
        self._loss = replace(
            self._loss,
            overflowed=self._loss.overflowed + self._number(over),
            underflowed=self._loss.underflowed + self._number(under),
            truncated=self._loss.truncated + self._number(truncated),
        )
        lost = old[over]
        if len(lost):
            finite_lost = lost[torch.isfinite(lost)].abs()
            largest = float(finite_lost.max()) if len(finite_lost) else 0.0
            self._loss = replace(self._loss, largest=max(self._loss.largest, largest))
            self._is_mask = self._is_mask and set(torch.unique(lost).tolist()) <= self._lowest

    def _number(self, lost: Tensor) -> int:
        if self._parts > 1 and lost.numel() % self._parts == 0:
            lost = lost.view(-1, self._parts).any(1)
        return int(lost.sum())


def _real(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the parts of a complex dtype, or the dtype itself."""
    return dtype.to_real() if dtype.is_complex else dtype


def _real_view(tensor: Tensor) -> Tensor:
    return tensor.view(_real(tensor.dtype)) if tensor.is_complex() else tensor


@dataclass(frozen=True, slots=True)
class CastPayload:
    """A payload that casts its elements while they are read, as ``Tensor.to`` does.

    ``found`` describes the source, ``out`` the result. After the last chunk, ``losses`` has the losses of the cast by
    key.
    """

    source: Payload
    found: TensorInfo
    out: TensorInfo
    losses: MutableMapping[str, CastLoss] | None = None

    @property
    def nbytes(self) -> int:
        """Number of bytes after the cast."""
        return self.out.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes after the cast in pieces."""
        for block in self.blocks():
            yield from TensorPayload(block, block.nbytes).chunks()

    def blocks(self) -> Iterator[Tensor]:
        """Yield the values after the cast, in flat tensors of bounded size."""
        old, new = (torch_dtype(info.dtype) for info in (self.found, self.out))
        width = DTYPES[self.found.dtype].bits // 8
        counter = None if self.losses is None else LossCounter(self.found, self.out)
        rest = b""  # a chunk can end within an element
        for chunk in self.source.chunks():
            data = rest + bytes(chunk) if rest else chunk
            whole = len(data) // width * width
            rest = bytes(data[whole:])
            if whole:
                values = tensor_of_bytes(data[:whole]).view(old)
                cast = values.to(new)
                if counter is not None:
                    counter.add(values, cast)
                yield cast
        if counter is not None and self.losses is not None:
            self.losses[self.out.key] = counter.loss


@dataclass(slots=True)
class RecipeCounter:
    """The losses of one evaluation of a recipe, which are counted where an operation rounds its outputs."""

    found: str = ""  # the dtype before the rounding
    overflowed: int = 0
    underflowed: int = 0
    truncated: int = 0
    largest: float = 0.0

    def add(self, inputs: Sequence[Tensor], before: Tensor, after: Tensor) -> None:
        """Count the losses of an output of an operation: before and after it was rounded to its dtype.

        A value that is not finite also counts if the operation computed it from finite inputs.
        """
        found, out = (TensorInfo("", code_of(tensor.dtype), tuple(tensor.shape)) for tensor in (before, after))
        counter = LossCounter(found, out)
        counter.add(before, after)
        loss = counter.loss
        computed = 0
        if not _is_finite(before) and all(map(_is_finite, inputs)):
            computed = int((~_real_view(before).isfinite()).sum())
        self.overflowed += loss.overflowed + computed
        self.underflowed += loss.underflowed
        self.truncated += loss.truncated
        self.largest = max(self.largest, loss.largest)
        if loss or computed:
            self.found = found.dtype

    def loss(self, key: str, output: Tensor) -> CastLoss:
        """Return the losses in one output of the recipe, which is called ``key``."""
        import torch

        code = code_of(output.dtype)
        loss = CastLoss(key, self.found or code, code, output.numel())
        if not (self.overflowed or self.underflowed or self.truncated):
            return loss
        # Later operations can have left out some of the values, or given them to another output.
        return replace(
            loss,
            overflowed=min(self.overflowed, _count_overflowed(output)),
            underflowed=min(self.underflowed, int((_real_view(output).to(torch.float64) == 0).sum())),
            truncated=min(self.truncated, output.numel()),
            largest=self.largest,
        )


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; integers and floats of 8 bits count as finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dtype.itemsize == 1:
        return True
    values = _real_view(tensor)
    # The sum is fast, and finite only if all values are.
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def _rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """Return the values of some rows, as bytes where an element is one: not every torch can index float8."""
    import torch

    stored = values.view(torch.uint8) if values.dtype.itemsize == 1 else values
    return stored.view(-1, _ROW)[rows].reshape(-1).view(values.dtype)


def _count_overflowed(tensor: Tensor) -> int:
    """Return the number of values that an overflow can have made."""
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.numel()
    values = _real_view(tensor).to(torch.float64)
    overflowed = ~values.isfinite()
    if tensor.dtype == torch.float8_e4m3fn:
        overflowed |= values.abs() == largest_value("F8_E4M3")
    return int(overflowed.sum())
