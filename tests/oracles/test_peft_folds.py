"""Every kind of adapter that is folded gives what ``merge_and_unload`` of peft makes of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import execute, plan_lora
from ckptkit.errors import CkptkitError

peft = pytest.importorskip("peft")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
pytestmark = pytest.mark.filterwarnings("ignore")


class Experts(nn.Module):
    """A stack of experts, whose parameters peft adapts with ``target_parameters``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([(x @ self.gate_up_proj[e].T)[..., :5] @ self.down_proj[e].T for e in range(3)]).sum(0)


class Net(nn.Module):
    """One module of each class that peft adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.lin, self.square, self.nobias = nn.Linear(8, 6), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.c1, self.c2, self.c3 = nn.Conv1d(3, 5, 3), nn.Conv2d(4, 6, 3), nn.Conv3d(3, 5, 2)
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.g, self.gsquare = pytorch_utils.Conv1D(6, 8), pytorch_utils.Conv1D(8, 8)
        self.ln = nn.LayerNorm(8)
        self.experts = Experts()
        self.head = nn.Linear(6, 3)


LORA = {"r": 2, "lora_alpha": 6, "init_lora_weights": False}
EVERY = ["emb", "lin", "square", "nobias", "c1", "c2", "c3", "pointwise"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {**LORA, "target_modules": EVERY}),
    "lora of Conv1D": ("LoraConfig", {**LORA, "target_modules": ["g", "gsquare"], "fan_in_fan_out": True}),
    "lora with biases": ("LoraConfig", {**LORA, "target_modules": ["lin", "c2"], "lora_bias": True, "bias": "all"}),
    "lora with new rows": (
        "LoraConfig", {**LORA, "target_modules": ["lin"], "trainable_token_indices": {"emb": [7, 1]}}
    ),
    "dora": ("LoraConfig", {**LORA, "target_modules": EVERY, "use_dora": True}),
    "dora with rslora and patterns": (
        "LoraConfig",
        {**LORA, "target_modules": EVERY, "use_dora": True, "use_rslora": True, "rank_pattern": {"lin": 3}},
    ),
    "dora of Conv1D": (
        "LoraConfig", {**LORA, "target_modules": ["g", "gsquare"], "fan_in_fan_out": True, "use_dora": True}
    ),
    "dora with a head": (
        "LoraConfig", {**LORA, "target_modules": ["lin"], "use_dora": True, "modules_to_save": ["head"]}
    ),
    "experts": (
        "LoraConfig", {**LORA, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "down_proj"]}
    ),
    "experts and a module": (
        "LoraConfig", {**LORA, "target_modules": ["lin"], "target_parameters": ["experts.down_proj"]}
    ),
    "adalora": ("AdaLoraConfig", {"target_modules": ["lin", "square"], "init_r": 3, "total_step": 9}),
    "adalora of Conv1D": (
        "AdaLoraConfig", {"target_modules": ["g", "gsquare"], "init_r": 3, "total_step": 9, "fan_in_fan_out": True}
    ),
    "loha": ("LoHaConfig", {"target_modules": ["lin", "c1", "c2", "pointwise"], "r": 2, "alpha": 6}),
    "loha with kernels": (
        "LoHaConfig",
        {"target_modules": ["lin", "c1", "c2", "pointwise"], "r": 2, "alpha": 6, "use_effective_conv2d": True},
    ),
    "loha with patterns": (
        "LoHaConfig", {"target_modules": ["lin", "c2"], "r": 2, "rank_pattern": {"c2": 3}, "alpha_pattern": {"lin": 5}}
    ),
    "lokr": ("LoKrConfig", {"target_modules": ["lin", "square", "c2"], "r": 2, "alpha": 6}),
    "lokr of low rank": (
        "LoKrConfig", {"target_modules": ["lin", "c2", "pointwise"], "r": 1, "alpha": 6, "decompose_both": True}
    ),
    "lokr with kernels": (
        "LoKrConfig",
        {"target_modules": ["lin", "c1", "c2", "pointwise"], "r": 1, "alpha": 6, "use_effective_conv2d": True},
    ),
    "ia3": ("IA3Config", {"target_modules": ["lin", "square", "nobias"], "feedforward_modules": ["square"]}),
    "ia3 of convolutions": (
        "IA3Config", {"target_modules": ["c2", "c3", "pointwise"], "feedforward_modules": ["pointwise"]}
    ),
    "ia3 of Conv1D": (
        "IA3Config",
        {"target_modules": ["g", "gsquare"], "feedforward_modules": ["gsquare"], "fan_in_fan_out": True},
    ),
    "ia3 by a pattern": ("IA3Config", {"target_modules": ["lin", "square"], "feedforward_modules": ".*squ.*"}),
    "norms": ("LNTuningConfig", {"target_modules": ["ln"]}),
    "rows": ("TrainableTokensConfig", {"target_modules": ["emb"], "token_indices": [2, 0, 8]}),
}  # fmt: skip


def trained(kind: str, settings: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Return a base, and a model of peft on it whose adapter has random values."""
    torch.manual_seed(0)
    base = Net()
    model = peft.get_peft_model(copy.deepcopy(base), getattr(peft, kind)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return base, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES.keys())
