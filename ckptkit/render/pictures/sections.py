"""The sections of a model by the names of its tensors: few, and none that hides nearly everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ckptkit.core.coverage import split_keys

__all__ = ["OTHERS", "WHOLE", "numbered", "range_name", "sections_of"]

OTHERS: Final = "(others)"  # the name of a section of many small ones
WHOLE: Final = "in all"
_MOST: Final = 12
_LONGEST_NUMBER: Final = 9
_HEAVY: Final = 0.4  # a section with more than this share is divided


def sections_of(weights: Mapping[str, float], most: int = _MOST) -> list[tuple[str, list[str]]]:
    """Return the sections with their keys, in the order of the keys; ``weights`` has the weight of each key.

    A section is a module. The heaviest are divided, but never a list of layers. The lightest of more than ``most``
    sections are one section named ``OTHERS``, the last; where they outweigh the others, all keys are one section.
    """
    if not weights:
        return []
    total = sum(weights.values())
    sections = split_keys("", list(weights))
    done: set[str] = set()
    while True:
        sizes = {name: sum(map(weights.__getitem__, keys)) for name, keys in sections if name not in done}
        heavy = [name for name in sizes if sizes[name] > _HEAVY * total or len(sections) == 1]
        if not heavy:
            return _bounded(sections, weights, most)
        chosen = max(heavy, key=sizes.__getitem__)
        at = next(place for place, (name, _) in enumerate(sections) if name == chosen)
        parts = split_keys(*sections[at])
        # Names that begin with a dot can have parts that look like the whole.
        if parts[0][0] == chosen or _is_list(chosen, parts) or len(sections) + len(parts) - 1 > most:
            done.add(chosen)
        else:
            sections[at : at + 1] = parts
            done |= {name for name, keys in parts if keys == [name]}


def numbered(name: str) -> tuple[str, int] | None:
    """Return what is before the number at the end of the name of a layer, and the number; None for other names."""
    stack, dot, end = name.rpartition(".")
    is_number = bool(dot) and len(end) < _LONGEST_NUMBER and end.isascii() and end.isdigit()
    return (stack, int(end)) if is_number else None


def range_name(stack: str, first: int, last: int) -> str:
    """Return one name for layers that follow each other, as tables spell it."""
    return f"{stack}.{first}" if first == last else f"{stack}.{{{first}..{last}}}"


def _is_list(name: str, parts: list[tuple[str, list[str]]]) -> bool:
    """Return whether these are layers, or tensors of one module: both are one thing to a reader."""
    ends = [part[len(name) + 1 :] for part, _ in parts]
    return all(map(str.isdigit, ends)) or all(keys == [part] for part, keys in parts)


def _bounded(
    sections: list[tuple[str, list[str]]], weights: Mapping[str, float], most: int
) -> list[tuple[str, list[str]]]:
    if len(sections) <= most:
        return sections
    sizes = {name: sum(map(weights.__getitem__, keys)) for name, keys in sections}
    kept = set(sorted(sizes, key=lambda name: -sizes[name])[: most - 1])
    others = [key for name, keys in sections if name not in kept for key in keys]
    if sum(map(sizes.__getitem__, kept)) < sum(map(weights.__getitem__, others)):
        return [(WHOLE, list(weights))]  # a few of many equal sections say nothing
    return [*(section for section in sections if section[0] in kept), (OTHERS, others)]
