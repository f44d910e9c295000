"""A plan of a recipe decides about every key of the inputs, and says why; what it cannot decide is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit.errors import PlanError, RecipeError
from ckptkit.plans.recipes.parse import recipe_from_text

State = dict[str, torch.Tensor]
LAYERS = 5


def net(value: float) -> State:
    """Return a model of five layers with an embedding and a head; all elements of a tensor are equal."""
    state = {"embed.weight": torch.full((6, 4), value)}
    state |= {
        f"layers.{i}.{name}.weight": torch.full((4, 4), value + i) for i in range(LAYERS) for name in ("attn", "mlp")
    }
    return {**state, "norm.weight": torch.full((4,), value), "head.weight": torch.full((6, 4), value)}


A, B = net(0.0), net(10.0)
TWO = '[[input]]\nname = "A"\n[[input]]\nname = "B"\n'


def merged(text: str, inputs: Mapping[str, Any] | None = None) -> State:
    """Return the tensors that a recipe makes."""
    given = inputs or {"A": A, "B": B}
    return ckptkit.plan_recipe(tomled(text), inputs=given).materialize(given)


def tomled(text: str) -> Any:
    return recipe_from_text(text, path="recipe.toml")


def values(state: State) -> dict[str, float]:
    return {key: float(tensor.flatten()[0]) for key, tensor in state.items()}


def test_a_value_comes_from_the_first_set_that_fits_and_has_it_then_the_input_then_the_top() -> None:
    made = merged(
        'method = "linear"\nnormalize = false\nweight = 1\n'
        '[[input]]\nname = "A"\n[[input]]\nname = "B"\nweight = 0.5\n'
        '[[set]]\nkeys = "layers.0.*"\ninputs.B.weight = 0.1\n'
        '[[set]]\nkeys = ["layers.{i:int}.attn.*", "layers.0.*"]\ninputs.A.weight = 3\ninputs.B.weight = 0.2\n'
        '[[set]]\nkeys = "head.*"\nweight = 0.25\n'
    )
    found = values(made)
    assert found["norm.weight"] == pytest.approx(0.5 * 10)
    assert found["head.weight"] == pytest.approx(0.25 * 10)
    assert found["layers.0.mlp.weight"] == pytest.approx(0.1 * 10)  # A, times 3, is 0 there
    assert found["layers.2.attn.weight"] == pytest.approx(3 * 2 + 0.2 * 12)
    assert found["layers.2.mlp.weight"] == pytest.approx(2 + 0.5 * 12)


def test_a_gradient_goes_over_the_numbers_of_the_keys_that_fit() -> None:
    made = merged(
        'method = "slerp"\nt = 0.5\n' + TWO + '[[set]]\nkeys = "layers.{i:int}.mlp.*"\n'
        't = { over = "i", values = [0, 0.5, 1] }\n',
        {"A": {**A}, "B": {key: 2 * tensor + 1 for key, tensor in A.items()}},
    )
    for i, share in enumerate((0, 0.25, 0.5, 0.75, 1)):  # of tensors in one direction, slerp is linear
        assert values(made)[f"layers.{i}.mlp.weight"] == pytest.approx((1 - share) * i + share * (2 * i + 1))
    assert values(made)["layers.4.attn.weight"] == pytest.approx(0.5 * 4 + 0.5 * 9)


def test_keys_are_taken_copied_and_left_to_the_base_bit_for_bit() -> None:
    plan = ckptkit.plan_recipe(
        tomled(
            'method = "linear"\nbase = "B"\nonly = ["layers.*"]\ncopy = [{ keys = "norm.*", from = "A" }]\n'
            + TWO
            + '[[set]]\nkeys = "layers.1.*"\ntake = "A"\n'
        ),
        inputs={"A": A, "B": B},
    )
    why = {step.out.key: (step.rule, {source.role for source in step.sources}) for step in plan.steps}
    assert why["norm.weight"] == ("copy from 'A'", {"A"})
    assert why["head.weight"] == why["embed.weight"] == ("not in only", {"B"})
    assert why["layers.1.mlp.weight"] == ("take = 'A' (line 9)", {"A"})
    assert why["layers.2.mlp.weight"] == ("linear", {"A", "B"})
    assert [step.operation for step in plan.steps if step.out.key == "head.weight"] == ["copy"]
    reasons = {(drop.role, drop.key): drop.reason for drop in plan.dropped}
    assert reasons["A", "head.weight"] == "not in only"
    assert reasons["B", "norm.weight"] == "copy from 'A'"
    assert all(values(plan.materialize({"A": A, "B": B}))[key] == 10 for key in ("head.weight", "embed.weight"))


def test_a_set_can_have_another_method() -> None:
    plan = ckptkit.plan_recipe(
        tomled('method = "linear"\n' + TWO + '[[set]]\nkeys = "norm.*"\nmethod = "slerp"\nt = 1\n'),
        inputs={"A": A, "B": B},
    )
    assert {step.rule for step in plan.steps} == {"linear", "slerp (line 6): t 1"}
    assert values(plan.materialize({"A": A, "B": B}))["norm.weight"] == 10


MORE = {**B, "extra.weight": torch.ones(2)}
LESS = {key: tensor for key, tensor in A.items() if key != "norm.weight"}


@pytest.mark.parametrize(
    ("policy", "extra", "norm"),
    [("base", None, None), ("present", 1.0, 10.0), ("drop", None, None)],
)
def test_a_key_of_some_inputs_is_decided_by_the_policy(policy: str, extra: float | None, norm: float | None) -> None:
    found = values(merged(f'method = "linear"\nbase = "A"\non_missing = "{policy}"\n{TWO}', {"A": LESS, "B": MORE}))
    assert (found.get("extra.weight"), found.get("norm.weight")) == (extra, norm)
    assert found["head.weight"] == 5
    other = merged(f'method = "linear"\nbase = "B"\non_missing = "base"\n{TWO}', {"A": LESS, "B": MORE})
    assert (values(other)["extra.weight"], values(other)["norm.weight"]) == (1, 10)


def prefixed(state: State) -> State:
    return {f"model.{key}": tensor for key, tensor in state.items()}


LINEAR = f'method = "linear"\n{TWO}'  # the [[input]] B is line 4
COUNTS = {"n": torch.tensor(3), "w": torch.ones(2)}
WRONG: dict[str, tuple[str, State, State, int, str, str]] = {
    "keys in some inputs": (
        LINEAR, LESS, MORE, 1,
        "2 keys are only in some inputs: 'norm.weight' (not in 'A'), 'extra.weight' (not in 'A')", "on_missing",
    ),
    "a prefix of one input": (LINEAR, A, prefixed(B), 4, "26 keys are only in some inputs", 'strip = "model."'),
    "a prefix of the first": (LINEAR, prefixed(A), B, 4, "26 keys are only in some inputs", 'rename = ["*=model.*"]'),
    "a set that fits no key": (
        LINEAR + '[[set]]\nkeys = "layer.*"\nweight = 2', A, B, 6, "'layer.*' fits none of 13 merged keys", "layers.*",
    ),
    "a set that is hidden": (
        LINEAR + '[[set]]\nkeys = "*"\nweight = 2\n[[set]]\nkeys = "norm.*"\nweight = 3', A, B, 9,
        "this [[set]] decides about no key: line 6 decides about 'norm.weight'", "narrower",
    ),
    "only that fits no key": ('only = "block.*"\n' + LINEAR, A, B, 1, "only: 'block.*' fits none of 13 keys", ""),
    "copy of a key that is not there": (
        'copy = [{ keys = "extra.*", from = "A" }]\n' + LINEAR, A, MORE, 1,
        "'extra.weight' is not in 'A', which it is copied from", "",
    ),
    "shapes": (
        LINEAR, A, {**B, "head.weight": torch.ones(8, 4)}, 4,
        "'head.weight' is [6, 4] in 'A' and [8, 4] in 'B'", 'on_mismatch = "slice"',
    ),
    "an operation that does not fit": (
        LINEAR + 'on_mismatch = "transpose"', A, {**B, "head.weight": torch.ones(8, 4)}, 4,
        "and transpose does not change one into the other", "slice",
    ),
    "on_mismatch of a key that is not there": (
        LINEAR + 'on_mismatch = { "heed.*" = "slice" }', A, B, 6,
        "on_mismatch: 'heed.*' fits none of 13 keys", "",
    ),
    "integers against floats": (
        LINEAR, COUNTS, {**COUNTS, "n": torch.tensor(3.0)}, 4, "'n' is I64 [] in 'A' and F32 [] in 'B'", "damaged",
    ),
    "integers of other dtypes": (
        LINEAR, COUNTS, {**COUNTS, "n": torch.tensor(3).int()}, 1,
        "'n' is I64 [] in 'A' and I32 [] in 'B'", "non_float",
    ),
    "complex": (
        'method = "slerp"\nt = 0.5\n' + TWO, {"w": torch.ones(2, dtype=torch.complex64)},
        {"w": torch.ones(2, dtype=torch.complex64)}, 1, "slerp takes no complex numbers", "linear",
    ),
    "adapters among themselves": (
        LINEAR, {"fc.lora_A.weight": torch.ones(1, 2), "fc.lora_B.weight": torch.ones(2, 1)},
        {"fc.lora_A.weight": torch.ones(1, 2), "fc.lora_B.weight": torch.ones(2, 1)}, 2, "'A' is an adapter", "lora =",
    ),
    "weights that cancel": (
        LINEAR + "weight = -1", A, B, 6, "'embed.weight': the weights (1, -1) cancel: their sum is 0", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_the_recipe_does_not_decide_is_an_error_with_its_line(name: str) -> None:
    text, first, second, line, reason, hint = WRONG[name]
    with pytest.raises(RecipeError) as caught:
        ckptkit.plan_recipe(tomled(text), inputs={"A": first, "B": second})
    assert caught.value.reason.startswith(f"line {line}: ")
    assert reason in caught.value.reason
    assert hint in (caught.value.hint or "")
    assert caught.value.path == "recipe.toml"


def test_integers_are_copied_where_they_are_equal_and_chosen_where_not() -> None:
    other = {"n": torch.tensor(4), "w": torch.full((2,), 3.0)}
    made = merged(LINEAR, {"A": COUNTS, "B": {**COUNTS, "w": other["w"]}})
    assert (made["n"].item(), made["w"].tolist()) == (3, [2, 2])
    with pytest.raises(PlanError, match="'n' differs in 'A' and 'B', and is not merged") as caught:
        merged(LINEAR, {"A": COUNTS, "B": other})
    assert "non_float" in (caught.value.hint or "")
    for policy, want in (("base", 4), ("first", 3), ("max", 4)):
        text = f'base = "B"\nnon_float = "{policy}"\n{LINEAR}'
        assert merged(text, {"A": COUNTS, "B": other})["n"].item() == want


def test_complex_numbers_are_merged_by_linear() -> None:
    state = {"w": torch.tensor([1 + 2j, 3 - 1j])}
    made = merged(LINEAR, {"A": state, "B": {"w": 3 * state["w"]}})
    torch.testing.assert_close(made["w"], 2 * state["w"])


def test_each_input_has_its_own_names_and_shapes() -> None:
    text = (
        'method = "linear"\n[[input]]\nname = "A"\nstrip = "model."\n[[input]]\nname = "B"\n'
        'rename = "out.*=head.*"\non_mismatch = { "head.*" = "slice" }\n'
    )
    renamed = {key.replace("head", "out"): tensor for key, tensor in B.items()}
    made = merged(text, {"A": prefixed(A), "B": {**renamed, "out.weight": torch.full((8, 4), 10.0)}})
    assert values(made)["head.weight"] == values(made)["norm.weight"] == 5
    assert made["head.weight"].shape == (6, 4)


def test_the_output_has_the_dtypes_of_the_base_or_the_one_that_is_asked_for() -> None:
    half = {key: tensor.bfloat16() for key, tensor in B.items()}
    assert {tensor.dtype for tensor in merged(LINEAR, {"A": A, "B": half}).values()} == {torch.float32}
    assert {tensor.dtype for tensor in merged('base = "B"\n' + LINEAR, {"A": A, "B": half}).values()} == {
        torch.bfloat16
    }
    cast = merged('out_dtype = "float16"\nonly = "head.*"\n' + LINEAR, {"A": A, "B": half})
    assert {tensor.dtype for tensor in cast.values()} == {torch.float16}


def test_a_base_that_is_no_input_has_only_the_keys_and_dtypes(tmp_path: Path) -> None:
    for name, state in (("base", {key: tensor.bfloat16() for key, tensor in net(-1).items()}), ("a", A), ("b", B)):
        save_file(state, tmp_path / f"{name}.safetensors")
    plan = ckptkit.plan_recipe(
        {
            "method": "linear",
            "base": f"{tmp_path}/base.safetensors",
            "input": [{"path": f"{tmp_path}/a.safetensors"}, {"path": f"{tmp_path}/b.safetensors"}],
        }
    )
    made = plan.materialize(plan.paths)
    assert (values(made)["norm.weight"], made["norm.weight"].dtype) == (5, torch.bfloat16)


def test_tied_keys_are_merged_once_and_tied_again() -> None:
    tied = {**A, "head.weight": A["embed.weight"]}
    plan = ckptkit.plan_recipe(tomled(LINEAR), inputs={"A": tied, "B": B})
    step = next(step for step in plan.steps if step.out.key == "head.weight")
    assert (step.rule, step.tied_to) == ("tied to 'embed.weight'", "embed.weight")
    made = plan.materialize({"A": tied, "B": B})
    assert made["head.weight"].data_ptr() == made["embed.weight"].data_ptr()
    both = {"A": tied, "B": {**B, "head.weight": B["embed.weight"]}}
    assert ckptkit.plan_recipe(tomled(LINEAR), inputs=both).dropped == ()
    with pytest.raises(PlanError, match=r"'embed.weight' and 'head.weight' are tied in the base, and differ in 'B'"):
        plan.materialize({"A": tied, "B": {**B, "head.weight": torch.zeros(6, 4)}})


def test_output_weights_that_an_input_leaves_to_its_tie_are_its_embedding(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    names = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    whole = {names.get(key, f"model.{key}"): tensor for key, tensor in B.items()}
    short = {names.get(key, f"model.{key}"): tensor for key, tensor in A.items() if key != "head.weight"}
    for name, state in (("whole", whole), ("short", short)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": name == "short"}))
    paths = [{"path": f"{tmp_path}/{name}"} for name in ("whole", "short")]
    both = ckptkit.plan_recipe({"method": "linear", "input": paths})
    assert values(both.materialize(both.paths))["lm_head.weight"] == 5
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))  # tied, and the file has both
    tied = ckptkit.plan_recipe({"method": "linear", "input": paths})
    assert {step.out.key: step.tied_to for step in tied.steps if step.tied_to} == {
        names["embed.weight"]: "lm_head.weight"
    }
    plan = ckptkit.plan_recipe({"method": "linear", "input": paths[::-1]})
    assert "lm_head.weight" not in {step.out.key for step in plan.steps}
    assert values(plan.materialize(plan.paths))["model.embed_tokens.weight"] == 5


def test_an_adapter_is_folded_in_float32_on_the_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"fc.weight": torch.randn(8, 6).bfloat16(), "fc.bias": torch.randn(8).bfloat16()}
    down, up = torch.randn(2, 6), torch.randn(8, 2)
    (tmp_path / "adapter").mkdir()
    save_file(
        {"base_model.model.fc.lora_A.weight": down, "base_model.model.fc.lora_B.weight": up},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(base, tmp_path / "m.safetensors")
    path = f"{tmp_path}/m.safetensors"
    plan = ckptkit.plan_recipe(
        {
            "method": "linear",
            "input": [
                {"path": path},
                {"name": "tuned", "path": path, "lora": f"{tmp_path}/adapter", "lora_scale": 0.5},
            ],
        }
    )
    ckptkit.save_plan(plan, tmp_path / "plan.json", plan.paths)
    assert ckptkit.load_plan(tmp_path / "plan.json", plan.paths).steps == plan.steps
    ckptkit.execute(plan, plan.paths, tmp_path / "out.safetensors", verify=True)
    made = load_file(tmp_path / "out.safetensors")
    want = base["fc.weight"].double() + 0.5 * (0.5 * 2 * up.double() @ down.double())
    assert torch.equal(made["fc.weight"], want.bfloat16())  # rounded once
    assert torch.equal(made["fc.bias"], base["fc.bias"])


def test_quantised_inputs_are_refused_or_read_as_numbers() -> None:
    torch.manual_seed(0)
    plain = {"layers.0.q.weight": torch.randn(16, 32)}
    codes = ckptkit.plan_remap(plain, quantize="fp8-row").materialize(plain)
    inputs = {"A": plain, "B": codes}
    with pytest.raises(RecipeError, match=r"line 4: 'B' has 1 quantised weight \(") as caught:
        ckptkit.plan_recipe(tomled(LINEAR), inputs=inputs)
    assert caught.value.hint == "dequantize = true merges them as numbers"
    plan = ckptkit.plan_recipe(tomled(f"{LINEAR}dequantize = true\n"), inputs=inputs)
    numbers = ckptkit.plan_remap(codes, dequantize="float32").materialize(codes)
    want = (plain["layers.0.q.weight"].double() + numbers["layers.0.q.weight"].double()) / 2
    torch.testing.assert_close(plan.materialize(inputs)["layers.0.q.weight"], want.float(), rtol=1e-6, atol=1e-7)


def test_running_statistics_are_averaged_and_the_plan_says_what_that_means() -> None:
    states = [torch.nn.BatchNorm1d(3).state_dict() for _ in range(2)]
    plan = ckptkit.plan_recipe(tomled(LINEAR), inputs=dict(zip("AB", states, strict=True)))
    assert any("running statistics of batch norms were merged" in note for note in plan.notes)
    assert plan.versions == {"": 2}


def test_a_plan_says_once_that_slerp_goes_beyond_its_inputs() -> None:
    note = "slerp: t is 1.5, so the result lies beyond one of the inputs"
    plan = ckptkit.plan_recipe(tomled(f'method = "slerp"\nt = 1.5\n{TWO}'), inputs={"A": A, "B": B})
    assert plan.notes == (note,)


def test_inputs_are_named_as_in_the_recipe() -> None:
    with pytest.raises(RecipeError, match="the recipe has no input 'C'"):
        ckptkit.plan_recipe(tomled(LINEAR), inputs={"C": A})
    with pytest.raises(RecipeError, match="line 2: 'A' has no path"):
        ckptkit.plan_recipe(tomled(LINEAR), inputs={"B": A})


@pytest.mark.parametrize(
    ("changed", "reason", "hint"),
    [
        (("b.pt", "bb.pt"), "line 6: input 'bb': no such file or directory: bb.pt", "b.pt"),
        (('"b.pt"', '"b.pt"\nlora = "ad/"'), "line 7: lora of input 'b': no such file or directory: ad/", None),
        (("linear", 'linear"\nbase = "c/d.pt'), "line 2: input 'd': no such file or directory: c/d.pt", None),
    ],
)
def test_a_path_that_does_not_exist_is_told_with_its_line(
    changed: tuple[str, str], reason: str, hint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(2)}, name)
    text = 'method = "linear"\n\n[[input]]\npath = "a.pt"\n[[input]]\npath = "b.pt"\n'.replace(*changed)
    Path("recipe.toml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        ckptkit.plan_recipe("recipe.toml")
    assert (caught.value.path, caught.value.reason) == ("recipe.toml", reason)
    assert hint is None or hint in (caught.value.hint or "")
