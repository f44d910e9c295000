"""What was trained with what, as a value to keep beside a run: every name, its place, shape, ties and options."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckptkit.core.text import kind_of, quoted
from ckptkit.core.torch_optim import initial_lr, options_of_kind
from ckptkit.core.torch_types import Module
from ckptkit.errors import GroupsError
from ckptkit.param_groups.live import read_groups
from ckptkit.param_groups.parameters import bare_name, take_inventory
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.plan import ParamGroupsPlan, PlannedParameter, assign
from ckptkit.param_groups.properties import ParameterInfo, ParameterTable, live_parameter_table, parameter_table

__all__ = [
    "LockedGroup",
    "LockedParameter",
    "ParamGroupsLock",
    "is_lock",
    "lock_document",
    "lock_model",
    "lock_optimizer",
    "lock_param_groups",
    "lock_plan",
    "parse_lock",
    "plain_option",
]


def plain_option(value: Any) -> Any:
    """Return what JSON can hold of an option: NaN and Inf as strings, a tensor as its number, else its ``str``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_option(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_option(inner) for inner in value]
    if hasattr(value, "tolist") and not getattr(value, "is_meta", False):
        return plain_option(value.tolist())
    return str(value)


SCHEMA = "ckptkit.groups-lock/1"
# The lock has the learning rate before schedulers changed it as ``lr``, and the names of groups and members elsewhere.
_NOT_LOCKED = options_of_kind("members", "name") | {"initial_lr"}


@dataclass(frozen=True, slots=True)
class LockedParameter:
    """One parameter: ``index`` is its place in the state_dict of its optimizer, None where it is in no group."""

    name: str
    index: int | None
    shape: tuple[int, ...]
    dtype: str = ""
    aliases: tuple[str, ...] = ()
    rule: str = ""
    modifiers: tuple[str, ...] = ()
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class LockedGroup:
    """One group with its options as numbers and text, and the optimizer class where it is known."""

    name: str
    options: Mapping[str, Any]
    parameters: tuple[LockedParameter, ...]
    optimizer: str | None = None


