"""Workers of this machine write what one process writes, whatever ends: a worker, the run, or a system call."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit import choose_output, execute, open_checkpoint, plan_remap
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_faults import Faults, content, outcome
from tests.helpers_outputs import names_in, scratch

KEYS, ROWS = 12, 256


def _random(seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    state = {f"layers.{n}.weight": torch.randn(ROWS, 128, generator=made) for n in range(KEYS)}
    return {**state, "norm.weight": torch.ones(128), "steps": torch.arange(40)}


@pytest.fixture(scope="module")
def models() -> Iterator[Path]:
    """Three models as one file, the first also as shards and as a torch file, with a configuration."""
    with scratch() as directory:
        place = Path(directory)
        for number, name in enumerate("abc"):
            save_file(_random(number), place / f"{name}.safetensors", {"format": "pt"})
        torch.save(_random(0), place / "a.pt")
        ckptkit.convert(place / "a.safetensors", place / "sharded", max_shard_size="300kB")
        (place / "sharded" / "config.json").write_text(json.dumps({"model_type": "made", "torch_dtype": "float32"}))
        yield place


@pytest.fixture(autouse=True)
def _in_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)


RECIPE = """
method = "ties"
trim = "model"
base = "a"
[[input]]
path = "a.safetensors"
[[input]]
path = "b.safetensors"
weight = 0.5
density = 0.3
[[input]]
path = "c.safetensors"
weight = 0.25
density = 0.6
"""
SHARDS = ("--max-shard-size", "200kB")
COMMANDS: dict[str, tuple[str, ...]] = {
    "linear": ("merge", "a.safetensors", "b.safetensors", "c.safetensors", "--method", "linear",
               "--weight", "a=0.5", "--weight", "b=0.3", "--weight", "c=0.2"),
    "ties": ("merge", "a.safetensors", "b.safetensors", "c.safetensors", "--method", "ties", "--base", "a",
             "--weight", "b=0.5", "--weight", "c=0.4", "--density", "0.3"),
    "dare": ("merge", "a.safetensors", "b.safetensors", "c.safetensors", "--method", "dare_linear", "--base", "a",
             "--weight", "b=0.5", "--weight", "c=0.4", "--density", "0.3"),
    "trim = model": ("merge", "--recipe", "recipe.toml"),
    "overlay": ("merge", "sharded", "b.safetensors", "--drop", "layers.3.*"),
    "remap with casts": ("remap", "a.pt", "--rename", "layers.{i:int}.*=blocks.{i}.*", "--dtype", "BF16"),
    "sharded inputs": ("convert", "sharded", "--dtype", "F16", "--carry"),
    "saved plan": ("remap", "a.safetensors", "--apply", "plan.json"),
    "fp8": ("convert", "a.safetensors", "--quantize", "fp8-row"),
    "dequantized": ("convert", "fp8", "--dequantize", "--dtype", "BF16"),
    "torch operations": ("remap", "a.safetensors", "--rules", "split.toml"),
    "patch": ("apply", "a.safetensors", "patch.safetensors"),
}  # fmt: skip


@pytest.fixture(scope="module")
def _files(models: Path) -> None:
    """Write what some commands need beside the models."""
    with contextlib.chdir(models):
        Path("recipe.toml").write_text(RECIPE)
        Path("split.toml").write_text(
            '[[rule]]\nfrom = "layers.{i:int}.weight"\nto = ["l.{i}.q", "l.{i}.k"]\n'
            "op = { split = { sizes = [56, 200] } }\n"
        )
        plan = plan_remap("a.safetensors", ["norm.*=final.*"])
        ckptkit.save_plan(plan, "plan.json", "a.safetensors")
        ckptkit.convert("a.safetensors", "fp8", quantize="fp8-row", max_shard_size="200kB")
        tuned = {**_random(0), "layers.3.weight": _random(1)["layers.3.weight"]}
        save_file(tuned, "tuned.safetensors", {"format": "pt"})
        subprocess.run(
            [sys.executable, "-m", "ckptkit", "delta", "a.safetensors", "tuned.safetensors", "-o", "patch.safetensors"],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_processes_write_what_one_process_writes(
    words: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every byte is the same, and so is the document of what was written."""
    documents = []
    for jobs in ((), ("--jobs", "2")):
        out = tmp_path / "out"
        verify = ["--verify"] if "--carry" in words else []  # which imports torch in each process
        ran = run_ckpt(capsys, *words, *SHARDS, "-o", out, "--json", *verify, *jobs)
        assert ran.code == 0, ran.err
        documents.append((json.loads(ran.out), ran.err))
        out.rename(tmp_path / ("two" if jobs else "one"))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(names_in(tmp_path / "one")) > 3
    assert documents[0] == documents[1]
    assert names_in(tmp_path) == ["one", "two"]


