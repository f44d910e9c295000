"""Pieces, threads and scratch buffers of the value engine, and the arrays that it makes of bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from ckptkit.core.files import Extent, LocalFile
from ckptkit.values.arrays import array_of, bits_of
from ckptkit.values.workers import Workers, pieces


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_order_of_the_tasks(threads: int, count: int) -> None:
    """The results come in the order of the tasks, however long each of them takes."""

    def work(task: int) -> int:
        time.sleep(0.002 * (task % 3 == 0))
        return task * task

    with Workers(threads) as workers:
        assert list(workers.each(work, range(count))) == [task * task for task in range(count)]


def test_few_tasks_are_begun_ahead() -> None:
    """Tasks are taken as results are taken, so that waiting tasks never hold much memory."""
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(1000):
            taken.append(task)
            yield task

    with Workers(2) as workers:
        results = workers.each(lambda task: task, tasks())
        assert [next(results) for _ in range(10)] == list(range(10))
        assert len(taken) <= 20


def test_an_error_ends_the_work_that_has_begun() -> None:
    """An error comes in the place of its result, and no task runs on afterwards."""
    running = threading.Semaphore(0)
    ended: list[int] = []

    def work(task: int) -> int:
        if task == 3:
            raise ValueError("the third")
        running.release()
        ended.append(task)
        return task

    with Workers(2) as workers:
        results = workers.each(work, range(20))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="the third"):
            next(results)
        begun = len(ended)
        time.sleep(0.02)
        assert len(ended) == begun < 19


def test_each_thread_has_its_own_buffers() -> None:
    """A buffer keeps its content until its thread asks for it again: threads never write to the same memory."""
    barrier = threading.Barrier(2, timeout=10)

    def work(task: int) -> bool:
        mine = workers.buffer("work", "f4", 1000)
        mine[:] = task
        barrier.wait()
        return bool((mine == task).all()) and workers.buffer("work", "i8", 500).shape == (500,)

    with Workers(2) as workers:
        assert list(workers.each(work, range(10))) == [True] * 10


def test_pieces_of_a_file_make_the_whole(tmp_path: Path) -> None:
    """The pieces of a file, each read by a thread, are together the bytes of the file."""
    data = np.random.default_rng(0).bytes(100_001)
    (tmp_path / "a").write_bytes(data)
    extent = Extent(LocalFile(str(tmp_path / "a")), 1, 100_000)

    with Workers(2) as workers:
        read = workers.each(
            lambda piece: bytes(workers.read("bytes", extent, piece[0], piece[1] - piece[0])),
            pieces(extent.nbytes, 1024),
        )
        assert b"".join(read) == data[1:]
        assert workers.read("bytes", extent) == data[1:]


@pytest.mark.parametrize("code", ["BF16", "F8_E5M2", "F16", "F64"])
def test_arrays_of_bytes(code: str) -> None:
    """The array of the bytes of a tensor has its values, and its bits as integers, from any address."""
    names = {"BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F16": "float16", "F64": "float64"}
    tensor = torch.linspace(-3, 3, 7).to(getattr(torch, names[code]))
    raw = bytes(tensor.view(torch.uint8).tolist())
    array = array_of(memoryview(b"x" + raw)[1:], code)
    assert array.dtype == np.dtype(getattr(ml_dtypes, names[code], None) or names[code])
    assert array.astype("f8").tolist() == tensor.double().tolist()
    bits = bits_of(raw, code)
    assert bits.dtype.kind == "u"
    assert bits.tobytes() == raw
    with pytest.raises(ValueError, match="F4"):
        array_of(raw, "F4")
