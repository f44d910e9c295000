"""Read and write safetensors files: a JSON header with keys, dtypes, shapes and offsets, then the bytes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ckptkit.core.checkpoint import MOST_TENSORS, Access, Checkpoint, Description, Payload, Record, TensorInfo
from ckptkit.core.config_files import parse_json
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files import Extent, LocalFile
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.text import first_line, plural, quoted
from ckptkit.errors import FormatError, PlanError

if TYPE_CHECKING:
    from ckptkit.formats.writing.copying import OffsetWriter

# The functions that write import what only they need: reading a small file takes less time than these imports.
__all__ = [
    "LARGEST_HEADER",
    "METADATA",
    "SafetensorsLayout",
    "layout_safetensors",
    "open_safetensors",
    "reader_refusal",
    "refuse_unstorable",
    "share_blocks",
    "write_safetensors",
]


LARGEST_HEADER = 100_000_000  # the limit of the safetensors library itself
METADATA = "__metadata__"
_MOST_DIMENSIONS = 1024
_LARGEST_SIZE = 2**63  # torch uses signed 64-bit sizes
_DEEPEST_EXTRA = 100  # the library stops at 127 levels
_BITS = {dtype.code: dtype.bits for dtype in DTYPES.values() if dtype.storable}


def open_safetensors(file: LocalFile) -> Checkpoint:
    """Return the Checkpoint in a safetensors file; the Checkpoint closes the file.

    Refuses every file that the safetensors library refuses, and also duplicate keys and a header that does not begin
    with a brace. Raises ``FormatError`` naming the tensor and the numbers.
    """
    size = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else -1
    if size < 0:
        raise FormatError(f"too short: {file.size} bytes, and a safetensors file begins with 8 bytes of length")
    if size > LARGEST_HEADER:
        raise FormatError(f"the header has a length of {size:,} bytes, more than the limit of {LARGEST_HEADER:,}")
    if size > file.size - 8:
        raise FormatError(
            f"the header has a length of {size:,} bytes and the file has {file.size:,}: truncated?",
            hint="download or copy it again",
        )
    data = file.read(8, size)
    if not data.startswith(b"{"):
        raise FormatError("the header does not begin with '{': not a safetensors file")
    if data.count(b'"dtype"') > MOST_TENSORS:
        raise FormatError(f"the header describes more than {MOST_TENSORS:,} tensors, the limit")
    with pause_gc():
        header = parse_json(data, "the header")
        metadata = _metadata(header.pop(METADATA, None))
        infos, begins, warnings = _entries(header, file.size - 8 - size)
        del header  # before the garbage collector looks at it
    base = 8 + size

    def payload(info: TensorInfo) -> Payload:
        return Extent(file, base + begins[info.key], infos[info.key].nbytes)

    def records() -> Iterator[Record]:
        for key in sorted(begins, key=lambda key: (begins[key], infos[key].nbytes)):
            yield Record(file.path, key, payload(infos[key]), keys=(key,))

    return Checkpoint(
        infos,
        Access(payload, payload, records, file.check_unchanged, file.close),
        Description(file.path, "safetensors", files=[file.path], metadata=metadata, warnings=warnings),
    )


def _metadata(value: object) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{METADATA} must map strings to strings")
    return value


def _entries(header: Mapping[str, Any], nbytes: int) -> tuple[dict[str, TensorInfo], dict[str, int], list[str]]:
    """Return the tensors, where the bytes of each begin, and warnings; all tensors must fill the ``nbytes`` of data."""
    infos: dict[str, TensorInfo] = {}
    begins: dict[str, int] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # most tensors have the shape of another one, and share it
    reached, is_in_order = 0, True
    with_extra_fields = 0
    for key, entry in header.items():
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            bits = _BITS[code]
        except (KeyError, TypeError, ValueError):
            _raise_entry_error(key, entry)
        elements = 1
        if type(shape) is not list or len(shape) > _MOST_DIMENSIONS:
            _raise_entry_error(key, entry)
        for size in shape:
            if type(size) is not int or not 0 <= size < _LARGEST_SIZE:
                _raise_entry_error(key, entry)
            elements *= size
        if type(begin) is not int or type(end) is not int or elements * bits != 8 * (end - begin):
            _raise_entry_error(key, entry)
        if (elements == 0 and math.prod(size or 1 for size in shape) >= _LARGEST_SIZE) or end >= _LARGEST_SIZE:
            raise FormatError(f"{quoted(key)}: the shape {str(shape)[:80]} overflows")
        if len(entry) != 3:
            with_extra_fields += 1
            _check_extra(key, entry, 0)
        sizes = tuple(shape)
        infos[key] = TensorInfo(key, code, shapes.setdefault(sizes, sizes))
        begins[key] = begin
        is_in_order = is_in_order and begin == reached
        reached = end
    # Most headers are in the order of the data, and need no sort.
    _check_end(reached if is_in_order else _end_of_sorted(header), nbytes)
    count = with_extra_fields
    warnings = [f"{plural(count, 'entry', 'entries')} with unknown fields"] if count else []
    return infos, begins, warnings


def _check_extra(key: str, value: object, depth: int) -> None:
    if depth > _DEEPEST_EXTRA:
        raise FormatError(f"{quoted(key)}: the header entry is nested too deeply")
    if type(value) is int and value.bit_length() > 1000:
        raise FormatError(f"{quoted(key)}: the header entry holds an integer of {value.bit_length()} bits")
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_extra(key, part, depth + 1)


def _raise_entry_error(key: str, entry: object) -> NoReturn:
    name = quoted(key)
    if not isinstance(entry, dict):
        raise FormatError(f"{name}: the header entry is not an object")
    missing = [field for field in ("dtype", "shape", "data_offsets") if field not in entry]
    if missing:
        raise FormatError(f"{name}: the header entry has no {missing[0]}")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _BITS:
        raise FormatError(f"{name}: unknown dtype {quoted(str(code)[:40])}")
    if not isinstance(shape, list) or any(type(size) is not int or not 0 <= size < _LARGEST_SIZE for size in shape):
        raise FormatError(f"{name}: the shape {str(shape)[:80]} is not a list of sizes")
    if (
        not isinstance(span, list)
        or len(span) != 2
        or any(type(at) is not int or not 0 <= at < _LARGEST_SIZE for at in span)
    ):
        raise FormatError(f"{name}: the offsets {str(span)[:80]} are not a begin and an end")
    if len(shape) > _MOST_DIMENSIONS:
        raise FormatError(f"{name}: a shape of {len(shape)} dimensions")
    needed = math.prod(shape) * _BITS[code]
    if needed.bit_length() > 128:
        raise FormatError(f"{name}: the shape overflows, with {needed.bit_length()} binary digits")
    size = f"{needed // 8}" if needed % 8 == 0 else f"{needed / 8}"
    raise FormatError(f"{name}: {code} {shape} needs {size} bytes, offsets give {span[1] - span[0]}")


def _check_end(reached: int, size: int) -> None:
    if reached > size:
        raise FormatError(
            f"truncated: {reached - size:,} of {reached:,} bytes are missing at the end",
            hint="download or copy it again",
        )
    if reached < size:
        raise FormatError(f"not part of a tensor: {plural(size - reached, 'byte')} after the last tensor")


def _end_of_sorted(header: Mapping[str, Any]) -> int:
    reached = 0
    offsets = {key: entry["data_offsets"] for key, entry in header.items()}
    for key, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != reached:
            problem = "overlaps the tensor before it" if begin < reached else "leaves a gap before it"
            where = f"it begins at byte {begin}, and the data before it ends at byte {reached}"
            raise FormatError(f"{quoted(key)} {problem}: {where}")
        reached = end
    return reached


_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """A file to write: the bytes of the header, and the tensors in the order of their data."""

    header: bytes
    infos: tuple[TensorInfo, ...]
    nbytes: int


def layout_safetensors(infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> SafetensorsLayout:
    """Return the layout of a file with these tensors, in their order unless alignment needs another order.

    Raises ``PlanError`` for a dtype without a safetensors code, and for a header of more than 100 MB. Also raises
    ``PlanError`` for a key that is not Unicode text, and for the key ``__metadata__``.
    """
    order = list(infos)
    refuse_unstorable(order)
    if not _aligned(order):
        order.sort(key=lambda info: -DTYPES[info.dtype].bits)
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for info in order:
        end = offset + info.nbytes
        header[info.key] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (offset, end)}
        offset = end
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        character = error.object[error.start]
        name = next((info.key for info in order if character in info.key), character)
        raise PlanError(
            f"a name is not Unicode text: {quoted(name)}",
            hint="--rename 'OLD=NEW' gives it a name, or write a .pt file",
        ) from None
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > LARGEST_HEADER:
        raise PlanError(f"the header would have {len(text):,} bytes, more than safetensors allows", hint="write shards")
    return SafetensorsLayout(len(text).to_bytes(8, "little") + text, tuple(order), len(text) + 8 + offset)


def share_blocks(layout: SafetensorsLayout, payloads: Mapping[str, Payload], block: int) -> SafetensorsLayout:
    """Return the layout with spaces behind its header, so that the file can share most blocks with its inputs.

    ``block`` is the size of a block, or 0 for a file that shares none. A header that would become too long is kept.
    """
    if not block:
        return layout
    from ckptkit.formats.writing.reflink import shifted_by

    shift = shifted_by([payloads[info.key] for info in layout.infos], block, _ALIGNMENT)
    spaces = (shift - len(layout.header)) % block
    if len(layout.header) - 8 + spaces > LARGEST_HEADER:
        return layout
    text = layout.header[8:] + b" " * spaces
    return SafetensorsLayout(len(text).to_bytes(8, "little") + text, layout.infos, layout.nbytes + spaces)


def refuse_unstorable(infos: Iterable[TensorInfo]) -> None:
    """Raise ``PlanError`` for a tensor that the safetensors library could not store, or could not read again.

    These are dtypes without a safetensors code, packed tensors that the library refuses, and the key ``__metadata__``.
    """
    from ckptkit.core.patterns import drop_options

    for info in infos:
        if info.key == METADATA:
            raise PlanError(f"a tensor is called '{METADATA}', which safetensors reserves", hint="rename it")
        dtype = DTYPES.get(info.dtype)
        if dtype is None or not dtype.storable:
            raise PlanError(
                f"{quoted(info.key)} would be {info.dtype}, which safetensors cannot store",
                hint=f"write a .pt file, or drop the tensor: {drop_options([info.key])}",
            )
        # Only packed dtypes are questionable, and to read them again is worth an import of torch.
        if dtype.bits < 8 and (refusal := reader_refusal(info.dtype, info.shape)):
            raise PlanError(
                f"{quoted(info.key)} would be {info}, which the safetensors library cannot read again: {refusal}",
                hint=f"drop the tensor: {drop_options([info.key])}",
            )


def reader_refusal(dtype: str, shape: Sequence[int]) -> str:
    """Return why the installed safetensors and torch do not read a tensor of this dtype and shape, or ``""``."""
    return _reader_refusal(dtype, not shape or shape[-1] % 2 == 1)


@functools.cache
def _reader_refusal(dtype: str, is_odd: bool) -> str:
    import tempfile

    import safetensors

    bits = DTYPES[dtype].bits
    header = json.dumps({"x": {"dtype": dtype, "shape": [8, 2 - is_odd], "data_offsets": [0, bits * (2 - is_odd)]}})
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode() + bytes(bits * (2 - is_odd)))
        file.flush()
        try:
            with safetensors.safe_open(file.name, framework="pt", device="cpu") as found:
                found.get_tensor("x")
        except Exception as error:  # noqa: BLE001 - a dtype that torch lacks is an AttributeError
            return first_line(error)
    return ""


def _aligned(infos: Sequence[TensorInfo]) -> bool:
    offset = 0
    for info in infos:
        if offset * 8 % max(DTYPES[info.dtype].bits, 8):
            return False
        offset += info.nbytes
    return True


def write_safetensors(layout: SafetensorsLayout, payloads: Mapping[str, Payload], out: OffsetWriter) -> Iterator[int]:
    """Write the tensors and the header to ``out``; yield the number of bytes of each step."""
    from ckptkit.formats.writing.copying import merge_extents

    offset = len(layout.header)
    for payload in merge_extents(payloads[info.key] for info in layout.infos):
        yield from out.copy(payload, offset)
        offset += payload.nbytes
    # The header is written last, so that a killed process does not leave a valid checkpoint of zeros.
    out.write(layout.header, 0)
