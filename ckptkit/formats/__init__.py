"""Open checkpoints by path. The content of a file decides its format, not the name."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from ckptkit.core.checkpoint import Checkpoint, as_selected
from ckptkit.core.files.hub_prefix import is_hub_path
from ckptkit.core.files.live_prefix import LIVE_PREFIX, is_live_path
from ckptkit.core.files.places import clean_path, folder_at, is_url, kind_at, name_of, near_path, parent_of, split
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import kind_of, look_alikes, shell_word
from ckptkit.errors import CkptkitError, FormatError, PathError
from ckptkit.formats import codes
from ckptkit.formats.shard_names import is_index, one_shard_warnings
from ckptkit.lazy_patterns import lazy_pattern
from ckptkit.wrappers.entries import describe_entries, optimizer_keys
from ckptkit.wrappers.envelopes import OPTIMIZER, Selection

__all__ = [
    "errors_about",
    "open_checkpoint",
    "open_checkpoint_or_parts",
    "open_inside",
    "open_optimizer",
    "split_path",
]

# Each function imports its reader, so that opening a small file does not load all readers.
_BROKEN_URL = lazy_pattern(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")
_LIKELY = ("model.safetensors.index.json", "model.safetensors")  # a store sends them together with its listing
_SUFFIX = lazy_pattern(r"\.[A-Za-z]\w{1,11}$")
_HUB_NAME = lazy_pattern(
    r"(?!.*\.(?:pth?|ckpt|bin|safetensors|gguf|npz)$)(?:[A-Za-z]\w*-[\w.-]+|\w[\w-]*/\w[\w.-]*)", re.ASCII
)
_ONE_SLASH = lazy_pattern(r"([A-Za-z][A-Za-z0-9+.-]+:/)[^/]")  # pathlib takes one of the slashes away
_IMPORTABLE = lazy_pattern(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d][\w.]*(\(.*\))?", re.DOTALL)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint at ``path``, with its keys, shapes and byte ranges. No tensor is read and no code is run.

    ``path`` is a file or a directory with shards, on this machine or in a store: a URL such as ``s3://bucket/model``,
    ``https://...`` or ``hf://org/name``. ``hf:org/name`` is a model in the Hugging Face cache. A store sends what
    describes the tensors, and the bytes of a tensor when it is read. ``PATH::a.b`` opens a mapping inside a checkpoint.
    ``py:package.module:callable`` opens a live model, and runs its code. Shapes are as in torch; sizes are in bytes.
    Raises ``PathError`` where the path cannot be read, and ``FormatError`` where the checkpoint is not valid or not
    whole. Raises ``ModelError`` where a live model cannot be built.

    Example:
        >>> with ckptkit.open_checkpoint("fixtures/lenet_10class.pth") as checkpoint:
        ...     [key for key, info in checkpoint.items() if info.shape[0] == 10]
        ['fc3.weight', 'fc3.bias']
    """
    return _open_checkpoint(_path_text(path), listing_parts=False)


def open_checkpoint_or_parts(path: str | os.PathLike[str]) -> Checkpoint:
    """Return what ``open_checkpoint`` returns, or a list of the parts of a pipeline or of a directory of checkpoints.

    Such a list is a Checkpoint without tensors, with an entry for each part. ``open_checkpoint`` refuses the directory.
    """
    return _open_checkpoint(_path_text(path), listing_parts=True)


