"""Tensors as grids: modules of a layer by layers, modules by their tensors, or one after the other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeVar

from ckptkit.align.modules import KeyTemplate, group_into_modules
from ckptkit.core.checkpoint import TensorInfo

__all__ = ["Band", "Grid", "grids_of", "in_common_order", "layers_of"]

T = TypeVar("T", bound=Hashable)

_MOST_ROWS: Final = 150  # of a grid
_MOST_MODULES: Final = 48  # of those outside of layers; more are drawn one after the other
_MOST_LEAVES: Final = 5
_MOST_LAYERS: Final = 200
_MOST_COLUMNS: Final = 110  # of stacks that stand beside each other
_MOST_GRIDS: Final = 8
_MOST_SPELT: Final = 4  # parts of a layer with numbers that have a row each; more are experts, and have one together
_IN_A_ROW: Final = 60  # tensors that stand one after the other
_ALIKE: Final = 0.5  # the share of equal rows from which stacks of layers stand beside each other


@dataclass(frozen=True, slots=True)
class Band:
    """Columns that belong together: the layers of a stack, or the names of tensors of modules.

    ``columns`` are the labels of the columns, in order.
    """

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows and columns of tensors.

    ``cells`` has the keys in a cell by the numbers of its row and its column; the columns of all bands are counted
    together. A cell has several keys where a row stands for all experts of a layer, or none where a layer has no such
    tensor. ``rows`` is empty where tensors only stand one after the other, from left to right and from top to bottom.
    """

    bands: tuple[Band, ...]
    rows: tuple[str, ...]
    cells: Mapping[tuple[int, int], tuple[str, ...]]

    @property
    def has_layers(self) -> bool:
        """Whether the columns are layers."""
        return any(band.name for band in self.bands)


