"""Names for positions: the one way in which the groups can take the parameters in the model's order, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ckptkit.core.text import plural, quoted
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.reading import FoundState
from ckptkit.optimizer_state.shapes import Parameters
from ckptkit.optimizer_state.slots import parameter_shape

__all__ = ["infer_names"]

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
