"""Pause the garbage collector, or let it collect rarely, during work that creates many objects and few cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["pause_gc", "rare_gc"]

_OBJECTS = 100_000  # new ones before a collection; Python has 700


@contextmanager
def pause_gc() -> Iterator[None]:
    """Disable the garbage collector inside the ``with`` block, and enable it again if it was enabled before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def rare_gc() -> Iterator[None]:
    """Collect garbage after many more new objects inside the ``with`` block than Python does by default.

    The descriptions of a large checkpoint are not garbage, and the collector would look at all of them several times.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _OBJECTS) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
