"""Compare the values of two checkpoints that have the same keys and shapes, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.files import same_bytes
from ckptkit.core.torch_bridge import flat_bytes
from ckptkit.core.torch_types import Tensor

__all__ = ["ValueDifference", "compare_values"]

_PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """How the values of one tensor differ.

    Attributes:
        expected: The tensor on the expected side.
        found: The tensor on the found side.
        count: The number of elements that differ; None where torch cannot compute with the dtype.
        largest: The largest absolute difference: inf where one side is not finite, None as above.
        place: The index of the element with the largest difference; None as above.
        values: The expected and the found value of that element, as text.
    """

    expected: TensorInfo
    found: TensorInfo
    count: int | None = None
    largest: float | None = None
    place: tuple[int, ...] | None = None
    values: tuple[str, str] = ("", "")


def compare_values(
    expected: Checkpoint, found: Checkpoint, keys: Iterable[str], *, rtol: float = 0.0, atol: float = 0.0
) -> list[ValueDifference]:
    """Return the differences of the tensors at ``keys``, which both sides have with one shape; the largest come first.

    Without tolerances, tensors of one dtype must have equal bytes: a NaN equals a NaN of the same bits, and -0.0
    differs from 0.0. Otherwise an element differs where ``abs(found - expected) > atol + rtol * abs(expected)``, and
    two NaNs are equal. At most one piece of a tensor from each side is in memory.
    """
    differences = []
    for key in keys:
        if expected[key].dtype == found[key].dtype and same_bytes(expected.payload(key), found.payload(key)):
            continue
        difference = _compare(expected, found, key, rtol=rtol, atol=atol)
        if difference.count != 0:
            differences.append(difference)
    return sorted(differences, key=lambda difference: -math.inf if difference.largest is None else -difference.largest)


def _compare(expected: Checkpoint, found: Checkpoint, key: str, *, rtol: float, atol: float) -> ValueDifference:
    wanted, got = expected[key], found[key]
    exact = rtol == atol == 0 and wanted.dtype == got.dtype
    count, largest, place, values = 0, -1.0, 0, ("", "")
    try:
        for start, left, right in _pieces(expected, found, key):
            differs, distance = _differing(left, right, exact=exact, rtol=rtol, atol=atol)
            here = int(differs.sum())
            if not here:
                continue
            count += here
            at = int(distance.where(differs, distance.new_full((), -1.0)).argmax())
            if distance[at] > largest:
                largest, place = float(distance[at]), start + at
                values = str(left.reshape(-1)[at].item()), str(right.reshape(-1)[at].item())
    except (TypeError, RuntimeError):  # torch has no such dtype, or cannot compute with it
        return ValueDifference(wanted, got)
    return ValueDifference(wanted, got, count, max(largest, 0.0), _index(place, wanted.shape), values)


def _differing(left: Tensor, right: Tensor, *, exact: bool, rtol: float, atol: float) -> tuple[Tensor, Tensor]:
    """Return which elements differ, and the absolute difference of each, both flat."""
    import torch

    wide = torch.complex128 if left.is_complex() or right.is_complex() else torch.float64
    expected, found = (side.reshape(-1).to(wide) for side in (left, right))
    distance = (found - expected).abs()
    same = (expected == found) | (expected.isnan() & found.isnan())
    if not any(side.is_floating_point() or side.is_complex() for side in (left, right)):
        # Neighbours above 2**53 are one number in F64. Below 2**62, a difference is exact in I64, also one of U64.
        difference = (right.reshape(-1).to(torch.int64) - left.reshape(-1).to(torch.int64)).abs()
        distance = distance.where(distance >= 2**62, difference.to(wide))
        same = distance == 0
    distance = distance.nan_to_num(nan=math.inf, posinf=math.inf).where(~same, distance.new_zeros(()))
    if exact:
        bytes_differ = flat_bytes(left) != flat_bytes(right)
        return bytes_differ.reshape(left.numel(), -1).any(dim=1), distance
    # A difference of inf is beyond every tolerance, also beyond one that is inf.
    limit = (atol + rtol * expected.abs()).nan_to_num(nan=0.0, posinf=math.inf)
    return (distance > limit) | (distance == math.inf), distance


def _pieces(expected: Checkpoint, found: Checkpoint, key: str) -> Iterable[tuple[int, Tensor, Tensor]]:
    """Yield the two tensors in pieces of whole rows, each with the number of elements before it."""
    shape = expected[key].shape
    if not shape:
        yield 0, expected.read(key), found.read(key)
        return
    row = max(math.prod(shape[1:]), 1)
    rows = max(_PIECE_ELEMENTS // row, 1)
    for first in range(0, shape[0], rows):
        part = slice(first, min(first + rows, shape[0]))
        yield first * row, expected.read(key, rows=part), found.read(key, rows=part)


def _index(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        place, inner = divmod(place, size)
        index.append(inner)
    return tuple(reversed(index))
