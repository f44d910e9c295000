"""List a directory, and find the files of weights in it and the folders that hold checkpoints. The work is bounded."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from ckptkit.core.files.places import join
from ckptkit.core.files.source import Folder, FolderNames
from ckptkit.errors import CkptkitError, FormatError, PathError
from ckptkit.formats.detect import WEIGHT_SUFFIXES, could_hold_tensors, has_no_storages, has_suffix
from ckptkit.formats.directories.trainer_files import is_trainer_file
from ckptkit.formats.distributed.file_names import is_dcp, is_zero
from ckptkit.formats.foreign import find_foreign_weights
from ckptkit.formats.shard_names import is_index

__all__ = [
    "ADAPTER_NAMES",
    "MODEL_NAMES",
    "PIPELINE",
    "CheckpointFolders",
    "Listing",
    "find_weights_files",
    "list_directory",
    "read_module_folders",
]

MODEL_NAMES = (
    "model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
    "consolidated.safetensors", "consolidated.00.pth",
)  # fmt: skip
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_TRIED = (
    "model.safetensors.index.json", "pytorch_model.bin.index.json", "diffusion_pytorch_model.safetensors.index.json",
    *MODEL_NAMES, *ADAPTER_NAMES, "config.json", "adapter_config.json", "params.json",
)  # fmt: skip
PIPELINE = "model_index.json"  # of diffusers
_MODULES = "modules.json"  # of sentence-transformers
_LARGEST_MODULES = 1 << 20
_MOST_NAMES, _MOST_NAMES_INSIDE = 1_000_000, 2000
_MOST_TESTED, _MOST_ODD, _MOST_TESTED_INSIDE = 500, 100, 8  # files of which the first bytes are read
_MOST_FOLDERS = 300  # that are listed, at any depth
_DEEPEST = 3
_HEAD = 512


@dataclass(frozen=True, slots=True)
class CheckpointFolders:
    """Folders of a directory.

    ``readable`` folders hold checkpoints, ``foreign`` folders hold weights of other frameworks only, and ``unknown``
    folders were not searched, because there are too many folders.
    """

    readable: tuple[str, ...]
    foreign: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """The names in a directory, in alphabetical order. Links to directories count as folders."""

    folder: Folder
    files: tuple[str, ...]
    folders: tuple[str, ...]

    @property
    def path(self) -> str:
        """Return the path of the directory."""
        return self.folder.path

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of files and folders."""
        return (*self.files, *self.folders)

    def join(self, name: str) -> str:
        """Return the path of a file or folder of the directory."""
        return join(self.path, name)

    @property
    def shown_folders(self) -> list[str]:
        """Return the folders that are not hidden."""
        return _shown(self.folders)

    @cached_property
    def checkpoint_folders(self) -> CheckpointFolders:
        """The folders in which a checkpoint is, at most three levels down. Hidden folders are left out."""
        return _find_checkpoint_folders(self)


def list_directory(folder: Folder) -> Listing:
    """Return the names in a directory.

    Raises ``PathError`` where it cannot be listed, and ``FormatError`` where it has more than a million names, or its
    server does not list.
    """
    names = folder.names(_MOST_NAMES)
    if not names.is_listed:
        return _try_names(folder, names)
    if len(names.all) > _MOST_NAMES:
        raise FormatError(f"a directory of more than {_MOST_NAMES:,} files", hint="give the path of one file")
    return Listing(folder, names.files, names.folders)


def _try_names(folder: Folder, linked: FolderNames) -> Listing:
    """Return those usual names that a folder has, which its server does not list, and those that its page links to."""
    folder.will_open(_TRIED)
    files = sorted({*linked.files, *(name for name in _TRIED if folder.has_file(name))})
    if not any(name in files for name in (*MODEL_NAMES, *ADAPTER_NAMES)) and not any(map(is_index, files)):
        raise FormatError(
            "a folder of a server that does not list its files, and none has a usual name",
            hint="give the URL of a file or of an index",
        )
    return Listing(folder, tuple(files), linked.folders)


