"""Run independent tasks on any executor of ``concurrent.futures``: a few at a time, with results in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from typing import Final, TypeVar

from ckptkit.errors import CkptkitError, WorkerError
from ckptkit.tasks.processes import limit_process, threads_of_worker
from ckptkit.values.workers import limited_threads

__all__ = ["run_tasks"]

_MOST_IN_FLIGHT: Final = 256  # of which an executor runs as many as it has workers; the others wait in its queue
_PATIENCE: Final = 20.0  # seconds for running tasks to notice that they must stop
_FEWER: Final = "give each worker more memory, or use fewer workers (--jobs)"
_FEWER_CALL: Final = (
    "give each worker more memory, or use fewer workers; a script must start processes under if __name__ == '__main__'"
)
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def run_tasks(
    executor: Executor,
    function: Callable[[_Task], _Result],
    tasks: Iterable[_Task],
    *,
    name: Callable[[_Task], str],
    done: Callable[[_Task, _Result], None] = lambda _task, _result: None,
    stop: Callable[[], None] | None = None,
    most_in_flight: int = 0,
) -> Iterator[_Result]:
    """Yield ``function(task)`` for each task, in the order of the tasks; the workers of the executor do the work.

    For workers in other processes, ``function`` must be a function of a module, and tasks, results and errors must
    survive pickling. A worker may run a task twice, so the function must do no harm then. ``Workers`` that a task makes
    have as many threads as ``threads_of_worker`` says.

    At most ``most_in_flight`` tasks are given to the executor and not finished: by default 256, or twice as many as it
    has workers, if it has the attribute ``workers``. ``tasks`` is advanced only when one is given. ``done`` is called
    with each task and its result as soon as it is finished, in any order and in the thread of the caller: it advances a
    bar of progress, or records the result.

    After an error, an interrupt, or where the caller takes no more results, no further task begins, and tasks that wait
    are cancelled. ``stop``, if given, tells the running ones to stop, and they have 20 seconds for it. An executor with
    the method ``stop_tasks`` ends them at once.

    Raises:
        CkptkitError: A task raised it. It keeps its class, path and hint, and its reason begins with ``name(task)``.
            Any other error of a task gets the name as a note.
        WorkerError: A worker ended before its task was done.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> with ThreadPoolExecutor(2) as executor:
        ...     list(run_tasks(executor, abs, [-3, 2, -1], name=str))
        [3, 2, 1]
    """
    waiting = iter(tasks)
    running: dict[Future[_Result], tuple[int, _Task]] = {}
    finished: dict[int, _Result] = {}
    begun = taken = 0
    is_broken = False
    most = most_in_flight or max(_MOST_IN_FLIGHT, 2 * getattr(executor, "workers", 0))
    try:
        while True:
            for task in waiting:
                running[_submit(executor, function, task, name)] = begun, task
                begun += 1
                if len(running) >= most:
                    break
            if not running:
                return
            ended = wait(running, return_when=FIRST_COMPLETED).done
            # What is finished counts also where another task failed.
            for future in sorted(ended, key=lambda future: (_has_failed(future), running[future][0])):
                number, task = running[future]
                is_broken = _is_broken(future)
                result = _result(future, task, name)
                del running[future]
                done(task, result)
                finished[number] = result
            while taken in finished:
                yield finished.pop(taken)
                taken += 1
    finally:
        if running:
            _end(executor, [] if is_broken else running, stop)


def _submit(
    executor: Executor, function: Callable[[_Task], _Result], task: _Task, name: Callable[[_Task], str]
) -> Future[_Result]:
    try:
        return executor.submit(_run, os.getpid(), function, task)
    except BrokenExecutor:
        raise _worker_error(name(task)) from None


def _run(caller: int, function: Callable[[_Task], _Result], task: _Task) -> _Result:
    """Do a task in a worker, for the process ``caller``."""
    threads = threads_of_worker()
    if os.getpid() != caller:
        limit_process(threads)
    with limited_threads(threads):
        return function(task)


def _is_broken(future: Future[_Result]) -> bool:
    return not future.cancelled() and isinstance(future.exception(), BrokenExecutor)


def _has_failed(future: Future[_Result]) -> bool:
    return future.cancelled() or future.exception() is not None


def _result(future: Future[_Result], task: _Task, name: Callable[[_Task], str]) -> _Result:
    try:
        return future.result()
    except (BrokenExecutor, CancelledError):
        raise _worker_error(name(task)) from None
    except CkptkitError as error:
        error.reason = f"{name(task)}: {error.reason}"
        raise
    except Exception as error:
        error.add_note(f"ckptkit ran {name(task)}")
        raise


def _worker_error(name: str) -> WorkerError:
    return WorkerError(
        f"{name}: a worker ended before its task was done; the system may have ended it for its memory",
        hint=_FEWER,
        call=_FEWER_CALL,
    )


def _end(executor: Executor, running: Iterable[Future[_Result]], stop: Callable[[], None] | None) -> None:
    """Cancel the tasks that wait, and let the running ones stop."""
    stop_tasks: Callable[[], None] | None = getattr(executor, "stop_tasks", None)
    # An executor of processes that break prints a traceback about each task that is cancelled: it ends them itself.
    left = [future for future in running if stop_tasks is not None or not future.cancel()]
    if stop is not None:
        stop()
    if stop_tasks is not None:
        stop_tasks()
    if stop is not None:
        wait(left, _PATIENCE)
