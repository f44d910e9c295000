"""Pause the garbage collector, or let it collect rarely, during work that creates many objects and few cycles."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["pause_gc", "rare_gc"]

_OBJECTS = 100_000  # new ones before a collection; Python has 700
_lock = threading.Lock()
_outer: list[tuple[int, int, int]] = []  # for each block that has begun, the thresholds before the first


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
    Blocks of several threads may overlap: the last to end restores what was set before the first.
    """
    with _lock:
        if not _outer:
            before = gc.get_threshold()
            gc.set_threshold(max(before[0], _OBJECTS) if before[0] else 0, *before[1:])
            _outer.append(before)
        else:
            _outer.append(_outer[0])
    try:
        yield
    finally:
        with _lock:
            before = _outer.pop()
            if not _outer:
                gc.set_threshold(*before)
