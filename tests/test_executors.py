"""``execute(executor=)``: workers write the shards, and the output is the one of one process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit import ChangedError, choose_output, execute, plan_remap
from tests.helpers_outputs import names_in, sha256

STATE = {f"l{number}": torch.full((100,), 10.0**number) for number in range(8)}  # 1e5 and more overflow in F16


@pytest.fixture
def source(tmp_path: Path) -> str:
    save_file(STATE, tmp_path / "in.safetensors", {"made": "here"})
    return str(tmp_path / "in.safetensors")


def half(source: str) -> ckptkit.Plan:
    return plan_remap(source, ["*=new.*"], dtype="F16")


def shards(path: Path, **options: Any) -> ckptkit.Output:
    return choose_output(path, max_shard_size=450, **options)  # two tensors of F16 a shard


def content(out: Path) -> dict[str, str]:
    return {name: sha256(out / name) for name in names_in(out)}


class Pickling(Executor):
    """An executor that does each task at once; task and result are pickled, as for another process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Do the task."""
        function, given, named = pickle.loads(pickle.dumps((fn, args, kwargs)))
        future: Future[Any] = Future()
        future.set_result(pickle.loads(pickle.dumps(function(*given, **named))))
        return future


def test_workers_write_what_one_process_writes(source: str, tmp_path: Path) -> None:
    """Bytes, losses and notes are the same, progress counts every byte, and nothing else is left."""
    plan = half(source)
    told: list[int] = []
    one = execute(plan, source, shards(tmp_path / "one"), allow_overflow=True)
    out = shards(tmp_path / "two")
    two = execute(plan, source, out, allow_overflow=True, executor=Pickling(), progress=told.append)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert (two.losses, two.plan, two.nbytes, two.format) == (one.losses, one.plan, one.nbytes, one.format)
    assert (len(two.losses), told) == (3, [400] * 4)
    assert names_in(tmp_path) == ["in.safetensors", "one", "two"]
    assert (tmp_path / "two" / two.files[0]).stat().st_mode == (tmp_path / "one" / one.files[0]).stat().st_mode


class Stopping(Executor):
    """An executor that does ``count`` tasks at once, and then raises."""

    def __init__(self, count: int, error: BaseException) -> None:
        self.count, self.error = count, error
        self.threads = ThreadPoolExecutor(1)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Do the task, or raise."""
        self.count -= 1
        if self.count >= 0:
            return self.threads.submit(fn, *args, **kwargs)
        return self.threads.submit(self._fail)

    def _fail(self) -> None:
        raise self.error


def test_shards_are_kept_after_the_death_of_a_worker(source: str, tmp_path: Path) -> None:
    """The error is one sentence that names the shard, and a later run makes only what is missing."""
    plan, out = half(source), shards(tmp_path / "out")
    broken = Stopping(2, BrokenProcessPool("ended"))
    with pytest.raises(ckptkit.WorkerError, match=r"shard model-0000[34]-of-00004.* ended.*2 finished shards are kept"):
        execute(plan, source, out, allow_overflow=True, executor=broken)
    with ThreadPoolExecutor(2) as executor:
        written = execute(plan, source, out, allow_overflow=True, executor=executor, resume=True, verify=True)
    assert written.kept_shards == 2
    one = execute(plan, source, shards(tmp_path / "one"), allow_overflow=True)
    assert content(tmp_path / "one") == content(tmp_path / "out")
    assert written.losses == one.losses
    assert names_in(tmp_path) == ["in.safetensors", "one", "out"]


