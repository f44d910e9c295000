"""Read and write safetensors files: a JSON header with keys, dtypes, shapes and offsets, then the bytes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import ge
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import MOST_TENSORS, Access, Checkpoint, Description, Payload, Record, TensorInfo
from ckptkit.core.checkpoint.provenance import DELTA, way_to_apply
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Extent
from ckptkit.core.files.source import ByteSource
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.text import first_line, quoted
from ckptkit.errors import FormatError, PlanError
from ckptkit.formats.safetensors_header import METADATA, read_header

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


def open_safetensors(file: ByteSource) -> Checkpoint:
    """Return the Checkpoint in a safetensors file; the Checkpoint closes the file.

    Refuses every file that the safetensors library refuses, and also duplicate keys and a header that does not begin
    with a brace. Raises ``FormatError`` naming the tensor and the numbers.
    """
    size = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else -1
    if size < 0:
        raise FormatError(f"too short: {file.size} bytes, and a safetensors file begins with 8 bytes of length")
    if size > LARGEST_HEADER:
        raise FormatError(
            f"the header has a length of {size:,} bytes, more than the limit of {LARGEST_HEADER:,}",
            hint="the file is damaged, or not safetensors: download or copy it again",
        )
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
        header = read_header(data, file.size - 8 - size)
    infos, begins, warnings = header.infos, header.begins, header.warnings
    if DELTA in header.metadata:
        warnings = [*warnings, _patch_warning(file.path)]
    base = 8 + size

    def payload(info: TensorInfo) -> Payload:
        return Extent(file, base + begins[info.key], infos[info.key].nbytes)

    def records() -> Iterator[Record]:
        places = list(begins.values())
        keys: Iterable[str] = begins  # most headers are in the order of the data
        if any(map(ge, places, places[1:])):
            keys = sorted(begins, key=lambda key: (begins[key], infos[key].nbytes))
        for key in keys:
            yield Record(file.path, key, payload(infos[key]), None, (key,))

    return Checkpoint(
        infos,
        Access(payload, payload, records, file.check_unchanged, file.close),
        Description(file.path, "safetensors", files=[file.path], metadata=header.metadata, warnings=warnings),
    )


def _patch_warning(path: str) -> str:
    from ckptkit.core.findings import ReaderWarning
    from ckptkit.core.result.summary import CheckpointSummary
    from ckptkit.formats.codes import PATCH

    argument = CheckpointSummary(path, "safetensors").argument
    return ReaderWarning(f"is a patch, and its tensors are not weights; {way_to_apply(argument)}", PATCH)


_ALIGNMENT = 8
_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


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
    looks: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}  # the text of dtype and shape, and the bytes
    entries = [f'"{METADATA}":{_COMPACT.encode(dict(metadata))}'] if metadata else []
    offset = 0
    for info in order:
        look = looks.get((info.dtype, info.shape))
        if look is None:
            form = _COMPACT.encode({"dtype": info.dtype, "shape": info.shape})
            look = looks[info.dtype, info.shape] = form[:-1], info.nbytes
        end = offset + look[1]
        entries.append(f'{_COMPACT.encode(info.key)}:{look[0]},"data_offsets":[{offset},{end}]}}')
        offset = end
    try:
        text = f"{{{','.join(entries)}}}".encode()
    except UnicodeEncodeError as error:
        character = error.object[error.start]
        name = next((info.key for info in order if character in info.key), character)
        raise PlanError(
            f"a name is not Unicode text: {quoted(name)}",
            hint="--rename 'OLD=NEW' gives it a name, or write a .pt file",
        ) from None
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > LARGEST_HEADER:
        is_metadata = bool(metadata) and len(entries[0]) > LARGEST_HEADER // 2  # each shard would have it
        raise PlanError(
            f"the header would have {len(text):,} bytes, more than safetensors allows",
            hint=f"shorten the metadata: it has {len(entries[0]):,} characters" if is_metadata else "write shards",
        )
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
    if len({info.dtype for info in infos}) <= 1:
        return True
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
    if out.in_order:
        out.write(layout.header, 0)
    for payload in merge_extents(payloads[info.key] for info in layout.infos):
        yield from out.copy(payload, offset)
        offset += payload.nbytes
    if not out.in_order:
        # The header is written last, so that a killed process does not leave a valid checkpoint of zeros.
        out.write(layout.header, 0)
