"""The known kinds of metadata that name tensors, each with the function that lets it follow them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from ckptkit.core.config_files import json_value
from ckptkit.core.text import listed, quoted
from ckptkit.plans.metadata.moves import Followed, Moves

__all__ = ["LAYOUTS", "MetadataLayout", "json_of", "pattern_fields", "strings_of"]

_TORCHAO_NAMES = "tensor_names"
_PLAIN_ENTRY = json.dumps({"_type": "Tensor"})
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class MetadataLayout:
    """One kind of metadata in safetensors files that names tensors.

    ``claims`` returns the items of an input's metadata that are of this kind. ``follow`` returns these items for the
    output, from all inputs, of which the first owns the metadata of the output. ``loss`` says what is lost where a
    format cannot hold the metadata; it is empty where nothing reads it.
    """

    writer: str
    claims: Callable[[Moves], frozenset[str]]
    follow: Callable[[Sequence[Moves]], Followed]
    loss: str = ""


def json_of(text: str) -> object:
    """Return the value of a JSON text that has a list or an object, or None for any other text."""
    if not text.startswith(("[", "{")):
        return None
    try:
        return json_value(text)
    except (ValueError, RecursionError):
        return None


def strings_of(value: object) -> Iterator[str]:
    """Yield every string inside a value of JSON, the keys of objects too."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item


# torchao.prototype.safetensors: "tensor_names" lists the names, and each name has an entry of its own. The parts of a
# tensor subclass are called "layer._weight_qdata", and "layer.weight:qdata" in earlier versions.


def _torchao_entries(metadata: Mapping[str, str]) -> dict[str, Mapping[str, object]]:
    """Return the entry of each name that has one."""
    names = json_of(metadata.get(_TORCHAO_NAMES, ""))
    texts = {name: metadata[name] for name in names if name in metadata} if _is_list_of_names(names) else {}
    entries = {name: json_of(text) for name, text in texts.items()}
    return {name: entry for name, entry in entries.items() if isinstance(entry, dict) and "_type" in entry}


def _is_list_of_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _torchao_claims(moves: Moves) -> frozenset[str]:
    names = _torchao_entries(moves.metadata)
    return frozenset([*names, _TORCHAO_NAMES]) if names else frozenset()


def _follow_torchao(inputs: Sequence[Moves]) -> Followed:
    entries: dict[str, str] = {}
    notes: list[str] = []
    told = [moves for moves in inputs if _torchao_entries(moves.metadata)]
    for moves in told:
        followed = _follow_torchao_of(moves)
        entries |= followed.metadata
        notes += followed.notes
    # torchao returns only the tensors that the list names.
    others = (key for key in told[0].other_outputs if all(key in moves.other_outputs for moves in told))
    entries |= {key: _PLAIN_ENTRY for key in others if key not in entries}
    short = [name for name in entries if "." not in name]
    if short:
        notes.append(f"torchao cannot load a tensor without a module before its name: {listed(short, _MOST_NAMED)}")
    return Followed({**entries, _TORCHAO_NAMES: json.dumps(list(entries))} if entries else {}, tuple(notes))


def _follow_torchao_of(moves: Moves) -> Followed:
    entries: dict[str, str] = {}
    lost: list[str] = []
    found = _torchao_parts(moves)
    elsewhere = [name for name, parts in found.items() if not parts and name not in moves.keys]
    renamed = moves.rename(elsewhere) if elsewhere else {}
    for name, parts in found.items():
        if name in moves.keys:
            new_names = [*moves.copies.get(name, ()), *moves.made.get(name, ())]
        elif not parts:  # in another file of the same checkpoint
            new_names = [renamed[name]] if name in renamed else []
        else:
            new_names = _names_of_parts(parts, moves)
            if not new_names and any(key in moves.copies for key in parts.values()):
                lost.append(name)
        entries |= dict.fromkeys(new_names, moves.metadata[name])
    if not lost:
        return Followed(entries)
    reason = "the new names of its parts are not the parts of one tensor"
    return Followed(entries, (f"torchao's metadata does not follow {listed(lost, _MOST_NAMED)}: {reason}",))


