"""Read the directory of a zip archive strictly: every contradiction inside the file is an error.

Lenient readers read different bytes of a contradictory file, so a scanner and a loader can see different content.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ckptkit.core.checkpoint import MOST_TENSORS, Record
from ckptkit.core.files.payloads import Extent, Inflated
from ckptkit.core.files.source import ByteSource
from ckptkit.core.files.starts import LateStarts
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, printable, quoted
from ckptkit.errors import FormatError
from ckptkit.formats import codes

__all__ = ["MORE", "ZipDirectory", "ZipEntry", "read_zip_directory"]

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LARGEST_DIRECTORY = 256 << 20
_MOST_ENTRIES = MOST_TENSORS + 10_000  # each entry needs memory and one read
_ALWAYS_INFLATED = 1 << 20  # bytes; a larger entry must not exceed the largest ratio
_LARGEST_RATIO = 100  # repetitive JSON is deflated seventyfold
MORE = 1024  # bytes: content that deflate cannot shrink is stored with a few extra bytes
_LONGEST_TEXT = 1000
_LONGEST_END = 65557  # bytes of the end of an archive, with its comment
_LONGEST_EXTRA = 256  # the name of an entry, and the padding before its content
_MOST_AHEAD = 16 << 20
# What readers read at once when they open an archive.
_DESCRIBING = frozenset({"data.pkl", "constants.pkl", "byteorder", "version", "archive_format", "archive_version"})
_CONFIGURATION = "_config.json"
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x1 | 0x40
_DESCRIPTOR = 0x8
_DOS_DIRECTORY = 0x10


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One file in the archive, as the central directory describes it."""

    name: str
    method: int
    crc: int  # zero means none, as torch writes it (torch.serialization.set_crc32_options)
    packed: int  # bytes in the archive
    size: int  # bytes after inflating
    header: int  # offset of the local header


@dataclass(frozen=True, slots=True)
class ZipDirectory:
    """The entries of an archive by name, and the offset at which the bytes of each begin."""

    file: ByteSource
    entries: dict[str, ZipEntry]
    starts: Mapping[str, int]  # in the order of the file
    ends: Callable[[str], int]  # where the next entry begins, or the directory

    def roots(self, name: str) -> list[str]:
        """Return the folder of each entry of this name: an empty string, or one folder with a slash."""
        return [entry.removesuffix(name) for entry in self.entries if entry == name
                or (entry.endswith(f"/{name}") and entry.count("/") == 1)]  # fmt: skip

    def will_read(self, names: Iterable[str], most: int = _MOST_AHEAD) -> None:
        """Say that the first ``most`` bytes of these entries, with the headers in front of them, are read next."""
        entries = sorted((self.entries[name] for name in names if name in self.entries), key=lambda entry: entry.header)
        self.file.will_read(
            [
                (entry.header, min(self.ends(entry.name) - entry.header, _LOCAL.size + _LONGEST_EXTRA + most))
                for entry in entries
            ]
        )

    def region(self, name: str) -> Extent | Inflated:
        """Return the content of an entry, without reading it."""
        entry = self.entries[name]
        if entry.method == _STORED:
            return Extent(self.file, self.starts[name], entry.size, entry.crc or None)
        return Inflated(Extent(self.file, self.starts[name], entry.packed), entry.size, 0, entry.size)

    def head(self, name: str, count: int) -> bytes:
        """Return the first ``count`` bytes of an entry, or all bytes of a shorter entry, inflating no more."""
        entry = self.entries[name]
        packed = self.file.read(self.starts[name], min(entry.packed, count + MORE))
        if entry.method == _STORED:
            return packed[:count]
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, count)
        except zlib.error as error:
            raise FormatError(f"zip entry {quoted(name)}: compressed data is damaged: {error}") from None

    def read(self, name: str, most: int, *, ratio: int = _LARGEST_RATIO) -> bytes:
        """Return the whole content of an entry.

        Raises ``FormatError`` where the entry is damaged or has more than ``most`` bytes. Raises it too for a zip bomb,
        a large entry that inflates to more than ``ratio`` times its compressed bytes.
        """
        entry = self.entries[name]
        short = printable(name.rpartition("/")[2])
        if entry.size > most:
            raise FormatError(f"{short} has {entry.size} bytes, more than the limit of {most}")
        if entry.size > max(_ALWAYS_INFLATED, ratio * entry.packed):
            raise FormatError(f"{short} would inflate from {entry.packed} to {entry.size} bytes: a zip bomb")
        content = io.BytesIO()  # it grows in place, and hands over its memory; joined pieces would take twice as much
        content.writelines(self.region(name).chunks())
        data = content.getvalue()
        if entry.crc and zlib.crc32(data) != entry.crc:
            raise FormatError(f"{short} does not match its checksum: damaged")
        return data

    def text(self, name: str) -> str | None:
        """Return the content of a short entry as stripped text, or None where the archive has no such entry."""
        if name not in self.entries:
            return None
        if self.entries[name].size > _LONGEST_TEXT:
            raise FormatError(f"zip entry {quoted(name)} has {self.entries[name].size} bytes")
        return self.read(name, _LONGEST_TEXT).decode("ascii", "replace").strip()

    def warnings(self, *folders: str) -> list[str]:
        """Return a warning if tensors in ``folders`` are compressed, and one if the archive has no checksums."""
        warnings: list[str] = []
        if any(entry.method for name, entry in self.entries.items() if name.startswith(folders)):
            text = "the archive is compressed: tensors are inflated while they are read"
            warnings.append(ReaderWarning(text, codes.COMPRESSED))
        checksums = [entry.crc for entry in self.entries.values() if entry.size]
        if not any(checksums):
            text = "no checksums in the archive (torch.serialization.set_crc32_options): damage cannot be detected"
            warnings.append(ReaderWarning(text, codes.NO_CHECKSUM))
        return warnings

    def records(self, keys: Mapping[str, Sequence[str]]) -> Iterator[Record]:
        """Yield every entry in the order of the file; ``keys`` maps the name of an entry to the keys of its tensors."""
        for name in self.starts:
            yield Record(
                self.file.path, name, self.region(name), self.entries[name].crc or None, tuple(keys.get(name, ()))
            )


