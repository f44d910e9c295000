"""After any failure the output is the old or the new one, inputs are unchanged, and no temporary file is left."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit import Output, Plan, choose_output, execute, open_checkpoint, plan_remap
from ckptkit.core.files.local import LocalFile
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import OutputError, PlanError
from ckptkit.formats import open_optimizer
from ckptkit.formats.writing import copying
from ckptkit.formats.writing.atomic import AtomicFile
from ckptkit.formats.writing.copying import OffsetWriter
from ckptkit.formats.writing.outputs import write_small_file
from ckptkit.formats.writing.targets import prepare_side_file, present_state
from ckptkit.optimizer_state.forms import read_state
from ckptkit.optimizer_state.naming import to_named
from ckptkit.optimizer_state.write import write_optimizer_state
from ckptkit.plans.execute import check_output
from ckptkit.plans.saved import plan_from_json, plan_to_json
from ckptkit.values import cast_payload
from tests.helpers_cli import run_ckpt
from tests.helpers_faults import (
    NEW,
    OLD,
    Case,
    Faults,
    content,
    expected,
    fail_each_call,
    kill_at_each_call,
    outcome,
    saved,
    write,
)
from tests.helpers_outputs import names_in, same_state, tensor_of
from tests.hostile.contract import paused

CASES = [
    Case("in.safetensors", "out.safetensors"),
    Case("in.pt", "out.pt", dtype="F64"),  # in pieces, each of them read, cast and written by a thread
    Case("run.pt", "out.pt"),  # with an epoch and an optimizer, which are kept
    Case("in.pt", "out.safetensors", dtype="F64"),
    Case("in.safetensors", "out", 300),
]
CASTS = [case for case in CASES if case.dtype]
NAMES = ["-".join(str(part) for part in case if part) for case in CASES]
each_case = pytest.mark.parametrize("case", CASES, ids=NAMES)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cast so few numbers at once that several threads share each tensor."""
    monkeypatch.setattr(cast_payload, "PIECE", 60)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


FAILURES = [
    *(pytest.param(case, errno.EIO, present, id=f"{name}-{'old' if present else 'no'} output")
      for case, name in zip(CASES, NAMES, strict=True) for present in (True, False)),
    pytest.param(CASES[2], errno.ENOSPC, True, id="a full disk"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "error", "present"), FAILURES)
def test_any_system_call_may_fail(case: Case, error: int, present: bool, tmp_path: Path, faults: Faults) -> None:
    """The n-th call fails, for n = 1 until all succeed: each time one error, and exactly the old or new output."""
    fail_each_call(case, saved(tmp_path / case.name, NEW), tmp_path, faults, error, present=present)


