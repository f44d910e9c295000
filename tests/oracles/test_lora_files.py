"""Adapters of kohya and diffusers are folded, converted and combined as diffusers and PEFT load them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import convert_adapter, merge_lora, plan_lora

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
State = dict[str, torch.Tensor]

BLOCK = "transformer_blocks.0"
QUERY = "attentions.0.transformer_blocks.0.attn1.to_q"
UNET = {  # the name in diffusers, and the original one
    f"down_blocks.1.{QUERY}": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    f"down_blocks.1.attentions.1.{BLOCK}.attn2.to_out.0": f"input_blocks.5.1.{BLOCK}.attn2.to_out.0",
    f"down_blocks.1.attentions.1.{BLOCK}.ff.net.0.proj": f"input_blocks.5.1.{BLOCK}.ff.net.0.proj",
    "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks.4.0.emb_layers.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    f"mid_block.{QUERY}": "middle_block.1.transformer_blocks.0.attn1.to_q",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.resnets.2.conv1": "output_blocks.5.0.in_layers.2",
}
LAYER = "text_model.encoder.layers.1"
TEXT = [f"{LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
TEXT += [f"{LAYER}.mlp.fc1", f"{LAYER}.mlp.fc2"]


def make_unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip


def make_text_encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=7, projection_dim=8,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def factors(weight: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ones = (1,) * (weight.ndim - 2)
    return randn(rank, *weight.shape[1:], seed=seed), randn(weight.shape[0], rank, *ones, seed=seed + 100)


def kohya_state(
    base: State, names: Mapping[str, str], head: str, *, alphas: Sequence[float] = (4.0,), dora: bool = False
) -> State:
    """Return a file of kohya; ``names`` maps a module of the base to its name there.

    diffusers gives the most frequent alpha to every module of attention, so where it is the oracle all have one.
    """
    state = {}
    for seed, (module, name) in enumerate(names.items()):
        stem, weight, rank = f"{head}{name.replace('.', '_')}", base[f"{module}.weight"], 2 + seed % 2
        state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"] = factors(weight, rank, seed)
        state[f"{stem}.alpha"] = torch.tensor(alphas[seed % len(alphas)])
        if dora:
            ones = (1,) * (weight.ndim - 1)
            state[f"{stem}.dora_scale"] = randn(weight.shape[0], *ones, seed=seed + 200).abs() + 0.5
    return state


def in_text_encoder(base: State, module: str) -> str:
    """Return the module as this version of transformers calls it."""
    return module if f"{module}.weight" in base else module.removeprefix("text_model.")


def fused_unet(loaded: tuple[State, Any], metadata: Any = None) -> State:
    unet = make_unet()
    diffusers.StableDiffusionPipeline.load_lora_into_unet(loaded[0], loaded[1], unet, metadata=metadata)
    unet.fuse_lora()
    unet.unload_lora()
    return {key: value.detach() for key, value in unet.state_dict().items()}


def assert_equal(found: Mapping[str, torch.Tensor], wanted: State, base: State, modules: Sequence[str]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-5), key
        assert (key.removesuffix(".weight") in modules) == (not torch.equal(tensor, base[key])), key


def folded(base: State, adapter: Path | State) -> Mapping[str, torch.Tensor]:
    donor = adapter if isinstance(adapter, dict) else str(adapter)
    return plan_lora(base, donor).materialize({"base": base, "donor": donor})


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_a_kohya_file_is_folded_as_diffusers_fuses_it(naming: str) -> None:
    """The names of both namings find the same modules, and ranks and alphas differ between modules."""
    base = make_unet().state_dict()
    names = {module: module if naming == "diffusers" else original for module, original in UNET.items()}
    state = kohya_state(base, names, "lora_unet_")
    pipeline = diffusers.StableDiffusionXLPipeline if naming == "original" else diffusers.StableDiffusionPipeline
    loaded = pipeline.lora_state_dict(dict(state), unet_config=make_unet().config)
    assert_equal(folded(base, state), fused_unet(loaded), base, list(UNET))


def test_dora_of_kohya_is_folded_as_peft_merges_it(tmp_path: Path) -> None:
    """diffusers leaves the magnitudes of such a file out, so PEFT is the oracle."""
    base = {key: value.clone() for key, value in make_unet().state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(kohya_state(base, {name: name for name in UNET}, "lora_unet_", dora=True), tmp_path / "kohya.safetensors")
    convert_adapter(tmp_path / "kohya.safetensors", tmp_path / "peft", "peft", base=tmp_path / "base.safetensors")
    merged = peft.PeftModel.from_pretrained(make_unet(), tmp_path / "peft").merge_and_unload()
    wanted = {key: value.detach() for key, value in merged.state_dict().items()}
    assert_equal(folded(base, tmp_path / "kohya.safetensors"), wanted, base, list(UNET))


def test_a_text_encoder_in_a_kohya_file_is_folded_as_diffusers_fuses_it() -> None:
    encoder = make_text_encoder()
    base = {key: value.clone() for key, value in encoder.state_dict().items()}
    names = {in_text_encoder(base, module): module for module in TEXT}
    state = kohya_state(base, names, "lora_te_")
    loaded, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(dict(state))
    diffusers.StableDiffusionPipeline.load_lora_into_text_encoder(loaded, alphas, encoder)
    for module in encoder.modules():
        if hasattr(module, "merge"):
            module.merge()
    wanted = {
        key.replace(".base_layer", ""): value.detach()
        for key, value in encoder.state_dict().items()
        if "lora" not in key
    }
    assert_equal(folded(base, state), wanted, base, list(names))


def adapted_unet() -> tuple[Any, Any]:
    unet, config = make_unet(), peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1"], rank_pattern={"conv1": 4},
        alpha_pattern={"to_out.0": 1}, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(1)
    unet.add_adapter(config)
    return unet, config


@pytest.mark.parametrize("way", ["pipeline", "old keys", "adapter"])
def test_a_file_that_diffusers_saves_is_folded_as_it_fuses_it(tmp_path: Path, way: str) -> None:
    """The metadata has the scale, and the keys are those of PEFT or the older ones of diffusers."""
    base = make_unet().state_dict()
    unet, _ = adapted_unet()
    if way == "adapter":
        unet.save_lora_adapter(tmp_path)
    else:
        layers = peft.get_peft_model_state_dict(unet)
        if way == "old keys":
            layers = diffusers.utils.convert_state_dict_to_diffusers(layers)
        metadata = diffusers.training_utils._collate_lora_metadata({"unet": unet})
        diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **metadata)
    unet.fuse_lora()
    unet.unload_lora()
    wanted = {key: value.detach() for key, value in unet.state_dict().items()}
    changed = [key.removesuffix(".weight") for key, value in wanted.items() if not torch.equal(value, base[key])]
    assert len(changed) > 10
    assert_equal(folded(base, tmp_path / "pytorch_lora_weights.safetensors"), wanted, base, changed)


def test_conversions_are_loaded_by_each_library(tmp_path: Path) -> None:
    """PEFT and diffusers make the same weights from what is converted, and the way back ends at the first file."""
    base = {key: value.clone() for key, value in make_unet().state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    state = kohya_state(base, {name: name for name in UNET}, "lora_unet_", alphas=(4.0, 0.3, 4.0, 1.0))
    save_file(state, tmp_path / "kohya.safetensors")
    wanted = dict(folded(base, tmp_path / "kohya.safetensors"))

    convert_adapter(tmp_path / "kohya.safetensors", tmp_path / "peft", "peft", base=tmp_path / "base.safetensors")
    merged = peft.PeftModel.from_pretrained(make_unet(), tmp_path / "peft").merge_and_unload()
    assert_equal({key: value.detach() for key, value in merged.state_dict().items()}, wanted, base, list(UNET))

    convert_adapter(tmp_path / "peft", tmp_path / "d.safetensors", "diffusers")
    load = diffusers.StableDiffusionPipeline.lora_state_dict
    state, alphas, metadata = load(tmp_path, weight_name="d.safetensors", return_lora_metadata=True)
    assert_equal(fused_unet((state, alphas), metadata), wanted, base, list(UNET))

    convert_adapter(tmp_path / "d.safetensors", tmp_path / "k.safetensors", "kohya")
    assert {key: value.tolist() for key, value in load_file(tmp_path / "k.safetensors").items()} == {
        key: value.tolist() for key, value in load_file(tmp_path / "kohya.safetensors").items()
    }


def test_adapters_are_combined_as_peft_combines_them(tmp_path: Path) -> None:
    """``add_weighted_adapter`` with "cat" is the sum of the updates, each times its scale and its weight."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    base = transformers.LlamaForCausalLM(config)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    one = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    two = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), one, adapter_name="one")
    model.add_adapter("two", two)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    merged = {key: value.detach() for key, value in model.merge_and_unload().state_dict().items()}
    adapters = [tmp_path / "one", tmp_path / "two"]
    merge_lora(state, adapters, tmp_path / "out.safetensors", weights=[0.7, 0.3])
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == merged.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


