"""Checks of the values of single tensors: NaN, infinities, all zeros, one constant, subnormal numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ckptkit.checks import codes
from ckptkit.checks.meant import is_mask, is_meant
from ckptkit.checks.structure import FLOATS
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural, quoted, short_number
from ckptkit.values.extremes import Extremes

__all__ = ["check_finite", "check_single_tensors"]

# Output heads: fine-tuning often begins with zeros.
_HEAD = re.compile(r"(?:^|\.)(?:head|heads|head_dist|classifier|fc)\.(?:head\.|fc\.)?weight")
_MOSTLY = 0.5
_COMPLEX = frozenset({"C32", "C64", "C128"})
_WIDE_RANGE = frozenset({"F32", "BF16", "F64"})  # trained weights are far larger than their smallest normal number


def check_single_tensors(infos: Mapping[str, TensorInfo], stats: Mapping[str, Extremes]) -> Iterator[Finding]:
    """Yield the findings about finite values: all zeros, one constant, subnormal numbers."""
    yield from _check_constant(infos, stats)
    yield from _check_subnormal(infos, stats)


def check_finite(infos: Mapping[str, TensorInfo], stats: Mapping[str, Extremes]) -> Iterator[Finding]:
    """Yield an error for each tensor with NaN (``nan``), or with infinities but no NaN (``inf``).

    Minus infinity in a mask is a note.
    """
    for key, found in stats.items():
        infinite = found.posinf + found.neginf
        if found.nan:
            more = f", and {infinite:,} infinite" if infinite else ""
            message = f"{quoted(key)}: {_of(found.nan, found.count)} NaN{more}"
            yield codes.NAN.finding(key, message, "use an earlier checkpoint: the training or a cast went wrong")
        elif infinite:
            message = f"{quoted(key)}: {_of(infinite, found.count)} infinite"
            if is_mask(key) and not found.posinf:
                yield codes.INF.finding(key, f"{message}, which is usual in a mask", severity="note")
            else:
                hint = f"was a number too large for {infos[key].dtype} when it was cast?"
                yield codes.INF.finding(key, message, hint)


def _of(count: int, numbers: int) -> str:
    return f"{count:,} of {plural(numbers, 'number')} {'is' if count == 1 else 'are'}"


def _check_constant(infos: Mapping[str, TensorInfo], stats: Mapping[str, Extremes]) -> Iterator[Finding]:
    """Yield a finding for tensors with one value throughout, if this is not usual: ``all-zero`` and ``constant``.

    Matrices and larger tensors are warnings. Vectors are notes, because a norm may have learned to disable its branch;
    so are output heads of zeros. Integers, single numbers, vectors of ones and the weights of norms are not reported.
    The same holds for tensors that usually are zero or constant, by their names.
    """
    keys_by_kind: dict[tuple[bool, bool], list[str]] = {}
    for key, found in stats.items():
        info = infos[key]
        value = found.constant
        if value is None or info.dtype not in FLOATS | _COMPLEX or found.count < 2 or is_mask(key):
            continue
        is_zero = not value
        is_matrix = sum(size > 1 for size in info.shape) > 1
        is_usual = is_meant(key, value)
        bias = infos.get(f"{key[:-6]}bias") if key.endswith("weight") else None
        is_norm = bias is not None and info.shape == bias.shape
        if not is_usual and not (value == 1 and (is_norm or not is_matrix)):
            is_new_head = is_zero and _HEAD.search(key) is not None
            is_serious = is_matrix and not is_norm and not is_new_head
            keys_by_kind.setdefault((is_zero, is_serious), []).append(key)
    for (is_zero, is_serious), keys in keys_by_kind.items():
        first = stats[keys[0]].min
        content = "only zeros" if is_zero else f"one number throughout ({short_number(first)} in the first tensor)"
        message = f"{plural(len(keys), 'tensor')} with {content}: {listed(keys)}"
        hint = "never trained, or lost in a conversion?" if is_serious else ""
        code = codes.ALL_ZERO if is_zero else codes.CONSTANT
        yield code.finding(keys[0], message, hint, severity="warning" if is_serious else "note")


def _check_subnormal(infos: Mapping[str, TensorInfo], stats: Mapping[str, Extremes]) -> Iterator[Finding]:
    """Yield ``subnormal`` notes: some processors are slow with such numbers, and narrow dtypes round them coarsely.

    In F32, BF16 and F64 every subnormal number counts. In narrower dtypes a tensor is reported if more than half of its
    values that are not zero are subnormal.
    """
    slow = [key for key, found in stats.items() if found.subnormal and infos[key].dtype in _WIDE_RANGE]
    if slow:
        count = sum(stats[key].subnormal for key in slow)
        message = f"{plural(count, 'subnormal number')} in {plural(len(slow), 'tensor')}: {listed(slow)}"
        yield codes.SUBNORMAL.finding(slow[0], message, "torch.set_flush_denormal(True) treats them as zeros")
    coarse = [
        key
        for key, found in stats.items()
        if infos[key].dtype not in _WIDE_RANGE and found.subnormal > _MOSTLY * (found.finite - found.zeros)
    ]
    if coarse:
        tensors = plural(len(coarse), "tensor")
        message = f"{tensors} with mostly subnormal numbers, which have lost digits: {listed(coarse)}"
        yield codes.SUBNORMAL.finding(coarse[0], message, "a wider dtype, or a separate scale, keeps the digits")
