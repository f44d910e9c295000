"""Open the checkpoint in a directory. File names decide which files are read, and their content decides how."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import read_json
from ckptkit.core.files.places import absolute, is_url, join, name_of
from ckptkit.core.files.source import Folder
from ckptkit.core.text import listed, printable, quoted, shell_word
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats.detect import WEIGHT_SUFFIXES, has_suffix, open_content
from ckptkit.formats.directories.adapters import CONFIG, adapter_warnings
from ckptkit.formats.directories.beside import unread_warnings
from ckptkit.formats.directories.listing import ADAPTER_NAMES, MODEL_NAMES, Listing, list_directory
from ckptkit.formats.directories.numbered import check_not_parts, open_numbered
from ckptkit.formats.directories.parts import find_part, find_parts, is_pipeline, list_parts, parts_error
from ckptkit.formats.directories.trainer_files import (
    announce_trainer_files,
    find_trainer_file,
    is_trainer_file,
    read_trainer_files,
)
from ckptkit.formats.distributed.file_names import UNIVERSAL, find_states_file, is_dcp, is_zero
from ckptkit.formats.foreign import find_foreign_weights, refuse_selection, unsupported_directory
from ckptkit.formats.part_names import part_warnings
from ckptkit.formats.shard_names import NumberedShards, find_index, group_shards, is_variant_index, one_shard_warnings
from ckptkit.formats.sharded import is_plain_name, link_warnings, open_sharded, open_unindexed
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_directory", "open_index"]

_ADDITIONAL = re.compile(r"(?:pytorch_)?model_\d+\.(?:safetensors|bin)")  # accelerate numbers later models
_MEGATRON_METADATA = "metadata.json"
_LATEST, _LONGEST_TAG = ("latest", "latest_universal"), 1000


def open_index(folder: Folder, index: str, selection: Selection, *, whole: bool = False) -> Checkpoint:
    """Return the checkpoint of the shards that the file ``index`` of the folder names.

    With ``whole``, a shard in the directory that the index does not name is an error.
    """
    refuse_selection(selection)
    return open_sharded(folder, index, lambda file: open_content(file, WEIGHTS), whole=whole)


def open_directory(folder: Folder, selection: Selection, *, listing_parts: bool = False) -> Checkpoint:
    """Return the checkpoint in ``folder``, or the selected mapping inside it.

    Files that trainers write next to the weights become entries of the checkpoint. A selected key that begins with the
    name of such a file, such as ``optimizer.pt`` or ``optimizer.pt.state``, opens that file. A key that begins with the
    name of a folder that holds a checkpoint, such as ``unet``, opens that checkpoint. Weights that are not read are
    named in warnings. With ``listing_parts``, a pipeline or a directory of checkpoints becomes a Checkpoint without
    tensors, with an entry for each part. Raises ``FormatError`` if the directory holds no checkpoint or several, or a
    file is missing.
    """
    listing = list_directory(folder)
    names = listing.names
    announce_trainer_files(folder, names)
    trainer_file = find_trainer_file(names, selection.key)
    if trainer_file is None and selection.key:
        trainer_file = find_states_file(names, selection.key)
    if trainer_file is not None:
        return _open_trainer_file(folder, *trainer_file)
    part = find_part(listing, selection.key) if selection.key else None
    if part is not None:
        return _open_part(listing, *part, listing_parts=listing_parts)
    try:
        if is_pipeline(listing):
            raise _NoWeightsError("a pipeline")
        checkpoint = _open_weights(listing, selection)
    except _NoWeightsError as error:
        parts = find_parts(listing)
        if not parts:
            raise _without_parts(listing, error) from None
        if not listing_parts or selection.key or selection.optimizer:
            raise parts_error(listing, parts, selection.key) from None
        checkpoint = list_parts(listing, parts, lambda part: _open_anything(folder, part, WEIGHTS))
        entries, warnings = read_trainer_files(folder, names)
        return checkpoint.with_entries(*entries).with_warnings(*warnings)
    try:
        entries, warnings = read_trainer_files(folder, names)
        unread = tuple(unread_warnings(listing, checkpoint))
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint.with_entries(*entries).with_warnings(*warnings, *unread)


class _NoWeightsError(FormatError):
    """The directory has no weights of its own; its folders may have."""


def _without_parts(listing: Listing, error: FormatError) -> FormatError:
    foreign = [*find_foreign_weights(listing.names), *listing.checkpoint_folders.foreign]
    if foreign:
        return FormatError(f"holds weights of other frameworks only, which are not read: {listed(foreign, 4)}")
    return FormatError(error.reason, hint=error.hint)


def _open_part(listing: Listing, part: str | NumberedShards, key: str, *, listing_parts: bool) -> Checkpoint:
    if isinstance(part, NumberedShards):
        return open_unindexed(listing.folder, part, lambda file: open_content(file, WEIGHTS))
    path = listing.join(part)
    try:
        checkpoint = _open_anything(listing.folder, part, Selection(key), listing_parts=listing_parts)
        return checkpoint.with_warnings(*part_warnings(path, checkpoint, is_folder=part in listing.folders))
    except CkptkitError as error:
        error.path = error.path or path
        raise


def _open_anything(folder: Folder, name: str, selection: Selection, *, listing_parts: bool = False) -> Checkpoint:
    if folder.has_folder(name):
        return open_directory(folder.folder(name), selection, listing_parts=listing_parts)
    return open_content(folder.open(name), selection).with_warnings(*one_shard_warnings(name))


def _open_trainer_file(folder: Folder, name: str, key: str) -> Checkpoint:
    if name.endswith(".json"):
        raise FormatError(
            "a JSON file, which holds no tensors",
            hint=f"ckpt show {shell_word(folder.path)} lists the values of the file",
            path=join(folder.path, name),
        )
    return open_content(folder.open(name), Selection(key))


def _open_weights(listing: Listing, selection: Selection) -> Checkpoint:
    folder, names = listing.folder, listing.names
    index = find_index(listing.files)
    known = [name for name in (*MODEL_NAMES, *ADAPTER_NAMES) if name in listing.files]
    if index is not None and is_variant_index(index) and known:
        index = None
    if index is None and is_dcp(names):
        from ckptkit.formats.distributed.dcp import open_dcp

        return open_dcp(folder, selection)
    if index is None and not known:
        if (universal := _open_universal(folder, names, selection)) is not None:
            return universal
        if is_zero(names):
            return _open_zero(folder, names, selection)
        for latest in _LATEST:
            if latest in names and folder.has_file(latest):
                return open_directory(_latest_save(folder, latest), selection)
    if index is None and (joined := open_numbered(folder, names, known, selection)) is not None:
        return joined
    adapter = [name for name in known if name in ADAPTER_NAMES]
    if index is None and not known and (shards := _only_numbered_shards(listing)) is not None:
        refuse_selection(selection)
        return open_unindexed(folder, shards, lambda file: open_content(file, WEIGHTS))
    chosen = index or next(iter(known), None) or _only_weights_file(listing)
    if adapter and chosen not in adapter:
        raise FormatError(
            f"holds a whole model and an adapter: {printable(chosen)}, {adapter[0]}",
            hint="give the path of one of them",
        )
    if index:
        return open_index(folder, index, selection, whole=True)
    checkpoint = open_content(folder.open(chosen), selection)
    checkpoint = checkpoint.with_warnings(*link_warnings(folder, [chosen]))
    if chosen.startswith("adapter_model"):
        checkpoint = checkpoint.with_warnings(*_read_adapter_warnings(checkpoint, folder, names))
    return checkpoint


def _only_numbered_shards(listing: Listing) -> NumberedShards | None:
    """Return the numbered shards of a directory without an index, or None if there are no numbered shards.

    Raises ``FormatError`` if shards are missing, or there are shards of several checkpoints.
    """
    groups = group_shards(listing.files)
    if not groups:
        return None
    opens = " or ".join(shell_word(f"{listing.path}::{shards.pattern}") for shards in groups[:4])
    if len(groups) > 1:
        counts = [f"{printable(shards.pattern)} ({len(shards.names):,} of {shards.count:,})" for shards in groups]
        raise FormatError(
            f"shards of {len(groups):,} checkpoints and no index: {listed(counts, 4, show=str)}", hint=f"give {opens}"
        )
    (shards,) = groups
    if shards.missing:
        raise FormatError(
            f"{len(shards.names):,} of {shards.count:,} shards and no index: {listed(shards.missing, 4)} "
            f"{'is' if len(shards.missing) == 1 else 'are'} missing",
            hint=f"copy the missing files too; {opens} opens the shards that are there",
        )
    return shards


def _open_universal(folder: Folder, names: Sequence[str], selection: Selection) -> Checkpoint | None:
    if UNIVERSAL not in (*names, name_of(absolute(folder.path))):
        return None
    from ckptkit.formats.distributed.universal import find_universal, open_universal

    found = find_universal(folder, names)
    return None if found is None else open_universal(found, selection)


def _open_zero(folder: Folder, names: Sequence[str], selection: Selection) -> Checkpoint:
    from ckptkit.formats.distributed.zero import open_zero

    if selection.optimizer or selection.key:
        held = "one optimizer state for each rank" if selection.optimizer else f"nothing at {quoted(selection.key)}"
        raise FormatError(f"holds {held}", hint="add :: and the name of a *_states.pt file to the path")
    return open_zero(folder, names)


def _read_adapter_warnings(checkpoint: Checkpoint, folder: Folder, names: Sequence[str]) -> tuple[str, ...]:
    try:
        config = read_json(folder, CONFIG) if CONFIG in names else None
    except CkptkitError:
        return ()  # read_trainer_files warns about the file
    return tuple(adapter_warnings(checkpoint, config))


def _latest_save(folder: Folder, latest: str) -> Folder:
    """Return the directory that the file ``latest`` of DeepSpeed names: the last save."""
    file = folder.open(latest)
    path = file.path
    try:
        tag = file.read(0, min(file.size, _LONGEST_TAG)).decode("utf-8", "replace").strip()
    finally:
        file.close()
    if not is_plain_name(tag):
        raise FormatError(f"names the unsafe directory {quoted(tag)}", path=path)
    saved = folder.folder(tag)
    if not folder.has_folder(tag) or saved.has_file(latest) or saved.has_folder(latest):
        raise FormatError(f"names {quoted(tag)}, but there is no save of that name in the directory", path=path)
    return saved


def _megatron_error(folder: Folder, names: Sequence[str]) -> FormatError | None:
    if _MEGATRON_METADATA not in names:
        return None
    try:
        backend = read_json(folder, _MEGATRON_METADATA).get("sharded_backend")
    except CkptkitError:
        return None
    if not isinstance(backend, str):
        return None
    return FormatError(
        f"a checkpoint of Megatron in the format {quoted(backend)}, which is not read",
        hint="save it with --dist-ckpt-format torch_dist",
    )


def _only_weights_file(listing: Listing) -> str:
    """Return the name of the only file of weights. Raises ``FormatError`` where there is none, or several."""
    folder, names = listing.folder, listing.names
    weights = [name for name in listing.files if has_suffix(name, WEIGHT_SUFFIXES) and not is_trainer_file(name)]
    foreign = find_foreign_weights(names)
    if len(weights) > 1:
        weights = [name for name in weights if name not in foreign and not _ADDITIONAL.fullmatch(name)] or weights
    if not weights and CONFIG in names:
        raise FormatError(
            f"holds {CONFIG}, but not the weights of the adapter",
            hint=f"the file of weights must be called {' or '.join(ADAPTER_NAMES)}",
        )
    if not weights:
        if (unsupported := unsupported_directory(names) or _megatron_error(folder, names)) is not None:
            raise unsupported
        if inside := listing.shown_folders or [*listing.folders]:
            raise _NoWeightsError(
                "a directory without a checkpoint",
                hint=f"give one of the directories inside: {listed(inside, 4, show=printable)}",
            )
        raise _NoWeightsError(
            "a directory without a checkpoint",
            hint="ckpt searched for an index (*.safetensors.index.json, *.bin.index.json) and for "
            + ", ".join(MODEL_NAMES[:2]),
        )
    check_not_parts(folder, weights)
    if len(weights) > 1 and (chosen := _only_variant(weights)) is not None:
        return chosen
    if len(weights) > 1:
        shown = listing.shown_folders
        folders = f" or one of the directories inside: {listed(shown, 4, show=printable)}" if shown else ""
        call = f"give the path of one file{folders}"
        raise FormatError(
            f"a directory with {len(weights):,} files of weights and no index: {listed(weights, 4, show=printable)}",
            hint=f"{call}; ckpt show {_all_of(weights, folder.path)} lists all of them",
            call=call,
        )
    return weights[0]


def _all_of(weights: Sequence[str], path: str) -> str:
    """Return a pattern for each suffix of these files of a folder; the shell expands it, or ckpt in a URL."""
    patterns = sorted({f"*.{name.rpartition('.')[2]}" for name in weights})
    if is_url(path):
        return " ".join(shell_word(join(path, pattern)) for pattern in patterns)
    folder = "" if path.rstrip("/") == "." else f"{shell_word(path)}/"
    return " ".join(f"{folder}{pattern}" for pattern in patterns)


def _only_variant(weights: Sequence[str]) -> str | None:
    """Return the preferred file if all files are the same variant, such as ``fp16``; else None."""
    variants: dict[str, list[str]] = {}
    for name in weights:
        stem, _, suffix = name.rpartition(".")
        plain, _, variant = stem.partition(".")
        if f"{plain}.{suffix}" not in MODEL_NAMES:
            return None
        variants.setdefault(variant, []).append(f"{plain}.{suffix}")
    if len(variants) > 1:
        return None
    ((variant, plain_names),) = variants.items()
    stem, _, suffix = min(plain_names, key=MODEL_NAMES.index).rpartition(".")
    return f"{stem}.{variant}.{suffix}"