@dataclass
class _Stack:
    """The layers below one name: for each row, the keys of each layer. It is whole before anybody asks for them."""

    rows: dict[str, dict[int, list[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    @cached_property
    def layers(self) -> list[int]:
        return sorted({layer for layers in self.rows.values() for layer in layers})

    @property
    def keys(self) -> list[str]:
        return [key for layers in self.rows.values() for keys in layers.values() for key in keys]

    @property
    def is_drawn(self) -> bool:
        return 1 < len(self.layers) <= _MOST_LAYERS and len(self.rows) <= _MOST_ROWS


def grids_of(keys: Iterable[str]) -> list[Grid]:
    """Return grids that hold each key once: first those of layers, then the tensors outside of layers.

    Stacks of layers with the same modules stand beside each other, such as the stages of a ResNet.
    """
    keys = list(keys)
    stacks, outside = _stacks(keys)
    groups: list[list[tuple[str, _Stack]]] = []
    for name, stack in stacks.items():
        group = next((group for group in groups if _fits(group, stack)), None)
        if group is not None:
            group.append((name, stack))
        elif len(groups) < _MOST_GRIDS:
            groups.append([(name, stack)])
        else:
            outside += stack.keys
    place = {key: number for number, key in enumerate(keys)}
    return [*map(_of_stacks, groups), *_of_modules(sorted(outside, key=place.__getitem__))]


def layers_of(keys: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return the stack and the number of the layer of each key that is in one."""
    return {
        key: (name, layer)
        for name, stack in _stacks(keys)[0].items()
        for layers in stack.rows.values()
        for layer, keys in layers.items()
        for key in keys
    }


def _stacks(keys: Sequence[str]) -> tuple[dict[str, _Stack], list[str]]:
    """Return the stacks of layers by name, and the keys outside of them."""
    modules = group_into_modules({key: TensorInfo(key, "", ()) for key in keys})
    members = [member for module in modules for member in module.members.values()]
    nested = _nested(member.name.texts for member in members)
    stacks: dict[str, _Stack] = defaultdict(_Stack)
    outside: list[str] = []
    for member in members:
        texts = member.name.texts
        depth = 2 if texts[:1] in nested else 1
        rest = KeyTemplate(texts[depth:])
        is_spelt = len({index[depth:] for index in member.tensors}) <= _MOST_SPELT
        joined = "*".join(rest.texts).strip("./")
        for index, info in member.tensors.items():
            if len(index) < depth:
                outside.append(info.key)
                continue
            name = KeyTemplate(texts[:depth]).key_at(index[: depth - 1]).rstrip("./")
            row = rest.key_at(index[depth:]).strip("./") if is_spelt else joined
            stacks[name].rows[row][index[depth - 1]].append(info.key)
    real = {name: stack for name, stack in stacks.items() if stack.is_drawn}
    return real, [*outside, *(key for name, stack in stacks.items() if name not in real for key in stack.keys)]


def _nested(templates: Iterable[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Return the beginnings of stages that have layers of their own, most of them below one name.

    The experts of a layer are not its layers, and neither are the parts of several small networks in it.
    """
    seconds: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for texts in templates:
        seconds[texts[:1]][texts[1] if len(texts) > 2 else ""] += 1
    return {
        first
        for first, counts in seconds.items()
        if 2 * counts[""] < counts.total() < 2 * max((count for name, count in counts.items() if name), default=0)
    }


def _fits(group: Sequence[tuple[str, _Stack]], stack: _Stack) -> bool:
    """Return whether a stack has nearly the same rows as those of a group, and there is room beside them."""
    first, own = group[0][1].rows.keys(), stack.rows.keys()
    columns = sum(len(other.layers) for _, other in group) + len(stack.layers)
    return len(first & own) >= _ALIKE * min(len(first), len(own)) and columns <= _MOST_COLUMNS


def _of_stacks(group: Sequence[tuple[str, _Stack]]) -> Grid:
    rows = in_common_order([list(stack.rows) for _, stack in group])
    number = {row: at for at, row in enumerate(rows)}
    cells: dict[tuple[int, int], tuple[str, ...]] = {}
    bands: list[Band] = []
    for name, stack in group:
        start = sum(len(band.columns) for band in bands)
        bands.append(Band(name, tuple(map(str, stack.layers))))
        for row, by_layer in stack.rows.items():
            for column, layer in enumerate(stack.layers, start):
                if layer in by_layer:
                    cells[number[row], column] = tuple(by_layer[layer])
    return Grid(tuple(bands), tuple(rows), cells)


def in_common_order(lists: Iterable[Sequence[T]]) -> list[T]:
    """Return what is in any list once, in an order that agrees with the lists as far as they agree; long ones first."""
    order: list[T] = []
    for names in sorted(lists, key=len, reverse=True):
        place = next((order.index(name) for name in names if name in order), len(order))
        for name in names:
            if name in order:
                place = order.index(name) + 1
            else:
                order.insert(place, name)
                place += 1
    return order


def _of_modules(keys: Sequence[str]) -> Iterator[Grid]:
    """Yield the modules with their tensors beside each other, or all tensors one after the other if they are many."""
    if not keys:
        return
    sizes = Counter(key.rpartition(".")[0] for key in keys)
    leaves = Counter(leaf for module, _, leaf in (key.rpartition(".") for key in keys) if module)
    shared = {leaf for module, _, leaf in (key.rpartition(".") for key in keys) if module and sizes[module] > 1}
    columns = [leaf for leaf, count in leaves.most_common(_MOST_LEAVES) if count > 1 or leaf in shared]
    others = len(columns)
    rows: dict[str, int] = {}
    cells: dict[tuple[int, int], tuple[str, ...]] = {}
    for key in keys:
        module, _, leaf = key.rpartition(".")
        is_known = leaf in columns and "." in key
        row = rows.setdefault(module if is_known else key, len(rows))
        cells[row, columns.index(leaf) if is_known else others] = (key,)
    if len(rows) > _MOST_MODULES:
        yield Grid((), (), {divmod(at, _IN_A_ROW): (key,) for at, key in enumerate(keys)})
        return
    has_others = any(column == others for _, column in cells)
    yield Grid((Band("", (*columns, *[""] * has_others)),), tuple(rows), cells)
