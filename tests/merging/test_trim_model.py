"""TIES with one limit of magnitudes for all tensors of an input, as its paper defines it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

import ckptkit
import ckptkit.values.workers
from ckptkit.plans.plan import Plan

Array = npt.NDArray[Any]
State = dict[str, Array]
SHAPES = {"big": (20, 800), "small": (40, 30), "bias": (7,), "number": (), "empty": (0, 3)}
DENSITY = {"a": 0.3, "b": 0.05}


def states(seed: int = 0, dtype: str = "f4", rows: int = 20) -> dict[str, State]:
    """Return a base and two inputs, in which many magnitudes are equal and keys differ in how much they changed."""
    random = np.random.default_rng(seed)
    factors = dict(zip(SHAPES, (1.0, 8.0, 0.25, 16.0, 1.0), strict=True))
    shapes = {**SHAPES, "big": (rows, 800)}
    base: State = {key: np.array(random.standard_normal(shape), dtype) for key, shape in shapes.items()}
    found = {"base": base}
    for name in DENSITY:
        steps = {key: random.integers(-40, 41, shape) / 64 * factors[key] for key, shape in shapes.items()}
        found[name] = {key: np.array(base[key] + steps[key], dtype) for key in SHAPES}
    return found


def recipe(**rest: Any) -> dict[str, Any]:
    inputs = [{"name": "base"}, *({"name": name, "weight": 0.5, "density": DENSITY[name]} for name in DENSITY)]
    return {"method": "ties", "trim": "model", "base": "base", "input": inputs, **rest}


def defined(found: Mapping[str, State], keys: list[str]) -> State:
    """Return the merge as the paper defines it, over one vector of all keys."""
    flat = {name: np.concatenate([state[key].ravel() for key in keys]) for name, state in found.items()}
    votes = []
    for name, density in DENSITY.items():
        vector = flat[name] - flat["base"]
        limit = np.sort(abs(vector))[::-1][max(1, int(density * len(vector))) - 1]
        votes.append(np.where(abs(vector) >= limit, vector, 0) * vector.dtype.type(0.5))
    sign = np.where(sum(votes) >= 0, 1, -1)
    kept = [np.where(np.sign(vote) == sign, vote, 0) for vote in votes]
    merged = flat["base"] + sum(kept) / np.maximum(sum((vote != 0) * 0.5 for vote in kept), 0.5).astype(kept[0].dtype)
    ends = np.cumsum([found["base"][key].size for key in keys])[:-1]
    parts = np.split(merged, ends)
    return {key: part.reshape(found["base"][key].shape) for key, part in zip(keys, parts, strict=True)}


def made(plan: Plan, found: Mapping[str, State]) -> State:
    return {key: tensor.numpy() for key, tensor in plan.tensors(tensors(found))}


def merged_by(table: dict[str, Any] | Path, found: Mapping[str, State]) -> State:
    return made(ckptkit.plan_recipe(table, inputs=tensors(found)), found)


def tensors(found: Mapping[str, State]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {key: torch.from_numpy(np.array(array)) for key, array in found[name].items()} for name in found}


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_limit_is_that_of_all_keys(dtype: str) -> None:
    found = states(dtype=dtype, rows=700 if dtype == "f4" else 20)  # which are several pieces
    merged = merged_by(recipe(), found)
    for key, want in defined(found, list(SHAPES)).items():
        np.testing.assert_allclose(merged[key], want, rtol=1e-6, atol=1e-6)
        assert merged[key].dtype == want.dtype
    kept = {key: np.count_nonzero(merged[key] != found["base"][key]) for key in SHAPES}
    assert kept["small"] > 0.5 * merged["small"].size  # it changed most; each tensor by itself would keep a third
    assert kept["bias"] == 0


def test_a_model_of_mixed_dtypes_is_measured_in_float64() -> None:
    """The limit may be a number that float32 does not have."""
    found = states()
    for state in found.values():
        state["small"] = state["small"].astype("f8") * (1 + 1e-9)
    merged = merged_by(recipe(), found)
    vectors = {name: {key: abs(found[name][key] - found["base"][key]) for key in SHAPES} for name in DENSITY}
    for key in ("big", "small"):
        expected = np.zeros(SHAPES[key], bool)
        for name, density in DENSITY.items():
            sizes = np.concatenate([size.ravel().astype("f8") for size in vectors[name].values()])
            limit = np.sort(sizes)[::-1][max(1, int(density * len(sizes))) - 1]
            expected |= (vectors[name][key] >= limit) & (vectors[name][key] > 0)
        assert (expected == (merged[key] != found["base"][key])).all()


def test_one_tensor_is_trimmed_as_with_trim_tensor() -> None:
    """Without equal magnitudes both keep the same elements."""
    random = np.random.default_rng(1)
    found = {name: {"w": random.standard_normal((300, 40)).astype("f4")} for name in ("base", *DENSITY)}
    by_model, by_tensor = (merged_by(recipe(trim=trim), found) for trim in ("model", "tensor"))
    assert by_model["w"].tobytes() == by_tensor["w"].tobytes()


def test_shards_threads_order_and_saved_plans_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = states(2)
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in found}
    for name, state in found.items():
        save_file(state, paths[name])
    plan = ckptkit.plan_recipe(recipe(), inputs=paths)
    ckptkit.save_plan(plan, tmp_path / "plan.json", paths)
    saved = ckptkit.load_plan(tmp_path / "plan.json", paths)
    whole = ckptkit.execute(saved, paths, tmp_path / "whole.safetensors", verify=True)
    assert whole.verified
    want = load_file(tmp_path / "whole.safetensors")
    shards = ckptkit.Output(str(tmp_path / "shards"), "safetensors", max_shard_size=5000)
    assert ckptkit.execute(plan, paths, shards, verify=True).verified
    monkeypatch.setattr(ckptkit.values.workers, "_MAX_THREADS", 1)
    turned = {name: dict(reversed(state.items())) for name, state in found.items()}
    with ckptkit.open_checkpoint(tmp_path / "shards") as written:
        for got in (
            {key: written.read(key).numpy() for key in written},
            {key: tensor.numpy() for key, tensor in plan.tensors(paths)},
            merged_by(recipe(), turned),
        ):
            assert {key: got[key].tobytes() for key in want} == {key: want[key].tobytes() for key in want}


def test_keys_that_an_input_does_not_merge_do_not_count() -> None:
    """A weight of 0, another method and a key that is taken leave the limit as it is without the key."""
    found = states(3)
    keys = ["big", "bias", "number", "empty"]
    want = defined(found, keys)
    for setting in ({"take": "base"}, {"weight": 0.0}, {"method": "linear"}, {"trim": "tensor"}):
        table = recipe(set=[{"keys": "small", **setting}])
        merged = merged_by(table, found)
        np.testing.assert_allclose(merged["big"], want["big"], rtol=1e-6, atol=1e-6)


def test_a_density_of_some_keys_is_refused(tmp_path: Path) -> None:
    found = states(4)
    text = """version = 1
