"""``align`` finds what transformers and PEFT do to names and experts when they save; both libraries are the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckptkit import execute, load_into, open_checkpoint, plan_remap, suggest_rules

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    "Qwen2Moe": {"moe_intermediate_size": 24, "num_experts": 4, "shared_expert_intermediate_size": 40},
    "Olmoe": {"num_experts": 4},
}


@pytest.mark.parametrize("name", MODELS)
def test_saved_experts_become_those_of_the_live_model(name: str, tmp_path: Path) -> None:
    """The rules make every tensor of the live model, bit by bit, from the files of ``save_pretrained``, and back."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "saved")
    live: dict[str, torch.Tensor] = model.state_dict()
    with open_checkpoint(tmp_path / "saved") as saved:
        result = suggest_rules(model, saved)
        assert result.complete
        execute(plan_remap(saved, result.rules), saved, tmp_path / "live.safetensors")
        made = load_file(tmp_path / "live.safetensors")
        assert made.keys() >= live.keys()
        assert all(torch.equal(made[key], value) for key, value in live.items())
        back = suggest_rules(saved, live)
        assert back.complete
        execute(plan_remap(live, back.rules), live, tmp_path / "saved.safetensors")
        again = load_file(tmp_path / "saved.safetensors")
        assert all(torch.equal(again[key], saved.read(key)) for key in saved)


def test_an_adapter_and_the_base_load_as_peft_loads_them(tmp_path: Path) -> None:
    """With the rules, the outputs are those of PEFT's own loader; the base goes to the base layers."""
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.q(x))

    def build() -> Any:
        return peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]))

    trained = build()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "adapter")
    mine, other = build(), build()
    other.load_state_dict(mine.state_dict())
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(other, adapter)
    load_into(mine, adapter, suggest_rules(mine, adapter).rules, on_missing="keep")
    inputs = torch.randn(4, 8)
    assert torch.equal(mine(inputs), other(inputs))
    base = {key: value + 1 for key, value in Net().state_dict().items() if key.startswith("q")}
    load_into(mine, base, suggest_rules(mine, base).rules, on_missing="keep")
    assert torch.equal(mine.state_dict()["base_model.model.q.base_layer.weight"], base["q.weight"])
