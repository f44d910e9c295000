"""Plans are decided, and refused, before any tensor is read."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import Plan, TensorInfo, execute, open_checkpoint, plan_merge, plan_remap
from ckptkit.core.checkpoint import View
from ckptkit.errors import CkptkitError, PlanError, RuleError
from ckptkit.plans.plan import Source, Step, find_broken_ties
from ckptkit.plans.policies import MissingAction
from ckptkit.rules.parse import parse_rules
from tests.helpers_outputs import described

BASE = described(fc1__weight=(5, 4), fc1__bias=(5,), fc3__weight=(2, 5), fc3__bias=(2,))


def refusal(make: Callable[[], Plan], error: type[CkptkitError] = PlanError) -> CkptkitError:
    """Return the error of a plan, after a check that it has a hint."""
    with pytest.raises(error) as caught:
        make()
    assert "\n" not in str(caught.value)
    return caught.value


def outline(plan: Plan) -> list[tuple[str, str, str]]:
    """Return the key, the source and the operation of each step."""
    return [(step.out.key, f"{step.sources[0].role}:{step.sources[0].key}", step.operation) for step in plan.steps]


def left_out(plan: Plan) -> list[tuple[str, str]]:
    return [(drop.role, drop.key) for drop in plan.dropped]


def test_a_remap_is_a_list_of_steps_in_the_order_of_the_file() -> None:
    """Every step names its source, operation and rule; equal inputs give equal plans."""
    rules = ["fc3.*=head.*"]
    plan = plan_remap(BASE, rules)
    assert plan.steps[2] == Step(
        TensorInfo("head.weight", "F32", (2, 5)),
        (Source("source", "fc3.weight"),),
        "copy",
        "--rename 'fc3.*=head.*'",
    )
    assert [step.out.key for step in plan.steps] == ["fc1.weight", "fc1.bias", "head.weight", "head.bias"]
    assert plan == plan_remap(dict(BASE), rules)
    assert (plan.elements, plan.nbytes, plan.dropped) == (37, 148, ())


def test_dropped_tensors_are_listed_with_the_reason() -> None:
    """Tensors that a rule drops or no pattern keeps, and other entries, are all listed."""
    source: dict[str, Any] = {**{key: torch.zeros(info.shape) for key, info in BASE.items()}, "epoch": 3}
    plan = plan_remap(source, parse_rules(keep=["fc*"], drop=["*.bias"]))
    assert [step.out.key for step in plan.steps] == ["fc1.weight", "fc3.weight"]
    assert [(drop.role, drop.key, drop.reason) for drop in plan.dropped] == [
        ("source", "fc1.bias", "--drop '*.bias'"),
        ("source", "fc3.bias", "--drop '*.bias'"),
        ("source", "epoch", "in the state_dict, and not a tensor (int)"),
    ]


def test_dtype_casts_only_floats() -> None:
    """Integers, booleans and complex numbers keep their dtype; floats of that dtype are copied."""
    codes = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "C64")
    plan = plan_remap({code: TensorInfo(code, code, (3,)) for code in codes}, dtype="bfloat16")
    assert {step.out.key: (step.out.dtype, step.operation) for step in plan.steps} == {
        **dict.fromkeys(("F64", "F32", "F16", "F8_E4M3"), ("BF16", "cast")),
        **{code: (code, "copy") for code in ("BF16", "I64", "U8", "BOOL", "C64")},
    }


@pytest.mark.parametrize("name", ["BF16", "bf16", "bfloat16", "torch.bfloat16"])
def test_a_dtype_has_two_names(name: str) -> None:
    """A dtype has its safetensors code, in either case, and torch's name."""
    assert plan_remap(BASE, dtype=name).steps[0].out.dtype == "BF16"


@pytest.mark.parametrize("name", ["I64", "int64", "F4", "float4_e2m1fn_x2", "BOOL", "float", "half", "", "BF16 "])
def test_dtypes_that_floats_cannot_be_cast_to_are_refused(name: str) -> None:
    """An unknown dtype and a dtype that floats cannot be cast to are refused."""
    assert refusal(lambda: plan_remap(BASE, dtype=name)).reason


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("half", "did you mean F16?"),
        ("fp16", "did you mean F16?"),
        ("torch.double", "did you mean F64?"),
        ("int8", "the dtypes are F8_E4M3, "),
        ("fp7", "the dtypes are F8_E4M3, "),
    ],
)
def test_a_refused_dtype_names_those_that_can_be_given(name: str, hint: str) -> None:
    """The hint has the dtype that another of its names means, or else all dtypes."""
    assert (refusal(lambda: plan_remap(BASE, dtype=name)).hint or "").startswith(hint)


