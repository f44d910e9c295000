"""Ask a live model what its own code for loading does with the found tensors; names decide about all other tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ckptkit.core.torch_types import Module

if TYPE_CHECKING:
    from ckptkit.comparison.own_code.rehearsal import Given, Outside, Rehearsal

__all__ = ["Answer", "Place", "ask_model", "is_inside"]


@dataclass(frozen=True, slots=True)
class Place:
    """What happens to a key of the model.

    ``kind`` is ``loaded`` from the one tensor of ``sources``, which can have another shape; ``computed`` from the
    tensors of ``sources``; ``filled`` by the code of the model alone; ``missing`` or ``blocked`` as torch reports it;
    or ``excused`` where nothing is loaded and torch does not report it.
    """

    kind: Literal["loaded", "computed", "filled", "missing", "blocked", "excused"]
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the modules with own code at ``paths`` did with the keys that they were given.

    ``reason`` says why they could not be asked, or is empty. ``rehearsal`` is None then, and where the code raised
    before it was through: ``refusals`` have what it said.
    """

    paths: frozenset[str] = frozenset()
    reason: str = ""
    refusals: tuple[str, ...] = ()
    rehearsal: Rehearsal | None = None
    given: frozenset[str] = frozenset()
    expected: Collection[str] = ()

    def decides(self, key: str) -> bool:
        """Return whether the model's answer counts for a key, and not its name."""
        return self.rehearsal is not None and is_inside(key, self.paths)

    def place(self, key: str) -> Place:
        """Return what the model did with one of its keys, about which it decides."""
        found = self.rehearsal
        assert found is not None  # noqa: S101 - decides() has asked for it
        filled = found.filled.get(key)
        if key in found.mismatched:
            return Place("loaded", (found.mismatched[key] or key,))
        if key in found.blocked:
            return Place("blocked")
        if key in self.missing:
            return Place("missing")
        if filled is None:
            # The code of a module makes this key for state_dict(), and only that code knows what becomes of the value.
            taken = key not in found.names and key in self.given
            nothing: Place = Place("missing" if found.refused else "excused")
            return Place("loaded", (key,)) if taken else nothing
        if not filled.sources:
            return Place("filled")
        return Place("loaded" if filled.is_same else "computed", filled.sources)

    @cached_property
    def direct(self) -> frozenset[str]:
        """The keys of the model that got the given tensor of the same key, unless its shape differs."""
        found = self.rehearsal
        if found is None:
            return frozenset()
        direct = {name for name, one in found.filled.items() if one.is_same and one.sources == (name,)}
        return frozenset(direct.difference(found.mismatched, found.blocked, self.missing))

    def makes_shape(self, key: str, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of the model had this shape after it was loaded, which it did not have before."""
        return self.rehearsal is not None and self.rehearsal.shapes.get(key) == shape

    def refuses_shape(self, key: str) -> bool:
        """Return whether torch refused the shape of what would be loaded at a key."""
        return self.rehearsal is not None and key in self.rehearsal.mismatched

    def ignores(self, key: str) -> bool:
        """Return whether torch does not report a found key that nothing is loaded from."""
        return self.rehearsal is not None and not self.rehearsal.refused and key not in self.unexpected

    @cached_property
    def missing(self) -> frozenset[str]:
        """The keys that torch reports as missing, of all modules."""
        return frozenset(() if self.rehearsal is None else self.rehearsal.missing)

    @cached_property
    def unexpected(self) -> frozenset[str]:
        """The keys that torch reports as unexpected, of all modules."""
        return frozenset(() if self.rehearsal is None else self.rehearsal.unexpected)

    @cached_property
    def used(self) -> frozenset[str]:
        """The given keys that something was loaded or computed from, or that have another shape than their place.

        Tensors do not count that ``state_dict()`` of the model leaves out.
        """
        if self.rehearsal is None:
            return frozenset()
        filled = (filled for name, filled in self.rehearsal.filled.items() if name in self.expected)
        sources = (key for one in filled for key in one.sources)
        return frozenset((*sources, *self.rehearsal.mismatched.values()))


def ask_model(model: Module, paths: Sequence[str], given: Given, outside: Outside, expected: Collection[str]) -> Answer:
    """Return what the modules at ``paths``, those with own code, do with what the whole model is given.

    ``outside`` has what torch reports about all modules, by their names. ``expected`` are the keys of the model.
    """
    from ckptkit.comparison.own_code.rehearsal import Given, Outside, Untried, rehearse

    inside = frozenset(paths)
    given = Given(
        {key: info for key, info in given.tensors.items() if is_inside(key, inside)},
        [key for key in given.others if is_inside(key, inside)],
        given.versions,
    )
    reported = Outside(_outside(outside.missing, inside), _outside(outside.unexpected, inside))
    tried = rehearse(model, paths, given, reported)
    if isinstance(tried, Untried):
        return Answer(inside, tried.reason)
    if tried.raised:
        return Answer(inside, refusals=tried.refusals)
    return Answer(inside, "", tried.refusals, tried, frozenset((*given.tensors, *given.others)), expected)


def _outside(keys: Sequence[str], inside: Collection[str]) -> list[str]:
    return [key for key in keys if not is_inside(key, inside)]


def is_inside(key: str, paths: Collection[str]) -> bool:
    """Return whether a key is that of something inside one of the modules; with many modules, ``is_below`` is slow."""
    if "" in paths or key in paths:
        return True
    end = key.find(".")
    while end >= 0:
        if key[:end] in paths:
            return True
        end = key.find(".", end + 1)
    return False
