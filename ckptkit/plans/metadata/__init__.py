"""Metadata that names tensors: it follows their new names, or a note says that it does not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

from ckptkit.core.checkpoint import Entry
from ckptkit.core.text import listed, quoted
from ckptkit.plans.metadata.layouts import LAYOUTS, json_of, strings_of
from ckptkit.plans.metadata.moves import Moves, Rename, moves_of
from ckptkit.plans.plan import Plan, Step

__all__ = ["Named", "StaleNames", "follow_metadata", "loss_of_metadata", "names_in_entries"]

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
    if not any(source.metadata for source in sources.values()):
        return replace(plan, metadata={})
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
    stale = StaleNames.of(owner)
    for key, text in owner.metadata.items():
        found = "" if key in known else stale.found_in([key, text, json_of(text)])
        if found:
            notes.append(f"the metadata {quoted(key)} {found}")
    return replace(plan, metadata=result, notes=(*plan.notes, *(note for note in notes if note not in plan.notes)))


def loss_of_metadata(metadata: Mapping[str, str], keys: Collection[str]) -> str:
    """Return a clause about what is lost without the metadata of tensors with these keys, or an empty string."""
    moves = moves_of("", metadata, keys, ())
    return next((f", {layout.loss}" for layout in LAYOUTS if layout.loss and layout.claims(moves)), "")


def names_in_entries(entries: Iterable[Entry], role: str, steps: Iterable[Step], source: Named) -> list[str]:
    """Return a note for each kept entry of an input whose value names a tensor that has no such name in the output."""
    stale = StaleNames.of(moves_of(role, {}, source.keys(), steps))
    found = ((entry.path, stale.found_in(entry.value)) for entry in entries)
    return [f"{quoted(path)} {clause}" for path, clause in found if clause]


@dataclass(frozen=True, slots=True)
class StaleNames:
    """The keys and modules of an input that the output does not have, and those that are others there.

    A module without a dot in its path is left out: ``model`` in a text may be an ordinary word.
    """

    gone: frozenset[str] = frozenset()
    taken: frozenset[str] = frozenset()

    @classmethod
    def of(cls, moves: Moves) -> Self:
        """Return the names that no longer mean what they meant in the input."""
        changed = moves.gone | moves.taken
        if not changed:
            return cls()
        same = {module for key in moves.keys if key not in changed for module in _modules(key)}
        stale = changed.union(module for key in changed for module in _modules(key) if module not in same)
        there = {name for key in moves.outputs for name in (key, *_modules(key))}
        return cls(stale - there, stale & there)

    def __bool__(self) -> bool:
        """Return whether there is such a name."""
        return bool(self.gone or self.taken)

    def found_in(self, value: object) -> str:
        """Return the end of a sentence about the names in a value of JSON, or an empty string if it has none."""
        texts = dict.fromkeys(strings_of(value)) if self else {}
        for names, what in ((self.gone, "the output does not have"), (self.taken, "is another tensor in the output")):
            found = [text for text in texts if text in names]
            if found:
                return f"still names {listed(found, _MOST_NAMED)}, which {what}"
        return ""


def _modules(key: str) -> Iterable[str]:
    segments = key.split(".", _MOST_MODULES)[:-1]
    return (".".join(segments[:stop]) for stop in range(2, len(segments) + 1))
