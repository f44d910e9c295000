"""Find the name of each parameter in a state that counts parameters: given, stored, or inferred from shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import cast

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural, quoted
from ckptkit.core.torch_bridge import StateDictLike
from ckptkit.errors import FormatError, PlanError
from ckptkit.optimizer_state import codes
from ckptkit.optimizer_state.forms import FoundState, as_named, read_state
from ckptkit.optimizer_state.model import OptimizerState, parameter_shape
from ckptkit.param_groups.properties import parameter_table

__all__ = [
    "ModelLike",
    "NamesLike",
    "Parameters",
    "infer_names",
    "name_by_position",
    "parameters_of",
    "structure_findings",
    "to_named",
]

Shape = tuple[int, ...]
ModelLike = StateDictLike | Mapping[str, Shape]
NamesLike = Sequence[str] | ModelLike

_MAX_SHOWN = 4
_GIVE_NAMES = "give the names in the order of the groups: --names FILE, or a list"
_GIVE_MODEL = "give the model, its checkpoint, or a list of names in the order of the groups"


@dataclass(frozen=True, slots=True)
class Parameters:
    """The names and shapes of parameters, in the order of the model.

    - ``frozen`` are the names of the parameters that do not train.
    - ``is_certain`` is False if buffers can be among them, as in a checkpoint.
    - ``source`` tells where they are from, in words for a message.
    - ``aliases`` has the other names of tied parameters, each with the first name.
    """

    shapes: Mapping[str, Shape]
    frozen: frozenset[str] = frozenset()
    is_certain: bool = True
    source: str = "the model"
    aliases: Mapping[str, str] = field(default_factory=dict)


def parameters_of(model: Parameters | ModelLike) -> Parameters:
    """Return the parameters of a Module, or the tensors of a Checkpoint or a mapping that can be parameters.

    ``model`` can also be a mapping of names to shapes. A tied parameter has its first name, as in
    ``named_parameters()``, and an uninitialised one has the shape ``()``. Raises ``ModelError`` for any other type.
    """
    if isinstance(model, Parameters):
        return model
    if isinstance(model, Mapping) and not isinstance(model, Checkpoint) and all(map(_is_shape, model.values())):
        shapes = cast("Mapping[str, Shape]", model)
        return Parameters({str(name): tuple(shape) for name, shape in shapes.items()})
    parameters = parameter_table(cast("StateDictLike", model)).parameters
    is_live = hasattr(model, "named_parameters")
    return Parameters(
        {parameter.name: parameter.shape or () for parameter in parameters},
        frozenset(info.name for parameter in parameters if not parameter.trainable for info in parameter.named()),
        is_certain=is_live,
        source="the model" if is_live else "the model's checkpoint",
        aliases={alias.name: parameter.name for parameter in parameters for alias in parameter.aliases},
    )


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(size) is int for size in value)


def to_named(
    state: FoundState | Checkpoint | Mapping[str, object], names: NamesLike | None = None, *, drop_strays: bool = False
) -> OptimizerState:
    """Return the state of an optimizer by the names of its parameters.

    ``state`` is an open Checkpoint of such a state, or a live ``state_dict()``, in any form of torch. If it only counts
    its parameters, ``names`` must tell which they are. ``names`` is a list of all names in the order of the groups, or
    a model: a Module, a Checkpoint or a mapping of tensors. The order and the shapes of the model must then allow
    exactly one assignment. If the state has names of its own, they are compared with such a model. With
    ``drop_strays``, state of parameters in no group is left out instead of refused.

    Raises ``FormatError`` for positions that are used twice or missing, and for state of no group. Raises ``PlanError``
    if names are missing, do not fit the shapes, or are ambiguous; the message lists the parameters in doubt.
    """
    found = state if isinstance(state, FoundState) else read_state(state)
    if drop_strays:
        params = {param for group in found.groups for param in group.params}
        found = replace(found, state={key: slots for key, slots in found.state.items() if key in params})
    for finding in structure_findings(found):
        if finding.severity == "error":
            raise FormatError(finding.message, hint=finding.hint or None, path=found.path or None)
    try:
        return _named(found, names)
    except PlanError as error:
        error.path = error.path or found.path or None
        raise


def _named(found: FoundState, names: NamesLike | None) -> OptimizerState:
    if isinstance(names, str | bytes):
        raise PlanError(f"the names are one string, {quoted(str(names))}", hint="give a list of strings")
    given = names if isinstance(names, Sequence) else None
    model = None if names is None or isinstance(names, Sequence) else parameters_of(names)
    own = _own_names(found)
    if own is not None and given is None:
        if model is not None:
            _compare_with_model(found, own, model)
        return as_named(found, own)
    if given is not None:
        params = [param for group in found.groups for param in group.params]
        return as_named(found, _given_names(params, given), "the names were given")
    if model is None:
        raise PlanError("the state numbers its parameters and does not contain their names", hint=_GIVE_MODEL)
    inferred, evidence = infer_names(found, model)
    return as_named(found, inferred, evidence)


def name_by_position(found: FoundState) -> OptimizerState:
    """Return the state with the positions as names, for use when no names are known."""
    keys = dict.fromkeys([*(param for group in found.groups for param in group.params), *found.state])
    return as_named(found, {key: str(key) for key in keys})


def _own_names(found: FoundState) -> dict[object, str] | None:
    if found.form == "param-names":
        pairs = (pair for group in found.groups for pair in zip(group.params, group.param_names or (), strict=True))
        return {param: str(name) for param, name in pairs}
    if found.form == "indexed":
        return None
    return {param: str(param) for group in found.groups for param in group.params}


def _given_names(params: Sequence[object], names: Sequence[object]) -> dict[object, str]:
    if len(names) != len(params):
        raise PlanError(f"{plural(len(names), 'name')} for {plural(len(params), 'parameter')}", hint=_GIVE_MODEL)
    if not all(isinstance(name, str) and name for name in names):
        raise PlanError("a name is not a string, or is empty", hint=_GIVE_MODEL)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise PlanError(f"{listed(repeated, _MAX_SHOWN)} is given twice", hint=_GIVE_MODEL)
    return dict(zip(params, map(str, names), strict=True))


def _compare_with_model(found: FoundState, names: Mapping[object, str], model: Parameters) -> None:
    for param, own in names.items():
        name = model.aliases.get(own, own)
        if name not in model.shapes:
            raise PlanError(
                f"the state has a parameter {quoted(name)}, which the model does not have",
                hint="rename it first (ckpt optim remap), or drop it (ckpt optim prune)",
            )
        shape = parameter_shape(found.state.get(param, {}))
        if shape is not None and shape != model.shapes[name]:
            raise PlanError(
                f"the state of {quoted(name)} has shape {list(shape)}, but the parameter has shape "
                f"{list(model.shapes[name])}",
                hint="torch overwrites param_names when it loads a file, so the names can be in another order",
            )


def structure_findings(found: FoundState) -> Iterator[Finding]:
    """Yield a finding for each contradiction: repeated or missing positions, state of no group, wrong param_names."""
    params = [param for group in found.groups for param in group.params]
    counts = Counter(params)
    repeated = [param for param, count in counts.items() if count > 1]
    if repeated:
        verb = "is" if len(repeated) == 1 else "are"
        yield codes.PARAM_TWICE.finding(
            str(repeated[0]),
            f"{listed(repeated, _MAX_SHOWN)} {verb} in the groups more than once",
            "the optimizer held a parameter twice, so its positions do not tell which parameter is which",
        )
    if found.form in ("indexed", "param-names") and not repeated:
        missing = sorted(set(range(len(params))) - set(params), key=int)
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            yield codes.POSITION_MISSING.finding(
                str(missing[0]),
                f"the positions must be 0 to {len(params) - 1}, but {listed(missing, _MAX_SHOWN)} {verb} missing",
                "the file was edited or is damaged",
            )
    strays = [key for key in found.state if key not in counts]
    if strays:
        yield codes.STATE_STRAY.finding(
            str(strays[0]),
            f"there is state of {listed(strays, _MAX_SHOWN)}, which no group has",
            "drop it: ckpt optim prune",
        )
    if found.form == "param-names":
        yield from _param_names_findings(found)


def _param_names_findings(found: FoundState) -> Iterator[Finding]:
    for number, group in enumerate(found.groups):
        names = group.param_names
        if names is None or len(names) != len(group.params) or not all(isinstance(name, str) for name in names):
            count = "no list of names" if names is None else plural(len(names), "name")
            yield codes.NAMES_COUNT.finding(
                "", f"group {number} has {count} for {plural(len(group.params), 'parameter')}", _GIVE_NAMES
            )
            return
    counts = Counter(name for group in found.groups for name in group.param_names or ())
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        yield codes.NAMES_TWICE.finding(
            str(repeated[0]), f"param_names gives {listed(repeated, _MAX_SHOWN)} to several parameters", _GIVE_NAMES
        )


def infer_names(found: FoundState, model: Parameters) -> tuple[dict[object, str], str]:
    """Return a name for each position, and the evidence for these names in words.

    The parameters of each group must be in the order of the model, because all usual code builds groups in this order.
    The shapes must then tell which group has which parameters. Raises ``PlanError`` if there is no assignment, or more
    than one; the message names the positions in doubt and their candidates.
    """
    params = [param for group in found.groups for param in group.params]
    shapes = [parameter_shape(found.state.get(param, {})) for param in params]
    candidates = _candidates(len(params), model)
    starts = [0]
    for group in found.groups:
        starts.append(starts[-1] + len(group.params))
    search = _Search(candidates, [model.shapes[name] for name in candidates], shapes, starts)
    solutions = list(_first_two_solutions(search))
    if not solutions:
        raise PlanError(_no_solution(candidates, model, shapes), hint=_GIVE_NAMES)
    if len(solutions) > 1:
        raise PlanError(_ambiguous(params, shapes, *solutions), hint=_GIVE_NAMES)
    return dict(zip(params, solutions[0], strict=True)), _evidence(found, model, len(candidates), shapes)


def _ambiguous(
    params: Sequence[object], shapes: Sequence[Shape | None], first: Sequence[str], second: Sequence[str]
) -> str:
    unclear = [number for number, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]]
    examples = "; ".join(
        f"position {params[number]} ({_shape_text(shapes[number])}) is {quoted(first[number])} or "
        f"{quoted(second[number])}"
        for number in unclear[:_MAX_SHOWN]
    )
    more = f", and {len(unclear) - _MAX_SHOWN:,} more" if len(unclear) > _MAX_SHOWN else ""
    return f"shapes and order do not tell which parameter is which: {examples}{more}"


def _no_solution(candidates: Sequence[str], model: Parameters, shapes: Sequence[Shape | None]) -> str:
    message = f"the state does not fit {model.source}, if the parameters of each group are in the order of the model"
    if len(candidates) == len(shapes):
        for number, (name, shape) in enumerate(zip(candidates, shapes, strict=True)):
            if shape is not None and shape != model.shapes[name]:
                expected = list(model.shapes[name])
                return f"{message}: position {number} has shape {list(shape)}, but {quoted(name)} has shape {expected}"
    return message


def _evidence(found: FoundState, model: Parameters, candidates: int, shapes: Sequence[Shape | None]) -> str:
    known = sum(shape is not None for shape in shapes)
    fit = f"{known:,} of {plural(len(shapes), 'shape')} known, and all fit" if known else "no shapes to compare"
    used = "all" if candidates == len(shapes) else f"{len(shapes):,} of {candidates:,}"
    count = len(found.groups)
    split = "one group in" if count == 1 else f"the only way to split them into {count} groups in"
    return f"{used} parameters of {model.source}, {split} its order; {fit}"


def _shape_text(shape: Shape | None) -> str:
    return "no shape known" if shape is None else str(list(shape))


def _candidates(count: int, model: Parameters) -> list[str]:
    """Return the names of the trainable parameters if their number is ``count``, else of all parameters."""
    trainable = [name for name in model.shapes if name not in model.frozen]
    names = trainable if count == len(trainable) else list(model.shapes)
    if count > len(names):
        raise PlanError(
            f"the state has {plural(count, 'parameter')}, but {model.source} has {len(names):,}",
            hint="give the model that was trained, or the names in order",
        )
    return names


# A search without backtracking makes one choice for each name and group. These bound the choices of a search with it.
_MAX_CHOICES = 10_000_000
_MIN_CHOICES = 2_000_000
_CHOICES_FACTOR = 4


@dataclass(slots=True)
class _Search:
    """The ways to give names, in order, to groups that take them in order, each name where its shape fits.

    ``starts`` has the first position of each group, then the number of positions. A partial assignment is the number
    of names that each group has taken; ``dead_ends`` are those that lead to no solution.
    """

    names: Sequence[str]
    shapes: Sequence[Shape]
    expected: Sequence[Shape | None]
    starts: Sequence[int]
    dead_ends: set[tuple[int, ...]] = field(default_factory=set)
    choices: int = 0

    def next_counts(self, at: int, taken: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Yield how many names each group has after the name at ``at``: one group takes the name, or, last, none."""
        used = sum(taken)
        self.choices += len(taken)
        for group, count in enumerate(taken):
            position, end = self.starts[group] + count, self.starts[group + 1]
            if position < end and self.expected[position] in (None, self.shapes[at]):
                yield (*taken[:group], count + 1, *taken[group + 1 :])
        if at - used < len(self.names) - self.starts[-1]:
            yield taken


