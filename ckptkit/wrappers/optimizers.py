"""Where in a training checkpoint the state of an optimizer is: told by what ``state_dict()`` always has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["AN_OPTIMIZER", "FLAT_GROUPS", "FLAT_STATE", "find_optimizers", "is_optimizer_state"]

AN_OPTIMIZER: Final = "{optimizer}"  # in place of the name of a mapping inside: the one that is an optimizer's
FLAT_STATE: Final = "state."
FLAT_GROUPS: Final = "param_groups."
_DEEPEST = 4
_MOST_LOOKED_AT = 100_000


def is_optimizer_state(value: object) -> bool:
    """Return whether ``value`` has the form of an optimizer's ``state_dict()``, nested or flattened to names."""
    if not isinstance(value, Mapping) or not value:
        return False
    if "state" in value and "param_groups" in value:
        return isinstance(value["state"], Mapping) and isinstance(value["param_groups"], list | tuple)
    flat = all(isinstance(key, str) and key.startswith((FLAT_STATE, FLAT_GROUPS)) for key in value)
    return flat and any(key.startswith(FLAT_GROUPS) for key in value)


def find_optimizers(tree: object) -> list[tuple[object, ...]]:
    """Return the keys that lead to each optimizer's state in a nested value, in order; the value itself has none."""
    found: list[tuple[object, ...]] = []
    seen: set[int] = set()
    waiting: list[tuple[tuple[object, ...], object]] = [((), tree)]
    left = _MOST_LOOKED_AT
    while waiting and left > 0:
        path, value = waiting.pop()
        left -= 1
        if is_optimizer_state(value):
            found.append(path)
        elif isinstance(value, Mapping | list | tuple) and len(path) < _DEEPEST and id(value) not in seen:
            seen.add(id(value))
            pairs = list(value.items() if isinstance(value, Mapping) else enumerate(value))[:left]
            waiting += [
                ((*path, key), inner) for key, inner in reversed(pairs) if isinstance(inner, Mapping | list | tuple)
            ]
    return found
