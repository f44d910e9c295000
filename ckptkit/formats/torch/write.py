"""Write torch's zip format: the pickle of a state_dict, and one aligned record with a checksum for each storage."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ckptkit.core.checkpoint import Payload, TensorInfo, is_contiguous, row_major, storage_range
from ckptkit.core.checkpoint.payload import HeldBytes
from ckptkit.core.dtypes import DTYPES, torch_view
from ckptkit.core.files.payloads import Extent, announce
from ckptkit.core.text import quoted
from ckptkit.core.ties import overlapping_tensors
from ckptkit.errors import PlanError
from ckptkit.formats.pickle.emit import PickleWriter
from ckptkit.formats.writing.copying import OffsetWriter

__all__ = [
    "STORAGE_CLASSES",
    "BlockOf",
    "StoredTensor",
    "TorchZipLayout",
    "assign_records",
    "layout_torch_archive",
    "layout_torch_zip",
    "pickle_state_dict",
    "pickle_tensor",
    "refuse_unwritable",
    "write_torch_zip",
]


BlockOf: TypeAlias = Callable[[Iterable[Payload]], int]

# The dtypes with a storage class; torch stores all other dtypes in untyped storages.
STORAGE_CLASSES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage", "C128": "ComplexDoubleStorage", "C64": "ComplexFloatStorage",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the output: the number of its record, and offset and stride in the record, in elements."""

    info: TensorInfo
    record: int
    record_nbytes: int
    offset: int
    stride: tuple[int, ...]


def pickle_state_dict(tensors: Iterable[StoredTensor], versions: Mapping[str, int]) -> bytes:
    """Return the pickle of an ``OrderedDict`` of tensors by key, with the module versions as ``_metadata``."""
    emit = PickleWriter()
    emit.ordered_dict()
    emit.out += b"("
    for tensor in tensors:
        emit.text(tensor.info.key)
        _tensor(emit, tensor)
    emit.out += b"u"
    if versions:
        _metadata(emit, versions)
    emit.out += b"."
    return bytes(emit.out)


def pickle_tensor(tensor: StoredTensor) -> bytes:
    """Return the pickle of one tensor, without a mapping around it."""
    emit = PickleWriter()
    _tensor(emit, tensor)
    emit.out += b"."
    return bytes(emit.out)


def _metadata(emit: PickleWriter, versions: Mapping[str, int]) -> None:
    emit.out += b"}"
    emit.text("_metadata")
    emit.ordered_dict()
    emit.out += b"("
    for prefix, version in versions.items():
        emit.text(prefix)
        emit.out += b"}"
        emit.text("version")
        emit.integer(version)
        emit.out += b"s"
    emit.out += b"usb"


