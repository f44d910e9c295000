"""``ckpt merge --method lora`` folds adapters of kohya and diffusers, by the names and the scales of their files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckptkit import execute, open_checkpoint, plan_lora
from ckptkit.errors import CkptkitError
from tests.helpers_cli import run_ckpt

State = dict[str, torch.Tensor]
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
ORIGINAL = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(name: str, *, out: int = 6, ins: int = 4, rank: int = 2, down: str, up: str, seed: int = 1) -> State:
    return {
        f"{name}{down}.weight": randn(rank, ins, seed=seed),
        f"{name}{up}.weight": randn(out, rank, seed=seed + 1),
    }


def kohya(name: str, alpha: float | None = 4.0, seed: int = 1, **shapes: int) -> State:
    alphas = {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    return factors(name, down=".lora_down", up=".lora_up", seed=seed, **shapes) | alphas


def folded(weight: torch.Tensor, adapter: State, scale: float) -> torch.Tensor:
    """Return the folded weight, by torch in F64 and rounded once, for an adapter of one module."""
    down, up = [tensor.double() for key, tensor in adapter.items() if not key.endswith(".alpha")]
    return (weight.double() + scale * up @ down).to(weight.dtype)


def merged(base: State, adapter: State, metadata: Mapping[str, str] | None = None, *, tmp_path: Path) -> State:
    save_file(base, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "adapter.safetensors", dict(metadata or {}))
    paths = str(tmp_path / "base.safetensors"), str(tmp_path / "adapter.safetensors")
    plan = plan_lora(*paths)
    execute(plan, dict(zip(("base", "donor"), paths, strict=True)), tmp_path / "out.safetensors", verify=True)
    with open_checkpoint(tmp_path / "out.safetensors") as out:
        return {key: out.read(key) for key in out}


@pytest.mark.parametrize("module", [QUERY, ORIGINAL])
@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model."])
@pytest.mark.parametrize("name", [QUERY, ORIGINAL])
def test_a_flat_name_means_the_module_under_either_naming(tmp_path: Path, module: str, prefix: str, name: str) -> None:
    """The scale is alpha over the rank; the two namings of a U-Net mean the same module."""
    base = {f"{prefix}{module}.weight": randn(6, 4, seed=0), f"{prefix}other.weight": randn(6, 4, seed=5)}
    adapter = kohya(f"lora_unet_{name.replace('.', '_')}", alpha=3.0)
    found = merged(base, adapter, tmp_path=tmp_path)
    torch.testing.assert_close(
        found[f"{prefix}{module}.weight"], folded(base[f"{prefix}{module}.weight"], adapter, 1.5), rtol=0, atol=1e-6
    )
    assert torch.equal(found[f"{prefix}other.weight"], base[f"{prefix}other.weight"])


FORMS = {
    "kohya with dots": ("diffusion_model.{}", ".lora_down", ".lora_up"),
    "diffusers": ("unet.{}", ".lora_A", ".lora_B"),
    "diffusers of 2023": ("unet.{}", ".lora.down", ".lora.up"),
    "attention processors": ("{}", "_lora.down", "_lora.up"),
    "processors of a pipeline": ("unet.{}", "_lora.down", "_lora.up"),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_name_finds_its_module(tmp_path: Path, form: str) -> None:
    """Without a scale in the file, the scale is 1, and a note says so."""
    name, down, up = FORMS[form]
    base = {f"{QUERY}.weight": randn(6, 4, seed=0)}
    module = name.format(QUERY)
    adapter = factors(module.replace("attn1.", "attn1.processor.") if down[0] == "_" else module, down=down, up=up)
    found = merged(base, adapter, tmp_path=tmp_path)
    torch.testing.assert_close(found[f"{QUERY}.weight"], folded(base[f"{QUERY}.weight"], adapter, 1.0))
    plan = plan_lora(str(tmp_path / "base.safetensors"), str(tmp_path / "adapter.safetensors"))
    assert any("no alpha for 1 module" in note for note in plan.notes)


@pytest.mark.parametrize("order", [1, -1])
def test_a_magnitude_beside_other_factors_is_refused(order: int) -> None:
    """LyCORIS can train a LoHa with a magnitude, which is not lost in either order of the keys."""
    hada = {f"{FLAT}.hada_{name}": randn(6, 2, seed=1) for name in ("w1_a", "w2_a")}
    hada |= {f"{FLAT}.hada_{name}": randn(2, 4, seed=2) for name in ("w1_b", "w2_b")}
    adapter = hada | {f"{FLAT}.alpha": torch.tensor(2.0), f"{FLAT}.dora_scale": randn(6, 1, seed=3)}
    with pytest.raises(CkptkitError, match="and a magnitude cannot be folded together"):
        plan_lora(ONE, dict(list(adapter.items())[::order]))


def test_an_alpha_beside_the_names_of_peft_is_the_scale(tmp_path: Path) -> None:
    """Trainers of transformers for images write such files, without the name of the model before the keys."""
    base = {f"{QUERY}.weight": randn(6, 4, seed=0)}
    adapter = factors(QUERY, down=".lora_A", up=".lora_B") | {f"{QUERY}.alpha": torch.tensor(3.0)}
    found = merged(base, adapter, tmp_path=tmp_path)
    torch.testing.assert_close(found[f"{QUERY}.weight"], folded(base[f"{QUERY}.weight"], adapter, 1.5))


def test_the_metadata_of_diffusers_has_the_scale_of_each_model(tmp_path: Path) -> None:
    """The fields of each model have its name before them, and a pattern gives one module another alpha."""
    encoder = "text_model.encoder.layers.0.mlp.fc1"
    base = {f"unet.{QUERY}.weight": randn(6, 4, seed=0), f"text_encoder.{encoder}.weight": randn(6, 4, seed=7)}
    unet, text = (
        factors(f"unet.{QUERY}", down=".lora_A", up=".lora_B"),
        factors(f"text_encoder.{encoder}", rank=3, down=".lora_linear_layer.down", up=".lora_linear_layer.up"),
    )
    fields = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"]}
    fields |= {"text_encoder.r": 3, "text_encoder.lora_alpha": 3, "text_encoder.alpha_pattern": {"mlp.fc1": 9}}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(fields)}
    found = merged(base, unet | text, metadata, tmp_path=tmp_path)
    for (key, weight), adapter, scale in zip(base.items(), (unet, text), (2.0, 3.0), strict=True):
        torch.testing.assert_close(found[key], folded(weight, adapter, scale), rtol=0, atol=1e-6)


TEXT = "text_model_encoder_layers_0_mlp_fc1"
AMBIGUOUS = {"a.b_c.weight": randn(6, 4, seed=0), "a_b.c.weight": randn(6, 4, seed=1)}
ONE = {f"{QUERY}.weight": randn(6, 4, seed=0)}
FLAT = f"lora_unet_{QUERY.replace('.', '_')}"
NAN, HUGE = float("nan"), float("inf")
REFUSED = {
    "two modules": (AMBIGUOUS, kohya("lora_unet_a_b_c"), "can mean 'a.b_c' and 'a_b.c'", "--drop"),
    "no place": (ONE, kohya(FLAT) | kohya(f"lora_te_{TEXT}"), "no matching key", "--drop 'lora_te_*'"),
    "one place for two": (ONE, kohya(FLAT) | kohya(f"lora_unet_{ORIGINAL.replace('.', '_')}"), "both change", "--drop"),
    "alpha of several values": (ONE, kohya(FLAT) | {f"{FLAT}.alpha": torch.ones(3)}, "is [3]", None),
    "alpha that is empty": (ONE, kohya(FLAT) | {f"{FLAT}.alpha": torch.ones(0)}, "is [0]", None),
    "NaN": (ONE, kohya(FLAT, NAN), "nan, which is not a valid alpha", None),
    "inf": (ONE, kohya(FLAT, HUGE), "inf, which is not a valid alpha", None),
    "zero": (ONE, kohya(FLAT, 0.0), "not a valid alpha", "kohya trains with the rank"),
    "half": (ONE, dict(list(kohya(FLAT).items())[:1]), "has no partner", None),
    "half of LoKr": (ONE, {f"{FLAT}.{name}": torch.ones(2, 2) for name in ("lokr_w1", "lokr_w2_a")}, "has no partner",
                     None),
    "alpha alone": (ONE, kohya(FLAT) | {"lora_unet_x.alpha": torch.ones(())}, "no factors beside it", None),
    "whole difference": (ONE, kohya(FLAT) | {"lora_unet_x.diff": torch.ones(6, 4)}, "holds diff", "--drop"),
    "another tensor": (ONE, kohya(FLAT) | {"bundle_emb.x.string_to_param": torch.ones(2)}, "not a factor", "--drop"),
    "rank 0": (ONE, kohya(FLAT, rank=0), "not a factor of a low rank", None),
    "another shape": (ONE, kohya(FLAT, ins=5), "make [6, 5], but W is [6, 4]", None),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_is_refused_by_name(tmp_path: Path, case: str) -> None:
    """An adapter that cannot be applied whole is refused before anything is written, with the key and a way out."""
    base, adapter, message, hint = REFUSED[case]
    with pytest.raises(CkptkitError) as caught:
        merged(base, adapter, tmp_path=tmp_path)
    assert message in str(caught.value)
    assert hint is None or hint in (caught.value.hint or "")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid"),
        ("[]", "is not valid"),
        ('{"unet.r": 2}', "has no lora_alpha"),
        ('{"unet.r": 1e400, "unet.lora_alpha": 1}', "too large|not valid|is inf"),
        ('{"unet.r": 3, "unet.lora_alpha": 1}', "the rank in the config is 3"),
        ('{"elsewhere.r": 3}', "names no model"),
        ('{"unet.r": 2, "unet.lora_alpha": 4, "unet.peft_type": "BOFT"}', "BOFT"),
        ('{"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"(a*)*b": 3}}', "too many repetitions"),
    ],
)
def test_metadata_that_is_not_valid_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """The metadata is from a file, and is checked as a configuration of PEFT is."""
    adapter = factors(f"unet.{QUERY}", down=".lora_A", up=".lora_B")
    with pytest.raises(CkptkitError, match=message):
        merged({f"{QUERY}.weight": randn(6, 4, seed=0)}, adapter, {"lora_adapter_metadata": text}, tmp_path=tmp_path)


def test_the_prefix_of_the_keys_may_be_renamed_away(tmp_path: Path) -> None:
    """The metadata of the only model still has the scale."""
    save_file({f"{QUERY}.weight": randn(6, 4, seed=0)}, tmp_path / "base.safetensors")
    fields = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}
    save_file(factors(f"unet.{QUERY}", down=".lora_A", up=".lora_B"), tmp_path / "adapter.safetensors", fields)
    plan = plan_lora(str(tmp_path / "base.safetensors"), str(tmp_path / "adapter.safetensors"), None, ["unet.*=*"])
    assert plan.steps[0].rule == "lora, scale 3"


def test_the_command_folds_a_kohya_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command folds a kohya file, and the output has the scale of the file times ``--scale``."""
    base, adapter = {f"{QUERY}.weight": randn(6, 4, seed=0)}, kohya(FLAT, alpha=1.0)
    save_file(base, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "adapter.safetensors")
    ran = run_ckpt(
        capsys,
        "merge", tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", "-o", tmp_path / "out.safetensors",
        "--method", "lora", "--scale", "3",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    with open_checkpoint(tmp_path / "out.safetensors") as out:
        found = out.read(f"{QUERY}.weight")
    assert math.isclose(float((found - folded(base[f"{QUERY}.weight"], adapter, 1.5)).abs().max()), 0, abs_tol=1e-6)


def test_an_adapter_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command says in one sentence that the file is an adapter, and hints at the command that folds it."""
    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    save_file({f"{QUERY}.weight": randn(6, 4, seed=0)}, base)
    save_file(kohya(FLAT), adapter)
    sentence = "this is an adapter (kohya): the file does not contain the weights of its base model"
    assert sentence in run_ckpt(capsys, "show", adapter).err
    checked = run_ckpt(capsys, "check", adapter)
    assert checked.code == 0
    assert sentence in checked.out
    ran = run_ckpt(capsys, "diff", base, adapter)
    assert f"ckpt merge {base} {adapter} -o OUT --method lora adds it" in ran.err
    assert "align" not in ran.err
    ran = run_ckpt(capsys, "merge", base, adapter, "-o", tmp_path / "out.safetensors")
    assert (ran.code, "--method lora" in ran.err) == (2, True)
    ran = run_ckpt(capsys, "merge", base, adapter, "-o", tmp_path / "out.safetensors", "--method", "lora")
    assert "this is an adapter" not in ran.err


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (factors(f"unet.{QUERY}", down=".lora_A", up=".lora_B"), "and no scale, for which loaders take 1"),
        (kohya(FLAT, None), "and no scale, for which loaders take 1"),
        ({"lycoris_a.hada_w1_a": torch.ones(2, 2), "lycoris_a.hada_w1_b": torch.ones(2, 2)}, "(kohya)"),
        ({"a.lora_B.weight": torch.ones(2, 2), "a.base_layer.weight": torch.ones(2, 2)}, ""),
        ({"unet.a.base_layer.weight": torch.ones(2), "unet.a.base_layer.bias": torch.ones(2)}
         | factors("unet.a", down=".lora_A.x", up=".lora_B.x"), ""),
        ({"blocks.0.att.w_lora.0.weight": torch.ones(2, 2), "explorarium.alpha": torch.ones(2)}, ""),
    ],
)  # fmt: skip
def test_only_an_adapter_is_called_one(tmp_path: Path, state: State, words: str) -> None:
    """A model with an adapter in it, and a model with such words in its names, are not called an adapter."""
    save_file(state, tmp_path / "file.safetensors")
    with open_checkpoint(tmp_path / "file.safetensors") as checkpoint:
        text = "; ".join(checkpoint.warnings)
    assert words in text
    assert ("this is an adapter" in text) == bool(words)


def part_update(adapter: State, scale: float, start: int = 0, stop: int | None = None) -> torch.Tensor:
    down, up = [tensor.double() for key, tensor in adapter.items() if not key.endswith(".alpha")]
    return scale * up[start:stop] @ down


def test_query_key_and_value_of_open_clip_are_rows_of_one_weight(tmp_path: Path) -> None:
    """The second text encoder of SDXL in a single file: only the rows of the adapted projections change."""
    stem = "conditioner.embedders.1.model.transformer.resblocks.3.attn"
    base = {f"{stem}.in_proj_weight": randn(12, 4, seed=0).bfloat16(), f"{stem}.out_proj.weight": randn(4, 4, seed=1)}
    layer = "lora_te2_text_model_encoder_layers_3_self_attn"
    key, value = (kohya(f"{layer}_{name}_proj", alpha=1.0, out=4, seed=seed) for name, seed in (("k", 5), ("v", 9)))
    found = merged(base, key | value, tmp_path=tmp_path)
    wanted = base[f"{stem}.in_proj_weight"].double()
    wanted[4:8] += part_update(key, 0.5)
    wanted[8:] += part_update(value, 0.5)
    assert torch.equal(found[f"{stem}.in_proj_weight"], wanted.bfloat16())
    assert torch.equal(found[f"{stem}.out_proj.weight"], base[f"{stem}.out_proj.weight"])


@pytest.mark.parametrize("block", ["double", "single"])
def test_a_joined_factor_of_flux_is_divided_among_the_modules_of_diffusers(tmp_path: Path, block: str) -> None:
    """kohya adapts ``qkv``, or ``linear1`` with the MLP, as one module; diffusers has a weight for each part."""
    stem = "transformer_blocks.0" if block == "double" else "single_transformer_blocks.0"
    sizes = {"attn.to_q": 4, "attn.to_k": 4, "attn.to_v": 4} | ({} if block == "double" else {"proj_mlp": 7})
    base = {f"{stem}.{name}.weight": randn(size, 4, seed=seed) for seed, (name, size) in enumerate(sizes.items())}
    name = "lora_unet_double_blocks_0_img_attn_qkv" if block == "double" else "lora_unet_single_blocks_0_linear1"
    adapter = kohya(name, alpha=3.0, out=sum(sizes.values()))
    found = merged(base, adapter, tmp_path=tmp_path)
    start = 0
    for key, weight in base.items():
        wanted = weight.double() + part_update(adapter, 1.5, start, start + weight.shape[0])
        torch.testing.assert_close(found[key], wanted.float(), rtol=0, atol=1e-6)
        start += weight.shape[0]


def test_modules_of_diffusers_are_rows_of_a_joined_weight_of_flux(tmp_path: Path) -> None:
    """The other way round: an adapter of diffusers on the original file, which has query, key and value as one."""
    base = {
        "double_blocks.0.txt_attn.qkv.weight": randn(12, 4, seed=0),
        "single_blocks.1.linear1.weight": randn(19, 4, seed=1),
    }
    key = factors("transformer.transformer_blocks.0.attn.add_k_proj", out=4, down=".lora_A", up=".lora_B")
    mlp = factors("transformer.single_transformer_blocks.1.proj_mlp", out=7, down=".lora_A", up=".lora_B", seed=3)
    found = merged(base, key | mlp, tmp_path=tmp_path)
    wanted = {name: tensor.double() for name, tensor in base.items()}
    wanted["double_blocks.0.txt_attn.qkv.weight"][4:8] += part_update(key, 1.0)
    wanted["single_blocks.1.linear1.weight"][12:] += part_update(mlp, 1.0)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=0, atol=1e-6)


def lycoris_state(rank: int, kind: str) -> State:
    """Return the factors of a convolution [6, 4, 3, 3] by LyCORIS."""
    if kind == "LoCon":
        return {"lora_down.weight": randn(rank, 4, 1, 1, seed=1), "lora_up.weight": randn(6, rank, 1, 1, seed=2),
                "lora_mid.weight": randn(rank, rank, 3, 3, seed=3)}  # fmt: skip
    if kind == "LoHa":
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        return {name: randn(*((6, rank), (rank, 36))[n % 2], seed=n + 1) for n, name in enumerate(names)}
    if kind == "LoKr":
        return {
            "lokr_w1": randn(2, 2, seed=1),
            "lokr_w2_a": randn(3, rank, seed=2),
            "lokr_w2_b": randn(rank, 18, seed=3),
        }
    return {"lokr_w1": randn(2, 2, seed=1), "lokr_w2": randn(3, 2, 3, 3, seed=2)}


def lycoris_update(state: State, kind: str) -> torch.Tensor:
    """Return the update by the formulas of the papers, without its scale."""
    wide = {name: tensor.double() for name, tensor in state.items()}
    if kind == "LoCon":
        inner = torch.einsum("mnhw,ni->mihw", wide["lora_mid.weight"], wide["lora_down.weight"].flatten(1))
        return torch.einsum("om,mihw->oihw", wide["lora_up.weight"].flatten(1), inner)
    if kind == "LoHa":
        made = (wide["hada_w1_a"] @ wide["hada_w1_b"]) * (wide["hada_w2_a"] @ wide["hada_w2_b"])
        return made.reshape(6, 4, 3, 3)
    inner = wide["lokr_w2"] if "lokr_w2" in wide else (wide["lokr_w2_a"] @ wide["lokr_w2_b"]).reshape(3, 2, 3, 3)
    return torch.kron(wide["lokr_w1"].reshape(2, 2, 1, 1), inner)


@pytest.mark.parametrize(("kind", "scale"), [("LoCon", 2.0), ("LoHa", 2.0), ("LoKr", 2.0), ("whole LoKr", 1.0)])
def test_a_convolution_of_lycoris_is_folded(tmp_path: Path, kind: str, scale: float) -> None:
    """The scale is alpha over the rank; whole factors of LoKr have no rank, and LyCORIS takes 1."""
    state = lycoris_state(2, kind)
    base = {"down_blocks.0.resnets.0.conv1.weight": randn(6, 4, 3, 3, seed=9)}
    adapter = {f"lycoris_down_blocks_0_resnets_0_conv1.{name}": tensor for name, tensor in state.items()}
    adapter["lycoris_down_blocks_0_resnets_0_conv1.alpha"] = torch.tensor(4.0)
    found = merged(base, adapter, tmp_path=tmp_path)
    wanted = base["down_blocks.0.resnets.0.conv1.weight"].double() + scale * lycoris_update(state, kind)
    torch.testing.assert_close(found["down_blocks.0.resnets.0.conv1.weight"], wanted.float(), rtol=1e-5, atol=1e-5)