def read_zip_directory(file: ByteSource) -> ZipDirectory:
    """Return the directory of the archive that begins at byte 0.

    Raises ``FormatError`` where the archive is truncated, contradicts itself or uses an unsupported feature.
    """
    count, offset, size, end = _find_end(file)
    if size > _LARGEST_DIRECTORY:
        raise FormatError(f"the zip directory has {size} bytes, more than the limit of {_LARGEST_DIRECTORY}")
    if count > _MOST_ENTRIES:
        raise FormatError(f"the zip directory has {count:,} entries, more than the limit of {_MOST_ENTRIES:,}")
    if offset + size > end:
        raise FormatError("the zip directory is beyond the end of the archive")
    entries = _central(file.read(offset, size), count)
    directory = _in_order(file, entries, offset)
    if file.is_remote:
        directory.will_read(
            name for name in entries if name.rpartition("/")[2] in _DESCRIBING or name.endswith(_CONFIGURATION)
        )
    return directory


def _find_end(file: ByteSource) -> tuple[int, int, int, int]:
    start = max(file.size - _LONGEST_END, 0)
    tail = file.read(start, file.size - start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise FormatError(
            "the zip archive has no directory at its end, so it is probably truncated", hint="download or copy it again"
        )
    _, disk, first_disk, here, count, size, offset, comment = _END.unpack_from(tail, at)
    after = len(tail) - at - _END.size - comment
    if after:
        what = f"{after} bytes follow" if after > 0 else "the comment is cut off at"
        raise FormatError(f"{what} the end of the zip archive")
    end = start + at
    if 0xFFFF in (count, here) or 0xFFFFFFFF in (size, offset):
        if end < _LOCATOR64.size:
            raise FormatError("a zip archive with sizes of zip64 and no zip64 directory")
        magic, _, where, _ = _LOCATOR64.unpack(file.read(end - _LOCATOR64.size, _LOCATOR64.size))
        if magic == b"PK\6\7":
            if where + _END64.size > end:
                raise FormatError("the zip64 directory is beyond the end of the archive")
            magic, _, _, _, disk, first_disk, here, count, size, offset = _END64.unpack(file.read(where, _END64.size))
            if magic != b"PK\6\6":
                raise FormatError("the zip64 directory is not where the archive says")
            end = where
    if disk or first_disk or here != count:
        raise FormatError("a zip archive split into several files")
    return count, offset, size, end


def _central(data: bytes, count: int) -> dict[str, ZipEntry]:
    entries: dict[str, ZipEntry] = {}
    pos = 0
    for _ in range(count):
        if pos + _CENTRAL.size > len(data) or data[pos : pos + 4] != b"PK\1\2":
            raise FormatError(f"the zip directory ends after {len(entries)} of {plural(count, 'entry', 'entries')}")
        (
            _,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            name_len,
            extra_len,
            comment_len,
            _,
            _,
            attributes,
            header,
        ) = _CENTRAL.unpack_from(data, pos)
        pos += _CENTRAL.size
        raw = data[pos : pos + name_len]
        extra = data[pos + name_len : pos + name_len + extra_len]
        pos += name_len + extra_len + comment_len
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"a zip entry has a name that is not UTF-8: {raw[:40]!r}") from None
        if 0xFFFFFFFF in (packed, size, header):
            size, packed, header = _zip64(extra, name, size, packed, header)
        entry = ZipEntry(name, method, crc, packed, size, header)
        _check_entry(entry, flags, attributes)
        if name in entries:
            raise FormatError(f"two zip entries are called {quoted(name)}")
        entries[name] = entry
    if pos != len(data):
        raise FormatError("the zip directory holds more than its entries")
    return entries