def test_a_fold_is_what_peft_merges(kind: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    base, model = trained(kind, settings)
    model.save_pretrained(tmp_path / "adapter")
    state = {key: value.to(dtype) for key, value in base.state_dict().items()}
    torch.save(state, tmp_path / "base.pt")
    if dtype != torch.float32:  # peft would round the update before the sum: compare with its sum in F32
        for key, value in state.items():
            base.get_parameter(key).data = value.float()
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = {key: value.to(dtype) for key, value in model.merge_and_unload().state_dict().items()}
    sources = {"base": tmp_path / "base.pt", "donor": tmp_path / "adapter"}
    execute(plan_lora(sources["base"], sources["donor"]), sources, tmp_path / "merged.pt")
    made = torch.load(tmp_path / "merged.pt", weights_only=True)
    changed = [key for key in made if not torch.equal(made[key], state[key])]
    assert changed
    rtol = 1e-5 if dtype is torch.float32 else 0.01
    torch.testing.assert_close(made, expected, rtol=rtol, atol=1e-5 if dtype is torch.float32 else 1e-3)


def test_adalora_after_its_ranks_were_cut(tmp_path: Path) -> None:
    """The saved ``rank_pattern`` cuts singular values, and the scale stays that of the first rank."""
    base, model = trained("AdaLoraConfig", {"target_modules": ["lin", "square"], "init_r": 4, "target_r": 2,
                                            "total_step": 3, "tinit": 0, "tfinal": 1, "deltaT": 1})  # fmt: skip
    for step in range(4):
        model.zero_grad()
        sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(base.state_dict(), tmp_path / "base.pt")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    expected = dict(loaded.merge_and_unload().state_dict())
    sources = {"base": tmp_path / "base.pt", "donor": tmp_path / "adapter"}
    execute(plan_lora(sources["base"], sources["donor"]), sources, tmp_path / "merged.pt")
    torch.testing.assert_close(torch.load(tmp_path / "merged.pt", weights_only=True), expected)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LoKrConfig", {"target_modules": ["c1"], "r": 8}),
        ("OFTConfig", {"target_modules": ["lin"]}),
        ("BOFTConfig", {"target_modules": ["lin"]}),
        ("HRAConfig", {"target_modules": ["lin"]}),
        ("VeraConfig", {"target_modules": ["lin"]}),
        ("LoraConfig", {**LORA, "init_lora_weights": "pissa", "target_modules": ["lin"]}),
        ("LoraConfig", {**LORA, "init_lora_weights": "olora", "target_modules": ["lin"]}),
    ],
)
def test_what_has_another_formula_is_refused_with_a_way_out(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base, model = trained(kind, settings)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CkptkitError) as caught:
        plan_lora(base, tmp_path / "adapter")
    assert caught.value.hint