def _first_two_solutions(search: _Search) -> Iterator[list[str]]:
    """Yield the name of each position, for at most two solutions; a depth-first search without recursion."""
    if not search.names:
        yield []
        return
    start = (0,) * (len(search.starts) - 1)
    path = [start]
    pending = [search.next_counts(0, start)]
    has_solution = [False]  # of each step of the path
    solutions = 0
    limit = min(_MAX_CHOICES, max(_MIN_CHOICES, _CHOICES_FACTOR * len(search.names) * len(start)))
    while pending:
        if search.choices > limit:
            raise PlanError("there are too many ways to assign the parameters to the groups", hint=_GIVE_NAMES)
        at = len(path)
        counts = next(pending[-1], None)
        if counts is None:
            last = path.pop()
            pending.pop()
            if not has_solution.pop():
                search.dead_ends.add((len(path), *last))
            continue
        if (at, *counts) in search.dead_ends:
            continue
        if at == len(search.names):
            has_solution = [True] * len(has_solution)
            solutions += 1
            yield _names_of_positions(search, [*path, counts])
            if solutions == 2:
                return
            continue
        path.append(counts)
        pending.append(search.next_counts(at, counts))
        has_solution.append(False)


def _names_of_positions(search: _Search, path: Sequence[tuple[int, ...]]) -> list[str]:
    names = [""] * search.starts[-1]
    for number, (before, after) in enumerate(pairwise(path)):
        for group, (old, new) in enumerate(zip(before, after, strict=True)):
            if new > old:
                names[search.starts[group] + old] = search.names[number]
    return names
