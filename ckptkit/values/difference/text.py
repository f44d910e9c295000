"""The text of one element: the shortest that its dtype does not confuse with another."""

from __future__ import annotations

from ckptkit.values.arrays import array_of, float4_values, real_code

__all__ = ["text_of"]


def text_of(data: bytes, code: str) -> str:
    """Return the element of dtype ``code`` with these bytes, as text; an element of F4 is the upper half of a byte."""
    if code == "F4":
        return str(float(float4_values()[data[0] >> 4]))
    real = real_code(code)
    parts = [str(number) for number in array_of(data, real)]
    if len(parts) == 1:
        return parts[0]
    sign = "" if parts[1].startswith("-") else "+"
    return f"({parts[0]}{sign}{parts[1]}j)"
