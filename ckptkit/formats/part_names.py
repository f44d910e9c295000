"""Recognise file names that say that a file holds a part of a model, such as ``mp_rank_01_model_states.pt``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.places import absolute, folder_at, parent_of, split
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import listed, plural, printable
from ckptkit.errors import PathError
from ckptkit.formats import codes
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["PartName", "part_name", "part_warnings", "siblings_of"]


class PartName(NamedTuple):
    """The number of a part, the rest of its name, and the number of all parts where the name states it."""

    number: int
    family: tuple[str, str]
    total: int | None = None


_OF = lazy_pattern(r"(?P<head>.*?)(?P<number>\d{1,5})[-_]of[-_](?P<count>\d{1,5})(?P<tail>\.\w+)?", re.IGNORECASE)
_WORLD = lazy_pattern(
    r"(?P<head>.*world_size_(?P<count>\d{1,5})_rank_)(?P<number>\d{1,5})(?P<tail>\.\w+)"
)  # FSDP, verl
_WORD = lazy_pattern(
    r"(?P<head>(?:.*[^a-z])?(?:rank|mp|tp|pp|part|shard|slice|gpu|worker|process)[-_.]?)(?P<number>\d{1,5})"
    r"(?P<tail>(?:[^\d].*)?)",
    re.IGNORECASE,
)
_DOTTED = lazy_pattern(r"(?P<head>.+\.)(?P<number>\d{2,3})(?P<tail>\.(?:pth|pt|bin|ckpt|th|pkl|safetensors))")
_LAYER = lazy_pattern(r"(?P<head>layer_\d+-model_)(?P<number>\d+)(?P<tail>-model_states\.pt)")
# The folder of a rank. Any other folder, such as lora_rank_1, can be one of several experiments.
_FOLDER = lazy_pattern(
    r"(?:(?:mp|tp|pp|ep|dp|rank|part|shard|slice|gpu|worker|process|of|\d++)[-_.]?+)++", re.IGNORECASE
)
# A shard of these names holds whole tensors. Each rank of ZeRO-3 has a file; the reader of ZeRO says what is missing.
_OTHERS = lazy_pattern(r".*-\d{5}-of-\d{5}\.\w+|.*zero_pp_rank_.*|(optim|extra_state)_.*|(rng_state|random_states)_.*")
_MOST_LISTED = 100_000


def part_name(name: str) -> PartName | None:
    """Return what a name says about a part of a model, or None if it says nothing."""
    if not any(map(str.isdecimal, name)) or _OTHERS.fullmatch(name):
        return None
    for pattern in (_LAYER, _OF, _WORLD, _WORD, _DOTTED):
        if (match := pattern.fullmatch(name)) is not None:
            found = match.groupdict()
            count = int(found["count"]) if found.get("count") else None
            return PartName(int(found["number"]), (found["head"], found["tail"] or ""), count)
    return None


def siblings_of(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that differ from ``name`` only in the number of the part, in the order of the numbers.

    The numbers of parts count from 0 or 1. Names such as ``rank_8`` and ``rank_16`` are of something else.
    """
    own = part_name(name)
    if own is None:
        return []
    head, tail = own.family
    similar = (other for other in names if other.startswith(head) and other.endswith(tail))
    found = {part.number: other for other in similar if (part := part_name(other)) and part.family == own.family}
    numbers = sorted({*found, own.number})
    if numbers[0] > 1 or numbers[-1] >= 2 * len(numbers):
        return []
    return [found[number] for number in numbers if number != own.number]


def part_warnings(path: str, checkpoint: Checkpoint, *, is_folder: bool = False) -> Iterator[ReaderWarning]:
    """Yield a warning if the name of a file, or of its directory, says that the file holds a part of a model.

    ``checkpoint`` is what the file holds. ``is_folder`` says that ``path`` is a directory. A name that the reader has
    explained already gives no warning.
    """
    if any(getattr(text, "code", None) is codes.PART_OF_SEVERAL for text in checkpoint.warnings):
        return
    whole = absolute(path)
    places = [(whole, True)] if is_folder else [(whole, False), (parent_of(whole), True)]
    for place, is_directory in places:
        directory, name = split(place)
        own = part_name(name)
        if own is None or (is_directory and not _FOLDER.fullmatch(name)):
            continue
        try:
            names = folder_at(directory).names(_MOST_LISTED).all
        except PathError:
            names = ()
        others = siblings_of(name, names)
        if others or (own.total or 0) > 1:
            count = max(len(others) + 1, own.total or 0)
            beside = f", beside {listed(others, 2, show=printable)}" if others else ""
            text = (
                f"{printable(name)} is one of {plural(count, 'part')} by its name{beside}: "
                "its tensors may be slices, or a part of the layers"
            )
            yield ReaderWarning(text, codes.PART_OF_SEVERAL)
            return