def _zip64(extra: bytes, name: str, size: int, packed: int, header: int) -> tuple[int, int, int]:
    pos = 0
    while pos + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, pos)
        if tag == 1:
            field = extra[pos + 4 : pos + 4 + length]
            values = [size, packed, header]
            at = 0
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    if at + 8 > len(field):
                        break
                    (values[index],) = struct.unpack_from("<Q", field, at)
                    at += 8
            else:
                return values[0], values[1], values[2]
        pos += 4 + length
    raise FormatError(f"zip entry {quoted(name)}: its 64-bit sizes are missing")


def _check_entry(entry: ZipEntry, flags: int, attributes: int) -> None:
    name = entry.name
    if not name or "\\" in name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise FormatError(f"a zip entry has the unsafe name {quoted(name)}")
    if flags & _ENCRYPTED:
        raise FormatError(f"zip entry {quoted(name)} is encrypted")
    if entry.method not in (_STORED, _DEFLATED):
        raise FormatError(f"zip entry {quoted(name)}: compression method {entry.method} is not supported")
    if entry.method == _STORED and entry.packed != entry.size:
        raise FormatError(f"zip entry {quoted(name)} is stored with {entry.packed} bytes and says {entry.size}")
    if attributes & _DOS_DIRECTORY and entry.size:
        raise FormatError(f"zip entry {quoted(name)} is marked as a directory and has content")


def _in_order(file: ByteSource, entries: dict[str, ZipEntry], limit: int) -> ZipDirectory:
    """Return the directory with the entries in the order of the file, of which none overlaps the next."""
    order = sorted(entries.values(), key=lambda entry: entry.header)
    following = [*order[1:], None]
    if not file.is_remote:
        found = {}
        for entry, after in zip(order, following, strict=True):
            raw = entry.name.encode()
            data = file.read(*_front(entry, raw, limit))
            found[entry.name] = _start(entry, raw, data, after, limit)
        return ZipDirectory(file, entries, found, lambda _: limit)
    after_each = {entry.name: after for entry, after in zip(order, following, strict=True)}
    for entry, after in pairwise(order):
        if entry.header + _LOCAL.size + len(entry.name.encode()) + entry.packed > after.header:
            raise _overlap(after)
    starts = LateStarts(
        file,
        after_each,
        lambda name: _front(entries[name], name.encode(), limit),
        lambda name, data: _start(entries[name], name.encode(), data, after_each[name], limit),
    )
    return ZipDirectory(
        file, entries, starts, lambda name: limit if (after := after_each[name]) is None else after.header
    )


def _front(entry: ZipEntry, raw: bytes, limit: int) -> tuple[int, int]:
    """Return the offset and the number of bytes of the local header of an entry."""
    count = _LOCAL.size + len(raw)
    if entry.header + count > limit:
        raise FormatError(f"zip entry {quoted(entry.name)} is beyond the end of the archive")
    return entry.header, count


def _overlap(entry: ZipEntry) -> FormatError:
    return FormatError(f"zip entry {quoted(entry.name)} overlaps the one before it")


def _start(entry: ZipEntry, raw: bytes, data: bytes, after: ZipEntry | None, limit: int) -> int:
    """Return the offset of the content of an entry; ``data`` is the local header, which must agree with the directory.

    Raises ``FormatError``.
    """
    magic, _, flags, method, _, _, *stated, name_len, extra_len = _LOCAL.unpack_from(data)
    if magic != b"PK\3\4" or name_len != len(raw) or data[_LOCAL.size :] != raw:
        raise FormatError(f"zip entry {quoted(entry.name)}: directory and local header disagree on its name")
    if method != entry.method or flags & _ENCRYPTED:
        raise FormatError(f"zip entry {quoted(entry.name)}: directory and local header disagree on its method")
    # The local header leaves these fields empty where a data descriptor follows; zip64 fills them with ones.
    empty = flags & _DESCRIPTOR or not any(stated) or 0xFFFFFFFF in stated[1:]
    if not empty and stated != [entry.crc, entry.packed, entry.size]:
        raise FormatError(f"zip entry {quoted(entry.name)}: directory and local header disagree on its size")
    start: int = entry.header + _LOCAL.size + name_len + extra_len
    if start + entry.packed > limit:
        raise FormatError(f"zip entry {quoted(entry.name)} ends beyond the archive")
    if after is not None and start + entry.packed > after.header:
        raise _overlap(after)
    return start
