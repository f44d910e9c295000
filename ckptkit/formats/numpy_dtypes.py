"""Name the dtypes of numpy by their safetensors codes."""

from __future__ import annotations

from typing import Final

__all__ = ["DTYPE_CODES", "OTHER_KINDS", "SCALAR_CODES"]

DTYPE_CODES: Final = {
    "b1": "BOOL", "i1": "I8", "u1": "U8", "i2": "I16", "u2": "U16", "i4": "I32", "u4": "U32", "i8": "I64", "u8": "U64",
    "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "c16": "C128",
}  # fmt: skip
OTHER_KINDS: Final = {
    "O": ("object", "pickles, which are not read"),
    "S": ("text", "bytes, not numbers"),
    "U": ("text", "characters, not numbers"),
    "M": ("datetime", "dates, not numbers"),
    "m": ("datetime", "times, not numbers"),
    "V": ("void", "bytes of an unnamed type, as numpy writes bfloat16"),
}
# The classes of ml_dtypes, with which JAX extends numpy.
SCALAR_CODES: Final = {
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
