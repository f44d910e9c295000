"""Pieces, threads and scratch buffers of the value engine, and the arrays that it makes of bytes."""

from __future__ import annotations

import resource
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.core.crc32 import joined_crc32
from ckptkit.core.files.local import LocalFile
from ckptkit.core.files.payloads import Extent
from ckptkit.values.arrays import array_of, bits_of
from ckptkit.values.reading import Source, Span, read_bytes, reads
from ckptkit.values.workers import Workers, pieces


class InChunks(NamedTuple):
    """A payload that can be read only from its beginning."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), 700_000):
            yield self.data[start : start + 700_000]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_order_of_the_tasks(threads: int, count: int) -> None:
    """The results come in the order of the tasks, however long each of them takes."""

    def work(task: int) -> int:
        time.sleep(0.002 * (task % 3 == 0))
        return task * task

    with Workers(threads) as workers:
        assert list(workers.each(work, range(count))) == [task * task for task in range(count)]


@pytest.mark.parametrize("first_thread", ["starts", "is refused"])
def test_all_tasks_are_done_where_the_system_refuses_a_thread(first_thread: str) -> None:
    """The caller does the tasks that no thread can do. No task runs on behind the last result."""
    stack = 1 << 30 if first_thread == "starts" else 1 << 31  # the stack of the first case may be kept
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    room = stack + stack // 2 if first_thread == "starts" else stack // 2
    running: list[int] = []
    threads: set[int] = set()

    def work(task: int) -> int:
        running.append(task)
        threads.add(threading.get_ident())
        time.sleep(0.01)
        running.remove(task)
        return task * task

    before = threading.stack_size(stack)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size + room, hard))
        with Workers(3) as workers:
            assert list(workers.each(work, range(9))) == [task * task for task in range(9)]
            assert not running
            assert list(workers.each(work, range(2))) == [0, 1]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        threading.stack_size(before)
    assert threading.get_ident() in threads
    assert len(threads) == (2 if first_thread == "starts" else 1)


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


@given(st.binary(max_size=50), st.binary(max_size=50), st.integers(0, 3_000_000))
@settings(max_examples=30)
def test_checksums_of_ranges_are_joined(first: bytes, second: bytes, zeros: int) -> None:
    """The checksum that is joined from those of two ranges is zlib's checksum of both together."""
    second += bytes(zeros)
    joined = joined_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
    assert joined == zlib.crc32(first + second)


def test_reads_hold_each_number_once(tmp_path: Path) -> None:
    """Whatever the spans and the pieces are, the reads of an item are its numbers in order, and none is cut."""
    data = np.random.default_rng(0).bytes(5_000_003)
    (tmp_path / "a").write_bytes(data)
    spans = (Span("w", 1, 5_000_001, 8), Span("v", 5, 2_100_001, 4), Span("u", 5_000_001, 5_000_003, 2))
    extent = Extent(LocalFile(str(tmp_path / "a")), 0, len(data))
    for payload in (extent, InChunks(data)):
        found = {"u": b"", "v": b"", "w": b""}
        whole = b""
        with Workers(1) as workers:
            for read in reads([Source(payload, spans, "label")]):
                part = bytes(read_bytes(read, workers))
                ((label, start, stop),) = read.labels
                assert label == "label"
                whole += part[start:stop]
                for item, first, last, width in read.spans:
                    assert (last - first) % width == 0
                    found[item] += part[first:last]
        assert whole == data
        assert found == {item: data[first:last] for item, first, last, _ in spans}


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