def _torchao_parts(moves: Moves) -> dict[str, dict[str, str]]:
    """Return the keys of the parts of each subclass by the ends of their names, such as ``_qdata`` or ``:qdata``."""
    entries = _torchao_entries(moves.metadata)
    found: dict[str, dict[str, str]] = {name: {} for name in entries}
    beginnings = {_torchao_beginning(name): name for name in entries} | {f"{name}:": name for name in entries}
    for key in moves.keys:
        if key in found:
            continue
        for at in reversed([at for at, char in enumerate(key) if char in "_:"]):
            name = beginnings.get(key[: at + 1])
            parts = entries[name].get("_tensor_data_names") if name is not None else None
            # Entries of earlier versions do not list the parts.
            if name is not None and (not isinstance(parts, list) or key[at + 1 :] in parts):
                found[name][key[at:]] = key
                break
    return found


def _torchao_beginning(name: str) -> str:
    module, dot, last = name.rpartition(".")
    return f"{module}{dot}_{last}_"


def _names_of_parts(parts: Mapping[str, str], moves: Moves) -> list[str]:
    """Return each new name under which the output has all parts of a tensor."""
    found: dict[str, set[str]] = {}
    for end, key in parts.items():
        for new in moves.copies.get(key, ()):
            name = new.removesuffix(end)
            if end.startswith("_"):
                module, dot, last = name.rpartition(".")
                name = f"{module}{dot}{last[1:]}" if last.startswith("_") else ""
            if name and new.endswith(end):
                found.setdefault(name, set()).add(end)
    return [name for name, ends in found.items() if ends == parts.keys()]


# safetensors.torch.save_model: the name of each tensor that was removed, because it is the same as the one it names.


def _tie_claims(moves: Moves) -> frozenset[str]:
    return frozenset(
        removed
        for removed, kept in moves.metadata.items()
        if kept in moves.keys and removed != kept and ("." in removed or "." not in kept)
    )


def _follow_ties(inputs: Sequence[Moves]) -> Followed:
    owner = inputs[0]
    claimed = _tie_claims(owner)
    records = {removed: kept for removed, kept in owner.metadata.items() if removed in claimed}
    absent = [removed for removed in records if removed not in owner.keys]
    renamed = dict(owner.rename(absent)) | {key: owner.copies[key][0] for key in records if key in owner.copies}
    ties: dict[str, str] = {}
    notes: list[str] = []
    for removed, kept in records.items():
        if removed not in renamed or renamed[removed] in owner.outputs:
            continue
        places = owner.copies.get(kept, ()) or owner.made.get(kept, ())
        if not places and kept in owner.other_outputs:  # a donor has replaced the tensor
            places = (kept,)
        if places:
            ties[renamed[removed]] = places[0]
        else:
            notes.append(f"{quoted(removed)} is stored as {quoted(kept)}, so the output has neither of them")
    return Followed(ties, tuple(notes))


# diffusers and PEFT: a configuration whose fields are patterns of modules, not names.


def _pattern_claims(moves: Moves) -> frozenset[str]:
    return frozenset(moves.metadata.keys() & {"lora_adapter_metadata", "adapter_config"})


def _keep_patterns(inputs: Sequence[Moves]) -> Followed:
    owner = inputs[0]
    kept = {key: owner.metadata[key] for key in owner.metadata if key in _pattern_claims(owner)}
    fields = sorted({text for value in kept.values() for text in pattern_fields(json_of(value))})
    if not (owner.gone or owner.taken) or not fields:
        return Followed(kept)
    note = f"the metadata {listed(kept)} has patterns of names, which do not follow the tensors"
    return Followed(kept, (f"{note}: {listed(fields, _MOST_NAMED)}",))


def pattern_fields(content: object) -> list[str]:
    """Return the fields of the configuration of an adapter that hold patterns of names."""
    fields = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_pattern")
    keys = content if isinstance(content, Mapping) else {}
    return [str(key) for key, value in keys.items() if str(key).rpartition(".")[2] in fields and value]


LAYOUTS: tuple[MetadataLayout, ...] = (
    MetadataLayout("torchao", _torchao_claims, _follow_torchao, "without which torchao cannot load the tensors"),
    MetadataLayout("save_model of safetensors", _tie_claims, _follow_ties),
    MetadataLayout("diffusers", _pattern_claims, _keep_patterns, "which has the scale of the adapter"),
)
