"""How deep in the model a parameter lies, and by how much its learning rate decays with depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckptkit.core.patterns import Pattern

__all__ = ["Depths", "Layers"]


@dataclass(frozen=True, slots=True)
class Depths:
    """The layer of each name that has one, counted from 0 at the input; ``holes`` are numbers that no name has."""

    layer: Mapping[str, int]
    count: int
    holes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layers:
    """Levels from the input to the output, each of one pattern or several.

    A pattern with ``{name:int}`` makes a layer of each number that it finds, in order; one without makes a layer of
    all that it fits. The learning rate is multiplied by ``decay`` once for each layer above, down to ``min_scale``.
    """

    levels: tuple[tuple[Pattern, ...], ...]
    decay: float
    min_scale: float = 0.0

    def depths(self, names: Iterable[str]) -> Depths:
        """Return the layer of each of ``names``; frozen ones belong here too, or freezing would shift the others."""
        places: dict[str, tuple[int, ...]] = {}
        for name in names:
            place = self._place(name)
            if place is not None:
                places[name] = place
        order = {place: layer for layer, place in enumerate(sorted(set(places.values())))}
        return Depths({name: order[place] for name, place in places.items()}, len(order), tuple(_holes(order)))

    def scale(self, layer: int, count: int) -> float:
        """Return what the learning rate of a layer is multiplied by: 1 for the last."""
        try:
            return max(self.min_scale, self.decay ** (count - 1 - layer))
        except OverflowError:
            return math.inf

    def _place(self, name: str) -> tuple[int, ...] | None:
        for level, patterns in enumerate(self.levels):
            for pattern in patterns:
                match = pattern.match(name)
                if match is not None:
                    return (level, *(int(match[key]) for key, is_int in pattern.captures.items() if is_int))
        return None


def _holes(places: Iterable[tuple[int, ...]]) -> Iterable[str]:
    seen: dict[tuple[int, ...], list[int]] = {}
    for place in places:
        if len(place) > 1:
            seen.setdefault(place[:-1], []).append(place[-1])
    for start, numbers in seen.items():
        for number in sorted(set(range(min(numbers), max(numbers))) - set(numbers))[:8]:
            yield ".".join(map(str, (*start[1:], number)))
