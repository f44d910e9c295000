"""Open a directory of numbered files, of which each holds a part of one model."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import read_json
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats.detect import TORCH_SUFFIXES, open_file
from ckptkit.formats.directories.trainer_files import is_trainer_file
from ckptkit.formats.distributed.file_names import CONSOLIDATED, find_rank_files
from ckptkit.formats.sharded import link_warnings
from ckptkit.wrappers.envelopes import Selection

__all__ = ["open_numbered"]

_FIRST = "consolidated.00.pth"
_PARAMS = "params.json"


def open_numbered(
    directory: str, names: Sequence[str], weights: Sequence[str], selection: Selection
) -> Checkpoint | None:
    """Return the Checkpoint of the numbered files, joined, or None if the directory holds no such files.

    ``weights`` are the files among ``names`` whose names say that they hold a whole model. Raises ``FormatError`` if a
    file is missing, or the files do not belong together.
    """
    if set(weights) - {_FIRST}:
        return None
    parts = [name for name in names if CONSOLIDATED.fullmatch(name)]
    if parts:
        return _open_consolidated(directory, names, parts, selection)
    pickled = [name for name in names if name.endswith(TORCH_SUFFIXES) and not is_trainer_file(name)]
    ranks = find_rank_files(pickled)
    if ranks is None:
        return None
    from ckptkit.formats.distributed.rank_files import open_rank_files

    return open_rank_files(directory, ranks, selection)


def _open_consolidated(directory: str, names: Sequence[str], parts: Sequence[str], selection: Selection) -> Checkpoint:
    """Return the Checkpoint of Meta's ``consolidated.NN.pth`` files."""
    from ckptkit.formats.distributed.tensor_parallel import check_whole, open_tensor_parallel

    try:
        params = read_json(directory, _PARAMS) if _PARAMS in names else {}
    except CkptkitError:
        params = {}  # read_trainer_files warns about the file
    if list(parts) != [_FIRST]:
        return open_tensor_parallel(directory, parts, params, selection)
    checkpoint = open_file(os.path.join(directory, _FIRST), selection)
    try:
        check_whole(checkpoint, params)
    except FormatError:
        checkpoint.close()
        raise
    return checkpoint.with_warnings(*link_warnings(directory, parts))
