"""Which of the files in a directory are the checkpoint: told by their names, each then read by its content."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from ckptkit.core.checkpoint import Checkpoint, Entry, TensorInfo
from ckptkit.core.files import LocalFile
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import human_bytes, plural, printable, quoted
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats import codes
from ckptkit.formats.detect import TORCH_SUFFIXES, open_file, read_torch
from ckptkit.formats.foreign import refuse_selection, unsupported_directory
from ckptkit.formats.pickle.values import is_suspicious
from ckptkit.formats.safetensors import parse_json
from ckptkit.formats.sharded import INDEX_SUFFIXES, find_index, is_plain_name, link_warnings, open_sharded
from ckptkit.formats.torch.checkpoint import code_warnings
from ckptkit.formats.torch.tree import describe_entry
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = [
    "CONFIG",
    "Companions",
    "adapter_warnings",
    "find_companion",
    "is_companion",
    "open_directory",
    "open_index",
    "read_companions",
    "read_json",
]


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


class Companions(NamedTuple):
    """One entry for each file beside the weights, or for each set of numbered ones, and what is wrong with them."""

    entries: tuple[Entry, ...]
    warnings: tuple[str, ...]


def is_companion(name: str) -> bool:
    """Return whether a file of this name lies beside weights and holds none itself."""
    return name in _TOLD or _PICKLED.fullmatch(name) is not None


def find_companion(names: Iterable[str], key: str) -> tuple[str, str] | None:
    """Return the file beside the weights that ``key`` begins with, and the rest: ``optimizer.pt`` and ``state``."""
    fitting = [name for name in names if f"{key}.".startswith(f"{name}.") and is_companion(name)]
    name = max(fitting, key=len, default=None)
    return None if name is None else (name, key[len(name) + 1 :])


def read_companions(directory: str, names: Iterable[str]) -> Companions:
    """Return what lies beside the weights in a directory with these file names; never raises for what it finds."""
    families: dict[str, list[str]] = {}
    for name in sorted(filter(is_companion, names)):
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
            warnings.append(ReaderWarning(f"{members[0]} is not read: {error.reason}", codes.BESIDE_UNREAD))
            entry = Entry("", "file", "not read")
        path = members[0] if len(members) == 1 else family
        kind = entry.type if len(members) == 1 else plural(len(members), "file")
        entries.append(Entry(path, kind, entry.value, is_outside=True, is_file=True))
    return Companions(tuple(entries), tuple(warnings))


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
        return Entry(
            name, "json", {key: describe_entry(key, found[key], outlined).value for key in chosen[:_MOST_VALUES]}
        )
    file = LocalFile(os.path.join(directory, name))
    try:
        made = read_torch(file, largest=left[0])
        left[0] -= made.pickle_size
        suspicious = [code for code in made.objects.interpreter.references if is_suspicious(code)]
        said = code_warnings([], suspicious)
        warnings.extend(ReaderWarning(f"{name} {text}", text.code, text.severity) for text in said)
        return describe_entry(name, made.tree, outlined)
    finally:
        file.close()


CONFIG = "adapter_config.json"
_OUTER = "base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?!lora_)\w+)?(?:\.weight)?")
_LITERAL = re.compile(r"\^?[\w.]+")  # names of modules; everything else is a regular expression, and not evaluated
_MOST_NAMED = 4
_DEEPEST = 64


def adapter_warnings(infos: Mapping[str, TensorInfo], config: Mapping[str, object] | None) -> list[ReaderWarning]:
    """Return what is odd about the weights of an adapter whose configuration is ``config``; None where there is none.

    Of LoRA the ranks are compared: a tensor whose rank is not the one that ``r`` or ``rank_pattern`` gives is named.
    """
    if config is None:
        return [
            ReaderWarning(
                f"no {CONFIG} beside the weights: their scale (lora_alpha / r) is unknown", codes.ADAPTER_CONFIG
            )
        ]
    base = config.get("base_model_name_or_path")
    of = f" of {quoted(base)}" if isinstance(base, str) and base else ""
    remarks = [ReaderWarning(f"an adapter: the weights{of} that it belongs to are not inside", codes.ADAPTER_BASE)]
    if config.get("peft_type") == "LORA" and not config.get("target_parameters"):
        wrong = list(_other_ranks(infos, config))
        remarks += [ReaderWarning(text, codes.ADAPTER_RANK) for text in wrong[:_MOST_NAMED]]
        if len(wrong) > _MOST_NAMED:
            said = f"{plural(len(wrong) - _MOST_NAMED, 'more tensor')} of another rank than {CONFIG} gives"
            remarks.append(ReaderWarning(said, codes.ADAPTER_RANK))
    return remarks


def _other_ranks(infos: Mapping[str, TensorInfo], config: Mapping[str, object]) -> Iterator[str]:
    pattern = config.get("rank_pattern")
    pattern = pattern if isinstance(pattern, Mapping) else {}
    if not all(_LITERAL.fullmatch(key) for key in pattern):
        return
    places = {key: place for place, key in enumerate(pattern)}
    for key, info in infos.items():
        match = _LOW_RANK.fullmatch(key)
        if match is None or len(info.shape) < 2:
            continue
        wanted = _rank_of(match["module"].removeprefix(_OUTER), config.get("r"), pattern, places)
        found = info.shape[0] if match["side"] == "A" else info.shape[1]
        if type(wanted) is int and found != wanted:
            yield f"{quoted(key)} has rank {found:,}, and {CONFIG} gives {wanted}"


def _rank_of(module: str, default: object, pattern: Mapping[str, object], places: Mapping[str, int]) -> object:
    # The first key wins that is the module's name or an end of it; behind "^" the whole name.
    parts = module.split(".")
    ends = [".".join(parts[first:]) for first in range(len(parts))] if len(parts) <= _DEEPEST else [module]
    fitting = [end for end in (f"^{module}", *ends) if end in places]
    return pattern[min(fitting, key=places.__getitem__)] if fitting else default


_WHOLE = (
    "model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
    "consolidated.safetensors", "consolidated.00.pth",
)  # fmt: skip
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
# accelerate numbers all models after the first; of a step of DeepSpeed the fp32 weights are put together
_SHARD = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")
_ANOTHER = re.compile(r"(pytorch_)?model_\d+\.(safetensors|bin)|global_step\d+")
_MOST_NAMES, _MOST_LOOKED_AT = 1_000_000, 1000
_METADATA = "metadata.json"  # of Megatron
_LATEST, _LONGEST_TAG = "latest", 1000


def open_index(directory: str, index: str, selection: Selection, *, whole: bool = False) -> Checkpoint:
    """Return the checkpoint whose shards the file ``index`` names; ``whole`` refuses others beside them."""
    refuse_selection(selection)
    return open_sharded(directory or ".", index, lambda path: open_file(path, WEIGHTS), whole=whole)


def open_directory(directory: str, selection: Selection) -> Checkpoint:
    """Return the checkpoint in ``directory``, or the selected mapping inside it.

    What trainers write beside weights is among its entries; the key can also begin with the name of such a file,
    which then is what is opened: ``optimizer.pt`` or ``optimizer.pt.state``. Raises ``FormatError`` where there is no
    checkpoint, where there are several, and where a part of it is missing.
    """
    names = _names(directory)
    beside = find_companion(names, selection.key)
    if beside is None and selection.key:
        from ckptkit.formats.distributed.zero import find_states_file

        beside = find_states_file(names, selection.key)
    if beside is not None:
        return _open_companion(directory, *beside)
    checkpoint = _open_weights(directory, names, selection)
    try:
        entries, warnings = read_companions(directory, names)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint.with_entries(*entries).with_warnings(*warnings)


def _names(directory: str) -> list[str]:
    with os.scandir(directory) as listing:
        names = [entry.name for entry in islice(listing, _MOST_NAMES + 1)]
    if len(names) > _MOST_NAMES:
        raise FormatError(f"a directory of more than {_MOST_NAMES:,} files", hint="give the path of the one meant")
    return names


def _open_companion(directory: str, name: str, key: str) -> Checkpoint:
    if name.endswith(".json"):
        raise FormatError(
            "a JSON file, which holds no tensors",
            hint="ckpt show of the directory lists its values",
            path=os.path.join(directory, name),
        )
    return open_file(os.path.join(directory, name), Selection(key))


def _open_weights(directory: str, names: Sequence[str], selection: Selection) -> Checkpoint:
    index = find_index(names)
    known = [name for name in (*_WHOLE, *_ADAPTER) if name in names]
    if index is None:
        from ckptkit.formats.distributed.dcp import is_dcp, open_dcp

        if is_dcp(names):
            return _with_others(open_dcp(directory, selection), "the distributed checkpoint", known)
    if index is None and not known:
        from ckptkit.formats.distributed.zero import is_zero, open_zero

        if is_zero(names):
            if selection.optimizer:
                raise FormatError(
                    "holds one optimizer state for each rank", hint="a *_states.pt file can follow the ::"
                )
            if selection.key:
                raise FormatError(
                    f"holds nothing at {quoted(selection.key)}", hint="a *_states.pt file can follow the ::"
                )
            return open_zero(directory, names)
        if _LATEST in names and os.path.isfile(os.path.join(directory, _LATEST)):
            return open_directory(_tagged(directory), selection)
    adapter = [name for name in known if name in _ADAPTER]
    chosen = index or next(iter(known), None) or _only(directory, names)
    if adapter and chosen not in adapter:
        raise FormatError(
            f"holds a whole model and an adapter: {printable(chosen)}, {adapter[0]}",
            hint="give the path of the one meant",
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
    what = f"the index {quoted(chosen)}" if index else quoted(chosen)
    return _with_others(checkpoint, what, [name for name in (*known, *numbered, *indexes) if name != chosen])


def _with_others(checkpoint: Checkpoint, chosen: str, others: Sequence[str]) -> Checkpoint:
    warnings = (f"{quoted(name)} lies beside {chosen}, which is the one read" for name in others[:4])
    return checkpoint.with_warnings(*warnings)


def _read_adapter_warnings(checkpoint: Checkpoint, directory: str, names: Sequence[str]) -> tuple[str, ...]:
    try:
        config = read_json(directory, CONFIG) if CONFIG in names else None
    except CkptkitError:
        return ()  # said of the file, as of every one beside the weights
    return tuple(adapter_warnings(checkpoint, config))


def _tagged(directory: str) -> str:
    """Return the directory that the file ``latest`` names, as DeepSpeed has it: the last one saved."""
    path = os.path.join(directory, _LATEST)
    file = LocalFile(path)
    try:
        tag = file.read(0, min(file.size, _LONGEST_TAG)).decode("utf-8", "replace").strip()
    finally:
        file.close()
    if not is_plain_name(tag):
        raise FormatError(f"names the unsafe directory {quoted(tag)}", path=path)
    inside = os.path.join(directory, tag)
    if not os.path.isdir(inside) or os.path.exists(os.path.join(inside, _LATEST)):
        raise FormatError(f"names {quoted(tag)}, which is no directory of a save here", path=path)
    return inside


def _megatron(directory: str, names: Sequence[str]) -> FormatError | None:
    if _METADATA not in names:
        return None
    try:
        backend = read_json(directory, _METADATA).get("sharded_backend")
    except CkptkitError:
        return None
    if not isinstance(backend, str):
        return None
    return FormatError(
        f"a checkpoint of Megatron in {quoted(backend)}, which is not read",
        hint="save it with --dist-ckpt-format torch_dist",
    )


def _only(directory: str, names: Sequence[str]) -> str:
    """Return the only file that by its name holds weights; raises ``FormatError`` where there are none or several."""
    weights = sorted(
        name for name in names if name.endswith((".safetensors", *TORCH_SUFFIXES)) and not is_companion(name)
    )
    if not weights and CONFIG in names:
        raise FormatError(
            f"holds {CONFIG} and no weights of the adapter", hint=f"they are called {_ADAPTER[0]} or {_ADAPTER[1]}"
        )
    if not weights:
        if (foreign := unsupported_directory(names) or _megatron(directory, names)) is not None:
            raise foreign
        inside = [name for name in sorted(names)[:_MOST_LOOKED_AT] if os.path.isdir(os.path.join(directory, name))]
        if inside:
            listed = ", ".join(map(printable, inside[:4])) + (", …" if len(inside) > 4 else "")
            raise FormatError("a directory without a checkpoint in it", hint=f"look into those inside it: {listed}")
        looked = f"looked for an index (*{INDEX_SUFFIXES[0]}, *{INDEX_SUFFIXES[1]}) and for {', '.join(_WHOLE[:2])}"
        raise FormatError("a directory without a checkpoint in it", hint=looked)
    if len(weights) > 1:
        listed = ", ".join(map(printable, weights[:4]))
        shards = all(map(_SHARD.fullmatch, weights))
        raise FormatError(
            f"a directory with {plural(len(weights), 'file')} of weights and no index, such as {listed}",
            hint="copy the index too, whose name ends in .index.json" if shards else "give the path of the one meant",
        )
    return weights[0]
