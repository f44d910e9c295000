"""Read and build the forms of an optimizer state: keyed by position, by name, or by flattened keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from ckptkit.core.checkpoint import Checkpoint, KeyPath, Nested
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.text import listed, printable, quoted
from ckptkit.core.torch_bridge import copy_composite, describe_state_dict, is_composite, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import FormatError, ModelError, PlanError
from ckptkit.formats.pickle.values import Placeholder
from ckptkit.formats.torch.objects import DTypeRef
from ckptkit.formats.torch.tree import is_tensor, type_name
from ckptkit.optimizer_state.model import (
    FORMS,
    NO_MORE,
    DtypeValue,
    LazyTensor,
    MoreValues,
    NamedGroup,
    OpaqueValue,
    OptimizerState,
    SlotValue,
    map_tensors,
    require_named,
)
from ckptkit.wrappers.entries import FLAT_GROUPS, FLAT_STATE, is_optimizer_state

__all__ = ["FoundGroup", "FoundState", "as_named", "read_form", "read_state", "to_dict", "to_form"]

_MAX_DEPTH = 100
_MOST_BITS = 1023  # of an integer: no float can hold a larger one, and no optimizer makes one
_EXPECTED = "give what optimizer.state_dict() or torch.distributed.checkpoint.state_dict returned"
_OTHER_FORM = "write the form indexed, param-names or named"
_LOWEST_ADDRESS = 1 << 16  # no operating system gives lower ones
_KEYED_BY_ID = (
    "the state is keyed by id(parameter), as torch wrote it up to 1.4, so its parameters are numbered in the order of "
    "the groups, as torch reads them"
)
_PLAIN_TYPES = (int, float, complex, bool, str, bytes, type(None))
# Returns the slot value of a leaf, given the leaf and its path.
ReadLeaf = Callable[[object, KeyPath], SlotValue]


@dataclass(frozen=True, slots=True)
class FoundGroup:
    """A group as it was found: its ``params`` (positions or names), its options, and its ``param_names`` if any."""

    params: tuple[object, ...]
    options: Mapping[str, SlotValue]
    param_names: tuple[object, ...] | None = None


@dataclass(frozen=True, slots=True)
class FoundState:
    """The state of an optimizer as it was found, with the keys that it had; these can contradict each other.

    ``more`` has the values that are of no parameter.
    """

    form: str
    state: Mapping[object, Mapping[str, SlotValue]]
    groups: tuple[FoundGroup, ...]
    path: str = ""
    remarks: tuple[str, ...] = ()
    more: MoreValues = NO_MORE
    checkpoint: CheckpointSummary = NO_CHECKPOINT


def read_state(state: Checkpoint | Mapping[str, object]) -> FoundState:
    """Return the content of an optimizer state; ``state`` is a Checkpoint of one, or a live ``state_dict()``.

    Raises ``FormatError`` if it is not an optimizer state, or if a part of it has a type that torch never writes.
    Raises ``ModelError`` if ``state`` is neither a Checkpoint nor a mapping.
    """
    if isinstance(state, Checkpoint):
        nested = state.nested or Nested(None, {})
        found = _read(nested.value, _leaf_reader(state, nested), state.path)
        return replace(found, checkpoint=CheckpointSummary.of(state))
    if not isinstance(state, Mapping):
        raise ModelError(
            f"the optimizer state is a {type(state).__name__}",
            hint="give optimizer.state_dict(), or an open checkpoint of one",
        )
    return _read(state, _live_leaf_reader(state), "")


def read_form(value: Mapping[str, SlotValue]) -> FoundState:
    """Return the content of a state that ``to_form`` built; its tensors stay unread."""
    return _read(value, lambda item, _: item, "")


def _leaf_reader(checkpoint: Checkpoint, nested: Nested) -> ReadLeaf:
    keys = {path: key for key, path in nested.paths.items()}

    def read_leaf(value: object, path: KeyPath) -> SlotValue:
        if is_tensor(value):
            return LazyTensor(checkpoint[keys[path]], checkpoint)
        if isinstance(value, DTypeRef):
            return DtypeValue("torch.dtype", path, checkpoint, code=value.code)
        if isinstance(value, Placeholder) or not isinstance(value, _PLAIN_TYPES):
            return OpaqueValue(type_name(value), path, checkpoint)
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            return OpaqueValue(f"int of {value.bit_length():,} bits", path, checkpoint)
        return value

    return read_leaf


def _live_leaf_reader(state: Mapping[str, object]) -> ReadLeaf:
    import torch

    tensors: dict[KeyPath, Tensor] = {}
    stack: list[tuple[KeyPath, object]] = [((), state)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, torch.Tensor):
            tensors[path] = value
        elif isinstance(value, Mapping | list | tuple) and len(path) < _MAX_DEPTH:
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            stack += [((*path, key), inner) for key, inner in pairs]
    names = {path: ".".join(map(str, path)) for path in tensors}
    if len(set(names.values())) < len(names):
        names = {path: "".join(f"[{key!r}]" for key in path) for path in tensors}
    live = describe_state_dict({names[path]: tensor for path, tensor in tensors.items()}, "optimizer state")

    def read_leaf(value: object, path: KeyPath) -> SlotValue:
        if path not in names or is_composite(value):
            return value
        return LazyTensor(live[names[path]], live)

    return read_leaf


def _read(value: object, read_leaf: ReadLeaf, path: str) -> FoundState:
    if not is_optimizer_state(value):
        raise FormatError("not an optimizer state", hint=_EXPECTED, path=path or None)
    assert isinstance(value, Mapping)  # noqa: S101 - every optimizer state is a mapping

    def read(item: object, at: KeyPath) -> SlotValue:
        if len(at) > _MAX_DEPTH:
            raise FormatError(f"nested too deeply: more than {_MAX_DEPTH} levels", path=path or None)
        if isinstance(item, Mapping):
            return {key: read(inner, (*at, key)) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            items = [read(inner, (*at, number)) for number, inner in enumerate(item)]
            return tuple(items) if isinstance(item, tuple) else items
        return read_leaf(item, at)

    try:
        return _read_nested(value, read, path) if "param_groups" in value else _read_flattened(value, read, path)
    except FormatError as error:
        error.path = error.path or path or None
        raise


def _read_nested(value: Mapping[Any, Any], read: ReadLeaf, path: str) -> FoundState:
    groups = tuple(_read_group(number, table, read) for number, table in enumerate(value["param_groups"]))
    state: dict[object, Mapping[str, SlotValue]] = {}
    for key in (*value["state"], *(param for group in groups for param in group.params)):
        if isinstance(key, int) and key.bit_length() > _MOST_BITS:
            raise FormatError(f"the key of a parameter is an integer of {key.bit_length():,} bits, not a position")
    params = [param for group in groups for param in group.params]
    in_groups, is_named = set(params), any(isinstance(param, str) for param in params or value["state"])
    own: dict[str, SlotValue] = {}
    for key, slots in value["state"].items():
        if isinstance(key, str) and key not in in_groups and not (is_named and isinstance(slots, Mapping)):
            own[key] = read(slots, ("state", key))
            continue
        if not isinstance(slots, Mapping):
            raise FormatError(f"the state of {quoted(str(key))} is a {quoted(type_name(slots))}, not a mapping")
        if unnamed := [slot for slot in slots if type(slot) not in (str, int)]:  # heavyball numbers its slots
            raise FormatError(
                f"the state of {quoted(str(key))} has a slot named {printable(repr(unnamed[0]))}, which is not a string"
            )
        state[key] = {slot: read(inner, ("state", key, slot)) for slot, inner in slots.items()}
    for param in (*params, *state):
        if type(param) not in (int, str):
            raise FormatError(f"the key of a parameter is a {quoted(type_name(param))}, not a position or a name")
    keys = [key for key in value if isinstance(key, str) and key not in ("state", "param_groups")]
    more = MoreValues({key: read(value[key], (key,)) for key in keys}, own)
    remarks = (f"the state has values that are of no parameter: {listed(more.names)}",) if more else ()
    if is_named:
        return FoundState("named", state, groups, path, remarks, more)
    if _are_ids(params):
        places = {param: place for place, param in enumerate(params)}
        state = {places.get(key, key): slots for key, slots in state.items()}
        groups = tuple(replace(group, params=tuple(places[param] for param in group.params)) for group in groups)
        remarks = (*remarks, _KEYED_BY_ID)
    form = "param-names" if any(group.param_names is not None for group in groups) else "indexed"
    return FoundState(form, state, groups, path, remarks, more)


def _are_ids(params: Sequence[object]) -> bool:
    """Return whether parameters are numbered by their addresses in memory, as torch did up to 1.4, and each once."""
    lowest = max(len(params), _LOWEST_ADDRESS)
    return len(set(params)) == len(params) > 0 and all(isinstance(param, int) and param >= lowest for param in params)


def _read_group(number: int, table: object, read: ReadLeaf) -> FoundGroup:
    where = f"param_groups[{number}]"
    if not isinstance(table, Mapping) or not isinstance(table.get("params"), list | tuple):
        raise FormatError(f"{where} is not a group with a list of params", hint=_EXPECTED)
    if unnamed := [key for key in table if not isinstance(key, str)]:
        raise FormatError(f"{where} has an option named {printable(repr(unnamed[0]))}, which is not a string")
    names = table.get("param_names")
    options = {
        key: read(value, ("param_groups", number, key))
        for key, value in table.items()
        if key not in ("params", "param_names")
    }
    return FoundGroup(tuple(table["params"]), options, tuple(names) if isinstance(names, list | tuple) else None)


def _read_flattened(value: Mapping[str, object], read: ReadLeaf, path: str) -> FoundState:
    state: dict[object, dict[str, SlotValue]] = {}
    options: dict[str, dict[str, SlotValue]] = {}
    for key, inner in value.items():
        is_state = key.startswith(FLAT_STATE)
        name, _, entry = key.removeprefix(FLAT_STATE if is_state else FLAT_GROUPS).rpartition(".")
        if not name or not entry:
            raise FormatError(f"the key {quoted(key)} does not have the form PARAMETER.SLOT")
        if is_state:
            state.setdefault(name, {})[entry] = read(inner, (key,))
            continue
        own = options.setdefault(name, {})
        if entry not in ("params", "param_names"):  # these have the names of all parameters, at every parameter
            own[entry] = read(inner, (key,))
    groups: list[tuple[list[str], dict[str, SlotValue]]] = []
    group_by_options: dict[object, int] = {}
    for name, own in options.items():
        number = group_by_options.setdefault(_hashable(own), len(groups))
        if number == len(groups):
            groups.append(([], own))
        groups[number][0].append(name)
    found = tuple(FoundGroup(tuple(names), own) for names, own in groups)
    remark = "the flattened form stores no groups, so parameters with equal options were put into one group"
    return FoundState("flattened", state, found, path, (remark,) if found else ())


def _hashable(value: SlotValue) -> object:
    """Return a hashable object that is equal for equal values; only tensors with one element are compared by value."""
    if isinstance(value, LazyTensor):
        is_number = value.info.elements == 1 and value.info.kind == "dense"
        content = value.source.read_bytes(value.info.key) if is_number else value.info.key
        return value.dtype, value.shape, content
    if isinstance(value, Mapping):
        return tuple((key, _hashable(inner)) for key, inner in sorted(value.items(), key=str))
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return type(value).__name__, repr(value)


def as_named(found: FoundState, names: Mapping[object, str], evidence: str = "") -> OptimizerState:
    """Return the state with ``names`` as the keys of its parameters, in the order of the groups."""
    groups = tuple(NamedGroup(tuple(names[param] for param in group.params), group.options) for group in found.groups)
    state = {names[key]: slots for key, slots in found.state.items()}
    ordered = {name: state[name] for group in groups for name in group.names if name in state}
    return OptimizerState(
        ordered, groups, found.form, evidence, found.remarks, more=found.more, checkpoint=found.checkpoint
    )


def to_dict(state: OptimizerState, form: str = "indexed") -> dict[str, Any]:
    """Return the state in a form that torch loads, every tensor read into memory of its own.

    - ``indexed`` is for ``optimizer.load_state_dict()``: its positions are those of ``state.names``.
    - ``param-names`` is the same, with ``param_names`` in each group.
    - ``named`` and ``flattened`` are for ``torch.distributed.checkpoint.state_dict.set_optimizer_state_dict()``.

    Raises ``PlanError`` for an unknown form, for a name in two groups, and for state of a parameter in no group.
    Raises it too for a value that only running code can rebuild.

    Example:
        >>> from ckptkit.optimizer_state import to_dict, to_named
        >>> model = torch.nn.Linear(2, 2)
        >>> state = to_named(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), model)
        >>> torch.optim.SGD(model.parameters(), lr=0.5).load_state_dict(to_dict(state))
    """
    value = to_form(state, form)
    opaque = next(_opaque_values(value), None)
    if opaque is not None:
        raise PlanError(
            f"the state has a value of type {quoted(opaque.type)}, which only running code can rebuild",
            hint="load the file with torch.load, and give what that returns",
        )
    read: dict[str, Any] = map_tensors(_with_objects(value), LazyTensor.read)
    return read


def _with_objects(value: SlotValue) -> SlotValue:
    """Return the value with torch's dtypes in place of their names, and with copies of composite tensors."""
    if is_composite(value):
        return copy_composite(value)
    if isinstance(value, DtypeValue):
        return torch_dtype(value.code)
    if isinstance(value, Mapping):
        return {key: _with_objects(inner) for key, inner in value.items()}
    return type(value)(map(_with_objects, value)) if isinstance(value, list | tuple) else value


