"""transformers opens what recipes write with ``carry``: models merged by every method, and models of more layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit
from ckptkit.plans.methods.table import METHODS

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(8)[None]
NEEDED: dict[str, dict[str, float]] = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.01}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny Llamas of one origin, and one with a tied head."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    base.save_pretrained(folder / "base")
    origin = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    for name in "ab":
        base.load_state_dict({key: tensor + 0.02 * torch.randn_like(tensor) for key, tensor in origin.items()})
        base.save_pretrained(folder / name)
    for name in "xy":
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(
            folder / name
        )
    return folder


def answers(recipe: dict[str, Any] | str, out: Path) -> Any:
    """Write the output of a recipe, and return the model that transformers opens, after one answer."""
    out.mkdir()
    plan = ckptkit.plan_recipe(recipe)
    ckptkit.execute(plan, plan.paths, out / "model.safetensors", carry=True, verify=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model(TOKENS).logits.isfinite().all()
    return model


@pytest.mark.parametrize("name", [name for name in METHODS if name != "passthrough"])
def test_models_merged_by_each_method_answer(name: str, models: Path, tmp_path: Path) -> None:
    method = METHODS[name]
    recipe: dict[str, Any] = {"method": name, **NEEDED.get(name, {})}
    recipe |= {
        key: 0.5 for key, parameter in method.parameters().items() if parameter.default is None and key not in recipe
    }
    names = {1: ["base", "a"], 2: ["a", "b"]}.get(method.most or 3, ["base", "a", "b"])
    recipe |= {"base": "base"} if method.uses_base == "always" else {}
    merged = answers({**recipe, "input": [{"path": f"{models}/{each}"} for each in names]}, tmp_path / "out")
    first = transformers.AutoModelForCausalLM.from_pretrained(models / "base").state_dict()
    change = max((tensor - first[key]).abs().max().item() for key, tensor in merged.state_dict().items())
    assert 0 < change < 0.5


def test_a_linear_merge_computes_what_torch_makes_of_the_weights(models: Path, tmp_path: Path) -> None:
    weights = {"base": 0.5, "a": 0.75, "b": -0.25}
    inputs = [{"path": f"{models}/{name}", "weight": weight} for name, weight in weights.items()]
    merged = answers({"method": "linear", "input": inputs}, tmp_path / "out")
    parts = [
        (weight, transformers.AutoModelForCausalLM.from_pretrained(models / name).state_dict())
        for name, weight in weights.items()
    ]
    expected = transformers.AutoModelForCausalLM.from_pretrained(models / "base")
    expected.load_state_dict(
        {key: sum(weight * state[key].double() for weight, state in parts).float() for key in expected.state_dict()}
    )
    torch.testing.assert_close(merged(TOKENS).logits, expected(TOKENS).logits, rtol=1e-5, atol=1e-6)


UP_SCALING = """
version = 1
method = "passthrough"
base = "m"
layer_keys = "model.layers.{i:int}.*"
[[input]]
name = "m"
path = "mistral/"
[[slice]]
input = "m"
layers = [0, 24]
[[slice]]
input = "m"
layers = [8, 32]
"""


def test_a_mistral_of_48_layers_computes_what_torch_makes_of_its_32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slices of SOLAR (arXiv 2312.15166)."""
    config = transformers.MistralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=32, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "mistral")
    monkeypatch.chdir(tmp_path)
    Path("up.toml").write_text(UP_SCALING)
    larger = answers("up.toml", tmp_path / "out")
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 48
    model.model.layers = torch.nn.ModuleList([*model.model.layers[:24], *model.model.layers[8:]])
    model.config.num_hidden_layers = 48
    assert torch.equal(larger(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)


def test_a_model_of_more_layers_answers(models: Path, tmp_path: Path) -> None:
    slices = [{"input": "a", "layers": [0, 2]}, {"input": "b", "layers": [1, 3]}, {"input": "a", "layers": [2, 3]}]
    inputs = [{"path": f"{models}/{name}"} for name in "ab"]
    recipe = {"method": "passthrough", "base": "a", "layer_keys": "model.layers.{i:int}.*", "input": inputs}
    assert answers({**recipe, "slice": slices}, tmp_path / "out").config.num_hidden_layers == 5


def test_a_tied_head_stays_tied(models: Path, tmp_path: Path) -> None:
    model = answers({"method": "linear", "input": [{"path": f"{models}/{name}"} for name in "xy"]}, tmp_path / "out")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
