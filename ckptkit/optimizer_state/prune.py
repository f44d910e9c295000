"""States without what no longer fits the model that will load them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ckptkit.core.patterns import Pattern, matches_any, parse_pattern
from ckptkit.core.text import kind_of, plural, printable, shell_word
from ckptkit.errors import PlanError, RuleError
from ckptkit.optimizer_state.groups import with_members
from ckptkit.optimizer_state.model import Change, OptimizerState, parameter_shape, require_named
from ckptkit.optimizer_state.naming import Parameters, parameters_of

__all__ = ["prune"]

_SHOWN = 4


def prune(
    state: OptimizerState, like: Any = None, *, drop: str | Iterable[str] = (), reset: str | Iterable[str] = ()
) -> OptimizerState:
    """Return the state without what does not fit ``like``: a Module, a Checkpoint, or a mapping of names to shapes.

    A parameter that the model does not have, or that is frozen in it, leaves its group; of one with another shape the
    state is dropped, so that it starts anew. ``drop`` and ``reset`` are patterns of names for which the same is done
    unasked. ``changes`` say what became of each, and why. Raises ``RuleError`` for a pattern that fits nothing, and
    ``PlanError`` where nothing would be left.
    """
    dropping, resetting = _patterns(drop, "drop"), _patterns(reset, "reset")
    _refuse_unused(dropping, require_named(state).names, "--drop")
    _refuse_unused(resetting, state.names, "--reset")
    model = None if like is None else parameters_of(like)
    changes: list[Change] = []
    for name in state.names:
        operation, reason = _fate(name, state, model)
        if matches_any(dropping, name):
            operation, reason = "dropped", "asked for by --drop"
        elif operation == "copy" and matches_any(resetting, name):
            operation, reason = "reset", "asked for by --reset"
        changes.append(Change(name, (name,), operation, reason))
    stays = {change.name: change.operation == "copy" for change in changes if change.operation != "dropped"}
    if not stays:
        raise PlanError(f"nothing would be left of {plural(len(state.names), 'parameter')}")
    members = [[name for name in group.names if name in stays] for group in state.groups]
    groups, said = with_members(state.groups, members)
    known = {name if model is None else model.aliases.get(name, name) for name in stays}
    new = [] if model is None else [name for name in model.shapes if name not in known and name not in model.frozen]
    if new and model is not None and model.is_certain:
        more = f" and {len(new) - _SHOWN:,} more" if len(new) > _SHOWN else ""
        named = ", ".join(map(printable, new[:_SHOWN]))
        said.append(f"in no group, though the model trains them (ckpt optim resplit adds them): {named}{more}")
    kept = {name: state.state[name] for name, stay in stays.items() if stay and name in state.state}
    return replace(
        state,
        state=kept,
        groups=groups,
        changes=tuple(changes),
        remarks=tuple(dict.fromkeys((*state.remarks, *said))),
    )


def _patterns(texts: Any, option: str) -> tuple[Pattern, ...]:
    several = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str | bytes) else [texts]
    if wrong := [text for text in several if not isinstance(text, str)]:
        raise RuleError(f"{option} has {kind_of(wrong[0])}", hint='it is a pattern or a list of patterns: "head.*"')
    return tuple(map(parse_pattern, several))


def _fate(name: str, state: OptimizerState, model: Parameters | None) -> tuple[str, str]:
    if model is None:
        return "copy", ""
    first = model.aliases.get(name, name)
    if first not in model.shapes:
        return "dropped", f"{model.source} has no such parameter"
    if name in model.frozen:
        return "dropped", "it is frozen"
    shape, wanted = parameter_shape(state.state.get(name, {})), model.shapes[first]
    if shape is not None and shape != wanted:
        return "reset", f"its state is of {list(shape)}, and the parameter is {list(wanted)}"
    return "copy", ""


def _refuse_unused(patterns: Sequence[Pattern], names: Sequence[str], option: str) -> None:
    for pattern in patterns:
        if not any(map(pattern.match, names)):
            raise RuleError(f"{option} {shell_word(pattern.text)} matches none of {plural(len(names), 'parameter')}")
