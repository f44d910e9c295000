"""Which parameter stands at which position: said by the file or the caller, or proved by shapes and order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError, PlanError
from ckptkit.optimizer_state.inference import infer_names
from ckptkit.optimizer_state.model import OptimizerState
from ckptkit.optimizer_state.reading import FoundState, as_named, read_state
from ckptkit.optimizer_state.shapes import Parameters, parameters_of
from ckptkit.optimizer_state.slots import parameter_shape

__all__ = ["positions", "structure_findings", "to_named"]

_GIVE = "say what the parameters are: a model or its checkpoint, or their names in order"
_SHOWN = 4


def to_named(
    state: FoundState | Checkpoint | Mapping[Any, Any], names: Any = None, *, drop_strays: bool = False
) -> OptimizerState:
    """Return the state by the names of its parameters.

    ``state`` is an open Checkpoint of an optimizer's state or a live ``state_dict()``, in any of torch's forms.
    ``names`` are needed where it counts parameters instead of naming them: a list of all names in the order of the
    groups; or a Module, a Checkpoint or a mapping of tensors, whose order and shapes then have to leave one reading
    alone. Where the state has names of its own, they are held against such a model. ``drop_strays`` leaves out state
    that no group has, in place of refusing it.

    Raises ``FormatError`` for positions that are used twice or left out and for state of no group, and ``PlanError``
    where names are missing, do not fit the shapes, or could be given in several ways, listing what is uncertain.
    """
    found = state if isinstance(state, FoundState) else read_state(state)
    if drop_strays:
        known = {param for group in found.groups for param in group.params}
        found = replace(found, state={key: slots for key, slots in found.state.items() if key in known})
    for finding in structure_findings(found):
        if finding.severity == "error":
            raise FormatError(finding.message, hint=finding.hint or None, path=found.path or None)
    try:
        return _named(found, names)
    except PlanError as error:
        error.path = error.path or found.path or None
        raise


def _named(found: FoundState, names: Any) -> OptimizerState:
    params = [param for group in found.groups for param in group.params]
    if isinstance(names, str | bytes):
        raise PlanError(f"the names are one string, {quoted(str(names))}", hint="give a list of them")
    listed = names if isinstance(names, Sequence) else None
    model = None if names is None or listed is not None else parameters_of(names)
    own = _own_names(found)
    if own is not None and listed is None:
        if model is not None:
            _hold_against(found, own, model)
        return as_named(found, own)
    if listed is not None:
        return as_named(found, _given(params, listed), "the names were given")
    if model is None:
        raise PlanError("its parameters are counted and have no names", hint=_GIVE)
    inferred, evidence = infer_names(found, model)
    return as_named(found, inferred, evidence)


def positions(found: FoundState) -> OptimizerState:
    """Return the state with the positions themselves for names, for where nobody knows better."""
    keys = dict.fromkeys([*(param for group in found.groups for param in group.params), *found.state])
    return as_named(found, {key: str(key) for key in keys})


def structure_findings(found: FoundState) -> Iterator[Finding]:
    """Yield what is wrong with the keys of a state: positions used twice, left out, and state of no group."""
    params = [param for group in found.groups for param in group.params]
    counted = Counter(params)
    twice = [param for param, count in counted.items() if count > 1]
    if twice:
        said = f"{_listed(twice)} {'is' if len(twice) == 1 else 'are'} in the groups more than once"
        why = "the optimizer held a parameter twice, and stepped it twice: its positions tell nothing for certain"
        yield Finding("optim.param-twice", "error", str(twice[0]), said, why)
    if found.form in ("indexed", "param-names") and not twice:
        missing = sorted(set(range(len(params))) - set(params), key=int)
        if missing:
            said = f"the positions are not 0 to {len(params) - 1}: {_listed(missing)} missing"
            yield Finding("optim.position-missing", "error", str(missing[0]), said, "the file was edited or is damaged")
    strays = [key for key in found.state if key not in counted]
    if strays:
        said = f"there is state of {_listed(strays)}, which no group has"
        yield Finding("optim.state-stray", "error", str(strays[0]), said, "ckpt optim prune drops it")
    if found.form == "param-names":
        yield from _name_findings(found)


def _name_findings(found: FoundState) -> Iterator[Finding]:
    for number, group in enumerate(found.groups):
        names = group.param_names
        if names is None or len(names) != len(group.params) or not all(isinstance(name, str) for name in names):
            count = "no list of names" if names is None else plural(len(names), "name")
            said = f"group {number} has {count} for {plural(len(group.params), 'parameter')}"
            yield Finding("optim.names-count", "error", "", said, "give the names")
            return
    twice = [name for name, count in Counter(n for g in found.groups for n in g.param_names or ()).items() if count > 1]
    if twice:
        said = f"param_names gives {_listed(twice)} to several parameters"
        yield Finding("optim.names-twice", "error", str(twice[0]), said, "give the names")


def _listed(items: Sequence[object]) -> str:
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(quoted(item) if isinstance(item, str) else str(item) for item in items[:_SHOWN]) + more


def _own_names(found: FoundState) -> dict[object, str] | None:
    if found.form == "param-names":
        pairs = (pair for group in found.groups for pair in zip(group.params, group.param_names or (), strict=True))
        return {param: str(name) for param, name in pairs}
    if found.form == "indexed":
        return None
    return {param: str(param) for group in found.groups for param in group.params}


def _given(params: Sequence[object], names: Sequence[Any]) -> dict[object, str]:
    if len(names) != len(params):
        raise PlanError(f"{plural(len(names), 'name')} for {plural(len(params), 'parameter')}", hint=_GIVE)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not all(isinstance(name, str) and name for name in names):
        raise PlanError(f"{_listed(twice)} is given twice" if twice else "a name is no string", hint=_GIVE)
    return dict(zip(params, names, strict=True))


def _hold_against(found: FoundState, names: Mapping[object, str], model: Parameters) -> None:
    shapes = model.shapes
    for param, own in names.items():
        name = model.aliases.get(own, own)
        if name not in shapes:
            raise PlanError(
                f"the state is of {quoted(name)}, which the model does not have",
                hint="rename it first (ckpt optim remap), or drop it (ckpt optim prune)",
            )
        shape = parameter_shape(found.state.get(param, {}))
        if shape is not None and shape != shapes[name]:
            raise PlanError(
                f"the state called {quoted(name)} is of {list(shape)}, and the parameter is {list(shapes[name])}",
                hint="torch overwrites param_names on loading, so they can be those of another order",
            )
