"""The other way round: from names to short patterns that fit exactly these among all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from ckptkit.core.patterns import literal, parse_pattern

__all__ = ["patterns_of"]

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
_LETTERS = "ijklmnop"


def patterns_of(chosen: Sequence[str], names: Collection[str]) -> list[str]:
    """Return patterns that fit all of ``chosen`` and no other of ``names``, in the order of ``chosen``.

    A module whose parameters are all chosen becomes ``module.*``, and modules that differ in numbers alone one pattern,
    where it fits no other name.
    """
    wanted = set(chosen)
    others = [name for name in names if name not in wanted]
    torn = {prefix for name in others for prefix in _prefixes(name)}
    found = dict.fromkeys(_whole(name, torn) for name in chosen)
    alike = Counter(map(_joined, found))
    joins = {
        joined for joined, count in alike.items() if count > 1 and not any(map(parse_pattern(joined).match, others))
    }
    return list(dict.fromkeys(joined if (joined := _joined(pattern)) in joins else pattern for pattern in found))


def _whole(name: str, torn: Collection[str]) -> str:
    for prefix in _prefixes(name):
        if prefix not in torn and literal(prefix) == prefix:
            return f"{prefix}.*"
    return literal(name)


def _prefixes(name: str) -> Iterator[str]:
    end = name.find(".")
    while end != -1:
        yield name[:end]
        end = name.find(".", end + 1)


def _joined(pattern: str) -> str:
    """Return the pattern with a capture in the place of each number, where it is not a regex."""
    count = len(_NUMBER.findall(pattern))
    if pattern.startswith("re:") or not 0 < count <= len(_LETTERS):
        return pattern
    letters = iter(_LETTERS)
    return _NUMBER.sub(lambda _: f"{{{next(letters)}}}", pattern)
