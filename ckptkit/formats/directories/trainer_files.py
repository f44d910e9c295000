"""Read the files that trainers write next to the weights. They hold settings, progress and optimizer state."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ckptkit.core.checkpoint import Entry
from ckptkit.core.config_files import read_json
from ckptkit.core.files.source import Folder
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural
from ckptkit.errors import CkptkitError
from ckptkit.formats import codes
from ckptkit.formats.detect import read_torch
from ckptkit.formats.directories.adapters import CONFIG as ADAPTER_CONFIG
from ckptkit.formats.directories.keys import split_key
from ckptkit.formats.directories.model_files import GENERATION_CONFIG, MODEL_CONFIG
from ckptkit.formats.pickle.values import is_suspicious
from ckptkit.formats.torch.tree import describe_entry

__all__ = ["TrainerFiles", "announce_trainer_files", "find_trainer_file", "is_trainer_file", "read_trainer_files"]


# Keys that are listed first, also where the value is a list or an object. Other numbers and texts follow.
_FIRST_KEYS = {
    "trainer_state.json": ("global_step", "epoch", "best_metric", "best_model_checkpoint", "max_steps"),
    MODEL_CONFIG: ("model_type", "architectures", "dtype", "torch_dtype", "quantization_config"),
    GENERATION_CONFIG: (),
    ADAPTER_CONFIG: (
        "peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path", "rank_pattern", "alpha_pattern",
        "modules_to_save",
    ),
    "params.json": (),
    "metadata.json": ("sharded_backend", "sharded_backend_version", "common_backend", "common_backend_version"),
}  # fmt: skip
_PICKLED = re.compile(
    r"(optimizer|scheduler)(?:_(\d+))?\.(pt|bin)|(scaler|common|meta)\.pt|training_args\.bin|rng_state(?:_(\d+))?\.pth"
    r"|(?:random_states|custom_checkpoint)_(\d+)\.pkl|(?:sampler|dl_state_dict)(?:_(\d+))?\.bin"
    r"|(optim|extra_state)_world_size_\d+_rank_\d+\.pt"
)
_NUMBER = re.compile(r"_\d+(?=\.\w+$)")
_LARGEST_PICKLES = 3 << 20  # bytes, of all files together; a byte can become seventy bytes in memory
_MOST_FILES = 64
_MOST_VALUES = 64  # of a JSON file
_MOST_OUTLINED = 200_000


class TrainerFiles(NamedTuple):
    """Files that trainers write next to the weights: an entry for each file or set of numbered files, and warnings."""

    entries: tuple[Entry, ...]
    warnings: tuple[str, ...]


def is_trainer_file(name: str) -> bool:
    """Return whether trainers write a file of this name next to the weights. Such a file holds no weights."""
    return name in _FIRST_KEYS or _PICKLED.fullmatch(name) is not None


def find_trainer_file(names: Iterable[str], key: str) -> tuple[str, str] | None:
    """Split ``key`` into the name of a trainer's file and the key inside the file, or return None.

    For example, ``optimizer.pt.state`` becomes ``optimizer.pt`` and ``state``.
    """
    return split_key(filter(is_trainer_file, names), key)


def announce_trainer_files(folder: Folder, names: Iterable[str]) -> None:
    """Say that the files that ``read_trainer_files`` opens are opened soon."""
    folder.will_open([members[0] for members in list(_families(names).values())[:_MOST_FILES]])


def _families(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the trainers' files among the names, numbered ones together."""
    families: dict[str, list[str]] = {}
    for name in sorted(filter(is_trainer_file, names)):
        families.setdefault(_NUMBER.sub("_*", name), []).append(name)
    return families


def read_trainer_files(folder: Folder, names: Iterable[str]) -> TrainerFiles:
    """Return the trainers' files among the file names of a directory. A file that cannot be read becomes a warning."""
    families = _families(names)
    entries: list[Entry] = []
    warnings: list[str] = []
    left, outlined = [_LARGEST_PICKLES], [_MOST_OUTLINED]
    for family, members in families.items():
        if len(entries) == _MOST_FILES:
            warnings.append(f"{plural(len(families) - _MOST_FILES, 'more file')} of the trainer are not listed")
            break
        try:
            entry = _describe(folder, members[0], left, outlined, warnings)
        except CkptkitError as error:
            warnings.append(ReaderWarning(f"{members[0]} cannot be read: {error.reason}", codes.BESIDE_UNREAD))
            entry = Entry("", "file", "not read")
        path = members[0] if len(members) == 1 else family
        kind = entry.type if len(members) == 1 else plural(len(members), "file")
        entries.append(Entry(path, kind, entry.value, is_outside=True, is_file=True))
    return TrainerFiles(tuple(entries), tuple(warnings))


def _describe(folder: Folder, name: str, left: list[int], outlined: list[int], warnings: list[str]) -> Entry:
    if name in _FIRST_KEYS:
        found = read_json(folder, name)
        chosen = [key for key in _FIRST_KEYS[name] if found.get(key) is not None]
        chosen += [key for key, value in found.items() if key not in chosen and isinstance(value, str | int | float)]
        return Entry(
            name, "json", {key: describe_entry(key, found[key], outlined).value for key in chosen[:_MOST_VALUES]}
        )
    from ckptkit.formats.torch.checkpoint import code_warnings

    file = folder.open(name)
    try:
        saved = read_torch(file, largest=left[0])
        left[0] -= saved.pickle_size
        suspicious = [code for code in saved.objects.interpreter.references if is_suspicious(code)]
        warnings.extend(
            ReaderWarning(f"{name} {text}", text.code, text.severity) for text in code_warnings([], suspicious)
        )
        return describe_entry(name, saved.tree, outlined)
    finally:
        file.close()
