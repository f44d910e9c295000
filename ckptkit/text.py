"""Names from other people's files, made harmless to print and still exact."""

from __future__ import annotations

import unicodedata

__all__ = ["human_bytes", "plural", "printable", "quoted"]

# Cc control, Cf format (bidi, zero width), Cs lone surrogates, Co private use, Cn unassigned, Zl/Zp line breaks.
_HARMFUL = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_LONGEST = 400


def printable(name: str) -> str:
    r"""Return ``name`` with every character that could move a cursor, break a line or hide text escaped.

    A backslash becomes two, so the printed form can be read back without doubt. Very long names
    are cut in the middle and say so.
    """
    if len(name) > _LONGEST:
        cut = len(name) - _LONGEST
        return f"{printable(name[: _LONGEST // 2])}...<{cut} more characters>...{printable(name[-_LONGEST // 2 :])}"
    if name.isascii() and name.isprintable() and "\\" not in name:
        return name
    return "".join(_escape(char) for char in name)


def _escape(char: str) -> str:
    if char == "\\":
        return "\\\\"
    if unicodedata.category(char) not in _HARMFUL:
        return char
    code = ord(char)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def quoted(name: str) -> str:
    """Return ``name`` printable and in single quotes, for use inside a sentence."""
    return f"'{printable(name)}'"


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return ``1 tensor`` or ``1,234 tensors``."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def human_bytes(count: int) -> str:
    """Return a size in decimal units, as disks and downloads give it: ``248.0 kB``."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB", "TB", "PB", "EB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} ZB"
