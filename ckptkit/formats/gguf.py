"""GGUF, the format of llama.cpp: a header of metadata and tensor descriptions, then the tensors, aligned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from ckptkit.core.checkpoint import DTYPES, Checkpoint, Entry, Payload, Record, TensorInfo
from ckptkit.core.files import Extent, LocalFile
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError
from ckptkit.formats.gguf_header import Cursor, read_metadata

__all__ = ["open_gguf"]

_VERSIONS = (2, 3)
_MOST_TENSORS = 1_000_000
_MOST_DIMENSIONS = 64  # the format has four, and keeps more for later
_SMALLEST_INFO = 24  # a tensor without a name and without dimensions


class _Type(NamedTuple):
    """A type of tensor: its name, and how many elements share a block of how many bytes."""

    name: str
    elements: int = 1
    nbytes: int = 0


# Numbers that are missing here were taken out of the format again.
_TYPES: Final = {
    0: _Type("F32"),
    1: _Type("F16"),
    2: _Type("Q4_0", 32, 18),
    3: _Type("Q4_1", 32, 20),
    6: _Type("Q5_0", 32, 22),
    7: _Type("Q5_1", 32, 24),
    8: _Type("Q8_0", 32, 34),
    9: _Type("Q8_1", 32, 40),
    10: _Type("Q2_K", 256, 84),
    11: _Type("Q3_K", 256, 110),
    12: _Type("Q4_K", 256, 144),
    13: _Type("Q5_K", 256, 176),
    14: _Type("Q6_K", 256, 210),
    15: _Type("Q8_K", 256, 292),
    16: _Type("IQ2_XXS", 256, 66),
    17: _Type("IQ2_XS", 256, 74),
    18: _Type("IQ3_XXS", 256, 98),
    19: _Type("IQ1_S", 256, 50),
    20: _Type("IQ4_NL", 32, 18),
    21: _Type("IQ3_S", 256, 110),
    22: _Type("IQ2_S", 256, 82),
    23: _Type("IQ4_XS", 256, 136),
    24: _Type("I8"),
    25: _Type("I16"),
    26: _Type("I32"),
    27: _Type("I64"),
    28: _Type("F64"),
    29: _Type("IQ1_M", 256, 56),
    30: _Type("BF16"),
    34: _Type("TQ1_0", 256, 54),
    35: _Type("TQ2_0", 256, 66),
    39: _Type("MXFP4", 32, 17),
    40: _Type("NVFP4", 64, 36),
    41: _Type("Q1_0", 128, 18),
}


class _Place(NamedTuple):
    """What the header says of a tensor: its description, and where in the data it begins."""

    info: TensorInfo
    offset: int


def open_gguf(file: LocalFile) -> Checkpoint:
    """Return the Checkpoint in a GGUF file, its shapes in torch's order; takes over the file.

    Plain numbers can be read; quantised tensors are listed with their stored size, by GGUF's own names.
    Raises ``FormatError`` where the header contradicts itself or the file, or the version is not known.
    """
    cursor = Cursor(file, 4)
    _check_version(cursor.take(4))
    tensors, keys = cursor.u64(), cursor.u64()
    metadata = read_metadata(cursor, keys)
    if tensors > min(_MOST_TENSORS, cursor.left // _SMALLEST_INFO):
        raise FormatError(f"claims {plural(tensors, 'tensor')}, more than it has room for")
    places: dict[str, _Place] = {}
    for number in range(1, tensors + 1):
        place = _place(cursor, number, metadata.alignment)
        if place.info.key in places:
            raise FormatError(f"two tensors are called {quoted(place.info.key)}")
        places[place.info.key] = place
    base = _aligned(cursor.position, metadata.alignment)
    end = _check_places(list(places.values()), base, file.size)
    behind = file.size - _aligned(end, metadata.alignment)
    warnings = _warnings(metadata.entries, places, behind)

    def payload(info: TensorInfo) -> Payload:
        if info.kind != "dense":
            raise FormatError(
                f"{quoted(info.key)} is a {info.kind} tensor: it is listed and cannot be read", path=file.path
            )
        return Extent(file, base + places[info.key].offset, info.nbytes)

    def span(info: TensorInfo) -> Payload | None:
        return payload(info) if info.kind == "dense" else None

    def records() -> Iterator[Record]:
        order = sorted(places.values(), key=lambda place: place.offset)
        room = max(file.size - base, 0)
        for (info, offset), end in zip(order, [*(place.offset for place in order), room][1:], strict=True):
            # Of a type that nobody knows the size is not told: all that lies before the next tensor is read.
            nbytes = max(min(end, room) - offset, 0) if info.kind == "unknown" else info.nbytes
            yield Record(file.path, info.key, Extent(file, base + offset, nbytes), keys=(info.key,))

    return Checkpoint(
        {key: place.info for key, place in places.items()},
        payload,
        path=file.path,
        format="gguf",
        entries=metadata.entries,
        warnings=warnings,
        span=span,
        records=records,
        files=[file.path],
        check=file.check_unchanged,
        close=file.close,
    )


def _check_version(raw: bytes) -> None:
    version = int.from_bytes(raw, "little")
    if version in _VERSIONS:
        return
    if int.from_bytes(raw, "big") in _VERSIONS:
        raise FormatError("a GGUF file for big-endian machines, which is not read", hint="convert the model again")
    hint = "llama.cpp's tools write today's version" if version == 1 else None
    raise FormatError(f"a GGUF file of version {version}, and versions 2 and 3 are read", hint=hint)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _place(cursor: Cursor, number: int, alignment: int) -> _Place:
    key = cursor.name(f"the name of tensor {number}")
    dimensions = cursor.u32()
    if dimensions > _MOST_DIMENSIONS:
        raise FormatError(f"{quoted(key)}: a shape of {dimensions:,} dimensions")
    # The dimension that varies fastest comes first here, and last in torch.
    shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
    code, offset = cursor.u32(), cursor.u64()
    if math.prod(size or 1 for size in shape) >= 2**63:
        raise FormatError(f"{quoted(key)}: the shape {str(list(shape))[:80]} overflows")
    if offset % alignment:
        raise FormatError(f"{quoted(key)} begins at byte {offset} of the data, which is no multiple of {alignment}")
    if code not in _TYPES:
        return _Place(TensorInfo(key, f"TYPE_{code}", shape, kind="unknown"), offset)
    kind = _TYPES[code]
    if kind.name in DTYPES:
        return _Place(TensorInfo(key, kind.name, shape), offset)
    row = shape[-1] if shape else 1
    if row % kind.elements:
        raise FormatError(f"{quoted(key)}: rows of {row} elements do not divide into {kind.name} blocks of "
                          f"{kind.elements}")  # fmt: skip
    stored = math.prod(shape) // kind.elements * kind.nbytes
    return _Place(TensorInfo(key, kind.name, shape, kind="quantized", stored=stored), offset)


def _check_places(places: list[_Place], base: int, size: int) -> int:
    """Return the end of the last tensor, where none overlaps another and none goes on behind the file."""
    end, last = base, ""
    for info, offset in sorted(places, key=lambda place: place.offset):
        start = base + offset
        if not info.nbytes and info.elements == 0:
            continue
        if start < end:
            raise FormatError(f"{quoted(info.key)} overlaps {quoted(last)}: it begins at byte {start - base} of the "
                              f"data, and {end - base} are taken")  # fmt: skip
        end, last = start + info.nbytes, info.key
    if end > size and last:
        raise FormatError(
            f"truncated: {end - size:,} of {end:,} bytes are missing at the end, where {quoted(last)} lies",
            hint="download or copy it again",
        )
    return min(end, size)


def _warnings(entries: list[Entry], places: dict[str, _Place], behind: int) -> list[str]:
    warnings = []
    values = {entry.path: entry.value for entry in entries}
    parts, number = values.get("split.count"), values.get("split.no")
    if isinstance(parts, int) and isinstance(number, int) and parts > 1:
        warnings.append(f"this is part {number + 1} of {parts}: the tensors of the other parts are not listed")
    unknown = [place.info for place in places.values() if place.info.kind == "unknown"]
    if unknown:
        what = plural(len(unknown), "tensor")
        warnings.append(f"{what} of a type that is not known, of which the size is not told: {quoted(unknown[0].key)}")
    elif behind > 0:
        warnings.append(f"{plural(behind, 'byte')} behind the last tensor belong to none")
    return warnings
