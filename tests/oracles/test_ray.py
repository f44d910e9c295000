"""Work on a real cluster of Ray: three nodes on this machine, of which some die, and results equal to the last bit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit import RayExecutor, choose_output, execute
from ckptkit.cli import main
from ckptkit.tasks import ray as ray_module
from ckptkit.tasks.running import run_tasks
from ckptkit.tasks.same_code import Code, code_here
from tests.helpers_outputs import names_in, sha256
from tests.helpers_ray import LIMIT, MEMORY_GROUPS, killed_once_for_memory, slowly

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.xdist_group("ray"),  # one worker of pytest, and so one cluster
]
ROOT = Path(__file__).parent.parent.parent
SHARDS = "9MB"  # one tensor each
DENSITY, WEIGHTS = 0.5, (0.6, 0.4)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(2):
        found.add_node(**node)
    found.wait_for_nodes()
    yield found
    found.shutdown()


@pytest.fixture
def executor(cluster: Any) -> Iterator[RayExecutor]:
    with RayExecutor(cluster.address) as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base and two that were trained from it, in safetensors and torch files of 40 MB."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(7)
    base = {f"layers.{number}.weight": torch.randn(1024, 2048, generator=generator) for number in range(5)}
    base |= {f"layers.{number}.bias": torch.randn(50, generator=generator) for number in range(5)}
    first, second = (
        {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        for _ in range(2)
    )
    save_file(base, folder / "base.safetensors")
    save_file(first, folder / "first.safetensors")
    torch.save(second, folder / "second.pt")
    return {name: str(folder / name) for name in ("base.safetensors", "first.safetensors", "second.pt")}


@pytest.fixture(scope="module")
def merge(models: dict[str, str]) -> tuple[ckptkit.Plan, dict[str, str]]:
    """A merge that is bound by arithmetic, and its sources."""
    base, *donors = models.values()
    inputs = [{"path": path, "weight": weight} for path, weight in zip(donors, WEIGHTS, strict=True)]
    plan = ckptkit.plan_recipe({"method": "ties", "base": base, "density": DENSITY, "input": inputs})
    return plan, dict(plan.paths)


def content(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in names_in(folder)}


@pytest.fixture(scope="module")
def merged(merge: tuple[ckptkit.Plan, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that one process writes."""
    out = tmp_path_factory.mktemp("one") / "out"
    execute(*merge, choose_output(out, max_shard_size=SHARDS))
    return content(out)


class Through(Executor):
    """An executor whose tasks are run by another function, which gets each function and its task."""

    def __init__(self, executor: RayExecutor, run: Callable[..., Any], *arguments: object) -> None:
        self.executor, self.workers = executor, executor.workers
        self.run, self.arguments = run, arguments

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Give the task to Ray."""
        return self.executor.submit(self.run, *self.arguments, fn, *args, **kwargs)


def test_futures_are_those_of_an_executor(executor: RayExecutor) -> None:
    """Results, errors with their class, cancelling, and the refusal after the end are as in concurrent.futures."""
    assert executor.workers == 3
    assert list(executor.map(pow, range(4), [3] * 4)) == [0, 1, 8, 27]
    with pytest.raises(ZeroDivisionError) as caught:
        executor.submit(divmod, 1, 0).result()
    assert "RayTaskError" in type(caught.value.__cause__).__name__
    slow = [executor.submit(time.sleep, 60) for _ in range(8)]
    assert [future.cancel() for future in slow] == [False] * 6 + [True] * 2  # Ray has two for each of three CPUs
    assert {future.running() for future in slow[:6]} == {True}
    assert not wait(slow, timeout=0, return_when=FIRST_COMPLETED).done.isdisjoint(slow[6:])
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, -1)
    with pytest.raises(ckptkit.WorkerError, match="Ray was shut down before this task was done"):
        slow[0].result(timeout=30)


def test_cancelling_while_tasks_end(executor: RayExecutor) -> None:
    """It leaves this process alive, and the executor as it was: Ray's own cancelling would abort the process."""
    for number in range(150):
        futures = [executor.submit(abs, -1) for _ in range(30)]
        time.sleep(number % 11 / 500)
        for future in futures:
            future.cancel()
    assert executor.submit(abs, -1).result(timeout=30) == 1


