"""Threads that share work in bounded pieces, and the scratch buffers of each thread."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ckptkit.core.checkpoint.payload import Payload, part_of, read_into
from ckptkit.core.closing import Closing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["PIECE", "Workers", "limited_threads", "pieces"]

# Numbers in a piece. Threads hand the interpreter's lock to each other too often in smaller pieces, and the buffers of
# larger pieces leave the cache.
PIECE: Final = 1 << 19
_MAX_THREADS: Final = 8
_WAITING: Final = 2  # tasks for each thread that are begun before their results are taken
_limit: ContextVar[int] = ContextVar("most threads of Workers", default=_MAX_THREADS)
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class Workers(Closing):
    """Threads, one for each processor, and the buffers of each thread.

    One object serves all tensors of a checkpoint. Close it, or use it as a context manager.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Use ``threads`` threads; by default one for each processor of this process, but at most 8.

        In a block of ``limited_threads``, the default has that limit.
        """
        self.threads = threads or min(len(os.sched_getaffinity(0)), _limit.get())
        self.stopped = False  # whether results of ``each`` are no longer taken: tasks that wait for others must end
        self._pool: ThreadPoolExecutor | None = None
        self._is_alone = False  # whether the system has refused a thread
        self._local = threading.local()

    def each(self, work: Callable[[_Task], _Result], tasks: Iterable[_Task]) -> Iterator[_Result]:
        """Yield ``work(task)`` for each task, in the order of the tasks; the threads do the work.

        ``tasks`` is advanced in the thread of the caller, and only a few tasks ahead of the results that are taken, so
        memory is bounded. One task alone is done in the thread of the caller, and so are all tasks after the system has
        refused a thread. If a task raises, later tasks that have begun end first, and the error is raised where its
        result would have been.
        """
        waiting: deque[tuple[_Task, Future[_Result] | None]] = deque()
        self.stopped = False
        remaining = iter(tasks)
        first = next(remaining, _NOTHING)
        if isinstance(first, _Nothing):
            return
        second = next(remaining, _NOTHING)
        if isinstance(second, _Nothing):
            yield work(first)
            return
        try:
            for task in chain((first, second), remaining):
                waiting.append((task, self._begin(work, task)))
                if len(waiting) > _WAITING * self.threads:
                    yield _first_result(work, waiting)
            while waiting:
                yield _first_result(work, waiting)
        except (KeyboardInterrupt, SystemExit):
            self.stopped = True
            _interrupt([future for _, future in waiting if future is not None])
            raise
        finally:
            self.stopped = bool(waiting)
            begun = [future for _, future in waiting if future is not None]
            for future in begun:
                future.cancel()
            for future in begun:
                if not future.cancelled():
                    future.exception()  # waits: the caller may close a file that the task reads

    def _begin(self, work: Callable[[_Task], _Result], task: _Task) -> Future[_Result] | None:
        """Give a task to the threads. Return None where the system refuses a thread: then the caller does the task."""
        if self._is_alone:
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads)
        try:
            return self._pool.submit(work, task)
        except RuntimeError:
            # The task is in the queue of the pool already, so the pool must not go on.
            self._is_alone = True
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            return None

    def buffer(self, name: str, dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
        """Return a scratch array for ``count`` numbers, which this thread gets again under this name and dtype.

        Its content is arbitrary. The array is valid until the thread asks for the same name again.
        """
        import numpy as np

        wanted: np.dtype[Any] = np.dtype(dtype)
        found: npt.NDArray[np.uint8] | None = getattr(self._local, name, None)
        if found is None or len(found) < count * wanted.itemsize:
            found = np.empty(count * wanted.itemsize, np.uint8)
            setattr(self._local, name, found)
        return found[: count * wanted.itemsize].view(wanted)

    def read(self, name: str, payload: Payload, start: int = 0, nbytes: int | None = None) -> memoryview:
        """Return ``nbytes`` bytes of a payload from its byte ``start``, in a buffer of this thread.

        The payload must be readable in any order (``is_seekable``) unless all of it is read. Raises what reading it
        raises.
        """
        count = payload.nbytes - start if nbytes is None else nbytes
        found: bytearray | None = getattr(self._local, f"bytes of {name}", None)  # checksums need no numpy
        if found is None or len(found) < count:
            found = bytearray(count)
            setattr(self._local, f"bytes of {name}", found)
        buffer = memoryview(found)[:count]
        read_into(payload if count == payload.nbytes else part_of(payload, start, count), buffer)
        return buffer

    def close(self) -> None:
        """End the threads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


@contextlib.contextmanager
def limited_threads(most: int) -> Iterator[None]:
    """Let each ``Workers`` that this thread makes in the block have at most this many threads, unless it names more."""
    before = _limit.set(min(most, _MAX_THREADS))
    try:
        yield
    finally:
        _limit.reset(before)


def _interrupt(begun: list[Future[Any]]) -> None:
    """Wait for tasks that have begun, but not for the answers of stores that these wait for."""
    from ckptkit.core.files.remote import stop_waiting

    for future in begun:
        future.cancel()
    while begun:
        stop_waiting()
        begun = list(wait(begun, 0.05).not_done)


def pieces(count: int, size: int = PIECE) -> Iterator[tuple[int, int]]:
    """Yield the first number and the end of each piece of ``count`` numbers; every piece but the last has ``size``."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _first_result(work: Callable[[_Task], _Result], waiting: deque[tuple[_Task, Future[_Result] | None]]) -> _Result:
    task, future = waiting[0]
    result = work(task) if future is None or future.cancelled() else future.result()
    waiting.popleft()  # not before: a signal can end the line above, and then the task still runs
    return result


class _Nothing:
    """No further task."""


_NOTHING: Final = _Nothing()