@dataclass(frozen=True)
class ParamGroupsLock:
    """The groups in the order of the optimizer, and ``outside`` the parameters that are in none, as frozen ones are."""

    groups: tuple[LockedGroup, ...]
    outside: tuple[LockedParameter, ...] = ()

    @cached_property
    def parameters(self) -> Mapping[str, LockedParameter]:
        """Every parameter by its first name, those outside too."""
        grouped = (parameter for group in self.groups for parameter in group.parameters)
        return {parameter.name: parameter for parameter in (*grouped, *self.outside)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over name, dtype, shape and ties of every parameter, sorted by name."""
        lines = sorted(
            json.dumps([one.name, one.dtype, list(one.shape), sorted(one.aliases)]) for one in self.parameters.values()
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def lock_param_groups(model: Any, spec: SpecLike) -> ParamGroupsLock:
    """Return what ``build_param_groups`` makes of ``spec`` over ``model``, with the place of each parameter.

    ``model`` is what ``plan_param_groups`` takes, and what it raises is raised here.
    """
    assignment = assign(parameter_table(model), spec)
    assignment.report.raise_for_errors()
    return lock_plan(assignment.plan)


def lock_plan(plan: ParamGroupsPlan) -> ParamGroupsLock:
    """Return what ``build_param_groups`` makes of a plan without errors, with the place of each parameter."""
    indices: dict[str | None, int] = {}
    groups = []
    for group in plan.groups:
        start = indices.get(group.optimizer, 0)
        indices[group.optimizer] = start + len(group.parameters)
        groups.append(
            LockedGroup(
                group.name,
                _plain_options(group.options),
                tuple(_planned(one, start + place) for place, one in enumerate(group.parameters)),
                group.optimizer,
            )
        )
    return ParamGroupsLock(
        tuple(groups),
        tuple(_planned(one, None) for one in (*plan.frozen, *plan.freeze)),
    )


def lock_optimizer(model: Module, groups: Any) -> ParamGroupsLock:
    """Return what an optimizer, a list of optimizers, or a list of group dicts really holds of ``model``.

    Parameters are told by identity and go by the model's names; those that are not in the model are left out, as
    ``validate_param_groups`` names them. The learning rate is the one before schedulers moved it. Raises
    ``GroupsError`` as ``validate_param_groups`` does.
    """
    inventory = take_inventory(model)
    infos = live_parameter_table(inventory).by_name
    read, members, _ = read_groups(groups)
    indices: dict[int, int] = {}
    places: dict[int, list[LockedParameter]] = {id(group): [] for group in read}
    held: set[str] = set()
    for member in members:
        index = indices.get(id(member.group.optimizer), 0)
        indices[id(member.group.optimizer)] = index + 1
        live = inventory.parameters.get(id(member.tensor))
        if live is not None and live.name not in held:  # what stands there twice is the validator's to tell
            held.add(live.name)
            places[id(member.group)].append(_locked(infos[live.name], index))
    return ParamGroupsLock(
        tuple(
            LockedGroup(
                str(group.options.get("name", group.options.get("group_name", f"group {number}"))),
                _plain_options(group.options),
                tuple(places[id(group)]),
                None if group.optimizer is None else type(group.optimizer).__name__,
            )
            for number, group in enumerate(read)
        ),
        tuple(_locked(infos[live.name], None) for live in inventory.parameters.values() if live.name not in held),
    )


def lock_model(table: ParameterTable) -> ParamGroupsLock:
    """Return the parameters of a model alone, in no group."""
    return ParamGroupsLock((), tuple(_locked(info, None) for info in table.parameters))


# Wrapping a model changes names and nothing else, so a lock knows the bare ones.
def _locked(info: ParameterInfo, index: int | None) -> LockedParameter:
    aliases = tuple(bare_name(alias.name) for alias in info.aliases)
    return LockedParameter(bare_name(info.name), index, info.shape or (), info.dtype, aliases)


def _planned(one: PlannedParameter, index: int | None) -> LockedParameter:
    name, aliases = bare_name(one.name), tuple(map(bare_name, one.aliases))
    return LockedParameter(name, index, one.shape, one.dtype, aliases, one.rule, one.modifiers, one.layer)


def _plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: plain_option(value) for key, value in options.items() if key not in _NOT_LOCKED}
    if "initial_lr" in options:
        plain["lr"] = plain_option(initial_lr(options))
    return plain


def lock_document(lock: ParamGroupsLock) -> dict[str, Any]:
    """Return the lock as the JSON document that ``parse_lock`` reads."""
    return {
        "schema": SCHEMA,
        "fingerprint": f"sha256:{lock.fingerprint}",
        "groups": [
            {
                "name": group.name,
                "optimizer": group.optimizer,
                "options": dict(group.options),
                "parameters": [_parameter_document(one) for one in group.parameters],
            }
            for group in lock.groups
        ],
        "outside": [_parameter_document(one) for one in lock.outside],
    }


def _parameter_document(one: LockedParameter) -> dict[str, Any]:
    return {
        "name": one.name,
        "index": one.index,
        "shape": list(one.shape),
        "dtype": one.dtype,
        "aliases": list(one.aliases),
        "rule": one.rule,
        "modifiers": list(one.modifiers),
        "layer": one.layer,
    }


def is_lock(document: Any) -> bool:
    """Return whether a parsed JSON document says that it is a lock."""
    return isinstance(document, Mapping) and document.get("schema") == SCHEMA


def parse_lock(document: Any) -> ParamGroupsLock:
    """Return the lock that a parsed JSON document holds.

    Raises ``GroupsError`` where it is none, holds a name twice, or does not have the fingerprint that it gives.
    """
    if not is_lock(document):
        raise GroupsError("is no lock of param groups", hint="ckpt groups lock writes one")
    lock = ParamGroupsLock(
        tuple(
            LockedGroup(
                _field(table, "name", str),
                dict(_field(table, "options", Mapping)),
                _parameters(table, "parameters"),
                _field(table, "optimizer", str | None),
            )
            for table in _list(document, "groups")
        ),
        _parameters(document, "outside"),
    )
    names = [one.name for group in lock.groups for one in group.parameters] + [one.name for one in lock.outside]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise GroupsError(f"the lock holds {quoted(twice)} twice", hint="write it again with ckpt groups lock")
    if document.get("fingerprint") != f"sha256:{lock.fingerprint}":
        raise GroupsError(
            "the lock was changed after it was written: its names and shapes do not have its fingerprint",
            hint="write it again with ckpt groups lock",
        )
    return lock


def _parameters(table: Mapping[str, Any], key: str) -> tuple[LockedParameter, ...]:
    return tuple(
        LockedParameter(
            _field(one, "name", str),
            _field(one, "index", int | None),
            tuple(_list(one, "shape", int)),
            _field(one, "dtype", str),
            tuple(_list(one, "aliases", str)),
            _field(one, "rule", str),
            tuple(_list(one, "modifiers", str)),
            _field(one, "layer", int | None),
        )
        for one in _list(table, key)
    )


def _list(table: Any, key: str, kind: Any = Mapping) -> Sequence[Any]:
    values = _field(table, key, list)
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise GroupsError(f"the lock has a list {quoted(key)} of other things than it should hold")
    return values  # type: ignore[no-any-return]


def _field(table: Any, key: str, kind: Any) -> Any:
    value = table.get(key) if isinstance(table, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise GroupsError(
            f"the lock has {kind_of(value)} where {quoted(key)} should stand",
            hint="write it again with ckpt groups lock",
        )
    return value
