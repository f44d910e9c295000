"""Which numbers are close to each other, with the rounding of ``torch.allclose`` in each dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from ckptkit.core.dtypes import DTYPES
from ckptkit.values.arrays import array_of, float4_values, real_code
from ckptkit.values.casting import cast_bytes
from ckptkit.values.difference.part import Tolerance
from ckptkit.values.extremes import INTEGERS
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["is_close"]

Array: TypeAlias = "npt.NDArray[Any]"


def is_close(bits: tuple[Array, Array], distance: Array, code: str, tolerance: Tolerance, workers: Workers) -> Array:
    """Return which elements are close: ``torch.isclose(found, expected, rtol, atol)``.

    Integers are compared by their exact ``distance``, where torch would round them to float32. Torch has no
    ``isclose`` for floats of at most 8 bits: these are compared in float32.
    """
    import numpy as np

    real, parts = real_code(code), DTYPES[code].parts
    close: Array
    if real in INTEGERS:
        expected = array_of(bits[0].view(np.uint8).data, real).astype(np.float64)
        close = (distance == 0) | (distance <= tolerance.atol + tolerance.rtol * np.abs(expected))
        return close
    half = real if real in ("F16", "BF16") and parts == 1 else ""
    expected, found = (_values(side, real, workers) for side in bits)
    kind = expected.dtype.type
    if parts == 2:
        expected, found = (side.view(f"c{2 * side.itemsize}") for side in (expected, found))

    def rounded(numbers: Array) -> Array:
        return _rounded(numbers, half, workers) if half else numbers

    allowed = rounded(kind(tolerance.atol) + np.abs(rounded(kind(tolerance.rtol) * expected)))
    actual = np.abs(rounded(found - expected))
    close = (found == expected) | (np.isfinite(actual) & (actual <= allowed))
    return close


def _values(bits: Array, real: str, workers: Workers) -> Array:
    """Return numbers in the dtype in which torch computes, in an array of their own."""
    import numpy as np

    if real in ("F32", "F64"):
        return bits.view(f"f{bits.itemsize}")
    if real == "F4":
        numbers: Array = float4_values()[bits >> 4].astype(np.float32)
        return numbers
    return np.array(np.frombuffer(cast_bytes(bits.view(np.uint8).data, real, "F32", workers, "close"), np.float32))


def _rounded(numbers: Array, code: str, workers: Workers) -> Array:
    import numpy as np

    narrow = cast_bytes(numbers.view(np.uint8).data, "F32", code, workers, "narrow")
    return np.array(np.frombuffer(cast_bytes(narrow, code, "F32", workers, "close"), np.float32))