def _opaque_values(value: SlotValue) -> Iterator[OpaqueValue]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, OpaqueValue) and not isinstance(item, DtypeValue):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)


def to_form(state: OptimizerState, form: str) -> dict[str, Any]:
    """Return the state in one of ``FORMS``, with unread tensors; raises ``PlanError`` as ``to_dict`` does."""
    if form not in FORMS:
        raise PlanError(f"{quoted(str(form))} is not a form of an optimizer state", hint=f"one of {', '.join(FORMS)}")
    names = require_named(state).names
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise PlanError(f"{quoted(repeated[0])} is in the groups more than once")
    known = set(names)
    strays = [name for name in state.state if name not in known]
    if strays:
        raise PlanError(f"there is state of {quoted(strays[0])}, which is in no group")
    if form == "flattened":
        if state.more:
            raise PlanError(
                f"the flattened form has no place for {listed(state.more.names)}, which is of no parameter",
                hint=_OTHER_FORM,
            )
        return _flattened(state)
    key_of: dict[str, object] = {name: name if form == "named" else place for place, name in enumerate(names)}
    groups: list[dict[str, SlotValue]] = []
    for group in state.groups:
        param_names = {"param_names": list(group.names)} if form == "param-names" else {}
        groups.append({**group.options, **param_names, "params": [key_of[name] for name in group.names]})
    slots = {key_of[name]: dict(state.state[name]) for name in names if name in state.state}
    return {"state": {**slots, **state.more.state}, "param_groups": groups, **state.more.keys}


def _flattened(state: OptimizerState) -> dict[str, SlotValue]:
    for name, own in state.state.items():
        if numbers := [slot for slot in cast("Mapping[object, SlotValue]", own) if isinstance(slot, int)]:
            raise PlanError(
                f"the flattened form has no place for slot {numbers[0]} of {quoted(name)}, whose name is a number",
                hint=_OTHER_FORM,
            )
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
