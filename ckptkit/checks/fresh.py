"""What of a checkpoint still is as EXPECTED has it: bit by bit, or as a fresh model is initialised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from ckptkit.checks.structure import FLOATS
from ckptkit.comparison import Pair
from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural
from ckptkit.statistics.values_door import Numbers

__all__ = ["as_expected", "like_a_fresh_model"]

_LEAST_NUMBERS = 1024  # of fewer, chance decides
_SIGMAS = 4.0
_LEAST_IN_BIN = 10


def as_expected(pairs: Iterable[Pair], same: Callable[[Pair], bool]) -> Iterator[Finding]:
    """Yield a note on the tensors that are bit by bit those of EXPECTED: ``as-expected``."""
    equal = [pair.key for pair in pairs if pair.expected.elements and same(pair)]
    if equal:
        said = f"{plural(len(equal), 'tensor')} bit by bit as EXPECTED has them: {listed(equal)}"
        yield Finding("as-expected", "note", equal[0], said)


def like_a_fresh_model(
    pairs: Iterable[Pair], found: Mapping[str, Numbers], fresh: Mapping[str, Numbers]
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


def _one_distribution(ours: Numbers, theirs: Numbers, *, same_dtype: bool) -> bool:
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
