"""No plan casts, computes with, takes apart or overlays a quantised weight as if its parts were numbers."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ckptkit import execute, load_into, open_checkpoint, plan_merge, plan_remap
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import CkptkitError, PlanError
from ckptkit.plans.adapters.extract import plan_extract_lora
from ckptkit.plans.adapters.fold import plan_lora
from ckptkit.plans.plan import Plan
from ckptkit.plans.saved import apply_plan, plan_from_json, plan_to_json
from ckptkit.rules.parse import parse_rules
from tests.helpers_cli import run_ckpt
from tests.helpers_outputs import same_state

State = dict[str, torch.Tensor]
F8 = torch.float8_e4m3fn


def fp8(key: str = "a.weight", *, scale: str = "_scale_inv", seed: int = 0) -> State:
    """Return a weight of 256 x 256 in F8 with the scales of its blocks, as DeepSeek writes it."""
    torch.manual_seed(seed)
    weight = torch.randn(256, 256) * 0.02
    scales = weight.abs().reshape(2, 128, 2, 128).amax((1, 3)) / 448
    codes = (weight / scales.repeat_interleave(128, 0).repeat_interleave(128, 1)).to(F8)
    return {key: codes, f"{key}{scale}": scales}


def gptq(module: str = "a") -> State:
    """Return a weight of 64 x 32 in four bits, as GPTQ writes it."""
    return {
        f"{module}.qweight": torch.randint(-(2**31), 2**31 - 1, (8, 32), dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(2, 4, dtype=torch.int32),
        f"{module}.scales": torch.rand(2, 32, dtype=torch.float16),
        f"{module}.g_idx": torch.arange(64, dtype=torch.int32) // 32,
    }


def nf4(key: str = "a.weight") -> State:
    """Return a weight of 64 x 32 in four bits, as bitsandbytes writes it."""
    return {
        key: torch.randint(0, 255, (1024, 1), dtype=torch.uint8),
        f"{key}.absmax": torch.rand(32),
        f"{key}.quant_map": torch.linspace(-1, 1, 16),
        f"{key}.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }


def int8(key: str = "a.weight") -> State:
    """Return a weight in eight bits, as bitsandbytes writes it."""
    return {
        key: torch.randint(-127, 127, (64, 32), dtype=torch.int8),
        f"{key.removesuffix('weight')}SCB": torch.rand(64),
    }


def packed(module: str = "a") -> State:
    """Return a weight of 64 x 32 in four bits, as compressed-tensors writes it."""
    return {
        f"{module}.weight_packed": torch.randint(0, 2**31 - 1, (64, 4), dtype=torch.int32),
        f"{module}.weight_scale": torch.rand(64, 1),
        f"{module}.weight_shape": torch.tensor([64, 32]),
    }


def mxfp4(key: str = "a.gate_up_proj") -> State:
    """Return the experts of a layer as gpt-oss stores them."""
    return {
        f"{key}_blocks": torch.randint(0, 255, (2, 8, 4, 16), dtype=torch.uint8),
        f"{key}_scales": torch.randint(100, 130, (2, 8, 4), dtype=torch.uint8),
    }


NORM = {"norm.weight": torch.linspace(-2, 2, 32, dtype=torch.bfloat16)}
SCHEMES: dict[str, tuple[Callable[[], State], str, tuple[int, ...]]] = {  # the parts, the scheme, the plain shape
    "fp8": (fp8, "fp8", (256, 256)),
    "gptq": (gptq, "GPTQ int4", (64, 32)),
    "nf4": (nf4, "bitsandbytes nf4", (64, 32)),
    "int8": (int8, "bitsandbytes int8", (64, 32)),
    "packed": (packed, "int (compressed-tensors)", (64, 32)),
}
BY_SCHEME = pytest.mark.parametrize(("made", "scheme", "shape"), SCHEMES.values(), ids=SCHEMES.keys())


def rules(**rule: object) -> Any:
    return parse_rules(file={"rule": [rule]})


def refusal(act: Callable[[], object], error: type[CkptkitError] = PlanError) -> str:
    """Return the message of the error, one sentence that names the weight and the scheme, and a hint."""
    with pytest.raises(error) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value.reason


def copied(plan: Plan, source: State, tmp_path: Path) -> State:
    execute(
        plan, dict.fromkeys({s.role for step in plan.steps for s in step.sources}, source), tmp_path / "o.safetensors"
    )
    return dict(load_file(tmp_path / "o.safetensors"))


@BY_SCHEME
def test_no_part_is_cast(made: Callable[[], State], scheme: str, shape: tuple[int, ...]) -> None:
    """A cast of a whole file is refused, also where each part has the dtype already or is an integer."""
    assert len(shape) == 2
    for dtype in ("BF16", "F16", "F32"):
        message = refusal(lambda dtype=dtype: plan_remap(made() | NORM, dtype=dtype))  # type: ignore[misc]
        assert f"is quantised ({scheme}), so a cast to {dtype} would not dequantise it" in message


def test_codes_without_a_float_are_refused_too() -> None:
    """A cast leaves integers alone, so the output would hold one layer in another dtype than asked for."""
    assert "(mxfp4)" in refusal(lambda: plan_remap(mxfp4() | NORM, dtype="F32"))


def test_other_tensors_are_cast_by_a_rule(tmp_path: Path) -> None:
    """The hint of the refusal names a rule that casts other tensors of the file, and the parts are copied."""
    state = fp8() | NORM
    with pytest.raises(PlanError, match=r'give rules=file in place of dtype, with from = "\*norm\.\*".*"F32"'):
        plan_remap(state, dtype="F32")
    plan = plan_remap(state, rules(**{"from": "*norm.*", "to": "*norm.*", "op": {"cast": {"dtype": "F32"}}}))
    assert same_state(copied(plan, state, tmp_path), fp8() | {"norm.weight": NORM["norm.weight"].float()})


OPERATIONS: dict[str, tuple[object, str]] = {
    "cast of a scale": ({"cast": {"dtype": "F16"}}, "a.weight_scale_inv"),
    "cast": ({"cast": {"dtype": "F16"}}, "a.weight"),
    "transpose": ("transpose", "a.weight"),
    "slice": ({"slice": {"dim": 0, "start": 0, "stop": 128}}, "a.weight"),
    "scale": ({"scale": {"factor": 2.0}}, "a.weight_scale_inv"),
}


@pytest.mark.parametrize(("operation", "key"), OPERATIONS.values(), ids=OPERATIONS.keys())
def test_no_operation_changes_a_part(operation: object, key: str) -> None:
    """Operations that compute and operations that only move elements are refused: scales would not follow codes."""
    message = refusal(lambda: plan_remap(fp8() | NORM, rules(**{"from": key, "to": key, "op": operation})))
    assert "is quantised (fp8), so" in message
    assert quoted_in(message, "a.weight")


def quoted_in(message: str, key: str) -> bool:
    return f"'{key}" in message


RENAMES: dict[str, tuple[State, list[str], str]] = {  # parts, renames, the reason or the new key of one part
    "all by a star": (fp8(), ["a.*=b.c.*"], "b.c.weight_scale_inv"),
    "the weight and its companions": (fp8(), ["a.weight*=b.weight*"], "b.weight_scale_inv"),
    "each by its own rule": (fp8(), ["a.weight=b.weight", "a.weight_scale_inv=b.weight_scale_inv"], "b.weight"),
    "gptq": (gptq("layers.0.q"), ["layers.{i:int}.*=h.{i}.attn.*"], "h.0.attn.q.qzeros"),
    "nf4": (nf4("m.a.weight"), ["m.*=*"], "a.weight.quant_state.bitsandbytes__nf4"),
    "packed": (packed(), ["*=model.*"], "model.a.weight_packed"),
    "experts under another name": (mxfp4(), ["a.gate_up_proj_*=b.w13_*"], "b.w13_scales"),
    "only the weight": (fp8(), ["a.weight=x.weight"], "'x.weight', 'a.weight_scale_inv'"),
    "only a companion": (fp8(), ["a.weight_scale_inv=a.foo"], "'a.weight', 'a.foo'"),
    "all companions": (fp8() | fp8("b.weight"), ["{m}.weight_scale_inv=c.{m}.weight_scale_inv"], "'c.a."),
    "swapped scales": (
        fp8() | fp8("b.weight"),
        ["a.weight_scale_inv=b.weight_scale_inv", "b.weight_scale_inv=a.weight_scale_inv"],
        "not the parts of one weight",
    ),
    "gptq in part": (gptq(), ["a.qweight=b.qweight"], "'b.qweight'"),
    "without the dot": (gptq(), ["a.*=a*"], "'aqweight'"),
    "another kind of part": (packed(), ["a.weight_*=a.foo_*"], "'a.foo_packed'"),
}  # fmt: skip


@pytest.mark.parametrize(("state", "renames", "expected"), RENAMES.values(), ids=RENAMES.keys())
def test_parts_are_renamed_together(state: State, renames: list[str], expected: str, tmp_path: Path) -> None:
    """A rename moves all parts to one weight of the same form, or is refused with the new names."""
    if "'" in expected or " " in expected:
        message = refusal(lambda: plan_remap(state, renames))
        assert expected in message
        assert "is quantised" in message
        return
    plan = plan_remap(state, renames)
    assert [step.operation for step in plan.steps] == ["copy"] * len(state)
    names = {step.sources[0].key: step.out.key for step in plan.steps}
    assert expected in names.values()
    assert same_state(copied(plan, state, tmp_path), {names[key]: value for key, value in state.items()})


def test_a_scheme_that_only_a_configuration_shows_is_renamed(tmp_path: Path) -> None:
    """Names alone may show another scheme with fewer parts: a new module keeps all parts, and one part never moves."""
    state = {
        "a.weight": torch.zeros(8, 4, dtype=torch.uint8),
        "a.weight_scale": torch.ones(8, 1),
        "a.input_scale": torch.ones(1),
    }
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "quark"}}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert [step.out.key[:4] for step in plan_remap(checkpoint, ["a.*=b.c.*"]).steps] == ["b.c."] * 3
        assert "(packed integers)" in refusal(lambda: plan_remap(checkpoint, ["a.input_scale=b.input_scale"]))


def test_copies_of_a_weight_are_whole() -> None:
    """A rule with two new names copies all parts twice, or is refused."""
    whole = plan_remap(fp8(), rules(**{"from": "a.*", "to": ["b.*", "c.*"]}))
    assert [step.out.key for step in whole.steps] == [
        "b.weight",
        "c.weight",
        "b.weight_scale_inv",
        "c.weight_scale_inv",
    ]
    part = rules(**{"from": "a.weight", "to": ["a.weight", "c.weight"]})
    assert "not the parts of one weight" in refusal(lambda: plan_remap(fp8(), part))


FILTERS: dict[str, tuple[dict[str, list[str]], str | None]] = {
    "all parts stay": ({"keep": ["a.*"]}, None),
    "all parts go": ({"drop": ["a.*"]}, None),
    "the weight stays": ({"keep": ["*.weight"]}, "'a.weight' without 'a.weight_scale_inv'"),
    "a scale goes": ({"drop": ["*_scale_inv"]}, "'a.weight' without 'a.weight_scale_inv'"),
    "the weight goes": ({"drop": ["a.weight"]}, "'a.weight_scale_inv' without 'a.weight'"),
}


@pytest.mark.parametrize(("given", "expected"), FILTERS.values(), ids=FILTERS.keys())
def test_filters_take_all_parts_or_none(given: dict[str, list[str]], expected: str | None) -> None:
    """Filters may leave out whole weights, and never a part of one."""
    state = fp8() | NORM
    if expected is None:
        assert plan_remap(state, parse_rules(**given)).steps  # type: ignore[arg-type]
    else:
        assert expected in refusal(lambda: plan_remap(state, parse_rules(**given)))  # type: ignore[arg-type]


@BY_SCHEME
def test_plain_and_quantised_never_replace_each_other(
    made: Callable[[], State], scheme: str, shape: tuple[int, ...]
) -> None:
    """An overlay between a quantised and a plain weight is refused in both directions, by every policy."""
    plain = {"a.weight": torch.zeros(shape, dtype=torch.bfloat16)} | NORM
    coded = made() | NORM
    for base, donor in ((plain, coded), (coded, plain)):
        for policy in ({}, {"on_mismatch": "skip"}, {"on_mismatch": "pad"}, {"on_unexpected": "add"}):
            assert f"({scheme})" in refusal(lambda b=base, d=donor, p=policy: plan_merge(b, d, **p))  # type: ignore[misc]
        assert f"({scheme})" in refusal(lambda b=base, d=donor: plan_remap(d, like=b))  # type: ignore[misc]


@BY_SCHEME
def test_all_parts_replace_the_same_parts(
    made: Callable[[], State], scheme: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """A weight of the same scheme is overlaid with all its parts, and the other tensors of the file are cast."""
    assert scheme
    base, donor = made() | NORM, {key: tensor.clone() for key, tensor in (made() | NORM).items()}
    wanted = donor | NORM
    donor["norm.weight"] = NORM["norm.weight"].float()
    execute(plan_merge(base, donor), {"base": base, "donor": donor}, tmp_path / "merged.safetensors")
    assert same_state(load_file(tmp_path / "merged.safetensors"), wanted)
    execute(plan_remap(donor, like=base), donor, tmp_path / "like.safetensors")
    assert same_state(load_file(tmp_path / "like.safetensors"), wanted)
    only_norm = plan_merge({"a.weight": torch.zeros(shape)} | NORM, donor, parse_rules(keep=["norm.*"]))
    assert [step.sources[0].role for step in only_norm.steps] == ["base", "donor"]


def other(state: State, **tensors: torch.Tensor | None) -> State:
    changed = state | {key.replace("__", "."): value for key, value in tensors.items() if value is not None}
    return {key: value for key, value in changed.items() if tensors.get(key.replace(".", "__"), value) is not None}


OVERLAYS: dict[str, tuple[State, State, str]] = {
    "another scheme": (gptq(), packed(), "is quantised (int (compressed-tensors)), and in the base as GPTQ int4"),
    "another scheme of the same key": (int8(), nf4(), "and in the base as bitsandbytes int8"),
    "other blocks": (fp8(), other(fp8(), a__weight_scale_inv=torch.ones(1, 1)), "F32 [1, 1], and the base has it as"),
    "another dtype of scales": (
        fp8(), other(fp8(), a__weight_scale_inv=torch.ones(2, 2, dtype=torch.bfloat16)), "as BF16 [2, 2], and the base"
    ),
    "a part more": (fp8(), other(fp8(), a__input_scale=torch.ones(1)), "does not have its part 'a.input_scale'"),
    "a part less": (other(fp8(), a__input_scale=torch.ones(1)), fp8(), "also has its part 'a.input_scale'"),
    "another name of scales": (fp8(), fp8(scale="_scale"), "also has its part 'a.weight_scale_inv'"),
    "only scales": (fp8(), {"a.weight_scale_inv": torch.ones(2, 2)}, "of the donor is plain F32 [2, 2]"),
    "codes without scales": (fp8(), {"a.weight": fp8()["a.weight"]}, "of the donor is plain F8_E4M3"),
    "no scales in the base": ({"a.weight": fp8()["a.weight"]}, fp8(), "and the base has it as plain F8_E4M3"),
}  # fmt: skip


@pytest.mark.parametrize(("base", "donor", "expected"), OVERLAYS.values(), ids=OVERLAYS.keys())
def test_parts_that_differ_are_not_overlaid(base: State, donor: State, expected: str) -> None:
    """Another scheme, other parts, dtypes or shapes are refused, with the difference."""
    assert expected in refusal(lambda: plan_merge(base | NORM, donor | NORM, on_mismatch="skip"))


def test_later_donors_do_not_take_a_weight_apart() -> None:
    """Where a later donor replaces one part of a weight that an earlier donor added, the merge is refused."""
    second = {"a.weight": torch.zeros(256, 256)}
    assert "(fp8)" in refusal(lambda: plan_merge(NORM, [fp8() | NORM, second | NORM], on_unexpected="add"))
    added = plan_merge(NORM, [fp8() | NORM, fp8() | NORM], on_unexpected="add")
    assert {step.sources[0].role for step in added.steps} == {"donor2"}


def adapter(module: str, rows: int, columns: int) -> State:
    names = f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"
    return {names[0]: torch.ones(2, columns), names[1]: torch.ones(rows, 2)}


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


@BY_SCHEME
def test_adapters_are_not_folded_into_codes(made: Callable[[], State], scheme: str, shape: tuple[int, ...]) -> None:
    """A fold into a quantised weight is refused with the way out, and a fold into another weight copies all parts."""
    base = made() | {"b.weight": torch.zeros(64, 32)}
    with pytest.raises(PlanError) as caught:
        plan_lora(base, adapter("a", *shape), CONFIG)
    assert f"is quantised ({scheme}), so lora would take its codes for numbers" in caught.value.reason
    assert "merge_and_unload of peft" in str(caught.value.hint)
    assert "cast it first" not in str(caught.value)
    beside = plan_lora(base, adapter("b", 64, 32), CONFIG)
    assert {step.operation for step in beside.steps if step.out.key != "b.weight"} == {"copy"}
    tuned = {"a.weight": torch.zeros(shape), "b.weight": torch.ones(64, 32)}
    assert f"({scheme})" in refusal(lambda: plan_extract_lora(base, tuned, 2))
    assert f"({scheme})" in refusal(lambda: plan_extract_lora(tuned, made(), 2))
    assert plan_extract_lora(base, tuned, 2, parse_rules(drop=["a.*"])).steps


def test_a_saved_plan_is_checked_when_it_is_applied() -> None:
    """A plan file that casts a part is refused, also if another program wrote the file; a copy is applied."""
    state = fp8() | NORM
    document = plan_to_json(plan_remap(state, ["a.*=b.*"]), {"source": as_checkpoint(state, "source")})
    assert apply_plan(plan_from_json(document), {"source": as_checkpoint(state, "source")}).steps
    document["plan"][0].update(dtype="BF16", operation="cast")
    saved = plan_from_json(json.loads(json.dumps(document)))
    assert "(fp8), so a cast" in refusal(lambda: apply_plan(saved, {"source": as_checkpoint(state, "source")}))


PLAIN: dict[str, State] = {
    "fp8 without scales": {"a.weight": torch.ones(4, 4).to(F8)},
    "a parameter called weight_scale": {"a.weight": torch.ones(4, 4), "a.weight_scale": torch.ones(4)},
    "integers": {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.bias": torch.ones(4)},
}


@pytest.mark.parametrize("state", PLAIN.values(), ids=PLAIN.keys())
def test_ordinary_tensors_are_cast_and_merged(state: State, tmp_path: Path) -> None:
    """A name or a dtype alone makes no quantised weight: casts and merges work as for all tensors."""
    out = copied(plan_remap(state, dtype="BF16"), state, tmp_path)
    floats = {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}
    assert same_state(out, floats)
    base = {key: torch.zeros(value.shape) for key, value in state.items()}
    assert {step.sources[0].role for step in plan_merge(base, state).steps} == {"donor"}
    assert plan_remap(state, parse_rules(keep=["a.weight"])).steps
    report = load_into(holder(base), state)
    assert report.coverage == 1


def holder(state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a model with a buffer for each tensor."""
    model = nn.Module()
    for key, value in state.items():
        module, _, name = key.rpartition(".")
        inner = model
        for segment in filter(None, module.split(".")):
            if not hasattr(inner, segment):
                inner.add_module(segment, nn.Module())
            inner = getattr(inner, segment)
        inner.register_buffer(name.replace(".", "_"), value.clone())
    return model


