"""What ``--quantize`` writes is opened by transformers, and computes as the weights that the codes stand for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import open_checkpoint
from tests.helpers_cli import run_ckpt

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def loaded(path: Path) -> Any:
    """Return the model in a directory, with the dtype that its configuration names."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(1, 33).reshape(2, 16)).logits
    return found


def saved(path: Path, kind: str, dtype: torch.dtype) -> Path:
    """Save a small model: a Llama, one with a tied head, or a Mixtral with a router and experts."""
    options = {
        "vocab_size": 128, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": kind == "tied",
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**options, num_local_experts=2, num_experts_per_tok=1)
        model = transformers.MixtralForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, attention_bias=True))
    model.to(dtype).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["BF16", "F32"])
@pytest.mark.parametrize("form", ["fp8-block", "fp8-row", "fp8-tensor", "int8-row"])
def test_a_quantised_llama_computes_as_its_dequantised_weights(
    form: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All logits are equal bit for bit, and near those of the model before; embeddings and the head stay plain."""
    if form != "fp8-block" and importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed_tensors is not installed")
    plain = saved(tmp_path / "plain", "llama", dtype)
    coded, back = tmp_path / "coded", tmp_path / "back"
    for source, out, option in ((plain, coded, ("--quantize", form)), (coded, back, ("--dequantize",))):
        out.mkdir()
        ran = run_ckpt(capsys, "convert", source, "-o", out / "model.safetensors", *option, "--carry", "--verify")
        assert ran.code == 0, ran.err
    with open_checkpoint(coded) as made:
        plain_keys = {key for key, info in made.items() if key.endswith(".weight") and info.dtype in ("BF16", "F32")}
        assert {key for key in plain_keys if "norm" not in key} == {"lm_head.weight", "model.embed_tokens.weight"}
    model, expected = loaded(coded), loaded(back)
    methods = [json.loads((path / "config.json").read_text()).get("quantization_config") for path in (coded, back)]
    assert methods[0]["quant_method"] == ("fp8" if form == "fp8-block" else "compressed-tensors")
    assert methods[1] is None
    found = logits(model)
    assert torch.equal(found.to(dtype), logits(expected))
    assert torch.nn.functional.cosine_similarity(found.flatten(), logits(loaded(plain)).flatten(), dim=0) > 0.99


def test_routers_stay_plain_and_experts_are_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A merge quantises too: of a Mixtral, transformers reads the experts and the router as they were meant."""
    plain = saved(tmp_path / "plain", "mixtral", torch.bfloat16)
    coded, back = tmp_path / "coded", tmp_path / "back"
    coded.mkdir()
    back.mkdir()
    words = ("--quantize", "fp8-block", "--carry", "--verify")
    ran = run_ckpt(capsys, "merge", plain, plain, "-o", coded / "model.safetensors", *words)
    assert ran.code == 0, ran.err
    listed = json.loads((coded / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert any(name.endswith(".gate") for name in listed)
    assert not any("experts" in name for name in listed)
    ran = run_ckpt(capsys, "convert", coded, "-o", back / "model.safetensors", "--dequantize", "--carry")
    assert ran.code == 0, ran.err
    assert torch.equal(logits(loaded(coded)), logits(loaded(back)))


@pytest.mark.parametrize("form", ["fp8-block", "int8-row", "nf4"])
def test_a_model_with_some_dequantised_layers_opens(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The carried configuration lists what a rule dequantised: no key is missing, and the logits are near."""
    needed = {"int8-row": "compressed_tensors", "nf4": "bitsandbytes"}.get(form)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    plain, coded, mixed = saved(tmp_path / "plain", "llama", torch.bfloat16), tmp_path / "coded", tmp_path / "mixed"
    mixed.mkdir()
    if form == "nf4":
        options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=options, device_map="cpu")
        model.save_pretrained(coded)
    else:
        coded.mkdir()
        out = coded / "model.safetensors"
        assert run_ckpt(capsys, "convert", plain, "-o", out, "--quantize", form, "--carry").code == 0
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nfrom = "model.layers.0.*"\nto = "model.layers.0.*"\nop = "dequantize"\n')
    ran = run_ckpt(capsys, "remap", coded, "-o", mixed / "model.safetensors", "--rules", rules, "--carry")
    assert ran.code == 0, ran.err
    model, info = transformers.AutoModelForCausalLM.from_pretrained(mixed, device_map="cpu", output_loading_info=True)
    assert not any(info.values())
    assert torch.allclose(logits(model.eval()), logits(loaded(coded)), atol=0.02)


@pytest.mark.parametrize("form", ["fp8-block", "int8-row"])
def test_a_head_that_is_tied_to_the_embedding_stays_plain(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has no tensor of it, and the library must not ask for its codes."""
    if form != "fp8-block" and importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed_tensors is not installed")
    plain, coded = saved(tmp_path / "plain", "tied", torch.bfloat16), tmp_path / "coded"
    coded.mkdir()
    out = coded / "model.safetensors"
    assert run_ckpt(capsys, "convert", plain, "-o", out, "--quantize", form, "--carry").code == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(coded, device_map="cpu", output_loading_info=True)
    assert not any(info.values())
    assert torch.allclose(logits(model.eval()), logits(loaded(plain)), atol=0.2)
