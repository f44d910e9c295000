"""The values that casts to another dtype change to inf, to 0, or to an integer: counts, and sentences about them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ckptkit.core.dtypes import is_float
from ckptkit.core.text import listed, plural, quoted, short_number

__all__ = ["CastLoss", "describe_infinite_codes", "describe_overflow", "describe_small_losses", "wider_dtype"]

_MOST_KEYS = 4
_WIDER = {  # the largest finite values
    "BF16": float.fromhex("0x1.fep+127"),
    "F32": float.fromhex("0x1.fffffep+127"),
    "F64": sys.float_info.max,
}


@dataclass(frozen=True, slots=True)
class CastLoss:
    """The numbers of values in one tensor that a cast changed in a way that rounding does not explain.

    ``values`` is the number of all values. ``overflowed`` counts values that the new dtype cannot hold. They become
    inf, NaN, the largest value of the dtype, or another integer. ``underflowed`` counts values that become 0.
    ``truncated`` counts values that lose only a part: a fraction, or all but whether the value is 0 in a BOOL.
    ``largest`` is the largest finite magnitude among the overflowed values. ``is_mask`` is true if each of them is the
    lowest value of a floating-point dtype, as in masks. ``infinite`` counts those of the overflowed that were inf, and
    that the dtype cannot hold either. ``saturated`` is true if they become the largest value of the dtype, not NaN.
    ``infinite_codes`` counts the codes of a quantised weight that stand for NaN or inf, and are written so.
    """

    key: str
    found: str
    dtype: str
    values: int = 0
    overflowed: int = 0
    underflowed: int = 0
    truncated: int = 0
    largest: float = 0.0
    is_mask: bool = False
    infinite: int = 0
    saturated: bool = False
    infinite_codes: int = 0

    def __add__(self, later: CastLoss) -> CastLoss:
        """Return the losses of two casts of one tensor, the second after the first."""
        return CastLoss(
            later.key,
            self.found if self else later.found,
            later.dtype,
            later.values,
            self.overflowed + later.overflowed,
            self.underflowed + later.underflowed,
            self.truncated + later.truncated,
            max(self.largest, later.largest),
            later.is_mask and not self.overflowed,
            self.infinite + later.infinite,
            self.saturated or later.saturated,
            self.infinite_codes + later.infinite_codes,
        )

    @property
    def becomes_inf(self) -> bool:
        """Whether the new dtype is one of floating-point numbers that have inf."""
        return _overflowed_value(self.dtype) == "inf"

    def __bool__(self) -> bool:
        """Return whether any value changed, or stands for a number, in one of the counted ways."""
        return bool(self.overflowed or self.underflowed or self.truncated or self.infinite_codes)

    def __str__(self) -> str:
        """Return the tensor, its dtypes and the counts: ``'w' (F32 to F16): 2 of 4 values become inf``."""
        parts = []
        if self.overflowed:
            overflow = _clause(self.overflowed, self, "become", _overflowed_value(self.dtype, saturated=self.saturated))
            parts.append(f"{overflow} ({self.infinite:,} of them infinite before)" if self.infinite else overflow)
        if self.underflowed:
            parts.append(_clause(self.underflowed, self, "become", "0"))
        if self.truncated:
            verb, what = ("become", "true") if self.dtype == "BOOL" else ("lose", "a fraction")
            parts.append(_clause(self.truncated, self, verb, what))
        return f"{quoted(self.key)} ({self.found} to {self.dtype}): {', '.join(parts)}"


def _clause(count: int, loss: CastLoss, verb: str, what: str) -> str:
    return f"{count:,} of {plural(loss.values, 'value')} {verb}{'s' if count == 1 else ''} {what}"


def _overflowed_value(code: str, *, saturated: bool = False) -> str:
    if code == "F8_E8M0":
        return "NaN or another value"
    if code == "F8_E4M3" and saturated:
        return "448 or -448"
    if code == "F8_E4M3" or code.endswith("FNUZ"):
        return "NaN"
    return "inf" if code.startswith(("F", "BF", "C")) else "another integer"


def describe_overflow(losses: Iterable[CastLoss]) -> str:
    """Return one sentence about the overflows among the losses, with the first keys and their counts."""
    found = [loss for loss in losses if loss.overflowed]
    named = []
    for loss in found[:_MOST_KEYS]:
        only = replace(loss, underflowed=0, truncated=0)
        if loss.is_mask:
            named.append(f"{only}, and each is the lowest value of a floating-point dtype, as in an attention mask")
        else:
            named.append(f"{only}, up to {short_number(loss.largest)}" if loss.largest else str(only))
    more = f" and {len(found) - _MOST_KEYS:,} more tensors" if len(found) > _MOST_KEYS else ""
    count = sum(loss.overflowed for loss in found)
    fit = "does not fit" if count == 1 else "do not fit"
    return f"{plural(count, 'value')} {fit} the new dtype: {'; '.join(named)}{more}"


def describe_small_losses(losses: Iterable[CastLoss]) -> list[str]:
    """Return a sentence about the values that became 0 or lost a fraction, for each pair of dtypes."""
    by_dtypes: dict[tuple[str, str], list[CastLoss]] = {}
    for loss in losses:
        if loss.underflowed or loss.truncated:
            by_dtypes.setdefault((loss.found, loss.dtype), []).append(replace(loss, overflowed=0))
    lines = []
    for (found, dtype), several in by_dtypes.items():
        if len(several) == 1:
            lines.append(f"cast of {several[0]}")
            continue
        total = replace(_total(several), key="")
        first = max(several, key=lambda loss: loss.underflowed + loss.truncated)
        counts = str(total).partition("): ")[2]
        lines.append(f"cast of {len(several):,} tensors ({found} to {dtype}): {counts}; most in {quoted(first.key)}")
    return lines


def describe_infinite_codes(losses: Iterable[CastLoss]) -> list[str]:
    """Return a sentence about the codes that stand for NaN or inf, if there are any, with the first keys."""
    found = [loss for loss in losses if loss.infinite_codes]
    if not found:
        return []
    count = sum(loss.infinite_codes for loss in found)
    named = [f"{quoted(loss.key)} ({loss.infinite_codes:,} of {loss.values:,})" for loss in found]
    verbs = "stands for NaN or inf, and is" if count == 1 else "stand for NaN or inf, and are"
    return [f"{plural(count, 'code')} {verbs} written so: {listed(named, _MOST_KEYS, show=str)}"]


def _total(losses: Sequence[CastLoss]) -> CastLoss:
    return replace(
        losses[0],
        values=sum(loss.values for loss in losses),
        underflowed=sum(loss.underflowed for loss in losses),
        truncated=sum(loss.truncated for loss in losses),
    )


def wider_dtype(losses: Iterable[CastLoss]) -> str | None:
    """Return the first of BF16, F32 and F64 that holds every overflowed value of floating-point tensors, or None."""
    overflowed = [loss for loss in losses if loss.overflowed]
    largest = max((loss.largest for loss in overflowed), default=0.0)
    if not all(is_float(loss.dtype) and (loss.largest or loss.infinite) for loss in overflowed):
        return None
    dtypes = {loss.dtype for loss in overflowed}
    return next((code for code, most in _WIDER.items() if largest <= most and code not in dtypes), None)
