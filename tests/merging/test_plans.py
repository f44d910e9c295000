"""Merges as steps of plans: what executing, saving and reading such plans gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.plans.methods.operation import Merge
from ckptkit.plans.methods.table import method_named
from ckptkit.plans.plan import Plan, Source, Step
from ckptkit.plans.saved import plan_from_json, plan_to_json
from ckptkit.plans.steps import complete_step
from ckptkit.tensor_ops.recipes import Recipe

NAMES = ("a", "b", "c")


def merging_plan(
    sources: Mapping[str, ckptkit.Checkpoint],
    given: Mapping[str, object],
    method: str = "linear",
    keys: Iterable[str] = (),
) -> Plan:
    """Return a plan that merges the tensors with these keys, or all."""
    steps, count = [], len(sources)
    first = next(iter(sources.values()))
    for key in keys or first:
        merge = Merge(method_named(method).of(count, given, has_base=False), key, tuple(range(1, count + 1)))
        out = TensorInfo(key, first[key].dtype, first[key].shape)
        inputs = tuple(Source(role, key) for role in sources)
        steps.append(complete_step(Step(out, inputs, recipe=Recipe(tuple(range(count)), (merge,))), sources))
    return Plan(tuple(steps), (), {}, (), {}, "")


def test_a_plan_of_merges_is_saved_read_and_executed(tmp_path: Path) -> None:
    states = {name: {"w": torch.randn(300, 50), "h": torch.randn(5).bfloat16()} for name in NAMES}
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    sources = {name: ckptkit.open_checkpoint(tmp_path / f"{name}.safetensors") for name in NAMES}
    plan = merging_plan(sources, {"weight": [1.0, 2.0, 0.5]})
    ckptkit.save_plan(plan, tmp_path / "plan.json", sources)
    assert ckptkit.load_plan(tmp_path / "plan.json", sources).steps == plan.steps
    written = ckptkit.execute(plan, sources, tmp_path / "out.safetensors", verify=True)
    assert written.verified
    assert not any(written.losses)
    made = load_file(tmp_path / "out.safetensors")
    for key in ("w", "h"):
        want = torch.stack([f * states[n][key].double() for n, f in zip(NAMES, (1, 2, 0.5), strict=True)]).sum(0) / 3.5
        torch.testing.assert_close(made[key], want.to(made[key].dtype), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(tensor, made[key]) for key, tensor in plan.tensors(sources))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "slrep"}, "not a plan that can be executed: merge: there is no method 'slrep'"),
        ({"parameters": {"weight": [1, 2, -3]}}, "merge: the weights .* cancel: their sum is 0"),
        ({"parameters": {"wieght": 1}}, "merge: linear has no parameter 'wieght'"),
        ({"numbers": [1, 2]}, "merge: weight has 3 values for 2 inputs"),
        ({"numbers": "all"}, "merge: numbers is not a list of whole numbers"),
        ({"on_nonfinite": "ignore"}, "merge: on_nonfinite is 'ignore'"),
        ({"key": None}, "merge: needs a key and a table of parameters"),
        ({"has_base": True}, "merge: linear takes no base"),
    ],
)
def test_a_plan_file_with_a_wrong_merge_is_refused(change: dict[str, object], reason: str) -> None:
    sources = {name: as_checkpoint({"w": torch.ones(2)}, name) for name in NAMES}
    document = plan_to_json(merging_plan(sources, {"weight": [1.0, 2.0, 0.5]}), sources)
    document["plan"][0]["recipe"]["operations"][0]["merge"].update(change)
    with pytest.raises(ckptkit.PlanError, match=reason):
        plan_from_json(document)


@pytest.mark.parametrize(("method", "given"), [("linear", {"weight": [1.0, 2.0, 0.5]}), ("karcher", {})])
def test_formats_shards_and_the_order_of_keys_do_not_change_a_byte(
    method: str, given: dict[str, object], tmp_path: Path
) -> None:
    states = {name: {f"w{number}": torch.randn(20, 30) for number in range(4)} for name in NAMES}
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        torch.save(dict(reversed(state.items())), tmp_path / f"{name}.pt")
    results = []
    for suffix, size, order in ((".safetensors", None, 1), (".pt", 3000, -1), ("", 5000, 1)):
        sources = {
            name: as_checkpoint(state, name) if not suffix else ckptkit.open_checkpoint(tmp_path / f"{name}{suffix}")
            for name, state in states.items()
        }
        plan = merging_plan(sources, given, method, list(states["a"])[::order])
        path = tmp_path / (f"out{size}" if size else "out.safetensors")
        ckptkit.execute(plan, sources, ckptkit.Output(str(path), "safetensors", max_shard_size=size))
        made = ckptkit.open_checkpoint(path)
        results.append({key: bytes(made.read_bytes(key)) for key in states["a"]})
    assert results[0] == results[1] == results[2]


def test_an_input_that_changes_leaves_nothing(tmp_path: Path) -> None:
    for name in NAMES:
        save_file({key: torch.randn(20, 30) for key in ("v", "w")}, tmp_path / f"{name}.safetensors")
    sources = {name: ckptkit.open_checkpoint(tmp_path / f"{name}.safetensors") for name in NAMES}
    plan = merging_plan(sources, {}, "karcher")

    def change(_: int) -> None:
        save_file({"v": torch.zeros(1)}, tmp_path / "b.safetensors")

    with pytest.raises(ckptkit.ChangedError):
        ckptkit.execute(plan, sources, tmp_path / "out.safetensors", progress=change)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.safetensors" for name in NAMES]


def test_a_number_that_is_not_finite_leaves_nothing_and_names_its_input(tmp_path: Path) -> None:
    states = {name: {"v": torch.randn(3), "w": torch.randn(3)} for name in NAMES}
    states["b"]["w"][1] = torch.nan
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    sources = {name: ckptkit.open_checkpoint(tmp_path / f"{name}.safetensors") for name in NAMES}
    with pytest.raises(ckptkit.PlanError, match=r"'w' cannot be merged: its element \[1\] in 'b' is NaN") as caught:
        ckptkit.execute(merging_plan(sources, {}), sources, tmp_path / "out.safetensors")
    assert caught.value.path == str(tmp_path / "b.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_a_method_finds_is_reported_and_loss_of_a_cast_is_refused(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 3), "v": torch.full((3,), 1e5)}
    sources = {
        "a": as_checkpoint(state, "a"),
        "b": as_checkpoint({"w": -state["w"], "v": state["v"]}, "b"),
    }
    plan = merging_plan(sources, {"t": 0.25}, "slerp")
    written = ckptkit.execute(plan, sources, tmp_path / "out.safetensors")
    assert [(facts.key, facts.warning) for facts in written.merged] == [
        ("w", "the inputs are opposite: interpolated linearly")
    ]
    assert "the inputs are opposite: interpolated linearly in 1 tensor: w" in str(written)
    half = replace(plan.steps[1], out=TensorInfo("v", "F16", (3,)), operation="")
    plan = Plan((plan.steps[0], complete_step(half, sources)), (), {}, (), {}, "")
    assert plan.steps[1].operation == "merge, cast"
    with pytest.raises(ckptkit.PlanError, match=r"3 values do not fit the new dtype: 'v' \(F32 to F16\)"):
        ckptkit.execute(plan, sources, tmp_path / "half.safetensors")
