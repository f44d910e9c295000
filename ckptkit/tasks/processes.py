"""Processes of this machine as an executor, which end with the process that uses them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["limit_process", "local_processes", "threads_of_worker"]

_THREADS: Final = "OMP_NUM_THREADS"  # Ray, Dask and joblib set it in their workers, and torch obeys it
_NOT_FOR_WORKERS: Final = (signal.SIGINT, signal.SIGHUP)  # a terminal sends them to all processes of a command
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def threads_of_worker() -> int:
    """Return how many threads a task may use in this process: ``OMP_NUM_THREADS``, or 1 where it is not set."""
    given = os.environ.get(_THREADS, "").split(",")[0].strip()
    return max(int(given), 1) if given.isdecimal() and given.isascii() else 1


def limit_process(threads: int) -> None:
    """Let torch use at most so many threads in this process, also where it is imported later.

    In a process that was forked from one with threads of torch, torch would wait for them without end.
    """
    os.environ.setdefault(_THREADS, str(threads))
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > threads:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def local_processes(jobs: int) -> Iterator[Executor]:
    """Give an executor of ``jobs`` processes, which share the cores: each uses as many threads as it has of them.

    A process starts when there is a task for it, in a new interpreter: nothing is forked beside threads. After an
    error or an interrupt, and where this process is killed, the workers end at once.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    reader, writer = multiprocessing.Pipe(duplex=False)
    with _blocked_signals():  # the process that multiprocessing has for its locks starts now
        pool = ProcessPoolExecutor(
            jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin_worker,
            initargs=(reader, threads),
        )
    executor = _Processes(jobs, pool, writer)
    try:
        yield executor
    except BaseException:
        executor.stop_tasks()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        executor.stop_tasks()
        reader.close()


class _Processes(Executor):
    """Processes that never see the signals of the terminal, not even before they can ignore them."""

    def __init__(self, workers: int, pool: Executor, writer: Connection) -> None:
        self.workers = workers
        self._pool, self._writer = pool, writer

    def stop_tasks(self) -> None:
        """End the workers at once, whatever they do."""
        self._writer.close()

    def submit(
        self, fn: Callable[_Parameters, _Result], /, *args: _Parameters.args, **kwargs: _Parameters.kwargs
    ) -> Future[_Result]:
        """Give a task to the processes, of which one may start now."""
        with _blocked_signals():
            return self._pool.submit(fn, *args, **kwargs)


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Block the signals of the terminal, also for processes that start in the block, as long as they live."""
    # Python starts with a handler that prints a traceback, before any code of ours could change that.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(reader: Connection, threads: int) -> None:
    """Prepare a new process: limit its threads, and end it as soon as the other end of the pipe is closed."""
    given = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(threads if given is None else min(threads_of_worker(), threads))

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(reader.fileno(), 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
