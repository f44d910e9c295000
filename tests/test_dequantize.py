"""Quantised weights are numbers for every function that takes ``dequantize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit.errors import FormatError, PlanError, RuleError
from tests.helpers_cli import run_ckpt

ROWS, COLUMNS = 200, 256


class Model:
    """A directory with a model of fp8 in blocks, and the numbers that it stands for."""

    def __init__(self, directory: Path, dtype: str | None = "bfloat16") -> None:
        torch.manual_seed(0)
        codes, scales = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn), torch.rand(2, 2) + 0.5
        spread = scales.repeat_interleave(128, 0)[:ROWS].repeat_interleave(128, 1)
        self.numbers = codes.float() * spread
        self.parts = {"l.weight": codes, "l.weight_scale_inv": scales, "n.weight": torch.ones(4, dtype=torch.bfloat16)}
        self.path = directory / "model"
        self.path.mkdir()
        self.save(self.parts)
        quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        config = {"quantization_config": quantised} | ({"dtype": dtype} if dtype else {})
        (self.path / "config.json").write_text(json.dumps(config))

    def save(self, parts: dict[str, torch.Tensor]) -> None:
        save_file(parts, self.path / "model.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path)


def test_a_plan_has_the_parts_as_sources_and_survives_a_file(model: Model, tmp_path: Path) -> None:
    """The output has numbers, verified by safetensors; a saved plan makes the same output, and config.json follows."""
    plan = ckptkit.plan_remap(model.path, dequantize=True)
    assert [source.key for source in plan.steps[0].sources] == ["l.weight", "l.weight_scale_inv"]
    assert plan.notes == ("1 weight (fp8) is dequantised to BF16, as config.json says",)
    out = tmp_path / "out"
    out.mkdir()
    written = ckptkit.execute(plan, model.path, out / "model.safetensors", verify=True, carry=True)
    assert written.verified
    assert torch.equal(load_file(out / "model.safetensors")["l.weight"], model.numbers.bfloat16())
    assert json.loads((out / "config.json").read_text()) == {"dtype": "bfloat16"}
    ckptkit.save_plan(plan, tmp_path / "plan.json", model.path)
    assert ckptkit.load_plan(tmp_path / "plan.json", model.path) == plan


@pytest.mark.parametrize(
    ("configured", "asked", "expected"),
    [("bfloat16", "float16", "F16"), ("bfloat16", None, "BF16"), (None, None, "F32"), ("float16", "F64", "F64")],
)
def test_the_dtype_is_the_one_asked_for_else_the_configured_one(
    configured: str | None, asked: str | None, expected: str, tmp_path: Path
) -> None:
    """Without any, it is F32, since scales of float32 do not say what the weight was."""
    plan = ckptkit.plan_remap(Model(tmp_path, configured).path, dtype=asked, dequantize=True)
    assert plan.steps[0].out.dtype == expected


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_numbers_of_8_bits_are_not_written_under_the_key_of_codes(dtype: str, model: Model) -> None:
    """The next reader would take them for codes that lack their scales."""
    with pytest.raises(PlanError, match=f"its numbers in {dtype} would be codes without scales"):
        ckptkit.plan_remap(model.path, dtype=dtype, dequantize=True)


def test_rules_see_plain_tensors_and_can_dequantise_some(model: Model) -> None:
    """Operations follow the decoding; the operation ``dequantize`` of a rule is for what matches."""
    rules = {"rule": [{"from": "l.weight", "to": "m.weight", "op": "transpose"}]}
    plan = ckptkit.plan_remap(model.path, rules, dequantize="float32")
    assert torch.equal(plan.materialize(model.path)["m.weight"], model.numbers.T)
    some = {"rule": [{"from": "l.*", "to": "m.*", "op": {"dequantize": {"dtype": "F16"}}}]}
    plan = ckptkit.plan_remap(model.path, some)
    assert torch.equal(plan.materialize(model.path)["m.weight"], model.numbers.half())
    with pytest.raises(PlanError, match="so a cast to F16 would not dequantise it") as refusal:
        ckptkit.plan_remap(model.path, dtype="float16")
    assert "dequantize=True reads it as numbers" in str(refusal.value)


def test_codes_that_stand_for_nan_are_written_and_said(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are numbers of the checkpoint, as NaN in a plain tensor is; the report has their count and tensor."""
    codes = model.parts["l.weight"].clone()
    codes.view(torch.uint8)[3, :2] = 0x7F
    model.save(model.parts | {"l.weight": codes})
    out = tmp_path / "out.safetensors"
    ran = run_ckpt(capsys, "convert", str(model.path), "-o", str(out), "--dequantize")
    assert ran.code == 0
    assert f"2 codes stand for NaN or inf, and are written so: 'l.weight' (2 of {ROWS * COLUMNS:,})" in ran.err
    assert int(load_file(out)["l.weight"].isnan().sum()) == 2
    adapter = {"l.lora_A.weight": torch.randn(2, COLUMNS), "l.lora_B.weight": torch.randn(ROWS, 2)}
    config = {"r": 2, "lora_alpha": 2}
    folded = ckptkit.merge_lora(model.path, adapter, tmp_path / "folded.safetensors", config, dequantize=True)
    assert [loss.infinite_codes for loss in folded.losses] == [2]
    net = torch.nn.ModuleDict({"l": torch.nn.Linear(COLUMNS, ROWS, bias=False), "n": torch.nn.LayerNorm(4, bias=False)})
    report = ckptkit.load_into(net, model.path, dequantize=True)
    assert [finding.key for finding in report.findings if finding.code == "load.infinite"] == ["l.weight"]
    others = {f"k{key[1:]}": part.clone() for key, part in model.parts.items() if key.startswith("l.")}
    model.save(model.parts | {"l.weight": codes} | others)
    both = {"rule": [{"from": ["k.weight", "l.weight"], "to": "w", "op": {"concat": {"dim": 0}}}]}
    joined = torch.nn.ParameterDict({"w": torch.zeros(2 * ROWS, COLUMNS)})
    report = ckptkit.load_into(joined, model.path, rules=both, dequantize=True)
    assert [finding.key for finding in report.findings if finding.code == "load.infinite"] == ["w"]


