"""Sums of task vectors: all their elements, or those whose sign is elected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

from ckptkit.values.merging.model import Array
from ckptkit.values.workers import Workers

__all__ = ["Election", "add_elected", "add_weighted"]

# Whose sign decides for an element: the sum of the weighted task vectors, the sum of the plain ones, or most of them.
Election: TypeAlias = Literal["weighted", "plain", "count"]
_SIGN: Final = {4: 1 << 31, 8: 1 << 63}


def add_weighted(vectors: Sequence[Array], scales: Sequence[float], weights: Sequence[float], out: Array) -> None:
    """Set ``out`` to the sum of the vectors times their scales and weights; the vectors are changed."""
    _weigh(vectors, [scale * weight for scale, weight in zip(scales, weights, strict=True)])
    _add(vectors, out)


def add_elected(
    vectors: Sequence[Array],
    scales: Sequence[float],
    weights: Sequence[float],
    out: Array,
    workers: Workers,
    *,
    election: Election,
    normalizes: bool,
) -> None:
    """Set ``out`` to the sum of the weighted elements with the elected sign; the vectors are changed.

    A sum of 0 elects the positive sign. With ``normalizes``, the sum is divided by that of the sizes of the weights.
    """
    import numpy as np

    size, dtype = len(out), out.dtype
    bits = f"u{dtype.itemsize}"
    if election == "plain":
        _weigh(vectors, scales)
        _add(vectors, out)
        _weigh(vectors, weights)
    else:
        add_weighted(vectors, scales, weights, out)
    if election == "count":
        votes = workers.buffer("merge votes", dtype, size)
        out.fill(0)
        for vector in vectors:
            np.add(out, np.sign(vector, out=votes), out=out)
    signs = workers.buffer("merge signs", bits, size)
    np.bitwise_and(out.view(bits), signs.dtype.type(_SIGN[dtype.itemsize]), out=signs)
    zeros = workers.buffer("merge zeros", dtype, size)
    zeros.fill(0)
    total, share = workers.buffer("merge total", dtype, size), workers.buffer("merge share", dtype, size)
    kept = workers.buffer("merge kept", np.bool_, size)
    total.fill(np.finfo(dtype).tiny)  # where nothing is kept, 0 is divided by it
    out.fill(0)
    for vector, weight in zip(vectors, weights, strict=True):
        # With the elected sign as the positive one, the elements that are kept are those above 0.
        np.bitwise_xor(vector.view(bits), signs, out=vector.view(bits))
        if normalizes:
            np.multiply(np.greater(vector, zeros, out=kept), dtype.type(abs(weight)), out=share, dtype=dtype)
            np.add(total, share, out=total)
        np.add(out, np.maximum(vector, zeros, out=vector), out=out)
    if normalizes:
        np.divide(out, total, out=out)
    np.bitwise_xor(out.view(bits), signs, out=out.view(bits))


def _weigh(vectors: Sequence[Array], factors: Sequence[float]) -> None:
    import numpy as np

    for vector, factor in zip(vectors, factors, strict=True):
        if factor != 1:
            np.multiply(vector, vector.dtype.type(factor), out=vector)


def _add(vectors: Sequence[Array], out: Array) -> None:
    import numpy as np

    out.fill(0)
    for vector in vectors:
        np.add(out, vector, out=out)