def test_merge_remap_and_convert_write_what_one_process_writes(
    executor: RayExecutor, merge: tuple[ckptkit.Plan, dict[str, str]], merged: dict[str, str],
    models: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    """All bytes of all files are equal, and the result says the same."""
    told: list[int] = []
    execute(*merge, choose_output(tmp_path / "m", max_shard_size=SHARDS), executor=executor, progress=told.append)
    assert content(tmp_path / "m") == merged
    assert sum(told) == merge[0].nbytes
    for name, plan in {
        "remap": ckptkit.plan_remap(models["second.pt"], ["layers.{i:int}.*=h.{i+1}.*"]),
        "convert": ckptkit.plan_remap(models["second.pt"], dtype="BF16"),
    }.items():
        for kind, other in (("one", None), ("ray", executor)):
            out = choose_output(tmp_path / name / kind, max_shard_size="5MB")
            out_folder = Path(out.path).parent
            out_folder.mkdir(exist_ok=True)
            execute(plan, models["second.pt"], out, executor=other)
        assert content(tmp_path / name / "one") == content(tmp_path / name / "ray")


def test_values_are_those_of_one_process(executor: RayExecutor, models: dict[str, str]) -> None:
    """Check, stats, diff and digest of a cluster are equal to those of one process, in the same order."""
    base, first, second = models.values()
    for path in (first, second):
        one, other = ckptkit.stats(path), ckptkit.stats(path, executor=executor)
        assert list(other.tensors) == list(one.tensors)
        assert (dict(other.tensors), str(other)) == (dict(one.tensors), str(one))
        assert ckptkit.run_checks(path, executor=executor) == ckptkit.run_checks(path)
        assert ckptkit.digest(path, executor=executor) == ckptkit.digest(path)
    for rtol in (None, 1e-2):
        one_diff = ckptkit.diff(base, second, values=True, rtol=rtol)
        assert one_diff.values is not None
        assert len(one_diff.values.different) == 10
        assert ckptkit.diff(base, second, values=True, rtol=rtol, executor=executor) == one_diff
    alone = ckptkit.compare_values(first, second)
    assert ckptkit.compare_values(first, second, executor=executor) == alone


def test_node_dies_in_mid_merge(
    cluster: Any, executor: RayExecutor, merge: tuple[ckptkit.Plan, dict[str, str]], merged: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Ray does the tasks of a node that died on the others, and the output has the same bytes."""
    node = next(iter(cluster.worker_nodes))
    begun = tmp_path / "begun"
    begun.mkdir()

    def kill() -> None:
        while not any(name.startswith(node.node_id) for name in names_in(begun)):
            time.sleep(0.02)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        out = choose_output(tmp_path / "out", max_shard_size=SHARDS)
        execute(*merge, out, executor=Through(executor, slowly, 1.0, str(begun)))
        killer.join()
        assert len(names_in(begun)) > 5  # of five tasks, that of the node began twice
        assert content(tmp_path / "out") == merged
        assert names_in(tmp_path) == ["begun", "out"]
    finally:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        cluster.wait_for_nodes()


@pytest.fixture
def memory_group() -> Iterator[str]:
    """A group of processes with little memory, of the kernel."""
    group = MEMORY_GROUPS / f"ckptkit-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("only root of a machine with memory groups of the kernel can make one")
    (group / "memory.limit_in_bytes").write_text(str(LIMIT), encoding="ascii")
    yield str(group)
    for _ in range(50):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


def test_kernel_kills_a_worker_for_its_memory(
    executor: RayExecutor, merge: tuple[ckptkit.Plan, dict[str, str]], merged: dict[str, str], memory_group: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Ray starts another worker for the task that the kernel ended, and the output has the same bytes."""
    mark = tmp_path / "killed"
    hungry = Through(executor, killed_once_for_memory, memory_group, str(mark))
    execute(*merge, choose_output(tmp_path / "out", max_shard_size=SHARDS), executor=hungry)
    assert mark.exists()
    control = Path(memory_group, "memory.oom_control").read_text(encoding="ascii")
    assert "oom_kill 1" in control
    assert content(tmp_path / "out") == merged


def test_worker_that_dies_each_time_is_one_sentence(cluster: Any) -> None:
    """Where Ray does not try again, the error says so, and not in Ray's many lines."""
    with RayExecutor(cluster.address, max_retries=0) as executor:
        tasks = run_tasks(executor, os._exit, [9], name=lambda _: "shard 1")
        with pytest.raises(ckptkit.WorkerError, match=r"^shard 1: its worker ended each time that Ray ran it \(give"):
            list(tasks)


def test_changed_input_is_refused_by_the_workers(executor: RayExecutor, models: dict[str, str], tmp_path: Path) -> None:
    """An input that changes while tasks wait is an error that names its path, and nothing is written."""
    path = str(shutil.copy(models["first.safetensors"], tmp_path / "in.safetensors"))
    plan = ckptkit.plan_remap(path, dtype="BF16")
    begun = tmp_path / "begun"
    begun.mkdir()

    def change(_: int) -> None:
        os.utime(path, (1, 1))

    with pytest.raises(ckptkit.ChangedError, match=r"in\.safetensors: "):
        execute(
            plan, path, choose_output(tmp_path / "out", max_shard_size="5MB"),
            executor=Through(executor, slowly, 0.5, str(begun)), progress=change,
        )  # fmt: skip
    assert names_in(tmp_path) == ["begun", "in.safetensors"]


def test_damaged_file_is_the_error_of_one_process(executor: RayExecutor, tmp_path: Path) -> None:
    """The one line of an error survives the way through Ray, with its class; a check has the same findings."""
    import numpy as np

    numbers = np.random.default_rng(0)
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, *(numbers.standard_normal((2000, 1000)) for _ in range(3)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    path.write_bytes(data)
    errors = []
    for other in (None, executor):
        with pytest.raises(ckptkit.FormatError) as caught:
            ckptkit.stats(path, executor=other)
        errors.append(caught.value)
    one, shared = errors
    assert type(shared) is type(one)
    assert (shared.path, shared.hint) == (one.path, one.hint)
    assert shared.reason.endswith(one.reason)
    assert "\n" not in str(shared)
    assert ckptkit.run_checks(path, executor=executor) == ckptkit.run_checks(path)


def test_node_with_other_code_is_named(
    executor: RayExecutor, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of ckptkit on a node could round to other bits, so it is refused."""
    monkeypatch.setattr(ray_module, "code_here", lambda: Code("99.0", "ab" * 32))
    with pytest.raises(ckptkit.WorkerError, match=r"node \S+ has another ckptkit \(.*99\.0, code abababab"):
        ckptkit.digest(models["base.safetensors"], executor=executor)
    other = code_here()._replace(libraries=("1.0", *code_here().libraries[1:]))
    monkeypatch.setattr(ray_module, "code_here", lambda: other)
    with pytest.raises(ckptkit.WorkerError, match=r"node \S+ has another torch \([\d.]+\) than this process \(1\.0\)"):
        ckptkit.digest(models["base.safetensors"], executor=executor)


def test_node_without_ckptkit_is_named(cluster: Any, tmp_path: Path) -> None:
    """A worker that cannot import ckptkit says so: nothing that Ray gives it needs ckptkit."""
    (tmp_path / "ckptkit.py").write_text("raise ModuleNotFoundError(\"No module named 'ckptkit'\", name='ckptkit')")
    program = (
        "import ray, ckptkit\n"
        f"ray.init(runtime_env={{'env_vars': {{'PYTHONPATH': {str(tmp_path)!r}}}}}, logging_level='ERROR')\n"
        "print(ckptkit.RayExecutor().submit(abs, -1).exception())"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd="/", text=True, capture_output=True, timeout=60, check=False,
        env={**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "ckptkit is not installed on node" in run.stdout, run.stderr


def test_address_without_a_cluster_is_told_at_once() -> None:
    """Ray itself would try for minutes."""
    began = time.monotonic()
    with pytest.raises(ckptkit.WorkerError, match=r"no Ray cluster answers at '127\.0\.0\.1:9': connection refused"):
        RayExecutor("127.0.0.1:9")
    assert time.monotonic() - began < 6


def test_cluster_with_a_token_says_how_to_give_it(tmp_path: Path, models: dict[str, str]) -> None:
    """Ray names the token only in the cause of its error, after 20 seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 40}
    words = ["start", "--head", "--block", "--port", str(port), "--num-cpus", "1", "--include-dashboard", "false"]
    folder = tempfile.mkdtemp(dir="/tmp")
    with (tmp_path / "log").open("w") as log:
        head = subprocess.Popen(
            [Path(sys.executable).parent / "ray", *words],
            env={**os.environ, **token, "RAY_TMPDIR": folder},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"127.0.0.1:{port}"
        while "Ray runtime started" not in (tmp_path / "log").read_text():
            assert head.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        words = [sys.executable, "-m", "ckptkit", "digest", models["base.safetensors"], "-q", "--engine", "ray"]
        runs = [
            subprocess.Popen(
                words,
                cwd=ROOT,
                env={**os.environ, "RAY_AUTH_MODE": "disabled", **given, "RAY_ADDRESS": address},
                stderr=subprocess.PIPE,
                text=True,
            )
            for given in ({}, token)
        ]
        told = [run.communicate(timeout=90)[1] for run in runs]
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(LIMIT)
        shutil.rmtree(folder, ignore_errors=True)
    assert [run.returncode for run in runs] == [2, 0], told
    assert f"ckpt: the Ray cluster at '{address}' refused this process: it has a token\n" in told[0]
    assert "hint: set RAY_AUTH_MODE=token, with the token of the cluster in" in told[0]


def ckpt(cluster: Any, *words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ckptkit", *words],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_command_on_a_cluster_prints_what_it_prints_alone(cluster: Any, models: dict[str, str]) -> None:
    """RAY_ADDRESS names the cluster, and nothing that Ray prints is in the output."""
    words = ["stats", models["second.pt"], "--json"]
    alone, shared = ckpt(cluster, *words), ckpt(cluster, *words, "--engine", "ray")
    assert shared.communicate(timeout=60) == alone.communicate(timeout=60)
    assert (alone.returncode, shared.returncode) == (0, 0)


def test_command_is_ended_while_ray_starts(models: dict[str, str]) -> None:
    """The status is that of the signal, although Ray has a handler of its own meanwhile, whose exit Python may lose."""
    words = ["stats", models["second.pt"], "--engine", "ray"]
    run = subprocess.Popen(
        [sys.executable, "-m", "ckptkit", *words], cwd=ROOT, env={**os.environ, "RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while run.poll() is None and not children.read_text(encoding="ascii"):
        time.sleep(0.02)
    run.terminate()
    shown, _ = run.communicate(timeout=60)
    assert (run.returncode, shown) == (128 + signal.SIGTERM, "")


def merge_words(models: dict[str, str], out: Path) -> list[str]:
    ties = ["--method", "ties", "--base", "base", "--density", str(DENSITY)]
    ties += [word for name, weight in zip(("first", "second"), WEIGHTS, strict=True)
             for word in ("--weight", f"{name}={weight}")]  # fmt: skip
    return ["merge", *models.values(), "-o", str(out), *ties, "--max-shard-size", SHARDS]


@pytest.fixture(scope="module")
def merged_by_command(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that the command writes with one process; their metadata has its options."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main([*merge_words(models, out), "--quiet"]) == 0
    return content(out)


def test_two_runs_onto_one_output(
    cluster: Any, models: dict[str, str], merged_by_command: dict[str, str], tmp_path: Path
) -> None:
    """One of both gets the name, whole; the other says that it came too late."""
    runs = [ckpt(cluster, *merge_words(models, tmp_path / "out"), "--engine", "ray") for _ in range(2)]
    told = [run.communicate(timeout=90) for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], told
    assert content(tmp_path / "out") == merged_by_command
    assert names_in(tmp_path) == ["out"]


def test_killed_run_goes_on(
    cluster: Any, models: dict[str, str], merged_by_command: dict[str, str], tmp_path: Path
) -> None:
    """After the process that leads is killed, --continue makes what is missing, with the same bytes."""
    words = [*merge_words(models, tmp_path / "out"), "--engine", "ray", "--continue"]
    run = ckpt(cluster, *words)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("**/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not (tmp_path / "out").exists()
    again = ckpt(cluster, *words)
    told = again.communicate(timeout=90)
    assert again.returncode == 0, told
    assert content(tmp_path / "out") == merged_by_command
    assert len(load_file(tmp_path / "out" / next(name for name in names_in(tmp_path / "out") if "00001" in name))) > 0