STEPS: dict[str, tuple[Any, str]] = {
    "read": (LocalFile, "read_into"), "cast": (cast_payload, "cast_bytes"), "write": (OffsetWriter, "write"),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("case", CASTS, ids=[case.out for case in CASTS])
def test_any_error_in_a_thread_ends_the_run(
    case: Case, step: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read, a cast or a write fails: the error is raised, no thread works on, and only the old output is there."""
    source, place = saved(tmp_path / case.name, NEW), tmp_path / "place"
    place.mkdir()
    write(OLD, place / case.out, None)
    old = content(place / case.out)
    owner, name = step
    real = getattr(owner, name)
    for nth in (1, 2, 3):
        calls = itertools.count(1)

        def failing(*args: Any, **options: Any) -> Any:
            if next(calls) == nth:  # noqa: B023 - called in this round
                raise MemoryError
            return real(*args, **options)

        with open_checkpoint(source) as checkpoint:
            plan, output = plan_remap(checkpoint, dtype=case.dtype), choose_output(place / case.out, force=True)
            monkeypatch.setattr(owner, name, failing)
            with pytest.raises(MemoryError):
                execute(plan, checkpoint, output)
            ended = next(calls)
            assert content(place / case.out) == old
            assert names_in(place) == [case.out]
            assert next(calls) == ended + 1
            monkeypatch.setattr(owner, name, real)


def test_any_system_call_may_fail_in_the_threads_that_copy(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever thread fails, for its checksum or for the output: one error, no output, and no thread is left."""
    source, place = saved(tmp_path / "in.safetensors", NEW), tmp_path / "place"
    write(str(source), tmp_path / "first.pt", None)  # whether blocks can be shared here is tried only once
    threads = threading.active_count()  # fsspec keeps one after a test of stores
    for nth in itertools.count(1):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        with open_checkpoint(source) as checkpoint:
            plan, output = plan_remap(checkpoint), choose_output(place / "out.pt")
            monkeypatch.setattr(copying, "_PART", 128)
            monkeypatch.setattr(copying, "_PIECE", 48)
            faults.arm(nth, errno.EIO)
            refusal = outcome(lambda: execute(plan, checkpoint, output))  # noqa: B023 - called at once
            made = faults.count
            faults.disarm()
        assert threading.active_count() == threads
        # The directory could not be flushed after the output had its name: then the output is whole.
        assert names_in(place) == ([] if refusal else ["out.pt"]) or zipfile.ZipFile(place / "out.pt").testzip() is None
        if made < nth:
            assert refusal is None
            assert zipfile.ZipFile(place / "out.pt").testzip() is None
            assert same_state(torch.load(place / "out.pt", weights_only=True), NEW)
            assert nth > 20
            return


def test_an_input_that_the_disk_cannot_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel copies from one file to another, and does not say which of both has the error."""
    source = saved(tmp_path / "in.safetensors", NEW)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_checkpoint(source) as checkpoint:
        plan = plan_remap(checkpoint)
        monkeypatch.setattr(os, "copy_file_range", broken)
        monkeypatch.setattr(os, "preadv", broken)
        refusal = outcome(lambda: execute(plan, checkpoint, tmp_path / "out.safetensors"))
    assert refusal is not None
    assert (refusal.path, refusal.reason) == (str(source), "input/output error")
    assert names_in(tmp_path) == [source.name]


@pytest.mark.parametrize(("call", "options"), [("fsync", []), ("pwrite", ["--dtype", "bf16"])], ids=["disk", "threads"])
def test_a_signal_may_come_while_bytes_are_written(call: str, options: list[str], tmp_path: Path) -> None:
    """The disk writes early, and to the end; threads cast and write. All belong to a file without the final name."""
    source, out = tmp_path / "in.safetensors", tmp_path / "out.pt"
    save_file({"w": torch.zeros(12_000_000)}, source)
    out.write_bytes(b"old")
    with paused(call, "convert", source, "-o", out, "--force", *options) as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert out.read_bytes() == b"old"
    assert names_in(tmp_path) == [source.name, out.name]


@pytest.mark.parametrize("kind", ["a file", "a distributed checkpoint"])
def test_weights_are_never_there_without_the_files_that_go_along(kind: str, tmp_path: Path, faults: Faults) -> None:
    """Whichever call fails: a directory has everything or does not exist, and a file of weights comes last."""
    (tmp_path / "in").mkdir()
    save_file({"w": tensor_of("F32", (3,))}, tmp_path / "in" / "model.safetensors")
    texts = {"config.json": '{\n  "dtype": "float16"\n}\n', "tokenizer.json": "{}"}
    for name, text in texts.items():
        (tmp_path / "in" / name).write_text(text)
    out = tmp_path / "out"
    is_directory = kind != "a file"
    path, chosen = (out, "dcp") if is_directory else (out / "model.safetensors", None)
    for nth in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        if not is_directory:
            out.mkdir()
        with open_checkpoint(tmp_path / "in") as checkpoint:
            plan, output = plan_remap(checkpoint, dtype="bf16"), choose_output(path, format=chosen)
            faults.arm(nth, errno.EIO)
            refusal = outcome(lambda: execute(plan, checkpoint, output, carry=True))  # noqa: B023 - called at once
            faults.disarm()
        found = names_in(out) if out.exists() else []
        weights = [name for name in found if name not in texts]
        assert weights in ([], ["model.safetensors"], [".metadata", "__0_0.distcp"]), nth
        assert not weights or len(found) == len(weights) + len(texts), nth
        assert all((out / name).read_text() == text.replace("float16", "bfloat16")
                   for name, text in texts.items() if name in found)  # fmt: skip
        assert names_in(tmp_path) == (["in", "out"] if out.exists() else ["in"])
        if is_directory:
            assert bool(weights) == bool(found)
        assert weights or refusal is not None
        if faults.count < nth:
            assert refusal is None
            assert nth > 20
            return


def test_without_renameat2_the_old_directory_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without renameat2, a failure between both renames restores the old directory."""

    def no_library(*_: object, **__: object) -> object:
        return object()

    for nth in (1, 2, 3, 4):
        place = tmp_path / str(nth)
        place.mkdir()
        write(OLD, place / "out", 300)
        old = content(place / "out")
        faults = Faults(monkeypatch, ("rename",))
        monkeypatch.setattr(ctypes, "CDLL", no_library)
        faults.arm(nth, errno.EIO)
        refusal = outcome(lambda: write(NEW, place / "out", 300))  # noqa: B023 - called at once
        faults.disarm()
        assert isinstance(refusal, OutputError) == (nth < 4)
        found = content(place / "out")
        assert found is not None
        assert (found == old) == (nth <= 2)
        assert "out" in names_in(place)


SHORT = {
    "pwrite": lambda real: lambda fd, data, at: real(fd, bytes(data[:7]), at),
    "copy_file_range": lambda real: lambda src, dst, count, *at: real(src, dst, min(count, 5), *at),
    "preadv": lambda real: lambda fd, buffers, at: real(fd, [buffers[0][:3]], at),
    "pread": lambda real: lambda fd, count, at: real(fd, min(count, 11), at),
}


def unsupported(code: int) -> Callable[[Any], Callable[..., Any]]:
    def wrap(_: object) -> Callable[..., Any]:
        def call(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        return call

    return wrap


@pytest.mark.parametrize(
    "calls",
    [
        SHORT,
        {"copy_file_range": unsupported(errno.EXDEV)},
        {"copy_file_range": lambda _: lambda *_: 0},  # as some file systems do
        {"posix_fallocate": unsupported(errno.EOPNOTSUPP)},
        {"copy_file_range": unsupported(errno.EXDEV), **SHORT},
    ],
    ids=["short", "EXDEV", "nothing copied", "no reserve", "both"],
)
@each_case
def test_system_calls_may_do_less_than_asked(
    case: Case, calls: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short reads and writes, other file systems and no reservation give the same bytes."""
    name, out, shards, dtype = case
    source = saved(tmp_path / name, NEW)
    _, new = expected(tmp_path, source, case)
    for call, wrap in calls.items():
        monkeypatch.setattr(os, call, wrap(getattr(os, call)))
    (tmp_path / "place").mkdir()
    with open_checkpoint(source) as checkpoint:
        write(checkpoint, tmp_path / "place" / out, shards, dtype)
    monkeypatch.undo()
    new.pop("config.json", None)
    assert content(tmp_path / "place" / out) == new


@pytest.mark.parametrize("case", CASES[2:], ids=NAMES[2:])
def test_a_process_may_be_killed_at_any_system_call(case: Case, tmp_path: Path) -> None:
    """SIGKILL before each change of the disk leaves the old or new output; a temporary file has ckptkit in its name."""
    kill_at_each_call(case, saved(tmp_path / case.name, NEW), tmp_path)


@each_case
def test_a_limit_on_file_sizes_is_an_error(case: Case, tmp_path: Path) -> None:
    """The error comes before the first byte with the needed size and the limit; the old output is kept."""
    name, out, shards, _ = case
    source, place = saved(tmp_path / name, NEW), tmp_path / "place"
    place.mkdir()
    write(OLD, place / out, shards)
    old = content(place / out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        refusal = outcome(lambda: write(str(source), place / out, shards))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refusal is not None
    assert re.fullmatch(r"a file of [\d.]+ k?B is larger than the limit of this process, 200 B", refusal.reason)
    assert refusal.path == str(place / out)
    assert content(place / out) == old
    assert names_in(place) == [out]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 64 kB, where the system allows to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs privileges that this user does not have")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(("out", "shards"), [("out.safetensors", None), ("out.pt", None), ("out", 30_000)])
def test_a_full_disk_is_an_error(out: str, shards: int | None, tmp_path: Path, small_disk: Path) -> None:
    """On a real disk, the error gives both sizes, and only the old output is left."""
    source = saved(tmp_path / "in.safetensors", {f"t{number}": torch.ones(5000) for number in range(4)})
    write(OLD, small_disk / out, shards)
    old = content(small_disk / out)
    refusal = outcome(lambda: write(str(source), small_disk / out, shards))
    assert refusal is not None
    assert re.fullmatch(r"not enough disk space: [\d.]+ kB needed, [\d.]+ k?B free", refusal.reason)
    assert refusal.path == str(small_disk / out)
    assert content(small_disk / out) == old
    assert names_in(small_disk) == [out]


def test_an_output_larger_than_the_disk_takes_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The free space is compared first: a reservation that fails halfway would fill the disk for everybody."""
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("space was reserved"))
    with (
        pytest.raises(OutputError, match=r"not enough disk space: .* needed, .* free"),
        AtomicFile(str(tmp_path / "out"), 2**60),
    ):
        pytest.fail("the output was opened")
    assert list(tmp_path.iterdir()) == []


def newer_file(out: Path) -> None:
    """Do what a trainer does: write a file aside, and rename it to the path."""
    os.replace(saved(out.with_name(f"newer{out.suffix}"), {"newer": torch.ones(4)}), out)


def newer_bytes(out: Path) -> None:
    with out.open("r+b") as file:
        file.write(b"newer")


def newer_directory(out: Path) -> None:
    saved_directory = out.with_name("newer")
    saved_directory.mkdir()
    saved(saved_directory / "model.safetensors", {"newer": torch.ones(4)})
    if out.exists():
        out.rename(out.with_name("moved"))
    saved_directory.rename(out)


CHANGES: dict[str, tuple[Case, bool, Callable[[Path], object]]] = {
    "a file is replaced": (Case("in.safetensors", "out.safetensors"), True, newer_file),
    "a torch file is replaced": (Case("in.pt", "out.pt"), True, newer_file),
    "a training checkpoint is replaced": (Case("run.pt", "out.pt"), True, newer_file),
    "a file is written in place": (Case("in.pt", "out.safetensors"), True, newer_bytes),
    "a file is removed": (Case("in.pt", "out.pt"), True, lambda out: out.unlink()),
    "a file is created": (Case("in.pt", "out.pt"), False, newer_file),
    "the input is edited in place": (Case("run.pt", "run.pt"), True, newer_file),
    "the input is edited in place, and written": (Case("in.safetensors", "in.safetensors"), True, newer_bytes),
    "a file is replaced while tensors are cast": (
        Case("in.safetensors", "out.safetensors", dtype="F64"), True, newer_file,
    ),
    "the input is cast in place": (Case("in.safetensors", "in.safetensors", dtype="F64"), True, newer_file),
    "the input is cast in place, and written": (
        Case("in.safetensors", "in.safetensors", dtype="F64"), True, newer_bytes,
    ),
    "a directory is replaced": (Case("in.safetensors", "out", 300), True, newer_directory),
    "a directory is created": (Case("in.safetensors", "out", 300), False, newer_directory),
    "a shard is replaced": (
        Case("in.safetensors", "out", 300), True, lambda out: newer_file(out / "model-00001-of-00002.safetensors"),
    ),
    "a shard is added": (Case("in.safetensors", "out", 300), True, lambda out: newer_file(out / "more.safetensors")),
    "a configuration is replaced": (
        Case("in.safetensors", "out", 300), True, lambda out: newer_file(out / "config.json"),
    ),
    "a directory is removed": (Case("in.safetensors", "out", 300), True, shutil.rmtree),
}  # fmt: skip


@pytest.mark.parametrize(("case", "present", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_the_newer_output_of_another_program_is_kept(
    case: Case, change: Callable[[Path], object], tmp_path: Path, *, present: bool
) -> None:
    """An output that changes during the run is refused with one sentence, and nothing of this run is left."""
    name, out, shards, dtype = case
    source = saved(tmp_path / name, NEW)
    if present and name != out:
        write(OLD, tmp_path / out, shards)
        if shards:
            (tmp_path / out / "config.json").write_text("{}")
    after: list[Any] = []

    def progress(_: int) -> None:
        if not after:
            change(tmp_path / out)
            after.append((names_in(tmp_path), content(tmp_path / out)))

    with open_checkpoint(source) as checkpoint:
        output = choose_output(tmp_path / out, max_shard_size=shards, force=True)
        plan = plan_remap(checkpoint, dtype=dtype)
        refusal = outcome(lambda: execute(plan, checkpoint, output, progress=progress))
    assert refusal is not None
    assert re.search("another program (created|changed|replaced)|the file changed while", refusal.reason)
    names, newer = after[0]
    assert content(tmp_path / out) == newer
    assert names_in(tmp_path) == [name for name in names if ".ckptkit-" not in name]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_of_two_writers_to_one_output_the_second_is_refused(case: Case, tmp_path: Path) -> None:
    """Both have ``force``. The writer that ends last did not see the other output, and says so."""
    source, out = saved(tmp_path / case.name, NEW), tmp_path / case.out
    write(OLD, out, case.shards)
    first: list[Any] = []

    def other_writer(_: int) -> None:
        if not first:
            write({"other": torch.ones(100)}, out, case.shards)
            first.append(content(out))

    with open_checkpoint(source) as checkpoint:
        plan, output = (
            plan_remap(checkpoint, dtype=case.dtype),
            choose_output(out, max_shard_size=case.shards, force=True),
        )
        refusal = outcome(lambda: execute(plan, checkpoint, output, progress=other_writer))
    assert refusal is not None
    kind = "directory" if case.shards else "file"
    assert refusal.reason == f"another program changed this {kind} during this run; it was not replaced"
    assert content(out) == first[0]
    assert names_in(tmp_path) == sorted([case.name, case.out])


def test_a_log_that_grows_in_the_directory_is_kept(tmp_path: Path) -> None:
    """Other files of the directory are linked, so a program that appends to its log is not disturbed."""
    source, out = saved(tmp_path / "in.safetensors", NEW), tmp_path / "out"
    write(OLD, out, 300)
    with (out / "train.log").open("w") as log, open_checkpoint(source) as checkpoint:
        output = choose_output(out, max_shard_size=300, force=True)
        execute(plan_remap(checkpoint), checkpoint, output, progress=lambda _: print("step", file=log, flush=True))
        print("end", file=log)
    assert (out / "train.log").read_text().endswith("step\nend\n")


def test_the_newer_state_of_an_optimizer_is_kept(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    out = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out)
    newer: list[Any] = []

    def progress(_: int) -> None:
        if not newer:
            newer_file(out)
            newer.append(content(out))

    with open_optimizer(out) as checkpoint:
        state = to_named(read_state(checkpoint), ["weight", "bias"])
        output = choose_output(out, force=True)
        refusal = outcome(lambda: write_optimizer_state(state, output, checkpoint, progress=progress))
    assert refusal is not None
    assert "another program replaced the file" in refusal.reason
    assert content(out) == newer[0]


def test_a_target_that_changed_before_the_writing_is_refused(tmp_path: Path) -> None:
    """The command line notes the state of the output first, before it opens inputs or builds models."""
    out = saved(tmp_path / "out.safetensors", OLD)
    output = replace(choose_output(out, force=True), before=present_state(str(out)))
    newer_file(out)
    newer = content(out)
    for act in (lambda: check_output(plan_remap(NEW), output, {}), lambda: execute(plan_remap(NEW), NEW, output)):
        refusal = outcome(act)
        assert refusal is not None
        assert "another program changed this file" in refusal.reason
    assert content(out) == newer


@pytest.mark.parametrize("present", [True, False])
def test_a_small_file_of_another_program_is_kept(tmp_path: Path, *, present: bool) -> None:
    """Files of rules, plans and locks have the same protection."""
    path = tmp_path / "plan.json"
    if present:
        path.write_bytes(b"old")
    target = prepare_side_file(str(path), [], force=True)
    path.write_bytes(b"newer")
    with pytest.raises(OutputError, match="another program"):
        write_small_file(target, b"ours")
    assert path.read_bytes() == b"newer"
    with pytest.raises(OutputError, match="is an input"):
        prepare_side_file(str(path), [str(path)], force=True)
    with pytest.raises(OutputError, match="is the output too"):
        prepare_side_file(str(path), [], f"{tmp_path}/./plan.json", force=True)


def refuse_to_remove(*_: Any, **__: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(("out", "shards"), [("out.safetensors", None), ("out.pt", None), ("out", 300)])
def test_a_temporary_path_that_cannot_be_removed_is_named(
    out: str, shards: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error the hint names what is left over; after success the description of the output does."""
    write(OLD, tmp_path / out, shards)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse_to_remove)
        patch.setattr(os, "rmdir", refuse_to_remove)
        patch.setattr(os, "fsync", refuse_to_remove)
        refusal = outcome(lambda: write(NEW, tmp_path / out, shards))
        assert refusal is not None
        (left,) = set(names_in(tmp_path)) - {out}
        assert f"{tmp_path / left} could not be removed" in str(refusal.hint)
    if shards:
        monkeypatch.setattr(os, "rmdir", refuse_to_remove)
        written = execute(plan_remap(NEW), NEW, choose_output(tmp_path / out, max_shard_size=shards, force=True))
        assert [Path(path).name for path in written.left] == sorted(set(names_in(tmp_path)) - {out, left})


def test_an_error_of_the_system_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of stat on the target is an error, and never taken for a path that does not exist."""
    source, real = saved(tmp_path / "in.safetensors", NEW), os.stat

    def stat(path: Any, **options: Any) -> Any:
        if path == str(tmp_path / "out"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, **options)

    for shards in (None, 300):
        with open_checkpoint(source) as checkpoint, monkeypatch.context() as patch:
            plan, output = plan_remap(checkpoint), Output(str(tmp_path / "out"), "safetensors", shards, force=True)
            patch.setattr(os, "stat", stat)
            refusal = outcome(lambda: execute(plan, checkpoint, output))  # noqa: B023 - called at once
        assert refusal is not None
        assert (refusal.path, refusal.reason) == (str(tmp_path / "out"), "permission denied")
        assert names_in(tmp_path) == ["in.safetensors"]


def test_a_plan_of_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the plan writes no tensor"):
        execute(Plan(()), {}, tmp_path / "out.pt")
    with pytest.raises(PlanError, match="the plan writes no tensor"):
        plan_from_json({**plan_to_json(plan_remap(NEW), {"source": as_checkpoint(NEW, "source")}), "plan": []})


def test_the_plan_file_of_a_failed_output_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan gets its name after the output did, so it never describes an output that does not exist."""
    source = saved(tmp_path / "in.safetensors", NEW)
    saved(tmp_path / "out.safetensors", OLD)
    arguments = ("remap", source, "--rename", "a.*=c.*", "--plan", tmp_path / "plan.json", "-o")
    assert run_ckpt(capsys, *arguments, tmp_path / "out.safetensors").code == 2
    assert run_ckpt(capsys, *arguments, tmp_path / "plan.json", "--format", "safetensors").code == 2
    assert names_in(tmp_path) == ["in.safetensors", "out.safetensors"]
    assert run_ckpt(capsys, *arguments, tmp_path / "new.safetensors").code == 0
    assert names_in(tmp_path) == ["in.safetensors", "new.safetensors", "out.safetensors", "plan.json"]