method = "ties"
trim = "model"
base = "base"
weight = 1.0
density = 0.5
[[input]]
name = "base"
[[input]]
name = "a"
[[set]]
keys = "b*"
density = 0.25
"""
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ckptkit.RecipeError, match=r"line 13: density is 0\.25 at 'big' and 0\.5 at 'small'.*one for"):
        ckptkit.plan_recipe(tmp_path / "recipe.toml", inputs={name: tensors(found)[name] for name in ("base", "a")})


def test_some_steps_of_a_plan_have_no_limit_of_their_own() -> None:
    found = states(5)
    plan = ckptkit.plan_recipe(recipe(), inputs=tensors(found))
    total = sum(array.size for array in found["base"].values())
    with pytest.raises(ckptkit.PlanError, match=rf"7 elements of its input 1 .* was made for {total:,}: trim"):
        made(replace(plan, steps=(plan.steps[2],)), found)


def test_a_nan_names_its_key_and_input() -> None:
    found = states(6)
    found["b"]["bias"][3] = np.nan
    with pytest.raises(ckptkit.PlanError, match=r"'bias' cannot be merged: its element \[3\] in 'b' is NaN"):
        merged_by(recipe(), found)


@pytest.mark.parametrize(("method", "name"), [("ties", "counted"), ("dare_ties", "drawn")])
def test_what_only_a_plan_sets_is_no_parameter_of_a_recipe(method: str, name: str) -> None:
    table = {"method": method, "base": "base", "density": 0.5, "input": recipe()["input"], name: 1}
    with pytest.raises(ckptkit.RecipeError, match=name):
        ckptkit.plan_recipe(table, inputs=tensors(states()))
