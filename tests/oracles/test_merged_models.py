"""transformers opens what recipes write with ``carry``: models merged by every method, and models of more layers."""

from __future__ import annotations

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


def answers(recipe: dict[str, Any], out: Path) -> Any:
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


def test_a_model_of_more_layers_answers(models: Path, tmp_path: Path) -> None:
    slices = [{"input": "a", "layers": [0, 2]}, {"input": "b", "layers": [1, 3]}, {"input": "a", "layers": [2, 3]}]
    inputs = [{"path": f"{models}/{name}"} for name in "ab"]
    recipe = {"method": "passthrough", "base": "a", "layer_keys": "model.layers.{i:int}.*", "input": inputs}
    assert answers({**recipe, "slice": slices}, tmp_path / "out").config.num_hidden_layers == 5


def test_a_tied_head_stays_tied(models: Path, tmp_path: Path) -> None:
    model = answers({"method": "linear", "input": [{"path": f"{models}/{name}"} for name in "xy"]}, tmp_path / "out")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
