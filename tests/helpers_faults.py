"""Make system calls fail, or kill the process at them, and compare the output with the old and the new one."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from ckptkit import choose_output, execute, open_checkpoint, plan_remap
from ckptkit.errors import CkptkitError, OutputError
from tests.helpers_outputs import names_in, sha256, tensor_of

ROOT = Path(__file__).parent.parent
CALLS = ("open", "pwrite", "copy_file_range", "posix_fallocate", "fsync", "replace", "rename", "mkdir",
         "chmod", "link", "symlink", "ftruncate", "close", "pread", "preadv", "ioctl")  # fmt: skip
CHANGING = tuple(name for name in CALLS if name not in ("pread", "preadv", "open", "close"))  # what is on the disk
NEW = {"a.weight": tensor_of("F32", (40, 3)), "a.bias": tensor_of("F32", (40,), 1), "b": tensor_of("BF16", (50,), 2)}
OLD = {"old": tensor_of("F64", (70,), 3), "older": tensor_of("U8", (30,), 4)}


class Case(NamedTuple):
    """An input, an output, the largest shard where it is a directory, and the dtype of its tensors if they are cast."""

    name: str
    out: str
    shards: int | None = None
    dtype: str | None = None


TEMPORARY = re.compile(r"out.*\.ckptkit-\d+-[0-9a-f]{8}\.tmp")


def saved(path: Path, state: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        run = {"model": state, "optimizer": {"state": list(state.values())}, "epoch": 3}
        torch.save(run if path.stem == "run" else state, path)
    return path


def write(state: Any, out: Path, shards: int | None, dtype: str | None = None) -> None:
    execute(plan_remap(state, dtype=dtype), state, choose_output(out, max_shard_size=shards, force=True))


def outcome(act: Callable[[], object]) -> CkptkitError | None:
    """Return the CkptkitError of a call, or None where it succeeded; other errors are raised."""
    try:
        act()
    except CkptkitError as refusal:
        return refusal
    return None


def content(path: Path) -> dict[str, str] | None:
    """Return the digest of each file at a path, or None where the path does not exist."""
    if path.is_dir():
        return {name: sha256(path / name) for name in names_in(path)}
    return {path.name: sha256(path)} if path.exists() else None


def module_of(call: str) -> Any:
    """Return the module that has a system call."""
    return fcntl if call == "ioctl" else os


class Faults:
    """Counts system calls by name and makes chosen calls fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...] = CALLS) -> None:
        self.monkeypatch = monkeypatch
        self.calls = calls
        self.count = 0
        self.lock = threading.Lock()

    def arm(self, nth: int, error: int) -> None:
        """Make only the ``nth`` call from now on fail."""
        self.count = 0
        for name in self.calls:
            self.monkeypatch.setattr(module_of(name), name, self._wrapped(name, nth, error))

    def _wrapped(self, name: str, nth: int, error: int) -> Callable[..., Any]:
        real = getattr(module_of(name), name)

        def call(*args: Any, **options: Any) -> Any:
            # shutil.rmtree cleans up through the others
            if "dir_fd" not in options and not (name == "close" and os.path.isdir(f"/proc/self/fd/{args[0]}")):
                with self.lock:
                    self.count += 1
                    is_nth = self.count == nth
                if is_nth:
                    raise OSError(error, os.strerror(error))
            return real(*args, **options)

        return call

    def disarm(self) -> None:
        self.monkeypatch.undo()


def expected(tmp_path: Path, source: Path, case: Case) -> tuple[Any, Any]:
    """Return the old and the new content of the output, written without failures."""
    _, out, shards, dtype = case
    place = tmp_path / "made"
    place.mkdir()
    write(OLD, place / out, shards)
    old = content(place / out)
    if shards:
        (place / out / "config.json").write_text("{}")
        old = content(place / out)
    with open_checkpoint(source) as checkpoint:
        write(checkpoint, place / out, shards, dtype)
    return old, content(place / out)


