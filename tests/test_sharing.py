"""``executor=`` of stats, check, diff and digest: parts of the work on an executor, and the result of one process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit.cli import main
from ckptkit.tasks import sharing

FILES = ("fixtures/lenet_10class.pth", "fixtures/encoder_sharded", "fixtures/packed_weights.safetensors")


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    """An executor for which also a few bytes are worth a task."""
    monkeypatch.setattr(sharing, "_WORTH", 0)
    monkeypatch.setattr(sharing, "_LEAST", 1 << 12)
    with ThreadPoolExecutor(2) as found:
        yield found


@pytest.mark.parametrize("path", FILES)
def test_results_are_those_of_one_process(path: str, executor: Executor) -> None:
    """Each is equal to the last bit and in the same order, also with rules and with quantised weights as numbers."""
    told: list[int] = []
    one, shared = ckptkit.stats(path), ckptkit.stats(path, executor=executor, progress=told.append)
    assert (dict(shared.tensors), list(shared.tensors), shared.total) == (
        dict(one.tensors),
        list(one.tensors),
        one.total,
    )
    assert ckptkit.digest(path, executor=executor) == ckptkit.digest(path)
    assert ckptkit.check_digests(ckptkit.digest(path), path, executor=executor).ok
    assert ckptkit.run_checks(path, executor=executor) == ckptkit.run_checks(path)
    assert sum(told) == sum(
        info.nbytes for key, info in ckptkit.open_checkpoint(path).items() if key in one.tensors.numbers
    )


def test_replaced_file_is_refused(executor: Executor, tmp_path: Path) -> None:
    """A worker opens the file under its path, which may be another one of the same size and time of change."""
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({f"l{number}": torch.zeros(2000) for number in range(4)}, path)
    for measure in (ckptkit.stats, ckptkit.digest):
        shutil.copy2(path, other)

        def replace(_: int) -> None:
            if other.exists():
                other.replace(path)

        with pytest.raises(ckptkit.ChangedError, match="another program replaced the file"):
            measure(path, executor=executor, progress=replace)


def test_long_tensor_is_divided(executor: Executor, tmp_path: Path) -> None:
    """Parts of one tensor begin where its reads begin, so that sums and checksums are the same."""
    generator = torch.Generator().manual_seed(3)
    state = {"long": torch.randn(1_700_001, generator=generator), "short": torch.tensor([1.0, float("nan")])}
    torch.save(state, tmp_path / "a.pt")
    save_file({**state, "long": state["long"] * (torch.arange(1_700_001) % 7 > 0)}, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        path = tmp_path / name
        assert dict(ckptkit.stats(path, executor=executor).tensors) == dict(ckptkit.stats(path).tensors)
        assert ckptkit.run_checks(path, executor=executor) == ckptkit.run_checks(path)
    both = tmp_path / "a.pt", tmp_path / "b.safetensors"
    rules = ["long=x", "short=y"]
    assert ckptkit.compare_values(*both, executor=executor) == ckptkit.compare_values(*both)
    expected = {"x": state["long"], "y": state["short"]}
    torch.save(expected, tmp_path / "c.pt")
    renamed = tmp_path / "c.pt", tmp_path / "b.safetensors", rules
    assert ckptkit.diff(*renamed, values=True, rtol=0.1, executor=executor) == ckptkit.diff(
        *renamed, values=True, rtol=0.1
    )


def test_dequantised_sides_are_compared_by_workers(executor: Executor, tmp_path: Path) -> None:
    """A worker decodes the weights of its part, to the same dtype."""
    codes = torch.randn(140, 200, generator=torch.Generator().manual_seed(3))
    parts = {"l.weight": codes.to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.rand(2, 2) + 0.5}
    save_file({**parts, "n.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="ascii")
    save_file({"l.weight": codes, "n.weight": torch.ones(4)}, tmp_path / "plain.safetensors")
    both = str(tmp_path / "plain.safetensors"), str(tmp_path / "model.safetensors")
    for dequantize in (True, "BF16"):
        one = ckptkit.diff(*both, values=True, dequantize=dequantize)
        assert one.values is not None
        assert [worst.key for worst in one.values.different] == ["l.weight"]
        assert ckptkit.diff(*both, values=True, dequantize=dequantize, executor=executor) == one
        numbers = ckptkit.stats(both[1], dequantize=dequantize, executor=executor)
        assert dict(numbers.tensors) == dict(ckptkit.stats(both[1], dequantize=dequantize).tensors)


def test_only_paths_are_shared(executor: Executor) -> None:
    """What only this process has in memory is refused before any work, by the name of the argument."""
    model = torch.nn.Linear(2, 2)
    for call in (
        lambda: ckptkit.stats(model, executor=executor),
        lambda: ckptkit.digest(model, executor=executor),
        lambda: ckptkit.run_checks(model, executor=executor),
    ):
        with pytest.raises(ckptkit.ArgumentError, match="the checkpoint is a Linear"):
            call()
    with pytest.raises(ckptkit.ArgumentError, match="the found is a Linear"):
        ckptkit.compare_values(FILES[0], model, executor=executor)


def test_engine_without_its_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the extra."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["stats", FILES[0], "--engine", "ray"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == "ckpt: the engine ray needs ray, which is not installed\nhint: install the extra [ray]\n"
