"""Tasks on executors: results in order, few in flight, errors that name their task and survive the way back."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit
from ckptkit import errors
from ckptkit.errors import CkptkitError
from ckptkit.tasks.inputs import opened_again, paths_of, send_input
from ckptkit.tasks.running import run_tasks

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CkptkitError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind: type[CkptkitError]) -> None:
    """An error of a worker has its class, path, hints and text in the process that asked for the work."""
    error = kind("it failed", hint="--force replaces it", path="a.pt")
    error.call = "do it otherwise"
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (str(back), vars(back)) == (str(error), vars(error))


class Slow(Executor):
    """An executor that begins a task only when ``step`` is called, the newest first."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], tuple[Any, ...]]] = []
        self.most = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Keep the task; with four of them, do the newest three."""
        future: Future[Any] = Future()
        self.waiting.append((future, args))
        self.most = max(self.most, len(self.waiting))
        if len(self.waiting) == 4:
            for done, given in reversed(self.waiting[1 if args[-1] < 9 else 0 :]):
                done.set_result(fn(*given, **kwargs))
            del self.waiting[1:]
        return future


def test_results_are_in_order_and_few_tasks_are_given() -> None:
    """A slow first task holds back no other, tasks are made when they are given, and ``done`` follows each at once."""
    made: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    executor, told = Slow(), []
    found = run_tasks(
        executor, lambda n: n * n, tasks(), name=str, done=lambda task, _: told.append(task), most_in_flight=4
    )
    assert next(found) == 0
    assert list(found) == [n * n for n in range(1, 10)]
    assert (made, executor.most, sorted(told)) == (list(range(10)), 4, list(range(10)))
    assert told[:3] != [0, 1, 2]


def test_error_names_its_task_and_cancels_the_others() -> None:
    """The error keeps its class; tasks that wait never begin, and running ones are told to stop."""
    began, stopped = [], threading.Event()

    def work(number: int) -> int:
        began.append(number)
        if number == 0:
            raise errors.ChangedError("the file changed", hint="run it again", path="a.pt")
        assert stopped.wait(10)
        return number

    with ThreadPoolExecutor(2) as executor:
        found = run_tasks(executor, work, range(50), name=lambda number: f"part {number}", stop=stopped.set)
        with pytest.raises(ckptkit.ChangedError, match=r"^a\.pt: part 0: the file changed \(run it again\)$"):
            list(found)
    assert len(began) <= 3


def test_other_error_has_the_name_as_a_note() -> None:
    """An error that is not of ckptkit stays as it is."""
    with ThreadPoolExecutor(1) as executor, pytest.raises(ZeroDivisionError) as caught:
        list(run_tasks(executor, lambda number: 1 // number, [0], name=lambda number: f"part {number}"))
    assert caught.value.__notes__ == ["ckptkit ran part 0"]


def test_dead_worker_is_one_sentence() -> None:
    """A worker that ended is an error with the way out, not one of the library of executors."""

    def broken(_number: int) -> int:
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    with ThreadPoolExecutor(1) as executor, pytest.raises(ckptkit.WorkerError, match=r"^part 3: a worker ended"):
        list(run_tasks(executor, broken, [3], name=lambda number: f"part {number}"))


def test_inputs_are_paths() -> None:
    """What is only in memory is refused by its role; a path is opened again, and a changed file is refused."""
    with pytest.raises(ckptkit.ArgumentError, match="the base is a dict"):
        paths_of({"base": {}})
    with ckptkit.open_checkpoint("fixtures/lenet_10class.pth") as checkpoint:
        with pytest.raises(ckptkit.ArgumentError, match="the base is an open Checkpoint"):
            paths_of({"base": checkpoint})
        sent = send_input("fixtures/lenet_10class.pth", checkpoint)
        with opened_again(pickle.loads(pickle.dumps(sent))) as again:
            assert dict(again) == dict(checkpoint)


def test_changed_input_is_refused(tmp_path: Path) -> None:
    """A worker does not read another file than the caller saw; the error has the path as the user wrote it."""
    file = tmp_path / "a.pth"
    data = Path("fixtures/lenet_10class.pth").read_bytes()
    file.write_bytes(data)
    with ckptkit.open_checkpoint(file) as checkpoint:
        sent = send_input(str(file), checkpoint)
    for other in (data, data[:-100], b""):  # what is cut is not even a valid file
        file.write_bytes(other)
        with pytest.raises(ckptkit.ChangedError, match="the file changed since the work began"), opened_again(sent):
            pass


def test_path_is_not_normalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker opens what the caller opened: the mapping of that name, behind that link; errors have the given path."""
    (tmp_path / "far" / "in").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/in")
    monkeypatch.chdir(tmp_path)
    torch.save({"a//b": {"w": torch.ones(2)}, "a/b": {"w": torch.zeros(2)}}, "far/x.pt")
    given = "link/../x.pt::a//b"
    with ckptkit.open_checkpoint(given) as checkpoint:
        sent = send_input(given, checkpoint)
        with opened_again(sent) as again:
            assert ckptkit.digest(again).contents == ckptkit.digest(checkpoint).contents
    Path("far/x.pt").unlink()
    with pytest.raises(ckptkit.PathError) as caught, opened_again(sent):
        pass
    assert caught.value.path == "link/../x.pt"
