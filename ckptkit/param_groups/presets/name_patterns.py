"""Write few patterns that match given names and no others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from ckptkit.core.patterns import literal, parse_pattern

__all__ = ["patterns_of"]

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
_LETTERS = "ijklmnop"


def patterns_of(chosen: Sequence[str], names: Collection[str]) -> list[str]:
    """Return patterns that match every name in ``chosen`` and no other of ``names``, in the order of ``chosen``.

    A module becomes ``module.*`` where all of its parameters are chosen. Patterns that differ only in numbers become
    one pattern, unless it would match a name that is not chosen.
    """
    wanted = set(chosen)
    others = [name for name in names if name not in wanted]
    with_others = {prefix for name in others for prefix in _prefixes(name)}
    patterns = dict.fromkeys(_module_pattern(name, with_others) for name in chosen)
    counts = Counter(map(_with_captures, patterns))
    joins = {
        joined for joined, count in counts.items() if count > 1 and not any(map(parse_pattern(joined).match, others))
    }
    return list(
        dict.fromkeys(joined if (joined := _with_captures(pattern)) in joins else pattern for pattern in patterns)
    )


def _module_pattern(name: str, with_others: Collection[str]) -> str:
    """Return ``module.*`` for the outermost module of ``name`` that is not in ``with_others``, or the name itself."""
    for prefix in _prefixes(name):
        if prefix not in with_others and literal(prefix) == prefix:
            return f"{prefix}.*"
    return literal(name)


def _prefixes(name: str) -> Iterator[str]:
    end = name.find(".")
    while end != -1:
        yield name[:end]
        end = name.find(".", end + 1)


def _with_captures(pattern: str) -> str:
    """Return ``pattern`` with a capture in place of each number; a regex is returned unchanged."""
    count = len(_NUMBER.findall(pattern))
    if pattern.startswith("re:") or not 0 < count <= len(_LETTERS):
        return pattern
    letters = iter(_LETTERS)
    return _NUMBER.sub(lambda _: f"{{{next(letters)}}}", pattern)
