"""Read torch's format before 1.6: five pickles, then the length and the bytes of each storage."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

from ckptkit.core.checkpoint import Checkpoint, Record
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Extent, Region
from ckptkit.core.files.source import ByteSource
from ckptkit.core.files.starts import LateStarts
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError
from ckptkit.formats.pickle.machine import TruncatedPickleError, parse_pickle
from ckptkit.formats.pickle.values import Interpreter
from ckptkit.formats.torch.checkpoint import LARGEST_PICKLE, TorchFile, build_file_checkpoint, refuse_many_tensors
from ckptkit.formats.torch.objects import StorageRef, TensorRef, TorchObjects
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_torch_legacy", "read_pickle", "read_torch_legacy"]

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle holds this number, which identifies the format
_PROTOCOL = 1001
_FIRST_WINDOW = 16 << 20  # nearly every pickle ends inside, so it is parsed once
_SMALL_WINDOW = 1 << 12
_STORAGE_KEYS_WINDOW = 1 << 20
_REMOTE_WINDOW = 1 << 15  # more bytes would come late, and are seldom needed
_UNTYPED = "it was written on a big-endian machine, and the byte order of some numbers is unknown"
_LENGTH = struct.Struct("<q")


def open_torch_legacy(file: ByteSource, selection: Selection = WEIGHTS) -> Checkpoint:
    """Return the Checkpoint in a legacy torch file; the Checkpoint closes the file.

    Raises ``FormatError`` for a file that contradicts itself or ends too early.
    """
    return build_file_checkpoint(read_torch_legacy(file), file, "torch-legacy", selection)


def read_torch_legacy(file: ByteSource, *, largest: int = LARGEST_PICKLE) -> TorchFile:
    """Return the parsed pickle of a legacy torch file.

    Raises ``FormatError`` as ``open_torch_legacy`` does, and for a pickle of more than ``largest`` bytes.
    """
    objects = TorchObjects()
    plain = Interpreter({}, {})
    magic, pos = read_pickle(file, plain, 0, largest=largest, window=_SMALL_WINDOW)
    if magic != _MAGIC:
        raise FormatError("a bare pickle, not a file of torch.save")
    protocol, pos = read_pickle(file, plain, pos, largest=largest, window=_SMALL_WINDOW)
    if protocol != _PROTOCOL:
        raise FormatError(f"a legacy torch file whose protocol is not {_PROTOCOL}")
    info, pos = read_pickle(file, plain, pos, largest=largest, window=_SMALL_WINDOW)
    big = isinstance(info, dict) and info.get("little_endian") is False
    start = pos
    tree, pos = read_pickle(file, objects.interpreter, pos, largest=largest)
    size = pos - start
    storage_keys, pos = read_pickle(file, plain, pos, largest=largest, window=_STORAGE_KEYS_WINDOW)
    starts = _storage_starts(file, objects, storage_keys, pos)

    def find(storage: StorageRef) -> None:
        if storage.key not in starts:
            raise FormatError(f"storage {quoted(storage.key)} is not in the file")

    def locate(storage: StorageRef) -> Region:
        find(storage)
        return Extent(file, starts[storage.key], storage.nbytes)

    def has_unknown_byte_order(tensor: TensorRef) -> bool:
        # torch wrote numbers of up to 8 bytes little-endian on every machine, and mixed up the parts of complex ones.
        dtype = DTYPES[tensor.dtype]
        untyped = tensor.storage is not None and not tensor.storage.dtype
        return big and (dtype.parts > 1 or (untyped and dtype.part_bytes > 1))

    def records(keys: Mapping[str, Sequence[str]]) -> Iterator[Record]:
        for key in starts:
            yield Record(file.path, f"storage {key}", locate(objects.storages[key]), keys=tuple(keys.get(key, ())))

    is_unclear = big and any(
        not storage.dtype or DTYPES[storage.dtype].parts > 1 for storage in objects.storages.values()
    )
    return TorchFile(
        tree,
        objects,
        size,
        locate,
        records,
        warnings=("written on a big-endian machine, where torch stores numbers little-endian too",) if big else (),
        has_unknown_byte_order=has_unknown_byte_order,
        pickle=lambda: file.read(start, size),
        unwritable=_UNTYPED if is_unclear else "",
        find=find if file.is_remote else None,
    )


def read_pickle(
    file: ByteSource,
    interpreter: Interpreter,
    start: int,
    *,
    largest: int = LARGEST_PICKLE,
    window: int = _FIRST_WINDOW,
) -> tuple[object, int]:
    """Return the value of the pickle at ``start`` and the offset of the next byte; no code is run.

    Raises ``FormatError`` for anything but a pickle of at most ``largest`` bytes.
    """
    # Only parsing shows where a pickle ends, and the storages that follow can be large.
    # Therefore a window is read, and a larger one only if the pickle does not end inside.
    if file.is_remote:
        window = min(window, _REMOTE_WINDOW)
    while True:
        data = file.read(start, min(window, file.size - start))
        refuse_many_tensors(data)
        try:
            value, end = parse_pickle(data, interpreter)
        except TruncatedPickleError as error:
            if len(data) == file.size - start:
                raise FormatError(error.reason, hint="download or copy it again") from None
            if window >= largest:
                raise FormatError(f"a pickle of more than {largest} bytes") from None
            window *= 4
        else:
            return value, start + end


def _storage_starts(file: ByteSource, objects: TorchObjects, keys: object, pos: int) -> Mapping[str, int]:
    """Return where each storage begins, behind its number of elements. Raises ``FormatError``."""
    if not isinstance(keys, list) or not all(
        isinstance(key, str) or (type(key) is int and 0 <= key < 2**64) for key in keys
    ):
        raise FormatError("a legacy torch file without a list of storages")
    fronts: dict[str, int] = {}
    for key in map(str, keys):
        storage = objects.storages.get(key)
        if storage is None:
            raise FormatError(f"no tensor uses storage {quoted(key)}, which is in the file")
        if key in fronts:
            raise FormatError(f"storage {quoted(key)} is listed twice")
        fronts[key] = pos
        pos += _LENGTH.size + storage.nbytes

    def front_of(key: str) -> tuple[int, int]:
        if fronts[key] + _LENGTH.size > file.size:
            raise FormatError(f"ends before storage {quoted(key)}: truncated?", hint="download or copy it again")
        return fronts[key], _LENGTH.size

    def start_of(key: str, data: bytes) -> int:
        storage, start = objects.storages[key], fronts[key] + _LENGTH.size
        _check_numel(key, storage, *_LENGTH.unpack(data))
        if start + storage.nbytes > file.size:
            raise FormatError(
                f"ends {plural(start + storage.nbytes - file.size, 'byte')} before the end of storage {quoted(key)}: "
                "truncated?",
                hint="download or copy it again",
            )
        return start

    starts: Mapping[str, int] = LateStarts(file, fronts, front_of, start_of)
    if not file.is_remote:
        starts = {key: start_of(key, file.read(*front_of(key))) for key in fronts}
    missing = [key for key in objects.storages if key not in starts]
    if missing:
        raise FormatError(f"storage {quoted(missing[0])} is not in the file")
    if pos < file.size:
        raise FormatError(f"{file.size - pos} bytes follow the last storage")
    if pos > file.size:
        raise FormatError(
            f"ends {plural(pos - file.size, 'byte')} too early: truncated?", hint="download or copy it again"
        )
    return starts


def _check_numel(key: str, storage: StorageRef, numel: int) -> None:
    width = DTYPES[storage.dtype].bits // 8 if storage.dtype else 1
    if numel * width != storage.nbytes:
        raise FormatError(
            f"storage {quoted(key)}: the pickle says {storage.nbytes} bytes, "
            f"the file has {numel} elements of {width} bytes"
        )
