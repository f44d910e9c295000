"""Comparisons of a checkpoint with a model: keys, shapes and dtypes, and values that were never trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby

from ckptkit.checks import codes
from ckptkit.checks.structure import FLOATS
from ckptkit.comparison import KeyPair, StateDictDiff
from ckptkit.core.findings import Code, Finding
from ckptkit.core.text import listed, plural, printable
from ckptkit.core.ties import tied_keys
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["check_as_expected", "check_at_init", "check_differences", "find_at_init"]

_MIN_VALUES = 1024  # smaller samples are too often alike by chance
_SIGMAS = 4.0
_MIN_IN_BIN = 10


def check_differences(result: StateDictDiff) -> Iterator[Finding]:
    """Yield one finding for each kind of difference that ``load_state_dict`` would report.

    Errors are ``missing``, ``shape-mismatched``, ``quantized-mismatched``, ``uncopyable`` and ``no-tensor``. Warnings
    are ``unexpected``, ``dtype-mismatched`` and ``extra-state``. Notes are ``missing-tied`` (EXPECTED ties the missing
    key to a stored key) and ``filled`` (a counter that torch fills in). ``own-code`` says what the code of a live model
    adds: an error where it refuses the checkpoint, a warning where it reports further keys, a note where names decided.
    """
    hint = result.hints[0].message if result.hints else "ckpt diff EXPECTED PATH lists all keys"
    matched = {pair.key for pair in result.matched}
    partners = {key: group for group in tied_keys(result.expected.values()) for key in group}
    missing = [info.key for info in result.missing if info.key not in result.filled | result.excused]
    tied = [key for key in missing if any(other in matched for other in partners.get(key, ()))]
    elsewhere = {*result.blocked, *tied}
    lost = [key for key in missing if key not in elsewhere]
    yield from _findings_of_keys(codes.MISSING, lost, "of EXPECTED missing in the checkpoint", hint)
    text = "missing in the checkpoint, but filled by load_state_dict(strict=False), which loads a tied key"
    yield from _findings_of_keys(codes.MISSING_TIED, tied, text)
    filled = [info.key for info in result.missing if info.key in result.filled]
    text = "missing, as in checkpoints from before torch 0.4.1; load_state_dict fills these keys"
    yield from _findings_of_keys(codes.FILLED, filled, text)
    unexpected = [info.key for info in result.unexpected if info.key not in result.unseen]
    text = "of the checkpoint missing in EXPECTED"
    yield from _findings_of_keys(codes.UNEXPECTED, unexpected, text, hint)
    yield from _findings_of_pairs(
        codes.SHAPE_MISMATCHED, result.shape_mismatched, "with another shape than in EXPECTED"
    )
    for remark, group in groupby(result.quantized, lambda weight: weight.remark):
        weights = list(group)
        names = [weight.key for weight in weights]
        text = f"{plural(len(weights), 'weight')} {remark}: {listed(names)}"
        yield codes.QUANTIZED_MISMATCHED.finding(names[0], text, weights[0].weight.way_out, keys=names)
    uncopyable = {pair.key for pair in result.uncopyable}
    yield from _findings_of_pairs(codes.UNCOPYABLE, result.uncopyable, "with a kind or dtype that torch cannot copy")
    cast = [pair for pair in result.dtype_mismatched if pair.key not in uncopyable]
    yield from _findings_of_pairs(
        codes.DTYPE_MISMATCHED, cast, "with another dtype than in EXPECTED: torch casts silently"
    )
    not_tensors = [*result.blocked, *result.foreign]
    yield from _findings_of_keys(
        codes.NO_TENSOR, not_tensors, "without a tensor, but load_state_dict takes only tensors"
    )
    yield from _findings_of_keys(codes.EXTRA_STATE, result.extra_state, "of extra state that only one side has")
    yield from _own_code_findings(result)


def _own_code_findings(result: StateDictDiff) -> Iterator[Finding]:
    for refusal in result.refusals:
        yield codes.OWN_CODE.finding("", f"load_state_dict raises, even with strict=False: {printable(refusal)}")
    if result.reported:
        text = f"load_state_dict reports {plural(len(result.reported), 'further key')}: {listed(result.reported)}"
        yield codes.OWN_CODE.finding(result.reported[0], text, severity="warning", keys=result.reported)
    if result.undecided:
        message = f"names decided: the model's own code for loading was not tried, because {result.undecided}"
        yield codes.OWN_CODE.finding("", message, severity="note")


def _findings_of_keys(code: Code, keys: Iterable[str], text: str, hint: str = "") -> Iterator[Finding]:
    names = list(keys)
    if names:
        yield code.finding(names[0], f"{plural(len(names), 'key')} {text}: {listed(names)}", hint, keys=names)


def _findings_of_pairs(code: Code, pairs: Iterable[KeyPair], text: str) -> Iterator[Finding]:
    found = list(pairs)
    if found:
        first = f"{found[0].expected} expected, {found[0].found} found"
        names = [pair.key for pair in found]
        yield code.finding(names[0], f"{plural(len(found), 'key')} {text}: {listed(names)} ({first})", keys=names)


def check_as_expected(pairs: Iterable[KeyPair], have_equal_bytes: Callable[[KeyPair], bool]) -> Iterator[Finding]:
    """Yield an ``as-expected`` note on the tensors that equal the tensors of EXPECTED bit by bit."""
    equal = [pair.key for pair in pairs if pair.expected.elements and have_equal_bytes(pair)]
    if equal:
        message = f"{plural(len(equal), 'tensor')} bit by bit equal to EXPECTED: {listed(equal)}"
        yield codes.AS_EXPECTED.finding(equal[0], message, keys=equal)


def check_at_init(
    pairs: Iterable[KeyPair], found_stats: Mapping[str, ValueStats], fresh_stats: Mapping[str, ValueStats]
) -> Iterator[Finding]:
    """Yield ``at-init`` for tensors that look as if they were never trained, compared with a newly built model.

    A tensor of 1,024 numbers or more is a warning if its mean, deviation and histogram fit the new model. They may
    differ as much as two samples of one distribution differ. A constant tensor is a note if the new model has the same
    constant. This is evidence, not proof: a short training can look the same. ``found_stats`` has the keys of the
    checkpoint, ``fresh_stats`` has the keys of the model.
    """
    sampled, constant = find_at_init(pairs, found_stats, fresh_stats)
    if sampled:
        count = plural(len(sampled), "tensor")
        message = f"{count} distributed as in a new model (mean, deviation, magnitudes): {listed(sampled)}"
        hint = "never trained, or not saved? use --drop for tensors that will be trained from scratch"
        yield codes.AT_INIT.finding(sampled[0], message, hint, keys=sampled)
    if constant:
        count = plural(len(constant), "tensor")
        message = f"{count} with the constant initial values of a new model (ones or zeros): {listed(constant)}"
        yield codes.AT_INIT.finding(constant[0], message, severity="note", keys=constant)


def find_at_init(
    pairs: Iterable[KeyPair], found_stats: Mapping[str, ValueStats], fresh_stats: Mapping[str, ValueStats]
) -> tuple[list[str], list[str]]:
    """Return the keys of tensors that look newly initialised: those of random values, and those of one value."""
    sampled: list[str] = []
    constant: list[str] = []
    for pair in pairs:
        found, fresh = found_stats.get(pair.found.key), fresh_stats.get(pair.expected.key)
        if found is None or fresh is None or pair.found.dtype not in FLOATS or found.finite != found.count:
            continue
        if fresh.constant is not None:
            if found.constant == fresh.constant and found.count > 1:
                constant.append(pair.key)
        elif _have_one_distribution(found, fresh, same_dtype=pair.found.dtype == pair.expected.dtype):
            sampled.append(pair.key)
    return sampled, constant


def _have_one_distribution(found: ValueStats, fresh: ValueStats, *, same_dtype: bool) -> bool:
    count = found.count
    if count < _MIN_VALUES or fresh.count != count or not found.std or not fresh.std:
        return False
    if found.mean is None or fresh.mean is None:
        return False
    error = math.sqrt(2 / count)
    if abs(found.mean - fresh.mean) > _SIGMAS * max(found.std, fresh.std) * error:
        return False
    # The standard error of a normal distribution; no common initialisation has a larger error.
    if abs(math.log(found.std / fresh.std)) > _SIGMAS * error / math.sqrt(2):
        return False
    return not same_dtype or _have_one_histogram(found.histogram, fresh.histogram)


def _have_one_histogram(found: Mapping[int, int], fresh: Mapping[int, int]) -> bool:
    """Return whether a chi-squared test finds no difference between two histograms of equally many numbers."""
    bins = [(found.get(exponent, 0), fresh.get(exponent, 0)) for exponent in found.keys() | fresh.keys()]
    full = [(count, fresh_count) for count, fresh_count in bins if count + fresh_count >= _MIN_IN_BIN]
    squared = sum((count - fresh_count) ** 2 / (count + fresh_count) for count, fresh_count in full)
    return squared <= len(full) + _SIGMAS * math.sqrt(2 * len(full))
