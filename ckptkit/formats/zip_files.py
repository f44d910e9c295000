"""A zip archive, and which reader takes it: told by the entries in it."""

from __future__ import annotations

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files import LocalFile
from ckptkit.errors import FormatError
from ckptkit.formats.recognise import refuse_inner
from ckptkit.formats.zip_archive import read_zip_directory

__all__ = ["open_zip"]


def open_zip(file: LocalFile, inner: str) -> Checkpoint:
    """Return the Checkpoint in a zip archive; takes over the file.

    Raises ``FormatError`` where the archive contradicts itself, or is none of a known kind.
    """
    archive = read_zip_directory(file)
    if archive.roots("archive_format"):
        from ckptkit.formats.torch.export import open_torch_export

        return open_torch_export(archive, inner)
    if archive.entries and all(name.endswith(".npy") for name in archive.entries):
        from ckptkit.formats.numpy import open_npz

        refuse_inner(inner)
        return open_npz(archive)
    if archive.roots("constants.pkl"):
        from ckptkit.formats.torch.script import open_torchscript

        return open_torchscript(archive, inner)
    if "model.weights.h5" in archive.entries:
        raise FormatError("a Keras archive, which is not read", hint="keras.saving.load_model reads it")
    from ckptkit.formats.torch.zip import open_torch_zip

    return open_torch_zip(archive, inner)
