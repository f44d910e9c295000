"""Signals that wait while the files of an output get their names."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["signals_put_off"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_active: list[bool] = []


@contextlib.contextmanager
def signals_put_off() -> Iterator[None]:
    """Let a signal wait until the block has ended, with or without an error. A second signal does not wait.

    A block in another one is a part of it.
    Nothing changes in other threads than the main thread: Python interrupts only that one.
    """
    if _active or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Any] = {}
    waiting: list[int] = []
    is_over = False

    def give_back() -> None:
        for number in tuple(handlers):
            signal.signal(number, handlers[number])
            del handlers[number]

    def put_off(number: int, _frame: FrameType | None) -> None:
        if waiting or is_over:
            waiting.clear()
            give_back()
            signal.raise_signal(number)
        else:
            waiting.append(number)

    _active.append(True)
    try:
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # None: of another language than Python
                handlers[number] = handler
                signal.signal(number, put_off)
        yield
    finally:
        is_over = True
        _active.clear()
        give_back()
        if waiting:
            signal.raise_signal(waiting[0])
