"""Which parameter stands at which position: said by the file or the caller, or proved by shapes and order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import FormatError, PlanError
from ckptkit.optimizer_state.forms import FoundState, as_named, read_state
from ckptkit.optimizer_state.model import OptimizerState, parameter_shape
from ckptkit.param_groups.properties import parameter_table

__all__ = ["Parameters", "infer_names", "name_by_position", "parameters_of", "structure_findings", "to_named"]


@dataclass(frozen=True, slots=True)
class Parameters:
    """The names and shapes of parameters in the order of the model; ``frozen`` are those that do not train.

    ``certain`` says that they are the parameters, and not perhaps buffers among them; ``said`` is what they are taken
    from, for a sentence; ``aliases`` has the other names of tied ones, each with the first.
    """

    shapes: Mapping[str, tuple[int, ...]]
    frozen: frozenset[str] = frozenset()
    certain: bool = True
    said: str = "the model"
    aliases: Mapping[str, str] = field(default_factory=dict)


def parameters_of(model: Any) -> Parameters:
    """Return the parameters of a Module, or the tensors of a Checkpoint or mapping that can be parameters.

    Of tied ones the first name counts, as in ``named_parameters``; one that is uninitialised has no dims. ``model`` can
    be a mapping of names to shapes too. Raises ``ModelError`` for anything else.
    """
    if isinstance(model, Parameters):
        return model
    if isinstance(model, Mapping) and not isinstance(model, Checkpoint) and all(map(_is_shape, model.values())):
        return Parameters({str(name): tuple(shape) for name, shape in model.items()})
    parameters = parameter_table(model).parameters
    live = hasattr(model, "named_parameters")
    return Parameters(
        {one.name: one.shape or () for one in parameters},
        frozenset(info.name for one in parameters if not one.trainable for info in one.named()),
        certain=live,
        said="the model" if live else "the model's checkpoint",
        aliases={alias.name: one.name for one in parameters for alias in one.aliases},
    )


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(size) is int for size in value)


# Choices that are looked at: a way that is found without turning back takes one for each name and group.
_MOST_TRIED = 10_000_000
_ENOUGH_TRIED = 2_000_000
_TURNS = 4
_SHOWN = 4
_GIVE = "give the names in the order of the groups: --names FILE, or a list"
Shape = tuple[int, ...]


def infer_names(found: FoundState, model: Parameters) -> tuple[dict[object, str], str]:
    """Return a name for each position, and why it is that one.

    The parameters of a group are taken to be in the model's order, as every way of making groups of a model leaves
    them; which group takes which has to follow from the shapes. Raises ``PlanError`` where there is no way, or more
    than one, naming the positions and what each could be.
    """
    params = [param for group in found.groups for param in group.params]
    shapes = [parameter_shape(found.state.get(param, {})) for param in params]
    pool = _pool(len(params), model)
    bounds = [0]
    for group in found.groups:
        bounds.append(bounds[-1] + len(group.params))
    ways = list(_first_two(_Search(pool, [model.shapes[name] for name in pool], shapes, bounds)))
    if not ways:
        raise PlanError(_misfit(pool, model, shapes), hint=_GIVE)
    if len(ways) > 1:
        unclear = [number for number, (one, other) in enumerate(zip(*ways, strict=True)) if one != other]
        told = "; ".join(
            f"position {params[number]} ({_told(shapes[number])}) is {quoted(ways[0][number])} or "
            f"{quoted(ways[1][number])}"
            for number in unclear[:_SHOWN]
        )
        more = f", and {len(unclear) - _SHOWN:,} more" if len(unclear) > _SHOWN else ""
        raise PlanError(f"shapes and order do not tell which parameter is which: {told}{more}", hint=_GIVE)
    known = sum(shape is not None for shape in shapes)
    fits = (
        f"{known:,} of {plural(len(params), 'shape')} known, and each fits" if known else "it has no shapes to compare"
    )
    taken = "all" if len(pool) == len(params) else f"{len(params):,} of {len(pool):,}"
    one = "one group in" if len(found.groups) == 1 else f"the only way to deal them to {len(found.groups)} groups, in"
    return dict(zip(params, ways[0], strict=True)), f"{taken} parameters of {model.said}, {one} its order; {fits}"


def _pool(count: int, model: Parameters) -> list[str]:
    """Return the names that can be meant: all, or those that train where it is as many of those."""
    training = [name for name in model.shapes if name not in model.frozen]
    pool = training if count == len(training) else list(model.shapes)
    if count > len(pool):
        raise PlanError(
            f"the state is of {plural(count, 'parameter')}, and {model.said} has {len(pool):,}",
            hint="give the model that it was trained with, or the names in order",
        )
    return pool


@dataclass(slots=True)
class _Search:
    """Ways to deal a pool of names, in order, to groups that take them in order, each where its shape fits."""

    names: Sequence[str]
    sizes: Sequence[Shape]
    wanted: Sequence[Shape | None]
    bounds: Sequence[int]  # where each group begins among the positions, and where the last ends
    dead: set[tuple[int, ...]] = field(default_factory=set)
    tried: int = 0

    def choices(self, at: int, taken: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Yield how many each group has taken after the name at ``at``; the last way is to leave it out."""
        used = sum(taken)
        self.tried += len(taken)
        for group, count in enumerate(taken):
            first, end = self.bounds[group] + count, self.bounds[group + 1]
            if first < end and self.wanted[first] in (None, self.sizes[at]):
                yield (*taken[:group], count + 1, *taken[group + 1 :])
        if at - used < len(self.names) - self.bounds[-1]:
            yield taken


