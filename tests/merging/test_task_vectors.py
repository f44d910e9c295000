"""Merges of task vectors: what holds for every input, and the choices that no number of another program covers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ckptkit.errors import ArgumentError, PlanError
from ckptkit.plans.methods.table import METHODS, method_named
from ckptkit.values.merging import payload, selection
from ckptkit.values.merging.task_vectors.ranks import ranks_in_rows
from ckptkit.values.workers import Workers
from tests.helpers_merging import merge_arrays, merge_payload, read

Array = npt.NDArray[Any]

SHAPE = (300, 128)
WEIGHTS: Mapping[str, object] = {"weight": [0.5, 0.25]}
KEEPING: Mapping[str, Mapping[str, object]] = {
    "task_arithmetic": WEIGHTS,
    "ties": {**WEIGHTS, "density": [0.5, 0.2], "rescale": "l1"},
    "dare_linear": {**WEIGHTS, "density": 0.5},
    "dare_ties": {**WEIGHTS, "density": 0.4, "rescale": "l1"},
    "della": {**WEIGHTS, "density": 0.6},
    "della_linear": {**WEIGHTS, "density": 0.3},
    "breadcrumbs": {**WEIGHTS, "density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {**WEIGHTS, "density": 0.5, "gamma": 0.1},
    "sce": {"select_topk": 0.4},
    "model_stock": {},
    "arcee_fusion": {},
}
DETERMINISTIC = ["task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "sce", "model_stock"]


def models(count: int = 2, shape: tuple[int, ...] = SHAPE, steps: int = 1 << 12) -> list[Array]:
    """Return a base and models that were trained from it; the values have few digits."""
    rng = np.random.default_rng(len(shape) + count)
    base = rng.integers(-steps, steps, shape)
    return [base / steps, *((base + rng.normal(0, 40, shape).round()) / steps for _ in range(count))]


def merged(method: str, tensors: Sequence[Array], **more: object) -> Array:
    """Return the merge of the models with the parameters of ``KEEPING``; ``arcee_fusion`` takes one model only."""
    used = tensors[:2] if method == "arcee_fusion" else tensors
    return merge_arrays(method, used, {**KEEPING[method], **more}, base=True)


@pytest.mark.parametrize("method", KEEPING)
def test_pieces_and_threads_do_not_change_a_byte(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, in pieces of one row, and in larger pieces with a sample, by one thread or several."""
    used = models()[: 2 if method == "arcee_fusion" else 3]
    whole = merged(method, used).tobytes()
    for piece, threads in ((128, 3), (1 << 13, 1), (10000, 2)):
        monkeypatch.setattr(payload, "PIECE", piece)
        monkeypatch.setattr(selection, "PIECE", piece)
        with Workers(threads) as workers:
            assert read(merge_payload(method, used, KEEPING[method], base=True, workers=workers)).tobytes() == whole


@pytest.mark.parametrize("method", KEEPING)
def test_equal_inputs_are_the_result_bit_for_bit(method: str) -> None:
    same = models()[0].astype(np.float32)
    same.flat[3] = -0.0
    assert merged(method, [same] * 3).tobytes() == same.tobytes()


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_the_order_of_the_inputs_does_not_matter(method: str) -> None:
    base, *others = models(3)
    weights = [0.5, 0.25, 1.0]
    given = [
        {name: [0.5, 0.2, 0.4] if isinstance(value, list) else value for name, value in KEEPING[method].items()}
        for _ in range(2)
    ]
    order = (2, 0, 1)
    for one, places in zip(given, ((0, 1, 2), order), strict=True):
        if "weight" in one:
            one["weight"] = [weights[place] for place in places]
        if isinstance(one.get("density"), list):
            one["density"] = [(0.5, 0.2, 0.4)[place] for place in places]
    first = merge_arrays(method, [base, *others], given[0], base=True)
    second = merge_arrays(method, [base, *(others[place] for place in order)], given[1], base=True)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [name for name in KEEPING if "weight" in KEEPING[name]])
def test_an_input_of_weight_0_is_left_out(method: str) -> None:
    """It is not even read: it may have NaN. The masks of the other inputs stay theirs."""
    base, first, second = models()
    broken = np.full(SHAPE, np.nan)
    given = dict(KEEPING[method])
    with_it = merge_arrays(method, [base, first, broken, second], _three(given, (0.5, 0.0, 0.25)), base=True)
    if "dare" in method or "della" in method:
        assert np.isfinite(with_it).all()
        of_first = merge_arrays(method, [base, first, broken, broken], _three(given, (0.5, 0.0, 0.0)), base=True)
        assert (of_first == merge_arrays(method, [base, first], _one(given, 0.5), base=True)).all()
    else:
        assert (with_it == merge_arrays(method, [base, first, second], given, base=True)).all()


