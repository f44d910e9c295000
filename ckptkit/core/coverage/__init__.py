"""Which tensors of a base got values, counted for the whole and for each module."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ckptkit.core.checkpoint import TensorInfo

__all__ = ["Coverage", "ModuleCoverage", "coverage_by_module", "group_by_module", "measure_coverage", "split_keys"]

_MAX_MODULES = 32


@dataclass(frozen=True, slots=True)
class Coverage:
    """The keys of a base that got values from another checkpoint, and the keys that have the values of the base."""

    filled: tuple[str, ...]
    kept: tuple[str, ...]
    filled_elements: int
    elements: int

    @property
    def share(self) -> float:
        """The share of the elements that got values, between 0 and 1; 1 if the base has no element."""
        return self.filled_elements / self.elements if self.elements else 1.0


def measure_coverage(infos: Mapping[str, TensorInfo], filled: AbstractSet[str]) -> Coverage:
    """Return which of the tensors ``infos`` are ``filled``, and how many elements they have."""
    found = tuple(key for key in infos if key in filled) if filled else ()
    return Coverage(
        found,
        tuple(key for key in infos if key not in filled) if found else tuple(infos),
        _elements(map(infos.__getitem__, found)),
        _elements(infos.values()),
    )


def _elements(infos: Iterable[TensorInfo]) -> int:
    """Return the number of elements of all tensors, of which a large model has few shapes."""
    return sum(math.prod(shape) * times for shape, times in Counter(info.shape for info in infos).items())


@dataclass(frozen=True, slots=True)
class ModuleCoverage:
    """The numbers of loaded tensors and elements of one module, or of one tensor that is not in such a module."""

    module: str
    loaded: int
    tensors: int
    loaded_elements: int
    elements: int


def coverage_by_module(infos: Iterable[TensorInfo], loaded: AbstractSet[str]) -> tuple[ModuleCoverage, ...]:
    """Return one row for each module, or for its submodules if only a part of it was loaded."""
    elements = {info.key: info.elements for info in infos}
    rows = []
    for module, keys in group_by_module({key: key in loaded for key in elements}):
        loaded_keys = [key for key in keys if key in loaded]
        loaded_elements, all_elements = (sum(elements[key] for key in some) for some in (loaded_keys, keys))
        rows.append(ModuleCoverage(module, len(loaded_keys), len(keys), loaded_elements, all_elements))
    return tuple(rows)


def group_by_module(labels: Mapping[str, Hashable]) -> list[tuple[str, list[str]]]:
    """Return each module with its keys, in the order of the keys.

    A module with different labels is divided into submodules, level by level, while there are at most 32 rows. A
    tensor outside of these modules has a row of its own, which begins with its key.
    """
    modules = split_keys("", list(labels))
    while len(modules) == 1 and modules[0][0] != modules[0][1][0]:
        modules = split_keys(*modules[0])
    while True:
        finer: list[tuple[str, list[str]]] = []
        for prefix, keys in modules:
            mixed = len({labels[key] for key in keys}) > 1
            finer += split_keys(prefix, keys) if mixed else [(prefix, keys)]
        if finer == modules or len(finer) > _MAX_MODULES:
            return modules
        modules = finer


def split_keys(prefix: str, keys: list[str]) -> list[tuple[str, list[str]]]:
    """Return the modules one level below ``prefix`` with their keys; a tensor of ``prefix`` itself stands alone."""
    start = len(prefix) + 1 if prefix else 0
    parts: dict[str, list[str]] = {}
    for key in keys:
        end = key.find(".", start)
        parts.setdefault(key if end < 0 else key[:end], []).append(key)
    return list(parts.items())
