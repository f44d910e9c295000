"""What a file is that no reader here takes: named by its first bytes, with one line that says what would read it."""

from __future__ import annotations

from ckptkit.core.files import LocalFile
from ckptkit.core.text import quoted, shell_word
from ckptkit.errors import FormatError
from ckptkit.formats.foreign import is_flax, is_onnx, is_tensorflow_index, is_tensorflow_shard
from ckptkit.wrappers import AN_OPTIMIZER

__all__ = ["TAR_MEMBERS", "is_torch_tar", "refusal_of", "refuse_inner"]

TAR_MEMBERS = ("sys_info", "pickle", "tensors", "storages")
_UNPACK = "unpack it first"
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
    """Return whether ``head`` begins a tar archive whose first member is one of those of torch."""
    return head[257:262] == b"ustar" and head[:100].rstrip(b"\0") in (name.encode() for name in TAR_MEMBERS)


def refusal_of(file: LocalFile, head: bytes) -> FormatError:
    """Return the error that says what ``file`` is, which begins with ``head``, and what to do about it."""
    for magic, what, hint in _KNOWN_MAGICS:
        if head.startswith(magic):
            return FormatError(f"{what}", hint=hint)
    start = head.lstrip()[:64].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return FormatError("an HTML page, not a checkpoint (a failed download?)", hint="download it again")
    if is_onnx(head, file.size, file.read):
        return FormatError("an ONNX model, which is not read", hint="onnx.load reads it")
    if head[257:262] == b"ustar":
        return FormatError("a tar archive (torch before 0.4, or a packed directory)", hint=_UNPACK)
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return FormatError(
            "a bare pickle, not a file of torch.save", hint="load it where it was made, and torch.save it"
        )
    if is_flax(head):
        return FormatError(
            "a msgpack file of flax, which is not read", hint="flax.serialization.msgpack_restore reads it"
        )
    if is_tensorflow_index(file.read, file.size) or is_tensorflow_shard(file.path):
        return FormatError("a part of a TensorFlow checkpoint, which is not read", hint=_TENSORFLOW)
    if not head.strip(b"\0") and not _has_content(file):
        return FormatError("only zero bytes (an interrupted write?)", hint="copy it again")
    if len(head) < 8:
        return FormatError(f"too short to be a checkpoint: {file.size} bytes")
    return FormatError(f"an unknown format; it begins with {head[:8].hex(' ')}")


def refuse_inner(inner: str) -> None:
    """Raise ``FormatError`` where a mapping inside is asked for, of a format that has none."""
    if inner == AN_OPTIMIZER:
        raise FormatError("holds tensors alone, and no optimizer state", hint="give the file that was saved with it")
    if inner:
        raise FormatError(
            f"is flat: there is no mapping {quoted(inner)} inside", hint=f"use --keep {shell_word(inner + '.*')}"
        )


def _has_content(file: LocalFile) -> bool:
    size = min(file.size, 1 << 20)
    return any(file.read(0, size))
