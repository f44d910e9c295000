"""A lock of param groups: each parameter with its group, position, shape and ties, and the options of each group."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from ckptkit.core.arguments import require_type
from ckptkit.core.config_files import default_error_path, read_table_file
from ckptkit.core.files.places import clean_path
from ckptkit.core.result import Result
from ckptkit.core.text import kind_of, plural, quoted
from ckptkit.core.torch_optim import initial_lr, options_of_kind
from ckptkit.core.torch_types import Module
from ckptkit.errors import GroupsError
from ckptkit.inputs import CheckpointLike
from ckptkit.param_groups.live import LiveGroups, read_groups
from ckptkit.param_groups.parameters import LiveModel, bare_name, read_live_model
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.plan import ParamGroupsPlan, PlannedParameter, assign
from ckptkit.param_groups.properties import ParameterInfo, ParameterTable, live_parameter_table, parameter_table

__all__ = [
    "LockLike",
    "LockedGroup",
    "LockedParameter",
    "ParamGroupsLock",
    "as_lock",
    "is_lock",
    "lock_document",
    "lock_live",
    "lock_model",
    "lock_optimizer",
    "lock_param_groups",
    "lock_plan",
    "parse_lock",
    "plain_option",
]

SCHEMA = "ckptkit.groups-lock/1"
# The lock has separate fields for names, and stores initial_lr as lr.
_NOT_LOCKED = options_of_kind("members", "name") | {"initial_lr"}
_WRITE_AGAIN = "write it again: ckpt groups lock --model MODEL SPEC -o LOCK"


def plain_option(value: Any) -> Any:
    """Return an option as JSON can hold it: NaN and Inf as strings, a tensor as numbers, any other object as text."""
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


@dataclass(frozen=True, slots=True)
class LockedParameter:
    """One parameter; ``index`` is its position in the state_dict of its optimizer, None where no group has it."""

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
    """One group: its options as JSON values, its parameters in order, and the class of its optimizer or None."""

    name: str
    options: Mapping[str, object]
    parameters: tuple[LockedParameter, ...]
    optimizer: str | None = None


@dataclass(frozen=True, repr=False)
class ParamGroupsLock(Result):
    """The groups in the order of the optimizer; ``outside`` are the parameters in no group, such as frozen ones.

    Example:
        >>> lock = ckptkit.lock_param_groups("fixtures/lenet_10class.pth", "fixtures/groups.toml")
        >>> [(group.name, group.options["lr"]) for group in lock.groups]
        [('head', 0.01), ('base', 0.001)]
    """

    groups: tuple[LockedGroup, ...]
    outside: tuple[LockedParameter, ...] = ()

    @cached_property
    def parameters(self) -> Mapping[str, LockedParameter]:
        """Every parameter by its first name, also those outside the groups."""
        grouped = (parameter for group in self.groups for parameter in group.parameters)
        return {parameter.name: parameter for parameter in (*grouped, *self.outside)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over name, dtype, shape and ties of every parameter, sorted by name."""
        lines = sorted(
            json.dumps([parameter.name, parameter.dtype, list(parameter.shape), sorted(parameter.aliases)])
            for parameter in self.parameters.values()
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        count = sum(len(group.parameters) for group in self.groups)
        return f"{plural(count, 'parameter')} in {plural(len(self.groups), 'group')}, {len(self.outside):,} in none"


LockLike: TypeAlias = ParamGroupsLock | str | os.PathLike[str]


def lock_param_groups(model: CheckpointLike, spec: SpecLike) -> ParamGroupsLock:
    """Return the lock of the groups that ``build_param_groups`` makes from ``spec`` for ``model``.

    ``model`` and ``spec`` are what ``plan_param_groups`` accepts, paths included. Raises the errors of
    ``plan_param_groups``.

    Example:
        >>> len(lock_param_groups("fixtures/lenet_10class.pth", "fixtures/groups.toml").parameters)
        10
    """
    assignment = assign(parameter_table(model), spec)
    assignment.report.raise_for_errors()
    return lock_plan(assignment.plan)


def lock_plan(plan: ParamGroupsPlan) -> ParamGroupsLock:
    """Return the lock of the groups that a plan without errors makes."""
    counts: dict[str | None, int] = {}
    groups = []
    for group in plan.groups:
        start = counts.get(group.optimizer, 0)
        counts[group.optimizer] = start + len(group.parameters)
        parameters = tuple(
            _locked_planned(parameter, start + index) for index, parameter in enumerate(group.parameters)
        )
        groups.append(LockedGroup(group.name, _plain_options(group.options), parameters, group.optimizer))
    outside = tuple(_locked_planned(parameter, None) for parameter in (*plan.frozen, *plan.freeze))
    return ParamGroupsLock(tuple(groups), outside)


def lock_optimizer(model: Module, groups: Any) -> ParamGroupsLock:
    """Return the lock of the groups that an optimizer, a list of optimizers, or a list of group dicts has now.

    Parameters are identified by ``id()`` and named as in ``model``. Tensors that are not in ``model`` are left out;
    ``validate_param_groups`` reports them. The learning rate is the rate before schedulers changed it. Raises
    ``GroupsError`` as ``validate_param_groups`` does.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> lock = ckptkit.lock_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> lock.groups[0].options["lr"], [parameter.name for parameter in lock.groups[0].parameters]
        (0.1, ['weight', 'bias'])
    """
    return lock_live(read_live_model(model), read_groups(groups))


def lock_live(live_model: LiveModel, live: LiveGroups) -> ParamGroupsLock:
    """Return the lock of ``live``, with the parameters named as in ``live_model``."""
    infos = live_parameter_table(live_model).by_name
    counts: dict[int, int] = {}
    members: dict[int, list[LockedParameter]] = {id(group): [] for group in live.groups}
    grouped: set[str] = set()
    for member in live.members:
        index = counts.get(id(member.group.optimizer), 0)
        counts[id(member.group.optimizer)] = index + 1
        parameter = live_model.parameters.get(id(member.tensor))
        if parameter is not None and parameter.name not in grouped:  # the validator reports a parameter in two groups
            grouped.add(parameter.name)
            members[id(member.group)].append(_locked(infos[parameter.name], index))
    return ParamGroupsLock(
        tuple(
            LockedGroup(
                f"group {number}" if group.name is None else group.name,
                _plain_options(group.options),
                tuple(members[id(group)]),
                None if group.optimizer is None else type(group.optimizer).__name__,
            )
            for number, group in enumerate(live.groups)
        ),
        tuple(
            _locked(infos[parameter.name], None)
            for parameter in live_model.parameters.values()
            if parameter.name not in grouped
        ),
    )


def lock_model(table: ParameterTable) -> ParamGroupsLock:
    """Return a lock that has the parameters of a model, and no groups."""
    return ParamGroupsLock((), tuple(_locked(info, None) for info in table.parameters))


# Wrapping a model changes names and nothing else, so a lock has the names without wrappers.
def _locked(info: ParameterInfo, index: int | None) -> LockedParameter:
    aliases = tuple(bare_name(alias.name) for alias in info.aliases)
    return LockedParameter(bare_name(info.name), index, info.shape or (), info.dtype, aliases)


def _locked_planned(parameter: PlannedParameter, index: int | None) -> LockedParameter:
    return LockedParameter(
        bare_name(parameter.name),
        index,
        parameter.shape,
        parameter.dtype,
        tuple(map(bare_name, parameter.aliases)),
        parameter.rule,
        parameter.modifiers,
        parameter.layer,
    )


def _plain_options(options: Mapping[str, Any]) -> dict[str, object]:
    plain = {str(key): plain_option(value) for key, value in options.items() if key not in _NOT_LOCKED}
    if "initial_lr" in options:
        plain["lr"] = plain_option(initial_lr(options))
    return plain


def lock_document(lock: ParamGroupsLock) -> dict[str, Any]:
    """Return the lock as the JSON document that ``parse_lock`` reads.

    Example:
        >>> lock = ckptkit.lock_param_groups("fixtures/lenet_10class.pth", "fixtures/groups.toml")
        >>> [group["name"] for group in ckptkit.lock_document(lock)["groups"]]
        ['head', 'base']
    """
    require_type(lock, ParamGroupsLock, "lock", "a ParamGroupsLock")
    return {
        "schema": SCHEMA,
        "fingerprint": f"sha256:{lock.fingerprint}",
        "groups": [
            {
                "name": group.name,
                "optimizer": group.optimizer,
                "options": dict(group.options),
                "parameters": [_parameter_document(parameter) for parameter in group.parameters],
            }
            for group in lock.groups
        ],
        "outside": [_parameter_document(parameter) for parameter in lock.outside],
    }


def _parameter_document(parameter: LockedParameter) -> dict[str, object]:
    return {
        "name": parameter.name,
        "index": parameter.index,
        "shape": list(parameter.shape),
        "dtype": parameter.dtype,
        "aliases": list(parameter.aliases),
        "rule": parameter.rule,
        "modifiers": list(parameter.modifiers),
        "layer": parameter.layer,
    }


def is_lock(document: object) -> bool:
    """Return whether a parsed JSON document has the schema of a lock."""
    return isinstance(document, Mapping) and document.get("schema") == SCHEMA


def as_lock(lock: LockLike) -> ParamGroupsLock:
    """Return the lock that an argument of the Python API describes: a lock, or the path of its file.

    Raises ``GroupsError`` for any other value, and what ``parse_lock`` raises.
    """
    if isinstance(lock, ParamGroupsLock):
        return lock
    if isinstance(lock, str | os.PathLike):
        return parse_lock(lock)
    raise GroupsError(f"a lock cannot be {kind_of(lock)}", hint="give its path, or what parse_lock returns")


def parse_lock(document: object) -> ParamGroupsLock:
    """Return the lock in a JSON file, given by its path, or in the parsed content of one.

    Raises ``GroupsError`` where the document is not a lock, has one name twice, or does not match its fingerprint.
    Raises ``PathError`` where the file cannot be read, and ``RuleError`` where it is not valid JSON.

    Example:
        >>> lock = lock_param_groups("fixtures/lenet_10class.pth", "fixtures/groups.toml")
        >>> parse_lock(lock_document(lock)) == lock
        True
    """
    if isinstance(document, str | os.PathLike):
        path = clean_path(os.fsdecode(document))
        with default_error_path(path):
            return parse_lock(read_table_file(path, as_json=True))
    if not isinstance(document, Mapping) or not is_lock(document):
        raise GroupsError(
            "not a valid lock of param groups", hint="ckpt groups lock --model MODEL SPEC -o LOCK writes one"
        )
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
    grouped = [parameter for group in lock.groups for parameter in group.parameters]
    names = [parameter.name for parameter in (*grouped, *lock.outside)]
    if len(set(names)) < len(names):
        repeated = next(name for index, name in enumerate(names) if name in names[:index])
        raise GroupsError(f"the lock lists parameter {quoted(repeated)} twice", hint=_WRITE_AGAIN)
    if document.get("fingerprint") != f"sha256:{lock.fingerprint}":
        raise GroupsError(
            "the lock was changed after it was written: its fingerprint does not match its names and shapes",
            hint=_WRITE_AGAIN,
        )
    return lock


def _parameters(table: Mapping[str, object], key: str) -> tuple[LockedParameter, ...]:
    return tuple(
        LockedParameter(
            _field(parameter, "name", str),
            _field(parameter, "index", int | None),
            tuple(_list(parameter, "shape", int)),
            _field(parameter, "dtype", str),
            tuple(_list(parameter, "aliases", str)),
            _field(parameter, "rule", str),
            tuple(_list(parameter, "modifiers", str)),
            _field(parameter, "layer", int | None),
        )
        for parameter in _list(table, key)
    )


def _list(table: object, key: str, kind: Any = Mapping) -> Sequence[Any]:
    values: list[Any] = _field(table, key, list)
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise GroupsError(f"the lock has an entry of a wrong type in {quoted(key)}", hint=_WRITE_AGAIN)
    return values


def _field(table: object, key: str, kind: Any) -> Any:
    value = table.get(key) if isinstance(table, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise GroupsError(f"the lock has {kind_of(value)} as {quoted(key)}", hint=_WRITE_AGAIN)
    return value
