"""Empty the caches of the user's code that hold tensors of the meta device."""

from __future__ import annotations

import functools
import gc
from typing import Any

__all__ = ["forget_meta_tensors"]

_DEEPEST_RESULT = 4  # a cache refers to its table, the table to entries, an entry to a result, a result to its items


def forget_meta_tensors() -> bool:
    """Empty each ``functools`` cache that holds a tensor of the meta device, and return whether there was one."""
    kind: type = type(functools.lru_cache(len))
    caches: list[Any] = [one for one in gc.get_objects() if type(one) is kind]
    stale = [cache for cache in caches if cache.cache_info().currsize and _holds_meta_tensors(cache)]
    for cache in stale:
        cache.cache_clear()
    return bool(stale)


def _holds_meta_tensors(cache: object) -> bool:
    """Return whether a tensor of the meta device is among the results of a cache, or in a container among them."""
    import torch

    level: list[object] = [cache]
    for _ in range(_DEEPEST_RESULT):
        held = gc.get_referents(*level)
        if any(issubclass(type(one), torch.Tensor) and one.is_meta for one in held):
            return True
        level = [
            one for one in held if issubclass(type(one), dict | tuple | list) or type(one).__name__ == "_lru_list_elem"
        ]
    return False
