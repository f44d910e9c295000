"""A comparison with what a model expects, as findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from ckptkit.checks.structure import FLOATS
from ckptkit.comparison import KeyPair, StateDictDiff
from ckptkit.core.findings import Finding, Severity
from ckptkit.core.text import listed, plural
from ckptkit.core.ties import tied_keys
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["as_expected", "differences", "like_a_fresh_model"]


def differences(result: StateDictDiff) -> Iterator[Finding]:
    """Yield what ``load_state_dict`` would not take, one finding a kind.

    Errors are ``missing``, ``shape-mismatched``, ``uncopyable`` and ``no-tensor``; warnings ``unexpected``,
    ``dtype-mismatched`` and ``extra-state``. Notes are ``missing-tied``, for what EXPECTED ties to a key that is there,
    and ``filled``, for counters that torch fills in by itself.
    """
    hint = f"{result.hints[0].message}" if result.hints else "ckpt diff lists them all"
    there = {pair.key for pair in result.matched}
    partners = {key: group for group in tied_keys(result.expected.values()) for key in group}
    missing = [info.key for info in result.missing if info.key not in result.filled]
    shared = [key for key in missing if any(other in there for other in partners.get(key, ()))]
    blocked = set(result.blocked)
    lost = [key for key in missing if key not in blocked and key not in set(shared)]
    yield from _one("missing", "error", lost, "missing: EXPECTED has {} and this has not", hint)
    said = "not there, and tied in EXPECTED to what is there: load_state_dict(strict=False) fills {} all the same"
    yield from _one("missing-tied", "note", shared, said)
    filled = [info.key for info in result.missing if info.key in result.filled]
    yield from _one("filled", "note", filled, "not there, as before torch 0.4.1: load_state_dict fills {} in")
    unexpected = [info.key for info in result.unexpected if info.key not in result.unseen]
    yield from _one("unexpected", "warning", unexpected, "unexpected: this has {} and EXPECTED has not", hint)
    yield from _pairs("shape-mismatched", "error", result.shape_mismatched, "of another shape than in EXPECTED")
    uncopyable = {pair.key for pair in result.uncopyable}
    yield from _pairs("uncopyable", "error", result.uncopyable, "of a kind or dtype that torch cannot copy")
    cast = [pair for pair in result.dtype_mismatched if pair.key not in uncopyable]
    yield from _pairs("dtype-mismatched", "warning", cast, "of another dtype, which torch casts without a word")
    no_tensor = [*result.blocked, *result.foreign]
    yield from _one("no-tensor", "error", no_tensor, "no tensor, where load_state_dict takes nothing else: {}")
    yield from _one("extra-state", "warning", result.extra_state, "extra state on one side alone: {}")


def _one(code: str, severity: Severity, keys: Iterable[str], said: str, hint: str = "") -> Iterator[Finding]:
    names = list(keys)
    if names:
        pronoun = "it" if len(names) == 1 else "them"
        message = f"{plural(len(names), 'key')} {said.format(pronoun)}: {listed(names)}"
        yield Finding(code, severity, names[0], message, hint)


def _pairs(code: str, severity: Severity, pairs: Iterable[KeyPair], said: str) -> Iterator[Finding]:
    told = list(pairs)
    if told:
        first = f"{told[0].expected} expected, {told[0].found} found"
        names = [pair.key for pair in told]
        yield Finding(code, severity, names[0], f"{plural(len(told), 'key')} {said}: {listed(names)} ({first})")


_LEAST_NUMBERS = 1024  # of fewer, chance decides
_SIGMAS = 4.0
_LEAST_IN_BIN = 10


def as_expected(pairs: Iterable[KeyPair], same: Callable[[KeyPair], bool]) -> Iterator[Finding]:
    """Yield a note on the tensors that are bit by bit those of EXPECTED: ``as-expected``."""
    equal = [pair.key for pair in pairs if pair.expected.elements and same(pair)]
    if equal:
        said = f"{plural(len(equal), 'tensor')} bit by bit as EXPECTED has them: {listed(equal)}"
        yield Finding("as-expected", "note", equal[0], said)


def like_a_fresh_model(
    pairs: Iterable[KeyPair], found: Mapping[str, ValueStats], fresh: Mapping[str, ValueStats]
) -> Iterator[Finding]:
    """Yield what looks as if it was never trained, beside a model that was just built: ``at-init``.

    A warning on tensors of 1,024 numbers or more whose mean, deviation and magnitudes, by powers of two, differ from
    those of the fresh ones by no more than two samples of one distribution do; a note on those that hold one number
    throughout, the same as the fresh ones. It is evidence and no proof: a training that moved little is not told
    apart. ``found`` and ``fresh`` are by the keys of the checkpoint and of the model.
    """
    sampled: list[str] = []
    constant: list[str] = []
    for pair in pairs:
        ours, theirs = found.get(pair.found.key), fresh.get(pair.expected.key)
        if ours is None or theirs is None or pair.found.dtype not in FLOATS or ours.finite != ours.count:
            continue
        if theirs.constant is not None:
            if ours.constant == theirs.constant and ours.count > 1:
                constant.append(pair.key)
        elif _one_distribution(ours, theirs, same_dtype=pair.found.dtype == pair.expected.dtype):
            sampled.append(pair.key)
    if sampled:
        said = f"{plural(len(sampled), 'tensor')} distributed as in a model that was just built (mean, deviation, "
        hint = "never trained, or not what was saved? Of what is meant to start anew, leave it out with --drop"
        yield Finding("at-init", "warning", sampled[0], f"{said}magnitudes): {listed(sampled)}", hint)
    if constant:
        said = f"{plural(len(constant), 'tensor')} throughout the number that a model has when it is built (ones, zeros"
        yield Finding("at-init", "note", constant[0], f"{said}): {listed(constant)}")


def _one_distribution(ours: ValueStats, theirs: ValueStats, *, same_dtype: bool) -> bool:
    count = ours.count
    if count < _LEAST_NUMBERS or theirs.count != count or not ours.std or not theirs.std:
        return False
    if ours.mean is None or theirs.mean is None:
        return False
    error = math.sqrt(2 / count)
    if abs(ours.mean - theirs.mean) > _SIGMAS * max(ours.std, theirs.std) * error:
        return False
    if abs(math.log(ours.std / theirs.std)) > _SIGMAS * error / math.sqrt(2):  # as of normal numbers, the widest used
        return False
    return not same_dtype or _same_bins(ours.histogram, theirs.histogram)


def _same_bins(ours: Mapping[int, int], theirs: Mapping[int, int]) -> bool:
    """Return whether chi-squared tells two histograms of as many numbers apart."""
    bins = [(ours.get(at, 0), theirs.get(at, 0)) for at in ours.keys() | theirs.keys()]
    full = [(one, other) for one, other in bins if one + other >= _LEAST_IN_BIN]
    squared = sum((one - other) ** 2 / (one + other) for one, other in full)
    return squared <= len(full) + _SIGMAS * math.sqrt(2 * len(full))
