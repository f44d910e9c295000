"""Names of shards and of their indexes, as Hugging Face libraries and llama.cpp write them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ckptkit.core.files.places import name_of
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import listed, printable, quoted
from ckptkit.errors import FormatError
from ckptkit.formats import codes

__all__ = [
    "NumberedShards",
    "find_index",
    "group_shards",
    "index_kind",
    "index_shards",
    "is_index",
    "is_variant_index",
    "one_shard_warnings",
]

_KINDS = ("safetensors", "bin", "pt")  # an index of safetensors shards is preferred
_INDEX = re.compile(r"(?P<stem>.+)\.(?P<kind>safetensors|bin|pt)\.index(?P<variant>(?:\.[\w-]+)*)\.json")
_NUMBERED = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>(?:\.\w+)*)\.(?P<kind>safetensors|bin|pth?|gguf)"
)


@dataclass(frozen=True, slots=True)
class NumberedShards:
    """Files whose names count them, such as ``model-00001-of-00002.safetensors``.

    ``stem`` is the name before the numbers, with the variant after the numbers, and ``kind`` is the suffix. ``names``
    are sorted. ``pattern`` has a ``*`` in place of the number.
    """

    pattern: str
    stem: str
    kind: str
    count: int
    names: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Return the names that are missing: at most the first hundred of them."""
        first, last = self.pattern.split("*", 1)
        present = set(self.names)
        start = 0 if f"{first}00000{last}" in present else 1
        names = (f"{first}{number:05}{last}" for number in range(start, start + self.count))
        return tuple(name for name in names if name not in present)[:100]


def group_shards(names: Iterable[str]) -> list[NumberedShards]:
    """Return the numbered shards among the file names, one object for each stem, count and suffix."""
    found: dict[str, list[re.Match[str]]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, sorted(names))):
        pattern = f"{match['stem']}-*-of-{match['count']}{match['variant']}.{match['kind']}"
        found.setdefault(pattern, []).append(match)
    return [
        NumberedShards(
            pattern,
            matches[0]["stem"] + matches[0]["variant"],
            matches[0]["kind"],
            int(matches[0]["count"]),
            tuple(match[0] for match in matches),
        )
        for pattern, matches in found.items()
    ]


def is_index(name: str) -> bool:
    """Return whether a file of this name is an index of shards that can be read.

    A variant can be named before or after ``index``: ``model.fp16.safetensors.index.json``.
    """
    return _INDEX.fullmatch(name) is not None


def is_variant_index(name: str) -> bool:
    """Return whether the index is of a variant, such as ``model.safetensors.index.fp16.json``."""
    match = _INDEX.fullmatch(name)
    return match is not None and bool(match["variant"] or "." in match["stem"])


def index_kind(name: str) -> str:
    """Return the suffix of the shards of an index: ``safetensors`` for ``model.safetensors.index.json``."""
    match = _INDEX.fullmatch(name)
    return match["kind"] if match else ""


def index_shards(name: str) -> tuple[str, str]:
    """Return the stem and the kind that the shards of an index have, as ``NumberedShards`` gives them."""
    match = _INDEX.fullmatch(name)
    return (match["stem"] + match["variant"], match["kind"]) if match else ("", "")


def find_index(names: Iterable[str]) -> str | None:
    """Return the name of the index among the file names of a directory, or None.

    An index of safetensors shards is preferred, and an index of a variant is the last choice. Raises ``FormatError``
    where the directory has several indexes of the same rank.
    """
    ranks: dict[tuple[bool, int], list[str]] = {}
    for name in sorted(names):
        if is_index(name):
            ranks.setdefault((is_variant_index(name), _KINDS.index(index_kind(name))), []).append(name)
    if not ranks:
        return None
    found = ranks[min(ranks)]
    if len(found) > 1:
        raise FormatError(
            f"holds {len(found)} indexes: {listed(found, 4, show=printable)}", hint="give the path of one of them"
        )
    return found[0]


def one_shard_warnings(path: str) -> list[ReaderWarning]:
    """Return a warning if the name of the file says that it is one of several shards."""
    name = name_of(path)
    return [
        ReaderWarning(
            f"{quoted(name)} is one of {shards.count:,} shards, by its name: no other shard is read", codes.ONE_SHARD
        )
        for shards in group_shards([name])
        if shards.count > 1
    ]
