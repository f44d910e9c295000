"""A GGUF file becomes a model that transformers opens, with the logits of the model that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import execute, open_checkpoint, plan_remap, suggest_rules

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from tests.helpers_gguf_models import MODELS, saved_tensors, tiny, write_gguf  # noqa: E402 - needs both

IDS = torch.arange(3, 35)[None]
# The models whose configuration transformers takes from GGUF as it was.
PEERS = ["qwen2", "gemma2", "gemma3", "nemotron", "stablelm"]


def made(path: Path, out: Path, **options: object) -> Path:
    out.mkdir()
    with open_checkpoint(path) as checkpoint:
        execute(plan_remap(checkpoint, "gguf:auto", **options), checkpoint, out / "model.safetensors")  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    """Every tensor has its place, and every bit of the logits is the same; ``align`` finds the same rules."""
    model = tiny(name)
    write_gguf(name, model, tmp_path / "m.gguf")
    out = made(tmp_path / "m.gguf", tmp_path / "out")
    model.config.save_pretrained(out)
    again, report = type(model).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)

    save_file(saved_tensors(model), tmp_path / "saved.safetensors")
    with open_checkpoint(tmp_path / "m.gguf") as found:
        result = suggest_rules(tmp_path / "saved.safetensors", found)
        assert result.complete
        execute(plan_remap(found, result.rules), found, tmp_path / "aligned.safetensors")
    aligned, expected = load_file(tmp_path / "aligned.safetensors"), load_file(out / "model.safetensors")
    assert aligned.keys() == expected.keys()
    assert all(torch.equal(aligned[key], value) for key, value in expected.items())


def test_half_precision_keeps_the_logits(tmp_path: Path) -> None:
    """A Llama of F16, whose norms are F32, gives the logits of the model in F16 widened to F32."""
    model = tiny("llama")
    write_gguf("llama", model, tmp_path / "m.gguf", "F16")
    out = made(tmp_path / "m.gguf", tmp_path / "out")
    model.config.save_pretrained(out)
    again = type(model).from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.half().float())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", PEERS)
def test_the_weights_are_those_that_the_library_reads(name: str, kind: str, tmp_path: Path) -> None:
    """transformers' own reader of GGUF makes the same tensors, of quantised weights too."""
    model = tiny(name)
    write_gguf(name, model, tmp_path / "m.gguf", kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    out = made(tmp_path / "m.gguf", tmp_path / "out", dequantize=kind != "F32")
    model.config.save_pretrained(out)
    ours = type(model).from_pretrained(out, dtype=torch.float32).state_dict()
    expected = theirs.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], value) for key, value in expected.items())
