"""``plan_lora`` takes the configuration of an adapter as peft has it in memory and as peft writes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import execute, plan_lora

peft = pytest.importorskip("peft")


def base_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["0", "2"]},
        {"target_modules": ["0", "2"], "use_rslora": True, "lora_alpha": 3},
        {"target_modules": ["0", "2"], "rank_pattern": {"2": 1}, "alpha_pattern": {"0": 5}},
        {"target_modules": ["0"], "modules_to_save": ["2"]},
    ],
    ids=["plain", "rslora", "patterns", "modules to save"],
)
def test_each_form_of_the_configuration_merges_as_peft_does(settings: dict[str, Any], tmp_path: Path) -> None:
    """A LoraConfig, its dict, its file, its directory and the default beside the adapter give what peft merges."""
    base = base_model()
    config = peft.LoraConfig(r=2, init_lora_weights=False, **settings)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(base.state_dict(), tmp_path / "base.pt")
    expected = model.merge_and_unload().state_dict()
    sources = {"base": tmp_path / "base.pt", "donor": tmp_path / "adapter"}
    adapter = tmp_path / "adapter"
    forms: list[Any] = [config, config.to_dict(), adapter / "adapter_config.json", adapter, str(adapter), None]
    plans = [plan_lora(sources["base"], sources["donor"], form) for form in forms]
    assert all(plan == plans[0] for plan in plans)
    out = tmp_path / "merged.pt"
    execute(plans[0], sources, out)
    torch.testing.assert_close(torch.load(out, weights_only=True), dict(expected), rtol=1e-6, atol=1e-7)
