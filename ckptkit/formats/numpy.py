"""Read ``.npy`` files with one array and ``.npz`` archives of such files. No array is unpickled."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ckptkit.core.checkpoint import (
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
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import ByteSwapped, Extent, Inflated
from ckptkit.core.files.source import ByteSource
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError
from ckptkit.formats.layout import Strided
from ckptkit.formats.numpy_dtypes import DTYPE_CODES, OTHER_KINDS
from ckptkit.formats.zip_archive import MORE, ZipDirectory

__all__ = ["HEAD", "MAGIC", "NpyHeader", "open_npy", "open_npz", "parse_npy_header"]


MAGIC = b"\x93NUMPY"
_LONGEST = 10_000  # the limit of numpy itself
HEAD = 12 + _LONGEST  # bytes that hold every valid header
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


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """The header of a ``.npy`` file. The data begin at byte ``start``.

    ``dtype`` is a safetensors code, or empty where the elements are not plain numbers: then ``kind`` and ``reason``
    describe the elements. ``big_endian`` is the byte order; with ``fortran`` the first dimension varies fastest.
    """

    start: int
    dtype: str = ""
    shape: tuple[int, ...] = ()
    fortran: bool = False
    big_endian: bool = False
    kind: str = ""
    reason: str = ""


def parse_npy_header(head: bytes, what: str) -> NpyHeader:
    """Return the header of a file that begins with the bytes ``head``: ``HEAD`` bytes, or the whole file.

    ``what`` names the array in errors. Raises ``FormatError`` for a header that numpy does not write.
    """
    width = _LENGTH_BYTES.get(head[6:8])
    if not head.startswith(MAGIC) or len(head) < 8:
        raise FormatError(f"{what} is not a .npy file: it begins with {head[:8].hex(' ') or 'nothing'}")
    if width is None:
        raise FormatError(f"{what} has version {head[6]}.{head[7]} of the .npy format; 1.0 to 3.0 are supported")
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
    return _parse_fields(text, start + size, what)


def _parse_fields(text: str, start: int, what: str) -> NpyHeader:
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
    return _header_of_dtype(found["descr"], start, shape, found["fortran_order"] == "True", what)


def _header_of_dtype(descr: str, start: int, shape: tuple[int, ...], fortran: bool, what: str) -> NpyHeader:
    order, name = descr[:1], descr[1:]
    code = DTYPE_CODES.get(name, "")
    if code and (order in ("<", ">") or (order == "|" and name.endswith("1"))):
        return NpyHeader(start, code, shape, fortran, big_endian=order == ">")
    if order in ("<", ">", "|", "=") and name[:1] in OTHER_KINDS:
        kind, reason = OTHER_KINDS[name[:1]]
        return NpyHeader(start, "", shape, fortran, kind=kind, reason=reason)
    if order in ("<", ">") and name in ("f12", "f16", "c24", "c32"):
        reason = "numbers in a format of the machine that wrote them"
        return NpyHeader(start, "", shape, fortran, kind="long double", reason=reason)
    raise FormatError(f"{what} has the unknown dtype {quoted(descr[:40])}")


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of numbers, and the range of its bytes, in the order of the file."""

    info: TensorInfo
    data: Extent | Inflated
    big_endian: bool

    def stored(self) -> Extent | Inflated | ByteSwapped:
        """Return the elements in the order of the file, as little-endian numbers."""
        width = DTYPES[self.info.dtype].part_bytes
        return ByteSwapped(self.data, width) if self.big_endian and width > 1 else self.data

    def payload(self) -> Payload:
        """Return the elements in row-major order."""
        return self.stored() if is_contiguous(self.info) else Strided(self.stored(), self.info)


def open_npy(file: ByteSource) -> Checkpoint:
    """Return the Checkpoint of a ``.npy`` file: one tensor with an empty key. The Checkpoint closes the file.

    Raises ``FormatError`` where the array is cut off, or its elements are not plain numbers.
    """
    header = parse_npy_header(file.read(0, min(file.size, HEAD)), "the file")
    if not header.dtype:
        raise FormatError(f"an array of {header.reason}")
    array = _array("", header, 0, Extent(file, 0, file.size))
    after = file.size - header.start - array.info.nbytes
    if after < 0:
        raise FormatError(
            f"truncated: {-after:,} of {file.size - after:,} bytes are missing at the end",
            hint="download or copy it again",
        )
    warnings = []
    if after:
        is_array = file.read(file.size - after, min(after, len(MAGIC))) == MAGIC
        content = " (more arrays)" if is_array else ""
        warnings.append(f"not read: {plural(after, 'byte')} after the array{content}")
    return _checkpoint(file, {"": array}, format="npy", warnings=warnings)


def open_npz(archive: ZipDirectory) -> Checkpoint:
    """Return the Checkpoint of a ``.npz`` archive, with keys without ``.npy``. The Checkpoint closes the file.

    Arrays of other elements than plain numbers are entries. Raises ``FormatError`` where an array is cut off.
    """
    arrays: dict[str, _Array] = {}
    entries: list[Entry] = []
    warnings = []
    if archive.file.is_remote:
        archive.will_read(archive.entries, HEAD + MORE)
    for number, (name, entry) in enumerate(archive.entries.items()):
        key = name.removesuffix(".npy")
        header = parse_npy_header(archive.head(name, HEAD), quoted(name))
        if not header.dtype:
            entries.append(Entry(key, f"{header.kind} array", header.reason))
            continue
        arrays[key] = _array(key, header, number, archive.region(name))
        after = entry.size - header.start - arrays[key].info.nbytes
        if after < 0:
            needed, given = arrays[key].info.nbytes, entry.size - header.start
            raise FormatError(
                f"{quoted(key)}: {arrays[key].info} needs {needed:,} bytes, and {given:,} follow its header"
            )
        if after:
            warnings.append(f"{quoted(name)}: not read: {plural(after, 'byte')} after the array")

    def records() -> Iterator[Record]:
        return archive.records({f"{key}.npy": [key] for key in arrays})

    return _checkpoint(archive.file, arrays, format="npz", entries=entries, warnings=warnings, records=records)


def _array(key: str, header: NpyHeader, storage: int, region: Extent | Inflated) -> _Array:
    info = TensorInfo(key, header.dtype, header.shape)
    if header.fortran:
        transposed = replace(info, view=View(storage, 0, row_major(header.shape[::-1])[::-1]))
        info = info if is_contiguous(transposed) else transposed
    return _Array(info, region.slice(header.start, info.nbytes), header.big_endian)


def _checkpoint(
    file: ByteSource,
    arrays: dict[str, _Array],
    *,
    format: str,  # noqa: A002 - the name of the JSON field
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
