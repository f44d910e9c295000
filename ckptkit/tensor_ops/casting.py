"""Casts of tensors in memory, and the losses of operations that round their results to a dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.checkpoint.reading import torch_bytes
from ckptkit.core.torch_bridge import TensorPayload, code_of, flat_bytes, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.values.cast_payload import CastPayload
from ckptkit.values.losses import Losses, count_losses, largest_finite
from ckptkit.values.workers import Workers, pieces

__all__ = ["RecipeCounter", "cast_tensor", "loss_of_cast"]


def cast_tensor(tensor: Tensor, dtype: str) -> Tensor:
    """Return a contiguous tensor on the CPU with the elements of ``tensor`` after a cast to the dtype of this code."""
    found = TensorInfo("", code_of(tensor.dtype), tuple(tensor.shape))
    out = replace(found, dtype=dtype)
    payload = CastPayload(TensorPayload(tensor, found.nbytes), found, out)
    return torch_bytes(out.nbytes, payload.readinto).view(torch_dtype(dtype)).reshape(tensor.shape)


def loss_of_cast(key: str, before: Tensor, after: Tensor) -> CastLoss:
    """Return the losses of the cast of the tensor ``key`` from the values ``before`` to the values ``after``."""
    codes = code_of(before.dtype), code_of(after.dtype)
    values, losses = before.numel(), Losses()
    old, new = _memory(before), _memory(after)
    workers = Workers(1)
    for start, end in pieces(values):
        was, now = (data[start * len(data) // values : end * len(data) // values] for data in (old, new))
        losses = losses.plus(count_losses(was, now, *codes, workers))
    return losses.of(key, *codes, values)


def _memory(tensor: Tensor) -> memoryview:
    return flat_bytes(tensor.detach().resolve_conj().resolve_neg().cpu()).numpy().data


@dataclass(slots=True)
class RecipeCounter:
    """The losses of one evaluation of a recipe, which are counted where an operation rounds its outputs."""

    found: str = ""  # the dtype before the rounding
    overflowed: int = 0
    underflowed: int = 0
    truncated: int = 0
    largest: float = 0.0
    infinite: int = 0
    saturated: bool = False
    infinite_codes: int = 0

    def add(self, inputs: Sequence[Tensor], before: Tensor, after: Tensor) -> None:
        """Count the losses of an output of an operation: before and after it was rounded to its dtype.

        A value that is not finite also counts if the operation computed it from finite inputs.
        """
        loss = loss_of_cast("", before, after)
        computed = 0
        if not _is_finite(before) and all(map(_is_finite, inputs)):
            computed = int((~_real_view(before).isfinite()).sum())
        self.overflowed += loss.overflowed + computed
        self.underflowed += loss.underflowed
        self.truncated += loss.truncated
        self.largest = max(self.largest, loss.largest)
        self.infinite += loss.infinite
        self.saturated |= loss.saturated
        if loss or computed:
            self.found = loss.found

    def add_loss(self, loss: CastLoss | None) -> None:
        """Add the losses of an input that was rounded when it was made."""
        if loss:
            self.overflowed += loss.overflowed
            self.underflowed += loss.underflowed
            self.largest = max(self.largest, loss.largest)
            self.infinite_codes += loss.infinite_codes
            self.found = loss.found

    def loss(self, key: str, output: Tensor) -> CastLoss:
        """Return the losses in one output of the recipe, which is called ``key``."""
        import torch

        code = code_of(output.dtype)
        loss = CastLoss(key, self.found or code, code, output.numel(), infinite_codes=self.infinite_codes)
        if not (self.overflowed or self.underflowed or self.truncated):
            return loss
        # Later operations can have left out some of the values, or given them to another output.
        overflowed = min(self.overflowed, _count_overflowed(output))
        return replace(
            loss,
            overflowed=overflowed,
            infinite=min(self.infinite, overflowed),
            saturated=self.saturated,
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


def _real_view(tensor: Tensor) -> Tensor:
    return tensor.view(tensor.dtype.to_real()) if tensor.is_complex() else tensor


def _count_overflowed(tensor: Tensor) -> int:
    """Return the number of values that an overflow can have made."""
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.numel()
    values = _real_view(tensor).to(torch.float64)
    overflowed = ~values.isfinite()
    if tensor.dtype == torch.float8_e4m3fn:
        overflowed |= values.abs() == largest_finite("F8_E4M3")
    return int(overflowed.sum())
