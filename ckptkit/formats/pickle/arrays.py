"""Read the numpy arrays, dtypes and scalars of a pickle as descriptions and bytes, without numpy."""

from __future__ import annotations

import array
import math
import struct
from dataclasses import dataclass, replace
from typing import Any, Final

from ckptkit.core.checkpoint import row_major
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import ByteSwapped, Extent, Region
from ckptkit.errors import FormatError
from ckptkit.formats.layout import InMemory
from ckptkit.formats.numpy_dtypes import DTYPE_CODES, OTHER_KINDS, SCALAR_CODES
from ckptkit.formats.pickle.values import CodeName

__all__ = ["ARRAY_CLASSES", "FUNCTIONS", "ArrayContent", "ArrayDType", "read_buffer", "read_scalar", "read_state"]

_CORES = ("numpy.core", "numpy._core")
# The functions that numpy names in a pickle, by the last part of the name.
FUNCTIONS: Final = {
    **{f"{core}.multiarray._reconstruct": "_reconstruct" for core in _CORES},
    **{f"{core}.multiarray.scalar": "scalar" for core in _CORES},
    **{f"{core}.numeric._frombuffer": "_frombuffer" for core in _CORES},
    "numpy.dtype": "dtype",
}
ARRAY_CLASSES: Final = frozenset(
    {"numpy.ndarray", "numpy.memmap", "numpy.matrix", *(f"{core}.memmap.memmap" for core in _CORES)}
)
_FORMATS: Final = {
    "BOOL": "?", "I8": "b", "U8": "B", "I16": "h", "U16": "H", "I32": "i", "U32": "I", "I64": "q", "U64": "Q",
    "F16": "e", "F32": "f", "F64": "d", "C64": "ff", "C128": "dd",
}  # fmt: skip
_WORDS: Final = {2: "H", 4: "I", 8: "Q"}
_MOST_DIMENSIONS = 64
_NAMED_FIELDS = slice(2, 5)  # of the state of a dtype: the base of a subarray, the names and the types of fields


class ArrayDType:
    """A dtype of numpy, to which the pickle may still give a byte order.

    ``code`` is the safetensors code, or empty for elements that are not plain numbers. ``is_value`` is true for text,
    dates and objects.
    """

    def __init__(self, kind: object, *_: object) -> None:
        """Take the first argument of ``numpy.dtype`` in a pickle: a name such as ``f4``, or a class of ml_dtypes."""
        self.name = str(kind)[:40]
        self.is_big_endian = False
        if isinstance(kind, CodeName):
            self.code = SCALAR_CODES.get(kind.name, "") if kind.module.partition(".")[0] == "ml_dtypes" else ""
        else:
            self.code = DTYPE_CODES.get(self.name.lstrip("<=|"), "")
        group = OTHER_KINDS.get(self.name.lstrip("<>=|")[:1], ("", ""))[0]
        self.is_value = group in ("object", "text", "datetime")

    def set_state(self, state: object) -> None:
        """Take the byte order; elements with fields of their own are not plain numbers."""
        if not isinstance(state, tuple) or len(state) < 5:
            raise FormatError("corrupt pickle: a dtype of numpy has an unknown state")
        self.is_big_endian = state[1] == ">"
        if any(part is not None for part in state[_NAMED_FIELDS]):
            self.code, self.name, self.is_value = "", "structured", False


@dataclass(frozen=True, slots=True)
class ArrayContent:
    """The elements of an array: dtype, shape, strides in elements, and bytes.

    ``data`` is None for elements that are not plain numbers.
    """

    dtype: ArrayDType
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    data: Region | None = None


def read_state(state: object) -> ArrayContent:
    """Return the content that a pickle gives to an array; raises ``FormatError`` if the parts contradict each other."""
    parts = state[-4:] if isinstance(state, tuple) and len(state) in (4, 5) else ()  # the first of 5 is a version
    if not parts or not isinstance(parts[1], ArrayDType):
        raise FormatError("corrupt pickle: an array of numpy has an unknown state")
    return _content(parts[1], parts[0], bool(parts[2]), parts[3])


def read_buffer(data: object, dtype: object, shape: object, order: object = "C", axes: Any = None) -> ArrayContent:
    """Return the content of an array that a pickle makes of a buffer, with the arguments of numpy."""
    if not isinstance(dtype, ArrayDType) or order not in ("C", "F", "K") or (axes is None) != (order != "K"):
        raise FormatError("corrupt pickle: an array of numpy in an unknown order")
    made = _content(dtype, shape, order == "F", data)
    if axes is None:
        return made
    is_plain = isinstance(axes, tuple) and all(type(axis) is int for axis in axes)
    if not is_plain or sorted(axes) != list(range(len(made.shape))):
        raise FormatError("corrupt pickle: the axes of an array of numpy are not a permutation")
    turned = tuple(made.stride[axis] for axis in axes) if made.data is not None else ()
    return replace(made, shape=tuple(made.shape[axis] for axis in axes), stride=turned)


def _content(dtype: ArrayDType, shape: object, is_fortran: bool, data: object) -> ArrayContent:
    if not isinstance(shape, tuple) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise FormatError("corrupt pickle: the shape of an array of numpy is not a tuple of sizes")
    if len(shape) > _MOST_DIMENSIONS or math.prod(size or 1 for size in shape) >= 2**63:
        raise FormatError(f"corrupt pickle: the shape {str(list(shape))[:80]} of an array overflows")
    if not dtype.code:
        return ArrayContent(dtype, shape)
    if isinstance(data, str):  # a string of Python 2 that happens to be text
        data = data.encode("utf-8")
    region = InMemory(memoryview(data)) if isinstance(data, bytes | bytearray) else data
    if not isinstance(region, InMemory | Extent):
        raise FormatError(f"corrupt pickle: the elements of an array are a {type(data).__name__}, not bytes")
    expected = math.prod(shape) * DTYPES[dtype.code].bits // 8
    if region.nbytes != expected:
        raise FormatError(f"corrupt pickle: an array of shape {list(shape)} has {region.nbytes} of {expected} bytes")
    width = DTYPES[dtype.code].part_bytes
    stride = row_major(shape[::-1])[::-1] if is_fortran else row_major(shape)
    return ArrayContent(dtype, shape, stride, _little_endian(region, width) if dtype.is_big_endian else region)


def _little_endian(region: InMemory | Extent, width: int) -> Region:
    if width == 1:
        return region
    if isinstance(region, Extent):
        return ByteSwapped(region, width)
    numbers = array.array(_WORDS[width], bytes(region.data))
    numbers.byteswap()
    return InMemory(memoryview(numbers.tobytes()))


def read_scalar(dtype: object, data: object = None) -> object:
    """Return the number in a numpy scalar, or None for a scalar that is not a plain number."""
    layout = _FORMATS.get(dtype.code) if isinstance(dtype, ArrayDType) else None
    if layout is None or not isinstance(dtype, ArrayDType):
        return None
    raw = data.encode("utf-8") if isinstance(data, str) else data
    if not isinstance(raw, bytes):
        return None
    numbers = struct.unpack((">" if dtype.is_big_endian else "<") + layout, raw)
    return complex(*numbers) if len(numbers) == 2 else numbers[0]
