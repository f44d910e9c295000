"""A state by name, in each of the forms that torch loads: by position, by name, or flattened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptkit.core.checkpoint import Checkpoint, Nested
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import describe_state_dict
from ckptkit.errors import FormatError, ModelError, PlanError
from ckptkit.formats.pickle.values import Placeholder
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.tree import type_name
from ckptkit.optimizer_state.model import (
    FORMS,
    LazyTensor,
    NamedGroup,
    OpaqueValue,
    OptimizerState,
    SlotValue,
    map_tensors,
    require_named,
)
from ckptkit.wrappers.envelopes import FLAT_GROUPS, FLAT_STATE, is_optimizer_state

__all__ = ["FoundGroup", "FoundState", "as_named", "read_form", "read_state", "to_dict", "to_form"]


def to_dict(state: OptimizerState, form: str = "indexed") -> dict[str, Any]:
    """Return the state as torch loads it, every tensor read into memory of its own.

    ``form`` is ``indexed`` for ``optimizer.load_state_dict``, whose positions are those of ``state.names``;
    ``param-names`` the same with torch's ``param_names``; ``named`` and ``flattened`` for
    ``torch.distributed.checkpoint.state_dict.set_optimizer_state_dict``. Raises ``PlanError`` for a name that is in two
    groups, and for a value that only code could make.
    """
    made: dict[str, Any] = _read(to_form(state, form))
    return made


def to_form(state: OptimizerState, form: str) -> dict[str, SlotValue]:
    """Return the state in one of ``FORMS``, its tensors still unread; raises ``PlanError`` for a name in two groups."""
    if form not in FORMS:
        raise PlanError(f"{quoted(str(form))} is no form of an optimizer state", hint=f"one of {', '.join(FORMS)}")
    twice = [name for name, count in Counter(require_named(state).names).items() if count > 1]
    if twice:
        raise PlanError(f"{quoted(twice[0])} is in the groups more than once")
    known = set(state.names)
    strays = [name for name in state.state if name not in known]
    if strays:
        raise PlanError(f"there is state of {quoted(strays[0])}, which is in no group")
    if form == "flattened":
        return _flattened(state)
    number: dict[str, Any] = {name: name if form == "named" else place for place, name in enumerate(state.names)}
    groups = []
    for group in state.groups:
        names = {"param_names": list(group.names)} if form == "param-names" else {}
        groups.append({**group.options, **names, "params": [number[name] for name in group.names]})
    slots = {number[name]: dict(state.state[name]) for name in state.names if name in state.state}
    return {"state": slots, "param_groups": groups}


def _flattened(state: OptimizerState) -> dict[str, SlotValue]:
    slots = {
        f"{FLAT_STATE}{name}.{slot}": value for name in state.names for slot, value in state.state.get(name, {}).items()
    }
    options = {
        f"{FLAT_GROUPS}{name}.{key}": value
        for group in state.groups
        for name in group.names
        for key, value in group.options.items()
    }
    return slots | options


def _read(value: SlotValue) -> Any:
    def live(tensor: LazyTensor) -> Any:
        return tensor.read()

    unknown = next(_unknown(value), None)
    if unknown is not None:
        raise PlanError(
            f"it holds a value of {quoted(unknown.type)}, which only code could make",
            hint="torch.load makes it: give what that returns",
        )
    return map_tensors(value, live)


def _unknown(value: SlotValue) -> Any:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, OpaqueValue):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)


_DEEPEST = 100
_FORMS = "it is what optimizer.state_dict() gives, or what torch.distributed.checkpoint.state_dict makes of it"
Path = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class FoundGroup:
    """A group as it lies there: what stands under ``params`` (positions, or names), and ``param_names`` if any."""

    params: tuple[object, ...]
    options: Mapping[str, SlotValue]
    param_names: tuple[object, ...] | None = None


@dataclass(frozen=True, slots=True)
class FoundState:
    """The state of an optimizer as it lies there, by whatever keys it has, right or wrong."""

    form: str
    state: Mapping[object, Mapping[str, SlotValue]]
    groups: tuple[FoundGroup, ...]
    path: str = ""
    remarks: tuple[str, ...] = ()


def read_state(thing: Checkpoint | Mapping[Any, Any]) -> FoundState:
    """Return what the state of an optimizer holds; ``thing`` is a Checkpoint of one, or a live ``state_dict()``.

    Raises ``FormatError`` where it is none, or its parts are not of the kinds that torch writes.
    """
    if isinstance(thing, Checkpoint):
        return _read_reading(*_of_checkpoint(thing), thing.path)
    if not isinstance(thing, Mapping):
        raise ModelError(
            f"the optimizer state is a {type(thing).__name__}",
            hint="give optimizer.state_dict(), or an open checkpoint of one",
        )
    return _read_reading(*_of_live(thing), "")


def read_form(value: Mapping[str, SlotValue]) -> FoundState:
    """Return what a state holds that is laid out in one of its forms, its tensors still unread."""
    return _read_reading(value, lambda item, _: item, "")


def _of_checkpoint(checkpoint: Checkpoint) -> tuple[object, Callable[[object, Path], SlotValue]]:
    nested = checkpoint.nested or Nested(None, {})
    keys = {place: key for key, place in nested.paths.items()}

    def leaf(value: object, path: Path) -> SlotValue:
        if isinstance(value, TensorRef):
            return LazyTensor(checkpoint[keys[path]], checkpoint)
        if isinstance(value, Placeholder) or not isinstance(value, _PLAIN):
            return OpaqueValue(type_name(value), path, checkpoint)
        return value

    return nested.value, leaf


def _of_live(state: Mapping[Any, Any]) -> tuple[object, Callable[[object, Path], SlotValue]]:
    import torch

    tensors: dict[Path, torch.Tensor] = {}
    stack: list[tuple[Path, object]] = [((), state)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, torch.Tensor):
            tensors[path] = value
        elif isinstance(value, Mapping | list | tuple) and len(path) < _DEEPEST:
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            stack += [((*path, key), inner) for key, inner in pairs]
    names = {path: ".".join(map(str, path)) for path in tensors}
    if len(set(names.values())) < len(names):
        names = {path: "".join(f"[{key!r}]" for key in path) for path in tensors}
    live = describe_state_dict({names[path]: tensor for path, tensor in tensors.items()}, "optimizer state")

    def leaf(value: object, path: Path) -> SlotValue:
        if path in names:
            return LazyTensor(live[names[path]], live)
        return value

    return state, leaf


_PLAIN = (int, float, complex, bool, str, bytes, type(None))


def _read_reading(value: object, leaf: Callable[[object, Path], SlotValue], path: str) -> FoundState:
    if not is_optimizer_state(value):
        raise FormatError("is no optimizer state", hint=_FORMS, path=path or None)
    assert isinstance(value, Mapping)  # noqa: S101 - it is a state

    def plain(item: object, at: Path) -> SlotValue:
        if len(at) > _DEEPEST:
            raise FormatError(f"nested too deeply: more than {_DEEPEST} levels", path=path or None)
        if isinstance(item, Mapping):
            return {key: plain(inner, (*at, key)) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            items = [plain(inner, (*at, number)) for number, inner in enumerate(item)]
            return tuple(items) if isinstance(item, tuple) else items
        return leaf(item, at)

    try:
        return _flattened_reading(value, plain, path) if "param_groups" not in value else _nested(value, plain, path)
    except FormatError as error:
        error.path = error.path or path or None
        raise


def _nested(value: Mapping[Any, Any], plain: Callable[[object, Path], SlotValue], path: str) -> FoundState:
    groups = []
    for number, table in enumerate(value["param_groups"]):
        where = f"param_groups[{number}]"
        if not isinstance(table, Mapping) or not isinstance(table.get("params"), list | tuple):
            raise FormatError(f"{where} is no group with a list of params", hint=_FORMS)
        if unnamed := [key for key in table if not isinstance(key, str)]:
            raise FormatError(f"{where} has an option {quoted(str(unnamed[0]))} whose name is no string")
        names = table.get("param_names")
        options = {
            key: plain(inner, ("param_groups", number, key))
            for key, inner in table.items()
            if key not in ("params", "param_names")
        }
        given = tuple(names) if isinstance(names, list | tuple) else None
        groups.append(FoundGroup(tuple(table["params"]), options, given))
    state: dict[object, Mapping[str, SlotValue]] = {}
    for key, slots in value["state"].items():
        if not isinstance(slots, Mapping):
            raise FormatError(f"the state of {quoted(str(key))} is a {quoted(type_name(slots))}, not a mapping")
        if unnamed := [slot for slot in slots if not isinstance(slot, str)]:
            called = quoted(str(unnamed[0]))
            raise FormatError(f"the state of {quoted(str(key))} has a slot {called} whose name is no string")
        state[key] = {slot: plain(inner, ("state", key, slot)) for slot, inner in slots.items()}
    params = [param for group in groups for param in group.params]
    for param in (*params, *state):
        if type(param) not in (int, str):
            raise FormatError(f"a parameter is called by a {quoted(type_name(param))}, not a position or a name")
    if any(isinstance(param, str) for param in params or state):
        return FoundState("named", state, tuple(groups), path)
    form = "param-names" if any(group.param_names is not None for group in groups) else "indexed"
    return FoundState(form, state, tuple(groups), path)


def _flattened_reading(value: Mapping[Any, Any], plain: Callable[[object, Path], SlotValue], path: str) -> FoundState:
    state: dict[object, dict[str, SlotValue]] = {}
    options: dict[str, dict[str, SlotValue]] = {}
    for key, inner in value.items():
        kept, prefix = (state, FLAT_STATE) if key.startswith(FLAT_STATE) else (options, FLAT_GROUPS)
        name, _, slot = key.removeprefix(prefix).rpartition(".")
        if not name or not slot:
            raise FormatError(f"{quoted(key)} names no parameter and slot")
        if prefix == FLAT_STATE or slot not in ("params", "param_names"):  # every parameter has the names of all there
            kept.setdefault(name, {})[slot] = plain(inner, (key,))
        else:
            options.setdefault(name, {})
    groups: list[tuple[list[str], dict[str, SlotValue]]] = []
    known: dict[object, int] = {}
    for name, own in options.items():
        same = known.setdefault(_identity(own), len(groups))
        if same == len(groups):
            groups.append(([], own))
        groups[same][0].append(name)
    found = tuple(FoundGroup(tuple(names), own) for names, own in groups)
    said = "this form has no groups: parameters with equal options are taken to be in one"
    return FoundState("flattened", state, found, path, (said,) if found else ())


def _identity(value: SlotValue) -> object:
    """Return something that is equal for equal values; tensors are, where they are one number with equal bytes."""
    if isinstance(value, LazyTensor):
        one = value.info.elements == 1 and value.info.kind == "dense"
        return value.dtype, value.shape, value.source.read_bytes(value.info.key) if one else value.info.key
    if isinstance(value, Mapping):
        return tuple((key, _identity(inner)) for key, inner in sorted(value.items(), key=str))
    if isinstance(value, list | tuple):
        return tuple(map(_identity, value))
    return type(value).__name__, repr(value)


def named_groups(found: FoundState, names: Mapping[object, str]) -> tuple[NamedGroup, ...]:
    """Return the groups with each parameter called by its name."""
    return tuple(NamedGroup(tuple(names[param] for param in group.params), group.options) for group in found.groups)


def as_named(found: FoundState, names: Mapping[object, str], evidence: str = "") -> OptimizerState:
    """Return the state with each parameter called by its name, in the order of the groups."""
    groups = named_groups(found, names)
    known = {names[key]: slots for key, slots in found.state.items()}
    ordered = {name: known[name] for group in groups for name in group.names if name in known}
    return OptimizerState(ordered, groups, found.form, evidence, found.remarks)
