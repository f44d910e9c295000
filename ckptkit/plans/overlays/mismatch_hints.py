"""The options that a hint names for tensors that differ in shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

from ckptkit.comparison import KeyPair
from ckptkit.core.patterns import parse_pattern, pattern_for
from ckptkit.core.text import plural, shell_word
from ckptkit.plans.overlays.choices import Sides
from ckptkit.plans.policies import (
    MismatchAction,
)

__all__ = ["Spelling", "for_others", "in_python", "mismatch_hint", "on_command_line"]

_SKIP: MismatchAction = "skip"
_MOST_RESIZES = 3  # operations that a hint names for one tensor
_MOST_OPTIONS = 4  # of one hint
# Writes the action of a policy for a pattern: as an option, or as an argument.
Spelling: TypeAlias = Callable[[str, str, str], str]


def on_command_line(policy: str, pattern: str, action: str) -> str:
    """Return the option that chooses an action of a policy for a pattern."""
    return f"--{policy.replace('_', '-')} {shell_word(f'{pattern}={action}')}"


def in_python(policy: str, pattern: str, action: str) -> str:
    """Return the argument that chooses an action of a policy for a pattern."""
    return f"{policy}={{{pattern!r}: {action!r}}}"


def mismatch_hint(pairs: Sequence[KeyPair], spell: Spelling, sides: Sides, *, skips: bool = True) -> str:
    """Return the actions that fit, each with its pattern: all for one module, or the best for each of several.

    Unless it ``skips``, it is about the pairs that an action can resize, and empty if there are none.
    """
    from ckptkit.tensor_ops.suggestions import suggest

    ways = {pair.key: _ways(pair, sides, skips=skips) for pair in pairs}
    by_key = {pair.key: pair for pair in pairs if ways[pair.key]}

    def pattern(key: str, action: str) -> str:
        def fits(other: str) -> bool:
            found, expected = by_key[other].found.shape, by_key[other].expected.shape
            return action == _SKIP or suggest(action, found, expected, other) is not None

        return pattern_for(key, by_key, fits)

    def option(key: str, action: str, effect: str) -> str:
        return f"{spell('on_mismatch', pattern(key, action), action)}{effect}"

    left, best = list(by_key), []
    while left:
        first = left[0]
        action, effect = ways[first][0]
        covered = parse_pattern(pattern(first, action))
        left = [key for key in left if not covered.match(key)]
        best.append(option(first, action, effect))
    if len(best) == 1:
        first = next(iter(by_key))
        best = [option(first, *way) for way in ways[first]]
    more = f"; {plural(len(best) - _MOST_OPTIONS, 'more pattern')} to give" if len(best) > _MOST_OPTIONS else ""
    return f"{'; '.join(best[:_MOST_OPTIONS])}{more}{for_others(by_key, spell) if skips else ''}"


def _ways(pair: KeyPair, sides: Sides, *, skips: bool) -> list[tuple[str, str]]:
    """Return the actions that would fit a pair, best first, each with its effect; only if it ``skips``, also that."""
    from ckptkit.tensor_ops.suggestions import suggestions

    found, expected = pair.found.shape, pair.expected.shape
    resizes = [(name, f": {why}") for name, why in suggestions(found, expected, pair.key)][:_MOST_RESIZES]
    if not skips:
        return resizes
    skip = (_SKIP, f" keeps the {sides.base}'s values there")
    # Fewer rows are mostly a head of fewer classes, of which the first have no meaning.
    shrinks = [name for name, _ in resizes[:1]] == ["slice"] and found[0] > expected[0]
    return [skip, *resizes] if shrinks else [*resizes, skip]


def for_others(keys: Collection[str], spell: Spelling) -> str:
    """Return what a hint adds where other keys need an action too."""
    pattern = "with the pattern '*'" if spell is in_python else "without a pattern"
    return f"; {pattern}, the action is for all other keys" if len(keys) > 1 else ""