def _three(given: Mapping[str, object], weights: tuple[float, ...]) -> dict[str, object]:
    found = {**given, "weight": list(weights)}
    if isinstance(found.get("density"), list):
        found["density"] = [0.5, 0.9, 0.2]
    return found


def _one(given: Mapping[str, object], weight: float) -> dict[str, object]:
    return {**given, "weight": [weight]}


@pytest.mark.parametrize("method", ["dare_linear", "breadcrumbs"])
def test_a_density_of_1_is_task_arithmetic(method: str) -> None:
    tensors = models()
    assert (merged(method, tensors, density=1.0) == merged("task_arithmetic", tensors)).all()


def test_a_density_of_1_leaves_the_election() -> None:
    tensors = models()
    ties = merged("ties", tensors, density=1.0, normalize=False, rescale="none")
    for method in ("dare_ties", "breadcrumbs_ties"):
        assert (merged(method, tensors, density=1.0) == ties).all()


@pytest.mark.parametrize("elect", ["weighted", "plain", "count"])
def test_ties_elects_the_sign_that_is_asked_for(elect: str) -> None:
    """As the definition says, computed element by element."""
    base, *others = models(3, (2000,), 64)
    weights, densities = (1.0, -0.5, 0.25), (0.9, 0.7, 0.3)
    vectors = []
    for other, density in zip(others, densities, strict=True):
        vector = other - base
        dropped = np.argsort(-abs(vector), kind="stable")[max(1, math.floor(density * len(vector))) :]
        vector[dropped] = 0
        vectors.append(vector)
    want = base.copy()
    for index in range(len(base)):
        plain = [vector[index] for vector in vectors]
        weighted = [weight * value for weight, value in zip(weights, plain, strict=True)]
        votes = {"weighted": weighted, "plain": plain, "count": [np.sign(value) for value in weighted]}[elect]
        sign = 1 if sum(votes) >= 0 else -1
        kept = [(weight, value) for weight, value in zip(weights, weighted, strict=True) if np.sign(value) == sign]
        if kept:
            want[index] += 2 * sum(value for _, value in kept) / sum(abs(weight) for weight, _ in kept)
    given = {"weight": list(weights), "density": list(densities), "elect": elect, "lambda": 2.0}
    np.testing.assert_allclose(merge_arrays("ties", [base, *others], given, base=True), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("row", [1, 3, 127, 128, 1000])
def test_ranks_are_those_of_a_stable_sort(row: int) -> None:
    for dtype in ("f4", "f8"):
        numbers = np.abs(np.random.default_rng(row).standard_normal(row * 7)).astype(dtype)
        numbers[::5] = numbers[0]
        want = np.argsort(np.argsort(numbers.reshape(-1, row), axis=1, kind="stable"), axis=1, kind="stable")
        assert (ranks_in_rows(numbers, row, Workers(1)).reshape(-1, row) == want).all()


def test_della_keeps_large_elements_more_often_and_divides_by_their_probability() -> None:
    """In each tenth of the ranks, the share that is kept is within 5 standard errors of its mean probability."""
    rows, row, density, epsilon = 400, 100, 0.5, 0.3
    base = np.zeros((rows, row))
    change = np.random.default_rng(0).standard_normal((rows, row))
    given = {"weight": 1.0, "density": density, "epsilon": epsilon}
    made = merge_arrays("della_linear", [base, change], given, base=True, codes="F64")
    ranks = np.argsort(np.argsort(abs(change), axis=1), axis=1)
    probability = density - epsilon + 2 * epsilon * ranks / (row - 1)
    kept = made != 0
    np.testing.assert_allclose(made[kept], (change / probability)[kept], rtol=1e-12)
    for tenth in range(10):
        here = ranks // 10 == tenth
        wanted = probability[here].mean()
        error = math.sqrt(wanted * (1 - wanted) / here.sum())
        assert abs(kept[here].mean() - wanted) < 5 * error, tenth


def test_breadcrumbs_leave_out_the_largest_and_the_smallest() -> None:
    change = np.array([5.0, -1, 4, -3, 2, 4, -4, 0.5, 1.5, -2.5])
    made = merge_arrays(
        "breadcrumbs", [np.zeros(10), change], {"weight": 1.0, "density": 0.4, "gamma": 0.25}, base=True
    )
    assert made.tolist() == [0, 0, 0, -3, 0, 4, -4, 0, 0, -2.5]  # the first of three equal ones is with the largest


def test_arcee_fusion_takes_quantiles_of_all_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of several pieces has the quantiles that sorting finds."""
    base, other = (one.astype(np.float32).astype(np.float64) for one in models(1, (400, 64)))
    exponents = [np.exp(one - one.max(axis=1, keepdims=True)) for one in (other, base)]
    p, q = (one / one.sum(axis=1, keepdims=True) + 1e-8 for one in exponents)
    importance = abs(other - base) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    lower, median, upper = (np.sort(importance, axis=None)[int(part * (base.size - 1))] for part in (0.25, 0.5, 0.75))
    want = np.where(importance >= median + 1.5 * (upper - lower), other, base)
    monkeypatch.setattr(payload, "PIECE", 4096)
    monkeypatch.setattr(selection, "PIECE", 4096)
    assert (merge_arrays("arcee_fusion", [base, other], base=True) == want).all()


@pytest.mark.parametrize("method", KEEPING)
def test_float64_inputs_are_merged_in_float64(method: str) -> None:
    """The result differs from that of float32 by its rounding only."""
    tensors = models()[: 2 if method == "arcee_fusion" else 3]
    wide = merge_arrays(method, tensors, KEEPING[method], base=True, codes="F64")
    assert wide.dtype == np.float64
    narrow = merged(method, tensors)
    near = np.isclose(wide, narrow, rtol=0, atol=1e-6)
    assert near.all() if "della" not in method else near.mean() > 0.999


@pytest.mark.parametrize("method", KEEPING)
def test_numbers_that_are_not_finite_are_refused(method: str) -> None:
    tensors = models()
    tensors[1] = tensors[1].copy()
    tensors[1][17, 3] = np.inf
    with pytest.raises(PlanError, match=r"'w' cannot be merged: its element \[17, 3\] in 'input 1' is inf"):
        merged(method, tensors)


@pytest.mark.parametrize(("elect", "weight"), [("count", 1.0), ("plain", [-1, 2, 1])])
def test_an_infinity_that_loses_the_election_is_refused(elect: str, weight: object) -> None:
    tensors = [np.zeros(4), np.array([np.inf, 1, 1, 1]), -np.ones(4), -np.ones(4)]
    with pytest.raises(PlanError, match=r"its element \[0\] in 'input 1' is inf"):
        merge_arrays("ties", tensors, {"weight": weight, "density": 1.0, "elect": elect}, base=True)


@pytest.mark.parametrize("method", [name for name in KEEPING if name != "arcee_fusion"])  # which has a softmax
def test_inputs_times_a_power_of_two_give_the_output_times_it(method: str) -> None:
    """No square or sum of very small or very large numbers becomes 0 or infinite."""
    tensors = models(shape=(64, 16))
    made = merged(method, tensors)
    for factor in (2.0**-90, 2.0**90):
        assert (merged(method, [tensor * factor for tensor in tensors]) == made * np.float32(factor)).all()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 1), (2, 2, 3)])
@pytest.mark.parametrize("method", KEEPING)
def test_tensors_of_any_shape_are_merged(method: str, shape: tuple[int, ...]) -> None:
    made = merged(method, models(2, shape))
    assert made.shape == shape
    assert np.isfinite(made).all()


def test_seeds_keys_and_inputs_have_masks_of_their_own() -> None:
    base, change = np.zeros(4096), np.ones(4096)
    given = {"weight": 1.0, "density": 0.5, "rescale": "none"}
    made = [
        merge_arrays("dare_linear", [base, change], {**given, "seed": seed}, base=True, key=key)
        for seed, key in ((0, "a"), (1, "a"), (0, "b"))
    ]
    made.append(merge_arrays("dare_linear", [base, base, change], given, base=True, key="a"))
    for one, other in itertools.combinations(made, 2):
        assert abs((one == other).mean() - 0.5) < 5 * 0.5 / math.sqrt(4096)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("ties", {"weight": 1.0}, "ties needs density"),
        ("ties", {"weight": 1.0, "density": 1.5}, "density is 1.5, and must be a number from 0 to 1"),
        ("ties", {"weight": 1.0, "density": 1.0, "elect": "most"}, "elect is 'most', and must be"),
        ("dare_linear", {"density": 0.5}, "dare_linear needs weight"),
        ("dare_linear", {"weight": [1.0, -1.0], "density": 0.5, "normalize": True}, "cancel"),
        ("della", {"weight": 1.0, "density": 0.9}, "density is 0.9 and epsilon 0.15"),
        ("breadcrumbs", {"weight": 1.0, "density": 0.5, "gamma": 2}, "gamma is 2, and must be a number from 0 to 1"),
        ("sce", {"select_topk": -1}, "select_topk is -1, and must be a number from 0 to 1"),
        ("model_stock", {"per": "column"}, "per is 'column', and must be"),
    ],
)
def test_parameters_out_of_range_are_refused(method: str, given: Mapping[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        method_named(method).of(2, given, has_base=True)


def test_every_method_of_task_vectors_is_tested_here() -> None:
    with_base = {name for name, kind in METHODS.items() if kind.uses_base == "always"}
    assert with_base - set(KEEPING) == {"nearswap", "add_difference", "train_difference"} & with_base