def test_hints_that_leave_the_processes_out(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file, a store and a live model are refused in one sentence, and what it says works."""
    one = ("convert", models / "a.safetensors", "-o", tmp_path / "out")
    ran = run_ckpt(capsys, *one, "--jobs", "2", "--format", "safetensors")
    assert (ran.code, ran.out) == (2, "")
    assert (
        "each worker writes shards, and this output is one file\nhint: leave out --jobs and --engine, or write shards"
        in ran.err
    )
    assert run_ckpt(capsys, *one, "--jobs", "2", "--max-shard-size", "5GB").code == 0
    assert names_in(tmp_path / "out") == ["model.safetensors"]
    ran = run_ckpt(capsys, *one[:2], "-o", "memory://bucket/out", *SHARDS, "--jobs", "2")
    assert (ran.code, "hint: write to a disk that all workers reach, or leave out --jobs and --engine" in ran.err) == (
        2,
        True,
    )
    live = ("convert", "py:torch.nn:Linear(in_features=20, out_features=30)", "-o", tmp_path / "live", *SHARDS)
    ran = run_ckpt(capsys, *live, "--jobs", "2")
    assert (ran.code, ran.err.splitlines()[-1]) == (2, "hint: leave out --jobs and --engine")
    assert run_ckpt(capsys, *live).code == 0
    assert names_in(tmp_path) == ["live", "out"]


class Run:
    """``ckpt merge --jobs 2`` in a session of its own, stopped as soon as some shards are recorded."""

    WORDS = (*COMMANDS["ties"], *SHARDS, "--jobs", "2", "-o")

    def __init__(self, out: Path, *options: str, shards: int = 2) -> None:
        self.out = out
        program = [sys.executable, "-m", "ckptkit", *self.WORDS, str(out), *options]
        self.process = subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        while self.process.poll() is None and self.records() < shards:
            time.sleep(0.005)

    def records(self) -> int:
        for journal in self.out.parent.glob(f"{self.out.name}.ckptkit-*.tmp/journal"):
            with contextlib.suppress(FileNotFoundError):
                return len(journal.read_text().splitlines()) - 1
        return 0

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def wait_for_end(processes: Sequence[int]) -> None:
    """Wait until no process is there any more, or fail after some seconds."""
    for _ in range(500):
        if not any(Path(f"/proc/{pid}").exists() and _is_running(pid) for pid in processes):
            return
        time.sleep(0.01)
    raise AssertionError("a worker still runs")


def _is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def whole(models: Path) -> dict[str, str] | None:
    """The output of one process."""
    with contextlib.chdir(models):
        subprocess.run(
            [sys.executable, "-m", "ckptkit", *COMMANDS["ties"], *SHARDS, "-o", "whole"],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        found = content(Path("whole"))
        shutil.rmtree("whole")
    return found


def goes_on(out: Path, whole: dict[str, str] | None, capsys: pytest.CaptureFixture[str]) -> int:
    """Let ``--continue`` end the run, and return how many shards it kept."""
    ran = run_ckpt(capsys, *Run.WORDS, out, "--continue", "--json")
    assert ran.code == 0, ran.err
    assert content(out) == whole
    assert names_in(out.parent) == [out.name]
    kept: int = json.loads(ran.out)["output"]["kept_shards"]
    return kept


@pytest.mark.parametrize("options", [(), ("--continue",)], ids=["new", "continued"])
def test_a_worker_is_killed(
    options: Sequence[str], whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence names a shard and the way out; finished shards are kept, and the next run makes the others."""
    run = Run(tmp_path / "out", *options)
    workers = run.workers()
    os.kill(workers[0], signal.SIGKILL)
    code, out, err = run.end()
    assert (code, out) == (2, "")
    assert "a worker ended before its task was done" in err
    assert "--continue goes on from there" in err
    assert "Traceback" not in err
    wait_for_end(workers)
    assert goes_on(tmp_path / "out", whole, capsys) >= 2


def test_the_run_is_killed(whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its workers end with it, also in the middle of a shard."""
    run = Run(tmp_path / "out")
    workers = run.workers()
    run.process.kill()
    run.process.wait()
    wait_for_end(workers)
    assert goes_on(tmp_path / "out", whole, capsys) >= 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("options", [(), ("--continue",)], ids=["new", "continued"])
def test_the_run_is_interrupted(
    number: signal.Signals,
    options: Sequence[str],
    whole: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C reaches all processes of the terminal: no worker prints anything, and only ``--continue`` keeps shards."""
    run = Run(tmp_path / "out", *options)
    workers = run.workers()
    os.killpg(run.process.pid, number) if number is not signal.SIGTERM else run.process.terminate()
    code, out, err = run.end()
    assert (code, out) == (128 + number, "")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2
    wait_for_end(workers)
    if options:
        assert goes_on(tmp_path / "out", whole, capsys) >= 2
    else:
        assert names_in(tmp_path) == []


def test_two_runs_onto_one_output(whole: dict[str, str], tmp_path: Path) -> None:
    """One wins, whole, and the other says that another program made the output; nothing of it is left."""
    runs = [Run(tmp_path / "out", shards=0) for _ in range(2)]
    ended = [run.end() for run in runs]
    assert sorted(code for code, _, _ in ended) == [0, 2]
    assert any("out: another program" in err for _, _, err in ended)
    assert content(tmp_path / "out") == whole
    assert names_in(tmp_path) == ["out"]


def test_two_runs_that_continue(whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second does not touch what the first makes."""
    run = Run(tmp_path / "out", "--continue", shards=1)
    os.killpg(run.process.pid, signal.SIGSTOP)
    try:
        ran = run_ckpt(capsys, *Run.WORDS, tmp_path / "out", "--continue")
    finally:
        os.killpg(run.process.pid, signal.SIGCONT)
    assert (ran.code, "another process writes this output now" in ran.err) == (2, True)
    assert run.end()[0] == 0
    assert content(tmp_path / "out") == whole


class Twice(Executor):
    """An executor that does each task twice, as Ray does after it has lost a node; the second attempts end late."""

    def __init__(self) -> None:
        self.late: list[threading.Thread] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Do the task now, and once more in a thread."""
        future: Future[Any] = Future()
        thread = threading.Thread(target=lambda: outcome(lambda: fn(*args, **kwargs)))
        self.late.append(thread)
        if len(self.late) % 2:
            thread.start()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - of the task
            future.set_exception(error)
        return future


def test_a_task_may_be_done_twice(models: Path, tmp_path: Path) -> None:
    """Attempts beside the first one, and attempts after the output got its name, change nothing and leave nothing."""
    source = models / "a.safetensors"
    plan = plan_remap(source, dtype="BF16")
    execute(plan, source, choose_output(tmp_path / "one", max_shard_size="200kB"))
    twice = Twice()
    execute(plan, source, choose_output(tmp_path / "two", max_shard_size="200kB"), executor=twice)
    for number, thread in enumerate(twice.late):
        if number % 2:
            thread.start()
        thread.join()
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert names_in(tmp_path) == ["one", "two"]


class Here(Executor):
    """An executor that does each task at once, in this thread, where system calls can fail."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Do the task."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - of the task
            future.set_exception(error)
        return future


@pytest.mark.parametrize("resume", [False, True], ids=["new", "continued"])
def test_any_system_call_may_fail(resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th call fails, for n = 1 until all succeed: one error, and the whole output or only what is kept."""
    state = {f"l{number}": torch.full((30,), float(number)) for number in range(4)}
    source = tmp_path / "in.safetensors"
    save_file(state, source)
    plan = plan_remap(source, dtype="F64")
    execute(plan, source, choose_output(tmp_path / "one", max_shard_size=500))
    wanted, faults = content(tmp_path / "one"), Faults(monkeypatch)
    for nth in range(1, 1000):
        place = tmp_path / "place"
        place.mkdir()
        output = choose_output(place / "out", max_shard_size=500)
        faults.arm(nth, errno.EIO)
        refusal = outcome(lambda: execute(plan, source, output, executor=Here(), resume=resume))  # noqa: B023
        reached = faults.count >= nth
        faults.disarm()
        found = content(place / "out")
        if refusal is None:
            assert found == wanted
        elif found is None:
            kept = execute(plan, source, output, executor=Here(), resume=True).kept_shards
            assert content(place / "out") == wanted
            assert resume or not kept
        else:  # the call after the output got its name
            assert found == wanted
        if not resume:
            left = [name for name in names_in(place) if name != "out"]
            assert all(name in str(refusal) for name in left), (nth, left, refusal)
        shutil.rmtree(place)
        if not reached:
            assert nth > 40
            return
    raise AssertionError("too many system calls")


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_an_error_of_a_process_has_class_and_path(models: Path, tmp_path: Path) -> None:
    """The disk of a worker refuses a shard: the error is the one of this process, and the output stays away."""
    source = str(models / "a.safetensors")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_small_files) as executor:
        with pytest.raises(
            ckptkit.OutputError, match=r"shard model-.* is larger than the limit of this process"
        ) as caught:
            execute(
                plan_remap(source),
                source,
                choose_output(tmp_path / "out", max_shard_size="200kB"),
                executor=executor,
            )
        assert caught.value.path == str(tmp_path / "out")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["spawn", "forkserver", "loky"])
def test_executors_of_others(kind: str, models: Path, tmp_path: Path) -> None:
    """Processes that the user starts, and those of loky, write the same bytes."""
    executor: Executor
    if kind == "loky":
        externals = pytest.importorskip("joblib.externals.loky")
        executor = externals.get_reusable_executor(2)
    else:
        executor = ProcessPoolExecutor(2, multiprocessing.get_context(kind))
    source = models / "sharded"
    plan = plan_remap(source, dtype="F16")
    execute(plan, source, choose_output(tmp_path / "one", max_shard_size="200kB"))
    with executor:
        written = execute(
            plan, source, choose_output(tmp_path / "two", max_shard_size="200kB"), executor=executor, verify=True
        )
    assert written.verified is not None
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_processes_forked_beside_threads_of_torch(models: Path, tmp_path: Path) -> None:
    """Torch would wait in them for threads that a fork does not copy: a task leaves it one thread."""
    source, threads = models / "a.safetensors", torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.rand(500, 500).exp().sum()
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
            output = choose_output(tmp_path / "out", max_shard_size="200kB")
            written = execute(plan_remap(source), source, output, executor=executor, verify=True)  # torch compares
            assert executor.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(threads)
    assert written.verified is not None


def test_input_that_changes_between_tasks(models: Path, tmp_path: Path) -> None:
    """Workers refuse another version, the error names the path as it was given, and no shard is kept."""
    source = tmp_path / "in.safetensors"
    shutil.copy(models / "a.safetensors", source)
    plan = plan_remap(source, dtype="F16")
    with open_checkpoint(source), pytest.raises(ckptkit.ChangedError) as caught:
        execute(
            plan,
            source,
            choose_output(tmp_path / "out", max_shard_size="200kB"),
            executor=Here(),
            resume=True,
            progress=lambda _: os.utime(source, (1, 1)),
        )
    assert caught.value.path == str(source)
    assert names_in(tmp_path) == ["in.safetensors"]
