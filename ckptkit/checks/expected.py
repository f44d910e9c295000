"""A comparison with what a model expects, as findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptkit.comparison import Pair, StateDictDiff
from ckptkit.core.findings import Finding, Severity
from ckptkit.core.text import listed, plural
from ckptkit.core.ties import tied

__all__ = ["differences"]


def differences(result: StateDictDiff) -> Iterator[Finding]:
    """Yield what ``load_state_dict`` would not take, one finding a kind.

    Errors are ``missing``, ``shape-mismatched``, ``uncopyable`` and ``no-tensor``; warnings ``unexpected``,
    ``dtype-mismatched`` and ``extra-state``. Notes are ``missing-tied``, for what EXPECTED ties to a key that is there,
    and ``filled``, for counters that torch fills in by itself.
    """
    hint = f"{result.hints[0].message}" if result.hints else "ckpt diff lists them all"
    there = {pair.key for pair in result.matched}
    partners = {key: group for group in tied(result.expected.values()) for key in group}
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


def _pairs(code: str, severity: Severity, pairs: Iterable[Pair], said: str) -> Iterator[Finding]:
    told = list(pairs)
    if told:
        first = f"{told[0].expected} expected, {told[0].found} found"
        names = [pair.key for pair in told]
        yield Finding(code, severity, names[0], f"{plural(len(told), 'key')} {said}: {listed(names)} ({first})")
