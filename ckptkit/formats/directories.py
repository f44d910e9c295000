"""Open the checkpoint in a directory. File names decide which files are read, and their content decides how."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from ckptkit.core.checkpoint import Checkpoint, Entry, TensorInfo
from ckptkit.core.files import LocalFile
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import human_bytes, listed, plural, printable, quoted
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats import codes
from ckptkit.formats.detect import TORCH_SUFFIXES, open_file, read_torch
from ckptkit.formats.distributed.file_names import find_states_file, is_dcp, is_zero
from ckptkit.formats.foreign import refuse_selection, unsupported_directory
from ckptkit.formats.pickle.values import is_suspicious
from ckptkit.formats.safetensors import parse_json
from ckptkit.formats.sharded import INDEX_SUFFIXES, find_index, is_plain_name, link_warnings, open_sharded
from ckptkit.formats.torch.tree import describe_entry
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = [
    "CONFIG",
    "TrainerFiles",
    "adapter_warnings",
    "find_trainer_file",
    "is_trainer_file",
    "open_directory",
    "open_index",
    "read_json",
    "read_trainer_files",
]


# Keys that are listed first, also where the value is a list or an object. Other numbers and texts follow.
_FIRST_KEYS = {
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
    matches = [name for name in names if f"{key}.".startswith(f"{name}.") and is_trainer_file(name)]
    name = max(matches, key=len, default=None)
    return None if name is None else (name, key[len(name) + 1 :])


def read_trainer_files(directory: str, names: Iterable[str]) -> TrainerFiles:
    """Return the trainers' files among the file names of a directory. A file that cannot be read becomes a warning."""
    families: dict[str, list[str]] = {}
    for name in sorted(filter(is_trainer_file, names)):
        families.setdefault(_NUMBER.sub("_*", name), []).append(name)
    entries: list[Entry] = []
    warnings: list[str] = []
    left, outlined = [_LARGEST_PICKLES], [_MOST_OUTLINED]
    for family, members in families.items():
        if len(entries) == _MOST_FILES:
            warnings.append(f"{plural(len(families) - _MOST_FILES, 'more file')} of the trainer are not listed")
            break
        try:
            entry = _describe(directory, members[0], left, outlined, warnings)
        except CkptkitError as error:
            warnings.append(ReaderWarning(f"{members[0]} cannot be read: {error.reason}", codes.BESIDE_UNREAD))
            entry = Entry("", "file", "not read")
        path = members[0] if len(members) == 1 else family
        kind = entry.type if len(members) == 1 else plural(len(members), "file")
        entries.append(Entry(path, kind, entry.value, is_outside=True, is_file=True))
    return TrainerFiles(tuple(entries), tuple(warnings))


def read_json(directory: str, name: str) -> Mapping[str, object]:
    """Return the JSON object in a file of the directory. Raises ``CkptkitError`` if the file holds no JSON object."""
    file = LocalFile(os.path.join(directory, name))
    try:
        if file.size > _LARGEST_JSON:
            raise FormatError(f"{human_bytes(file.size)}, more than the limit of {human_bytes(_LARGEST_JSON)}")
        return parse_json(file.read(0, file.size), "the file", finite=False)
    finally:
        file.close()


def _describe(directory: str, name: str, left: list[int], outlined: list[int], warnings: list[str]) -> Entry:
    if name in _FIRST_KEYS:
        found = read_json(directory, name)
        chosen = [key for key in _FIRST_KEYS[name] if found.get(key) is not None]
        chosen += [key for key, value in found.items() if key not in chosen and isinstance(value, str | int | float)]
        return Entry(
            name, "json", {key: describe_entry(key, found[key], outlined).value for key in chosen[:_MOST_VALUES]}
        )
    from ckptkit.formats.torch.checkpoint import code_warnings

    file = LocalFile(os.path.join(directory, name))
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


CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?!lora_)\w+)?(?:\.weight)?")
_LITERAL = re.compile(r"\^?[\w.]+")  # a module name; any other key is a regular expression, which is never evaluated
_MOST_NAMED = 4
_DEEPEST = 64


def adapter_warnings(infos: Mapping[str, TensorInfo], config: Mapping[str, object] | None) -> list[ReaderWarning]:
    """Return warnings about an adapter. ``config`` is the configuration of the adapter, or None if there is none.

    For LoRA, there is a warning for each tensor of another rank than ``r`` or ``rank_pattern`` of the configuration.
    """
    if config is None:
        return [
            ReaderWarning(
                f"no {CONFIG} in the directory of the weights: the scale (lora_alpha / r) is unknown",
                codes.ADAPTER_CONFIG,
            )
        ]
    base = config.get("base_model_name_or_path")
    base_model = f"the base model {quoted(base)}" if isinstance(base, str) and base else "its base model"
    warnings = [
        ReaderWarning(f"this is an adapter: the file does not contain the weights of {base_model}", codes.ADAPTER_BASE)
    ]
    if config.get("peft_type") == "LORA" and not config.get("target_parameters"):
        wrong = list(_other_ranks(infos, config))
        warnings += [ReaderWarning(text, codes.ADAPTER_RANK) for text in wrong[:_MOST_NAMED]]
        if len(wrong) > _MOST_NAMED:
            text = f"{plural(len(wrong) - _MOST_NAMED, 'more tensor')} of another rank than in {CONFIG}"
            warnings.append(ReaderWarning(text, codes.ADAPTER_RANK))
    return warnings


def _other_ranks(infos: Mapping[str, TensorInfo], config: Mapping[str, object]) -> Iterator[str]:
    pattern = config.get("rank_pattern")
    pattern = pattern if isinstance(pattern, Mapping) else {}
    if not all(_LITERAL.fullmatch(key) for key in pattern):
        return
    positions = {key: position for position, key in enumerate(pattern)}
    for key, info in infos.items():
        match = _LOW_RANK.fullmatch(key)
        if match is None or len(info.shape) < 2:
            continue
        expected = _rank_of(match["module"].removeprefix(_PEFT_PREFIX), config.get("r"), pattern, positions)
        found = info.shape[0] if match["side"] == "A" else info.shape[1]
        if type(expected) is int and found != expected:
            yield f"{quoted(key)} has rank {found:,}, but {CONFIG} gives {expected}"


def _rank_of(module: str, default: object, pattern: Mapping[str, object], positions: Mapping[str, int]) -> object:
    # A key matches the last segments of a module's name, or with "^" the whole name. The first key that matches wins.
    parts = module.split(".")
    ends = [".".join(parts[first:]) for first in range(len(parts))] if len(parts) <= _DEEPEST else [module]
    matches = [end for end in (f"^{module}", *ends) if end in positions]
    return pattern[min(matches, key=positions.__getitem__)] if matches else default


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
    if len(weights) > 1:
        shards = all(map(_SHARD.fullmatch, weights))
        raise FormatError(
            f"a directory with {len(weights):,} files of weights and no index: {listed(weights, 4, show=printable)}",
            hint="copy the index too; its name ends in .index.json" if shards else "give the path of one file",
        )
    return weights[0]
