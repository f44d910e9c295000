"""Remove the state, and the parameters, that do not fit the model that will load them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ckptkit.comparison.hints import count_prefixes
from ckptkit.core.patterns import Pattern, matches_any, parse_pattern, suggest_pattern
from ckptkit.core.text import kind_of, plural, printable, shell_word
from ckptkit.errors import PlanError, RuleError
from ckptkit.optimizer_state.groups import with_members
from ckptkit.optimizer_state.model import Change, OptimizerState, parameter_shape, require_named
from ckptkit.optimizer_state.naming import ModelLike, parameters_of
from ckptkit.optimizer_state.positions import Parameters

__all__ = ["prune"]

_MAX_SHOWN = 4


def prune(
    state: OptimizerState,
    like: ModelLike | None = None,
    *,
    drop: str | Iterable[str] = (),
    reset: str | Iterable[str] = (),
) -> OptimizerState:
    """Return the state without what does not fit ``like``: a Module, a path, a Checkpoint, or names with shapes.

    A parameter that the model does not have, or that is frozen in it, is removed from its group. The state of a
    parameter with another shape is dropped, so the parameter starts without state. ``drop`` and ``reset`` are patterns
    of names for which the same is done in any case. ``changes`` tells what was done to each parameter, and why.

    Raises ``RuleError`` for a pattern that matches no parameter, and ``PlanError`` if no parameter would be left.

    Example:
        >>> from ckptkit.optimizer_state import prune, to_named
        >>> model = torch.nn.Linear(2, 2)
        >>> state = to_named(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), model)
        >>> prune(state, drop="bias").names
        ('weight',)
    """
    drop_patterns, reset_patterns = _parse_patterns(drop, "drop"), _parse_patterns(reset, "reset")
    _refuse_unmatched(drop_patterns, require_named(state).names, "--drop")
    _refuse_unmatched(reset_patterns, state.names, "--reset")
    model = None if like is None else parameters_of(like)
    changes: list[Change] = []
    for name in state.names:
        operation, reason = _operation(name, state, model)
        if matches_any(drop_patterns, name):
            operation, reason = "dropped", "requested with --drop"
        elif operation == "copy" and matches_any(reset_patterns, name):
            operation, reason = "reset", "requested with --reset"
        changes.append(Change(name, (name,), operation, reason))
    keeps_state = {change.name: change.operation == "copy" for change in changes if change.operation != "dropped"}
    if not keeps_state:
        raise PlanError(f"no parameter would be left of {len(state.names):,}", hint=_rename_hint(state, model))
    members = [[name for name in group.names if name in keeps_state] for group in state.groups]
    groups, remarks = with_members(state.groups, members)
    if model is not None and model.is_certain:
        remarks += _untrained_remarks(model, keeps_state)
    return replace(
        state,
        state={name: state.state[name] for name, keeps in keeps_state.items() if keeps and name in state.state},
        groups=groups,
        changes=tuple(changes),
        remarks=tuple(dict.fromkeys((*state.remarks, *remarks))),
    )


def _rename_hint(state: OptimizerState, model: Parameters | None) -> str | None:
    """Return the rename that gives parameters the names of the model, where one prefix makes the difference."""
    if model is None:
        return None
    saved = {name: parameter_shape(state.state.get(name, {})) or () for name in state.names}
    removed, added = count_prefixes(model.shapes, saved)
    renames = {f"{prefix}*=*": count for prefix, count in removed.items()}
    renames |= {f"*={prefix}*": count for prefix, count in added.items()}
    if not renames:
        return None
    return (
        f"rename them first: ckpt optim remap PATH -o OUT --rename {shell_word(max(renames, key=renames.__getitem__))}"
    )


def _untrained_remarks(model: Parameters, kept: Iterable[str]) -> list[str]:
    known = {model.aliases.get(name, name) for name in kept}
    new = [name for name in model.shapes if name not in known and name not in model.frozen]
    if not new:
        return []
    more = f" and {len(new) - _MAX_SHOWN:,} more" if len(new) > _MAX_SHOWN else ""
    names = ", ".join(map(printable, new[:_MAX_SHOWN]))
    adding = "ckpt optim resplit PATH -o OUT --groups FILE --model MODEL"
    return [f"trainable in the model but in no group (added by {adding}): {names}{more}"]


def _parse_patterns(given: object, option: str) -> tuple[Pattern, ...]:
    texts = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise RuleError(
            f"{option} must be a pattern or a list of patterns, not {kind_of(wrong[0])}", hint='such as "head.*"'
        )
    return tuple(map(parse_pattern, texts))


def _operation(name: str, state: OptimizerState, model: Parameters | None) -> tuple[str, str]:
    """Return the operation that fits the parameter to the model, and its reason."""
    if model is None:
        return "copy", ""
    first = model.aliases.get(name, name)
    if first not in model.shapes:
        return "dropped", f"{model.source} has no such parameter"
    if name in model.frozen:
        return "dropped", "it is frozen"
    shape, expected = parameter_shape(state.state.get(name, {})), model.shapes[first]
    if shape is not None and shape != expected:
        return "reset", f"its state has shape {list(shape)}, but the parameter has shape {list(expected)}"
    return "copy", ""


def _refuse_unmatched(patterns: Sequence[Pattern], names: Sequence[str], option: str) -> None:
    for pattern in patterns:
        if not any(map(pattern.match, names)):
            raise RuleError(
                f"{option} {shell_word(pattern.text)} matches none of {plural(len(names), 'parameter')}",
                hint=suggest_pattern(pattern, names, "the state"),
            )
