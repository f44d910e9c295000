"""The option ``quantize`` writes the linear weights of numbered layers as codes and scales, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit.errors import ArgumentError, PlanError
from ckptkit.plans.quantized.as_codes import QUANTIZE, QuantizeLike

PLAIN = {
    "embed.weight": (16, 128), "layers.0.q.bias": (128,), "layers.0.norm.weight": (128,),
    "layers.0.gate.weight": (4, 128), "layers.0.odd.weight": (300, 128), "layers.0.experts": (2, 128, 128),
    "layers.0.pos_embedding.weight": (9, 128),
    "head.weight": (16, 128),
}  # fmt: skip
CODED = {"layers.0.q.weight": (128, 256), "layers.0.mlp.gate_proj.weight": (64, 128)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model"
    path.mkdir()
    state = {key: torch.randn(shape).bfloat16() for key, shape in (PLAIN | CODED).items()}
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    return path


@pytest.mark.parametrize("form", QUANTIZE)
def test_only_linear_weights_of_layers_get_codes(form: QuantizeLike, source: Path, tmp_path: Path) -> None:
    """The numbers that come back are near; all other tensors have their bytes, and the configuration lists modules."""
    out = tmp_path / "out"
    out.mkdir()
    written = ckptkit.convert(source, out / "model.safetensors", quantize=form, carry=True, verify=True)
    assert written.verified
    before, made = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    coded = set(CODED) | ({"layers.0.odd.weight"} if form != "fp8-block" else set())
    assert {key for key, tensor in made.items() if tensor.element_size() == 1} == coded
    assert all(torch.equal(made[key], before[key]) for key in before.keys() - coded)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    section = config["quantization_config"]
    plain = {
        "embed",
        "head",
        "lm_head",
        "layers.0.gate",
        "layers.0.pos_embedding",
    }  # the experts are beside quantised modules
    listed = section["modules_to_not_convert" if form == "fp8-block" else "ignore"]
    assert set(listed) == plain | ({"layers.0.odd"} if form == "fp8-block" else set())
    back = ckptkit.plan_remap(out, dequantize=True).materialize(out)
    assert list(back) == list(before)
    for key in coded:
        assert back[key].dtype == torch.bfloat16
        assert torch.allclose(back[key].float(), before[key].float(), rtol=0.07, atol=0.05)


def test_a_saved_plan_and_other_codes_can_come_before(source: Path, tmp_path: Path) -> None:
    """Weights that are dequantised, or folded with an adapter, get codes in the same step."""
    plan = ckptkit.plan_remap(source, quantize="int8-row")
    ckptkit.execute(plan, source, tmp_path / "int8.safetensors")
    ckptkit.save_plan(plan, tmp_path / "plan.json", source)
    assert ckptkit.load_plan(tmp_path / "plan.json", source) == plan
    again = ckptkit.plan_remap(tmp_path / "int8.safetensors", dequantize=True, quantize="fp8-block")
    made = again.materialize(tmp_path / "int8.safetensors")
    assert made["layers.0.q.weight"].dtype == torch.float8_e4m3fn
    assert made["layers.0.q.weight_scale_inv"].shape == (1, 2)
    adapter = {"layers.0.q.lora_A.weight": torch.ones(1, 256), "layers.0.q.lora_B.weight": torch.ones(128, 1)}
    config = {"r": 1, "lora_alpha": 1}
    out = tmp_path / "folded.safetensors"
    ckptkit.merge_lora(source, adapter, out, config, quantize="fp8-row")
    folded = ckptkit.plan_lora(source, adapter, config)
    expected = folded.materialize({"base": source, "donor": adapter})["layers.0.q.weight"]
    with ckptkit.open_checkpoint(out) as checkpoint:
        scales = checkpoint.read("layers.0.q.weight_scale")
    assert torch.equal(scales, (expected.float().abs().amax(1, keepdim=True) / 448).bfloat16())


def test_what_cannot_be_quantised_is_an_error(source: Path) -> None:
    """Without such a weight, of a transposed weight as in GPT-2, and for a form that is not known."""
    with pytest.raises(PlanError, match="no tensor of the output is a linear weight in a numbered layer"):
        ckptkit.plan_remap({"fc.weight": torch.ones(2, 2)}, quantize="int8-row")
    gpt2 = {"h.0.attn.c_attn.weight": torch.ones(4, 12), "h.0.attn.c_attn.bias": torch.ones(12)}
    with pytest.raises(PlanError, match="stored transposed"):
        ckptkit.plan_remap(gpt2, quantize="fp8-row")
    with pytest.raises(ArgumentError, match="quantize"):
        ckptkit.plan_remap(source, quantize="int4")  # type: ignore[arg-type]
    coded = {"h.0.q.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "h.0.q.weight_scale_inv": torch.ones(1, 1)}
    to = ["*.q.weight", "*.q.weight_scale_inv"]
    rules = {"rule": [{"from": "*.q.weight", "to": to, "op": {"quantize": {"form": "fp8"}}}]}
    for form, given in (("fp8-row", None), (None, rules)):
        with pytest.raises(PlanError, match=r"'h\.0\.q\.weight' is already quantised .*dequantize=True reads it"):
            ckptkit.plan_remap(coded, given, quantize=form)  # type: ignore[arg-type]
    assert len(ckptkit.plan_remap(coded, rules, dequantize=True).steps) == 2


def test_scales_that_a_library_would_not_find_are_not_carried(source: Path, tmp_path: Path) -> None:
    """Scales for blocks have one name, those for rows another; blocks of odd sizes are said."""
    out = tmp_path / "out"
    out.mkdir()
    for scales, wrong in (("row", "weight_scale_inv"), ("block", "weight_scale")):
        operation = {"quantize": {"form": "fp8", "scales": scales}}
        names = ["layers.0.odd.weight", f"layers.0.odd.{wrong}"]
        plan = ckptkit.plan_remap(source, {"rule": [{"from": names[0], "to": names, "op": operation}]})
        with pytest.raises(PlanError, match="which the library that reads such codes expects"):
            ckptkit.execute(plan, source, out / "model.safetensors", carry=True)
        ckptkit.execute(plan, source, tmp_path / f"{scales}.safetensors")  # as the hint says
    names[1] = "layers.0.odd.weight_scale_inv"
    plan = ckptkit.plan_remap(source, {"rule": [{"from": names[0], "to": names, "op": operation}]})
    written = ckptkit.execute(plan, source, out / "model.safetensors", carry=True)
    assert written.plan is not None
    assert any("does not read blocks of 'layers.0.odd.weight'" in note for note in written.plan.notes)


def test_a_replaced_configuration_is_one_change(source: Path, tmp_path: Path) -> None:
    """The old codes are gone, and new ones are made: nothing says that no weight is quantised."""
    coded, out = tmp_path / "coded", tmp_path / "out"
    form: QuantizeLike
    for directory, origin, form in ((coded, source, "int8-row"), (out, coded, "fp8-block")):
        directory.mkdir()
        plan = ckptkit.plan_remap(origin, dequantize=True, quantize=form)
        written = ckptkit.execute(plan, origin, directory / "model.safetensors", carry=True)
    assert [str(change) for change in written.adapted] == [
        "config.json: quantization_config was replaced, with the method 'fp8'"
    ]


def test_a_rule_can_quantise_more_of_a_model_that_is_quantised_in_part(source: Path, tmp_path: Path) -> None:
    """The list of plain modules loses them where the form is the same; else a sentence says what to edit."""
    part = tmp_path / "part"
    part.mkdir()
    to = ["*.q.weight", "*.q.weight_scale"]
    first = {"rule": [{"from": "*.q.weight", "to": to, "op": {"quantize": {"form": "fp8", "scales": "row"}}}]}
    plan = ckptkit.plan_remap(source, first)
    ckptkit.execute(plan, source, part / "model.safetensors", carry=True)
    for scales, more in (("row", []), ("tensor", ["in another way than the configuration says"])):
        name = "layers.0.mlp.gate_proj.weight"
        operation = {"quantize": {"form": "fp8", "scales": scales}}
        rules = {"rule": [{"from": name, "to": [name, f"{name}_scale"], "op": operation}]}
        out = tmp_path / scales
        out.mkdir()
        written = ckptkit.execute(ckptkit.plan_remap(part, rules), part, out / "model.safetensors", carry=True)
        assert written.plan is not None
        listed = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
        assert ("layers.0.mlp.gate_proj" in listed) is bool(more)
        assert "layers.0.odd" in listed
        assert [text for text in more if any(text in note for note in written.plan.notes)] == more


@pytest.mark.parametrize(
    ("config", "keys", "head"),
    [
        ({"model_type": "gpt_neox_japanese", "architectures": ["GPTNeoXJapaneseForCausalLM"]},
         ("gpt_neox_japanese.embed_in.weight", "gpt_neox_japanese.layers.0.dense.weight"), "embed_out"),
        ({"tie_word_embeddings": False}, ("model.embed_tokens.weight", "model.layers.0.q.weight"), None),
        ({}, ("model.embed_tokens.weight", "model.layers.0.q.weight"), "lm_head"),
        ({}, ("model.layers.0.q.weight", "lm_head.weight"), "lm_head"),
    ],
)  # fmt: skip
def test_a_tied_head_has_the_name_of_the_model(
    config: dict[str, object], keys: tuple[str, ...], head: str | None, tmp_path: Path
) -> None:
    """It stays plain, though it has no tensor of its own; an untied head without a tensor is not made up."""
    save_file({key: torch.randn(32, 32) for key in keys}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    ckptkit.convert(tmp_path / "model.safetensors", out / "model.safetensors", quantize="fp8-row", carry=True)
    listed = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    heads = {"embed_out", "lm_head", "output"}.intersection(listed)
    assert heads == ({head} if head else set())