def find_weights_files(folder: Folder, names: Iterable[str], most: int = _MOST_TESTED) -> list[str]:
    """Return those of the files that hold weights, judging by their first bytes, or by their names after ``most``.

    Files of trainers, indexes, and files of other frameworks are not among them.
    """
    names = [name for name in names if not is_trainer_file(name)]
    foreign = set(find_foreign_weights(names))
    named = [name for name in names if has_suffix(name, WEIGHT_SUFFIXES) and name not in foreign]
    tested = named[:most]
    if most == _MOST_TESTED:
        taken = foreign.union(named)
        tested += [name for name in names if name not in taken and not has_suffix(name, _TEXT_SUFFIXES)][:_MOST_ODD]
    folder.will_open([name for name in tested if not _is_known(name)])
    found = [name for name in tested if _could_hold_tensors(folder, name)]
    return sorted([*found, *named[most:]])


_TEXT_SUFFIXES = (".json", ".txt", ".md", ".py", ".yaml", ".yml", ".log", ".png", ".jpg")


def _is_known(name: str) -> bool:
    return name in MODEL_NAMES or name in ADAPTER_NAMES


def _could_hold_tensors(folder: Folder, name: str) -> bool:
    if _is_known(name):
        return True
    try:
        file = folder.open(name)
    except CkptkitError:
        return False
    try:
        return could_hold_tensors(name, file.read(0, min(file.size, _HEAD))) and not has_no_storages(file)
    except CkptkitError:
        return False
    finally:
        file.close()


def _find_checkpoint_folders(listing: Listing) -> CheckpointFolders:
    """Search level by level, so that one folder of many folders does not use up the work that is allowed."""
    kinds: dict[str, str] = {}
    waiting = [(name, name) for name in _shown(listing.folders)]
    left = _MOST_FOLDERS
    for _ in range(_DEEPEST):
        deeper: list[tuple[str, str]] = []
        listing.folder.will_list([path for _, path in waiting[:left]])
        for top, path in waiting[:left]:
            if kinds.get(top) != "readable":
                inside, kind = _list_folder(listing.folder.folder(path))
                kinds[top] = kind or kinds.get(top, "")
                deeper += [(top, f"{path}/{name}") for name in inside]
        left, waiting = max(left - len(waiting), 0), deeper
    return CheckpointFolders(
        tuple(sorted(name for name, kind in kinds.items() if kind == "readable")),
        tuple(sorted(name for name, kind in kinds.items() if kind == "foreign")),
        tuple(name for name in _shown(listing.folders) if name not in kinds),
    )


def _shown(folders: Collection[str]) -> list[str]:
    return [name for name in folders if not name.startswith(".") and name != "__pycache__"]


def _list_folder(folder: Folder) -> tuple[list[str], str]:
    """Return the folders inside a folder, and whether its own files are ``readable``, ``foreign``, or neither."""
    try:
        inside = folder.names(_MOST_NAMES_INSIDE)
    except PathError:
        return [], ""
    files = inside.files
    if is_dcp(files) or is_zero(files) or any(map(is_index, files)):
        return [], "readable"
    if find_weights_files(folder, files, _MOST_TESTED_INSIDE):
        return [], "readable"
    return _shown(inside.folders), "foreign" if find_foreign_weights(inside.all) else ""


def read_module_folders(listing: Listing) -> list[str]:
    """Return the folders that ``modules.json`` of sentence-transformers names as parts of the model."""
    if _MODULES not in listing.files:
        return []
    try:
        file = listing.folder.open(_MODULES)
    except CkptkitError:
        return []
    try:
        rows: object = json.loads(file.read(0, min(file.size, _LARGEST_MODULES)))
    except (CkptkitError, ValueError, RecursionError):
        return []
    finally:
        file.close()
    paths = [row.get("path") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [path for path in paths if isinstance(path, str) and path in listing.folders]
