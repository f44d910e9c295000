"""Slices of inputs are the layers of the output, numbered anew, and the configuration follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit.errors import RecipeError
from ckptkit.plans.recipes.parse import recipe_from_text

State = dict[str, torch.Tensor]


def net(value: float, layers: int = 4) -> State:
    state = {"model.embed.weight": torch.full((6, 4), value)}
    state |= {f"model.layers.{i}.{name}.weight": torch.full((4,), value + i) for i in range(layers) for name in "qk"}
    return {**state, "model.norm.weight": torch.full((4,), value)}


A, B = net(0.0), net(100.0)
HEAD = 'method = "passthrough"\nlayer_keys = "model.layers.{i:int}.*"\n'
TWO = '[[input]]\nname = "A"\n[[input]]\nname = "B"\n'
ONE = '[[input]]\nname = "A"\n'


def sliced(text: str) -> ckptkit.Plan:
    recipe = recipe_from_text(text, path="recipe.toml")
    return ckptkit.plan_recipe(recipe, inputs={each.name: {"A": A, "B": B}[each.name] for each in recipe.inputs})


def a_slice(name: str, first: int, end: int, more: str = "") -> str:
    return f'[[slice]]\ninput = "{name}"\nlayers = [{first}, {end}]\n{more}'


def test_layers_are_those_of_the_slices_and_all_else_is_of_the_outer_input() -> None:
    plan = sliced(HEAD + 'outer = "B"\n' + TWO + a_slice("A", 0, 3) + a_slice("B", 1, 4))
    made = {key: tensor.flatten()[0].item() for key, tensor in plan.materialize({"A": A, "B": B}).items()}
    want = {"model.embed.weight": 100.0}
    for new, value in enumerate((0, 1, 2, 101, 102, 103)):
        want |= {f"model.layers.{new}.q.weight": value, f"model.layers.{new}.k.weight": value}
    assert made == {**want, "model.norm.weight": 100.0}
    assert next(iter(made)) == "model.embed.weight"
    assert list(made)[-1] == "model.norm.weight"
    assert {step.operation for step in plan.steps} == {"copy"}
    assert plan.steps[1].rule == "passthrough (line 8)"
    assert {drop.key for drop in plan.dropped if drop.role == "B"} == {
        "model.layers.0.q.weight",
        "model.layers.0.k.weight",
    }


def test_a_scale_is_that_of_the_set_then_of_the_slice_then_of_the_input() -> None:
    plan = sliced(
        HEAD
        + ONE
        + "scale = 5\n"
        + a_slice("A", 1, 2)
        + a_slice("A", 1, 2, "scale = 3\n")
        + '[[set]]\nkeys = "model.layers.1.q.*"\nscale = 0\n'
        + '[[set]]\nkeys = ["model.embed.*", "model.norm.*"]\nscale = 1\n'
    )
    made = {key: tensor.flatten()[0].item() for key, tensor in plan.materialize({"A": A}).items()}
    assert made == {
        "model.embed.weight": 0,
        "model.layers.0.q.weight": 5,
        "model.layers.0.k.weight": 5,
        "model.layers.1.q.weight": 0,
        "model.layers.1.k.weight": 3,
        "model.norm.weight": 0,
    }


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (HEAD + ONE + a_slice("A", 2, 6), 7, "'A' lacks layers 4, 5 of layers [2, 6): it has 4 layers"),
        (HEAD + ONE + a_slice("A", 0, 10**17), 7, "'A' lacks layers 4, 5, 6, 7 and more of layers"),
        (HEAD.replace("model.", "") + ONE + a_slice("A", 0, 1), 2, "'layers.{i:int}.*' fits no key of 'A'"),
        (HEAD + TWO + a_slice("A", 0, 1), 7, "nothing says which input has the keys outside the layers"),
        (HEAD.replace("{i:int}", "*") + ONE + a_slice("A", 0, 1), 2, "layer_keys must have one capture of a number"),
        ('only = "*"\n' + HEAD + ONE + a_slice("A", 0, 1), 1, "only and slices exclude each other"),
        (
            HEAD + ONE + a_slice("A", 0, 1) + '[[set]]\nkeys = "*"\ntake = "A"', 8,
            "'model.layers.0.q.weight' is of a slice, and cannot be taken from another input",
        ),
    ],
)  # fmt: skip
def test_slices_that_leave_a_hole_or_say_too_little_are_refused(text: str, line: int, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        sliced(text)
    assert caught.value.reason.startswith(f"line {line}: {reason}")


def up_scaled(folder: Path, config: dict[str, Any], more: str = "") -> tuple[dict[str, Any], ckptkit.Written]:
    (folder / "m").mkdir()
    save_file(A, folder / "m" / "model.safetensors")
    (folder / "m" / "config.json").write_text(json.dumps(config))
    text = HEAD + more + f'base = "m"\n[[input]]\nname = "m"\npath = "{folder}/m"\n'
    plan = ckptkit.plan_recipe(recipe_from_text(text + a_slice("m", 0, 3) + a_slice("m", 1, 4)))
    written = ckptkit.execute(plan, plan.paths, folder / "out" / "model.safetensors", carry=True)
    assert len(load_file(folder / "out" / "model.safetensors")) == 2 + 6 * 2
    found: dict[str, Any] = json.loads((folder / "out" / "config.json").read_text())
    return found, written


def test_the_configuration_has_the_new_number_of_layers(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    types = ["full", "sliding", "full", "sliding"]
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "layer_types": types, "dtype": "float32"}
    found, written = up_scaled(tmp_path, config)
    wanted = [types[layer] for layer in (0, 1, 2, 1, 2, 3)]
    assert found == {**config, "num_hidden_layers": 6, "layer_types": wanted}
    assert [one.statement for one in written.adapted] == ["num_hidden_layers", "layer_types"]


def test_a_layer_that_is_there_twice_is_not_a_broken_tie_and_real_ties_are(tmp_path: Path) -> None:
    tied = {**A, "head.weight": A["model.embed.weight"]}
    torch.save(tied, tmp_path / "m.pt")
    text = HEAD + f'[[input]]\nname = "m"\npath = "{tmp_path}/m.pt"\n' + a_slice("m", 0, 3) + a_slice("m", 1, 4)
    for number, (recipe, untied) in enumerate(
        [
            (recipe_from_text(text), (("model.embed.weight", "head.weight"),)),
            (recipe_from_text(HEAD + ONE + a_slice("A", 0, 3) + a_slice("A", 1, 4)), ()),
        ]
    ):
        inputs = None if number == 0 else {"A": A}
        plan = ckptkit.plan_recipe(recipe, inputs=inputs)
        written = ckptkit.execute(plan, inputs or plan.paths, tmp_path / f"{number}.safetensors")
        assert written.untied == untied


def test_a_number_of_layers_that_is_not_found_is_told_and_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    config = {"depth": 4, "heads": 4}
    found, written = up_scaled(tmp_path, config)
    assert found == config
    assert written.plan is not None
    assert any("was not changed: 'depth', 'heads' are all 4" in note for note in written.plan.notes)
    other = tmp_path / "named"
    (other / "out").mkdir(parents=True)
    found, _ = up_scaled(other, config, 'layer_count_field = "depth"\n')
    assert found == {"depth": 6, "heads": 4}
