"""Read the ``.metadata`` of a distributed checkpoint without running code, and check that it is consistent.

``torch.distributed.checkpoint`` loads this file with ``pickle.load``, which runs the code that the file names. Here the
classes of DCP become plain descriptions, and every other name becomes a reference that is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ckptkit.core.checkpoint import KeyPath
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError
from ckptkit.formats.layout import Box
from ckptkit.formats.pickle.machine import parse_pickle
from ckptkit.formats.pickle.values import CodeName, Interpreter, Placeholder
from ckptkit.formats.torch.objects import DTypeRef, TorchObjects
from ckptkit.formats.torch.tree import type_name

__all__ = ["DCP_VERSION", "METADATA_MODULE", "STORAGE_MODULE", "DcpMetadata", "DcpTensor", "Place", "read_metadata"]

_MOST_CHUNKS = 1_000_000
_MOST_COORDINATES = 8_000_000  # chunks times dimensions, since all tensors can share one list of chunks
_MOST_DIMENSIONS = 64
_LONGEST_PATH = 200
_LONGEST_LIST = 2**32
_LONGEST_SHOWN = 80

DCP_VERSION = "1.0.0"
METADATA_MODULE = "torch.distributed.checkpoint.metadata"
STORAGE_MODULE = "torch.distributed.checkpoint.filesystem"
_OLD_MODULE = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3, for the properties
_CLASSES: Final[Mapping[str, str]] = {
    **{f"{METADATA_MODULE}.{name}": name for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )},
    f"{_OLD_MODULE}.TensorProperties": "TensorProperties",
    f"{_OLD_MODULE}.MEM_FORMAT_ENCODING": "_MEM_FORMAT_ENCODING",
    f"{STORAGE_MODULE}._StorageInfo": "_StorageInfo",
}  # fmt: skip
_TORCH_NAMES = ("torch.Size", "torch.serialization._get_layout")
_ItemIndex = tuple[str, tuple[int, ...] | None]


@dataclass(frozen=True, slots=True)
class Place:
    """The position of an item: ``length`` bytes of the file ``name`` from ``offset``."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """A whole tensor as the metadata describes it, with the box and the place of each chunk that has elements.

    ``dtype`` is a safetensors code, ``shape`` the shape in torch. ``kind`` is ``"dense"`` or the layout of torch.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    chunks: tuple[tuple[Box, Place], ...]


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """The content of a ``.metadata``: tensors and other objects by FQN, and the path of each in the nested state."""

    tensors: Mapping[str, DcpTensor]
    objects: Mapping[str, Place]
    paths: Mapping[str, KeyPath]  # keys from the outermost mapping to the value, for every FQN
    version: str | None
    references: Mapping[str, int]  # code that the pickle names, and how often


def read_metadata(data: bytes) -> DcpMetadata:
    """Return the content of a ``.metadata``, without importing or running code.

    Raises ``FormatError`` if the bytes are not valid and complete DCP metadata, or too large. Also raises
    ``FormatError`` if a described item has no place or two places, or a place has no description. The caller must check
    that the chunks cover each tensor, and that the places exist.
    """
    interpreter = _interpreter()
    value, end = parse_pickle(data, interpreter)
    if end != len(data):
        raise FormatError(f"{len(data) - end:,} bytes follow the pickle in .metadata")
    fields = _fields(value, "Metadata", "the pickle")
    table = _dict(fields.get("state_dict_metadata"), "state_dict_metadata")
    places = _places(_dict(fields.get("storage_data"), "storage_data"))
    tensors: dict[str, DcpTensor] = {}
    objects: dict[str, Place] = {}
    left = [_MOST_CHUNKS, _MOST_COORDINATES]
    for key, item in table.items():
        if not isinstance(key, str):
            raise FormatError(f"state_dict_metadata has {_article(type_name(key))} as a key")
        if _class(item) == "BytesStorageMetadata":
            objects[key] = _place_of(places, key, None)
        else:
            tensors[key] = _tensor(key, item, places, left)
    if places:
        key, offset = next(iter(places))
        at = "" if offset is None else f" at {list(offset)}"
        raise FormatError(f"storage_data places {quoted(key)}{at}, which state_dict_metadata does not describe")
    version = fields.get("version")
    return DcpMetadata(
        tensors,
        objects,
        dict(_paths(table, fields.get("planner_data"))),
        version if isinstance(version, str) else None,
        interpreter.references,
    )


def _interpreter() -> Interpreter:
    def placeholder(dotted: str) -> Callable[..., object]:
        module, _, name = dotted.rpartition(".")
        kind = CodeName(module, name)
        return lambda *args: Placeholder(kind, args)

    torch = TorchObjects().interpreter
    builders = {dotted: placeholder(dotted) for dotted in _CLASSES}
    return Interpreter(builders | {name: torch.builders[name] for name in _TORCH_NAMES}, torch.constants)


def _class(value: object) -> str | None:
    return _CLASSES.get(str(value.factory)) if isinstance(value, Placeholder) else None


def _fields(value: object, kind: str, what: str, key: str | None = None) -> Mapping[object, object]:
    if not isinstance(value, Placeholder) or _class(value) != kind or not isinstance(value.state, dict):
        raise FormatError(f"{_prefix(key)}{what} is {_article(type_name(value))}, not a {kind} of DCP")
    return value.state


def _prefix(key: str | None) -> str:
    return "" if key is None else f"{quoted(key)}: "


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {quoted(noun)}"


