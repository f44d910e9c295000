"""Merged tensors as bytes: the same in any threads, pieces and order, rounded once, and refused with their key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint.payload import part_of, read_into
from ckptkit.errors import PlanError
from ckptkit.values import workers as values_workers
from ckptkit.values.merging import payload as merging_payload
from ckptkit.values.merging.model import Facts
from ckptkit.values.workers import Workers
from tests.helpers_merging import merge_arrays, merge_payload

Array = npt.NDArray[Any]
KINDS: dict[str, tuple[str, int, bool, Mapping[str, object]]] = {
    "linear": ("linear", 3, False, {"weight": [0.5, 0.2, 0.1]}),
    "slerp": ("slerp", 2, False, {"t": 0.3}),
    "karcher": ("karcher", 3, False, {}),
    "nuslerp of rows": ("nuslerp", 3, True, {"weight": [0.5, 0.2], "axis": "rows"}),
    "nuslerp of columns": ("nuslerp", 2, False, {"weight": [0.5, 0.2], "axis": "columns"}),
    "nearswap": ("nearswap", 2, True, {"t": 0.1}),
}


def random_tensors(count: int, shape: tuple[int, ...] = (90, 70)) -> list[Array]:
    """Return float32 tensors of one shape."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(count)]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, int, bool, Mapping[str, object]]:
    """Give a method with the number of its tensors, whether it has a base, and its parameters."""
    return KINDS[request.param]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a piece have few numbers."""
    monkeypatch.setattr(merging_payload, "PIECE", 256)


@pytest.mark.usefixtures("small_pieces")
def test_threads_chunks_and_ranges_have_the_same_bytes(kind: tuple[str, int, bool, Mapping[str, object]]) -> None:
    method, count, base, given = kind
    made: list[bytes] = []
    for threads in (1, 3):
        with Workers(threads) as workers:
            payload = merge_payload(method, random_tensors(count), given, base=base, out="BF16", workers=workers)
            data = bytearray(payload.nbytes)
            payload.readinto(memoryview(data))
            made.append(bytes(data))
    fresh = merge_payload(method, random_tensors(count), given, base=base, out="BF16")
    made.append(b"".join(map(bytes, fresh.chunks())))
    assert len(set(made)) == 1
    for start, nbytes in ((0, 2), (1, 3), (511, 1030), (len(made[0]) - 5, 5), (700, 0)):
        fresh = merge_payload(method, random_tensors(count), given, base=base, out="BF16")
        part = bytearray(nbytes)
        read_into(part_of(fresh, start, nbytes), memoryview(part))
        assert part == made[0][start : start + nbytes]


def test_pieces_have_nearly_the_numbers_of_the_whole(
    kind: tuple[str, int, bool, Mapping[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, count, base, given = kind
    whole = merge_arrays(method, random_tensors(count), given, base=base)
    monkeypatch.setattr(merging_payload, "PIECE", 256)
    np.testing.assert_allclose(merge_arrays(method, random_tensors(count), given, base=base), whole, atol=1e-6)


def test_a_row_longer_than_a_piece_is_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging_payload, "PIECE", 16)
    tensors, given = random_tensors(2, (3, 50)), {"weight": [1, 2], "axis": "rows"}
    made = merge_arrays("nuslerp", tensors, given)
    rows = [merge_arrays("nuslerp", [one[row] for one in tensors], {"weight": [1, 2]}) for row in range(3)]
    np.testing.assert_allclose(made, np.stack(rows), atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (1, 1, 1)])
def test_any_shape_is_merged(kind: tuple[str, int, bool, Mapping[str, object]], shape: tuple[int, ...]) -> None:
    method, count, base, given = kind
    made = merge_arrays(method, random_tensors(count, shape), given, base=base)
    assert made.shape == shape
    assert np.isfinite(made).all()


def test_numbers_are_rounded_once_and_losses_are_counted() -> None:
    losses: dict[str, CastLoss] = {}
    tensors = [np.array([1e5, 1e-9, 3.0], np.float32), np.array([1e5, 1e-9, 4.0], np.float32)]
    made = merge_arrays("linear", tensors, {"weight": [1, 3]}, out="F16", losses=losses)
    assert np.isinf(made[0])
    assert made[1:].tolist() == [0.0, 3.75]
    loss = losses["w"]
    assert (loss.found, loss.dtype, loss.overflowed, loss.underflowed) == ("F32", "F16", 1, 1)
    assert loss.largest == np.float32(1e5)


def test_a_sum_that_float32_cannot_hold_is_a_loss() -> None:
    losses: dict[str, CastLoss] = {}
    tensors = [np.array([3e38, 1.0], np.float32)] * 2
    merge_arrays("linear", tensors, {"normalize": False}, losses=losses)
    assert (losses["w"].overflowed, losses["w"].dtype) == (1, "F32")
    made = merge_arrays("linear", tensors, {"normalize": False}, losses=losses, out="F64", is_wide=True)
    assert made[0] == 2 * float(np.float32(3e38))
    assert not losses["w"]


def test_float64_is_used_where_an_input_has_it() -> None:
    one = np.array([1.0], np.float64)
    other = np.array([2.0**-40], np.float64)
    given = {"normalize": False}
    assert merge_arrays("linear", [one, other], given, codes="F64") == 1 + 2.0**-40
    assert merge_arrays("linear", [one, other], given, codes=["F32", "F64"], out="F64") == 1 + 2.0**-40
    assert merge_arrays("linear", [one, other], given, codes="F32", out="F64") == 1
    assert merge_arrays("linear", [one, other], given, codes="F32", out="F64", is_wide=True) == 1 + 2.0**-40


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "F16", "BF16"])
def test_narrow_inputs_are_widened(code: str) -> None:
    tensors = [np.array([0.5, 1.25, -3.0]), np.array([1.5, 0.25, 2.0])]
    made = merge_arrays("linear", tensors, codes=code, out="F32")
    np.testing.assert_array_equal(made, [1.0, 0.75, -0.5])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_place(
    kind: tuple[str, int, bool, Mapping[str, object]], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging_payload, "PIECE", 512)
    method, count, base, given = kind
    tensors = random_tensors(count)
    tensors[1][80, 3] = value
    with pytest.raises(PlanError, match=rf"(?i)'w' cannot be merged: its element \[80, 3\] in 'input 1' is {value}"):
        merge_arrays(method, tensors, given, base=base)


def test_numbers_that_are_not_finite_are_refused_where_all_inputs_are_equal() -> None:
    with pytest.raises(PlanError, match=r"its element \[\d\] in 'input 0' is NaN"):
        merge_arrays("linear", [np.array([1.0, np.nan])] * 2)


def test_numbers_that_are_not_finite_are_allowed_or_taken_from_the_base() -> None:
    tensors = [np.array([1.0, 2.0, 3.0]), np.array([2.0, np.nan, np.inf])]
    losses: dict[str, CastLoss] = {}
    made = merge_arrays("linear", tensors, on_nonfinite="allow", losses=losses)
    np.testing.assert_array_equal(made, np.array([1.5, np.nan, np.inf]))
    assert not losses["w"]
    np.testing.assert_array_equal(merge_arrays("linear", tensors, on_nonfinite="base"), [1.5, 2.0, 3.0])
    made = merge_arrays("nearswap", tensors, {"t": 0.25}, base=True, on_nonfinite="base")
    np.testing.assert_array_equal(made, [1.25, 2.0, 3.0])
    made = merge_arrays("linear", tensors, {"weight": [0, 1]}, on_nonfinite="base")
    np.testing.assert_array_equal(made, [2.0, 2.0, 3.0])
    with pytest.raises(PlanError, match=r"its element \[\d\] in 'input 0' is NaN"):
        merge_arrays("linear", tensors[::-1], on_nonfinite="base")


@pytest.mark.parametrize(
    ("method", "given", "warning"),
    [
        ("slerp", {"t": 0.25}, "the inputs are opposite: interpolated linearly"),
        ("multislerp", {}, "the inputs are opposite: merged linearly"),
        ("karcher", {}, "the directions of the inputs add up to 0: merged linearly"),
    ],
)
def test_opposite_inputs_are_merged_linearly_with_a_warning(
    method: str, given: dict[str, object], warning: str
) -> None:
    a = random_tensors(1)[0]
    payload = merge_payload(method, [a, -a], given)
    facts: dict[str, Facts] = {}
    object.__setattr__(payload, "facts", facts)
    raw = bytearray(payload.nbytes)
    payload.readinto(memoryview(raw))
    data = np.frombuffer(raw, np.float32).reshape(a.shape)
    np.testing.assert_allclose(data, a / 2 if method == "slerp" else 0 * a, atol=1e-6)
    assert facts == {"w": Facts(warning)}


def test_pieces_are_smaller_with_many_inputs() -> None:
    few = merge_payload("linear", random_tensors(3, (1,)))
    many = merge_payload("linear", random_tensors(32, (1,)))
    assert few._size == values_workers.PIECE
    assert many._size * 32 == few._size * 4