@pytest.mark.parametrize(
    ("rules", "error", "reason"),
    [
        (parse_rules(drop=["*"]), PlanError, "the output would have none of 4 tensors"),
        (parse_rules(rename=["{a}.weight=w"]), RuleError, "'fc1.weight' and 'fc3.weight' would both be called 'w'"),
        (parse_rules(rename=["fc9.*=x.*"]), RuleError, "--rename 'fc9.*=x.*' matches none of 4 keys"),
    ],
    ids=["nothing left", "collision", "unused"],
)
def test_wrong_remaps_are_refused(rules: Any, error: type[CkptkitError], reason: str) -> None:
    """The message names the keys and the rule."""
    assert refusal(lambda: plan_remap(BASE, rules), error).reason == reason


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.ones(2, 2).to_sparse(), "sparse tensor"),
        (torch.ones(2, 2).as_subclass(type("Mine", (torch.Tensor,), {})), "tensor subclass"),
        (TensorInfo("odd", "F32", (2,), kind="meta"), "saved from the meta device"),
        (TensorInfo("odd", "QI8", (2,), kind="quantized"), "it is quantised (torch QI8)"),
    ],
    ids=["sparse", "subclass", "meta", "quantised"],
)
def test_tensors_that_cannot_be_copied_are_refused_by_name(value: Any, why: str) -> None:
    """The hint leaves out exactly that tensor, and it works."""
    plain = TensorInfo("w", "F32", (1,)) if isinstance(value, TensorInfo) else torch.zeros(1)
    error = refusal(lambda: plan_remap({"w": plain, "odd": value}))
    assert error.reason.startswith("'odd' cannot be copied: ")
    assert why in error.reason
    assert str(error.hint).endswith("or leave out this one: ckpt remap PATH -o OUT --drop 'odd'")
    assert [step.out.key for step in plan_remap({"w": plain, "odd": value}, parse_rules(drop=["odd"])).steps] == ["w"]


def test_f4_has_no_cast() -> None:
    """F4, which packs two elements into a byte, can be copied and not cast."""
    packed = {"w": TensorInfo("w", "F4", (4,))}
    assert plan_remap(packed).steps[0].operation == "copy"
    assert "cannot be cast to F32" in refusal(lambda: plan_remap(packed, dtype="F32")).reason


def test_find_broken_ties() -> None:
    """Overlapping views of one storage are grouped, with and without a cast; other tensors are not."""
    tied = {
        key: TensorInfo(key, "F32", (2,), View(storage, offset, (1,)))
        for key, storage, offset in (("a", 0, 0), ("b", 0, 1), ("c", 0, 2), ("d", 0, 8), ("e", 1, 0))
    }
    assert find_broken_ties(plan_remap(tied)) == [("a", "b", "c")]
    assert find_broken_ties(plan_remap(tied, dtype="F16")) == [("a", "b", "c")]


def test_an_overlay_takes_matching_values_and_keeps_the_others() -> None:
    """The output has the keys of the base, with the donor's values where key and shape agree."""
    donor = {**{key: BASE[key] for key in ("fc1.bias", "fc1.weight")}, **described(fc9=(7,))}
    plan = plan_merge(BASE, donor)
    assert outline(plan) == [
        ("fc1.weight", "donor:fc1.weight", "copy"),
        ("fc1.bias", "donor:fc1.bias", "copy"),
        ("fc3.weight", "base:fc3.weight", "copy"),
        ("fc3.bias", "base:fc3.bias", "copy"),
    ]
    assert left_out(plan) == [("donor", "fc9")]


def test_rules_rename_the_donor_only() -> None:
    """The source of a step has the key of the donor's file."""
    donor = {f"module.{key}": TensorInfo(f"module.{key}", "F32", info.shape) for key, info in BASE.items()}
    plan = plan_merge(BASE, donor, ["module.*=*"])
    assert outline(plan)[0] == ("fc1.weight", "donor:module.fc1.weight", "copy")
    assert plan.steps[0].rule == "--rename 'module.*=*'"


def test_values_are_cast_to_the_dtype_of_the_base() -> None:
    """Values are cast as load_state_dict casts them, but a lost imaginary part is refused."""
    base = {"w": TensorInfo("w", "BF16", (2,))}
    step = plan_merge(base, described(w=(2,))).steps[0]
    assert (step.out.dtype, step.operation) == ("BF16", "cast")
    error = refusal(lambda: plan_merge(base, {"w": TensorInfo("w", "C64", (2,))}))
    assert error.reason == "'w' is C64, and a cast to BF16 would lose its imaginary part"
    assert error.hint == "leave it out: ckpt remap PATH -o OUT --drop 'w'"


