"""The header of a ``.npy`` file, read without evaluating it: a dict literal of three known fields, and nothing else."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from ckptkit.core.text import quoted
from ckptkit.errors import FormatError

__all__ = ["HEAD", "MAGIC", "NpyHeader", "parse_npy_header"]

MAGIC = b"\x93NUMPY"
_LONGEST = 10_000  # the limit of numpy itself
HEAD = 12 + _LONGEST  # in this many bytes a header ends, or is none
_MOST_DIMENSIONS = 64
_LENGTH_BYTES: Final = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}
_BLANKS = " \t\n"
_FIELD = re.compile(
    r"""[ \t\n]*(?P<quote>['"])(?P<name>descr|fortran_order|shape)(?P=quote)[ \t\n]*:[ \t\n]*
    (?: (?P<flag>True|False)
      | \((?P<sizes>(?:[ \t\n]*(?:0|[1-9][0-9]{0,18})L?[ \t\n]*,)*(?:[ \t\n]*(?:0|[1-9][0-9]{0,18})L?)?[ \t\n]*)\)
      | (?P<mark>['"])(?P<text>[^'"\\]*)(?P=mark)
      | (?P<nested>[\[(])
    )(?:[ \t\n]*(?:,|\Z)[ \t\n]*|(?<=[\[(]))""",
    re.VERBOSE,
)
_CODES: Final = {
    "b1": "BOOL", "i1": "I8", "u1": "U8", "i2": "I16", "u2": "U16", "i4": "I32", "u4": "U32", "i8": "I64", "u8": "U64",
    "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "c16": "C128",
}  # fmt: skip
_OTHERS: Final = {
    "O": ("object", "pickles, which are not read"),
    "S": ("text", "bytes, and no numbers"),
    "U": ("text", "characters, and no numbers"),
    "M": ("datetime", "dates, and no numbers"),
    "m": ("datetime", "times, and no numbers"),
    "V": ("void", "bytes of a type that is not told, as numpy writes bfloat16"),
}


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """What a ``.npy`` file says of its array, whose data begin at byte ``start``.

    ``dtype`` is a safetensors code, or empty: then ``kind`` and ``reason`` say what the elements are instead.
    ``swapped`` says that numbers are big-endian, ``fortran`` that the first dimension varies fastest.
    """

    start: int
    dtype: str = ""
    shape: tuple[int, ...] = ()
    fortran: bool = False
    swapped: bool = False
    kind: str = ""
    reason: str = ""


def parse_npy_header(head: bytes, what: str) -> NpyHeader:
    """Return the header at the beginning of a file, of which ``head`` are the first bytes (``HEAD``, or all).

    ``what`` names the array in messages. Raises ``FormatError`` where it is none that numpy writes.
    """
    width = _LENGTH_BYTES.get(head[6:8])
    if not head.startswith(MAGIC) or len(head) < 8:
        raise FormatError(f"{what} is no .npy file: it begins with {head[:8].hex(' ') or 'nothing'}")
    if width is None:
        raise FormatError(f"{what} has version {head[6]}.{head[7]} of the .npy format, and 1.0 to 3.0 are known")
    start = 8 + width
    size = int.from_bytes(head[8:start], "little")
    if size > _LONGEST:
        raise FormatError(f"{what} has a header of {size:,} bytes, more than the limit of {_LONGEST:,}")
    if start + size > len(head):
        raise FormatError(f"{what} ends within its header: truncated?", hint="download or copy it again")
    try:
        text = head[start : start + size].decode("utf-8" if head[6] == 3 else "latin-1").strip(_BLANKS)
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} has a header that is not UTF-8 at byte {error.start}") from None
    return _header(text, start + size, what)


def _header(text: str, start: int, what: str) -> NpyHeader:
    wrong = FormatError(f"{what} has a header that numpy does not write: {quoted(text[:80])}")
    if not text.startswith("{") or not text.endswith("}"):
        raise wrong
    found: dict[str, str] = {}
    at, end = 1, len(text) - 1
    while text[at:end].strip(_BLANKS):
        match = _FIELD.match(text, at, end)
        if match is None or match["name"] in found:
            raise wrong
        if match["nested"]:
            if match["name"] == "descr":
                return NpyHeader(start, kind="structured", reason="records of several fields")
            raise wrong
        kind = {"descr": "text", "fortran_order": "flag", "shape": "sizes"}[match["name"]]
        if match[kind] is None:
            raise wrong
        found[match["name"]] = match[kind]
        at = match.end()
    sizes = found.get("shape", "")
    if len(found) != 3 or (sizes.strip() and "," not in sizes):
        raise wrong
    shape = tuple(int(size.strip().removesuffix("L")) for size in sizes.split(",") if size.strip())
    if len(shape) > _MOST_DIMENSIONS or math.prod(size or 1 for size in shape) >= 2**63:
        raise FormatError(f"{what}: the shape {str(list(shape))[:80]} overflows")
    return _typed(found["descr"], start, shape, found["fortran_order"] == "True", what)


def _typed(descr: str, start: int, shape: tuple[int, ...], fortran: bool, what: str) -> NpyHeader:
    order, name = descr[:1], descr[1:]
    code = _CODES.get(name, "")
    if code and (order in ("<", ">") or (order == "|" and name.endswith("1"))):
        return NpyHeader(start, code, shape, fortran, swapped=order == ">")
    if order in ("<", ">", "|", "=") and name[:1] in _OTHERS:
        kind, reason = _OTHERS[name[:1]]
        return NpyHeader(start, "", shape, fortran, kind=kind, reason=reason)
    if order in ("<", ">") and name in ("f12", "f16", "c24", "c32"):
        return NpyHeader(start, "", shape, fortran, kind="long double", reason="numbers of this machine's own format")
    raise FormatError(f"{what} has the unknown dtype {quoted(descr[:40])}")
