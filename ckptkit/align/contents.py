"""Tensors of two checkpoints that have equal bytes, found by their digests."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from ckptkit.core.checkpoint import Checkpoint, TensorInfo

__all__ = ["Contents", "Progress", "digests_of"]

Progress = Callable[[int], None]
_Digests = Mapping[str, Hashable]


@dataclass(frozen=True, slots=True)
class Contents:
    """A digest of every tensor that was read, by key; none at all where nothing was."""

    expected: _Digests = field(default_factory=dict)
    found: _Digests = field(default_factory=dict)

    def equal(self, expected: str, found: str) -> bool | None:
        """Return whether two tensors have equal bytes; None where they were not read."""
        if expected not in self.expected or found not in self.found:
            return None
        return self.expected[expected] == self.found[found]

    def alone(self) -> Iterable[tuple[str, str]]:
        """Yield the keys of two tensors that are equal, and like no other: zeros and ones say nothing."""
        sides: list[dict[Hashable, list[str]]] = []
        for digests in (self.expected, self.found):
            keys = defaultdict(list)
            for key, digest in digests.items():
                keys[digest].append(key)
            sides.append(keys)
        for digest, keys_there in sides[0].items():
            others = sides[1].get(digest, [])
            if len(keys_there) == len(others) == 1:
                yield keys_there[0], others[0]


def digests_of(expected: Checkpoint, found: Checkpoint, progress: Progress | None = None) -> Contents:
    """Return the contents of every tensor whose dtype and shape both sides have, read in pieces.

    Raises ``FormatError`` where the bytes cannot be read.
    """
    kinds = [{_kind(info) for info in side.values() if info.kind == "dense"} for side in (expected, found)]
    shared = kinds[0] & kinds[1]
    report = progress or (lambda _: None)
    return Contents(_digests(expected, shared, report), _digests(found, shared, report))


def _kind(info: TensorInfo) -> Hashable:
    return info.dtype, info.shape


def _digests(side: Checkpoint, kinds: set[Hashable], progress: Progress) -> _Digests:
    found: dict[str, Hashable] = {}
    for key, info in side.items():
        if info.kind != "dense" or _kind(info) not in kinds or not info.elements:
            continue
        digest = hashlib.sha256()
        for chunk in side.payload(key).chunks():
            digest.update(chunk)
            progress(len(chunk))
        found[key] = (_kind(info), digest.digest())
    return found
