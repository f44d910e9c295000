"""Read GGUF, the format of llama.cpp: metadata, descriptions of tensors, then the aligned bytes of the tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ckptkit.core.checkpoint import MOST_TENSORS, Access, Checkpoint, Description, Entry, Payload, Record, TensorInfo
from ckptkit.core.dtypes import BLOCK_TYPES, DTYPES
from ckptkit.core.files.payloads import Extent
from ckptkit.core.files.source import ByteSource
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.layout import only_listed_error

__all__ = ["Cursor", "Metadata", "open_gguf", "read_metadata"]


_WINDOW = 1 << 20
_LONGEST_NAME = 65_535
_LONGEST_SHOWN = 2000
_MOST_SHOWN = 16
_MOST_KEYS = 100_000
_MOST_ITEMS = 5_000_000  # strings and arrays inside arrays, which are skipped one by one
_DEEPEST = 8
_SMALLEST_PAIR = 13  # an empty key, its type, and a value of one byte
_SCALARS: Final = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", struct.Struct("<I")),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("uint64", struct.Struct("<Q")),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
_STRING, _ARRAY = 8, 9
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """Read a file forward through a window. Raises ``FormatError`` at the end of the file."""

    def __init__(self, file: ByteSource, start: int) -> None:
        """Start at byte ``start``."""
        self._file = file
        self._base = start  # offset of the window in the file
        self._window = b""
        self._at = 0
        self.items_left = _MOST_ITEMS

    @property
    def position(self) -> int:
        """Offset of the next byte."""
        return self._base + self._at

    @property
    def left(self) -> int:
        """Number of bytes until the end of the file."""
        return self._file.size - self.position

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        if self._at + count > len(self._window):
            self._refill(count)
        data = self._window[self._at : self._at + count]
        self._at += count
        return data

    def skip(self, count: int) -> None:
        """Skip ``count`` bytes without reading them."""
        if count > self.left:
            raise _cut_off()
        self._at += count

    def skip_strings(self, count: int) -> None:
        """Skip ``count`` strings, each of which follows its length."""
        unpack = _U64.unpack_from
        while count:
            self._refill(8)
            window, at = self._window, self._at
            last = len(window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self._at = at
            if self.left < 0:
                raise _cut_off()

    def _refill(self, count: int) -> None:
        if count > self.left:
            raise _cut_off()
        if self._at + count > len(self._window):
            self._base, self._at = self.position, 0
            self._window = self._file.read(self._base, min(max(count, _WINDOW), self._file.size - self._base))

    def u32(self) -> int:
        """Return the next four bytes as an unsigned number."""
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        """Return the next eight bytes as an unsigned number."""
        return int(_U64.unpack(self.take(8))[0])

    def name(self, what: str) -> str:
        """Return the next string, a name; ``what`` names it in errors."""
        size = self.u64()
        if size > min(_LONGEST_NAME, self.left):
            raise FormatError(f"{what} has a length of {size:,} bytes: damaged or truncated")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{what} is not UTF-8 at its byte {error.start}") from None


def _cut_off() -> FormatError:
    return FormatError("the header continues after the end of the file: truncated?", hint="download or copy it again")


class Metadata(NamedTuple):
    """The metadata of a GGUF file, and the alignment of its tensors in bytes."""

    entries: list[Entry]
    alignment: int


def read_metadata(cursor: Cursor, count: int) -> Metadata:
    """Return the next ``count`` keys and values; a long string or array becomes a short description.

    Raises ``FormatError`` where a value reaches beyond the file or has an unknown type, and for a repeated key.
    """
    if count > min(_MOST_KEYS, cursor.left // _SMALLEST_PAIR):
        raise FormatError(f"the header counts {plural(count, 'metadata key')}, more than fit into the file")
    entries: dict[str, Entry] = {}
    alignment = 32
    for number in range(1, count + 1):
        key = cursor.name(f"the name of metadata key {number}")
        if key in entries:
            raise FormatError(f"two metadata keys are called {quoted(key)}")
        kind = cursor.u32()
        value = _value(cursor, kind, key)
        entries[key] = Entry(key, _kind_name(kind, key), value, is_outside=True)
        if key == "general.alignment":
            if kind != 4 or not isinstance(value, int) or value.bit_count() != 1:
                raise FormatError(f"{quoted(key)} is {value}, not a uint32 power of two")
            alignment = value
    return Metadata(list(entries.values()), alignment)


def _kind_name(kind: int, key: str) -> str:
    if kind in _SCALARS:
        return _SCALARS[kind][0]
    if kind not in (_STRING, _ARRAY):
        raise FormatError(f"metadata key {quoted(key)} has a value of the unknown type {kind}")
    return "string" if kind == _STRING else "array"


def _value(cursor: Cursor, kind: int, key: str) -> object:
    if kind == _STRING:
        return _string(cursor)
    if kind == _ARRAY:
        return _array(cursor, key)
    _kind_name(kind, key)
    layout = _SCALARS[kind][1]
    (value,) = layout.unpack(cursor.take(layout.size))
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no infinity


def _string(cursor: Cursor) -> str:
    size = cursor.u64()
    if size > _LONGEST_SHOWN:
        cursor.skip(size)
        return f"a string of {plural(size, 'byte')}"
    try:
        return cursor.take(size).decode("utf-8")
    except UnicodeDecodeError:
        return f"{plural(size, 'byte')} that are not UTF-8"


def _array(cursor: Cursor, key: str) -> object:
    kind, count = cursor.u32(), cursor.u64()
    name = _kind_name(kind, key)
    if count <= _MOST_SHOWN and kind != _ARRAY:
        return [_value(cursor, kind, key) for _ in range(count)]
    _skip_items(cursor, kind, count, key, 1)
    return f"array of {plural(count, name)}"


def _skip_items(cursor: Cursor, kind: int, count: int, key: str, depth: int) -> None:
    name = _kind_name(kind, key)
    if kind in _SCALARS:
        cursor.skip(count * _SCALARS[kind][1].size)
        return
    least = 8 if kind == _STRING else 12
    if count * least > cursor.left:
        raise FormatError(f"metadata key {quoted(key)} counts {plural(count, name)}, more than fit into the file")
    cursor.items_left -= count
    if cursor.items_left < 0:
        raise FormatError(f"its metadata holds more than {_MOST_ITEMS:,} strings in arrays")
    if kind == _STRING:
        cursor.skip_strings(count)
        return
    if depth == _DEEPEST:
        raise FormatError(f"metadata key {quoted(key)} is nested too deeply: more than {_DEEPEST} arrays")
    for _ in range(count):
        _skip_items(cursor, cursor.u32(), cursor.u64(), key, depth + 1)


_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 64  # the format has four, and reserves more
_SMALLEST_INFO = 24  # a tensor without a name and without dimensions


# The missing numbers were removed from the format.
_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


class _StoredTensor(NamedTuple):
    """A tensor of the header: its description, and its offset in the data."""

    info: TensorInfo
    offset: int


def open_gguf(file: ByteSource) -> Checkpoint:
    """Return the Checkpoint in a GGUF file, with shapes in the order of torch; the Checkpoint closes the file.

    Plain numbers can be read. Quantised tensors are listed with their stored size and the type name of GGUF.
    Raises ``FormatError`` where the header contradicts itself or the file, or the version is unknown.
    """
    cursor = Cursor(file, 4)
    _check_version(cursor.take(4))
    tensors, keys = cursor.u64(), cursor.u64()
    metadata = read_metadata(cursor, keys)
    if tensors > MOST_TENSORS:
        raise FormatError(f"the header counts {tensors:,} tensors, more than the limit of {MOST_TENSORS:,}")
    if tensors > cursor.left // _SMALLEST_INFO:
        raise FormatError(f"the header counts {plural(tensors, 'tensor')}, more than fit into the file")
    stored: dict[str, _StoredTensor] = {}
    for number in range(1, tensors + 1):
        tensor = _read_tensor(cursor, number, metadata.alignment)
        if tensor.info.key in stored:
            raise FormatError(f"two tensors are called {quoted(tensor.info.key)}")
        stored[tensor.info.key] = tensor
    base = _aligned(cursor.position, metadata.alignment)
    end = _check_offsets(list(stored.values()), base, file.size)
    after = file.size - _aligned(end, metadata.alignment)
    warnings = _warnings(metadata.entries, stored, after)

    def payload(info: TensorInfo) -> Payload:
        if info.kind != "dense":
            raise only_listed_error(info, file.path)
        return Extent(file, base + stored[info.key].offset, info.nbytes)

    def span(info: TensorInfo) -> Payload | None:
        return payload(info) if info.kind == "dense" else None

    def records() -> Iterator[Record]:
        order = sorted(stored.values(), key=lambda tensor: tensor.offset)
        data_size = max(file.size - base, 0)
        for (info, offset), end in zip(order, [*(tensor.offset for tensor in order), data_size][1:], strict=True):
            # The size of an unknown type is unknown, so the record reaches to the next tensor.
            nbytes = max(min(end, data_size) - offset, 0) if info.kind == "unknown" else info.nbytes
            yield Record(file.path, info.key, Extent(file, base + offset, nbytes), keys=(info.key,))

    return Checkpoint(
        {key: tensor.info for key, tensor in stored.items()},
        Access(payload, span, records, file.check_unchanged, file.close),
        Description(file.path, "gguf", files=[file.path], entries=metadata.entries, warnings=warnings),
    )


def _check_version(raw: bytes) -> None:
    version = int.from_bytes(raw, "little")
    if version in _VERSIONS:
        return
    if int.from_bytes(raw, "big") in _VERSIONS:
        raise FormatError("a GGUF file for big-endian machines, which is not read", hint="convert the model again")
    hint = "the tools of llama.cpp write the current version" if version == 1 else None
    raise FormatError(f"a GGUF file of version {version}; versions 2 and 3 are supported", hint=hint)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _read_tensor(cursor: Cursor, number: int, alignment: int) -> _StoredTensor:
    key = cursor.name(f"the name of tensor {number}")
    dimensions = cursor.u32()
    if dimensions > _MOST_DIMENSIONS:
        raise FormatError(f"{quoted(key)}: a shape of {dimensions:,} dimensions")
    # The dimension that varies fastest is the first one here and the last one in torch.
    shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
    code, offset = cursor.u32(), cursor.u64()
    if math.prod(size or 1 for size in shape) >= 2**63:
        raise FormatError(f"{quoted(key)}: the shape {str(list(shape))[:80]} overflows")
    if offset % alignment:
        raise FormatError(f"{quoted(key)} begins at byte {offset} of the data, which is not a multiple of {alignment}")
    if code not in _TYPES:
        return _StoredTensor(TensorInfo(key, f"TYPE_{code}", shape, kind="unknown"), offset)
    kind = _TYPES[code]
    if kind in DTYPES:
        return _StoredTensor(TensorInfo(key, kind, shape), offset)
    row, block = shape[-1] if shape else 1, BLOCK_TYPES[kind]
    if row % block.elements:
        raise FormatError(f"{quoted(key)}: rows of {row} elements do not divide into {kind} blocks of {block.elements}")
    stored = math.prod(shape) // block.elements * block.nbytes
    return _StoredTensor(TensorInfo(key, kind, shape, kind="quantized", stored_bytes=stored), offset)


def _check_offsets(tensors: list[_StoredTensor], base: int, size: int) -> int:
    """Return the end of the last tensor.

    Raises ``FormatError`` where two tensors overlap, or a tensor ends after the end of the file.
    """
    end, last = base, ""
    for info, offset in sorted(tensors, key=lambda tensor: tensor.offset):
        start = base + offset
        if not info.nbytes and info.elements == 0:
            continue
        if start < end:
            raise FormatError(f"{quoted(info.key)} overlaps {quoted(last)}: it begins at byte {start - base} of the "
                              f"data, and {quoted(last)} ends at byte {end - base}")  # fmt: skip
        end, last = start + info.nbytes, info.key
    if end > size and last:
        raise FormatError(
            f"truncated: {end - size:,} of {end:,} bytes are missing at the end, in {quoted(last)}",
            hint="download or copy it again",
        )
    return min(end, size)


def _warnings(entries: list[Entry], stored: dict[str, _StoredTensor], after: int) -> list[str]:
    warnings: list[str] = []
    values = {entry.path: entry.value for entry in entries}
    parts, number = values.get("split.count"), values.get("split.no")
    if isinstance(parts, int) and isinstance(number, int) and parts > 1:
        text = f"this is part {number + 1} of {parts}: the tensors of the other parts are not listed"
        warnings.append(ReaderWarning(text, codes.PART_OF_SEVERAL))
    unknown = [tensor.info for tensor in stored.values() if tensor.info.kind == "unknown"]
    if unknown:
        what = plural(len(unknown), "tensor")
        warnings.append(f"{what} of an unknown type, and so of unknown size: {quoted(unknown[0].key)}")
    elif after > 0:
        warnings.append(f"not part of a tensor: {plural(after, 'byte')} after the last tensor")
    return warnings
