"""Find the names of numbered parameters: by the groups of the optimizer that loads the state, or by a model's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod

from ckptkit.comparison.roles import split_leaf
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.forms import FoundState
from ckptkit.optimizer_state.model import parameter_shape

__all__ = ["GIVE_MODEL", "GIVE_NAMES", "Groups", "Parameters", "Shape", "name_positions"]

Shape = tuple[int, ...]
Groups = Sequence[Sequence[str]]  # the names of the parameters of each group, in order

_MAX_SHOWN = 4
_FEWEST_OTHERS = 2  # tensors of one name, before their state tells what the name is used for
_NAMES = "the names in the order of the groups: --names FILE, one a line; in Python also a list"
GIVE_NAMES = f"give {_NAMES}"
GIVE_MODEL = f"give the model that was trained, or its weights: --model MODEL; or {_NAMES}"
_GIVE_LIVE_MODEL = f"give the live model, frozen as in training: --model MODEL; or {_NAMES}"
_FREEZE = f"freeze the parameters of the model that did not train; or {GIVE_NAMES}"
_GIVE_MODEL_ORDER = 'give the names in the order of the saved groups, or names="model" for the order of the model'


@dataclass(frozen=True, slots=True)
class Parameters:
    """The names and shapes of parameters, in the order of the model.

    - ``frozen`` are the names of the parameters that do not train.
    - ``is_certain`` is False if buffers can be among them, as in a checkpoint.
    - ``source`` tells where they are from, in words for a message.
    - ``aliases`` has the other names of tied parameters, each with the first name.
    - ``buffers`` has the last parts of names that were left out as names of buffers.
    """

    shapes: Mapping[str, Shape]
    frozen: frozenset[str] = frozenset()
    is_certain: bool = True
    source: str = "the model"
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()

    def shape(self, name: str) -> Shape | None:
        """Return the shape of the parameter under any of its names, or None if the model does not have it."""
        return self.shapes.get(self.aliases.get(name, name))


def name_positions(found: FoundState, model: Parameters, groups: Groups | None = None) -> tuple[dict[object, str], str]:
    """Return a name for each position of a state, and words that tell how the state was read.

    ``groups`` belong to the optimizer that loads the state. A position is then the same position in this optimizer,
    as ``load_state_dict`` reads it, if the sizes of the groups and all known shapes agree.

    Without such an agreement, the parameters of each group must be in the order of the model, because most code builds
    groups in this order. The shapes must then tell which group has which parameters. Where the groups of the optimizer
    are in another order, a state in that order is a further reading.

    Raises ``PlanError`` if no reading fits, or if more than one does; the message names the positions in doubt. A state
    that only the sizes of ``groups`` fit is read by position, since the shapes of single parameters may have changed.
    """
    saved = _Saved.of(found)
    live = None if groups is None else [name for group in groups for name in group]
    has_equal_sizes = groups is not None and [len(group) for group in groups] == list(saved.sizes)
    misfits = saved.misfits(live, model) if live is not None and has_equal_sizes else []
    if live is not None and has_equal_sizes and not misfits:
        return saved.named(live), _by_position(saved, groups or (), model)
    readings = _readings(saved, model, groups, allows_none=has_equal_sizes)
    if len(readings) > 1 and not model.is_certain:
        model, readings = _without_buffers(saved, model, groups, readings)
    if len(readings) > 1:
        misfit = f"the optimizer has other shapes: {_describe_misfit(saved, misfits, model)}; " if misfits else ""
        is_model_clear = [reading.order_of for reading in readings].count(model.source) == 1
        are_others = len({frozenset(reading.names) for reading in readings}) > 1  # frozen parameters, or buffers
        of_others = _FREEZE if model.is_certain else _GIVE_LIVE_MODEL
        hint = _GIVE_MODEL_ORDER if is_model_clear else of_others if are_others else GIVE_NAMES
        raise PlanError(misfit + _ambiguous(saved, readings[0].names, readings[1].names), hint=hint)
    if readings:
        return saved.named(readings[0].names), _by_order(saved, model, readings[0])
    assert live is not None  # noqa: S101 - without groups of equal sizes, _readings raises
    count = plural(len(misfits), "shape differs", "shapes differ")
    return saved.named(live), f"by position, in the groups of the optimizer, although {count}"


@dataclass(frozen=True, slots=True)
class _Saved:
    """The positions of a saved state in the order of its groups, with the shapes that their slots have."""

    params: Sequence[object]
    shapes: Sequence[Shape | None]
    sizes: Sequence[int]

    @classmethod
    def of(cls, found: FoundState) -> _Saved:
        params = [param for group in found.groups for param in group.params]
        shapes = [parameter_shape(found.state.get(param, {})) for param in params]
        return cls(params, shapes, [len(group.params) for group in found.groups])

    @property
    def starts(self) -> list[int]:
        """The number of the first position of each group, then the number of positions."""
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + size)
        return starts

    def misfits(self, names: Sequence[str], model: Parameters) -> list[tuple[int, str]]:
        """Return the places where the parameter of this name has another shape, with the name."""
        pairs = zip(names, self.shapes, strict=True)
        return [
            (place, name)
            for place, (name, shape) in enumerate(pairs)
            if shape is not None and model.shape(name) not in (None, shape)
        ]

    def named(self, names: Sequence[str]) -> dict[object, str]:
        return dict(zip(self.params, names, strict=True))


@dataclass(frozen=True, slots=True)
class _Reading:
    """The names of all positions, and the model or the optimizer that has the parameters in this order."""

    names: Sequence[str]
    order_of: str


def _readings(saved: _Saved, model: Parameters, groups: Groups | None, *, allows_none: bool) -> list[_Reading]:
    """Return at most two readings by an order; raise ``PlanError`` if there is none, unless ``allows_none``."""
    if len(saved.params) > len(model.shapes):
        if allows_none:
            return []
        raise PlanError(
            f"the state has {plural(len(saved.params), 'parameter')}, but {model.source} has {len(model.shapes):,}",
            hint="give the model that was trained, or the names in order",
        )
    candidates = _candidates(len(saved.params), model)
    orders = {model.source: candidates}
    live = [model.aliases.get(name, name) for group in groups or () for name in group]
    if len(saved.params) <= len(live) and not _is_in_order(groups or (), model) and model.shapes.keys() >= {*live}:
        orders["the optimizer"] = live
    readings: dict[tuple[str, ...], _Reading] = {}
    for order_of, names in orders.items():
        search = _Search(names, [model.shapes[name] for name in names], saved.shapes, saved.starts)
        for solution in _first_two_solutions(search):
            readings.setdefault(tuple(solution), _Reading(solution, order_of))
    if not readings and not allows_none:
        raise PlanError(_no_solution(saved, candidates, model), hint=GIVE_NAMES)
    return list(readings.values())


def _without_buffers(
    saved: _Saved, model: Parameters, groups: Groups | None, readings: list[_Reading]
) -> tuple[Parameters, list[_Reading]]:
    """Return the tensors of a checkpoint without evident buffers, and the readings that they leave.

    The readings differ in some names. Such a name is that of a buffer if no other tensor with its last part has state.
    All others with the last part of the name in its place must have state. Else returns the arguments. Names of
    parameters, such as ``bias``, are never those of buffers.
    """
    sides = [frozenset(reading.names) for reading in readings]
    in_all = frozenset.intersection(*sides)
    in_doubt = frozenset.union(*sides) - in_all
    places: dict[str, list[bool]] = {}  # by the last part of the names: whether each of the other tensors has state
    for name, shape in model.shapes.items():
        if prod(shape) and name not in in_doubt:
            places.setdefault(_last_part(name), []).append(name in in_all)
    doubtful = {part: places.get(part, []) for part in map(_last_part, in_doubt)}
    buffers = {part for part, others in doubtful.items() if len(others) >= _FEWEST_OTHERS and not any(others)}
    are_clear = all(len(others) >= _FEWEST_OTHERS and len(set(others)) == 1 for others in doubtful.values())
    if not buffers or not are_clear or any(map(_is_of_parameters, buffers)):
        return model, readings
    shapes = {name: shape for name, shape in model.shapes.items() if _last_part(name) not in buffers}
    rest = replace(model, shapes=shapes, buffers=(*model.buffers, *sorted(buffers)))
    fewer = _readings(saved, rest, groups, allows_none=True)
    return (rest, fewer) if len(fewer) == 1 else (model, readings)


def _is_of_parameters(part: str) -> bool:
    """Return whether the last part of a name is one of parameters, such as ``bias``: those without state are frozen."""
    leaf = split_leaf(part)
    return leaf is not None and leaf[1].startswith(("weight", "bias"))


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _is_in_order(groups: Groups, model: Parameters) -> bool:
    """Return whether the parameters of each group are in the order of the model."""
    place = {name: number for number, name in enumerate(model.shapes)}
    return all(
        place.get(model.aliases.get(first, first), -1) < place.get(model.aliases.get(second, second), len(place))
        for group in groups
        for first, second in pairwise(group)
    )


def _ambiguous(saved: _Saved, first: Sequence[str], second: Sequence[str]) -> str:
    unclear = [number for number, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]]
    examples = "; ".join(
        f"position {saved.params[number]} ({_shape_text(saved.shapes[number])}) is {quoted(first[number])} or "
        f"{quoted(second[number])}"
        for number in unclear[:_MAX_SHOWN]
    )
    more = f", and {len(unclear) - _MAX_SHOWN:,} more" if len(unclear) > _MAX_SHOWN else ""
    return f"shapes and order do not tell which parameter is which: {examples}{more}"


def _no_solution(saved: _Saved, candidates: Sequence[str], model: Parameters) -> str:
    message = f"the state does not fit {model.source}, if the parameters of each group are in the order of the model"
    if len(candidates) == len(saved.shapes) and (misfits := saved.misfits(candidates, model)):
        return f"{message}: {_describe_misfit(saved, misfits, model)}"
    return message


def _describe_misfit(saved: _Saved, misfits: Sequence[tuple[int, str]], model: Parameters) -> str:
    place, name = misfits[0]
    shape, expected = list(saved.shapes[place] or ()), list(model.shape(name) or ())
    return f"position {saved.params[place]} has shape {shape}, but {quoted(name)} has shape {expected}"


def _by_position(saved: _Saved, groups: Groups, model: Parameters) -> str:
    order = "" if _is_in_order(groups, model) else ", which are not in the order of the model"
    sizes = " + ".join(f"{size:,}" for size in saved.sizes)
    return f"by position, in the groups of the optimizer{order}: {sizes} parameters; {_known_shapes(saved)}"


def _by_order(saved: _Saved, model: Parameters, reading: _Reading) -> str:
    count = len(reading.names)
    if count == len(model.shapes):
        used = "all its parameters"
    elif count == sum(name not in model.frozen for name in model.shapes):
        used = "all parameters that train"
    else:
        used = f"{count:,} of {plural(len(model.shapes), 'parameter')}"
    groups = len(saved.sizes)
    split = "in one group" if groups == 1 else f"the only way to split them into {groups} groups"
    shapes = _known_shapes(saved)
    in_groups = [saved.shapes[start:end] for start, end in pairwise(saved.starts)]
    if any(len(set(known)) < len(known) for known in in_groups) and any(saved.shapes):
        shapes += "; equal shapes in one group were taken in this order"
    taken = (
        f"; {listed(model.buffers)} taken as names of buffers, because no other tensor with such a name has state"
        if model.buffers
        else ""
    )
    return f"by the order of {reading.order_of}: {used}, {split}; {shapes}{taken}"


def _known_shapes(saved: _Saved) -> str:
    known = sum(shape is not None for shape in saved.shapes)
    return f"{known:,} of {plural(len(saved.shapes), 'shape')} known, and all fit" if known else "no shapes to compare"


def _shape_text(shape: Shape | None) -> str:
    return "no shape known" if shape is None else str(list(shape))


def _candidates(count: int, model: Parameters) -> list[str]:
    """Return the names of the trainable parameters if their number is ``count``, else of all parameters."""
    trainable = [name for name in model.shapes if name not in model.frozen]
    return trainable if count == len(trainable) else list(model.shapes)


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
            raise PlanError("there are too many ways to assign the parameters to the groups", hint=GIVE_NAMES)
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
