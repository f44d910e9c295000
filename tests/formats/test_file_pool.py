"""Many files of which few are open: threads read at once, and no file is closed under a thread that reads it."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptkit.core.files import pool as file_pool
from ckptkit.core.files.local import LocalFile
from ckptkit.core.files.places import folder_at
from ckptkit.core.files.pool import FilePool
from ckptkit.errors import ChangedError, PathError


def _pool(folder: Path, count: int) -> FilePool:
    for number in range(count):
        (folder / str(number)).write_bytes(bytes([number]) * 4096)
    return FilePool(folder_at(str(folder)))


def test_threads_read_the_right_bytes_though_files_are_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two files open at most, four threads read eight files; every read returns the bytes of its own file."""
    monkeypatch.setattr(file_pool, "_MOST_OPEN", 2)
    pool = _pool(tmp_path, 8)
    files = [pool.get(str(number)) for number in range(8)]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def read(turn: int) -> bool:
        number = turn * 5 % 8
        return files[number].read(turn % 4000, 96) == bytes([number]) * 96

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(2000)))
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 2
    pool.close()


def test_a_read_waits_for_no_other_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads are inside a read of one file at the same time."""
    file = _pool(tmp_path, 1).get("0")
    both = threading.Barrier(2, timeout=10)
    read_into = LocalFile.read_into

    def wait_for_the_other(self: LocalFile, buffer: memoryview, offset: int) -> None:
        both.wait()
        read_into(self, buffer, offset)

    monkeypatch.setattr(LocalFile, "read_into", wait_for_the_other)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda offset: file.read_into(memoryview(bytearray(16)), offset), (0, 16)))


def test_a_file_is_closed_after_the_read_that_closing_the_pool_meets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that has begun ends with its bytes; a later read is refused."""
    pool = _pool(tmp_path, 1)
    file = pool.get("0")
    read_into = LocalFile.read_into

    def close_before(self: LocalFile, buffer: memoryview, offset: int) -> None:
        pool.close()
        read_into(self, buffer, offset)

    monkeypatch.setattr(LocalFile, "read_into", close_before)
    buffer = bytearray(b"?" * 16)
    file.read_into(memoryview(buffer), 0)
    assert buffer == bytes(16)
    with pytest.raises(PathError, match="closed"):
        file.read(0, 16)


def test_a_file_is_not_closed_while_the_kernel_copies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its descriptor could belong to another file, whose bytes would be copied."""
    monkeypatch.setattr(file_pool, "_MOST_OPEN", 1)
    pool = _pool(tmp_path, 3)
    file = pool.get("1")
    assert isinstance(file, LocalFile)
    with file.descriptor() as descriptor:
        for name in ("0", "2"):
            assert pool.get(name).read(0, 1) == bytes([int(name)])
        assert os.pread(descriptor, 4, 0) == b"\1" * 4
    pool.close()


def test_a_file_that_was_replaced_while_it_was_closed_is_refused_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool opens a file again by its path; another file there is an error, also at the second try."""
    monkeypatch.setattr(file_pool, "_MOST_OPEN", 1)
    pool = _pool(tmp_path, 2)
    first = pool.get("0")
    pool.get("1")
    (tmp_path / "0").write_bytes(b"another")
    for _ in range(2):
        with pytest.raises(ChangedError, match="changed while it was read"):
            first.read(0, 4)
    pool.close()


def test_a_file_that_became_a_pipe_while_it_was_closed_is_refused_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is then closed: its descriptor may belong to another file of the process."""
    monkeypatch.setattr(file_pool, "_MOST_OPEN", 1)
    pool = _pool(tmp_path, 2)
    first = pool.get("0")
    pool.get("1")
    (tmp_path / "0").unlink()
    os.mkfifo(tmp_path / "0")
    with open(tmp_path / "1", "rb") as other:
        for _ in range(2):
            with pytest.raises(PathError, match="not a regular file"):
                first.read(0, 4)
        pool.close()
        assert other.read(1) == b"\1"


def test_a_file_is_opened_again_after_the_process_changed_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_pool, "_MOST_OPEN", 1)
    (tmp_path / "model").mkdir()
    _pool(tmp_path / "model", 2)
    monkeypatch.chdir(tmp_path)
    pool = FilePool(folder_at("model"))
    first = pool.get("0")
    pool.get("1")
    monkeypatch.chdir("/")
    assert first.read(0, 4) == bytes(4)
    assert first.path == os.path.join("model", "0")
    (tmp_path / "model" / "0").unlink()
    pool.get("1").read(0, 4)
    with pytest.raises(PathError, match="no such file") as caught:
        first.read(0, 4)
    assert caught.value.path == first.path
    pool.close()