def test_one_process_goes_on_where_workers_ended(source: str, tmp_path: Path) -> None:
    """An interrupt keeps finished shards for ``resume``, with or without an executor."""
    plan, out = half(source), shards(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        execute(plan, source, out, allow_overflow=True, executor=Stopping(3, KeyboardInterrupt()), resume=True)
    written = execute(plan, source, out, allow_overflow=True, resume=True)
    assert written.kept_shards == 3
    assert names_in(tmp_path) == ["in.safetensors", "out"]


def test_overflow_is_refused_as_in_one_process(source: str, tmp_path: Path) -> None:
    """The sentence is the same, and nothing is left."""
    plan, found = half(source), []
    with ThreadPoolExecutor(2) as threads:
        for executor in (None, threads):
            with pytest.raises(ckptkit.PlanError) as caught:
                execute(plan, source, shards(tmp_path / "out"), executor=executor)
            found.append(str(caught.value))
    assert found[0] == found[1]
    assert names_in(tmp_path) == ["in.safetensors"]


def test_error_of_a_worker_names_shard_and_path(source: str, tmp_path: Path) -> None:
    """An input that changes during the run is refused with its class, and nothing is left."""
    plan = half(source)

    def change(_nbytes: int) -> None:
        save_file({**STATE, "l7": torch.ones(100)}, source, {"made": "here"})

    with ThreadPoolExecutor(1) as executor, pytest.raises(ChangedError) as caught:
        execute(plan, source, shards(tmp_path / "out"), allow_overflow=True, executor=executor, progress=change)
    assert caught.value.path == source
    assert names_in(tmp_path) == ["in.safetensors"]


@pytest.mark.parametrize(
    ("out", "options", "reason"),
    [
        ("out.safetensors", {}, "each worker writes shards, and this output is one file"),
        ("out", {"format": "dcp"}, "this output is a distributed checkpoint"),
        ("memory://bucket/out", {"max_shard_size": 450}, "a store has no place for them"),
    ],
    ids=["file", "dcp", "store"],
)
def test_output_that_workers_cannot_write_is_refused(
    out: str, options: dict[str, Any], reason: str, source: str, tmp_path: Path
) -> None:
    """The sentence says what to do instead."""
    place = out if "://" in out else str(tmp_path / out)
    with ThreadPoolExecutor(1) as executor, pytest.raises(ckptkit.OutputError, match=reason):
        execute(half(source), source, choose_output(place, **options), executor=executor)
    assert names_in(tmp_path) == ["in.safetensors"]


def test_functions_of_one_call_take_an_executor(source: str, tmp_path: Path) -> None:
    """``convert``, ``merge``, ``merge_lora`` and ``apply_delta`` write the files of one process; inputs are paths."""
    other, patch, adapter = (str(tmp_path / f"{name}.safetensors") for name in ("other", "patch", "adapter"))
    save_file({**STATE, "l3": torch.zeros(100), "fc.weight": torch.ones(4, 4)}, other)
    ckptkit.make_delta(source, other, patch)
    save_file({"fc.lora_A.weight": torch.ones(2, 4), "fc.lora_B.weight": torch.ones(4, 2)}, adapter)
    config = {"r": 2, "lora_alpha": 2}
    calls: list[Callable[..., object]] = [
        lambda out, **more: ckptkit.convert(source, out, **more),
        lambda out, **more: ckptkit.merge(source, [other], out, **more),
        lambda out, **more: ckptkit.merge_lora(other, adapter, out, config, **more),
        lambda out, **more: ckptkit.apply_delta(source, patch, out, **more),
    ]
    for number, call in enumerate(calls):
        for name, executor in (("one", None), ("two", Pickling())):
            call(tmp_path / f"{name}{number}", max_shard_size=900, executor=executor)
        assert content(tmp_path / f"one{number}") == content(tmp_path / f"two{number}")
    in_memory: list[Callable[..., object]] = [
        lambda out, **more: ckptkit.convert(STATE, out, **more),
        lambda out, **more: ckptkit.merge(source, STATE, out, **more),
        lambda out, **more: ckptkit.merge_lora(STATE, adapter, out, config, **more),
        lambda out, **more: ckptkit.apply_delta(source, STATE, out, **more),
    ]
    for call, role in zip(in_memory, ("source", "donor", "base", "patch"), strict=True):
        with pytest.raises(ckptkit.ArgumentError, match=f"the {role} is a dict"):
            call(tmp_path / "out", max_shard_size=900, executor=Pickling())


def test_sources_are_paths(source: str, tmp_path: Path) -> None:
    """What is only in memory is refused by its role, with every executor."""
    plan = half(source)
    with ThreadPoolExecutor(1) as executor, ckptkit.open_checkpoint(source) as checkpoint:
        for value, what in ((checkpoint, "an open Checkpoint"), (STATE, "a dict")):
            with pytest.raises(ckptkit.ArgumentError, match=f"the source is {what}"):
                execute(plan, value, shards(tmp_path / "out"), executor=executor)
    with pytest.raises(ckptkit.ArgumentError, match="executor must be an Executor"):
        execute(plan, source, shards(tmp_path / "out"), executor=2)  # type: ignore[arg-type]


def test_work_directory_that_a_worker_cannot_reach(source: str, tmp_path: Path) -> None:
    """A task that is done after its run has ended writes nothing, and says why."""
    submitted: list[Any] = []

    class Late(Stopping):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            submitted.append(lambda: fn(*args, **kwargs))
            return super().submit(fn, *args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        execute(
            half(source),
            source,
            shards(tmp_path / "out"),
            allow_overflow=True,
            executor=Late(1, KeyboardInterrupt()),
        )
    with pytest.raises(ckptkit.OutputError, match="the run has ended, or this worker cannot reach it"):
        submitted[0]()
    assert names_in(tmp_path) == ["in.safetensors"]
