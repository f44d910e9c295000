"""Open a directory of numbered files that each hold a part of one model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import read_json
from ckptkit.core.files.places import join
from ckptkit.core.files.source import Folder
from ckptkit.core.text import listed, printable, shell_word
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats.detect import TORCH_SUFFIXES, has_suffix, open_content
from ckptkit.formats.directories.trainer_files import is_trainer_file
from ckptkit.formats.distributed.file_names import CONSOLIDATED, find_rank_files
from ckptkit.formats.part_names import part_name, siblings_of
from ckptkit.formats.sharded import link_warnings
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["check_not_parts", "open_numbered"]

_FIRST = "consolidated.00.pth"
_PARAMS = "params.json"
_LAYER = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
_MOST_COMPARED = 64
_COPY_AGAIN = "copy the whole directory again, or give the path of the file"


def open_numbered(
    folder: Folder, names: Sequence[str], weights: Sequence[str], selection: Selection
) -> Checkpoint | None:
    """Return the Checkpoint of the numbered files, joined, or None if the directory holds no such files.

    ``weights`` are the files among ``names`` that usually hold a whole model. Raises ``FormatError`` if a
    file is missing, or the files do not belong together.
    """
    if set(weights) - {_FIRST}:
        return None
    parts = [name for name in names if CONSOLIDATED.fullmatch(name)]
    if parts:
        return _open_consolidated(folder, names, parts, selection)
    pickled = [name for name in names if has_suffix(name, TORCH_SUFFIXES) and not is_trainer_file(name)]
    ranks = find_rank_files(pickled)
    if ranks is None:
        return None
    from ckptkit.formats.distributed.rank_files import open_rank_files

    return open_rank_files(folder, ranks, selection)


def _open_consolidated(folder: Folder, names: Sequence[str], parts: Sequence[str], selection: Selection) -> Checkpoint:
    """Return the Checkpoint of Meta's ``consolidated.NN.pth`` files."""
    from ckptkit.formats.distributed.tensor_parallel import check_whole, open_tensor_parallel

    try:
        params = read_json(folder, _PARAMS) if _PARAMS in names else {}
    except CkptkitError:
        params = {}  # read_trainer_files warns about the file
    if list(parts) != [_FIRST]:
        return open_tensor_parallel(folder, parts, params, selection)
    checkpoint = open_content(folder.open(_FIRST), selection)
    try:
        check_whole(checkpoint, params)
    except FormatError:
        checkpoint.close()
        raise
    return checkpoint.with_warnings(*link_warnings(folder, parts))


def check_not_parts(folder: Folder, weights: Sequence[str]) -> None:
    """Raise ``FormatError`` if the names of the files of weights say that they are parts of one model."""
    layers = [name for name in weights if _LAYER.fullmatch(name)]
    if layers:
        raise FormatError(
            f"holds one file for each layer and rank, which are not joined: {listed(layers, 3, show=printable)}",
            hint="convert it with the program that saved it, such as GPT-NeoX or Megatron-DeepSpeed",
        )
    own = part_name(weights[0])
    if len(weights) == 1 and own is not None and own.total is not None and own.total > 1:
        raise FormatError(
            f"{printable(weights[0])} is one of {own.total:,} parts by its name, and the other files are missing",
            hint=_COPY_AGAIN,
        )
    if own is None or len(weights) == 1 or len(siblings_of(weights[0], weights)) + 1 < len(weights):
        return
    numbered = f"{len(weights):,} numbered files: {listed(weights, 4, show=printable)}"
    if _share_no_key(folder, weights[:_MOST_COMPARED]):
        names = " ".join(shell_word(join(folder.path, name)) for name in weights)
        raise FormatError(
            f"holds {numbered}, with different keys in each: parts of the layers of one model",
            hint=f"join them: ckpt merge {names} --on-unexpected add -o OUT",
        )
    raise FormatError(
        f"holds {numbered}, with the same keys in several: slices of one model, or copies of it, which are not joined",
        hint="join them with the program that saved them, or give the path of one file to see what it holds",
    )


def _share_no_key(folder: Folder, names: Sequence[str]) -> bool:
    """Return whether no key is in two of these files; False also if a file cannot be read."""
    folder.will_open(names)
    seen: set[str] = set()
    for name in names:
        try:
            with open_content(folder.open(name), WEIGHTS) as checkpoint:
                keys = set(checkpoint)
        except CkptkitError:
            return False
        if seen & keys:
            return False
        seen |= keys
    return True