def _first_two(search: _Search) -> Iterator[list[str]]:
    start = (0,) * (len(search.bounds) - 1)
    path: list[tuple[int, ...]] = [start]
    open_ = [search.choices(0, start) if search.names else iter(())]
    won = [False]
    ways = 0
    if not search.names:
        yield []
        return
    straight = len(search.names) * len(start)
    most = min(_MOST_TRIED, max(_ENOUGH_TRIED, _TURNS * straight))
    while open_:
        if search.tried > most:
            raise PlanError("there are too many ways in which the groups could take the parameters", hint=_GIVE)
        at = len(path)
        following = next(open_[-1], None)
        if following is None:
            state = path.pop()
            open_.pop()
            if not won.pop():
                search.dead.add((len(path), *state))
            continue
        if (at, *following) in search.dead:
            continue
        if at == len(search.names):
            won = [True] * len(won)
            ways += 1
            yield _assigned(search, [*path, following])
            if ways == 2:
                return
            continue
        path.append(following)
        open_.append(search.choices(at, following))
        won.append(False)


def _assigned(search: _Search, path: Sequence[tuple[int, ...]]) -> list[str]:
    """Return the name of each position along a path of choices."""
    made = [""] * search.bounds[-1]
    for number, (before, after) in enumerate(pairwise(path)):
        for group, (old, new) in enumerate(zip(before, after, strict=True)):
            if new > old:
                made[search.bounds[group] + old] = search.names[number]
    return made


def _misfit(pool: Sequence[str], model: Parameters, shapes: Sequence[Shape | None]) -> str:
    if len(pool) == len(shapes):
        for number, (name, shape) in enumerate(zip(pool, shapes, strict=True)):
            if shape is not None and shape != model.shapes[name]:
                said = f"position {number} is of {_told(shape)}, and {quoted(name)} there is {list(model.shapes[name])}"
                return f"the shapes do not fit {model.said} in any order that keeps its own: {said}"
    return f"the shapes do not fit {model.said} in any order that keeps its own"


def _told(shape: Shape | None) -> str:
    return "no shape known" if shape is None else str(list(shape))


_GIVE_naming = "say what the parameters are: a model or its checkpoint, or their names in order"
_SHOWN_naming = 4


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
        raise PlanError("its parameters are counted and have no names", hint=_GIVE_naming)
    inferred, evidence = infer_names(found, model)
    return as_named(found, inferred, evidence)


def name_by_position(found: FoundState) -> OptimizerState:
    """Return the state with the positions themselves for names, for where nobody knows better."""
    keys = dict.fromkeys([*(param for group in found.groups for param in group.params), *found.state])
    return as_named(found, {key: str(key) for key in keys})


def structure_findings(found: FoundState) -> Iterator[Finding]:
    """Yield what is wrong with the keys of a state: positions used twice, left out, and state of no group."""
    params = [param for group in found.groups for param in group.params]
    counted = Counter(params)
    twice = [param for param, count in counted.items() if count > 1]
    if twice:
        said = f"{listed(twice, _SHOWN_naming)} {'is' if len(twice) == 1 else 'are'} in the groups more than once"
        why = "the optimizer held a parameter twice, and stepped it twice: its positions tell nothing for certain"
        yield Finding("optim.param-twice", "error", str(twice[0]), said, why)
    if found.form in ("indexed", "param-names") and not twice:
        missing = sorted(set(range(len(params))) - set(params), key=int)
        if missing:
            said = f"the positions are not 0 to {len(params) - 1}: {listed(missing, _SHOWN_naming)} missing"
            yield Finding("optim.position-missing", "error", str(missing[0]), said, "the file was edited or is damaged")
    strays = [key for key in found.state if key not in counted]
    if strays:
        said = f"there is state of {listed(strays, _SHOWN_naming)}, which no group has"
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
        said = f"param_names gives {listed(twice, _SHOWN_naming)} to several parameters"
        yield Finding("optim.names-twice", "error", str(twice[0]), said, "give the names")


def _own_names(found: FoundState) -> dict[object, str] | None:
    if found.form == "param-names":
        pairs = (pair for group in found.groups for pair in zip(group.params, group.param_names or (), strict=True))
        return {param: str(name) for param, name in pairs}
    if found.form == "indexed":
        return None
    return {param: str(param) for group in found.groups for param in group.params}


def _given(params: Sequence[object], names: Sequence[Any]) -> dict[object, str]:
    if len(names) != len(params):
        raise PlanError(f"{plural(len(names), 'name')} for {plural(len(params), 'parameter')}", hint=_GIVE_naming)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not all(isinstance(name, str) and name for name in names):
        raise PlanError(
            f"{listed(twice, _SHOWN_naming)} is given twice" if twice else "a name is no string", hint=_GIVE_naming
        )
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