@pytest.mark.parametrize(
    ("policies", "keys", "dropped"),
    [
        ({}, ["a", "b"], ["x"]),
        ({"on_unexpected": "skip"}, ["a", "b"], ["x"]),
        ({"on_unexpected": "add"}, ["a", "b", "x"], []),
    ],
    ids=["default", "skip", "add"],
)
def test_unexpected_keys_are_skipped_or_added(policies: dict[str, Any], keys: list[str], dropped: list[str]) -> None:
    """Added keys come last; skipped keys are listed."""
    plan = plan_merge(described(a=(1,), b=(2,)), described(x=(3,), a=(1,)), **policies)
    assert [step.out.key for step in plan.steps] == keys
    assert [drop.key for drop in plan.dropped] == dropped


def test_a_mismatch_may_be_skipped() -> None:
    """The base keeps its value, and the dropped tensor names the key of the base, with and without renames."""
    donor = described(m__fc1__weight=(5, 4), m__fc1__bias=(5,), m__fc3__weight=(9, 5), m__fc3__bias=(9,))
    plan = plan_merge(BASE, donor, ["m.*=*"], on_mismatch="skip")
    assert [source for _, source, _ in outline(plan)[2:]] == ["base:fc3.weight", "base:fc3.bias"]
    assert [(drop.key, drop.reason, drop.wanted) for drop in plan.dropped] == [
        ("m.fc3.weight", "its shape is [9, 5], not [2, 5]", "fc3.weight"),
        ("m.fc3.bias", "its shape is [9], not [2]", "fc3.bias"),
    ]


@pytest.mark.parametrize(
    ("donor", "policies", "reason", "hint"),
    [
        (
            described(fc1__weight=(5, 4), fc3__weight=(9, 5), fc3__bias=(9,)),
            {},
            "'fc3.weight' is [2, 5] in the base and [9, 5] in the donor, and 1 more differ in shape",
            "--on-mismatch 'fc3.*=skip'",
        ),
        (
            described(fc1__weight=(5, 4)),
            {"on_missing": "error"},
            "no donor has 'fc1.bias' and 2 more",
            "--on-missing 'fc1.bias=keep'",
        ),
        (
            described(fc1__weight=(5, 4), x=(1,), y=(1,)),
            {"on_unexpected": "error"},
            "the base has no 'x' and 1 more",
            "--on-unexpected 'x=skip' leaves it out, --on-unexpected 'x=add' adds it",
        ),
        (
            {f"module.{key}": TensorInfo(f"module.{key}", "F32", info.shape) for key, info in BASE.items()},
            {},
            "the donor has no tensor with a key and shape of the base, so there is nothing to merge",
            "all 4 keys match after --rename 'module.*=*'",
        ),
        (
            described(x=(1,)),
            {},
            "the donor has no tensor with a key and shape of the base",
            "ckpt align BASE DONOR -o rules.toml",
        ),
        (
            described(fc1__bias=(6,)),
            {"on_mismatch": "skip"},
            "the donor has no tensor with a key and shape of the base",
            "ckpt diff BASE DONOR",
        ),
    ],
    ids=["mismatch", "missing", "unexpected", "prefix", "no match", "only mismatches"],
)
def test_wrong_merges_are_refused(
    donor: dict[str, TensorInfo], policies: dict[str, Any], reason: str, hint: str
) -> None:
    """The message names the key, and the hint says what to do."""
    error = refusal(lambda: plan_merge(BASE, donor, **policies))
    assert error.reason.startswith(reason)
    assert error.hint is not None
    assert hint in error.hint


def test_of_several_donors_the_last_one_wins() -> None:
    """The replaced tensors of earlier donors are listed; a key is missing only where no donor has it."""
    first, second = described(a=(1,), b=(2,), x=(4,)), described(b=(2,), x=(4,))
    plan = plan_merge(
        described(a=(1,), b=(2,)), [first, second], on_unexpected="add", on_missing="error", on_mismatch="error"
    )
    assert outline(plan) == [("a", "donor1:a", "copy"), ("b", "donor2:b", "copy"), ("x", "donor2:x", "copy")]
    assert left_out(plan) == [("donor1", "b"), ("donor1", "x")]
    assert {drop.reason for drop in plan.dropped} == {"donor2 is a later donor and has the key too"}


def test_a_merge_needs_a_donor_and_each_must_match() -> None:
    """An empty list of donors and a donor without a match are refused."""
    assert "no donor" in refusal(lambda: plan_merge(BASE, [])).reason
    assert "the donor2 has no tensor with a key" in refusal(lambda: plan_merge(BASE, [BASE, described(x=(1,))])).reason


def test_models_and_state_dicts_are_merged_alike() -> None:
    """A module on the meta device gives the same plan as a description."""
    live, state = nn.Linear(2, 3), nn.Linear(2, 3).state_dict()
    with torch.device("meta"):
        shapes = nn.Linear(2, 3)
    assert outline(plan_merge(live, state)) == outline(plan_merge(shapes, state))