def _dict(value: object, what: str) -> Mapping[object, object]:
    if not isinstance(value, dict):
        raise FormatError(f"{what} is {_article(type_name(value))}, not a dict")
    return value


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _sizes(value: object, key: str, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(map(_is_count, value)):
        raise FormatError(f"{quoted(key)}: {what} is not a tuple of counts: {_shown(value)}")
    if len(value) > _MOST_DIMENSIONS:
        raise FormatError(f"{quoted(key)}: {what} has {len(value)} dimensions, more than {_MOST_DIMENSIONS}")
    return value


def _shown(value: object) -> str:
    is_plain = value is None or isinstance(value, str | int | float) or (
        isinstance(value, tuple | list) and all(isinstance(item, str | int | float) for item in value[:16])
    )  # fmt: skip
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if not is_plain:
        return _article(type_name(value))
    shown = value[:16] if isinstance(value, tuple | list) else value
    if isinstance(shown, tuple | list) and any(isinstance(n, int) and n.bit_length() > 128 for n in shown):
        return f"{plural(len(shown), 'number')}, some with more than 128 bits"
    return quoted(str(shown)[:_LONGEST_SHOWN])


def _places(storage: Mapping[object, object]) -> dict[_ItemIndex, Place]:
    places: dict[_ItemIndex, Place] = {}
    for index, info in storage.items():
        item = _fields(index, "MetadataIndex", "a key of storage_data")
        key, offset = item.get("fqn"), item.get("offset")
        if not isinstance(key, str):
            raise FormatError(f"storage_data has {_article(type_name(key))} as a key")
        at = None if offset is None else _sizes(offset, key, "the offset in storage_data")
        if (key, at) in places:
            raise FormatError(f"storage_data places {quoted(key)} twice" + (f" at {list(at)}" if at else ""))
        places[key, at] = _place(key, _fields(info, "_StorageInfo", "its place", key))
    return places


def _place(key: str, fields: Mapping[object, object]) -> Place:
    name, offset, length = (fields.get(field) for field in ("relative_path", "offset", "length"))
    if not isinstance(name, str) or type(offset) is not int or type(length) is not int:
        raise FormatError(f"{quoted(key)}: its place is not a file name with an offset and a length")
    if not _is_count(offset) or not _is_count(length):
        raise FormatError(
            f"{quoted(key)}: its place has the offset {_shown(offset)} and the length {_shown(length)}, "
            "below 0 or above 2^63"
        )
    transforms = fields.get("transform_descriptors")
    if transforms:
        raise FormatError(
            f"{quoted(key)} is stored through the extension {_shown(transforms)}, which is not read",
            hint="load it with torch and that extension, and save it again without the extension",
        )
    return Place(name, offset, length)


def _place_of(places: dict[_ItemIndex, Place], key: str, offset: tuple[int, ...] | None) -> Place:
    place = places.pop((key, offset), None)
    if place is None:
        what = "it" if offset is None else f"the chunk at {list(offset)}"
        raise FormatError(f"{quoted(key)}: storage_data has no place for {what}")
    return place


def _tensor(key: str, item: object, places: dict[_ItemIndex, Place], left: list[int]) -> DcpTensor:
    fields = _fields(item, "TensorStorageMetadata", "its description", key)
    shape = _sizes(fields.get("size"), key, "the shape")
    dtype, kind = _properties(key, fields.get("properties"))
    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        raise FormatError(f"{quoted(key)}: its chunks are {_article(type_name(chunks))}, not a list")
    left[0] -= len(chunks)
    left[1] -= len(chunks) * len(shape)
    if min(left) < 0:
        raise FormatError(f"describes more than {_MOST_CHUNKS:,} chunks, or chunks with too many dimensions in total")
    placed = []
    for chunk in chunks:
        parts = _fields(chunk, "ChunkStorageMetadata", "a chunk", key)
        box = Box(
            _sizes(parts.get("offsets"), key, "the offset of a chunk"),
            _sizes(parts.get("sizes"), key, "the size of a chunk"),
        )
        if 0 in box.sizes:
            # Each rank without rows still writes an empty chunk, all at the same offset.
            places.pop((key, box.offsets), None)
        else:
            placed.append((box, _place_of(places, key, box.offsets)))
    return DcpTensor(key, dtype, shape, kind, tuple(placed))


def _properties(key: str, value: object) -> tuple[str, str]:
    state = value.state if isinstance(value, Placeholder) and _class(value) == "TensorProperties" else None
    if not isinstance(state, tuple) or len(state) < 2:
        raise FormatError(f"{quoted(key)}: its properties are {_article(type_name(value))}, not TensorProperties")
    dtype, layout = state[:2]
    if not isinstance(dtype, DTypeRef):
        raise FormatError(f"{quoted(key)}: its dtype is {_article(type_name(dtype))}, not a known dtype")
    return dtype.code, "dense" if layout == "torch.strided" else "sparse"


def _paths(table: Mapping[object, object], planner: object) -> Iterator[tuple[str, KeyPath]]:
    # Without flattening there is no planner data, and each key is its own path.
    paths = planner if isinstance(planner, dict) else {}
    for key in table:
        path = paths.get(key)
        if path is None:
            path = (key,)
        is_plain = isinstance(path, tuple | list) and all(type(part) in (str, int) for part in path)
        if not is_plain or not 0 < len(path) <= _LONGEST_PATH:
            raise FormatError(f"{quoted(str(key))}: its path in planner_data is {_shown(path)}")
        if any(isinstance(part, int) and not 0 <= part < _LONGEST_LIST for part in path):
            raise FormatError(f"{quoted(str(key))}: its path in planner_data has an index out of bounds")
        yield str(key), tuple(path)
