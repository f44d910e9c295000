"""Metadata that names tensors: it follows their new names, or a note says that it does not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Protocol

from ckptkit.core.checkpoint import Entry
from ckptkit.core.text import listed, quoted
from ckptkit.plans.metadata.layouts import LAYOUTS, json_of, strings_of
from ckptkit.plans.metadata.moves import Moves, Rename, moves_of
from ckptkit.plans.plan import Plan, Step

__all__ = ["Named", "follow_metadata", "gone_names", "loss_of_metadata", "names_in", "names_in_entries"]

_MOST_NAMED = 3
_MOST_MODULES = 32  # segments of a key; a hostile key can have a million


class Named(Protocol):
    """What metadata can follow: a checkpoint, or the description of one."""

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def keys(self) -> Collection[str]: ...


def follow_metadata(plan: Plan, sources: Mapping[str, Named], rename: Rename | None = None) -> Plan:
    """Return the plan with the metadata of its first input, changed where it names tensors that have another name.

    The first of ``sources``, the inputs by their roles, owns the metadata of the output. ``rename`` gives the new names
    of names that no tensor of that input has, without those that are dropped. A note names every item that names
    tensors and does not follow them.
    """
    inputs = [
        moves_of(role, source.metadata, source.keys(), plan.steps, rename if number == 0 else None)
        for number, (role, source) in enumerate(sources.items())
    ]
    owner = inputs[0]
    result = dict(owner.metadata)
    notes: list[str] = []
    if (rename is None and owner.is_unchanged) or not any(moves.metadata for moves in inputs):
        return replace(plan, metadata=result)
    known: set[str] = set()
    for layout in LAYOUTS:
        claimed = layout.claims(owner) - known
        known |= claimed
        if not claimed and not any(layout.claims(moves) for moves in inputs):
            continue
        followed = layout.follow(inputs)
        result = {key: text for key, text in result.items() if key not in claimed} | dict(followed.metadata)
        notes += followed.notes
    gone = gone_names(owner)
    for key, text in owner.metadata.items():
        found = "" if key in known else names_in([key, text, json_of(text)], gone)
        if found:
            notes.append(f"the metadata {quoted(key)} still names {found}, which the output does not have")
    return replace(plan, metadata=result, notes=(*plan.notes, *(note for note in notes if note not in plan.notes)))


def loss_of_metadata(metadata: Mapping[str, str], keys: Collection[str]) -> str:
    """Return a clause about what is lost without the metadata of tensors with these keys, or an empty string."""
    moves = moves_of("", metadata, keys, ())
    return next((f", {layout.loss}" for layout in LAYOUTS if layout.loss and layout.claims(moves)), "")


def names_in_entries(entries: Iterable[Entry], steps: Iterable[Step], source: Named) -> list[str]:
    """Return a note for each kept entry whose value names a tensor that has another name, or is not in the output."""
    gone = gone_names(moves_of("", {}, source.keys(), steps))
    notes = []
    for entry in entries if gone else ():
        found = names_in(entry.value, gone)
        if found:
            notes.append(f"{quoted(entry.path)} still names {found}, which the output does not have")
    return notes


def names_in(value: object, gone: AbstractSet[str]) -> str:
    """Return the names in a value of JSON that are ``gone``, as a list in a text, or an empty string."""
    found = list(dict.fromkeys(text for text in strings_of(value) if text in gone)) if gone else []
    return listed(found, _MOST_NAMED) if found else ""


def gone_names(moves: Moves) -> frozenset[str]:
    """Return the keys of an input that the output does not have, and the modules of which it has no key.

    A module without a dot in its path is left out: ``model`` in a text may be an ordinary word.
    """
    kept = {module for key in moves.outputs for module in _modules(key)} if moves.gone else frozenset()
    return moves.gone.union(module for key in moves.gone for module in _modules(key) if module not in kept)


def _modules(key: str) -> Iterable[str]:
    segments = key.split(".", _MOST_MODULES)[:-1]
    return (".".join(segments[:stop]) for stop in range(2, len(segments) + 1))
