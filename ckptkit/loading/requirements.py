"""``require=`` and ``min_coverage=`` of ``load_into``, checked on the plan before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from numbers import Real

from ckptkit.comparison import StateDictDiff
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.patterns import Pattern, parse_pattern, suggest_pattern
from ckptkit.core.text import kind_of, listed, percent, plural, quoted
from ckptkit.errors import ModelError, RuleError
from ckptkit.plans.plan import Plan

__all__ = ["Requirements", "refuse_unmet"]

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Requirements:
    """Patterns of keys that must all be loaded, and the least share of the model's elements that must be loaded."""

    require: str | Sequence[str] = ()
    min_coverage: float = 0.0


def refuse_unmet(
    requirements: Requirements,
    base: Checkpoint,
    loaded: AbstractSet[str],
    plan: Plan,
    difference: Callable[[], StateDictDiff],
) -> None:
    """Raise ``ModelError`` where a plan does not meet the requirements, with the reason and a hint.

    ``difference`` is called only for the hint. Raises ``RuleError`` for a pattern that matches no key of the model.
    """
    share = requirements.min_coverage
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
        raise ModelError(f"min_coverage is {share!r}, not a share between 0 and 1", hint="for 95 % write 0.95")
    reasons = {drop.wanted: drop.reason for drop in plan.dropped if drop.wanted}
    for pattern in _patterns(requirements.require):
        wanted = [key for key in base if pattern.match(key)]
        if not wanted:
            raise RuleError(
                f"require = {quoted(pattern.text)} matches none of {plural(len(base), 'key')} of the model",
                hint=suggest_pattern(pattern, base),
            )
        not_loaded = [key for key in wanted if key not in loaded]
        if not_loaded:
            raise ModelError(
                f"require = {quoted(pattern.text)}: {len(not_loaded):,} of {plural(len(wanted), 'tensor')} would not "
                f"be loaded, {_list_with_reasons(not_loaded, reasons)}",
                hint=_hint(not_loaded, reasons, difference),
            )
    elements = sum(info.elements for info in base.values())
    filled = sum(info.elements for key, info in base.items() if key in loaded)
    if elements and filled / elements < share:
        not_loaded = sorted((key for key in base if key not in loaded), key=lambda key: -base[key].elements)
        raise ModelError(
            f"the checkpoint fills {filled:,} of {plural(elements, 'element')} ({percent(filled / elements)}), "
            f"below min_coverage = {share}; the largest tensors that would not be loaded: "
            f"{_list_with_reasons(not_loaded, reasons)}",
            hint=_hint(not_loaded, reasons, difference),
        )


def _patterns(require: object) -> list[Pattern]:
    texts = list(require) if isinstance(require, Iterable) and not isinstance(require, str | bytes) else [require]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise RuleError(f"require has {kind_of(wrong[0])}", hint='give a pattern or a list of patterns: "encoder.*"')
    return list(map(parse_pattern, texts))


def _list_with_reasons(not_loaded: Sequence[str], reasons: dict[str, str]) -> str:
    explained = [f"{quoted(key)} ({reasons.get(key, 'not in the checkpoint')})" for key in not_loaded]
    return listed(explained, _SHOWN, show=str)


def _hint(not_loaded: Sequence[str], reasons: dict[str, str], difference: Callable[[], StateDictDiff]) -> str:
    if all(key in reasons for key in not_loaded):
        return "require less, or set on_mismatch to an operation that makes the shapes equal"
    hints = difference().hints
    return hints[0].message if hints else "require less, or rename the checkpoint's keys with rules of suggest_rules"
