"""What holds for methods of merging: at their ends, for equal inputs, in any order, and with weights of 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.optim import swa_utils

from ckptkit.errors import ArgumentError, PlanError, RuleError
from ckptkit.plans.methods.model import Method
from ckptkit.plans.methods.table import METHODS, method_named
from tests.helpers_merging import merge_arrays, merge_payload

Array = npt.NDArray[Any]


def random_tensors(count: int, shape: Sequence[int] = (6, 5), seed: int = 0) -> list[Array]:
    """Return float32 tensors of one shape that are near each other."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return [(base + 0.2 * rng.standard_normal(shape)).astype(np.float32) for _ in range(count)]


def angle(a: Array, b: Array) -> float:
    """Return the angle between two tensors."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return math.acos(np.clip(a @ b / math.sqrt((a @ a) * (b @ b)), -1, 1))


# Methods whose result is x if all inputs are: with their parameters for three inputs, or two.
SAME: dict[str, tuple[int, bool, Mapping[str, object]]] = {
    "linear": (3, False, {"weight": [0.3, 0.3, 0.1]}),
    "average": (3, False, {}),
    "ema": (3, False, {"decay": 0.7}),
    "add_difference": (3, False, {"alpha": 0.3}),
    "train_difference": (3, False, {"alpha": 0.3}),
    "slerp": (2, False, {"t": 0.3}),
    "nuslerp": (2, False, {"weight": [0.3, 0.8]}),
    "nuslerp of columns": (2, False, {"weight": [0.3, 0.8], "axis": "columns"}),
    "nuslerp of differences": (3, True, {"weight": [0.3, 0.8], "axis": "rows"}),
    "multislerp": (3, False, {"weight": [0.3, 0.3, 0.1]}),
    "multislerp of differences": (4, True, {"weight": [0.3, 0.3, 0.1]}),
    "karcher": (3, False, {}),
    "nearswap": (2, True, {"t": 0.1}),
    "passthrough": (1, False, {}),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_inputs_are_the_output_in_every_bit(name: str) -> None:
    count, base, given = SAME[name]
    tensor = random_tensors(1)[0]
    tensor[0, :2] = -0.0, 1e-42  # bits that arithmetic would not keep
    for code in ("F32", "BF16", "F16", "F64"):
        made = merge_arrays(name.partition(" ")[0], [tensor] * count, given, base=base, codes=code)
        assert made.tobytes() == tensor.astype(made.dtype).tobytes()


@pytest.mark.parametrize("weights", [[1.0, 0.0, 2.0], [0.0, -1.0, 0.25]])
@pytest.mark.parametrize("method", ["linear", "multislerp", "karcher"])
def test_an_input_of_weight_0_is_left_out_and_not_read(method: str, weights: list[float]) -> None:
    if method == "karcher":
        weights = [abs(weight) for weight in weights]
    tensors = random_tensors(3)
    others = [place for place, weight in enumerate(weights) if weight]
    tensors[weights.index(0.0)][:] = np.nan
    made = merge_arrays(method, tensors, {"weight": weights})
    want = merge_arrays(method, [tensors[place] for place in others], {"weight": [weights[place] for place in others]})
    assert made.tobytes() == want.tobytes()


@pytest.mark.parametrize("given", [{"t": 0}, {"t": 1.0}])
def test_the_ends_of_an_arc_are_the_inputs(given: dict[str, float]) -> None:
    tensors = random_tensors(2)
    tensors[0][0, 0] = -0.0
    weights = {"weight": [1 - given["t"], given["t"]]}
    base = random_tensors(1, seed=5)
    for made in (
        merge_arrays("slerp", tensors, given),
        merge_arrays("nuslerp", tensors, weights),
        merge_arrays("nuslerp", [*base, *tensors], weights, base=True),
    ):
        assert made.tobytes() == tensors[int(given["t"])].tobytes()


@pytest.mark.parametrize("method", ["linear", "average", "multislerp", "karcher"])
def test_the_order_of_the_inputs_has_no_effect(method: str) -> None:
    tensors, weights = random_tensors(3), [0.5, 0.2, 0.4]
    given = {"weight": weights} if method != "average" else {}
    turned = {"weight": weights[::-1]} if method != "average" else {}
    made = merge_arrays(method, tensors, given)
    np.testing.assert_allclose(merge_arrays(method, tensors[::-1], turned), made, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("linear", {"weight": [0.5, 2.0]}),
        ("slerp", {"t": 0.3}),
        ("nuslerp", {"weight": [0.5, 2.0]}),
        ("nuslerp", {"weight": [0.5, 2.0], "axis": "rows"}),
        ("multislerp", {"weight": [0.5, 2.0]}),
        ("karcher", {}),
    ],
)
def test_scaled_inputs_give_the_scaled_output(method: str, given: Mapping[str, object]) -> None:
    tensors = random_tensors(2)
    made = merge_arrays(method, tensors, given)
    scaled = merge_arrays(method, [tensor * np.float32(8) for tensor in tensors], given)
    np.testing.assert_allclose(scaled, made * 8, rtol=1e-6)


def test_slerp_divides_the_angle() -> None:
    a, b = random_tensors(2)
    made = merge_arrays("slerp", [a, b], {"t": 0.25})
    # Of unit vectors the angle is divided exactly; these have nearly the same lengths.
    a, b = (tensor / np.linalg.norm(tensor) for tensor in (a, b))
    made = merge_arrays("slerp", [a, b], {"t": 0.25})
    assert math.isclose(np.linalg.norm(made), 1, rel_tol=1e-6)
    assert math.isclose(angle(a, made), angle(a, b) / 4, rel_tol=1e-5)


def test_the_karcher_mean_of_two_is_the_middle_and_has_the_mean_length() -> None:
    a, b = random_tensors(2)
    made = merge_arrays("karcher", [a, b])
    assert math.isclose(angle(a, made), angle(made, b), rel_tol=1e-4)
    assert math.isclose(np.linalg.norm(made), (np.linalg.norm(a) + np.linalg.norm(b)) / 2, rel_tol=1e-6)


@pytest.mark.parametrize("weights", [[0.634, 1.94], [0.965, 1.401], [1.668, 0.138]])
@pytest.mark.parametrize("seed", range(3))
def test_an_opposite_direction_does_not_turn_the_karcher_mean(weights: list[float], seed: int) -> None:
    a = random_tensors(1, seed=seed)[0].astype(np.float64)
    made = merge_arrays("karcher", [a, -a], {"weight": weights}, codes="F64")
    np.testing.assert_allclose(made, a if weights[0] > weights[1] else -a, rtol=1e-12)


def test_the_karcher_mean_has_no_first_order_pull() -> None:
    tensors = [tensor.astype(np.float64).ravel() for tensor in random_tensors(3)]
    made = merge_arrays("karcher", tensors, {"tol": 1e-12, "max_iter": 50}, codes="F64").ravel()
    made /= np.linalg.norm(made)
    pull = np.zeros_like(made)
    for tensor in tensors:
        unit = tensor / np.linalg.norm(tensor)
        pull += angle(unit, made) / math.sin(angle(unit, made)) * (unit - (unit @ made) * made)
    assert np.linalg.norm(pull) < 1e-7


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5), (5,), ()])
def test_nuslerp_of_vectors_is_that_of_each_vector(axis: str, shape: tuple[int, ...]) -> None:
    a, b = random_tensors(2, shape)
    made = merge_arrays("nuslerp", [a, b], {"weight": [0.25, 0.75], "axis": axis})
    dim = -1 if axis == "rows" else 0
    want = np.empty_like(a)
    along = [np.moveaxis(tensor, dim, 0) if shape else tensor for tensor in (a, b, want)]
    for index in np.ndindex(along[0].shape[1:]):
        vectors = [tensor[(slice(None), *index)] if shape else tensor for tensor in along]
        vectors[2][...] = merge_arrays("nuslerp", vectors[:2], {"weight": [0.25, 0.75]})
    np.testing.assert_allclose(made, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "given", "options"),
    [
        ("average", {}, {}),
        ("ema", {"decay": 0.8}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8)}),  # type: ignore[no-untyped-call]
        ("ema", {"decay": 0.0}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.0)}),  # type: ignore[no-untyped-call]
    ],
)
def test_averages_of_snapshots_are_those_of_torch(
    method: str, given: Mapping[str, object], options: Mapping[str, Any]
) -> None:
    tensors = random_tensors(4)
    model = torch.nn.Linear(5, 6, bias=False)
    averaged = swa_utils.AveragedModel(model, **options)
    for tensor in tensors:
        model.load_state_dict({"weight": torch.from_numpy(tensor)})
        averaged.update_parameters(model)
    want = averaged.module.state_dict()["weight"].numpy()
    np.testing.assert_allclose(merge_arrays(method, tensors, given), want, rtol=0, atol=1e-6)


def test_differences_are_added_whole_or_as_in_training() -> None:
    a, p, q = random_tensors(3)
    q[0] = p[0] = a[0]
    wide = [tensor.astype(np.float64) for tensor in (a, p, q)]
    made = merge_arrays("add_difference", [a, p, q], {"alpha": 0.5})
    np.testing.assert_allclose(made, wide[0] + 0.5 * (wide[1] - wide[2]), rtol=0, atol=1e-6)
    made = merge_arrays("train_difference", [a, p, q], {"alpha": 0.5})
    near, moved = np.abs(wide[1] - wide[0]), np.abs(wide[1] - wide[2])
    share = np.divide(near, near + moved, out=np.zeros_like(near), where=near + moved > 0)
    np.testing.assert_allclose(made, wide[0] + 0.9 * share * (wide[1] - wide[2]), rtol=0, atol=1e-6)
    assert merge_arrays("train_difference", [a, p, q], {"alpha": 0}).tobytes() == a.tobytes()


def test_nearswap_takes_near_elements_whole_and_moves_others_by_t() -> None:
    base, other = random_tensors(2)
    made = merge_arrays("nearswap", [base, other], {"t": 0.1}, base=True)
    is_near = np.abs(other - base) <= np.float32(0.1)
    assert is_near.any()
    assert not is_near.all()
    assert (made[is_near] == other[is_near]).all()
    np.testing.assert_allclose(np.abs(made - base)[~is_near], 0.1, atol=1e-6)


def test_factors_of_0_read_nothing() -> None:
    tensor, base = np.full((2, 2), np.nan, np.float32), np.ones((2, 2), np.float32)
    assert (merge_arrays("passthrough", [tensor], {"scale": [0.0]}) == 0).all()
    nothing = {"weight": 0, "normalize": False}
    for method in ("linear", "multislerp"):
        assert (merge_arrays(method, [tensor, tensor], nothing) == 0).all()
    assert (merge_arrays("multislerp", [base, tensor, tensor], nothing, base=True) == base).all()


@pytest.mark.parametrize(
    ("method", "count", "base", "given", "reason"),
    [
        ("linear", 2, False, {"weight": [1, -1]}, r"the weights \(1, -1\) cancel: their sum is 0"),
        ("linear", 2, False, {"weight": [1, 2, 3]}, "weight has 3 values for 2 inputs"),
        ("linear", 2, False, {"wieght": 1}, "linear has no parameter 'wieght'"),
        ("linear", 2, False, {"weight": "heavy"}, "weight is 'heavy', and must be a number"),
        ("linear", 2, False, {"weight": math.nan}, "weight is nan, and must be a number"),
        ("linear", 2, False, {"weight": 10**5000}, "weight is too large, and must be a number"),
        ("linear", 2, False, {"normalize": 1}, "normalize is 1, and must be true or false"),
        ("linear", 2, True, {}, "linear takes no base"),
        ("ema", 2, False, {"decay": 1.0}, "decay is 1.0, and must be a number of at least 0 and below 1"),
        ("slerp", 2, False, {}, "slerp needs t"),
        ("slerp", 3, False, {"t": 0.5}, "slerp takes 2 inputs, not 3"),
        ("nuslerp", 2, False, {"axis": "diagonals"}, "axis is 'diagonals', and must be 'whole' or 'rows' or 'columns'"),
        ("karcher", 2, False, {"max_iter": 1.5}, "max_iter is 1.5, and must be a whole number of at least 0"),
        ("karcher", 2, False, {"weight": [1, -1]}, "weight is -1, and must be a number of at least 0"),
        ("karcher", 2, False, {"weight": [0, 0]}, "the weights .* cancel"),
        ("nearswap", 1, True, {"t": -1}, "t is -1, and must be a number of at least 0"),
        ("nearswap", 1, False, {"t": 1}, "nearswap needs a base"),
        ("passthrough", 2, False, {}, "passthrough takes 1 input, not 2"),
    ],
)
def test_numbers_that_a_method_cannot_take_are_refused(
    method: str, count: int, base: bool, given: Mapping[str, object], reason: str
) -> None:
    with pytest.raises(ArgumentError, match=reason):
        method_named(method).of(count, given, has_base=base)


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(ArgumentError, match="no method 'slrep'") as caught:
        method_named("slrep")
    assert caught.value.hint == "did you mean 'slerp'?"


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_a_method_can_be_made_again_of_its_parameters(kind: type[Method]) -> None:
    inputs, has_base = max(kind.fewest, 1), kind.uses_base == "always"
    needed = {name: 0.5 for name, parameter in kind.parameters().items() if parameter.default is None}
    method = kind.of(inputs, needed, has_base=has_base)
    assert kind.of(inputs, method.given(), has_base=has_base) == method
    assert hash(method)
    assert kind.__doc__


def test_directions_that_add_up_to_0_have_no_multislerp() -> None:
    a = random_tensors(1)[0]
    b = random_tensors(1, seed=1)[0]
    with pytest.raises(PlanError, match="'w' cannot be merged: the weighted directions of the inputs add up to 0"):
        merge_arrays("multislerp", [a, b, -a, -b])


@pytest.mark.parametrize("seed", range(8))
def test_three_directions_that_add_up_to_0_have_no_mean_direction(seed: int) -> None:
    a, b = (tensor.astype(np.float64).ravel() for tensor in random_tensors(2, seed=seed))
    a /= np.linalg.norm(a)
    b -= (a @ b) * a
    b /= np.linalg.norm(b)
    spread = [math.cos(turn) * a + math.sin(turn) * b for turn in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(PlanError, match="the weighted directions of the inputs add up to 0"):
        merge_arrays("multislerp", spread, codes="F64")
    np.testing.assert_allclose(merge_arrays("karcher", spread, codes="F64"), 0, atol=1e-15)


def test_tensors_that_cannot_be_merged_are_refused() -> None:
    a, b = random_tensors(2)
    with pytest.raises(RuleError, match=r"merge: the shapes differ: \[5, 5\], \[6, 5\]"):
        merge_arrays("linear", [a, b[:5]])
    with pytest.raises(RuleError, match="merge: computes with floating-point numbers, not with I32"):
        merge_payload("linear", [a, b], codes=["F32", "I32"])
    with pytest.raises(RuleError, match="real and complex tensors cannot be merged"):
        merge_payload("linear", [a, b], codes=["F32", "C64"])
    with pytest.raises(RuleError, match="slerp takes no complex numbers"):
        merge_payload("slerp", [a, b], {"t": 0.5}, codes="C64")


def test_complex_tensors_are_averaged() -> None:
    a, b, c, d = random_tensors(4)
    one, other = (first.astype(np.complex128) + 1j * second for first, second in ((a, b), (c, d)))
    for code, atol in (("C64", 1e-6), ("C128", 1e-12)):
        made = merge_arrays("linear", [one, other], {"weight": [1, 3]}, codes=code)
        np.testing.assert_allclose(made, (one + 3 * other) / 4, rtol=0, atol=atol)
