"""numpy's files: ``.npy`` with one array, ``.npz`` with one in each entry of a zip archive. No array is unpickled."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ckptkit.core.checkpoint import (
    DTYPES,
    Access,
    Checkpoint,
    Description,
    Entry,
    Payload,
    Record,
    TensorInfo,
    View,
    is_contiguous,
    row_major,
)
from ckptkit.core.files import ByteSwapped, Extent, Inflated, LocalFile
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError
from ckptkit.formats.layout import Strided
from ckptkit.formats.zip_archive import ZipDirectory

__all__ = ["HEAD", "MAGIC", "NpyHeader", "open_npy", "open_npz", "parse_npy_header"]


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


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of numbers, and where the bytes of its elements lie, in the order of the file."""

    info: TensorInfo
    place: Extent | Inflated
    swapped: bool

    def stored(self) -> Extent | Inflated | ByteSwapped:
        """Return the elements in the order of the file, as little-endian numbers."""
        width = DTYPES[self.info.dtype].part_bytes
        return ByteSwapped(self.place, width) if self.swapped and width > 1 else self.place

    def payload(self) -> Payload:
        """Return the elements in row-major order."""
        return self.stored() if is_contiguous(self.info) else Strided(self.stored(), self.info)


def open_npy(file: LocalFile) -> Checkpoint:
    """Return the Checkpoint of a ``.npy`` file: one tensor, without a name; takes over the file.

    Raises ``FormatError`` where the array is cut off, or its elements are no plain numbers.
    """
    header = parse_npy_header(file.read(0, min(file.size, HEAD)), "the file")
    if not header.dtype:
        raise FormatError(f"an array of {header.reason}")
    array = _array("", header, 0, Extent(file, 0, file.size))
    behind = file.size - header.start - array.info.nbytes
    if behind < 0:
        raise FormatError(
            f"truncated: {-behind:,} of {file.size - behind:,} bytes are missing at the end",
            hint="download or copy it again",
        )
    warnings = []
    if behind:
        more = file.read(file.size - behind, min(behind, len(MAGIC))) == MAGIC
        warnings.append(f"{plural(behind, 'byte')} follow the array, {'more arrays, ' if more else ''}and are not read")
    return _checkpoint(file, {"": array}, format="npy", warnings=warnings)


def open_npz(archive: ZipDirectory) -> Checkpoint:
    """Return the Checkpoint of a ``.npz`` archive, its names without ``.npy``; takes over its file.

    Arrays of anything but plain numbers are listed as entries. Raises ``FormatError`` where an array is cut off.
    """
    arrays: dict[str, _Array] = {}
    entries: list[Entry] = []
    warnings = []
    for number, (name, entry) in enumerate(archive.entries.items()):
        key = name.removesuffix(".npy")
        header = parse_npy_header(archive.head(name, HEAD), quoted(name))
        if not header.dtype:
            entries.append(Entry(key, f"{header.kind} array", header.reason))
            continue
        arrays[key] = _array(key, header, number, archive.region(name))
        behind = entry.size - header.start - arrays[key].info.nbytes
        if behind < 0:
            needed, given = arrays[key].info.nbytes, entry.size - header.start
            raise FormatError(
                f"{quoted(key)}: {arrays[key].info} needs {needed:,} bytes, and {given:,} follow its header"
            )
        if behind:
            warnings.append(f"{quoted(name)}: {plural(behind, 'byte')} follow the array, and are not read")

    def records() -> Iterator[Record]:
        return archive.records({f"{key}.npy": [key] for key in arrays})

    return _checkpoint(archive.file, arrays, format="npz", entries=entries, warnings=warnings, records=records)


def _array(key: str, header: NpyHeader, storage: int, region: Extent | Inflated) -> _Array:
    info = TensorInfo(key, header.dtype, header.shape)
    if header.fortran:
        turned = replace(info, view=View(storage, 0, row_major(header.shape[::-1])[::-1]))
        info = info if is_contiguous(turned) else turned
    return _Array(info, region.slice(header.start, info.nbytes), header.swapped)


def _checkpoint(
    file: LocalFile,
    arrays: dict[str, _Array],
    *,
    format: str,  # noqa: A002 - the field's word
    entries: Sequence[Entry] = (),
    warnings: Sequence[str],
    records: Callable[[], Iterable[Record]] | None = None,
) -> Checkpoint:
    return Checkpoint(
        {key: array.info for key, array in arrays.items()},
        Access(
            payload=lambda info: arrays[info.key].payload(),
            span=lambda info: arrays[info.key].stored(),
            records=records,
            check=file.check_unchanged,
            close=file.close,
        ),
        Description(file.path, format, files=[file.path], entries=entries, warnings=warnings),
    )
