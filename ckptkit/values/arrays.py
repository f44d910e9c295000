"""View the bytes of tensors as numpy arrays: of their own dtype, or of the integers that the bits make."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

from ckptkit.core.checkpoint.reading import numpy_dtype
from ckptkit.core.dtypes import DTYPES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["array_of", "bits_dtype", "bits_of", "float4_values", "numpy_dtype", "real_code"]

_REAL: Final = {"C32": "F16", "C64": "F32", "C128": "F64"}


def array_of(data: bytes | bytearray | memoryview, code: str) -> npt.NDArray[Any]:
    """Return the elements of ``code`` in ``data``, which the array does not copy; an element may begin at any address.

    Raises ``ValueError`` for a dtype that numpy does not have, such as F4, and for bytes that end inside an element.
    """
    import numpy as np

    dtype = numpy_dtype(code)
    if dtype is None:
        raise ValueError(f"numpy has no dtype for {code}")
    return np.frombuffer(data, np.uint8).view(dtype)


def bits_of(data: bytes | bytearray | memoryview, code: str) -> npt.NDArray[Any]:
    """Return the bits of each number in ``data`` as an unsigned integer; the array does not copy the bytes.

    A complex element is two numbers. Of a dtype with several numbers in a byte, each byte is one integer.
    """
    import numpy as np

    return np.frombuffer(data, np.uint8).view(bits_dtype(code))


def bits_dtype(code: str) -> np.dtype[Any]:
    """Return the unsigned integer dtype that is as wide as one number of ``code``."""
    import numpy as np

    return np.dtype(f"u{DTYPES[code].part_bytes}")


def real_code(code: str) -> str:
    """Return the code of the two numbers in an element of a complex dtype, or the code itself."""
    return _REAL.get(code, code)


@functools.cache
def float4_values() -> npt.NDArray[np.float64]:
    """Return the number of each of the 16 codes of F4."""
    import ml_dtypes
    import numpy as np

    values: npt.NDArray[np.float64] = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    values.flags.writeable = False
    return values
