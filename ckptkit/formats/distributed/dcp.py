"""Read checkpoints of ``torch.distributed.checkpoint`` (DCP): a ``.metadata`` file, and files of torch zip archives.

DCP itself leaves memory uninitialised where chunks are missing, follows ``../``, and runs code that the metadata names.
This reader runs no code. Opening the directory checks that the chunks cover each tensor, and that names and ranges are
valid. The first read of a chunk checks the header of the chunk.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NoReturn

from ckptkit.core.checkpoint import Checkpoint, KeyPath, Payload, Record, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Extent, Inflated, Region
from ckptkit.core.files.places import join
from ckptkit.core.files.pool import FilePool
from ckptkit.core.files.source import Folder, Section
from ckptkit.core.text import human_bytes, plural, quoted
from ckptkit.errors import ChangedError, CkptkitError, FormatError, PathError
from ckptkit.formats.distributed.dcp_metadata import DCP_VERSION, DcpMetadata, DcpTensor, Place, read_metadata
from ckptkit.formats.distributed.dcp_safetensors import open_dcp_safetensors
from ckptkit.formats.distributed.file_names import DCP_METADATA, DCP_SUFFIX
from ckptkit.formats.layout import Block, BlockTensor, Box, check_cover, step_budget
from ckptkit.formats.sharded import is_plain_name
from ckptkit.formats.torch.checkpoint import TorchFile, build_checkpoint
from ckptkit.formats.torch.objects import ArrayRef, StorageRef, TensorRef, TorchObjects
from ckptkit.formats.torch.tree import leaves, type_name
from ckptkit.formats.torch.zip import read_torch_zip
from ckptkit.formats.zip_archive import ZipDirectory, read_zip_directory
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_dcp"]

_METADATA_OF_RANK = re.compile(r"__\d+\.metadata")
_LARGEST_METADATA = 256 << 20
_MOST_FILES = 10_000_000
_BEFORE, _AFTER = 4 << 10, 72 << 10  # bytes of an item: its pickle is before its numbers, its directory after them
_FEW = 4
_MOST_PLACES = 2_000_000  # in the nested state
_LARGEST_OBJECT, _LARGEST_OBJECTS, _MOST_OBJECTS = 1 << 20, 16 << 20, 1000
_MOST_PARTS = 1_000_000  # of all objects together


def open_dcp(folder: Folder, selection: Selection = WEIGHTS) -> Checkpoint:
    """Return the Checkpoint in a folder that ``torch.distributed.checkpoint`` wrote, in either of its forms.

    Reading a tensor joins its chunks. ``selection`` can name a mapping in the saved state, such as ``model``. Raises
    ``FormatError`` if the save was interrupted, a file is missing or short, or chunks overlap or leave a gap. Reading a
    tensor raises ``FormatError`` if a chunk contradicts the metadata.
    """
    folder.will_open([DCP_METADATA])
    names = folder.names(_MOST_FILES).all
    if DCP_METADATA not in names:
        parts = sum(name.endswith(DCP_SUFFIX) for name in names)
        if not parts:
            return open_dcp_safetensors(folder, names, selection)
        if any(_METADATA_OF_RANK.fullmatch(name) for name in names):
            raise FormatError(
                "saved with use_collectives=False: each rank has its own metadata, and there is no joined one",
                hint="load it with torch, and save it again with collectives",
                path=folder.path,
            )
        raise FormatError(
            f"{plural(parts, f'{DCP_SUFFIX} file')} and no {DCP_METADATA}, which is written last: an interrupted save?",
            hint="use the previous checkpoint",
            path=folder.path,
        )
    pool = FilePool(folder)
    with pool.closed_on_error():
        return _open(pool, selection, [name for name in names if name.endswith(DCP_SUFFIX)])


def _open(pool: FilePool, selection: Selection, names: list[str]) -> Checkpoint:
    file = pool.get(DCP_METADATA)
    if file.size > _LARGEST_METADATA:
        raise FormatError(f"{file.size:,} bytes, more than the limit of {_LARGEST_METADATA:,}", path=file.path)
    try:
        metadata = read_metadata(file.read(0, file.size))
        steps = step_budget(sum(len(tensor.chunks) for tensor in metadata.tensors.values()))
        for tensor in metadata.tensors.values():
            check_cover(tensor.key, tensor.shape, [box for box, _ in tensor.chunks], steps)
    except FormatError as error:
        error.path = error.path or file.path
        raise
    _check_places(pool, metadata)
    items = _Items(pool, [place for _, _, place in _all_places(metadata)])
    objects = _read_objects(metadata.objects, items)
    state = {key: _tensor_ref(tensor) for key, tensor in metadata.tensors.items()}
    torch = TorchObjects()
    for references in (metadata.references, *objects.references):
        for name, count in references.items():
            torch.interpreter.references[name] = torch.interpreter.references.get(name, 0) + count
    return build_checkpoint(
        TorchFile(
            _nested(metadata.paths, {**state, **objects.values}),
            torch,
            file.size + objects.nbytes,
            lambda storage: _region(metadata.tensors[storage.key], items),
            partial(_records, metadata, items),
            tuple(_warnings(metadata, objects, set(names) - pool.files.keys())),
            is_loaded_whole=False,
        ),
        path=pool.folder.path,
        format="dcp",
        selection=selection,
        files=[part.path for part in pool.files.values()],
        close=pool.close,
        check=pool.check_unchanged,
    )


def _warnings(metadata: DcpMetadata, objects: _Objects, extra: set[str]) -> Iterator[str]:
    if metadata.version not in (None, DCP_VERSION):
        yield f"written in version {quoted(str(metadata.version))} of the format; {DCP_VERSION} is supported"
    if extra:
        yield f"{plural(len(extra), 'file')} not named in {DCP_METADATA}, left from another save: {quoted(min(extra))}"
    if objects.unread:
        yield f"{plural(len(objects.unread), 'stored object')} not read (too many or too large): {objects.unread[0]}"


def _check_places(pool: FilePool, metadata: DcpMetadata) -> None:
    names = dict.fromkeys(place.name for _, _, place in _all_places(metadata))
    pool.folder.will_open([name for name in names if is_plain_name(name)])
    taken: dict[str, list[tuple[int, int, str]]] = {}
    for key, what, place in _all_places(metadata):
        if not is_plain_name(place.name):
            raise FormatError(f"{quoted(key)}: the metadata places {what} in the unsafe file {quoted(place.name)}")
        try:
            file = pool.get(place.name)
        except PathError as error:
            raise FormatError(
                f"{error.reason} (the file that holds {what} of {quoted(key)})",
                hint="copy the whole directory again",
                path=error.path,
            ) from None
        if not place.length or place.offset + place.length > file.size:
            where = f"bytes {place.offset:,} to {place.offset + place.length:,}"
            raise FormatError(
                f"{quoted(key)}: the metadata places {what} at {where}, and the file has {file.size:,}: truncated?",
                hint="copy it again",
                path=file.path,
            )
        taken.setdefault(place.name, []).append((place.offset, place.length, key))
    for name, ranges in taken.items():
        ranges.sort()
        for (begin, length, key), (following, _, other) in pairwise(ranges):
            if begin + length > following:
                raise FormatError(
                    f"the metadata places {quoted(key)} and {quoted(other)} in the same bytes from {following:,}",
                    path=pool.get(name).path,
                )


def _all_places(metadata: DcpMetadata) -> Iterator[tuple[str, str, Place]]:
    for key, tensor in metadata.tensors.items():
        for box, place in tensor.chunks:
            yield key, f"the chunk at {list(box.offsets)}", place
    for key, place in metadata.objects.items():
        yield key, "the value", place


class _Branch(dict[object, object]):
    """A mapping or list of the nested state. Saved values that are dicts have another class."""


def _nested(paths: Mapping[str, KeyPath], values: Mapping[str, object]) -> object:
    root = _Branch()
    left = _MOST_PLACES
    for key, path in paths.items():
        left -= len(path)
        if left < 0:
            raise FormatError(f"the saved state is nested into more than {_MOST_PLACES:,} places")
        level = root
        for part in path[:-1]:
            branch = level.setdefault(part, _Branch())
            if not isinstance(branch, _Branch):
                raise FormatError(f"planner_data places {quoted(key)} inside a value that is not a mapping")
            level = branch
        if path[-1] in level:
            raise FormatError(f"planner_data gives {quoted(key)} the place of another value")
        level[path[-1]] = values[key]
    return _with_lists(root)


def _with_lists(branch: _Branch) -> object:
    for key, value in branch.items():
        if isinstance(value, _Branch):
            branch[key] = _with_lists(value)
    indices = [key for key in branch if isinstance(key, int)]
    if len(indices) < len(branch) or sorted(indices) != list(range(len(branch))):
        return dict(branch)
    return [branch[index] for index in range(len(branch))]


class StoredObject:
    """Stand-in for a saved value that is not read, and only listed by name."""


@dataclass(frozen=True, slots=True)
class _Objects:
    values: Mapping[str, object]
    unread: list[str]
    references: list[Mapping[str, int]]
    nbytes: int


class _Items:
    """Reader of the items in the files. Each item is a zip archive."""

    def __init__(self, pool: FilePool, places: Sequence[Place]) -> None:
        self.pool = pool
        self.places = places
        self.known: dict[Place, Extent] = {}
        self._opened = 0

    def archive(self, key: str, place: Place) -> ZipDirectory:
        self._opened += 1
        if self._opened <= _FEW:
            self._announce([place])
        elif self._opened == _FEW + 1:
            self._announce(self.places)
        with self._errors_about(key, place):
            return read_zip_directory(Section(self.pool.get(place.name), place.offset, place.length))

    def _announce(self, places: Iterable[Place]) -> None:
        """Say that what stands before and after the numbers of these items is read next."""
        ranges: dict[str, list[tuple[int, int]]] = {}
        for name, offset, length in sorted((place.name, place.offset, place.length) for place in places):
            end = offset + length
            found = [(offset, _BEFORE), (end - _AFTER, _AFTER)] if length > _BEFORE + _AFTER else [(offset, length)]
            ranges.setdefault(name, []).extend(found)
        for name, found in ranges.items():
            file = self.pool.get(name)
            if file.is_remote:
                file.will_read(found)

    def read(self, key: str, place: Place) -> TorchFile:
        archive = self.archive(key, place)
        with self._errors_about(key, place):
            return read_torch_zip(archive)

    @contextlib.contextmanager
    def _errors_about(self, key: str, place: Place) -> Iterator[None]:
        try:
            yield
        except ChangedError:
            raise
        except FormatError as error:
            self.refuse(key, place, error.reason)

    def refuse(self, key: str, place: Place, reason: str) -> NoReturn:
        raise FormatError(f"{quoted(key)}: the item at byte {place.offset:,}: {reason}",
                          path=self.pool.get(place.name).path) from None  # fmt: skip

    def chunk(self, tensor: DcpTensor, box: Box, place: Place) -> Payload:
        """Return the bytes of a chunk, after comparing its own header with the metadata."""
        if place not in self.known:
            payload = self.payload(self.read(tensor.key, place), tensor, box, place)
            if not isinstance(payload, Extent) or not isinstance(payload.file, Section):
                return payload
            section = payload.file
            self.known[place] = Extent(section.file, section.offset + payload.offset, payload.nbytes, payload.crc)
        return self.known[place]

    def payload(self, file: TorchFile, tensor: DcpTensor, box: Box, place: Place) -> Payload:
        """Return the bytes of an item. Raises ``FormatError`` where the item is not the chunk of the metadata."""
        if not isinstance(file.tree, TensorRef):
            self.refuse(tensor.key, place, f"holds {quoted(type_name(file.tree))}, not a tensor")
        with self._errors_about(tensor.key, place):
            found = build_checkpoint(file)
        info = found[""]
        expected = TensorInfo("", tensor.dtype, _element_shape(tensor.dtype, box.sizes))
        if (info.dtype, info.shape, info.kind) != (expected.dtype, expected.shape, "dense"):
            self.refuse(tensor.key, place, f"holds {info}, but the metadata says {expected}")
        payload = found.payload("")
        if isinstance(payload, Inflated):
            self.refuse(tensor.key, place, "is compressed, which DCP never does")
        return payload


@dataclass(frozen=True, slots=True)
class _BrokenPayload:
    """The payload of a broken item: reading it raises the error."""

    error: CkptkitError
    nbytes: int = 0

    def chunks(self) -> Iterator[bytes]:
        raise self.error


def _records(metadata: DcpMetadata, items: _Items, keys: Mapping[str, Sequence[str]]) -> Iterator[Record]:
    chunks = [(place, key, box) for key, tensor in metadata.tensors.items() for box, place in tensor.chunks]
    places = [*chunks, *((place, key, None) for key, place in metadata.objects.items())]
    for place, key, box in sorted(places, key=lambda item: (item[0].name, item[0].offset)):
        where = f"the item at byte {place.offset:,}"
        try:
            for record in _entries(metadata, items, keys, (place, key, box)):
                yield record._replace(name=f"{record.name} in {where}")
        except CkptkitError as error:
            yield Record(
                join(items.pool.folder.path, place.name),
                where,
                _BrokenPayload(error),
                keys=tuple(keys.get(key, (key,))),
            )


def _entries(
    metadata: DcpMetadata, items: _Items, keys: Mapping[str, Sequence[str]], item: tuple[Place, str, Box | None]
) -> Iterable[Record]:
    place, key, box = item
    if box is None:
        return items.archive(key, place).records({})
    file = items.read(key, place)
    items.payload(file, metadata.tensors[key], box, place)
    storage = file.tree.storage if isinstance(file.tree, TensorRef) else None
    return file.records({storage.key: keys.get(key, (key,))} if storage else {})


def _read_objects(objects: Mapping[str, Place], items: _Items) -> _Objects:
    values: dict[str, object] = {}
    unread: list[str] = []
    references: list[Mapping[str, int]] = []
    read = 0
    left = [_MOST_PARTS]
    for key, place in objects.items():
        values[key] = StoredObject()
        is_small = place.length <= _LARGEST_OBJECT and read + place.length <= _LARGEST_OBJECTS
        if not is_small or len(references) >= _MOST_OBJECTS:
            unread.append(f"{quoted(key)}, {human_bytes(place.length)}")
            continue
        file = items.read(key, place)
        read += max(place.length, file.pickle_size)  # an archive can be small because it is compressed
        references.append(file.objects.interpreter.references)
        try:
            # Tensors inside a saved object are not tensors of the state, and have no key in the state.
            has_tensors = any(
                isinstance(leaf, TensorRef) and not isinstance(leaf, ArrayRef) for _, leaf in leaves(file.tree, left)
            )
        except FormatError as error:
            items.refuse(key, place, error.reason)
        if not has_tensors:
            values[key] = file.tree
    return _Objects(values, unread, references, read)


def _element_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    # The last dimension in torch counts bytes, which hold two elements each; the safetensors dtype counts elements.
    return (*shape[:-1], 2 * shape[-1]) if dtype == "F4" and shape else shape


def _width(dtype: str) -> int:
    return max(DTYPES[dtype].bits, 8) // 8


def _tensor_ref(tensor: DcpTensor) -> TensorRef:
    if tensor.kind != "dense":
        return TensorRef(tensor.dtype, tensor.shape, kind=tensor.kind)
    strides = [1] * len(tensor.shape)
    for dim in range(len(strides) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * max(tensor.shape[dim], 1)
    storage = StorageRef(tensor.key, tensor.dtype, math.prod(tensor.shape) * _width(tensor.dtype))
    return TensorRef(tensor.dtype, tensor.shape, storage, 0, tuple(strides))


def _region(tensor: DcpTensor, items: _Items) -> Region:
    blocks = tuple(Block(box, partial(items.chunk, tensor, box, place)) for box, place in tensor.chunks)
    return BlockTensor(tensor.shape, _width(tensor.dtype), blocks)
