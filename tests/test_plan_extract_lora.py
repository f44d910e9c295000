"""An adapter is extracted from a tuned model, and folding it gives the tuned weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import plan_extract_lora
from ckptkit.errors import PlanError, RuleError
from ckptkit.rules.load import as_rules
from tests.helpers_cli import run_ckpt

State = dict[str, torch.Tensor]


def states(rank: int) -> tuple[State, State]:
    """Return a base, and a tuned state with an update of the given rank in each weight."""
    generator = torch.Generator().manual_seed(1)
    base = {
        "q.weight": torch.randn(12, 8, generator=generator),
        "conv.weight": torch.randn(6, 4, 3, 3, generator=generator),
        "q.bias": torch.randn(12, generator=generator),
        "norm.weight": torch.ones(8),
    }
    tuned = dict(base)
    for key in ("q.weight", "conv.weight"):
        flat = base[key].flatten(1)
        up, down = (torch.randn(*shape, generator=generator) for shape in ((len(flat), rank), (rank, flat.shape[1])))
        tuned[key] = (flat + up @ down).reshape(base[key].shape)
    return base, tuned


def test_the_extracted_adapter_is_the_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter of rank 2 has an update of rank 2, with its configuration beside it; ``lora`` folds it.

    The directory is made, but not for a dry run. That the donor is an adapter is no news with ``lora``.
    """
    base, tuned = states(2)
    adapter = tmp_path / "adapter"
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    arguments: list[str | Path] = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "--rank", "2"]
    target = adapter / "adapter_model.safetensors"
    ran = run_ckpt(capsys, "merge", *arguments, "-o", target, "--method", "extract-lora", "--dry-run")
    assert (ran.code, adapter.exists()) == (0, False), ran.err
    ran = run_ckpt(capsys, "merge", *arguments, "-o", target, "--method", "extract-lora")
    assert ran.code == 0, ran.err
    assert "norm.weight" in ran.err
    factors = load_file(target)
    assert sorted(factors) == [
        f"base_model.model.{module}.lora_{factor}.weight" for module in ("conv", "q") for factor in "AB"
    ]
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert config["target_modules"] == ["conv", "q"]
    update = factors["base_model.model.q.lora_B.weight"] @ factors["base_model.model.q.lora_A.weight"]
    torch.testing.assert_close(base["q.weight"] + update, tuned["q.weight"], rtol=1e-4, atol=1e-4)
    ran = run_ckpt(
        capsys, "merge", tmp_path / "base.safetensors", adapter, "-o", tmp_path / "o.safetensors", "--method", "lora"
    )
    assert (ran.code, "this is an adapter" in ran.err) == (0, False), ran.err
    made = load_file(tmp_path / "o.safetensors")
    for key, value in tuned.items():
        torch.testing.assert_close(made[key], value, rtol=1e-4, atol=1e-4)


def test_nothing_is_written_where_the_configuration_would_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An existing configuration needs ``--force``, and the name of the output must be peft's."""
    base, tuned = states(1)
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    arguments: list[str | Path] = [
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "--method", "extract-lora", "--rank", "1"
    ]  # fmt: skip
    target = tmp_path / "adapter_model.safetensors"
    ran = run_ckpt(capsys, "merge", *arguments, "-o", target)
    assert (ran.code, "adapter_config.json: already exists" in ran.err, target.exists()) == (2, True, False)
    missing = tmp_path / "no" / "directory" / target.name
    ran = run_ckpt(capsys, "merge", *arguments, "-o", missing)
    assert (ran.code, f"the directory {missing.parent} does not exist" in ran.err) == (2, True)
    ran = run_ckpt(capsys, "merge", *arguments, "-o", tmp_path / "x.safetensors")
    assert (ran.code, "PEFT looks for adapter_model.safetensors" in ran.err) == (2, True)
    ran = run_ckpt(capsys, "merge", *arguments, "-o", target, "--force", "--dry-run", "--json")
    assert (ran.code, target.exists()) == (0, False)
    assert json.loads(ran.out)["plan"][0]["sources"] == [
        {"role": "base", "key": "conv.weight"}, {"role": "donor", "key": "conv.weight"}
    ]  # fmt: skip


def test_tensors_that_cannot_be_compared_are_named() -> None:
    """A key that the base lacks, another shape, a rank that is too large, and no weight are refused."""
    base, tuned = states(1)
    with pytest.raises(PlanError, match=r"'q\.weight' is \[12, 8\] in the tuned model, and the base does not have it"):
        plan_extract_lora({"w": torch.zeros(1)}, {"q.weight": tuned["q.weight"]}, 1)
    with pytest.raises(PlanError, match=r"and the base has it as \[8, 12\]"):
        plan_extract_lora({"q.weight": torch.zeros(8, 12)}, {"q.weight": tuned["q.weight"]}, 1)
    with pytest.raises(RuleError, match=r"'\w+\.weight': .* a rank of at most 6 \(choose a lower rank, or .*--drop"):
        plan_extract_lora(base, tuned, 7)
    with pytest.raises(PlanError, match="there is no weight of a module"):
        plan_extract_lora(base, tuned, 1, as_rules({"keep": ["norm.*"]}))
