"""numpy's files: ``.npy`` with one array, ``.npz`` with one in each entry of a zip archive. No array is unpickled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ckptkit.core.checkpoint import (
    DTYPES,
    Checkpoint,
    Entry,
    Payload,
    Record,
    TensorInfo,
    View,
    is_contiguous,
    row_major,
)
from ckptkit.core.files import Extent, Inflated, LocalFile, Swapped
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError
from ckptkit.formats.layout import Strided
from ckptkit.formats.npy_header import HEAD, MAGIC, NpyHeader, parse_npy_header
from ckptkit.formats.zip_archive import ZipDirectory

__all__ = ["open_npy", "open_npz"]


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of numbers, and where the bytes of its elements lie, in the order of the file."""

    info: TensorInfo
    place: Extent | Inflated
    swapped: bool

    def stored(self) -> Extent | Inflated | Swapped:
        """Return the elements in the order of the file, as little-endian numbers."""
        width = DTYPES[self.info.dtype].part_bytes
        return Swapped(self.place, width) if self.swapped and width > 1 else self.place

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
        lambda info: arrays[info.key].payload(),
        path=file.path,
        format=format,
        entries=entries,
        warnings=warnings,
        span=lambda info: arrays[info.key].stored(),
        records=records,
        files=[file.path],
        check=file.check_unchanged,
        close=file.close,
    )