def make_flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip


FLUX = {  # the original name, and the shape of its weight
    "double_blocks_0_img_attn_qkv": (48, 16),
    "double_blocks_0_txt_attn_qkv": (48, 16),
    "double_blocks_0_img_attn_proj": (16, 16),
    "double_blocks_0_txt_mlp_2": (16, 64),
    "double_blocks_0_img_mod_lin": (96, 16),
    "single_blocks_0_linear2": (16, 80),
    "single_blocks_0_modulation_lin": (48, 16),
}


def test_a_kohya_file_of_flux_is_folded_as_diffusers_fuses_it() -> None:
    """The joined query, key and value are divided among the modules of diffusers."""
    base = {key: value.clone() for key, value in make_flux().state_dict().items()}
    state: State = {}
    for seed, (name, shape) in enumerate(FLUX.items()):
        down, up = factors(torch.empty(shape), 2 + seed % 3, seed)
        stem = f"lora_unet_{name}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.5)}
    found = folded(base, state)
    loaded = diffusers.FluxPipeline.lora_state_dict(dict(state))
    transformer = make_flux()
    diffusers.FluxPipeline.load_lora_into_transformer(loaded, None, transformer)
    transformer.fuse_lora()
    transformer.unload_lora()
    wanted = {key: value.detach() for key, value in transformer.state_dict().items()}
    changed = [key.removesuffix(".weight") for key, value in wanted.items() if not torch.equal(value, base[key])]
    assert len(changed) == 11
    assert_equal(found, wanted, base, changed)
