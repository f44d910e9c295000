"""Configurations of mergekit become recipes that merge to its numbers, or sentences about what has no equal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

import ckptkit
from ckptkit.errors import RecipeError, RuleError
from ckptkit.plans.recipes.mergekit import recipe_from_mergekit
from ckptkit.plans.recipes.model import Gradient, RecipeInput, Setting
from tests.merging.test_golden import CASES, DEVIATIONS, INPUTS, TOLERANCE

STATES: Mapping[str, dict[str, torch.Tensor]] = {
    name: {key: torch.from_numpy(value) for key, value in tensors.items()} for name, tensors in INPUTS.items()
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_mergekit_is_a_recipe_with_its_numbers(name: str) -> None:
    case = CASES[name]
    recipe = replace(recipe_from_mergekit(case["yaml"]).recipe, seed=case.get("seed", 0))
    given = {each.name: STATES[each.name] for each in recipe.inputs}
    plan = ckptkit.plan_recipe(recipe, inputs=given)
    if "error" in case or name.endswith("bf16_compute"):
        return  # no numbers, or those of inputs of another dtype
    made = {key: tensor.double().numpy() for key, tensor in plan.materialize(given).items()}
    assert made.keys() == {*case["tensors"], *case["sums"]}
    for key, value in made.items():
        if (name, key) in DEVIATIONS:
            np.testing.assert_allclose(value, DEVIATIONS[name, key], rtol=0, atol=2e-6, err_msg=key)
        elif key in case["tensors"]:
            want = np.array(case["tensors"][key], np.float32).reshape(value.shape)
            np.testing.assert_allclose(value, want, rtol=0, atol=TOLERANCE[case["dtype"]], err_msg=key)
        elif key not in case.get("unstable", ()):
            total, squares = case["sums"][key]
            tolerance = max(TOLERANCE[case["dtype"]], 1e-6) * value.size
            assert math.isclose(value.sum(), total, rel_tol=0, abs_tol=tolerance), key
            assert math.isclose(np.square(value).sum(), squares, rel_tol=0, abs_tol=4 * tolerance), key


EXAMPLE = """
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: org/math+org/lora
    parameters:
      weight: [{filter: mlp, value: [0.1, 0.9]}, {filter: head, value: 0.5}, {value: 0.25}]
      density: 0.5
  - model: other/math
    parameters: {weight: 1}
parameters:
  int8_mask: true
  normalize: true
  lambda: [0.5, 1.0]
dtype: bfloat16
tokenizer_source: union
chat_template: auto
surprise: 1
"""


def test_filters_gradients_and_what_has_no_equal() -> None:
    found = recipe_from_mergekit(EXAMPLE)
    recipe = found.recipe
    assert (recipe.method, recipe.base, recipe.out_dtype) == ("ties", "base", "BF16")
    assert recipe.inputs == (
        RecipeInput("base", "org/base"),
        RecipeInput("math", "org/math", {"density": 0.5, "weight": 0.25}, lora="org/lora"),
        RecipeInput("math2", "other/math", {"weight": 1, "density": 1.0}),
    )
    assert recipe.parameters == {"lambda": 0.5, "normalize": True}
    assert recipe.settings == (
        Setting(("model.layers.{i:int}.*mlp*",), inputs={"math": {"weight": Gradient("i", (0.1, 0.9))}}),
        Setting(("*head*",), inputs={"math": {"weight": 0.5}}),
        Setting(("model.layers.{i:int}.*",), {"lambda": Gradient("i", (0.5, 1.0))}),
    )
    assert found.notes == (
        "line 17: tokenizer_source has no equal: no tokenizer is read; --carry copies that of the base",
        "line 18: chat_template has no equal: no chat template is read; --carry copies that of the base",
        "line 19: surprise has no equal",
        "line 16: dtype: mergekit computes in bfloat16; here in float32, with one rounding",
        "line 13: int8_mask is left out: it has no effect on the numbers",
        "weight for 'mlp': in mergekit, keys outside layers get the first value of the gradient",
    )


def test_slices_of_the_same_layers_are_whole_models() -> None:
    text = """
slices:
  - sources:
      - {model: a, layer_range: [0, 32]}
      - {model: b, layer_range: [0, 32]}
merge_method: slerp
base_model: b
parameters: {t: 0.3}
"""
    found = recipe_from_mergekit(text)
    assert [each.name for each in found.recipe.inputs] == ["b", "a"]
    assert (found.recipe.base, found.recipe.parameters) == ("", {"t": 0.3})
    assert found.notes == ("line 4: layer_range [0, 32] is taken to be all layers",)


def test_a_note_about_what_follows_the_layers_has_the_line_of_the_last_model() -> None:
    text = """merge_method: passthrough
slices:
  - sources:
      - model: a
        layer_range: [0, 2]
  - sources:
      - layer_range: [1, 3]
        model: b
"""
    notes = recipe_from_mergekit(text).notes
    assert [note for note in notes if "after the layers" in note] == [
        "line 8: 'model.norm.*', 'lm_head.*' are taken to be what is after the layers, from 'b'"
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "merge_method: nearly\nmodels: [{model: a}]",
            "line 1: there is no method 'nearly', or none that has an equal",
        ),
        ("merge_method: linear", "the configuration has no models"),
        ("modules: {text: {}}", "the configuration has no merge_method"),
        ("merge_method: linear\nmodels: [{model: {lora: b}}]", "line 2: None is not the name of a model"),
        ("merge_method: linear\nmodels: [{model: a}]\ndtype: float12", "line 3: dtype: unknown dtype 'float12'"),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}]},\n\n{sources: [{model: b}]}]",
            "line 4: slices of linear that differ in their layers or parameters have no equal",
        ),
        (
            "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}, {model: b}]",
            "line 3: a slice of passthrough has one source",
        ),
        ("merge_method: slerp\nmodels: [{model: a}, {model: b}]", "slerp needs t"),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [a, 2]}]}]",
            "line 2: a slice without two layers as layer_range has no equal",
        ),
    ],
)
def test_a_configuration_without_an_equal_is_refused_with_its_line(text: str, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_mergekit(text, "merge.yml")
    assert caught.value.reason == reason
    assert caught.value.path == "merge.yml"


def test_what_is_not_yaml_is_refused() -> None:
    with pytest.raises(RuleError, match="not valid YAML"):
        recipe_from_mergekit("a: [")
