"""What parametrizing, pruning or adapting a module makes of the names of its parameters, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptkit.param_groups.parameters import Inventory, LiveParameter, bare_name
from ckptkit.wrappers.table import PARAMETRIZATIONS, WRAPPERS

__all__ = ["Rename", "find_rename"]


@dataclass(frozen=True, slots=True, eq=False)
class Rename:
    """What became of a recorded name: the first parameter that stands in its place, and who put it there."""

    live: LiveParameter
    names: tuple[str, ...]  # of all parameters that came of it
    event: str  # what happened, as a clause


def find_rename(inventory: Inventory, recorded: str) -> Rename | None:
    """Return what ``recorded`` is called since its module was parametrized, pruned or adapted, or plain again.

    None where the model has the name itself, or nothing that can have come of it.
    """
    recorded = bare_name(recorded)
    if recorded in inventory.by_bare_name:
        return None
    module, dot, leaf = recorded.rpartition(".")
    for event, names in _longer(f"{module}{dot}", leaf):
        found = [inventory.by_bare_name[name] for name in names if name in inventory.by_bare_name]
        if found and all(name in inventory.by_bare_name or name in inventory.bare_buffers for name in names):
            return Rename(found[0], tuple(live.name for live in found), event)
    for event, name in _shorter(recorded):
        live = inventory.by_bare_name.get(name)
        if live is not None:
            return Rename(live, (live.name,), event)
    return None


def _longer(prefix: str, leaf: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for row in PARAMETRIZATIONS:
        yield f"{row.origin} was applied", tuple(f"{prefix}{row.home}{leaf}{ending}" for ending in row.endings)
    for wrapper in WRAPPERS:
        if wrapper.after:
            yield f"its module was wrapped, as in {wrapper.origin}", (f"{prefix}{wrapper.mark}.{leaf}",)


def _shorter(recorded: str) -> Iterator[tuple[str, str]]:
    for row in PARAMETRIZATIONS:
        for ending in row.endings:
            module, dot, leaf = recorded.removesuffix(ending).rpartition(".")
            before = f"{module}{dot}"
            if recorded.endswith(ending) and before.endswith(row.home):
                yield f"{row.origin} was removed", f"{before.removesuffix(row.home)}{leaf}"
    for wrapper in WRAPPERS:
        before, mark, leaf = recorded.rpartition(f"{wrapper.mark}.")
        if wrapper.after and mark and (not before or before.endswith(".")):
            yield f"its module is no longer in {wrapper.origin}", f"{before}{leaf}"