@pytest.mark.parametrize("made", [fp8, gptq, int8, packed], ids=["fp8", "gptq", "int8", "packed"])
def test_a_model_with_the_same_parts_is_loaded(made: Callable[[], State]) -> None:
    """A live model that has all parts as buffers gets their bytes; a plain model gets nothing and keeps its values."""
    state = made() | NORM
    model = holder({key: torch.zeros(value.shape).to(value.dtype) for key, value in state.items()})
    assert load_into(model, state).coverage == 1
    assert same_state(model.state_dict(), state)
    plain = holder({"a.weight": torch.ones(256, 256), "norm.weight": torch.ones(32)})
    message = refusal(lambda: load_into(plain, state, on_mismatch="skip"))
    assert "the base has" in message
    assert bool((plain.get_buffer("norm.weight") == 1).all())


def test_shards_and_formats_are_copies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A whole file is written in another format and in shards, bit for bit; a cast exits with 2 and writes nothing."""
    state = fp8("l.0.w.weight") | gptq("l.1") | nf4("l.2.weight") | NORM
    save_file(state, tmp_path / "q.safetensors")
    assert run_ckpt(capsys, "convert", tmp_path / "q.safetensors", "-o", tmp_path / "q.pt", "--verify").code == 0
    assert same_state(torch.load(tmp_path / "q.pt"), state)
    assert run_ckpt(capsys, "convert", tmp_path / "q.pt", "-o", tmp_path / "d", "--max-shard-size", "20kB").code == 0
    shards = [load_file(path) for path in sorted((tmp_path / "d").glob("*.safetensors"))]
    assert len(shards) > 1
    assert same_state({key: value for shard in shards for key, value in shard.items()}, state)
    done = run_ckpt(capsys, "convert", tmp_path / "q.safetensors", "-o", tmp_path / "b.safetensors", "--dtype", "BF16")
    assert (done.code, done.out) == (2, "")
    assert "'l.0.w.weight' is quantised (fp8)" in done.err
    assert not (tmp_path / "b.safetensors").exists()


def planners() -> Iterator[tuple[str, bool]]:
    """Yield each function that returns a plan, and whether it returns the plan through the check."""
    for path in sorted((Path(__file__).parent.parent / "ckptkit").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "from ckptkit.plans.plan import" in text else ():
            if isinstance(node, ast.FunctionDef):
                calls = {
                    call.func.id
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
                if "Plan" in calls:
                    yield node.name, "check_quantized" in calls


def test_every_planner_is_checked() -> None:
    """A function that makes a plan checks it; the two that read a plan file are checked when the plan is applied.

    A patch needs no check, since each tensor of its result is compared with a digest.
    """
    unchecked = {name for name, is_checked in planners() if not is_checked}
    assert unchecked == {"plan_from_json", "invert_plan", "plan_of_patch"}
