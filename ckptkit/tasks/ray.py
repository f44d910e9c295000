"""``RayExecutor``: the tasks of an executor as tasks of Ray, which schedules them and repeats them."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, InvalidStateError
from concurrent.futures import wait as wait_for
from types import TracebackType
from typing import Any, Final, ParamSpec, TypeVar

from ckptkit.core.arguments import require_number
from ckptkit.core.text import quoted
from ckptkit.errors import ArgumentError, WorkerError, one_line
from ckptkit.tasks.same_code import Code, code_here

__all__ = ["RayExecutor"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_ANSWER_WITHIN: Final = 5.0  # seconds, of a machine that is asked for a connection
_CONNECT_WITHIN: Final = 30  # seconds; Ray itself asks for minutes
_ASK_EVERY: Final = 1.0  # second
_MOST_SIGNALS: Final = 4096  # that are noted while Ray starts
_AT_RAY_PER_CPU: Final = 2  # tasks: one runs, and one waits, which tells Ray that more CPUs would help
# Ray prints on stdout that a worker died, which it then repeats; its modules read this when they are imported.
_QUIET: Final = {"RAY_DEDUP_LOGS": "1", "RAY_DEDUP_LOGS_SKIP_REGEX": ".*"}
_QUIET_OPTIONS: Final = {"log_to_driver": False, "logging_level": logging.ERROR}
_MORE_MEMORY: Final = "give each worker more memory, or use fewer workers at a time (--jobs)"
_REFUSED: Final = "InvalidAuthToken"
_AUTHENTICATE: Final = "set RAY_AUTH_MODE=token, with the token of the cluster in ~/.ray/auth_token or RAY_AUTH_TOKEN"
_DONE: Final = "done"


class RayExecutor(Executor):
    """An executor whose tasks are tasks of Ray, on this machine or on a cluster.

    Ray schedules the tasks, one to a CPU, and spreads them over the nodes. Where a worker or a node died, it repeats
    the task. An error of the task itself is raised at once, as it is, with the error of Ray as its cause. Functions,
    arguments and results must be picklable, and ckptkit must be the same on all nodes.

    Example:
        >>> import concurrent.futures
        >>> issubclass(ckptkit.RayExecutor, concurrent.futures.Executor)
        True
    """

    def __init__(self, address: str | None = None, *, workers: int | None = None, max_retries: int = 3) -> None:
        """Connect to Ray.

        A program that has called ``ray.init`` stays connected as it is. Otherwise this connects to ``address``, by
        default to that in the environment variable ``RAY_ADDRESS``. Without any, a Ray of this machine is started,
        with ``workers`` CPUs, by default one for each processor, and is ended by ``shutdown``.

        Args:
            address: The ``host:port`` of a cluster, ``ray://host:port``, ``"auto"`` or ``"local"``.
            workers: The largest number of tasks at a time; by default one for each CPU of the cluster.
            max_retries: How often Ray repeats a task after the death of its worker or node.

        Raises:
            ArgumentError: Ray is not installed, or ``workers`` or ``max_retries`` is not a number that it can be.
            WorkerError: No cluster answers at ``address``.
        """
        if workers is not None:
            require_number(workers, "workers", "an int of at least 1, or None", at_least=1, whole=True)
        require_number(max_retries, "max_retries", "an int of at least 0", at_least=0, whole=True)
        self._wanted = workers
        self._lock = threading.Lock()
        self._waiting: dict[Future[Any], bytes] = {}
        self._begun: set[Future[Any]] = set()
        self._unfinished: set[Future[Any]] = set()
        self._is_shut = False
        self._ray, self._is_ours = _connected(address, workers)
        self._asked = -math.inf
        self._note_growth()
        # A task is done again only where its worker died: an error of its own would come again.
        self._task = self._ray.remote(
            num_cpus=1, max_retries=max_retries, retry_exceptions=False, scheduling_strategy="SPREAD"
        )(_task_function())

    @property
    def workers(self) -> int:
        """How many tasks can run at a time."""
        return self._wanted or self._cpus

    def submit(
        self, fn: Callable[_Arguments, _Result], /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Result]:
        """Return the future of a task of Ray. It can be cancelled until Ray gets the task.

        Ray gets at most ``workers`` tasks at a time. Without it, Ray gets twice as many as the cluster has CPUs, so
        that a cluster that can grow does. Raises ``RuntimeError`` after ``shutdown``.
        """
        call = self._ray.cloudpickle.dumps((fn, args, kwargs))
        future: Future[_Result] = Future()
        with self._lock:
            if self._is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._unfinished.add(future)
            self._waiting[future] = call
        future.add_done_callback(self._forget)
        self._note_growth()
        self._begin_waiting()
        return future

    def _note_growth(self) -> None:
        """Ask how many CPUs the cluster has, once a second: it may have got more nodes."""
        now = time.monotonic()
        if now - self._asked >= _ASK_EVERY:
            self._asked = now
            self._cpus = max(int(self._ray.cluster_resources().get("CPU", 1)), 1)

    def _begin_waiting(self) -> None:
        """Give Ray the tasks that wait, while it has room for them.

        Ray's own ``cancel`` is not used: where a task ends at the same time, it aborts this process (Ray 2.60).
        """
        while True:
            with self._lock:
                if not self._waiting or len(self._begun) >= (self._wanted or _AT_RAY_PER_CPU * self._cpus):
                    return
                future = next(iter(self._waiting))
                call = self._waiting.pop(future)
                if not future.set_running_or_notify_cancel():
                    continue
                self._begun.add(future)
            reference = self._task.remote(tuple(code_here()), call)  # a worker may have no ckptkit
            reference.future().add_done_callback(functools.partial(_take_result, future))

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._unfinished.discard(future)
            self._begun.discard(future)
            if self._waiting.pop(future, None) is not None:
                future.set_running_or_notify_cancel()  # a thread that waits for it learns that no result comes
        self._begin_waiting()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, wait for all that there are, and disconnect from Ray, if this object has connected to it.

        Without ``wait``, tasks that are not finished when this disconnects end with a ``WorkerError``.
        """
        with self._lock:
            self._is_shut = True
            unfinished = list(self._unfinished)
        if cancel_futures or (self._is_ours and not wait):
            for future in unfinished:
                future.cancel()
        if wait:
            wait_for(unfinished)
        if self._is_ours:
            self._is_ours = False
            self._ray.shutdown()
            for future in unfinished:
                with contextlib.suppress(InvalidStateError):  # it is finished or cancelled
                    future.set_exception(WorkerError("Ray was shut down before this task was done"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Shut down; after an error in the block, without waiting for tasks."""
        self.shutdown(wait=error is None, cancel_futures=error is not None)


def _take_result(future: Future[Any], done: Future[Any]) -> None:
    """Give a future the result of Ray's own one."""
    value: Any = None
    error: BaseException | None
    try:
        answer, value = done.result()
        error = None if answer == _DONE else _other_code(*value)
    except BaseException as raised:  # noqa: BLE001 - it is raised where the result is asked for
        error = _as_raised(raised)
    with contextlib.suppress(InvalidStateError):  # the executor is shut down
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


def _task_function() -> Callable[..., tuple[str, Any]]:
    """Return the function that workers run.

    It is inside another function, so that Ray sends its code and not its name: a worker without ckptkit can answer.
    """

    def run_task(wanted: tuple[object, ...], call: bytes) -> tuple[str, object]:
        import socket

        from ray import cloudpickle

        try:
            from ckptkit.tasks.same_code import code_here
        except ImportError:
            return "other code", (socket.gethostname(), None)
        found = code_here()
        if tuple(found) != wanted:
            return "other code", (socket.gethostname(), tuple(found))
        function, args, kwargs = cloudpickle.loads(call)  # of the process that gave the task to Ray
        return "done", function(*args, **kwargs)

    return run_task


def _other_code(node: str, found: tuple[Any, ...] | None) -> WorkerError:
    if found is None:
        return WorkerError(f"ckptkit is not installed on node {node}", hint="install the same ckptkit on every node")
    what, here, there = code_here().difference(Code(*found))
    return WorkerError(
        f"node {node} has another {what} ({there}) than this process ({here})",
        hint=f"install the same {what} on every node, and start Ray there again",
    )


def _as_raised(error: BaseException) -> BaseException:
    """Return the error of a task as the task raised it, or one of an executor where Ray could not run the task."""
    from ray import exceptions

    if isinstance(error, exceptions.RayTaskError):
        cause: object = error.cause
        if isinstance(cause, BaseException) and not isinstance(cause, exceptions.RayError):
            cause.__cause__ = error
            return cause
    if isinstance(error, exceptions.RayError):
        ended = WorkerError(_why_ended(error, exceptions), hint=_MORE_MEMORY)
        ended.__cause__ = error
        return ended
    return error


def _why_ended(error: BaseException, exceptions: Any) -> str:
    """Return why Ray could not finish a task; its own texts have many lines."""
    for kind, reason in (
        ("OutOfMemoryError", "Ray ended its worker each time, because the node had no memory left"),
        ("NodeDiedError", "its node ended each time that Ray ran it"),
        ("WorkerCrashedError", "its worker ended each time that Ray ran it"),
    ):
        if isinstance(error, getattr(exceptions, kind, ())):
            return reason
    return f"Ray could not run it: {_first_line(error)}"


def _connected(address: str | None, workers: int | None) -> tuple[Any, bool]:
    """Return the module ray, connected, and whether this has connected it."""
    with _environment(_QUIET):
        try:
            import ray
        except ImportError:
            raise ArgumentError(
                "the engine ray needs ray, which is not installed", hint="install the extra [ray]"
            ) from None
        if ray.is_initialized():
            return ray, False
        given = address or os.environ.get("RAY_ADDRESS") or "local"
        if given == "local":
            _start(ray, workers)
        else:
            _refuse_silence(given)
            _connect(ray, given)
    return ray, True


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set those variables of the environment that the user has not set."""
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _refuse_silence(address: str) -> None:
    """Raise ``WorkerError`` where nothing listens at ``host:port``, which Ray would ask for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # such as auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_WITHIN).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _no_cluster(address, reason.lower()) from None


def _no_cluster(address: str, reason: str) -> WorkerError:
    hint = "start Ray there, or leave RAY_ADDRESS out: then Ray starts on this machine"
    return WorkerError(f"no Ray cluster answers at {quoted(address)}: {reason}", hint=hint)


def _start(ray: Any, workers: int | None) -> None:
    """Start Ray on this machine. Its processes end with the thread that starts them, so it is that of the caller."""
    with _kept_handler(signal.SIGTERM):
        try:
            ray.init("local", num_cpus=workers, include_dashboard=False, **_QUIET_OPTIONS)
        except Exception as error:
            raise WorkerError(f"Ray does not start on this machine: {_first_line(error)}") from error


@contextlib.contextmanager
def _kept_handler(number: signal.Signals) -> Iterator[None]:
    """Give a signal that comes in the block to the handler of before, at the end of the block.

    Ray sets a handler that exits with another status, and Python loses an exit where it runs a callback just then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        other = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(other)
            signal.signal(number, signal.SIG_DFL if before is None else before)
            writer.close()
            if number in reader.recv(_MOST_SIGNALS):
                signal.raise_signal(number)


def _connect(ray: Any, address: str) -> None:
    """Connect to a cluster, in a thread that can be left behind: Ray may wait for minutes."""
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            ray.init(address, **_QUIET_OPTIONS)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True, name="ckptkit-ray")
    thread.start()
    thread.join(_CONNECT_WITHIN)
    if thread.is_alive():
        raise _no_cluster(address, f"no answer within {_CONNECT_WITHIN} seconds")
    if errors:
        raise _not_connected(address, errors[0]) from errors[0]


def _not_connected(address: str, error: BaseException) -> WorkerError:
    """Return why Ray did not connect; only the cause of its error says that a cluster has a token."""
    if any(_REFUSED in str(told) for told in (error, error.__cause__)):
        return WorkerError(
            f"the Ray cluster at {quoted(address)} refused this process: it has a token", hint=_AUTHENTICATE
        )
    return _no_cluster(address, _first_line(error))


def _first_line(error: BaseException) -> str:
    return one_line(str(error).strip().partition("\n")[0]).rstrip(".")