class Canary:
    """An object that would call os.system when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (self.command,)


def test_a_file_that_refers_to_suspicious_code_is_refused(tmp_path: Path) -> None:
    """Such a file is refused as source, base and donor, and its code never runs."""
    canary, bad = tmp_path / "canary", tmp_path / "bad.pt"
    torch.save({"w": torch.zeros(2)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(bad, "w") as made:
        for name in good.namelist():
            data = good.read(name)
            if name.endswith("data.pkl"):
                call = pickle.dumps(Canary(f"touch {canary}"), protocol=2)
                data = data[:2] + call[2:-1] + b"0" + data[2:]
            made.writestr(name, data)
    assert b"system" in bad.read_bytes()
    with open_checkpoint(bad) as hostile, open_checkpoint(tmp_path / "good.pt") as honest:
        assert list(hostile) == ["w"]
        makers: list[Callable[[], Plan]] = [
            lambda: plan_remap(hostile),
            lambda: plan_merge(honest, hostile),
            lambda: plan_merge(hostile, honest),
            lambda: plan_merge(honest, [honest, hostile]),
        ]
        for make in makers:
            error = refusal(make)
            assert "system" in error.reason
            assert error.path == str(bad)
    assert not canary.exists()
    torch.load(bad, weights_only=False)
    assert canary.exists()  # the file would have done it


class Tied(torch.nn.Module):
    """A model with an embedding and a head that are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("present", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("on_missing", ["keep", "error"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_follows_the_ties_of_the_base(
    present: str, on_missing: MissingAction, suffix: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A donor with one of two tied keys fills both keys of the output."""
    model, donor = Tied(), {present: torch.arange(15.0).reshape(5, 3).to(dtype)}
    plan = plan_merge(model, donor, on_missing=on_missing)
    execute(plan, {"base": model, "donor": donor}, tmp_path / f"out.{suffix}")
    fresh = Tied()
    with open_checkpoint(tmp_path / f"out.{suffix}") as merged:
        fresh.load_state_dict({key: merged.read(key) for key in merged})
        shared = merged["embed.weight"].view
        assert (shared is not None and shared == merged["head.weight"].view) is (suffix == "pt")
    assert torch.equal(fresh.embed.weight, donor[present].float())


def test_a_tie_of_the_base_that_the_donor_does_not_have_is_noted() -> None:
    """Both tensors of the donor are written, and a note names the keys."""
    donor = {"embed.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}
    assert plan_merge(Tied(), donor).notes == (
        "'embed.weight' and 'head.weight' are tied in the base, but get the values of two tensors",
    )


def test_a_cast_keeps_ties(tmp_path: Path) -> None:
    """Tied tensors are still tied after a cast."""
    weight = torch.randn(4)
    plan = plan_remap({"a": weight, "b": weight, "c": weight[:2]}, dtype="BF16")
    execute(plan, {"a": weight, "b": weight, "c": weight[:2]}, tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert out["a"].data_ptr() == out["b"].data_ptr() != out["c"].data_ptr()
    assert torch.equal(out["a"], weight.bfloat16())
    assert torch.equal(out["c"], weight[:2].bfloat16())


def test_torch_files_carry_module_versions(tmp_path: Path) -> None:
    """``_metadata`` is written with the new names of the modules, and torch's loader sees it."""
    norm: Any = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2)).state_dict()
    execute(plan_remap(norm, ["0.*=norm.*"]), norm, tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt", weights_only=True)._metadata == {"norm": {"version": 2}, "1": {"version": 1}}
    execute(plan_remap(norm), norm, tmp_path / "same.pt")
    same = torch.load(tmp_path / "same.pt", weights_only=True)._metadata
    assert {key: dict(value) for key, value in same.items()} == {
        key: {"version": value["version"]} for key, value in norm._metadata.items() if "version" in value
    }


@pytest.mark.parametrize("same", [True, False])
def test_a_collision_of_equals(same: bool, tmp_path: Path) -> None:
    """``on_collision = "equal"`` accepts two tensors with the same bytes, and refuses others."""
    source = {"a.w": torch.arange(4.0), "b.w": torch.arange(4.0) + (not same)}
    rules = parse_rules(file={"rule": [{"from": "{x}.w", "to": "w", "on_collision": "equal"}]})
    plan = plan_remap(source, rules)
    assert [(step.sources, step.equals) for step in plan.steps] == [
        ((Source("source", "a.w"),), (Source("source", "b.w"),))
    ]
    if same:
        execute(plan, source, tmp_path / "out.safetensors")
        with open_checkpoint(tmp_path / "out.safetensors") as out:
            assert torch.equal(out.read("w"), source["a.w"])
    else:
        with pytest.raises(PlanError, match=r"'a\.w' and 'b\.w' would both be called 'w', and their bytes differ"):
            execute(plan, source, tmp_path / "out.safetensors")
        assert list(tmp_path.iterdir()) == []
