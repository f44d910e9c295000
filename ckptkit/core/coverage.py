"""How much of a model something reaches, module by module, at the depth where it shows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ckptkit.core.checkpoint import TensorInfo

__all__ = ["ModuleCoverage", "coverage_by_module", "group_by_module"]

_MOST_SECTIONS = 32


@dataclass(frozen=True, slots=True)
class ModuleCoverage:
    """One module, or one tensor that lies beside modules: how many of its tensors and elements were filled."""

    module: str
    loaded: int
    tensors: int
    loaded_elements: int
    elements: int


def coverage_by_module(infos: Iterable[TensorInfo], loaded: AbstractSet[str]) -> tuple[ModuleCoverage, ...]:
    """Return a row for each module; one of which a part was filled is opened, as far as the rows stay few."""
    elements = {info.key: info.elements for info in infos}
    rows = []
    for module, keys in group_by_module({key: key in loaded for key in elements}):
        filled = [key for key in keys if key in loaded]
        counts = (sum(elements[key] for key in some) for some in (filled, keys))
        rows.append(ModuleCoverage(module, len(filled), len(keys), *counts))
    return tuple(rows)


def group_by_module(labels: Mapping[str, Hashable]) -> list[tuple[str, list[str]]]:
    """Return the keys by module, in their order: of the children of the model, those with unlike labels opened.

    A section is called by its prefix without the last dot, or by its one key where that lies beside modules. Modules
    are opened level by level, and no further where that would make more than 32 sections.
    """
    found = _opened("", list(labels))
    while len(found) == 1 and found[0][0] != found[0][1][0]:
        found = _opened(*found[0])
    while True:
        opened: list[tuple[str, list[str]]] = []
        for prefix, keys in found:
            mixed = len({labels[key] for key in keys}) > 1
            opened += _opened(prefix, keys) if mixed else [(prefix, keys)]
        if opened == found or len(opened) > _MOST_SECTIONS:
            return found
        found = opened


def _opened(prefix: str, keys: list[str]) -> list[tuple[str, list[str]]]:
    start = len(prefix) + 1 if prefix else 0
    parts: dict[str, list[str]] = {}
    for key in keys:
        end = key.find(".", start)
        parts.setdefault(key if end < 0 else key[:end], []).append(key)
    return list(parts.items())
