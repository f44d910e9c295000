"""Optimizer state by parameter names: read any form of torch, edit it like the weights, load it, write it.

``to_named`` reads a state; ``remap``, ``resplit``, ``prune`` and ``order_like`` return an edited one; ``to_dict`` gives
it back to torch. ``ckptkit.write_optimizer_state`` writes a file, ``ckptkit.load_optimizer_state`` loads into an
optimizer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptkit.optimizer_state.forms import to_dict
    from ckptkit.optimizer_state.groups import order_like, resplit
    from ckptkit.optimizer_state.naming import to_named
    from ckptkit.optimizer_state.pruning import prune
    from ckptkit.optimizer_state.remapping import remap

__all__ = ["order_like", "prune", "remap", "resplit", "to_dict", "to_named"]

# Each name is fetched when it is first used, because most commands need one or two of these modules.
_HOMES = {
    "order_like": "groups",
    "prune": "pruning",
    "remap": "remapping",
    "resplit": "groups",
    "to_dict": "forms",
    "to_named": "naming",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ckptkit.optimizer_state' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"ckptkit.optimizer_state.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
