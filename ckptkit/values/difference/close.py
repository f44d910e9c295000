"""Which numbers are close to each other, with the rounding of ``torch.allclose`` in each dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptkit.core.dtypes import DTYPES
from ckptkit.values.arrays import array_of, float4_values, real_code
from ckptkit.values.casting import cast_bytes
from ckptkit.values.difference.part import Tolerance
from ckptkit.values.extremes import INTEGERS
from ckptkit.values.workers import Workers, pieces

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["is_close"]

Array: TypeAlias = "npt.NDArray[Any]"
_FINE = 1 << 16  # elements; new arrays of more are new pages of memory, which cost more than the arithmetic
# Of F16: more than three roundings, more than the rounding of a subnormal number, and less than any overflow.
_NEAR, _SUBNORMAL, _OVERFLOW = 2.0**-7, 1e-6, 3e4


def is_close(bits: tuple[Array, Array], distance: Array, code: str, tolerance: Tolerance, workers: Workers) -> Array:
    """Return which elements are close: ``torch.isclose(found, expected, rtol, atol)``.

    Integers are compared by their exact ``distance``, where torch would round them to float32. Torch has no
    ``isclose`` for floats of at most 8 bits: these are compared in float32.
    """
    import numpy as np

    parts = DTYPES[code].parts
    close: Array = workers.buffer("close", np.bool_, len(bits[0]) // parts)
    for start, stop in pieces(len(close), _FINE):
        some = bits[0][start * parts : stop * parts], bits[1][start * parts : stop * parts]
        close[start:stop] = _close_in(some, distance[start:stop], code, tolerance, workers)
    return close


def _close_in(bits: tuple[Array, Array], distance: Array, code: str, tolerance: Tolerance, workers: Workers) -> Array:
    import numpy as np

    real, parts = real_code(code), DTYPES[code].parts
    close: Array
    if real in INTEGERS:
        expected = array_of(bits[0].view(np.uint8).data, real).astype(np.float64)
        close = (distance == 0) | (distance <= tolerance.atol + tolerance.rtol * np.abs(expected))
        return close
    expected, found = (_values(side, real, workers) for side in bits)
    if parts == 2:
        expected, found = (side.view(f"c{2 * side.itemsize}") for side in (expected, found))
    if parts == 2 or real != "F16":
        is_rounded = real in ("F16", "BF16")
        if real == "F16":  # torch rounds rtol too where numbers are complex
            tolerance = tolerance._replace(rtol=float(np.float16(tolerance.rtol)))
        return _is_close(
            expected, found, tolerance, lambda numbers: _rounded(numbers, real, workers) if is_rounded else numbers
        )
    # Torch rounds each step to F16, which takes long, and matters only where a difference is near the limit.
    actual = np.abs(found - expected)
    allowed = np.float32(tolerance.atol) + np.abs(np.float32(tolerance.rtol) * expected)
    close = (found == expected) | (actual <= allowed)
    size = actual + allowed
    margin = size * np.float32(_NEAR) + np.float32(_SUBNORMAL)
    near = np.flatnonzero(~((np.abs(actual - allowed) > margin) & (size < _OVERFLOW)))
    close[near] = _is_close(expected[near], found[near], tolerance, lambda numbers: _rounded(numbers, real, workers))
    return close


def _is_close(expected: Array, found: Array, tolerance: Tolerance, rounded: Callable[[Array], Array]) -> Array:
    import numpy as np

    def size_of(numbers: Array) -> Array:
        return rounded(np.abs(numbers)) if numbers.dtype.kind == "c" else np.abs(numbers)

    kind = expected.real.dtype.type
    allowed = rounded(kind(tolerance.atol) + size_of(rounded(kind(tolerance.rtol) * expected)))
    actual = size_of(rounded(found - expected))
    close: Array = (found == expected) | (np.isfinite(actual) & (actual <= allowed))
    return close


def _values(bits: Array, real: str, workers: Workers) -> Array:
    """Return numbers in the dtype in which torch computes, in an array of their own."""
    import numpy as np

    if real in ("F32", "F64"):
        return bits.view(f"f{bits.itemsize}")
    if real == "F4":
        numbers: Array = float4_values()[bits >> 4].astype(np.float32)
        return numbers
    return np.array(np.frombuffer(cast_bytes(bits.view(np.uint8).data, real, "F32", workers, "as float32"), np.float32))


def _rounded(numbers: Array, code: str, workers: Workers) -> Array:
    import numpy as np

    narrow = cast_bytes(numbers.view(np.uint8).data, "F32", code, workers, "narrow")
    wide = np.array(np.frombuffer(cast_bytes(narrow, code, "F32", workers, "as float32"), np.float32))
    rounded: Array = wide.view(numbers.dtype)
    return rounded