def _open_checkpoint(name: str, *, listing_parts: bool) -> Checkpoint:
    if is_live_path(name):
        with errors_about(name):
            from ckptkit.formats.live import open_live

            return open_live(name.removeprefix(LIVE_PREFIX), name)
    with errors_about(name):
        name, notes = _located(name)
    path, key = split_path(name)
    name = _joined(path, key)
    with errors_about(name):
        try:
            opened = _open_path(path, Selection(key), listing_parts=listing_parts)
        except PathError as error:
            if error.hint is None and not _exists(path):
                near = near_path(path)
                whole, _, part = name.rpartition(":")
                if match := _ONE_SLASH.match(path):
                    error.hint = f"for a URL write two slashes: {shell_word(f'{match[1]}/{path[len(match[1]) :]}')}"
                elif whole.endswith(".py") and not is_url(name):
                    from ckptkit.formats.live.hints import hint_for_source

                    error.hint = hint_for_source(whole, part)
                elif whole and not is_url(name) and kind_at(whole):
                    error.hint = f"did you mean {shell_word(f'{whole}::{part}')}?"
                elif _IMPORTABLE.fullmatch(name):
                    error.hint = f"for a live model write {LIVE_PREFIX}{name}"
                elif is_url(path) and "*" in path:
                    error.hint = "show and check take * in the last part of a URL; quote it for the shell"
                    error.call = "give the URL of one checkpoint"
                elif near:
                    error.hint = f"did you mean {shell_word(near)}?"
                elif _HUB_NAME.fullmatch(name) and not kind_at(parent_of(name)):
                    from ckptkit.core.files.hub import suggest_hub_path

                    error.hint = f"for a model of the Hugging Face Hub write {suggest_hub_path(name)}"
            raise
        opened = as_selected(opened, key).with_warnings(*notes)
        return _note_positions(_warn_of_adapter(_warn_of_similar_keys(_leave_out_optimizers(opened, key))))


def _located(name: str) -> tuple[str, tuple[ReaderWarning, ...]]:
    """Return the path or URL of a name as ``hf:org/name``, with a note of where it is; any other path stays."""
    if not is_hub_path(name):
        return name, ()
    from ckptkit.formats.hub import locate_hub_checkpoint

    path, note = locate_hub_checkpoint(name)
    return path, (note,)


def _exists(path: str) -> bool:
    """Return whether a path that cannot be opened is there all the same; a link without a target is."""
    folder, name = split(path)
    try:
        return bool(kind_at(path)) or folder_at(folder).has_link(name)
    except CkptkitError:  # the store says no more than in the first error
        return True


def open_optimizer(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the saved ``state_dict()`` of an optimizer at ``path``; ``PATH::a.b`` names the mapping that holds it.

    Without ``::a.b``, the only optimizer state of the file is opened, and ``envelope`` of the result is its key.
    Raises what ``open_checkpoint`` raises, and ``FormatError`` where the file holds no optimizer state, or several.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> torch.save(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), "optimizer.pt")
        >>> with ckptkit.open_optimizer("optimizer.pt") as state:
        ...     [entry.value for entry in state.entries if entry.path.endswith("lr")]
        [0.1]
    """
    name = _path_text(path)
    if is_live_path(name):
        raise PathError(
            "is a live model, which has no optimizer",
            hint="give the file that holds the state of the optimizer",
            path=name,
        )
    with errors_about(name):
        name, notes = _located(name)
    saved, key = split_path(name)
    with errors_about(saved):
        opened = _open_checkpoint(name, listing_parts=False) if key else _open_path(saved, OPTIMIZER)
        return opened.with_warnings(*notes)


def open_inside(path: str, selection: Selection) -> Checkpoint:
    """Return the selected mapping of the file ``path``. A ``::`` in ``path`` is a part of the file name.

    Raises what ``open_checkpoint`` raises.
    """
    with errors_about(path):
        from ckptkit.formats.detect import open_file

        return open_file(path, selection)


def _path_text(path: object) -> str:
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        raise PathError(f"a path cannot be {kind_of(name)}", hint="give a string or a pathlib.Path")
    if name is not path and _BROKEN_URL.match(name) and not kind_at(name):
        raise PathError("pathlib has removed a slash of this URL", hint="give the URL as a string", path=name)
    if not name:
        raise PathError("the path is empty", hint="name a file, a directory, or py:package.module:callable", path="")
    return name


@contextlib.contextmanager
def errors_about(name: str) -> Iterator[None]:
    """Turn errors of reading the file ``name`` into a ``CkptkitError`` that names the file."""
    try:
        yield
    except CkptkitError as error:
        if error.path is None:
            error.path = name
        raise
    except OSError as error:
        raise PathError((error.strerror or str(error)).lower(), path=name) from None
    except MemoryError:
        pass  # the new error is raised below, after this exception has released the objects that filled the memory
    else:
        return
    raise FormatError("describing the checkpoint needs more memory than this machine has", path=name)


def _leave_out_optimizers(checkpoint: Checkpoint, key: str) -> Checkpoint:
    """Return the checkpoint with flattened optimizer states as entries, if other tensors remain and no key was given.

    Readers of nested values have found such states already.
    """
    if key or checkpoint.nested is not None:
        return checkpoint
    found = optimizer_keys(checkpoint)
    if not found or len(found) == len(checkpoint):
        return checkpoint
    warning = ReaderWarning(describe_entries(found), codes.NOT_WEIGHTS)
    return checkpoint.with_as_entries([str(name) for name in found]).with_warnings(warning)


def _warn_of_similar_keys(checkpoint: Checkpoint) -> Checkpoint:
    if (pair := look_alikes(checkpoint)) is None:
        return checkpoint
    return checkpoint.with_warnings(f"two names look alike: {pair[0][:200]!a} and {pair[1][:200]!a}")


def _note_positions(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with a note where its tensors are only numbered."""
    first = next(iter(checkpoint), "")
    if not first.rpartition(".")[2].isdecimal():
        return checkpoint
    from ckptkit.wrappers.positions import find_positions

    numbered = find_positions({key: info.shape for key, info in checkpoint.items()})
    if numbered is None or not numbered.is_certain:
        return checkpoint
    text = f"{numbered.name} holds {numbered.content} by position, without names and buffers"
    hint = "diff, align, merge and --like of a live model give the names"
    return checkpoint.with_warnings(ReaderWarning(f"{text}: {hint}", codes.POSITIONS))


