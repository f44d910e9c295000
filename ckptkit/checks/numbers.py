"""What the numbers of single tensors tell: NaN and infinities, zeros throughout, one number alone, subnormal ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ckptkit.checks.structure import FLOATS
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural, quoted
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["constant", "is_mask", "not_finite", "subnormal"]

_MASK = re.compile(r"mask|(?:^|[._])alibi")
# What begins at zero, or is zero by nature, and may stay so: biases and means, the second half of an adapter, gates,
# residual branches that begin as nothing, positions that are learned from zero.
_OFTEN_ZERO = re.compile(
    r"bias|beta(?:$|\.)|running_mean|lora_B|lora[._]up|lora_embedding_A|zero|adaln|rel_pos|pos_emb|position|sampling_offsets|attention_weights"
    r"|(?:^|[._])(?:gate|gates|alpha|offset|shift|token|gamma|scale|logvar|temperature)(?:$|[._])",
    re.IGNORECASE,
)
_OFTEN_CONSTANT = re.compile(
    r"bias|scale|gamma|running_var|lambda|(?:^|[._])(?:ls\d*|alpha|beta|gate|temperature|freqs)(?:$|[._])",
    re.IGNORECASE,
)
_HEAD = re.compile(r"(?:^|\.)(?:head|heads|head_dist|classifier|fc)\.(?:head\.|fc\.)?weight")  # often begins as zeros
_HALVES = 0.5
_COMPLEX = frozenset({"C32", "C64", "C128"})
_EXACT_RANGE = frozenset({"F32", "BF16", "F64"})  # whose smallest normal numbers no trained weight comes near


def is_mask(key: str) -> bool:
    """Return whether a tensor is by its name a mask, whose infinities and zeros mean something."""
    return _MASK.search(key.rpartition(".")[2]) is not None


def not_finite(infos: Mapping[str, TensorInfo], numbers: Mapping[str, ValueStats]) -> Iterator[Finding]:
    """Yield an error for each tensor with NaN (``nan``) or with infinities alone (``inf``).

    In a mask, minus infinity is a value like others, and said in a note.
    """
    for key, found in numbers.items():
        infinite = found.posinf + found.neginf
        if found.nan:
            more = f", and {infinite:,} infinite" if infinite else ""
            said = f"{quoted(key)}: {found.nan:,} of {plural(found.count, 'number')} are NaN{more}"
            yield Finding("nan", "error", key, said, "take an earlier checkpoint: training or a cast went wrong")
        elif infinite:
            kind = infos[key].dtype
            said = f"{quoted(key)}: {infinite:,} of {plural(found.count, 'number')} are infinite"
            if is_mask(key) and not found.posinf:
                yield Finding("inf", "note", key, f"{said}, as a mask may have them")
            else:
                yield Finding("inf", "error", key, said, f"was a number too large for {kind} when it was cast?")


def constant(infos: Mapping[str, TensorInfo], numbers: Mapping[str, ValueStats]) -> Iterator[Finding]:
    """Yield what holds one number alone, where that is not usual: ``all-zero`` and ``constant``.

    Warnings are about matrices and larger, notes about vectors, since a norm may have learned to shut a branch, and
    about heads of zeros, with which a fine-tuning often begins. Nothing is said of integers, of single numbers, of
    vectors of ones, of norms over several dimensions, and of what begins as zero or as a constant by its name, such as
    biases and the second halves of adapters.
    """
    kinds: dict[tuple[str, bool], list[str]] = {}
    for key, found in numbers.items():
        info = infos[key]
        value = found.constant
        if value is None or info.dtype not in FLOATS | _COMPLEX or found.count < 2 or is_mask(key):
            continue
        matrix = sum(size > 1 for size in info.shape) > 1
        code = "constant" if value else "all-zero"
        usual = (_OFTEN_CONSTANT if value else _OFTEN_ZERO).search(key) is not None
        affine = key.endswith("weight") and info.shape == getattr(infos.get(f"{key[:-6]}bias"), "shape", None)
        if not usual and not (value == 1 and (affine or not matrix)):
            begins = not value and _HEAD.search(key) is not None
            kinds.setdefault((code, matrix and not affine and not begins), []).append(key)
    for (code, matrix), keys in kinds.items():
        what = "nothing but zeros" if code == "all-zero" else "one number throughout"
        of = "" if code == "all-zero" else f" ({numbers[keys[0]].min:g} in the first)"
        said = f"{plural(len(keys), 'tensor')} with {what}{of}: {listed(keys)}"
        hint = "never trained, or lost in a conversion?" if matrix else ""
        yield Finding(code, "warning" if matrix else "note", keys[0], said, hint)


def subnormal(infos: Mapping[str, TensorInfo], numbers: Mapping[str, ValueStats]) -> Iterator[Finding]:
    """Yield notes on subnormal numbers, which some processors compute slowly and narrow dtypes round coarsely.

    Of F32, BF16 and F64 any count, of narrower ones those tensors where they are more than half of what is not zero.
    """
    slow = [key for key, found in numbers.items() if found.subnormal and infos[key].dtype in _EXACT_RANGE]
    if slow:
        count = sum(numbers[key].subnormal for key in slow)
        said = f"{plural(count, 'subnormal number')} in {plural(len(slow), 'tensor')}: {listed(slow)}"
        yield Finding("subnormal", "note", slow[0], said, "torch.set_flush_denormal(True) computes them as zeros")
    coarse = [
        key
        for key, found in numbers.items()
        if infos[key].dtype not in _EXACT_RANGE and found.subnormal > _HALVES * (found.finite - found.zeros)
    ]
    if coarse:
        said = f"{plural(len(coarse), 'tensor')} mostly of subnormal numbers, whose digits are lost: {listed(coarse)}"
        yield Finding("subnormal", "note", coarse[0], said, "a scale beside them, or a wider dtype, keeps the digits")
