"""What torch.export's schema says of a stored tensor, checked against the size of its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ckptkit.core.checkpoint import DTYPES, TensorInfo, View, reach
from ckptkit.core.text import quoted
from ckptkit.errors import FormatError

__all__ = ["CODES", "describe"]

_MOST_DIMENSIONS = 1024
_LARGEST_SIZE = 2**63
_LAYOUTS: Final = {1: "sparse", 2: "sparse", 3: "sparse", 4: "sparse", 5: "sparse", 6: "mkldnn", 7: "dense"}
# The numbers of ScalarType in the schema, which are not those of torch's own types.
CODES: Final = {
    1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 9: "C32", 10: "C64", 11: "C128",
    12: "BOOL", 13: "BF16", 28: "U16", 29: "F8_E4M3", 30: "F8_E5M2", 31: "F8_E4M3FNUZ", 32: "F8_E5M2FNUZ",
    33: "F8_E8M0", 34: "U32", 35: "U64",
}  # fmt: skip


def describe(key: str, payload: Mapping[str, Any], storage: int, size: int) -> TensorInfo:
    """Return the description of one tensor of a payload config, whose record number ``storage`` has ``size`` bytes.

    Raises ``FormatError`` where a field is missing or wrong, or the view reaches beyond the record.
    """
    meta = payload.get("tensor_meta")
    if not isinstance(meta, dict):
        raise FormatError(f"{quoted(key)}: its description has no tensor_meta")
    code, layout = meta.get("dtype"), meta.get("layout")
    if type(code) is not int or code not in CODES:
        raise FormatError(f"{quoted(key)}: its dtype {quoted(str(code)[:40])} is not known")
    if type(layout) is not int or layout not in _LAYOUTS:
        raise FormatError(f"{quoted(key)}: its layout {quoted(str(layout)[:40])} is not known")
    shape, stride = _integers(key, meta, "sizes"), _integers(key, meta, "strides")
    offset = _integer(key, meta.get("storage_offset"), "storage_offset")
    if math.prod(size or 1 for size in shape) >= _LARGEST_SIZE:
        raise FormatError(f"{quoted(key)}: the shape {str(list(shape))[:80]} overflows")
    pickled = payload.get("use_pickle")
    if type(pickled) is not bool:
        raise FormatError(f"{quoted(key)}: its description does not say whether it is a pickle")
    if pickled or _LAYOUTS[layout] != "dense":
        return TensorInfo(key, CODES[code], shape, kind="pickled" if pickled else _LAYOUTS[layout])
    if len(shape) != len(stride):
        raise FormatError(f"{quoted(key)}: {len(shape)} sizes and {len(stride)} strides")
    info = TensorInfo(key, CODES[code], shape, View(storage, offset, stride))
    if info.elements and not size:
        return TensorInfo(key, CODES[code], shape, kind="meta")  # a program exported with fake weights
    width = DTYPES[info.dtype].bits // 8
    if size % width:
        raise FormatError(f"{quoted(key)}: its record has {size} bytes, no multiple of the {width} of {info.dtype}")
    _, last = reach(info)
    if last > size:
        raise FormatError(f"{quoted(key)}: the view ends at byte {last} of its record, which has {size}")
    return info


def _integers(key: str, meta: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = meta.get(name)
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        raise FormatError(f"{quoted(key)}: its {name} are no list of up to {_MOST_DIMENSIONS} numbers")
    return tuple(_integer(key, value, name) for value in values)


def _integer(key: str, value: object, name: str) -> int:
    if isinstance(value, dict) and "as_expr" in value:
        raise FormatError(f"{quoted(key)}: its {name} depend on the program's input, and its bytes cannot")
    number = value.get("as_int") if isinstance(value, dict) else None
    if type(number) is not int or not 0 <= number < _LARGEST_SIZE:
        raise FormatError(f"{quoted(key)}: {quoted(str(value)[:80])} in its {name} is no size")
    return number
