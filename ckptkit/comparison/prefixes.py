"""Prefixes that one side's keys have in front of the other's, as wrappers put them there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ckptkit.core.patterns import literal

__all__ = ["prefix_counts"]

_MOST_SEGMENTS = 64  # of a prefix: a hostile name can have a million
Shapes = Mapping[str, tuple[int, ...]]


def prefix_counts(expected: Shapes, found: Shapes) -> tuple[Counter[str], Counter[str]]:
    """Return for how many keys of ``found`` leaving out a prefix makes one of ``expected``, and adding one does.

    Only tensors of one shape count, and only prefixes that a pattern takes as they stand.
    """
    strip, add = Counter[str](), Counter[str]()
    for key, shape in found.items():
        strip.update(_prefixes(key, shape, expected))
    for key, shape in expected.items():
        add.update(_prefixes(key, shape, found))
    return strip, add


def _prefixes(key: str, shape: tuple[int, ...], others: Shapes) -> list[str]:
    """Return what stands before those endings of ``key`` that are keys of ``others`` with the same shape."""
    found = []
    at = key.find(".")
    for _ in range(_MOST_SEGMENTS):
        if at < 0:
            break
        prefix = key[: at + 1]
        if others.get(key[at + 1 :]) == shape and literal(prefix) == prefix and "=" not in prefix:
            found.append(prefix)
        at = key.find(".", at + 1)
    return found
