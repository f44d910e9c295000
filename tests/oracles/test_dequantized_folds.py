"""An adapter folds into a dequantised base as PEFT folds it into the model that the library dequantises."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckptkit import execute, load_rules, open_checkpoint, plan_remap
from tests.helpers_cli import run_ckpt

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")

from tests.helpers_gguf_models import saved_tensors, tiny, write_gguf  # noqa: E402 - needs both

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # that transformers and PEFT give each other


def adapted(model: Any, directory: Path) -> dict[str, torch.Tensor]:
    """Save a random adapter, and return the tensors of the model after PEFT has merged it."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    live = peft.get_peft_model(model, config)
    live.save_pretrained(directory)
    return saved_tensors(live.merge_and_unload())


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_an_adapter_folds_into_nf4(nested: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folded weights are those of PEFT in float32, rounded once to BF16.

    bitsandbytes itself rounds the numbers to BF16, so those in float32 are the ones that ckptkit reads.
    Rows are whole blocks of 64: bitsandbytes 0.50 mixes up the scales of others on a CPU.
    """
    tiny("llama", intermediate_size=128).bfloat16().save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    quantised.save_pretrained(tmp_path / "nf4")
    plain = quantised.dequantize(dtype=torch.float32)
    numbers = plan_remap(tmp_path / "nf4", dequantize="float32").materialize(tmp_path / "nf4")
    missing, unexpected = plain.load_state_dict(numbers, strict=False)
    assert (missing, unexpected) in (([], []), (["lm_head.weight"], []))
    expected = adapted(plain, tmp_path / "adapter")
    out = tmp_path / "out" / "model.safetensors"
    out.parent.mkdir()
    ran = run_ckpt(
        capsys, "merge", tmp_path / "nf4", tmp_path / "adapter", "-o", out, "--method", "lora", "--dequantize"
    )
    assert ran.code == 0, ran.err
    made = load_file(out)
    assert made.keys() == expected.keys()
    differ = [key for key, value in expected.items() if not torch.equal(made[key], value.bfloat16())]
    assert differ == []


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_an_adapter_folds_into_a_model_of_gguf(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is put into the layout of transformers first, and then the adapter of that model folds into it."""
    model = tiny("llama")
    write_gguf("llama", model, tmp_path / "m.gguf", kind)
    out = tmp_path / "out"
    out.mkdir()
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        plan = plan_remap(checkpoint, load_rules("gguf:auto"), dequantize=True)
        execute(plan, checkpoint, out / "model.safetensors")
    model.config.save_pretrained(out)
    base = type(model).from_pretrained(out, dtype=torch.float32)
    expected = adapted(base, tmp_path / "adapter")
    merged = tmp_path / "merged.safetensors"
    ran = run_ckpt(capsys, "merge", out, tmp_path / "adapter", "-o", merged, "--method", "lora")
    assert ran.code == 0, ran.err
    made = load_file(merged)
    assert all(torch.allclose(made[key], value, atol=1e-6) for key, value in expected.items())
    shutil.rmtree(out)
