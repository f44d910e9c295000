"""What mergekit 0.1.5 gives, as numbers: every case and every edge is met, or is a deviation that is named here.

``merge_golden.json`` was written by a program that ran mergekit 0.1.5 with torch 2.13 on the CPU, in one thread,
through its public ``run_merge``. The inputs are folders of Llama models of two layers with 21 tensors. Their values
were drawn from a seeded generator as integers, which ``denominator`` divides: so they are exact in float32.
``special`` names keys where a is the base, b is twice a, a is 0, the changes of a and b are opposite, or all are
equal. A case has the configuration in the YAML of mergekit, eight tensors in full, and of the others the sum and the
sum of squares. ``edges`` are calls for single tensors; ``want`` is what is asked here: nothing for the same numbers,
other numbers, ``error``, or a sentence.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ruamel.yaml import YAML

import ckptkit
from ckptkit.errors import CkptkitError
from ckptkit.plans.methods.table import METHODS
from ckptkit.values.merging.selection import Cut
from ckptkit.values.merging.task_vectors.combining import TaskVector, TaskVectors
from ckptkit.values.merging.task_vectors.keeping import Keeper, Keeping
from ckptkit.values.workers import Workers
from tests.helpers_merging import merge_arrays, merge_payload, read

Array = npt.NDArray[Any]

GOLDEN = json.loads((Path(__file__).parent / "merge_golden.json").read_text())
SPECIAL: Mapping[str, str] = GOLDEN["special"]
CASES: Mapping[str, Any] = GOLDEN["cases"]
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
NAMES = {
    "linear", "average", "ema", "add_difference", "train_difference", "slerp", "nuslerp", "multislerp", "karcher",
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties",
    "sce", "model_stock", "nearswap", "arcee_fusion", "passthrough",
}  # fmt: skip


def read_inputs() -> dict[str, dict[str, Array]]:
    """Return the tensors of each input by key."""
    inputs = {
        name: {
            key: (np.array(values) / GOLDEN["denominator"]).astype(np.float32).reshape(GOLDEN["shapes"][key])
            for key, values in tensors.items()
        }
        for name, tensors in GOLDEN["inputs"].items()
    }
    inputs["d"] = {**inputs["c"], **inputs["d"]}
    return inputs


INPUTS = read_inputs()


class Call(NamedTuple):
    """One tensor of a case as a call of a method here."""

    method: str
    inputs: tuple[str, ...]  # the base first, if the method has one
    has_base: bool
    given: dict[str, object]


def configuration(name: str) -> dict[str, Any]:
    """Return the configuration of a case."""
    found: dict[str, Any] = YAML(typ="safe").load(CASES[name]["yaml"])
    return found


def call_of(config: Mapping[str, Any], key: str) -> Call:
    """Return what a configuration of mergekit means for one key."""
    method = config["merge_method"]
    base = config.get("base_model")
    models = config["models"]
    if base is not None:
        models = [{"model": base}, *(model for model in models if model["model"] != base)]
    has_base = base is not None and METHODS[method].uses_base != "never"
    per_input = [model.get("parameters", {}) for model in models][has_base:]
    given: dict[str, object] = {
        parameter: [value_for(of_one[parameter], key) for of_one in per_input]
        for parameter in dict.fromkeys(name for of_one in per_input for name in of_one)
    }
    given |= {name: value_for(value, key) for name, value in config.get("parameters", {}).items()}
    return Call(method, tuple(model["model"] for model in models), has_base, translated(given))


def translated(given: Mapping[str, object]) -> dict[str, object]:
    """Return parameters of mergekit with the names and words that they have here."""
    found = dict(given)
    found.pop("int8_mask", None)  # no effect on the numbers
    if "normalize_weights" in found:
        found["normalize"] = found.pop("normalize_weights")
    if found.pop("nuslerp_flatten", True) is False:
        found["axis"] = "columns" if found.get("nuslerp_row_wise") else "rows"
    found.pop("nuslerp_row_wise", None)
    if "rescale" in found:
        found["rescale"] = "l1" if found["rescale"] else "none"
    if found.pop("filter_wise", False):
        found["per"] = "row"
    return found


def value_for(value: Any, key: str) -> Any:
    """Return the value of a parameter for a key: that of the first filter that fits, or of a place in a gradient."""
    if isinstance(value, list) and isinstance(value[0], dict):
        value = next(one["value"] for one in value if one.get("filter", "") in key)
    if not isinstance(value, list):
        return value
    layer = int(key.split(".")[2]) if key.startswith("model.layers.") else 0
    place = layer / (GOLDEN["config"]["num_hidden_layers"] - 1) * (len(value) - 1)
    low = min(int(place), len(value) - 2)
    return value[low] + (place - low) * (value[low + 1] - value[low])


def merged(call: Call, key: str, dtype: str, out: str = "") -> Array:
    """Return the merged tensor of a key; the inputs are stored with the dtype, or rounded to it."""
    tensors = [INPUTS[name][key] for name in call.inputs]
    return merge_arrays(call.method, tensors, call.given, base=call.has_base, codes=dtype, out=out, key=key)


@dataclass(frozen=True, slots=True)
class GivenMask(Keeping, Keeper):
    """Keeps the elements of a mask of a case."""

    mask: Array

    def keeper(self, start: int, cuts: Sequence[Cut]) -> Keeper:
        del start, cuts
        return self

    def thin(self, vector: Array, start: int, workers: Workers) -> None:
        del workers
        vector *= self.mask[start : start + len(vector)]


def merged_with_masks(call: Call, key: str, masks: Sequence[str]) -> Array:
    """Return the merged tensor of a random method with these masks, rescaled as mergekit does it."""
    tensors = [INPUTS[name][key] for name in call.inputs]
    given = {"rescale": "l1", **call.given}
    payload = merge_payload(call.method, tensors, given, base=True, key=key)
    assert isinstance(payload.merging, TaskVectors)
    vectors = tuple(
        TaskVector(GivenMask(np.array(list(mask), np.float32)), one.weight, restores_l1=one.restores_l1)
        for one, mask in zip(payload.merging.vectors, masks, strict=True)
    )
    return read(replace(payload, merging=replace(payload.merging, vectors=vectors)))


def linear(a: Array, b: Array, t: float) -> Array:
    """Return the point between two tensors."""
    return (1 - t) * a + t * b


def stocks(case: str) -> Iterator[tuple[str, Array]]:
    """Yield the keys with task vectors that point away from each other, and the model stock: there the base."""
    for key in GOLDEN["shapes"]:
        call = call_of(configuration(case), key)
        base, *others = (INPUTS[name][key].astype(np.float64) for name in call.inputs)
        vectors = [other - base if call.given.get("per") else (other - base).reshape(1, -1) for other in others]
        norms = [np.linalg.norm(vector, axis=-1, keepdims=True) for vector in vectors]
        cosine = np.zeros_like(norms[0])
        pairs = list(itertools.combinations(range(len(vectors)), 2))
        for one, other in pairs:
            product = (vectors[one] * vectors[other]).sum(axis=-1, keepdims=True)
            norm = norms[one] * norms[other]
            cosine += np.divide(product, norm, out=np.zeros_like(norm), where=norm > 0) / len(pairs)
        if (cosine < 0).any():
            away = np.maximum(cosine, 0)
            share = len(others) * away / (1 + (len(others) - 1) * away)
            yield key, base + (share * np.mean(vectors, axis=0)).reshape(base.shape)


def deviations() -> Iterator[tuple[str, str, str, Array]]:
    """Yield the case, the key, the reason and the numbers of each tensor that is another one here, on purpose."""
    key = SPECIAL["a_is_zero"]
    for case in ("slerp.0.2", "slerp.0.5", "slerp.1.5", "slerp.gradient_and_filter"):
        t = call_of(configuration(case), key).given["t"]
        assert isinstance(t, int | float)
        yield case, key, "a tensor of zeros has no direction", linear(INPUTS["a"][key], INPUTS["b"][key], t)
    key = SPECIAL["opposite_deltas"]
    third = linear(INPUTS["a"][key], INPUTS["b"][key], 0.7)
    yield "nuslerp.task_vectors", key, "the angle of opposite vectors is noise in mergekit", third
    for case in ("model_stock.tensor", "model_stock.two", "model_stock.filter_wise"):
        for key, want in stocks(case):
            yield case, key, "the base, where mergekit goes away from the models", want


DEVIATIONS = {(case, key): want for case, key, _, want in deviations() if case.partition(".")[0] in METHODS}
WITH_MODELS = [name for name, case in CASES.items() if name.partition(".")[0] in METHODS and "error" not in case]


def test_every_method_has_its_cases() -> None:
    assert {name.partition(".")[0] for name in CASES} <= set(METHODS)
    assert set(METHODS) == NAMES


@pytest.mark.parametrize("name", [name for name in WITH_MODELS if not name.startswith("passthrough.")])
def test_a_case_has_the_numbers_of_mergekit(name: str) -> None:
    case, config = CASES[name], configuration(name)
    dtype, out = ("BF16" if config.get(field) == "bfloat16" else "F32" for field in ("dtype", "out_dtype"))
    out = out if "out_dtype" in config else dtype
    for key in case.get("masks", GOLDEN["shapes"]):
        call = call_of(config, key)
        if "masks" in case:
            made = merged_with_masks(call, key, case["masks"][key]).astype(np.float64)
        else:
            made = merged(call, key, dtype, out).astype(np.float64)
        tolerance = 0.0 if name in ("linear.bf16_compute", "linear.out_bf16") else TOLERANCE[case["dtype"]]
        if (name, key) in DEVIATIONS:
            np.testing.assert_allclose(made, DEVIATIONS[name, key], rtol=0, atol=2e-6, err_msg=key)
        elif key in case.get("unstable", ()):
            continue
        elif key in case["tensors"]:
            want = np.array(case["tensors"][key], np.float32).reshape(made.shape)
            np.testing.assert_allclose(made, want, rtol=0, atol=tolerance, err_msg=key)
        else:
            total, squares = case["sums"][key]
            tolerance = max(tolerance, 1e-6) * made.size
            assert math.isclose(made.sum(), total, rel_tol=0, abs_tol=tolerance), key
            assert math.isclose(np.square(made).sum(), squares, rel_tol=0, abs_tol=4 * tolerance), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "masks" in case])
def test_masks_of_torch_are_those_of_mergekit(name: str) -> None:
    """A recipe for all tensors has the results of mergekit with its seed, without being given the masks."""
    case, config = CASES[name], configuration(name)
    names = [model["model"] for model in config["models"]]
    recipe = {
        "method": config["merge_method"],
        "base": "base",
        "seed": case["seed"],
        "masks": "torch",
        "rescale": "l1",
        **translated(config.get("parameters", {})),
        "input": [{"name": "base"}, *({"name": one["model"], **one["parameters"]} for one in config["models"])],
    }
    inputs = {
        each: {key: torch.from_numpy(tensor) for key, tensor in INPUTS[each].items()} for each in ("base", *names)
    }
    made = ckptkit.plan_recipe(recipe, inputs=inputs).materialize(inputs)
    for key, want in case["tensors"].items():
        np.testing.assert_allclose(made[key].numpy().ravel(), want, rtol=0, atol=2e-6, err_msg=key)


def test_a_case_without_a_result_in_mergekit_gives_the_base_where_no_model_changed_a_tensor() -> None:
    name = "multislerp.task_vectors_all_equal"
    assert CASES[name]["error"].startswith("ValueError")
    key = SPECIAL["all_equal"]
    np.testing.assert_array_equal(merged(call_of(configuration(name), key), key, "F32"), INPUTS["base"][key])


@pytest.mark.parametrize("name", [name for name in WITH_MODELS if name.startswith("passthrough.")])
def test_the_layers_of_a_case_with_slices_are_scaled(name: str) -> None:
    sources = [one["sources"][0] for one in configuration(name)["slices"]]
    layers = [(source, layer) for source in sources for layer in range(*source["layer_range"])]
    sums: dict[str, list[float]] = {}
    for place, (source, layer) in enumerate(layers):
        for key in (key for key in GOLDEN["shapes"] if key.startswith(f"model.layers.{layer}.")):
            scale = value_for(source.get("parameters", {}).get("scale", 1.0), key)
            made = merge_arrays("passthrough", [INPUTS[source["model"]][key]], {"scale": [scale]}).astype(np.float64)
            sums[key.replace(f".{layer}.", f".{place}.", 1)] = [made.sum(), np.square(made).sum()]
    wanted = {key: value for key, value in CASES[name]["sums"].items() if ".layers." in key}
    assert sums.keys() == wanted.keys()
    for key, want in wanted.items():
        np.testing.assert_allclose(sums[key], want, rtol=0, atol=1e-5, err_msg=key)


def edge_name(edge: Mapping[str, Any]) -> str:
    """Return a name for a test."""
    return f"{edge['method']}: {edge['note']}"


@pytest.mark.parametrize("edge", [one for one in GOLDEN["edges"] if one["method"] in METHODS], ids=edge_name)
def test_an_edge_is_what_is_wanted(edge: Mapping[str, Any]) -> None:
    method, base = edge["method"], edge["base"]
    is_integers = edge["note"].startswith("integers")
    tensors = [np.array(tensor, np.float64).astype(np.float32) for tensor in edge["tensors"]]
    has_base = base is not None and METHODS[method].uses_base != "never"
    given = translated(edge["parameters"])
    codes = "I64" if is_integers else "F32"
    if edge["want"] == "error":
        with pytest.raises(CkptkitError):
            merge_arrays(method, tensors, given, base=has_base, codes=codes)
        return
    made = merge_arrays(method, tensors, given, base=has_base, codes=codes)
    assert made.shape == tensors[0].shape
    if isinstance(edge["want"], str):
        assert np.isfinite(made).all()
        return
    want = edge["mergekit"] if edge["want"] is None else edge["want"]
    np.testing.assert_allclose(made.ravel(), np.array(want, np.float64), rtol=0, atol=2e-6)
