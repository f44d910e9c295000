"""Which of the files in a directory are the checkpoint: told by their names, each then read by its content."""

from __future__ import annotations

import os

from ckptkit.errors import FormatError
from ckptkit.formats.dcp import is_dcp, open_dcp
from ckptkit.formats.files import TORCH_SUFFIXES, open_file
from ckptkit.formats.recognise import refuse_inner
from ckptkit.formats.sharded import INDEX_SUFFIXES, find_index, open_sharded
from ckptkit.tensors import Checkpoint
from ckptkit.text import printable, quoted

__all__ = ["open_directory", "open_index"]

_SINGLE_FILES = (
    "model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin",
    "diffusion_pytorch_model.safetensors", "consolidated.safetensors", "consolidated.00.pth",
)  # fmt: skip


def open_index(directory: str, index: str, inner: str, *, whole: bool = False) -> Checkpoint:
    """Return the checkpoint whose shards the file ``index`` names; ``whole`` refuses others beside them."""
    refuse_inner(inner)
    return open_sharded(directory or ".", index, lambda path: open_file(path, ""), whole=whole)


def open_directory(directory: str, inner: str) -> Checkpoint:
    """Return the checkpoint in ``directory``, or the mapping ``inner`` inside it.

    Raises ``FormatError`` where there is none, where there are several, and where a part of it is missing.
    """
    names = os.listdir(directory)
    index = find_index(names)
    if index is None and is_dcp(names):
        return open_dcp(directory, inner)
    single = next((name for name in _SINGLE_FILES if name in names), None)
    if index is not None:
        checkpoint = open_index(directory, index, inner, whole=True)
        if single is not None:
            checkpoint.warnings += (f"{quoted(single)} lies beside the index {quoted(index)}, which is the one read",)
        return checkpoint
    if single is not None:
        return open_file(os.path.join(directory, single), inner)
    weights = sorted(name for name in names if name.endswith((".safetensors", *TORCH_SUFFIXES)))
    if len(weights) == 1:
        return open_file(os.path.join(directory, weights[0]), inner)
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