def outputs_before(tmp_path: Path, case: Case, *, present: bool = True) -> Path:
    """Return a directory with the old output, to copy for each run."""
    before = tmp_path / "before"
    before.mkdir()
    if present:
        write(OLD, before / case.out, case.shards)
        if case.shards:
            (before / case.out / "config.json").write_text("{}")
    return before


def fail_each_call(
    case: Case, source: Path, tmp_path: Path, faults: Faults, error: int = errno.EIO, *, present: bool = True
) -> None:
    """Run the case until its n-th system call does not fail any more, for n = 1 on."""
    _, out, shards, dtype = case
    old, new = expected(tmp_path, source, case)
    digest, place, before = sha256(source), tmp_path / "place", outputs_before(tmp_path, case, present=present)
    for nth in itertools.count(1):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(before, place)
        with open_checkpoint(source) as checkpoint:
            plan = plan_remap(checkpoint, dtype=dtype)
            output = choose_output(place / out, max_shard_size=shards, force=True)
            faults.arm(nth, error)
            refusal = outcome(lambda: execute(plan, checkpoint, output))  # noqa: B023 - called at once
            faults.disarm()
        found = content(place / out)
        wanted_new = new if present or not shards else {key: new[key] for key in new if key != "config.json"}
        assert found in ((old if present else None), wanted_new), nth
        assert names_in(place) == ([out] if found else []), nth
        assert sha256(source) == digest
        if refusal is not None:
            assert isinstance(refusal, OutputError) or refusal.path == str(source)
            assert ".ckptkit-" not in str(refusal)
        if faults.count < nth:
            assert refusal is None
            assert found == wanted_new
            assert nth > 8
            return


KILLED = """
import fcntl, json, os, shutil, signal, sys
from ckptkit import *
from ckptkit.values import cast_payload
source, old, place, out, shards, dtype, calls = json.loads(sys.argv[1])
execute_now = execute  # imported before the fork, as is all that it needs
cast_payload.PIECE = 60
results = []
for nth in range(1, 1000):
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(old, place)
    child = os.fork()
    if child == 0:
        with open_checkpoint(source) as checkpoint:
            plan = plan_remap(checkpoint, dtype=dtype)
            count = 0
            def wrapped(real):
                def call(*args, **options):
                    global count
                    count += 1
                    if count == nth:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **options)
                return call
            for name in calls:
                module = fcntl if name == "ioctl" else os
                setattr(module, name, wrapped(getattr(module, name)))
            execute(plan, checkpoint, choose_output(os.path.join(place, out), max_shard_size=shards, force=True))
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.copytree(place, f"{place}.{nth}")
    results.append(status)
    if status != -9:
        break
print(json.dumps(results))
"""


def kill_at_each_call(case: Case, source: Path, tmp_path: Path) -> None:
    """Run the case in a process that is killed at its n-th system call, for n = 1 until it ends."""
    _, out, shards, dtype = case
    old, new = expected(tmp_path, source, case)
    digest, place = sha256(source), tmp_path / "place"
    task = json.dumps([str(source), str(outputs_before(tmp_path, case)), str(place), out, shards, dtype, CHANGING])
    done = subprocess.run([sys.executable, "-c", KILLED, task], cwd=ROOT, check=True, capture_output=True, text=True)
    statuses = json.loads(done.stdout)
    assert set(statuses[:-1]) == {-9}
    assert statuses[-1] == 0
    assert len(statuses) > 8
    outcomes = []
    for nth in range(1, len(statuses) + 1):
        after = tmp_path / f"place.{nth}"
        outcomes.append(content(after / out))
        assert outcomes[-1] in (old, new), nth
        assert all(TEMPORARY.fullmatch(litter) for litter in names_in(after) if litter != out)
    assert outcomes[0] == old
    assert outcomes[-1] == new
    assert sha256(source) == digest
