"""Files that trainers write beside the weights: the optimizer, the trainer's state, configurations.

Each becomes one entry of the checkpoint that lies in the same directory. Nothing in them is run, no tensor of theirs is
read, and one that is broken is a warning: the weights are none the worse for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ckptkit.core.checkpoint import Entry
from ckptkit.core.files import LocalFile
from ckptkit.core.findings import Remark
from ckptkit.core.text import human_bytes, plural
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats.detect import read_torch
from ckptkit.formats.pickle.code_names import is_suspicious
from ckptkit.formats.safetensors import parse_json
from ckptkit.formats.torch.checkpoint import code_warnings
from ckptkit.formats.torch.tree import describe

__all__ = ["Beside", "is_beside", "named_beside", "read_beside", "read_json"]

# What is said first of a file, and said even where it is no single value; the other values follow.
_TOLD = {
    "trainer_state.json": ("global_step", "epoch", "best_metric", "best_model_checkpoint", "max_steps"),
    "config.json": ("model_type", "architectures", "dtype", "torch_dtype", "quantization_config"),
    "generation_config.json": (),
    "adapter_config.json": (
        "peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path", "rank_pattern", "alpha_pattern",
        "modules_to_save",
    ),
    "params.json": (),
    "metadata.json": ("sharded_backend", "sharded_backend_version", "common_backend", "common_backend_version"),
}  # fmt: skip
_PICKLED = re.compile(
    r"(optimizer|scheduler)(?:_(\d+))?\.(pt|bin)|(scaler|common|meta)\.pt|training_args\.bin|rng_state(?:_(\d+))?\.pth"
    r"|(?:random_states|custom_checkpoint)_(\d+)\.pkl|(?:sampler|dl_state_dict)(?:_(\d+))?\.bin"
)
_NUMBER = re.compile(r"_\d+(?=\.\w+$)")
_LARGEST_JSON = 6 << 20
_LARGEST_PICKLES = 3 << 20  # of all files together; what is made of a byte takes up to seventy
_MOST_FILES = 64
_MOST_VALUES = 64  # of a JSON file
_MOST_OUTLINED = 200_000


class Beside(NamedTuple):
    """One entry for each file beside the weights, or for each set of numbered ones, and what is wrong with them."""

    entries: tuple[Entry, ...]
    warnings: tuple[str, ...]


def is_beside(name: str) -> bool:
    """Return whether a file of this name lies beside weights and holds none itself."""
    return name in _TOLD or _PICKLED.fullmatch(name) is not None


def named_beside(names: Iterable[str], inner: str) -> tuple[str, str] | None:
    """Return the file beside the weights that ``inner`` begins with, and the rest: ``optimizer.pt`` and ``state``."""
    fitting = [name for name in names if f"{inner}.".startswith(f"{name}.") and is_beside(name)]
    name = max(fitting, key=len, default=None)
    return None if name is None else (name, inner[len(name) + 1 :])


def read_beside(directory: str, names: Iterable[str]) -> Beside:
    """Return what lies beside the weights in a directory with these file names; never raises for what it finds."""
    families: dict[str, list[str]] = {}
    for name in sorted(filter(is_beside, names)):
        families.setdefault(_NUMBER.sub("_*", name), []).append(name)
    entries: list[Entry] = []
    warnings: list[str] = []
    left, outlined = [_LARGEST_PICKLES], [_MOST_OUTLINED]
    for family, members in families.items():
        if len(entries) == _MOST_FILES:
            warnings.append(f"{plural(len(families) - _MOST_FILES, 'file')} more beside the weights are not listed")
            break
        try:
            entry = _describe(directory, members[0], left, outlined, warnings)
        except CkptkitError as error:
            warnings.append(Remark(f"{members[0]} is not read: {error.reason}", "beside-unread"))
            entry = Entry("", "file", "not read")
        path = members[0] if len(members) == 1 else family
        kind = entry.type if len(members) == 1 else plural(len(members), "file")
        entries.append(Entry(path, kind, entry.value, outside=True, apart=True))
    return Beside(tuple(entries), tuple(warnings))


def read_json(directory: str, name: str) -> Mapping[str, object]:
    """Return the object in a JSON file of the directory; raises ``CkptkitError`` where there is none."""
    file = LocalFile(os.path.join(directory, name))
    try:
        if file.size > _LARGEST_JSON:
            raise FormatError(f"it has {human_bytes(file.size)}, more than the limit of {human_bytes(_LARGEST_JSON)}")
        return parse_json(file.read(0, file.size), "it", finite=False)
    finally:
        file.close()


def _describe(directory: str, name: str, left: list[int], outlined: list[int], warnings: list[str]) -> Entry:
    if name in _TOLD:
        found = read_json(directory, name)
        chosen = [key for key in _TOLD[name] if found.get(key) is not None]
        chosen += [key for key, value in found.items() if key not in chosen and isinstance(value, str | int | float)]
        return Entry(name, "json", {key: describe(key, found[key], outlined).value for key in chosen[:_MOST_VALUES]})
    file = LocalFile(os.path.join(directory, name))
    try:
        made = read_torch(file, largest=left[0])
        left[0] -= made.pickle_size
        suspicious = [code for code in made.objects.interpreter.references if is_suspicious(code)]
        said = code_warnings([], suspicious)
        warnings.extend(Remark(f"{name} {text}", text.code, text.severity) for text in said)
        return describe(name, made.tree, outlined)
    finally:
        file.close()
