"""``ckpt convert --adapter`` writes an adapter for another library, with the bytes of every factor unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptkit import convert_adapter, plan_convert_adapter, plan_lora
from ckptkit.errors import ArgumentError, CkptkitError
from tests.helpers_cli import run_ckpt

State = dict[str, torch.Tensor]
SHAPES = {  # a module of each kind of a U-Net: out, in, kernel
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (6, 4),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (6, 6),
    "down_blocks.0.resnets.0.conv1": (6, 4, 3, 3),
    "mid_block.resnets.1.time_emb_proj": (6, 5),
}
RANKS, ALPHAS = (2, 2, 3, 4), (4.0, 1.0, 1.0, 0.1)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def base_state() -> State:
    return {f"{name}.weight": randn(*shape, seed=1, dtype=torch.float32) for name, shape in SHAPES.items()}


def factors(name: str, number: int, down: str, up: str) -> State:
    out, ins, *kernel = SHAPES[name]
    rank = RANKS[number]
    return {
        down: randn(rank, ins, *kernel, seed=10 + number),
        up: randn(out, rank, *(1 for _ in kernel), seed=20 + number),
    }


def kohya_state() -> State:
    state: State = {}
    for number, name in enumerate(SHAPES):
        stem = f"lora_unet_{name.replace('.', '_')}"
        state |= factors(name, number, f"{stem}.lora_down.weight", f"{stem}.lora_up.weight")
        state[f"{stem}.alpha"] = torch.tensor(ALPHAS[number])
    return state


def written(tmp_path: Path) -> tuple[Path, Path]:
    save_file(base_state(), tmp_path / "base.safetensors")
    save_file(kohya_state(), tmp_path / "kohya.safetensors", {"ss_network_dim": "2"})
    return tmp_path / "base.safetensors", tmp_path / "kohya.safetensors"


def scales(base: Path, adapter: Path) -> dict[str, str]:
    return {step.out.key: step.rule for step in plan_lora(str(base), str(adapter)).steps}


def test_a_file_of_kohya_becomes_an_adapter_of_peft_and_returns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way kohya, PEFT, diffusers, kohya ends with the same keys, bytes and alphas, and each step folds alike."""
    base, kohya = written(tmp_path)
    peft, diffusers, back = tmp_path / "peft", tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors"
    ways = ((kohya, peft, "peft"), (peft, diffusers, "diffusers"), (diffusers, back, "kohya"))
    for source, out, adapter in ways:
        ran = run_ckpt(capsys, "convert", source, "-o", out, "--adapter", adapter, "--base", base, "--verify", "--json")
        assert ran.code == 0, ran.err
        assert scales(base, out) == scales(base, kohya)
    found, wanted = load_file(back), load_file(kohya)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 1, "LORA")
    assert config["rank_pattern"] == {"^down_blocks.0.resnets.0.conv1": 3, "^mid_block.resnets.1.time_emb_proj": 4}
    assert sorted(config["target_modules"]) == sorted(SHAPES)
    with safe_open(diffusers, "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (fields["unet.r"], fields["unet.lora_alpha"]) == (2, 1)


def test_a_renamed_adapter_of_peft_keeps_its_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors of PEFT that get the name of a model of diffusers have the scale of adapter_config.json beside them."""
    adapter, renamed, out = tmp_path / "adapter", tmp_path / "renamed", tmp_path / "out.safetensors"
    adapter.mkdir()
    renamed.mkdir()
    low = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(6, 2)}
    save_file({f"base_model.model.{key}": value for key, value in low.items()}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}'
    )
    refused = run_ckpt(capsys, "convert", adapter, "-o", out, "--adapter", "diffusers")
    assert (refused.code, "--carry --rename 'base_model.model.*=unet.*'" in refused.err) == (2, True)
    options = ("-o", renamed / "adapter_model.safetensors", "--carry", "--rename", "base_model.model.*=unet.*")
    assert run_ckpt(capsys, "remap", adapter, *options).code == 0
    assert run_ckpt(capsys, "convert", renamed, "-o", out, "--adapter", "diffusers").code == 0
    with safe_open(out, "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    assert fields["unet.lora_alpha"] / fields["unet.r"] == 3


def test_names_of_diffusers_need_no_base(tmp_path: Path) -> None:
    """Names with dots are known without the base; those with '_' are not, and the error says what to give."""
    _, kohya = written(tmp_path)
    with pytest.raises(CkptkitError, match=r"has '_' for '\.'") as caught:
        convert_adapter(kohya, tmp_path / "peft", "peft")
    assert caught.value.hint == "give --base BASE"
    assert not (tmp_path / "peft").exists()
    state = factors(next(iter(SHAPES)), 0, "unet.a.processor.to_q_lora.down.weight", "unet.a.to_q.lora.up.weight")
    plan = plan_convert_adapter(state, "diffusers")
    assert [step.out.key for step in plan.steps] == ["unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight"]
    assert plan.notes[0].startswith("no alpha for 1 module")


def test_original_names_become_those_of_diffusers() -> None:
    """diffusers loads only its own names, so the original ones are renamed; kohya's may stay."""
    stem = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    state = {f"{stem}.lora_down.weight": randn(2, 4, seed=1), f"{stem}.lora_up.weight": randn(6, 2, seed=2)}
    (step, _) = plan_convert_adapter(state, "diffusers").steps
    assert step.out.key == "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    (step, *_) = plan_convert_adapter(state, "kohya").steps
    assert step.out.key == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"


def test_a_magnitude_gets_the_shape_of_its_library(tmp_path: Path) -> None:
    """DoRA has one value for each output: [out, 1] for kohya, [out] for PEFT, [1, out, 1, 1] for a convolution."""
    base, kohya = written(tmp_path)
    state = load_file(kohya)
    for name, shape in SHAPES.items():
        state[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = randn(6, *(1 for _ in shape[1:]), seed=3)
    save_file(state, kohya)
    convert_adapter(kohya, tmp_path / "peft", "peft", base=base)
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    shapes = [tuple(tensor.shape) for key, tensor in found.items() if "magnitude" in key]
    assert sorted(shapes) == [(1, 6, 1, 1), (6,), (6,), (6,)]
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["use_dora"] is True


LOHA = {f"lora_unet_a.hada_{part}": randn(2, 2, seed=4) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
PEFT: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
TWO = factors(next(iter(SHAPES)), 0, "unet.a.lora_A.weight", "unet.a.lora_B.weight")
TWO |= factors(next(iter(SHAPES)), 0, "text_encoder.b.lora_A.weight", "text_encoder.b.lora_B.weight")
FC = factors(next(iter(SHAPES)), 0, "fc.lora_A.weight", "fc.lora_B.weight")
REFUSED = {
    "two models": (TWO, "peft", None, "changes 2 models"),
    "LoHa": (LOHA, "peft", None, "kind loha, which can be folded, not converted"),
    "PEFT already": (FC, "peft", PEFT, "is one of PEFT already"),
    "no model": (FC, "diffusers", PEFT, "do not tell a model of diffusers"),
    "saved whole": (FC | {"head.weight": randn(2, 2, seed=1)}, "kohya", PEFT, "replaces values of the base"),
    "rows": (FC | {"e.token_adapter.trainable_tokens_delta": randn(1, 4, seed=1)}, "kohya",
             PEFT | {"trainable_token_indices": {"e": [1]}}, "replaces values of the base"),
    "no scale": (FC, "kohya", None, "the scale is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused(case: str) -> None:
    """The error names the tensor and says what the format lacks."""
    state, adapter, config, message = REFUSED[case]
    with pytest.raises(CkptkitError, match=message):
        plan_convert_adapter(state, adapter, lora_config=config)  # type: ignore[arg-type]


def test_the_options_of_other_conversions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dtype would change the factors, no library reads an adapter in shards, and a base alone means nothing."""
    base, kohya = written(tmp_path)
    out = tmp_path / "out"
    shards = ["--adapter", "diffusers", "--max-shard-size", "5GB"]
    cast = ["--adapter", "kohya", "--dtype", "BF16", "--format", "safetensors"]
    for options in (cast, shards, ["--base", str(base), "--format", "safetensors"]):
        ran = run_ckpt(capsys, "convert", kohya, "-o", out, *options)
        assert ran.code == 2
        assert "no meaning" in ran.err
    with pytest.raises(ArgumentError, match="adapter"):
        convert_adapter(kohya, out, "a1111")  # type: ignore[arg-type]
    assert not out.exists()


def test_a_name_that_other_modules_end_with_becomes_an_expression(tmp_path: Path) -> None:
    """PEFT adapts every module that ends with a listed name, and the base tells that there are others."""
    base = {"proj_out.weight": randn(6, 4, seed=1), "blocks.0.proj_out.weight": randn(6, 4, seed=2)}
    state = {"lora_unet_proj_out.lora_down.weight": randn(2, 4, seed=3)}
    state |= {"lora_unet_proj_out.lora_up.weight": randn(6, 2, seed=4), "lora_unet_proj_out.alpha": torch.tensor(2.0)}
    convert_adapter(state, tmp_path / "peft", "peft", base=base)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == r"(?:proj_out)"
