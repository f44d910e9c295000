"""Merges as steps of plans: what executing, saving and reading such plans gives."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.plans.methods.operation import Merge
from ckptkit.plans.methods.table import method_named
from ckptkit.plans.plan import Plan, Source, Step
from ckptkit.plans.steps import complete_step
from ckptkit.tensor_ops.recipes import Recipe

NAMES = ("a", "b", "c")


def merging_plan(sources: dict[str, ckptkit.Checkpoint], given: dict[str, object]) -> Plan:
    """Return a plan that merges all tensors of the inputs with ``linear``."""
    steps = []
    for key, info in next(iter(sources.values())).items():
        merge = Merge(method_named("linear").of(len(sources), given, has_base=False), key, (1, 2, 3))
        out = TensorInfo(key, info.dtype, info.shape)
        inputs = tuple(Source(role, key) for role in sources)
        steps.append(complete_step(Step(out, inputs, recipe=Recipe((0, 1, 2), (merge,))), sources))
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
