"""Guess from the first bytes of a file which bytes its reader asks for next, so that they come without delay."""

from __future__ import annotations

__all__ = ["asked_next"]

_MOST = 8 << 20  # bytes of a header that are fetched unasked
_ZIP_END = 256 << 10  # holds the directory of some thousand entries; a reader looks for it in the last 64 KiB


def asked_next(first: bytes, size: int, most: int = _MOST) -> tuple[int, int] | None:
    """Return the start and end of the range that is read after the first bytes, or None if it has more than ``most``.

    The end of a zip archive may be cut to ``most`` bytes, since a reader needs only a part of it.
    """
    have = len(first)
    if first.startswith(b"PK\3\4"):
        start = max(size - min(_ZIP_END, most), have)
        return (start, size) if start < size else None
    header = 8 + int.from_bytes(first[:8], "little")
    if first[8:9] == b"{" and have < header <= min(size, have + min(most, _MOST)):  # safetensors: a length, then JSON
        return have, header
    return None