@pytest.mark.parametrize("rows", [8, ROWS])  # tensors that are read together, and one that is read in pieces
def test_diff_compares_both_sides_in_the_dtype_that_is_given(rows: int, model: Model, tmp_path: Path) -> None:
    """Nothing is rounded to the dtype of a plain EXPECTED, and without a dtype it is what would be loaded."""
    numbers = model.numbers[:rows]
    plain = {"l.weight": numbers.bfloat16(), "n.weight": model.parts["n.weight"]}
    save_file(plain, tmp_path / "plain.safetensors")
    model.save({key: tensor[: -(-rows // 128) if "scale" in key else rows] for key, tensor in model.parts.items()})
    sides = [(tmp_path / "plain.safetensors", plain["l.weight"]), (model.path, numbers)]
    loaded = ckptkit.diff(sides[0][0], sides[1][0], values=True, dequantize=True).values
    assert loaded is not None
    assert loaded.all_equal
    for (expected, first), (found, other) in (sides, sides[::-1]):
        result = ckptkit.diff(expected, found, values=True, dequantize="F32")
        assert result.values is not None
        (one,) = result.values.different
        change = other.double() - first.double()
        assert one.rel_l2 == pytest.approx(float(change.norm() / first.double().norm()), rel=1e-6)
        assert one.changed_elements == int((change != 0).sum())
        assert (result.found_checkpoint.tensors, result.expected_checkpoint.tensors) in ((3, 2), (2, 3))


@pytest.mark.parametrize("options", [{"drop": ["*.weight_scale_inv"]}, {"keep": ["n.*", "*_scale_inv"]}])
def test_a_pattern_for_parts_that_are_gone_is_an_error_that_says_so(
    options: dict[str, list[str]], model: Model
) -> None:
    """The output has no parts of what is dequantised; a pattern that matches nothing is the error that it was."""
    with pytest.raises(
        RuleError, match=r"matches only parts of weights that are dequantised, such as 'l\.weight_scale"
    ):
        ckptkit.plan_remap(model.path, ckptkit.parse_rules(**options), dequantize=True)  # type: ignore[arg-type]
    rules = ckptkit.parse_rules(**options, allow_unused=True)  # type: ignore[arg-type]
    assert "n.weight" in {step.out.key for step in ckptkit.plan_remap(model.path, rules, dequantize=True).steps}
    with pytest.raises(RuleError, match="matches none of 2 keys"):
        ckptkit.plan_remap(model.path, ckptkit.parse_rules(drop=["x.*"]), dequantize=True)


def test_adapters_fold_into_the_numbers(model: Model, tmp_path: Path) -> None:
    """The sum is that with the float32 numbers of the base, rounded once to the dtype of the output."""
    adapter = {"l.lora_A.weight": torch.randn(2, COLUMNS), "l.lora_B.weight": torch.randn(ROWS, 2)}
    config = {"r": 2, "lora_alpha": 2}
    ckptkit.convert(model.path, tmp_path / "plain.safetensors", dequantize="float32")
    plain = tmp_path / "plain.safetensors"
    expected = ckptkit.plan_lora(plain, adapter, config).materialize({"base": plain, "donor": adapter})
    sources = {"base": model.path, "donor": adapter}
    plan = ckptkit.plan_lora(model.path, adapter, config, dequantize=True)
    assert torch.equal(plan.materialize(sources)["l.weight"], expected["l.weight"].bfloat16())
    ckptkit.save_plan(plan, tmp_path / "plan.json", sources)
    assert ckptkit.load_plan(tmp_path / "plan.json", sources).steps == plan.steps


def test_config_json_has_the_wider_dtype_of_folded_weights(model: Model, tmp_path: Path) -> None:
    """Else a loader that follows it would round the weights to what the other tensors have."""
    model.save(model.parts | {"norm.weight": torch.ones(2, dtype=torch.bfloat16)})
    adapter = {"l.lora_A.weight": torch.ones(1, COLUMNS), "l.lora_B.weight": torch.ones(ROWS, 1)}
    sources = {"base": model.path, "donor": adapter}
    for dtype, expected in (("float32", "float32"), ("bfloat16", "bfloat16")):
        out = tmp_path / dtype
        out.mkdir()
        plan = ckptkit.plan_lora(model.path, adapter, {"r": 1, "lora_alpha": 1}, dequantize=dtype)
        ckptkit.execute(plan, sources, out / "model.safetensors", carry=True)
        assert json.loads((out / "config.json").read_text())["dtype"] == expected


def test_operations_of_rules_round_once(model: Model) -> None:
    """An operation that computes gets the float32 numbers, and those behind it move the result."""
    rules = {"rule": [{"from": "l.weight", "to": "l.weight", "op": [{"scale": {"factor": 3}}, "transpose"]}]}
    plan = ckptkit.plan_remap(model.path, rules, dequantize=True)
    assert torch.equal(plan.materialize(model.path)["l.weight"], (model.numbers * 3).T.bfloat16())


def test_merge_in_both_directions(model: Model, tmp_path: Path) -> None:
    """A dequantised donor gets the dtype of the base, with one rounding; plain weights replace a dequantised base."""
    plain = {"l.weight": torch.zeros(ROWS, COLUMNS, dtype=torch.float16), "n.weight": torch.zeros(4)}
    plan = ckptkit.plan_merge(plain, model.path, dequantize=True)
    made = plan.materialize({"base": plain, "donor": model.path})
    assert torch.equal(made["l.weight"], model.numbers.half())
    plan = ckptkit.plan_merge(model.path, plain, dequantize=True)
    ckptkit.execute(plan, {"base": model.path, "donor": plain}, tmp_path / "out.safetensors", verify=True)
    assert not load_file(tmp_path / "out.safetensors")["l.weight"].any()


def test_diff_stats_and_load_see_the_numbers(model: Model) -> None:
    """diff compares them, stats measures them, and a model is loaded with them in its own dtype."""
    plain = {"l.weight": model.numbers.bfloat16(), "n.weight": model.parts["n.weight"]}
    assert ckptkit.diff(plain, model.path, values=True, dequantize=True).ok
    assert not ckptkit.diff(plain, model.path, values=True).ok
    measured = ckptkit.stats(model.path, dequantize="float32").tensors["l.weight"].numbers
    assert measured == ckptkit.stats({"w": model.numbers}).tensors["w"].numbers
    live = torch.nn.ModuleDict({"l": torch.nn.Linear(COLUMNS, ROWS, bias=False)})
    ckptkit.load_into(live, model.path, dequantize=True)
    assert torch.equal(live.get_parameter("l.weight"), model.numbers)
    live["l"].weight = torch.nn.Parameter(model.parts["l.weight"], requires_grad=False)
    live["l"].register_buffer("weight_scale_inv", model.parts["l.weight_scale_inv"])
    with pytest.raises(PlanError, match="as its own are, without dequantize=True"):
        ckptkit.load_into(live, model.path, dequantize=True)


def test_diff_and_stats_say_what_is_dequantised(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers of two quantised sides are F32, so that a small difference is seen; a plain side gives its dtype."""
    save_file(
        {"l.weight": model.numbers.bfloat16(), "n.weight": model.parts["n.weight"]}, tmp_path / "plain.safetensors"
    )
    other = tmp_path / "other.safetensors"
    save_file(model.parts | {"l.weight_scale_inv": model.parts["l.weight_scale_inv"] * (1 + 1e-5)}, other)
    result = ckptkit.diff(model.path, other, values=True, dequantize=True)
    assert [(one.key, one.scheme, one.dtype) for one in result.found_numbers] == [("l.weight", "fp8", "F32")]
    assert result.values is not None
    assert [one.rel_l2 for one in result.values.different] == [pytest.approx(1e-5, rel=0.01)]
    with_dtype = ckptkit.diff(model.path, other, values=True, dequantize="bfloat16")
    assert {one.dtype for one in (*with_dtype.expected_numbers, *with_dtype.found_numbers)} == {"BF16"}
    sides = (tmp_path / "plain.safetensors", model.path)
    ran = run_ckpt(capsys, "diff", *sides, "--values", "--dequantize")
    assert ran.code == 0
    assert "found: 1 weight (fp8) is dequantised to BF16\nvalues: all 2 tensors are equal" in ran.out
    assert "load_state_dict accepts the checkpoint once it is dequantised" in ran.out
    page = run_ckpt(capsys, "diff", *sides, "--values").out
    assert "values: 1 tensor is equal; 1 was not compared\n1 quantised weight was not compared: --dequantize" in page
    page = run_ckpt(capsys, "stats", model.path, "--dequantize", "--dtype", "F16").out
    assert "1 weight (fp8) is dequantised to F16" in page
    row = {"key": "l.weight", "scheme": "fp8", "dtype": "F32"}
    assert ckptkit.stats(model.path, dequantize=True).to_dict()["dequantized"] == [row]
    assert result.to_dict()["dequantized"] == [{"side": side, **row} for side in ("expected", "found")]
    assert run_ckpt(capsys, "stats", model.path, "--dtype", "F16").code == 2


BROKEN = {
    "of another shape": ({"l.weight_scale_inv": torch.ones(3, 3)}, "does not fit a weight of"),
    "NaN": ({"l.weight_scale_inv": torch.full((2, 2), torch.nan)}, "values that are NaN or infinite"),
    "missing": ({}, "it lacks 'l.weight_scale_inv'"),
    "of other blocks": ({"l.weight_scale_inv": torch.ones(4, 4)}, "in blocks of [128, 128]"),
    "two of them": (
        {"l.weight_scale_inv": torch.ones(2, 2), "l.weight_scale": torch.ones(1)},
        "'l.weight_scale' and 'l.weight_scale_inv' are both its scales",
    ),
    "of other integers": (
        {"l.weight": torch.ones(8, 8, dtype=torch.int8), "l.weight_scale": torch.ones(9, 1)},
        "'l.weight_scale' is F32 [9, 1], which does not fit a weight of [8, 8]",
    ),
    "F64 and NaN": ({"l.weight_scale_inv": torch.full((2, 2), torch.nan).double()}, "values that are NaN or infinite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_parts_are_errors_and_findings(name: str, model: Model, tmp_path: Path) -> None:
    """The error names the weight and the part, and ``run_checks`` finds it; no output is left behind."""
    parts, reason = BROKEN[name]
    kept = {key: part for key, part in model.parts.items() if key != "l.weight_scale_inv"}
    model.save(kept | parts)
    with pytest.raises(FormatError, match=r"'l\.weight' cannot be dequantised") as refusal:
        ckptkit.convert(model.path, tmp_path / "out.safetensors", dequantize=True)
    assert reason in str(refusal.value)
    if "NaN" in name:
        assert refusal.value.path == str(model.path / "model.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    found = {finding.code for finding in ckptkit.run_checks(model.path).findings if finding.severity == "error"}
    assert found == {"missing-part" if name == "missing" else "broken-part"}


def test_a_scheme_without_a_decoder_is_refused_by_name(tmp_path: Path) -> None:
    """The refusal has the library that makes plain weights."""
    parts = {"q.codes": torch.zeros(4, 4, 1, dtype=torch.int8), "q.codebooks": torch.ones(1, 256, 1, 8)}
    save_file(parts | {"q.scales": torch.ones(4, 1, 1, 1)}, tmp_path / "aqlm.safetensors")
    with pytest.raises(PlanError, match=r"quantised \(AQLM\), which ckptkit cannot dequantise \(load it with aqlm"):
        ckptkit.plan_remap(tmp_path / "aqlm.safetensors", dequantize=True)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_that_torch_quantised_are_those_of_dequantize(is_zip: bool, tmp_path: Path) -> None:
    """Per tensor and per channel, of each integer dtype, also as views; bit for bit."""
    torch.manual_seed(0)
    matrix, kernel = torch.randn(40, 33), torch.randn(8, 4, 3, 3)
    state = {
        "signed": torch.quantize_per_tensor(matrix, 0.03, 3, torch.qint8),
        "unsigned": torch.quantize_per_tensor(matrix, 0.03, 130, torch.quint8),
        "wide": torch.quantize_per_tensor(matrix, 0.0003, 5, torch.qint32),
        "view": torch.quantize_per_tensor(matrix, 0.03, 3, torch.qint8).t(),
        "rows": torch.quantize_per_channel(matrix, torch.rand(40) * 0.1, torch.arange(40), 0, torch.qint8),
        "inputs": torch.quantize_per_channel(kernel, torch.rand(4) * 0.1, torch.arange(4), 1, torch.quint8),
    }
    torch.save(state, tmp_path / "q.pt", _use_new_zipfile_serialization=is_zip)
    plan = ckptkit.plan_remap(tmp_path / "q.pt", dequantize=True)
    made = plan.materialize(tmp_path / "q.pt")
    assert all(torch.equal(made[key], tensor.dequantize()) for key, tensor in state.items())
    ckptkit.save_plan(plan, tmp_path / "plan.json", tmp_path / "q.pt")
    assert ckptkit.load_plan(tmp_path / "plan.json", tmp_path / "q.pt") == plan
    live = ckptkit.plan_remap(state, dequantize=True).materialize(state)
    assert all(torch.equal(live[key], made[key]) for key in state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_live_module_that_torch_quantised_is_read_as_its_file_is(tmp_path: Path) -> None:
    """Its layers have a tuple in the state_dict; the numbers load into a plain model."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    quantize: Any = torch.ao.quantization.quantize_dynamic
    module = quantize(net, {torch.nn.Linear}, dtype=torch.qint8)
    torch.save(module.state_dict(), tmp_path / "q.pt")
    numbers = ckptkit.plan_remap(tmp_path / "q.pt", dequantize=True).materialize(tmp_path / "q.pt")
    live = ckptkit.plan_remap(module, dequantize=True).materialize(module)
    assert live.keys() == numbers.keys()
    assert all(torch.equal(live[key], tensor) for key, tensor in numbers.items())
    packed = "*._packed_params._packed_params"
    rules = ckptkit.parse_rules(rename=[f"{packed}.0=*.weight", f"{packed}.1=*.bias"], drop=["*.scale", "*.zero_point"])
    report = ckptkit.load_into(net, module, rules, dequantize=True)
    assert report.coverage == 1.0
    assert torch.equal(net.state_dict()["0.weight"], module[0].weight().dequantize())
    with pytest.raises(PlanError, match=r"quantised .torch QI8.*dequantize=True reads it as numbers"):
        ckptkit.plan_remap(module)


FORMS = [("int8", "row"), ("fp8", "tensor"), ("fp8", "row"), ("fp8", "block")]


@pytest.mark.parametrize(("form", "scales"), FORMS)
def test_what_quantize_makes_comes_back_within_half_a_step(form: str, scales: str, tmp_path: Path) -> None:
    """``--dequantize`` finds the parts, and ``--carry`` adds the configuration that says how they are quantised."""
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    source = tmp_path / "source"
    source.mkdir()
    save_file({"q.weight": weight, "head.weight": torch.randn(8, 8)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"dtype": "float32"}))
    suffix = "weight_scale_inv" if scales == "block" else "weight_scale"
    operation = {"quantize": {"form": form, "scales": scales}}
    rules = {"rule": [{"from": "q.weight", "to": ["q.weight", f"q.{suffix}"], "op": operation}]}
    out = tmp_path / "out"
    out.mkdir()
    plan = ckptkit.plan_remap(source, rules)
    written = ckptkit.execute(plan, source, out / "model.safetensors", verify=True, carry=True)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("fp8" if scales == "block" else "compressed-tensors")
    assert any("quantization_config" in str(change) for change in written.adapted)
    assert [weight.key for weight in ckptkit.stats(out).quantized.weights] == ["q.weight"]
    with ckptkit.open_checkpoint(out / "model.safetensors") as made:
        factors = made.read(f"q.{suffix}")
    if scales == "block":
        factors = factors.repeat_interleave(128, 0)[:ROWS].repeat_interleave(128, 1)
    back = ckptkit.plan_remap(out, dequantize="float32").materialize(out)["q.weight"]
    magnitudes = (weight / factors).abs()
    step = torch.ones(()) if form == "int8" else 2.0 ** (magnitudes.log2().floor().clamp(min=-6) - 3)
    assert ((back - weight).abs() <= factors * step * 0.5001).all()


def test_zero_points_of_fp8_are_subtracted(tmp_path: Path) -> None:
    """They are a part of the weight as those of integers are."""
    codes, zeros = torch.randn(4, 8).to(torch.float8_e4m3fn), torch.tensor([[1.0], [0.0], [-2.0], [0.5]])
    parts = {"q.weight": codes, "q.weight_scale": torch.rand(4, 1), "q.weight_zero_point": zeros}
    save_file(parts, tmp_path / "fp8.safetensors")
    ckptkit.convert(tmp_path / "fp8.safetensors", tmp_path / "out.safetensors", dequantize=True)
    made = load_file(tmp_path / "out.safetensors")
    assert made.keys() == {"q.weight"}
    assert torch.equal(made["q.weight"], (codes.float() - zeros) * parts["q.weight_scale"])


def test_a_part_that_the_decoder_does_not_take_is_refused(tmp_path: Path) -> None:
    """Columns in another order would be other numbers."""
    parts = {
        "q.weight_packed": torch.zeros(4, 8, dtype=torch.uint8),
        "q.weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn),
        "q.weight_global_scale": torch.ones(1),
        "q.weight_g_idx": torch.zeros(16, dtype=torch.int32),
    }
    save_file(parts, tmp_path / "nvfp4.safetensors")
    with pytest.raises(PlanError, match=r"nvfp4 \(compressed-tensors\) with 'q\.weight_g_idx'"):
        ckptkit.plan_remap(tmp_path / "nvfp4.safetensors", dequantize=True)


def test_a_plan_says_when_no_weight_is_quantised() -> None:
    """Someone who asks for numbers learns that nothing had to be decoded."""
    plan = ckptkit.plan_remap({"w": torch.ones(2)}, dequantize=True)
    assert plan.notes == ("no weight is quantised, so none is dequantised",)


LISTS = [
    ({"quant_method": "fp8", "modules_to_not_convert": ["head"]}, {"modules_to_not_convert": ["head", "l"]}),
    ({"quant_method": "fp8"}, {"modules_to_not_convert": ["embed", "l", "lm_head"]}),  # heads were the library's own
    ({"quant_method": "compressed-tensors", "ignore": []}, {"ignore": ["l"]}),
]


@pytest.mark.parametrize(("section", "expected"), LISTS)
def test_a_carried_configuration_lists_what_a_rule_dequantised(
    section: dict[str, object], expected: dict[str, object], model: Model, tmp_path: Path
) -> None:
    """The codes of other weights stay, and the parts of those that are numbers are not called missing."""
    parts: dict[str, torch.Tensor] = {}
    for name in ("l", "m"):
        parts |= {f"{name}.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}
        parts |= {f"{name}.weight_scale_inv": torch.ones(1, 1)}
    model.save(parts | {"embed.weight": torch.ones(2, 2)})
    config = {"dtype": "bfloat16", "quantization_config": section}
    (model.path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    plan = ckptkit.plan_remap(model.path, {"rule": [{"from": "l.weight", "to": "l.weight", "op": "dequantize"}]})
    written = ckptkit.execute(plan, model.path, out / "model.safetensors", carry=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"] == section | expected
    assert "'l'" in str(written.adapted[0])
    assert written.plan is not None
    assert not any("not in the output" in note or "still" in note for note in written.plan.notes)


def test_a_configuration_without_a_known_list_is_said_to_be_false(model: Model, tmp_path: Path) -> None:
    """One sentence says what to edit."""
    codes = {f"{name}.weight": torch.ones(2, 2).to(torch.float8_e4m3fn) for name in "lm"}
    model.save(codes | {f"{name}.weight_scale": torch.ones(1) for name in "lm"})
    config = {"quantization_config": {"quant_method": "modelopt"}}
    (model.path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    plan = ckptkit.plan_remap(model.path, {"rule": [{"from": "l.weight", "to": "l.weight", "op": "dequantize"}]})
    written = ckptkit.execute(plan, model.path, out / "model.safetensors", carry=True)
    assert json.loads((out / "config.json").read_text()) == config
    assert written.plan is not None
    assert any("1 weight is plain in the output" in note for note in written.plan.notes)
