"""Recognise formats that ckptkit does not read, so that the error can name a program that reads them."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection

from ckptkit.core.files.places import is_url, name_of
from ckptkit.core.files.source import ByteSource
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.errors import FormatError
from ckptkit.lazy_patterns import lazy_pattern
from ckptkit.wrappers.envelopes import Selection

__all__ = [
    "TAR_MEMBERS",
    "find_foreign_weights",
    "is_flax",
    "is_onnx",
    "is_tensorflow_index",
    "is_tensorflow_shard",
    "is_torch_tar",
    "refuse_selection",
    "unsupported_archive",
    "unsupported_directory",
    "unsupported_format",
]


_VERSION, _GRAPH, _PRODUCER = 0x08, 0x3A, 0x12
_STRINGS = (_PRODUCER, 0x1A, 0x22, 0x32)  # producer, version of the producer, domain, documentation
_MODEL_VERSION = 0x28
_AFTER_GRAPH = (0x42, 0x72, 0xA2, 0xCA)  # opset imports, metadata, training, functions
_IN_GRAPH = (0x0A, 0x12, 0x2A)  # nodes, name, initializers
_TABLE_END = bytes.fromhex("57fb808b247547db")
_TENSORFLOW_SHARD = lazy_pattern(r".+\.data-\d{5}-of-\d{5}")
_NEWEST_ONNX = 63
_SAVED_MODEL, _SAVED_MODEL_HINT = "a SavedModel of TensorFlow, which is not read", "tf.saved_model.load reads it"
_CORE_ML, _CORE_ML_HINT = "a Core ML model, which is not read", "coremltools.models.MLModel reads it"
_FOREIGN_SUFFIXES = (
    ".h5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".onnx.data", ".ot", ".tflite", ".mlmodel", ".mlpackage",
    ".pdparams", ".nemo", ".engine",
)  # fmt: skip


def unsupported_directory(names: Collection[str]) -> FormatError | None:
    """Return the error that names the unsupported format of a directory with these file names, or None."""
    if not {"saved_model.pb", "saved_model.pbtxt"}.isdisjoint(names):
        return FormatError(_SAVED_MODEL, hint=_SAVED_MODEL_HINT)
    if {"Manifest.json", "Data"}.issubset(names):
        return FormatError(_CORE_ML, hint=_CORE_ML_HINT)
    if not {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}.isdisjoint(names):
        return FormatError("a checkpoint of Orbax (JAX), which is not read", hint="orbax.checkpoint reads it")
    if not {".zarray", ".zgroup", "zarr.json"}.isdisjoint(names):
        return FormatError("a directory of zarr arrays, which is not read", hint="zarr reads it")
    if any(_TENSORFLOW_SHARD.fullmatch(name) for name in names):
        return FormatError("a checkpoint of TensorFlow, which is not read", hint="tf.train.load_checkpoint reads it")
    return None


def find_foreign_weights(names: Collection[str]) -> list[str]:
    """Return the file names that only other frameworks give to files of weights, in order."""
    models = {name.removesuffix(".xml") for name in names if name.endswith(".xml")}  # OpenVINO: x.xml and x.bin
    return sorted(
        name
        for name in names
        if name.endswith(_FOREIGN_SUFFIXES)
        or (name.endswith(".bin") and name.removesuffix(".bin") in models)
        or (name.endswith(".index.json") and name.removesuffix(".index.json").endswith(_FOREIGN_SUFFIXES))
        or _TENSORFLOW_SHARD.fullmatch(name)
    )


def is_tensorflow_shard(path: str) -> bool:
    """Return whether TensorFlow gives this name to a file that holds only the bytes of tensors."""
    return _TENSORFLOW_SHARD.fullmatch(path) is not None


def is_tensorflow_index(read: Callable[[int, int], bytes], size: int) -> bool:
    """Return whether a file ends like the index of a TensorFlow checkpoint."""
    return size >= 48 and read(size - 8, 8) == _TABLE_END


def is_onnx(head: bytes, size: int, read: Callable[[int, int], bytes]) -> bool:
    """Return whether a file of ``size`` bytes is an ONNX model, judging by the order of its fields up to the graph."""
    if len(head) < 4 or head[0] != _VERSION or not 0 < head[1] <= _NEWEST_ONNX:
        return False
    at, last = 2, _VERSION
    while at < len(head) and last < head[at]:
        last = head[at]
        value, at = _varint(head, at + 1)
        if last == _GRAPH:
            end = at + value
            return at < len(head) and head[at] in _IN_GRAPH and end < size and read(end, 1)[0] in _AFTER_GRAPH
        if last in _STRINGS:
            text = head[at : at + value]
            at += value
            if last == _PRODUCER and value and len(text) == value and text.isascii() and text.decode().isprintable():
                return True
        elif last != _MODEL_VERSION:
            return False
    return False


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    return value, at


_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8,
          0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}  # fmt: skip
_SIZED = {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4}  # texts and bytes -> width of their length
_MAPS = {0xDE: 2, 0xDF: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_ARRAY, _THREE_ITEMS = 1, 0x93  # flax: an extension of type 1 with shape, dtype and bytes


def is_flax(head: bytes) -> bool:
    """Return whether a file begins like a file of flax: nested msgpack mappings from names to arrays."""
    at, left = 0, [1]
    while at < len(head):
        byte = head[at]
        if 0x80 <= byte <= 0x8F or byte in _MAPS:
            width = _MAPS.get(byte, 0)
            count = int.from_bytes(head[at + 1 : at + 1 + width]) if width else byte & 0x0F
            at += 1 + width
            left.append(count)
        elif len(left) == 1:
            return False
        elif byte in _EXTENSIONS:
            width = _EXTENSIONS[byte]
            return head[at + 1 + width : at + 3 + width] == bytes((_ARRAY, _THREE_ITEMS))
        else:
            end = _end_of_scalar(head, at)
            if end is None:
                return False
            at = end
            left[-1] -= 1
        while len(left) > 1 and not left[-1]:
            left.pop()
            left[-1] -= 1
        if len(left) == 1:
            return False
        end = _end_of_scalar(head, at)
        if end is None or not (0xA0 <= head[at] <= 0xBF or head[at] in (0xD9, 0xDA)):
            return False
        at = end
    return False


def _end_of_scalar(head: bytes, at: int) -> int | None:
    """Return the end of the scalar at ``at``, or None if another kind of value begins there."""
    if at >= len(head):
        return None
    byte = head[at]
    if byte < 0x80 or byte >= 0xE0:
        return at + 1
    if 0xA0 <= byte <= 0xBF:
        return at + 1 + (byte & 0x1F)
    if byte in _FIXED:
        return at + 1 + _FIXED[byte]
    if byte in _SIZED:
        width = _SIZED[byte]
        return at + 1 + width + int.from_bytes(head[at + 1 : at + 1 + width])
    return None


TAR_MEMBERS = ("sys_info", "pickle", "tensors", "storages")
_UNPACK = "unpack it first"
_SAVE_IT = "load it in the program that wrote it, and use torch.save"
_TENSORFLOW = "tf.train.load_checkpoint reads it"
_KNOWN_MAGICS = (
    (b"\x1f\x8b", "a gzip-compressed file", _UNPACK),
    (b"PK\5\6", "an empty zip archive", None),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", _UNPACK),
    (b"BZh", "a bzip2-compressed file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd-compressed file", _UNPACK),
    (b"version https://git-lfs", "a git-lfs pointer, not the weights", "run git lfs pull"),
    (b"\x89HDF", "an HDF5 file (Keras?), which is not read", "h5py reads it"),
    (b"model_checkpoint_path:", "the state of a TensorFlow checkpoint, which is not read", _TENSORFLOW),
    (b"\x89PNG", "a PNG picture", None),
)


def is_torch_tar(head: bytes) -> bool:
    """Return whether ``head`` begins a tar archive of torch 0.1, judging by the name of the first member."""
    return head[257:262] == b"ustar" and head[:100].rstrip(b"\0") in (name.encode() for name in TAR_MEMBERS)


def unsupported_format(file: ByteSource, head: bytes) -> FormatError:
    """Return the error that names the format of ``file``, which begins with ``head``, and says what to do."""
    for magic, description, hint in _KNOWN_MAGICS:
        if head.startswith(magic):
            return FormatError(description, hint=hint)
    start = head.lstrip()[:64].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return FormatError("an HTML page, not a checkpoint (a failed download?)", hint="download it again")
    if is_onnx(head, file.size, file.read):
        return FormatError("an ONNX model, which is not read", hint="onnx.load reads it")
    if head.lstrip()[:1] in (b"{", b"[") and file.path.lower().endswith(".json"):
        return FormatError(
            "a JSON file, which holds no tensors", hint="give the directory, the file of weights, or the index"
        )
    if head[257:262] == b"ustar":
        return FormatError("a tar archive (torch before 0.4, or a packed directory)", hint=_UNPACK)
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return FormatError("a bare pickle, not a file of torch.save", hint=_SAVE_IT)
    if is_flax(head):
        return FormatError(
            "a msgpack file of flax, which is not read", hint="flax.serialization.msgpack_restore reads it"
        )
    if head[4:8] == b"TFL3":
        return FormatError("a TensorFlow Lite model, which is not read", hint="tf.lite.Interpreter reads it")
    if file.path.endswith(".mlmodel"):
        return FormatError(_CORE_ML, hint=_CORE_ML_HINT)
    if name_of(file.path) == "saved_model.pb":
        return FormatError(_SAVED_MODEL, hint=_SAVED_MODEL_HINT)
    if is_tensorflow_index(file.read, file.size) or is_tensorflow_shard(file.path):
        return FormatError("a file of a TensorFlow checkpoint, which is not read", hint=_TENSORFLOW)
    if not head.strip(b"\0") and not _has_content(file):
        return FormatError("only zero bytes (an interrupted write?)", hint="copy it again")
    if len(head) < 8:
        return FormatError(f"too short to be a checkpoint: {file.size} bytes")
    if file.path.endswith(".py"):
        module = name_of(file.path).removesuffix(".py")
        return FormatError("Python source, not a checkpoint", hint=f"for a live model write py:{module}:callable")
    if _is_text(head):
        return FormatError("a text file, which holds no tensors", hint="give the file of weights, or its directory")
    return FormatError(f"unknown format: the first bytes are {head[:8].hex(' ')}", hint=_SAVE_IT)


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the head can end inside a character
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char in "\t\n\r\f" for char in text)


def unsupported_archive(path: str, names: Collection[str], suffixes: tuple[str, ...]) -> FormatError | None:
    """Return the error for a zip archive with files of weights, whose names end with ``suffixes``, or None without."""
    weights = [name for name in names if name.lower().endswith(suffixes)]
    is_wheel = any(name.endswith(".dist-info/WHEEL") for name in names)
    if not weights and not is_wheel:
        return None
    what = "a Python wheel" if is_wheel else "a zip archive of other files"
    held = f"{plural(len(weights), 'file')} of weights: {listed(weights, 3)}" if weights else "no file of weights"
    name = name_of(path)
    folder = name.rpartition(".")[0] or f"{name}.unpacked"
    call = f": python -m zipfile -e {shell_word(path)} {shell_word(folder)}" if weights and not is_url(path) else ""
    return FormatError(f"{what}, which holds {held}", hint=f"{_UNPACK}{call}" if weights else None)


def refuse_selection(selection: Selection, path: str | None = None) -> None:
    """Raise ``FormatError`` unless the weights are selected, since this format cannot hold nested mappings."""
    if selection.optimizer:
        raise FormatError(
            "holds only tensors and no optimizer state", hint="give the file that holds the optimizer state", path=path
        )
    if selection.key:
        raise FormatError(
            f"holds only tensors, and not a mapping {quoted(selection.key)}",
            hint=f"without the :: part, --keep {shell_word(selection.key + '.*')} selects keys by their names",
            path=path,
        )


def _has_content(file: ByteSource) -> bool:
    size = min(file.size, 1 << 20)
    return any(file.read(0, size))
