"""Open the checkpoint in a directory. File names decide which files are read, and their content decides how."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import read_json
from ckptkit.core.files import LocalFile
from ckptkit.core.text import listed, printable, quoted
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats.detect import TORCH_SUFFIXES, open_file
from ckptkit.formats.directories.adapters import CONFIG, adapter_warnings
from ckptkit.formats.directories.numbered import check_not_parts, open_numbered
from ckptkit.formats.directories.trainer_files import (
    find_trainer_file,
    is_trainer_file,
    read_trainer_files,
)
from ckptkit.formats.distributed.file_names import find_states_file, is_dcp, is_zero
from ckptkit.formats.foreign import refuse_selection, unsupported_directory
from ckptkit.formats.sharded import INDEX_SUFFIXES, find_index, is_plain_name, link_warnings, open_sharded
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_directory", "open_index"]

_WEIGHTS = (
    "model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
    "consolidated.safetensors", "consolidated.00.pth",
)  # fmt: skip
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
# accelerate numbers every model after the first; global_step is the directory of a step of DeepSpeed.
_SHARD = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")
_ANOTHER = re.compile(r"(pytorch_)?model_\d+\.(safetensors|bin)|global_step\d+")
_MOST_NAMES, _MOST_TESTED = 1_000_000, 1000
_MEGATRON_METADATA = "metadata.json"
_LATEST, _LONGEST_TAG = "latest", 1000


def open_index(directory: str, index: str, selection: Selection, *, whole: bool = False) -> Checkpoint:
    """Return the checkpoint of the shards that the file ``index`` names.

    With ``whole``, a shard in the directory that the index does not name is an error.
    """
    refuse_selection(selection)
    return open_sharded(directory or ".", index, lambda path: open_file(path, WEIGHTS), whole=whole)


def open_directory(directory: str, selection: Selection) -> Checkpoint:
    """Return the checkpoint in ``directory``, or the selected mapping inside it.

    Files that trainers write next to the weights become entries of the checkpoint. A selected key that begins with the
    name of such a file, such as ``optimizer.pt`` or ``optimizer.pt.state``, opens that file. Raises ``FormatError`` if
    the directory holds no checkpoint or several, or a file is missing.
    """
    names = _file_names(directory)
    trainer_file = find_trainer_file(names, selection.key)
    if trainer_file is None and selection.key:
        trainer_file = find_states_file(names, selection.key)
    if trainer_file is not None:
        return _open_trainer_file(directory, *trainer_file)
    checkpoint = _open_weights(directory, names, selection)
    try:
        entries, warnings = read_trainer_files(directory, names)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint.with_entries(*entries).with_warnings(*warnings)


def _file_names(directory: str) -> list[str]:
    with os.scandir(directory) as listing:
        names = [entry.name for entry in islice(listing, _MOST_NAMES + 1)]
    if len(names) > _MOST_NAMES:
        raise FormatError(f"a directory of more than {_MOST_NAMES:,} files", hint="give the path of one file")
    return names


def _open_trainer_file(directory: str, name: str, key: str) -> Checkpoint:
    if name.endswith(".json"):
        raise FormatError(
            "a JSON file, which holds no tensors",
            hint="ckpt show DIRECTORY lists the values of the file",
            path=os.path.join(directory, name),
        )
    return open_file(os.path.join(directory, name), Selection(key))


def _open_weights(directory: str, names: Sequence[str], selection: Selection) -> Checkpoint:
    index = find_index(names)
    known = [name for name in (*_WEIGHTS, *_ADAPTER) if name in names]
    if index is None and is_dcp(names):
        from ckptkit.formats.distributed.dcp import open_dcp

        return _warn_of_others(open_dcp(directory, selection), "the distributed checkpoint", known)
    if index is None and not known:
        if is_zero(names):
            return _open_zero(directory, names, selection)
        if _LATEST in names and os.path.isfile(os.path.join(directory, _LATEST)):
            return open_directory(_latest_save(directory), selection)
    if index is None and (joined := open_numbered(directory, names, known, selection)) is not None:
        return joined
    adapter = [name for name in known if name in _ADAPTER]
    chosen = index or next(iter(known), None) or _only_weights_file(directory, names)
    if adapter and chosen not in adapter:
        raise FormatError(
            f"holds a whole model and an adapter: {printable(chosen)}, {adapter[0]}",
            hint="give the path of one of them",
        )
    numbered = sorted(filter(_ANOTHER.fullmatch, names))
    indexes = sorted(name for name in names if name.endswith(INDEX_SUFFIXES))
    checkpoint = (
        open_index(directory, index, selection, whole=True)
        if index
        else open_file(os.path.join(directory, chosen), selection)
    )
    if not index:
        checkpoint = checkpoint.with_warnings(*link_warnings(directory, [chosen]))
    if chosen.startswith("adapter_model"):
        checkpoint = checkpoint.with_warnings(*_read_adapter_warnings(checkpoint, directory, names))
    name = f"the index {quoted(chosen)}" if index else quoted(chosen)
    return _warn_of_others(checkpoint, name, [other for other in (*known, *numbered, *indexes) if other != chosen])


def _open_zero(directory: str, names: Sequence[str], selection: Selection) -> Checkpoint:
    from ckptkit.formats.distributed.zero import open_zero

    if selection.optimizer or selection.key:
        held = "one optimizer state for each rank" if selection.optimizer else f"nothing at {quoted(selection.key)}"
        raise FormatError(f"holds {held}", hint="add :: and the name of a *_states.pt file to the path")
    return open_zero(directory, names)


def _warn_of_others(checkpoint: Checkpoint, chosen: str, others: Sequence[str]) -> Checkpoint:
    warnings = (f"{quoted(name)} is not read; only {chosen} is read" for name in others[:4])
    return checkpoint.with_warnings(*warnings)


def _read_adapter_warnings(checkpoint: Checkpoint, directory: str, names: Sequence[str]) -> tuple[str, ...]:
    try:
        config = read_json(directory, CONFIG) if CONFIG in names else None
    except CkptkitError:
        return ()  # read_trainer_files warns about the file
    return tuple(adapter_warnings(checkpoint, config))


def _latest_save(directory: str) -> str:
    """Return the directory that the file ``latest`` of DeepSpeed names: the last save."""
    path = os.path.join(directory, _LATEST)
    file = LocalFile(path)
    try:
        tag = file.read(0, min(file.size, _LONGEST_TAG)).decode("utf-8", "replace").strip()
    finally:
        file.close()
    if not is_plain_name(tag):
        raise FormatError(f"names the unsafe directory {quoted(tag)}", path=path)
    saved = os.path.join(directory, tag)
    if not os.path.isdir(saved) or os.path.exists(os.path.join(saved, _LATEST)):
        raise FormatError(f"names {quoted(tag)}, but there is no save of that name in the directory", path=path)
    return saved


def _megatron_error(directory: str, names: Sequence[str]) -> FormatError | None:
    if _MEGATRON_METADATA not in names:
        return None
    try:
        backend = read_json(directory, _MEGATRON_METADATA).get("sharded_backend")
    except CkptkitError:
        return None
    if not isinstance(backend, str):
        return None
    return FormatError(
        f"a checkpoint of Megatron in the format {quoted(backend)}, which is not read",
        hint="save it with --dist-ckpt-format torch_dist",
    )


def _only_weights_file(directory: str, names: Sequence[str]) -> str:
    """Return the name of the only file of weights. Raises ``FormatError`` where there is none, or several."""
    weights = sorted(
        name for name in names if name.endswith((".safetensors", *TORCH_SUFFIXES)) and not is_trainer_file(name)
    )
    if not weights and CONFIG in names:
        raise FormatError(
            f"holds {CONFIG}, but not the weights of the adapter",
            hint=f"the file of weights must be called {' or '.join(_ADAPTER)}",
        )
    if not weights:
        if (foreign := unsupported_directory(names) or _megatron_error(directory, names)) is not None:
            raise foreign
        inside = [name for name in sorted(names)[:_MOST_TESTED] if os.path.isdir(os.path.join(directory, name))]
        if inside:
            raise FormatError(
                "a directory without a checkpoint",
                hint=f"give one of the directories inside: {listed(inside, 4, show=printable)}",
            )
        searched = (
            f"ckpt searched for an index (*{INDEX_SUFFIXES[0]}, *{INDEX_SUFFIXES[1]}) and for {', '.join(_WEIGHTS[:2])}"
        )
        raise FormatError("a directory without a checkpoint", hint=searched)
    check_not_parts(directory, weights)
    if len(weights) > 1:
        shards = all(map(_SHARD.fullmatch, weights))
        raise FormatError(
            f"a directory with {len(weights):,} files of weights and no index: {listed(weights, 4, show=printable)}",
            hint="copy the index too; its name ends in .index.json" if shards else "give the path of one file",
        )
    return weights[0]