def _tensor(emit: PickleWriter, tensor: StoredTensor) -> None:
    info = tensor.info
    dtype = info.dtype
    shape, stride, offset = torch_view(dtype, info.shape, tensor.stride, tensor.offset)
    storage = STORAGE_CLASSES.get(dtype)
    emit.name("torch._utils", "_rebuild_tensor_v2" if storage else "_rebuild_tensor_v3")
    emit.out += b"(("
    emit.constant("storage")
    if storage:
        emit.name("torch", storage)
    else:
        emit.name("torch.storage", "UntypedStorage")
    emit.text(str(tensor.record))
    emit.constant("cpu")
    emit.integer(tensor.record_nbytes // (DTYPES[dtype].bits // 8) if storage else tensor.record_nbytes)
    emit.out += b"tQ"
    emit.integer(offset)
    emit.integers(shape)
    emit.integers(stride)
    emit.out += b"\x89"
    emit.ordered_dict()
    if not storage:
        emit.name("torch", DTYPES[dtype].torch_name)
    emit.out += b"tR"


_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_DESCRIPTOR = struct.Struct("<4s3L")
_DESCRIPTOR64 = struct.Struct("<4sL2Q")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ALIGNMENT = 64
_WORTH_SHARING = 16  # blocks; the space between two records is less than one block
_UTF8 = 0x800
_HAS_DESCRIPTOR = 8
_LIMIT = 0xFFFFFFFF
_JANUARY_1980 = 0x21  # with a fixed date, equal contents give equal files


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    content: Payload
    header: int
    extra: bytes
    descriptor: int = 0  # bytes after the content that hold its checksum, which is then not in the header

    @property
    def start(self) -> int:
        return self.header + _LOCAL.size + len(self.name) + len(self.extra)


@dataclass(frozen=True, slots=True)
class TorchZipLayout:
    """The layout of an archive: the entries with their offsets, the offset of the directory, and the exact size.

    ``block`` is the size of the blocks that it can share with its inputs, or 0.
    """

    entries: tuple[_Entry, ...]
    directory: int
    nbytes: int
    block: int = 0


def refuse_unwritable(infos: Iterable[TensorInfo]) -> None:
    """Raise ``PlanError`` for a dtype that torch does not have, or that its files cannot hold."""
    for info in infos:
        if info.dtype not in DTYPES or not DTYPES[info.dtype].torch_name or info.dtype.startswith(("Q", "BITS")):
            raise PlanError(f"{quoted(info.key)} is {info.dtype}, which cannot be written to a torch file")


def layout_torch_zip(
    infos: Sequence[TensorInfo],
    payload: Callable[[TensorInfo], Payload],
    span: Callable[[TensorInfo], Payload | None],
    versions: Mapping[str, int] | None = None,
    block: BlockOf = lambda _: 0,
    *,
    in_order: bool = False,
) -> TorchZipLayout:
    """Return the layout of an archive with these tensors as one state_dict, in order.

    Tensors that share memory in the source share a storage in the output if their bytes can be copied unchanged.
    Strides are kept unless this needs more space. ``versions`` become the ``_metadata``. ``block`` and ``in_order`` are
    as in ``layout_torch_archive``. Raises ``PlanError`` as ``refuse_unwritable`` does.
    """
    refuse_unwritable(infos)
    records, stored = assign_records(infos, payload, span)
    return layout_torch_archive(pickle_state_dict(stored, versions or {}), records, block=block, in_order=in_order)


def layout_torch_archive(
    pickle: bytes,
    records: Sequence[Payload],
    others: Iterable[tuple[str, Payload]] = (),
    *,
    block: BlockOf = lambda _: 0,
    in_order: bool = False,
) -> TorchZipLayout:
    """Return the layout of an archive with a pickle, the records of its storages, and other records by name.

    ``block`` gives the size of the blocks that the archive can share with the files of the records, or 0. Large
    records then begin where their blocks can be shared. With ``in_order``, a checksum that is known only after the
    content was copied is written behind the content, as torch itself does, so that no byte is changed later.
    """
    size = block(records)
    contents: dict[str, Payload] = {
        "data.pkl": HeldBytes(pickle),
        "byteorder": HeldBytes(b"little"),
        **{f"data/{number}": record for number, record in enumerate(records)},
        "version": HeldBytes(b"3\n"),
        **dict(others),
    }
    entries = []
    offset = directory = 0
    for text, content in contents.items():
        name = f"archive/{text}".encode()
        large = struct.pack("<HHQQ", 1, 16, content.nbytes, content.nbytes) if content.nbytes >= _LIMIT else b""
        pad = _padding(content, offset + _LOCAL.size + len(name) + len(large) + 4, size)
        behind = _descriptor_size(content) if in_order else 0
        entry = _Entry(name, content, offset, large + struct.pack("<2sH", b"FB", pad) + b"Z" * pad, behind)
        entries.append(entry)
        offset = entry.start + content.nbytes + behind
        directory += _CENTRAL.size + len(name) + len(_extra64(entry))
    end = _END.size + (_END64.size + _LOCATOR64.size if _needs64(len(entries), directory, offset) else 0)
    return TorchZipLayout(tuple(entries), offset, offset + directory + end, size)


def _known_crc(content: Payload) -> int | None:
    if isinstance(content, HeldBytes):
        return zlib.crc32(content.data)
    return content.crc if isinstance(content, Extent) else None


def _descriptor_size(content: Payload) -> int:
    """Return the number of bytes behind a content whose checksum is not known before it is copied."""
    if _known_crc(content) is not None:
        return 0
    return (_DESCRIPTOR64 if content.nbytes >= _LIMIT else _DESCRIPTOR).size


def _padding(content: Payload, start: int, block: int) -> int:
    """Return the number of bytes between the header of a record and its content."""
    if (
        isinstance(content, Extent)
        and block
        and content.offset % _ALIGNMENT == 0
        and content.nbytes >= _WORTH_SHARING * block
    ):
        return (content.offset - start) % block
    return -start % _ALIGNMENT


def assign_records(
    infos: Sequence[TensorInfo],
    payload: Callable[[TensorInfo], Payload],
    span: Callable[[TensorInfo], Payload | None],
) -> tuple[list[Payload], list[StoredTensor]]:
    """Return the records that hold the tensors, and for each tensor its record, offset and stride."""
    unions: dict[str, tuple[int, Payload]] = {}
    for overlapping in overlapping_tensors(infos):
        # A conjugated or negated view has no span: its values are not the bytes of the storage.
        for group in overlapping_tensors(info for info in overlapping if span(info) is not None):
            shared = _union(group, span)
            if shared is not None:
                unions.update((info.key, shared) for info in group)
    records: list[Payload] = []
    first_tensors: dict[object, StoredTensor] = {}  # of each record, by the identity of its bytes
    stored = []
    uses = Counter(info.view for info in infos)
    for info in infos:
        if info.key in unions and info.view is not None:
            first, content = unions[info.key]
            identity: object = id(content)
            placement = info.view.offset - first * 8 // DTYPES[info.dtype].bits, info.view.stride
        else:
            content, stride = _single(info, payload, span)
            # Two keys of one view share a record, even with gaps. Without a span, equal views can differ in value.
            has_span = info.view and uses[info.view] > 1 and info.elements and span(info)
            identity = (info.view, info.shape, info.dtype) if has_span else info.key
            placement = 0, stride
        first_tensor = first_tensors.get(identity)
        if first_tensor is None:
            first_tensor = first_tensors[identity] = StoredTensor(info, len(records), content.nbytes, *placement)
            records.append(content)
        stored.append(StoredTensor(info, first_tensor.record, first_tensor.record_nbytes, *placement))
    return records, stored


def _union(group: Sequence[TensorInfo], span: Callable[[TensorInfo], Payload | None]) -> tuple[int, Payload] | None:
    """Return the first byte and the bytes of a group of views with spans, or None if separate records are better."""
    if len({info.dtype for info in group}) > 1 and any(info.dtype in STORAGE_CLASSES for info in group):
        return None  # torch gives all tensors of a typed storage the dtype of the first tensor
    spans = [part for info in group if (part := span(info)) is not None]
    first, last = min(storage_range(info)[0] for info in group), max(storage_range(info)[1] for info in group)
    distinct = {(storage_range(info), info.shape, info.dtype): info.nbytes for info in group}
    widths = {DTYPES[info.dtype].bits // 8 or 1 for info in group}
    if last - first > sum(distinct.values()) or any((last - first) % width or first % width for width in widths):
        return None
    extents = [part for part in spans if isinstance(part, Extent)]
    whole = max(spans, key=lambda part: part.nbytes)
    if whole.nbytes == last - first:
        return first, whole
    if len(extents) < len(spans):
        return None
    low = min(extents, key=lambda extent: extent.offset)
    return first, Extent(low.file, low.offset, last - first)


def _single(
    info: TensorInfo, payload: Callable[[TensorInfo], Payload], span: Callable[[TensorInfo], Payload | None]
) -> tuple[Payload, tuple[int, ...]]:
    if info.view is not None and not is_contiguous(info):
        raw = span(info)
        if raw is not None and raw.nbytes <= info.nbytes:
            return raw, info.view.stride
    return payload(info), row_major(info.shape)


def write_torch_zip(layout: TorchZipLayout, out: OffsetWriter, at: int = 0) -> Iterator[int]:
    """Write the archive to ``out`` from its byte ``at``, and yield the number of bytes of each step."""
    directory = bytearray()
    announce(entry.content for entry in layout.entries)
    for entry in layout.entries:
        if out.in_order:
            out.write(_local_header(entry, _known_crc(entry.content) or 0), at + entry.header)
        crc = yield from out.copy(entry.content, at + entry.start, checksum=True)
        if entry.descriptor:
            out.write(_descriptor(entry, crc), at + entry.start + entry.content.nbytes)
        if not out.in_order:
            out.write(_local_header(entry, crc), at + entry.header)
        directory += _central_header(entry, crc)
    out.write(directory + _end(len(layout.entries), len(directory), layout.directory), at + layout.directory)


def _local_header(entry: _Entry, crc: int) -> bytes:
    size = min(entry.content.nbytes, _LIMIT)
    crc, stated = (0, size if size == _LIMIT else 0) if entry.descriptor else (crc, size)
    fixed = (b"PK\3\4", 45 if size == _LIMIT else 20, _flags(entry), 0, 0, _JANUARY_1980, crc, stated, stated)
    return _LOCAL.pack(*fixed, len(entry.name), len(entry.extra)) + entry.name + entry.extra


def _descriptor(entry: _Entry, crc: int) -> bytes:
    size = entry.content.nbytes
    return (_DESCRIPTOR64 if size >= _LIMIT else _DESCRIPTOR).pack(b"PK\7\10", crc, size, size)


def _flags(entry: _Entry) -> int:
    return _UTF8 | _HAS_DESCRIPTOR if entry.descriptor else _UTF8


def _central_header(entry: _Entry, crc: int) -> bytes:
    size, header, extra = min(entry.content.nbytes, _LIMIT), min(entry.header, _LIMIT), _extra64(entry)
    version = 45 if extra else 20
    fixed = (b"PK\1\2", version, version, _flags(entry), 0, 0, _JANUARY_1980, crc, size, size)
    return _CENTRAL.pack(*fixed, len(entry.name), len(extra), 0, 0, 0, 0, header) + entry.name + extra


def _extra64(entry: _Entry) -> bytes:
    size = entry.content.nbytes
    values = ([size, size] if size >= _LIMIT else []) + ([entry.header] if entry.header >= _LIMIT else [])
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _needs64(count: int, size: int, offset: int) -> bool:
    return count >= 0xFFFF or size >= _LIMIT or offset >= _LIMIT


def _end(count: int, size: int, offset: int) -> bytes:
    tail = b""
    if _needs64(count, size, offset):
        tail = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, size, offset)
        tail += _LOCATOR64.pack(b"PK\6\7", 0, offset + size, 1)
    count = min(count, 0xFFFF)
    return tail + _END.pack(b"PK\5\6", 0, 0, count, count, min(size, _LIMIT), min(offset, _LIMIT), 0)
