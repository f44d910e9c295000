"""Write a checkpoint of ``torch.distributed.checkpoint`` (DCP) as one writer: a file of torch archives, and .metadata.

Every tensor is one chunk. ``torch.distributed.checkpoint.load`` gives each rank its part, whatever their number is.
The class names in .metadata are those that torch has had since 2.3. No part of torch is imported or run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from ckptkit.core.checkpoint import Payload, TensorInfo, row_major
from ckptkit.core.dtypes import DTYPES, torch_shape
from ckptkit.core.files.payloads import announce
from ckptkit.core.text import quoted, shell_word
from ckptkit.errors import PlanError
from ckptkit.formats.distributed.dcp_metadata import DCP_VERSION, METADATA_MODULE, STORAGE_MODULE
from ckptkit.formats.distributed.file_names import DCP_SUFFIX
from ckptkit.formats.pickle.emit import PickleWriter
from ckptkit.formats.torch.write import (
    StoredTensor,
    TorchZipLayout,
    layout_torch_archive,
    pickle_tensor,
    refuse_unwritable,
    write_torch_zip,
)
from ckptkit.formats.writing.copying import OffsetWriter
from ckptkit.wrappers.entries import known_entries

__all__ = ["DCP_FILE", "DcpLayout", "layout_dcp", "refuse_unfit", "write_dcp"]

DCP_FILE = f"__0_0{DCP_SUFFIX}"  # of the first file of rank 0


@dataclass(frozen=True, slots=True)
class DcpLayout:
    """The layout of a distributed checkpoint: each archive with its offset in the one file, and the .metadata."""

    items: tuple[tuple[int, TorchZipLayout], ...]
    nbytes: int  # of the file of archives
    metadata: bytes


def refuse_unfit(infos: Sequence[TensorInfo]) -> None:
    """Raise ``PlanError`` for a dtype that torch does not have, and for a name that is not read as that of a weight.

    A state of DCP mixes weights with counters of a training loop, such as ``step``. Readers know them by their names.
    """
    refuse_unwritable(infos)
    found = known_entries({info.key: info for info in infos}, _is_info)
    for entry in found.values():
        raise PlanError(
            f"{quoted(entry.name)} would be read from a distributed checkpoint as {entry.content}, not as a weight",
            hint=f"rename it, for example --rename {shell_word(f'{entry.name}=model.{entry.name}')}",
        )


def _is_info(value: object) -> TypeGuard[TensorInfo]:
    return isinstance(value, TensorInfo)


def layout_dcp(
    infos: Sequence[TensorInfo], payload: Callable[[TensorInfo], Payload], *, in_order: bool = False
) -> DcpLayout:
    """Return the layout of a checkpoint with these tensors, each under its key as in a flat state_dict.

    ``in_order`` is as in ``layout_torch_archive``. Raises ``PlanError`` as ``refuse_unfit`` does.
    """
    refuse_unfit(infos)
    items = []
    offset = 0
    for info in infos:
        content = payload(info)
        pickle = pickle_tensor(StoredTensor(info, 0, content.nbytes, 0, row_major(info.shape)))
        archive = layout_torch_archive(pickle, [content], in_order=in_order)
        items.append((offset, archive))
        offset += archive.nbytes
    return DcpLayout(tuple(items), offset, _metadata(infos, [(at, archive.nbytes) for at, archive in items]))


def write_dcp(layout: DcpLayout, out: OffsetWriter) -> Iterator[int]:
    """Write the archives to ``out``, and yield the number of bytes of each step."""
    announce(entry.content for _, archive in layout.items for entry in archive.entries)
    for offset, archive in layout.items:
        yield from write_torch_zip(archive, out, offset)


def _metadata(infos: Sequence[TensorInfo], ranges: Sequence[tuple[int, int]]) -> bytes:
    """Return the pickle of a ``Metadata`` of DCP for tensors of one chunk each, at these offsets and lengths."""
    emit = PickleWriter()
    emit.instance(METADATA_MODULE, "Metadata")
    emit.out += b"}("
    emit.text("state_dict_metadata")
    emit.out += b"}("
    for info in infos:
        emit.text(info.key)
        _description(emit, info)
    emit.out += b"u"
    emit.text("planner_data")
    emit.out += b"}("
    for info in infos:
        emit.text(info.key)
        emit.text(info.key)
        emit.out += b"\x85"
    emit.out += b"u"
    emit.text("storage_data")
    emit.out += b"}("
    for info, (offset, length) in zip(infos, ranges, strict=True):
        _index(emit, info)
        _place(emit, offset, length)
    emit.out += b"u"
    emit.text("storage_meta")
    emit.out += b"N"
    emit.text("version")
    emit.text(DCP_VERSION)
    emit.out += b"ub."
    return bytes(emit.out)


def _description(emit: PickleWriter, info: TensorInfo) -> None:
    emit.instance(METADATA_MODULE, "TensorStorageMetadata")
    emit.out += b"}("
    emit.constant("properties")
    _properties(emit, info.dtype)
    emit.constant("size")
    _size(emit, torch_shape(info.dtype, info.shape))
    emit.constant("chunks")
    emit.out += b"]"
    emit.instance(METADATA_MODULE, "ChunkStorageMetadata")
    emit.out += b"}("
    emit.constant("offsets")
    _size(emit, (0,) * len(info.shape))
    emit.constant("sizes")
    _size(emit, torch_shape(info.dtype, info.shape))
    emit.out += b"ubaub"


def _properties(emit: PickleWriter, dtype: str) -> None:
    """Push properties whose state is a tuple: dtype, layout, requires_grad, memory format and pin_memory."""
    emit.instance(METADATA_MODULE, "TensorProperties")
    emit.out += b"("
    emit.name("torch", DTYPES[dtype].torch_name)
    emit.name("torch.serialization", "_get_layout")
    emit.constant("torch.strided")
    emit.out += b"\x85R\x89"
    emit.name(METADATA_MODULE, "_MEM_FORMAT_ENCODING")
    emit.integer(0)
    emit.out += b"\x85R\x89tb"


def _index(emit: PickleWriter, info: TensorInfo) -> None:
    emit.instance(METADATA_MODULE, "MetadataIndex")
    emit.out += b"}("
    emit.constant("fqn")
    emit.text(info.key)
    emit.constant("index")
    emit.integer(0)
    emit.constant("offset")
    _size(emit, (0,) * len(info.shape))
    emit.out += b"ub"


def _place(emit: PickleWriter, offset: int, length: int) -> None:
    emit.instance(STORAGE_MODULE, "_StorageInfo")
    emit.out += b"}("
    emit.constant("relative_path")
    emit.constant(DCP_FILE)
    emit.constant("offset")
    emit.integer(offset)
    emit.constant("length")
    emit.integer(length)
    emit.out += b"ub"


def _size(emit: PickleWriter, sizes: tuple[int, ...]) -> None:
    emit.name("torch", "Size")
    emit.integers(sizes)
    emit.out += b"\x85R"
