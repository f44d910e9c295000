"""The largest numbers without sorting: the same as numpy's stable sort finds, in any pieces, however the sample is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ckptkit.values.merging.selection import Cut, Stage, begin, kth_largest, sample_ranges, wants_sample
from ckptkit.values.workers import PIECE, Workers, pieces

Array = npt.NDArray[Any]
LARGE = PIECE + PIECE // 4


def found(numbers: Array, count: int, piece: int = PIECE) -> tuple[Cut, int]:
    """Return the cut of the largest numbers, and how many passes over all of them were made."""
    workers, stage, passes = Workers(1), begin(len(numbers), count), 0
    while isinstance(stage, Stage):
        ranges = sample_ranges(len(numbers)) if wants_sample(stage) else pieces(len(numbers), piece)
        passes += not wants_sample(stage)
        for start, stop in ranges:
            stage.add(start, stage.measure(numbers[start:stop], workers))
        stage = stage.result()
    return stage, passes


def marked(numbers: Array, cut: Cut, piece: int = PIECE) -> Array:
    """Return where the largest numbers are; each piece is marked in parts."""
    out = np.zeros(len(numbers), np.bool_)
    for start, stop in pieces(len(numbers), piece):
        mark = cut.mark(start)
        for first, last in pieces(stop - start, 1000 if len(numbers) < PIECE else 1 << 16):
            mark.into(numbers[start + first : start + last], out[start + first : start + last])
    return out


def wanted(numbers: Array, count: int) -> Array:
    """Return where the largest numbers are, of equal ones the first, as a stable sort finds them."""
    out = np.zeros(len(numbers), np.bool_)
    out[np.argsort(-numbers, kind="stable")[:count]] = True
    return out


def numbers_of(kind: str, size: int, dtype: str) -> Array:
    """Return magnitudes as tensors have them: all different, few different ones, mostly zeros, sorted, or all equal."""
    numbers: Array = np.abs(np.random.default_rng(size).standard_normal(size)).astype(dtype)
    if kind == "few":
        numbers = np.round(numbers * 4) / numbers.dtype.type(4)
    elif kind == "zeros":
        numbers[::3] = 0
        numbers = numbers.astype(np.float16).astype(dtype)
    elif kind == "equal":
        numbers.fill(0.5)
    return np.sort(numbers) if kind == "sorted" else numbers


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("kind", ["normal", "few", "zeros", "sorted", "equal"])
def test_the_largest_are_those_of_a_stable_sort(kind: str, dtype: str) -> None:
    """For any count, in pieces of any size."""
    for size, piece in ((1, 1), (7, 3), (900, 900), (5000, 333)):
        numbers = numbers_of(kind, size, dtype)
        for count in {0, 1, size // 3, size - 1, size}:
            cut, passes = found(numbers, count, piece)
            assert (marked(numbers, cut, piece) == wanted(numbers, count)).all(), (size, count)
            assert passes <= 1


@pytest.mark.parametrize(("kind", "count"), [("normal", LARGE // 2), ("zeros", LARGE // 5), ("sorted", 1)])
def test_a_large_tensor_needs_one_pass_after_a_sample(kind: str, count: int) -> None:
    numbers = numbers_of(kind, LARGE, "f4")
    cut, passes = found(numbers, count)
    assert (marked(numbers, cut) == wanted(numbers, count)).all()
    assert passes == 1


@pytest.mark.parametrize(("dtype", "steps"), [("f4", 0), ("f8", 8)])
def test_a_sample_that_misleads_costs_passes_only(dtype: str, steps: int) -> None:
    """The numbers of the sample are far smaller than all others."""
    numbers = numbers_of("normal", LARGE, dtype)
    if steps:
        numbers = np.round(numbers * steps) / numbers.dtype.type(steps)
    for start, stop in sample_ranges(LARGE):
        numbers[start:stop] *= numbers.dtype.type(1e-3)
    cut, passes = found(numbers, LARGE // 2)
    assert (marked(numbers, cut) == wanted(numbers, LARGE // 2)).all()
    assert passes == 1 + numbers.itemsize // 2 + bool(steps)


@pytest.mark.parametrize("size", [PIECE + 1, 3 * PIECE, 1 << 29])
def test_ranges_of_a_sample_are_in_order_within_the_tensor(size: int) -> None:
    ends = [end for both in sample_ranges(size) for end in both]
    assert ends == sorted(ends)
    assert ends[0] >= 0
    assert ends[-1] <= size


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_number_of_several_arrays_has_its_place(dtype: str) -> None:
    parts = [numbers_of(kind, 6000, dtype) for kind in ("normal", "few", "zeros", "equal")]
    together = np.sort(np.concatenate(parts))[::-1]
    assert all(kth_largest(parts, count) == together[count - 1] for count in (1, 2, 4567, 12000, 24000))
