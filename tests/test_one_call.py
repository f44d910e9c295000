"""One call converts or merges, and writes the bytes that the command writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import (
    CkptkitError,
    OutputError,
    PlanError,
    Written,
    convert,
    extract_lora,
    merge,
    merge_lora,
    open_checkpoint,
)
from tests.helpers_cli import run_ckpt

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"], "bias": "none"}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Return a directory with a base, a tuned donor with other names, a training checkpoint and an adapter."""
    base = {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4), "n": torch.tensor(3)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({key: value + 1 for key, value in base.items()}, tmp_path / "tuned.safetensors")
    save_file({f"module.{key}": value + 2 for key, value in base.items()}, tmp_path / "ddp.safetensors")
    torch.save({"epoch": 3, "model": base}, tmp_path / "run.pt")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG))
    factors = {"fc.lora_A.weight": torch.randn(2, 3), "fc.lora_B.weight": torch.randn(4, 2)}
    prefix = "base_model.model."
    save_file({prefix + key: value for key, value in factors.items()}, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "cli").mkdir()
    return tmp_path


Call = Callable[[Path, Path], Written]
CALLS: dict[str, tuple[Call, list[str], str]] = {
    "convert": (
        lambda at, out: convert(at / "base.safetensors", out), ["convert", "base.safetensors"], "a.pt",
    ),
    "convert with a dtype": (
        lambda at, out: convert(at / "base.safetensors", out, dtype=torch.bfloat16, verify=True),
        ["convert", "base.safetensors", "--dtype", "BF16", "--verify"], "a.safetensors",
    ),
    "convert a training checkpoint": (
        lambda at, out: convert(at / "run.pt", out, dtype="F16"), ["convert", "run.pt", "--dtype", "F16"], "a.pt",
    ),
    "convert only the tensors": (
        lambda at, out: convert(str(at / "run.pt"), str(out), only_tensors=True, format="torch"),
        ["convert", "run.pt", "--only-tensors", "--format", "torch"], "a.weights",
    ),
    "convert to shards": (
        lambda at, out: convert(at / "base.safetensors", out, max_shard_size="30B"),
        ["convert", "base.safetensors", "--max-shard-size", "30B"], "shards",
    ),
    "merge": (
        lambda at, out: merge(at / "base.safetensors", at / "ddp.safetensors", out, ["module.*=*"]),
        ["merge", "base.safetensors", "ddp.safetensors", "--rename", "module.*=*"], "a.safetensors",
    ),
    "merge two donors": (
        lambda at, out: merge(at / "base.safetensors", [at / "ddp.safetensors", at / "tuned.safetensors"], out,
                              on_unexpected="add", on_missing="keep"),
        ["merge", "base.safetensors", "ddp.safetensors", "tuned.safetensors", "--on-unexpected", "add"], "a.pt",
    ),
    "merge lora": (
        lambda at, out: merge_lora(at / "base.safetensors", at / "adapter", out, scale=0.5),
        ["merge", "base.safetensors", "adapter", "--method", "lora", "--scale", "0.5"], "a.safetensors",
    ),
    "extract lora": (
        lambda at, out: extract_lora(at / "base.safetensors", at / "tuned.safetensors", out, 2),
        ["merge", "base.safetensors", "tuned.safetensors", "--method", "extract-lora", "--rank", "2"],
        "adapter_model.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "arguments", "name"), CALLS.values(), ids=CALLS.keys())
def test_a_call_writes_what_the_command_writes(
    inputs: Path, capsys: pytest.CaptureFixture[str], call: Call, arguments: list[str], name: str
) -> None:
    """Every file has the same name and the same bytes, and ``Written`` names the output."""
    written = call(inputs, inputs / "sub" / name)
    paths = [inputs / word if (inputs / word).exists() else word for word in arguments]
    ran = run_ckpt(capsys, *paths, "-o", inputs / "sub" / "cli" / name)
    assert ran.code == 0, ran.err
    sides = []
    for directory in (inputs / "sub", inputs / "sub" / "cli"):
        files = [
            path for path in directory.rglob("*") if path.is_file() and "cli" not in path.relative_to(directory).parts
        ]
        sides.append({path.relative_to(directory): path.read_bytes() for path in files})
    assert sides[0]
    assert sides[0] == sides[1]
    assert (written.path, written.tensors > 0) == (str(inputs / "sub" / name), True)


def test_live_inputs(tmp_path: Path) -> None:
    """A model and a dict of tensors are inputs too; an open Checkpoint stays open."""
    model = torch.nn.Linear(3, 2)
    plan = convert(model, tmp_path / "a.safetensors").plan
    assert plan is not None
    assert plan.command == "convert"
    donor = {"weight": torch.ones(2, 3)}
    with open_checkpoint(tmp_path / "a.safetensors") as base:
        merge(base, [donor], tmp_path / "b.safetensors")
        assert torch.equal(base.read("bias"), model.bias)
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found["weight"], donor["weight"])
    assert torch.equal(found["bias"], model.bias)


def test_an_output_is_replaced_only_with_force(inputs: Path) -> None:
    """Nothing changes without ``force``; the configuration of an adapter counts as well."""
    base, tuned = inputs / "base.safetensors", inputs / "tuned.safetensors"
    convert(base, inputs / "a.pt")
    before = (inputs / "a.pt").read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        convert(tuned, inputs / "a.pt")
    assert (inputs / "a.pt").read_bytes() == before
    convert(tuned, inputs / "a.pt", force=True)
    assert (inputs / "a.pt").read_bytes() != before
    (inputs / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"adapter_config\.json: already exists"):
        extract_lora(base, tuned, inputs / "adapter" / "adapter_model.safetensors", 1)
    assert not (inputs / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(OutputError, match=r"PEFT looks for adapter_model\.safetensors"):
        extract_lora(base, tuned, inputs / "other.safetensors", 1)


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (lambda at: convert(at / "base.safetensors", at / "a.txt"), OutputError, "does not name a format to write"),
        (lambda at: convert(at / "none", at / "a.pt"), CkptkitError, "none: no such file"),
        (lambda at: convert(at / "base.safetensors", at / "a.pt", dtype="int8"), PlanError, "base.safetensors: I8"),
        (lambda at: merge(at / "base.safetensors", [], at / "a.pt"), PlanError, "there is no donor"),
        (
            lambda at: merge_lora(at / "base.safetensors", at / "ddp.safetensors", at / "a.pt"), PlanError,
            "ddp.*no tensors of an adapter",
        ),
    ],
    ids=["suffix", "missing", "dtype", "no donor", "no config"],
)  # fmt: skip
def test_an_error_names_its_file_and_writes_nothing(inputs: Path, call: Any, error: Any, reason: str) -> None:
    """A refusal is one sentence with the path, as on the command line."""
    before = sorted(inputs.rglob("*"))
    with pytest.raises(error, match=reason):
        call(inputs)
    assert sorted(inputs.rglob("*")) == before
