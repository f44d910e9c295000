"""The one door through which paths become checkpoints; a format is told by its content."""

from __future__ import annotations

import os

from ckptkit.errors import CkptkitError, FormatError, PathError
from ckptkit.formats.safetensors import LARGEST_HEADER, open_safetensors
from ckptkit.storage import LocalFile
from ckptkit.tensors import Checkpoint
from ckptkit.text import printable, quoted

__all__ = ["LIVE_PREFIX", "open_checkpoint"]

# Readers are imported by the functions that need them: listing a small file shall cost little more than the file.
LIVE_PREFIX = "py:"
_SINGLE_FILES = (
    "model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin",
    "diffusion_pytorch_model.safetensors", "consolidated.safetensors", "consolidated.00.pth",
)  # fmt: skip
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".th", ".tar")
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # the first pickle, behind its protocol and frame
_UNPACK = "unpack it first"
_KNOWN_MAGICS = (
    (b"\x1f\x8b", "a gzip-compressed file", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", _UNPACK),
    (b"BZh", "a bzip2-compressed file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd-compressed file", _UNPACK),
    (b"version https://git-lfs", "a git-lfs pointer, not the weights", "run git lfs pull"),
    (b"GGUF", "a GGUF file, which is not read yet", "gguf-py reads it"),
    (b"\x89HDF", "an HDF5 file (Keras?), which is not read", "h5py reads it"),
    (b"\x93NUMPY", "a NumPy array, which is not read yet", "numpy.load reads it"),
    (b"\x89PNG", "a PNG picture", None),
)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint at ``path``: its names, shapes and byte ranges, with no tensor read and no code run.

    ``path`` is a file, a directory with shards, ``PATH::a.b`` for a mapping inside a checkpoint, or
    ``py:package.module:callable`` for a live model, whose code then is run. The format is told by content.
    Raises ``PathError`` where nothing readable is there, ``FormatError`` where it is no whole and honest
    checkpoint, and ``ModelError`` where a live model cannot be built.
    """
    name = os.fspath(path)
    try:
        if name.startswith(LIVE_PREFIX):
            from ckptkit.formats.live import open_live

            return open_live(name.removeprefix(LIVE_PREFIX), name)
        return _open_path(name)
    except CkptkitError as error:
        if error.path is None:
            error.path = name
        raise
    except OSError as error:
        raise PathError((error.strerror or str(error)).lower(), path=name) from None


def _open_path(name: str) -> Checkpoint:
    inner = ""
    if "::" in name and not os.path.exists(name):
        name, _, inner = name.rpartition("::")
    if "://" in name and not os.path.exists(name):
        raise PathError("remote paths are not read yet", hint="download it first", path=name)
    if os.path.isdir(name):
        return _open_directory(name, inner)
    if name.endswith(".index.json"):
        directory, index = os.path.split(name)
        return _open_shards(directory or ".", index, inner, whole=False)
    return _open_file(name, inner)


def _open_shards(directory: str, index: str, inner: str, *, whole: bool) -> Checkpoint:
    if inner:
        raise FormatError(
            f"is flat: there is no mapping {quoted(inner)} inside", hint=f"use --keep {quoted(inner + '.*')}"
        )
    from ckptkit.formats.sharded import open_sharded

    return open_sharded(directory, index, lambda path: _open_file(path, ""), whole=whole)


def _open_directory(directory: str, inner: str) -> Checkpoint:
    from ckptkit.formats.dcp import is_dcp, open_dcp
    from ckptkit.formats.sharded import INDEX_SUFFIXES, find_index

    names = os.listdir(directory)
    index = find_index(names)
    if index is None and is_dcp(names):
        return open_dcp(directory, inner)
    single = next((name for name in _SINGLE_FILES if name in names), None)
    if index is not None:
        checkpoint = _open_shards(directory, index, inner, whole=True)
        if single is not None:
            checkpoint.warnings += (f"{quoted(single)} lies beside the index {quoted(index)}, which is the one read",)
        return checkpoint
    if single is not None:
        return _open_file(os.path.join(directory, single), inner)
    weights = sorted(name for name in names if name.endswith((".safetensors", *_TORCH_SUFFIXES)))
    if len(weights) == 1:
        return _open_file(os.path.join(directory, weights[0]), inner)
    if weights:
        listed = ", ".join(map(printable, weights[:4]))
        raise FormatError(
            f"a directory with {len(weights)} files of weights and no index, such as {listed}",
            hint="give the path of the one meant",
        )
    raise FormatError(
        "a directory without a checkpoint in it",
        hint=f"looked for an index (*{INDEX_SUFFIXES[0]}, *{INDEX_SUFFIXES[1]}) and for {', '.join(_SINGLE_FILES[:2])}",
    )


def _open_file(name: str, inner: str) -> Checkpoint:
    file = LocalFile(name)
    try:
        checkpoint = _open_by_content(file, inner)
    except BaseException as error:
        file.close()
        if isinstance(error, CkptkitError) and error.path is None:
            error.path = name
        raise
    named = "safetensors" if name.endswith(".safetensors") else "torch" if name.endswith(_TORCH_SUFFIXES) else None
    if named is not None and not checkpoint.format.startswith(named):
        checkpoint.warnings += (f"the name says {named}, the content is {checkpoint.format}: read by content",)
    return checkpoint


def _open_by_content(file: LocalFile, inner: str) -> Checkpoint:
    if file.size == 0:
        raise FormatError("the file is empty", hint="download or copy it again")
    head = file.read(0, min(file.size, 512))
    if head.startswith(b"PK\3\4"):
        from ckptkit.formats.torch_zip import open_torch_zip

        return open_torch_zip(file, inner)
    if head[:1] == b"\x80" and _LEGACY_MAGIC in head[:32]:
        from ckptkit.formats.torch_legacy import open_torch_legacy

        return open_torch_legacy(file, inner)
    if _looks_like_safetensors(head):
        if inner:
            raise FormatError(
                f"is flat: there is no mapping {quoted(inner)} inside", hint=f"use --keep {quoted(inner + '.*')}"
            )
        return open_safetensors(file)
    raise _unknown(file, head)


def _looks_like_safetensors(head: bytes) -> bool:
    size = int.from_bytes(head[:8], "little")
    if len(head) >= 9 and head[8:9] == b"{":
        return size < 2**56
    # A length that only a safetensors header would have, with a broken header behind it, deserves its own message.
    return (
        0 < size <= LARGEST_HEADER
        and len(head) >= 8
        and head[4:8] == b"\0\0\0\0"
        and head[8:].strip()[:1] in (b"{", b"")
    )


def _unknown(file: LocalFile, head: bytes) -> FormatError:
    for magic, what, hint in _KNOWN_MAGICS:
        if head.startswith(magic):
            return FormatError(f"{what}", hint=hint)
    start = head.lstrip()[:64].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return FormatError("an HTML page, not a checkpoint (a failed download?)", hint="download it again")
    if head[257:262] == b"ustar":
        return FormatError("a tar archive (torch before 0.4, or a packed directory)", hint=_UNPACK)
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return FormatError(
            "a bare pickle, not a file of torch.save", hint="load it where it was made, and torch.save it"
        )
    if not head.strip(b"\0") and not _has_content(file):
        return FormatError("only zero bytes (an interrupted write?)", hint="copy it again")
    if len(head) < 8:
        return FormatError(f"too short to be a checkpoint: {file.size} bytes")
    return FormatError(f"an unknown format; it begins with {head[:8].hex(' ')}")


def _has_content(file: LocalFile) -> bool:
    size = min(file.size, 1 << 20)
    return any(file.read(0, size))
