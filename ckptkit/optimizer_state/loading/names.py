"""The state and the groups of an optimizer, by the names of its parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.result.summary import NO_CHECKPOINT
from ckptkit.core.text import quoted
from ckptkit.core.torch_optim import options_of_kind
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.errors import GroupsError, PlanError
from ckptkit.optimizer_state.forms import FoundState, read_state
from ckptkit.optimizer_state.given_names import read_names_file
from ckptkit.optimizer_state.model import NamedGroup, OptimizerState
from ckptkit.optimizer_state.naming import NamesLike, to_named, to_named_for
from ckptkit.param_groups.live import read_groups
from ckptkit.param_groups.parameters import LiveModel

__all__ = ["StateLike", "named_state", "read_live_groups", "with_live_names"]

StateLike = OptimizerState | FoundState | Checkpoint | Mapping[str, object]
_MEMBER_OPTIONS = options_of_kind("members")


def read_live_groups(optimizer: Optimizer, live_model: LiveModel) -> tuple[NamedGroup, ...]:
    """Return the groups of a live optimizer, with the names of their parameters in the model."""
    groups = []
    pairs = [(live, group) for live in read_groups(optimizer).optimizers for group in live.groups]
    for live, group in pairs:
        names = []
        for member in live.members_of(group):
            parameter = live_model.parameters.get(id(member.tensor))
            if parameter is None:
                raise GroupsError(
                    f"{member.where} {member.shape} is not a parameter of the model",
                    hint="validate_param_groups(model, optimizer) tells what it was; build the optimizer again",
                )
            names.append(parameter.name)
        options = {key: value for key, value in group.options.items() if key not in _MEMBER_OPTIONS}
        groups.append(NamedGroup(tuple(names), options))
    return tuple(groups)


def named_state(
    state: StateLike,
    names: NamesLike | str | os.PathLike[str] | None,
    model: Module,
    live_groups: Sequence[NamedGroup],
    *,
    drop_strays: bool,
    has_rules: bool,
) -> tuple[OptimizerState, list[str]]:
    """Return the state by name, and the keys of its parameters that are in no group."""
    if isinstance(state, OptimizerState):
        return state, []
    found = state if isinstance(state, FoundState) else read_state(state)
    params = {param for group in found.groups for param in group.params}
    strays = [str(key) for key in found.state if key not in params]
    if isinstance(names, str | os.PathLike):
        names = model if names == "model" else read_names_file(os.fspath(names))
    if isinstance(names, Sequence) and not has_rules:
        # The names are those of the live model, whose shapes decide later: the weights in the file can be older.
        found = replace(found, checkpoint=NO_CHECKPOINT)
    if names is not None:
        return to_named(found, names, drop_strays=drop_strays), strays
    # The rules rename names that the live model does not have, so the model cannot name the state.
    if found.form != "indexed" or has_rules:
        return to_named(found, drop_strays=drop_strays), strays
    return to_named_for(found, model, [group.names for group in live_groups], drop_strays=drop_strays), strays


def with_live_names(
    saved: OptimizerState, live_model: LiveModel, live_groups: Sequence[NamedGroup]
) -> tuple[OptimizerState, list[str]]:
    """Return the state by the names of the live model, and the saved names that the optimizer does not have."""
    in_optimizer = {name for group in live_groups for name in group.names}
    live_names: dict[str, str] = {}
    used: set[str] = set()
    unused: list[str] = []
    for name in saved.names:
        parameter = live_model.named(name)
        if parameter is None or parameter.name not in in_optimizer:
            unused.append(name)
        elif parameter.name in used:
            raise PlanError(
                f"the state has {quoted(parameter.name)} twice, once as {quoted(name)}",
                hint='drop one of them with a rule: {"from": NAME, "drop": true}',
            )
        else:
            live_names[name] = parameter.name
            used.add(parameter.name)
    groups = tuple(
        replace(group, names=tuple(live_names[name] for name in group.names if name in live_names))
        for group in saved.groups
    )
    state = {live_names[name]: slots for name, slots in saved.state.items() if name in live_names}
    changes = tuple(replace(change, name=live_names.get(change.name, change.name)) for change in saved.changes)
    return replace(saved, state=state, groups=groups, changes=changes), unused
