"""Run requests on fsspec's event loop, or calls of a library that has no coroutines in threads of their own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

__all__ = ["finish", "in_thread", "on_fork", "start", "stop_waiting"]

T = TypeVar("T")
_resets: list[Callable[[], None]] = []
_waited_for: list[Future[Any]] = []
_stopped: weakref.WeakSet[Future[Any]] = weakref.WeakSet()


def start(request: Coroutine[Any, Any, T]) -> Future[T]:
    """Begin a request on the loop of fsspec, which is a thread that ends with the process, and do not wait."""
    from fsspec.asyn import get_loop

    return asyncio.run_coroutine_threadsafe(request, get_loop())


def finish(future: Future[T]) -> T:
    """Wait for a request and return its result. After Ctrl-C, the request is cancelled and not waited for."""
    _waited_for.append(future)
    try:
        return future.result()
    except (KeyboardInterrupt, SystemExit):
        future.cancel()
        raise
    except CancelledError:
        if future in _stopped:
            raise KeyboardInterrupt from None
        raise
    finally:
        _waited_for.remove(future)


def stop_waiting() -> None:
    """Cancel every request that a thread waits for; ``finish`` raises ``KeyboardInterrupt`` there."""
    for future in _waited_for.copy():
        _stopped.add(future)
        future.cancel()


async def in_thread(call: Callable[[], T]) -> T:
    """Return what ``call`` returns in a thread of its own, for which the end of the process does not wait."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Future[T] = loop.create_future()

    def set_result(result: T | None, error: BaseException | None) -> None:
        if waiting.done():  # cancelled
            return
        if error is None:
            waiting.set_result(result)  # type: ignore[arg-type]
        else:
            waiting.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - it is raised again where the result is awaited
            failure = RuntimeError("stopped") if isinstance(error, StopIteration) else error
        if not loop.is_closed():
            loop.call_soon_threadsafe(set_result, result, failure)

    threading.Thread(target=run, name="ckptkit request", daemon=True).start()
    return await waiting


def on_fork(reset: Callable[[], None]) -> Callable[[], None]:
    """Call ``reset`` in each child process: it has no event loop, and locks may be held by threads it does not have."""
    _resets.append(reset)
    return reset


def _reset_all() -> None:
    asyn = sys.modules.get("fsspec.asyn")
    if asyn is not None:
        asyn.reset_lock()  # older versions keep the loop of the parent, which no thread runs here
    for reset in _resets:
        reset()


os.register_at_fork(after_in_child=_reset_all)
