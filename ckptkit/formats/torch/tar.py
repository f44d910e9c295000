"""Read the format of torch 0.1: a tar archive with a pickle, its tensors and their storages."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ckptkit.core.checkpoint import Checkpoint, Record
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Extent, Region
from ckptkit.core.files.source import ByteSource, Section
from ckptkit.core.text import quoted
from ckptkit.errors import FormatError
from ckptkit.formats.foreign import TAR_MEMBERS
from ckptkit.formats.pickle.values import Interpreter
from ckptkit.formats.torch.checkpoint import TorchFile, build_file_checkpoint
from ckptkit.formats.torch.legacy import read_pickle
from ckptkit.formats.torch.objects import (
    STORAGE_TYPES,
    TENSOR_TYPES,
    DTypeRef,
    StorageRef,
    StorageType,
    TensorRef,
    TorchObjects,
    tensor_view,
)
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_torch_tar"]

_BLOCK = 512
_MOST_PADDING = 1 << 20
_OCTAL = re.compile(rb" *([0-7]{1,12})[ \0]*")
_WINDOW = 1 << 12  # the pickle in front of each storage and tensor is short
_COUNT = struct.Struct("<q")
_RANK = struct.Struct("<i4x")  # the number of dimensions, which old versions wrote as 8 bytes


def open_torch_tar(file: ByteSource, selection: Selection = WEIGHTS) -> Checkpoint:
    """Return the Checkpoint in a tar archive of torch; the Checkpoint closes the file.

    Raises ``FormatError`` unless the archive holds each of the four members of the format once, as a plain file.
    Also raises it for an archive that contradicts itself, or that was not written on a little-endian machine.
    """
    members = _members(file)
    info, _ = read_pickle(members["sys_info"], Interpreter({}, {}), 0)
    if not isinstance(info, dict) or info.get("little_endian") is False:
        raise FormatError(
            "a tar archive of torch that was not written on a little-endian machine", hint="load and save it there"
        )
    stored, starts = _storages(members["storages"])
    tensors = _tensors(members["tensors"], stored)
    objects = TorchObjects(persistent=lambda pid: _resolve(pid, stored, tensors, objects.sources))
    tree, end = read_pickle(members["pickle"], objects.interpreter, 0)
    if end != members["pickle"].size:
        raise FormatError(f"{members['pickle'].size - end} bytes follow the pickle")

    def locate(storage: StorageRef) -> Region:
        return Extent(file, members["storages"].offset + starts[storage.key], storage.nbytes)

    def records(keys: Mapping[str, Sequence[str]]) -> Iterator[Record]:
        for key in starts:
            yield Record(file.path, f"storage {key}", locate(stored[int(key)]), keys=tuple(keys.get(key, ())))

    return build_file_checkpoint(
        TorchFile(tree, objects, end + members["tensors"].size, locate, records), file, "torch-tar", selection
    )


def _members(file: ByteSource) -> dict[str, Section]:
    members: dict[str, Section] = {}
    pos = 0
    while True:
        if pos + _BLOCK > file.size:
            raise FormatError("a tar archive without an end: truncated?", hint="download or copy it again")
        header = file.read(pos, _BLOCK)
        if not header.strip(b"\0"):
            break
        name, size = _member(header)
        if name in members:
            raise FormatError(f"two members of the tar archive are called {quoted(name)}")
        start = pos + _BLOCK
        if start + size > file.size:
            raise FormatError(
                f"member {quoted(name)} of the tar archive ends {start + size - file.size} bytes after the file",
                hint="download or copy it again",
            )
        members[name] = Section(file, start, size)
        pos = start + size + -size % _BLOCK
    rest = file.size - pos
    if rest > _MOST_PADDING or file.read(pos, rest).strip(b"\0"):
        raise FormatError(f"{rest} bytes follow the end of the tar archive")
    missing = [name for name in TAR_MEMBERS if name not in members]
    if missing:
        raise FormatError(f"a tar archive of torch without its member {quoted(missing[0])}")
    return members


def _member(header: bytes) -> tuple[str, int]:
    """Return name and size of a member; raises ``FormatError`` for a member that does not belong to the format."""
    name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
    checksum = _OCTAL.fullmatch(header[148:156])
    expected = sum(header[:148] + header[156:]) + 8 * ord(" ")
    if header[257:262] != b"ustar" or not checksum or int(checksum[1], 8) != expected:
        raise FormatError("a tar archive with a damaged header")
    if name not in TAR_MEMBERS or header[345:500].strip(b"\0"):
        raise FormatError(f"a tar archive of torch with an unexpected member {quoted(name)}")
    if header[156:157] not in (b"0", b"\0"):
        raise FormatError(f"member {quoted(name)} of the tar archive is not a plain file")
    size = _OCTAL.fullmatch(header[124:136])
    if not size:
        raise FormatError(f"member {quoted(name)} of the tar archive has no size")
    return name, int(size[1], 8)


def _storages(section: Section) -> tuple[dict[int, StorageRef], dict[str, int]]:
    """Return the storages by key, views of other storages included, and the offset of each whole storage."""
    kinds = Interpreter({}, STORAGE_TYPES)
    stored: dict[int, StorageRef] = {}
    starts: dict[str, int] = {}
    count, pos = _count(section, "storages")
    for _ in range(count):
        described, pos = read_pickle(section, kinds, pos, window=_WINDOW)
        if (
            not isinstance(described, tuple)
            or len(described) != 3
            or not isinstance(described[2], StorageType)
            or not described[2].dtype
        ):
            raise FormatError("a storage of unknown type in the tar archive")
        key, dtype = _key(described[0], stored), described[2].dtype
        (numel,) = _COUNT.unpack(_bytes(section, pos, _COUNT.size))
        pos += _COUNT.size
        nbytes = numel * DTYPES[dtype].bits // 8
        if not 0 <= nbytes <= section.size - pos:
            raise FormatError(f"storage '{key}' has {numel} elements, more than the tar archive holds")
        stored[key], starts[str(key)] = StorageRef(str(key), dtype, nbytes), pos
        pos += nbytes
    views, pos = read_pickle(section, kinds, pos)
    if not isinstance(views, list):
        raise FormatError("a tar archive of torch without its list of views")
    for view in views:
        if (
            not isinstance(view, tuple)
            or len(view) != 4
            or not all(type(part) is int and 0 <= part < 2**64 for part in view)
        ):
            raise FormatError("a view of a storage is not valid")
        target, root, offset, numel = view
        stored[_key(target, stored)] = _view(stored, root, offset, numel)
    if pos != section.size:
        raise FormatError(f"{section.size - pos} bytes follow the storages")
    return stored, starts


def _view(stored: Mapping[int, StorageRef], root: int, offset: int, numel: int) -> StorageRef:
    whole = stored.get(root)
    if whole is None:
        raise FormatError(f"a view of the storage '{root}', which is not in the file")
    width = DTYPES[whole.dtype].bits // 8
    limit = whole.nbytes if whole.length < 0 else whole.length
    if (offset + numel) * width > limit:
        raise FormatError(f"a view of {numel} elements from {offset} exceeds the storage '{root}'")
    return replace(whole, start=whole.start + offset * width, length=numel * width)


def _tensors(section: Section, stored: Mapping[int, StorageRef]) -> dict[int, TensorRef]:
    kinds = Interpreter({}, TENSOR_TYPES)
    tensors: dict[int, TensorRef] = {}
    count, pos = _count(section, "tensors")
    for _ in range(count):
        described, pos = read_pickle(section, kinds, pos, window=_WINDOW)
        if not isinstance(described, tuple) or len(described) != 3 or not isinstance(described[2], DTypeRef):
            raise FormatError("a tensor of unknown type in the tar archive")
        key = _key(_key(described[0], stored), tensors)
        storage = stored.get(described[1]) if type(described[1]) is int else None
        if storage is None or storage.dtype != described[2].code:
            raise FormatError(f"tensor '{key}' has no storage of its type in the tar archive")
        (rank,) = _RANK.unpack(_bytes(section, pos, _RANK.size))
        if not 0 <= rank <= section.size // _COUNT.size:
            raise FormatError(f"tensor '{key}' has {rank} dimensions")
        pos += _RANK.size
        numbers = struct.unpack(f"<{2 * rank + 1}q", _bytes(section, pos, (2 * rank + 1) * _COUNT.size))
        pos += (2 * rank + 1) * _COUNT.size
        tensors[key] = tensor_view(storage, storage.dtype, numbers[-1], numbers[:rank], numbers[rank:-1])
    if pos != section.size:
        raise FormatError(f"{section.size - pos} bytes follow the tensors")
    return tensors


def _count(section: Section, noun: str) -> tuple[int, int]:
    count, pos = read_pickle(section, Interpreter({}, {}), 0, window=_WINDOW)
    if type(count) is not int or not 0 <= count <= section.size:
        raise FormatError(f"a tar archive of torch without the number of its {noun}")
    return count, pos


def _key(key: object, known: Mapping[int, object]) -> int:
    if type(key) is not int or not 0 <= key < 2**64:
        raise FormatError("a storage or tensor in the tar archive has a key that is not an address")
    if key in known:
        raise FormatError(f"two storages or tensors have the key '{key}'")
    return key


def _bytes(section: Section, start: int, count: int) -> bytes:
    if start + count > section.size:
        raise FormatError("a member of the tar archive ends too early")
    return section.read(start, count)


def _resolve(
    pid: object, stored: Mapping[int, StorageRef], tensors: Mapping[int, TensorRef], sources: list[str]
) -> object:
    if isinstance(pid, tuple) and pid:
        # A module class, with the path and the text of its source file.
        if len(pid) == 3 and isinstance(pid[1], str) and pid[1]:
            sources.append(pid[1])
        return pid[0]
    if isinstance(pid, str) and pid.isascii() and pid.isdigit() and len(pid) <= 20:
        pid = int(pid)
    if type(pid) is not int or (pid not in tensors and pid not in stored):
        raise FormatError("corrupt pickle: a persistent id does not name a tensor")
    return tensors.get(pid) or stored[pid]
