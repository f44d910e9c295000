"""Where the tensors of one input are in an output, for what names them in metadata."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from ckptkit.core.text import shared_start
from ckptkit.plans.plan.step import Step

__all__ = ["Followed", "Moves", "Rename", "moves_of", "rename_like", "renamed_alike"]

Rename: TypeAlias = Callable[[Collection[str]], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Moves:
    """The names of one input before and after: its ``metadata`` and ``keys``, and the new keys of each key.

    ``copies`` has the keys that are copied or cast, ``made`` those that an operation reads. ``outputs`` has every key
    of the output, and ``other_outputs`` those that come from other inputs only. ``rename`` gives the new names of names
    that no tensor of the input has; it leaves out those that are dropped.
    """

    metadata: Mapping[str, str]
    keys: Collection[str]
    copies: Mapping[str, tuple[str, ...]]
    made: Mapping[str, tuple[str, ...]]
    outputs: Collection[str]
    other_outputs: tuple[str, ...]
    rename: Rename

    @property
    def gone(self) -> frozenset[str]:
        """Every key of the input that the output does not have under this name."""
        return frozenset(key for key in self.keys if key not in self.outputs)

    @property
    def taken(self) -> frozenset[str]:
        """Every key of the input that another tensor of the input has in the output, as where two names are swapped."""
        others = frozenset(self.other_outputs)
        return frozenset(
            key
            for key in self.keys
            if key in self.outputs
            and key not in others
            and key not in (*self.copies.get(key, ()), *self.made.get(key, ()))
        )

    @property
    def is_unchanged(self) -> bool:
        """Whether the output has exactly the tensors of the input, each under its own key."""
        is_same = all(new == (key,) for key, new in self.copies.items())
        return is_same and not self.made and len(self.copies) == len(self.keys) == len(self.outputs)


@dataclass(frozen=True, slots=True)
class Followed:
    """The metadata of an output, and sentences about what did not follow the tensors."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def moves_of(
    role: str,
    metadata: Mapping[str, str],
    keys: Collection[str],
    steps: Iterable[Step],
    rename: Rename | None = None,
) -> Moves:
    """Return where the tensors of the input ``role`` are in the output of ``steps``.

    Without ``rename``, other names change their beginning as the tensors do: see ``rename_like``.
    """
    copies: dict[str, list[str]] = {}
    made: dict[str, list[str]] = {}
    outputs: dict[str, None] = {}
    others: list[str] = []
    for step in steps:
        outputs[step.out.key] = None
        own = [source.key for source in step.sources if source.role == role]
        if not own:
            others.append(step.out.key)
        for key in dict.fromkeys(own):
            (copies if step.recipe is None else made).setdefault(key, []).append(step.out.key)
    frozen = {key: tuple(new) for key, new in copies.items()}
    given = rename or (lambda names: renamed_alike(names, {key: new[0] for key, new in frozen.items()}))
    computed = {key: tuple(new) for key, new in made.items()}
    return Moves(metadata, keys, frozen, computed, outputs, tuple(others), given)


def rename_like(name: str, old: str, new: str) -> str:
    """Return ``name`` with its beginning changed as the beginning of ``old`` is in ``new``, or as it is.

    Example:
        >>> rename_like("head.weight", "emb.weight", "model.emb.weight")
        'model.head.weight'
        >>> rename_like("module.head.weight", "module.emb.weight", "emb.weight")
        'head.weight'
    """
    before, after = old.split("."), new.split(".")
    while before and after and before[-1] == after[-1]:
        before.pop()
        after.pop()
    segments = name.split(".")
    if segments[: len(before)] != before or len(segments) <= len(before):
        return name
    return ".".join([*after, *segments[len(before) :]])


def renamed_alike(names: Iterable[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """Return the new name of each name that no tensor has, by the tensor whose name begins like it for longest."""
    ordered = sorted(renamed)  # the key that begins alike for longest is beside the name
    new = {}
    for name in names:
        at = bisect(ordered, name)
        near = max(ordered[max(at - 1, 0) : at + 1], key=partial(shared_start, name), default=None)
        new[name] = name if near is None else rename_like(name, near, renamed[near])
    return new
