"""Find the reader of a file by the first bytes of the file, never by the file name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.places import open_source
from ckptkit.core.files.source import ByteSource
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats import codes
from ckptkit.formats.foreign import is_torch_tar, refuse_selection, unsupported_archive, unsupported_format
from ckptkit.formats.safetensors import LARGEST_HEADER, open_safetensors
from ckptkit.wrappers.envelopes import Selection

if TYPE_CHECKING:
    from ckptkit.formats.torch.checkpoint import TorchFile

__all__ = [
    "TORCH_SUFFIXES",
    "WEIGHT_SUFFIXES",
    "could_hold_tensors",
    "has_no_storages",
    "has_suffix",
    "open_content",
    "open_file",
    "open_zip",
    "read_torch",
]


def open_zip(file: ByteSource, selection: Selection) -> Checkpoint:
    """Return the Checkpoint in a zip archive; the Checkpoint closes the file.

    Raises ``FormatError`` if the archive contradicts itself, or its kind is unknown.
    """
    from ckptkit.formats.zip_archive import read_zip_directory

    archive = read_zip_directory(file)
    if archive.roots("archive_format"):
        from ckptkit.formats.torch.export import open_torch_export

        return open_torch_export(archive, selection)
    if archive.entries and all(name.endswith(".npy") for name in archive.entries):
        from ckptkit.formats.numpy import open_npz

        refuse_selection(selection)
        return open_npz(archive)
    if archive.roots("constants.pkl"):
        from ckptkit.formats.torch.script import open_torchscript

        return open_torchscript(archive, selection)
    if "model.weights.h5" in archive.entries:
        raise FormatError("a Keras archive, which is not read", hint="keras.saving.load_model reads it")
    if "serialized_state_dict.pt" in archive.entries:
        raise FormatError(
            "an archive of torch.export in the layout of an older torch, which is not read",
            hint="torch.export.load reads it, and torch.save writes the state_dict of the program",
        )
    if not archive.roots("data.pkl") and (error := unsupported_archive(file.path, archive.entries, WEIGHT_SUFFIXES)):
        raise error
    from ckptkit.formats.torch.zip import open_torch_zip

    return open_torch_zip(archive, selection)


# Each function imports its reader, so that opening a small file does not load all readers.
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".th", ".tar")
_SUFFIXES = (
    (".safetensors", "safetensors"), (".pt2", "torch-export"), (".gguf", "gguf"), (".npz", "npz"), (".npy", "npy"),
    (".jit", "torchscript"), (".torchscript", "torchscript"),
    *((suffix, "torch") for suffix in TORCH_SUFFIXES),
)  # fmt: skip
WEIGHT_SUFFIXES = tuple(suffix for suffix, _ in _SUFFIXES)
_LARGEST_EXAMINED = 1 << 20
_LFS_MAGIC = b"version https://git-lfs"
_UNFINISHED = (".incomplete", ".crdownload", ".part", ".partial", ".download", ".tmp", ".aria2")
_PICKLES = (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")
_ZIP_MAGIC = b"PK\3\4"
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # the first pickle, after its protocol and frame


def has_suffix(name: str, suffixes: str | tuple[str, ...]) -> bool:
    """Return whether a file name ends with one of the suffixes, in upper or lower case."""
    return name.lower().endswith(suffixes)


def open_file(name: str, selection: Selection) -> Checkpoint:
    """Return the checkpoint in the file ``name``, or the selected mapping inside it.

    Raises ``PathError`` if the file cannot be read, and ``FormatError`` if the checkpoint is not valid or not complete.
    """
    return open_content(open_source(name), selection)


def open_content(file: ByteSource, selection: Selection) -> Checkpoint:
    """Return the checkpoint in an open file, as ``open_file`` does; the file is closed after an error."""
    name = file.path
    try:
        checkpoint = _open_by_content(file, selection)
    except BaseException as error:
        file.close()
        if isinstance(error, CkptkitError) and error.path is None:
            error.path = name
        if isinstance(error, FormatError) and name.endswith(_UNFINISHED):
            error.hint = "the name shows an unfinished download: finish or repeat the download"
        raise
    named = next((known for suffix, known in _SUFFIXES if has_suffix(name, suffix)), None)
    is_named = named is None or checkpoint.format.startswith(named)
    if not is_named and not (checkpoint.format == "pickle" and has_suffix(name, ".pkl")):
        warning = f"the file name says {named}, but the content is {checkpoint.format}"
        checkpoint = checkpoint.with_warnings(warning)
    return checkpoint.with_warnings(*_empty_weights_warning(checkpoint))


def _open_by_content(file: ByteSource, selection: Selection) -> Checkpoint:
    head = _head(file)
    if head.startswith(_ZIP_MAGIC):
        return open_zip(file, selection)
    if _is_legacy(head):
        from ckptkit.formats.torch.legacy import open_torch_legacy

        return open_torch_legacy(file, selection)
    # The length of a safetensors header can look like the first bytes of a pickle.
    if head.startswith(_PICKLES) and not _looks_like_safetensors(head):
        from ckptkit.formats.torch.bare_pickle import open_bare_pickle

        return open_bare_pickle(file, head, selection)
    if head.startswith(b"GGUF"):
        from ckptkit.formats.gguf import open_gguf

        refuse_selection(selection)
        return open_gguf(file)
    if head.startswith(b"\x93NUMPY"):
        from ckptkit.formats.numpy import open_npy

        refuse_selection(selection)
        return open_npy(file)
    if is_torch_tar(head):
        from ckptkit.formats.torch.tar import open_torch_tar

        return open_torch_tar(file, selection)
    if _looks_like_safetensors(head):
        refuse_selection(selection)
        return open_safetensors(file)
    raise unsupported_format(file, head)


def _empty_weights_warning(checkpoint: Checkpoint) -> tuple[str, ...]:
    if checkpoint.envelope != "module" or all(entry.path != "param_shapes" for entry in checkpoint.entries):
        return ()
    empty = sum(0 in info.shape for info in checkpoint.values())
    what = plural(empty, "weight is", "weights are")
    text = f"{what} empty: ZeRO-3 stores the elements in the optim_states files, so open the directory"
    return (ReaderWarning(text, codes.EMPTY_WEIGHTS),) if empty else ()


def read_torch(file: ByteSource, *, largest: int) -> TorchFile:
    """Return the tree of values in a file of ``torch.save``, without running any code.

    Raises ``FormatError`` if torch did not save the file, the file is incomplete, or the pickle is larger than
    ``largest`` bytes.
    """
    head = _head(file)
    if head.startswith(_ZIP_MAGIC):
        from ckptkit.formats.torch.zip import read_torch_zip
        from ckptkit.formats.zip_archive import read_zip_directory

        return read_torch_zip(read_zip_directory(file), largest=largest)
    if _is_legacy(head):
        from ckptkit.formats.torch.legacy import read_torch_legacy

        return read_torch_legacy(file, largest=largest)
    raise unsupported_format(file, head)


def could_hold_tensors(name: str, head: bytes) -> bool:
    """Return whether the file ``name``, which begins with ``head``, is probably a file of weights, perhaps damaged.

    A name without a suffix of weights needs bytes that cannot be of another format.
    """
    if has_suffix(name, ".safetensors"):
        return True
    if head.startswith((b"GGUF", b"\x93NUMPY")) or _is_legacy(head) or is_torch_tar(head):
        return True
    if has_suffix(name, WEIGHT_SUFFIXES):
        # A bare pickle that is not called .pkl is usually a whole model, and a pointer of git-lfs replaces a file.
        magics = (_ZIP_MAGIC, _LFS_MAGIC) if has_suffix(name, ".pkl") else (_ZIP_MAGIC, _LFS_MAGIC, *_PICKLES)
        return head.startswith(magics) or _looks_like_safetensors(head)
    if head.startswith(_ZIP_MAGIC):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        return first.endswith((b"data.pkl", b"constants.pkl", b".npy"))
    return head[8:9] == b"{" and _looks_like_safetensors(head)


def has_no_storages(file: ByteSource) -> bool:
    """Return whether a small file of ``torch.save`` has no storage, and so no tensor. Larger files are not examined."""
    if file.size > _LARGEST_EXAMINED or file.read(0, min(file.size, 4)) != _ZIP_MAGIC:
        return False
    from ckptkit.formats.zip_archive import read_zip_directory

    try:
        archive = read_zip_directory(file)
    except FormatError:
        return False
    return bool(archive.roots("data.pkl")) and not any("/data/" in name for name in archive.entries)


def _head(file: ByteSource) -> bytes:
    if file.size == 0:
        raise FormatError("the file is empty", hint="download or copy it again")
    return file.read(0, min(file.size, 512))


def _is_legacy(head: bytes) -> bool:
    return head[:1] == b"\x80" and _LEGACY_MAGIC in head[:32]


def _looks_like_safetensors(head: bytes) -> bool:
    size = int.from_bytes(head[:8], "little")
    if len(head) >= 9 and head[8:9] == b"{":
        return size < 2**56
    # A file that begins with a plausible header length gets the error of the safetensors reader, which says more.
    return (
        0 < size <= LARGEST_HEADER
        and len(head) >= 8
        and head[4:8] == b"\0\0\0\0"
        and head[8:].strip()[:1] in (b"{", b"")
    )