def _warn_of_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with a note where it is an adapter of kohya or diffusers; PEFT has a file that says so."""
    names = "\n".join(checkpoint)
    if not any(part in names for part in ("lora", ".hada_w", ".lokr_w")):
        return checkpoint
    from ckptkit.adapters.keys import is_adapter, named_format

    name = named_format(checkpoint, checkpoint.metadata) if is_adapter(checkpoint.keys()) else ""
    if not name:
        return checkpoint
    text = f"this is an adapter ({name}): the file does not contain the weights of its base model"
    if "lora_adapter_metadata" not in checkpoint.metadata and not any(key.endswith(".alpha") for key in checkpoint):
        text += ", and no scale, for which loaders take 1"
    return checkpoint.with_warnings(ReaderWarning(text, codes.ADAPTER_BASE))


def split_path(name: str) -> tuple[str, str]:
    """Return the path, without credentials, and the key after ``::``.

    File names can contain ``::``, so the longest path of this machine that exists wins. fsspec chains URLs with ``::``,
    so the key of a URL begins after the last part that holds ``://``. A store is not asked.
    """
    if is_url(name):
        parts = name.split("::")
        count = max(number for number, part in enumerate(parts, start=1) if "://" in part)
        return clean_path("::".join(parts[:count])), "::".join(parts[count:])
    if is_hub_path(name):
        path, _, key = name.partition("::")
        return path, key
    name = clean_path(name)
    parts = name.split("::")
    for count in range(len(parts), 0, -1):
        path = "::".join(parts[:count])
        if kind_at(path):
            return path, "::".join(parts[count:])
    path, _, key = name.rpartition("::")
    return (path, key) if path else (name, "")


def _joined(path: str, key: str) -> str:
    return f"{path}::{key}" if key else path


def _open_path(name: str, selection: Selection, *, listing_parts: bool = False) -> Checkpoint:
    folder, file_name = folder_at(name), name_of(name)
    if is_url(name) and not _SUFFIX.search(file_name):
        folder.will_open(_LIKELY)
    elif is_url(name) and (is_index(file_name) or not name.startswith(("http://", "https://"))):
        # Shards and configurations are looked for later. A web server, which seldom lists, is asked for a few by name.
        folder_at(parent_of(name)).will_list([""])
    if kind_at(name) == "folder":
        from ckptkit.formats.directories.opening import open_directory

        return _warn_of_parts(open_directory(folder, selection, listing_parts=listing_parts), name, is_folder=True)
    if name.endswith(".json") and (name.endswith(".index.json") or is_index(file_name)):
        from ckptkit.formats.directories.opening import open_index

        return open_index(folder_at(parent_of(name) or "."), file_name, selection)
    from ckptkit.formats.detect import open_file

    return _warn_of_parts(open_file(name, selection).with_warnings(*one_shard_warnings(name)), name)


def _warn_of_parts(checkpoint: Checkpoint, path: str, *, is_folder: bool = False) -> Checkpoint:
    from ckptkit.formats.part_names import part_warnings

    return checkpoint.with_warnings(*part_warnings(path, checkpoint, is_folder=is_folder))
