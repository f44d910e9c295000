"""What a load or a merge must fill: patterns of keys, and a least share of the elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ckptkit.core.arguments import refuse, require_number, require_strings
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.coverage import measure_coverage
from ckptkit.core.patterns import Pattern, parse_pattern, suggest_pattern
from ckptkit.core.text import listed, percent, plural, quoted, shell_word, short_number
from ckptkit.errors import RuleError, message_for_python

__all__ = ["Requirements", "Unmet", "find_unmet", "parse_requirements"]

_SHOWN = 3
_SHARE = "a share between 0 and 1: for 95 % write 0.95"


@dataclass(frozen=True, slots=True)
class Requirements:
    """Patterns of keys that must all be filled, and the least share of the elements that must be filled."""

    require: tuple[Pattern, ...] = ()
    min_coverage: float = 0.0

    def __bool__(self) -> bool:
        """Whether anything is required."""
        return bool(self.require or self.min_coverage)


@dataclass(frozen=True, slots=True)
class Unmet:
    """A requirement that is not met: the requirement, a sentence about it, and the keys that would not be filled.

    ``requirement`` is ``"require"`` or ``"min_coverage"``, or the name of a gate of ``diff``. ``message`` names the
    options of ``ckpt``; printed, it names the arguments of Python.
    """

    requirement: str
    message: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        """Return the sentence for Python."""
        return message_for_python(self.message)


def parse_requirements(require: str | Sequence[str], min_coverage: float) -> Requirements:
    """Return the requirements in the arguments ``require`` and ``min_coverage``.

    Raises ``ArgumentError`` for a wrong type or a number that is not a share, ``RuleError`` for a wrong pattern.
    """
    texts = require_strings(require, "require", 'a pattern or a list of patterns, such as "encoder.*"')
    require_number(min_coverage, "min_coverage", _SHARE, at_least=0)
    if not min_coverage <= 1:
        refuse(min_coverage, "min_coverage", _SHARE)
    return Requirements(tuple(map(parse_pattern, texts)), float(min_coverage))


def find_unmet(
    requirements: Requirements,
    base: Mapping[str, TensorInfo],
    filled: AbstractSet[str],
    reasons: Mapping[str, str],
    *,
    of: str,
    source: str,
    verbs: tuple[str, str] = ("fills", "filled"),
) -> list[Unmet]:
    """Return each requirement that ``filled``, the keys of ``base`` that get values, does not meet.

    ``reasons`` say why a key is not filled; other keys are not in the ``source``. Messages call ``base`` by the name
    ``of``, and say what the source does with ``verbs``. Raises ``RuleError`` for a pattern that matches no key of
    ``base``.
    """

    def explained(keys: Sequence[str]) -> str:
        return listed([f"{quoted(key)} ({reasons.get(key, f'not in {source}')})" for key in keys], _SHOWN, show=str)

    unmet = []
    for pattern in requirements.require:
        wanted = [key for key in base if pattern.match(key)]
        if not wanted:
            raise RuleError(
                f"--require {shell_word(pattern.text)} matches none of {plural(len(base), 'key')} of {of}",
                hint=suggest_pattern(pattern, base, accepts=lambda matched: filled >= set(matched)),
            )
        empty = [key for key in wanted if key not in filled]
        if empty:
            message = (
                f"--require {shell_word(pattern.text)}: {len(empty):,} of {plural(len(wanted), 'tensor')} would not be "
                f"{verbs[1]}, {explained(empty)}"
            )
            unmet.append(Unmet("require", message, tuple(empty)))
    coverage = measure_coverage(base, filled)
    if coverage.share < requirements.min_coverage:
        empty = sorted(coverage.kept, key=lambda key: -base[key].elements)
        message = (
            f"{source} {verbs[0]} {coverage.filled_elements:,} of {plural(coverage.elements, 'element')} "
            f"({percent(coverage.share)}), below --min-coverage {short_number(requirements.min_coverage, 15)}; the "
            f"largest tensors that would not be {verbs[1]}: {explained(empty)}"
        )
        unmet.append(Unmet("min_coverage", message, coverage.kept))
    return unmet
