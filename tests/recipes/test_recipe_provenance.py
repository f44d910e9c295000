"""An output says how it was merged, with no path but the last name; the recipe is read back from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ckptkit
from ckptkit.errors import OutputError, RecipeError
from ckptkit.plans.recipes.model import MergeRecipe
from ckptkit.plans.recipes.parse import parse_recipe
from ckptkit.plans.recipes.provenance import read_provenance, recorded_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> MergeRecipe:
    save_file({"w": torch.zeros(300, 3)}, tmp_path / "a.safetensors", {"sd_merge_recipe": '{"type": "x"}'})
    torch.save({"w": torch.ones(300, 3)}, tmp_path / "b.pt")
    inputs = [{"path": f"{tmp_path}/a.safetensors"}, {"path": f"{tmp_path}/b.pt", "weight": 0.5}]
    return parse_recipe({"method": "linear", "seed": 7, "input": inputs})


def metadata_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    assert found["format"] == "pt"
    assert found.keys() == {"format", "ckptkit.merge"}
    document: dict[str, Any] = json.loads(found["ckptkit.merge"])
    return document


def test_every_shard_says_how_the_output_was_made(recipe: MergeRecipe, tmp_path: Path) -> None:
    plan = ckptkit.plan_recipe(recipe)
    ckptkit.execute(plan, plan.paths, ckptkit.choose_output(tmp_path / "out", max_shard_size="1kB"), verify=True)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert shards
    for shard in shards:
        document = metadata_of(shard)
        assert document["recipe"]["input"] == [
            {"name": "a", "path": "a.safetensors"},
            {"name": "b", "path": "b.pt", "weight": 0.5},
        ]
        assert (document["seed"], document["defaults"]) == (7, {"weight": 1.0, "normalize": True})
        assert document["inputs"]["a"]["metadata"] == {"sd_merge_recipe": {"type": "x"}}
        assert document["inputs"]["b"]["size"] == (tmp_path / "b.pt").stat().st_size
        assert str(tmp_path) not in json.dumps(document)


def test_the_recipe_is_read_back_and_merges_the_same_again(
    recipe: MergeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.safetensors", "one.pt"):
        plan = ckptkit.plan_recipe(recipe)
        ckptkit.execute(plan, plan.paths, name)
        with ckptkit.open_checkpoint(name) as checkpoint:
            again = recorded_recipe(checkpoint)
        plan = ckptkit.plan_recipe(again)  # the paths are names, and this is their directory
        ckptkit.execute(plan, plan.paths, f"again-{name}")
        assert Path(name).read_bytes() == Path(f"again-{name}").read_bytes() or name.endswith(".pt")
    assert json.loads(Path("one.pt.merge.json").read_text()) == metadata_of(Path("one.safetensors"))
    Path("again-one.pt").unlink()
    with pytest.raises(OutputError, match=r"again-one.pt.merge.json"):
        ckptkit.execute(plan, plan.paths, "again-one.pt")


@pytest.mark.parametrize("file", ["", "/model.safetensors"])  # a directory, and a file of the name of another input
def test_a_base_of_its_own_is_still_one_in_the_recipe_that_is_read_back(tmp_path: Path, file: str) -> None:
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2)}, tmp_path / name / "model.safetensors")
    given = {"method": "ties", "weight": 1, "density": 1, "base": f"{tmp_path}/base{file}"}
    inputs = [{"name": "tuned", "path": f"{tmp_path}/tuned{file}"}]
    plan = ckptkit.plan_recipe({**given, "input": inputs})
    ckptkit.execute(plan, plan.paths, tmp_path / "out.safetensors")
    with ckptkit.open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        again = recorded_recipe(checkpoint)
    assert again.is_base_apart
    assert [each.name for each in again.inputs] == ["model" if file else "base", "tuned"]


def test_a_merge_of_merges_keeps_what_each_says(recipe: MergeRecipe, tmp_path: Path) -> None:
    plan = ckptkit.plan_recipe(recipe)
    ckptkit.execute(plan, plan.paths, tmp_path / "first.safetensors")
    inputs = [{"path": f"{tmp_path}/first.safetensors"}, {"path": f"{tmp_path}/b.pt"}]
    second = ckptkit.plan_recipe({"method": "average", "input": inputs})
    document = json.loads(second.metadata["ckptkit.merge"])
    assert document["inputs"]["first"]["metadata"] == {"ckptkit.merge": json.loads(plan.metadata["ckptkit.merge"])}
    assert document["recipe"]["method"] == "average"


def test_only_sizes_and_digests_are_recorded_without_the_recipe(recipe: MergeRecipe, tmp_path: Path) -> None:
    plan = ckptkit.plan_recipe(recipe, record_recipe=False)
    ckptkit.execute(plan, plan.paths, tmp_path / "out.safetensors")
    document = metadata_of(tmp_path / "out.safetensors")
    assert document.keys() == {"ckptkit", "inputs"}
    assert [set(one) for one in document["inputs"]] == [{"size", "tensors", "header"}] * 2
    with (
        ckptkit.open_checkpoint(tmp_path / "out.safetensors") as checkpoint,
        pytest.raises(RecipeError, match="no recipe"),
    ):
        recorded_recipe(checkpoint)
    with ckptkit.open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert read_provenance(checkpoint) is None
