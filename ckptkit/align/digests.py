"""Digests of tensors, and the pairs of tensors that equal bytes decide."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ckptkit.comparison.roles import split_leaf
from ckptkit.core.checkpoint import Checkpoint, part_of
from ckptkit.core.progress import Progress
from ckptkit.digests import digests_by_key
from ckptkit.digests.hashing import hash_payloads

__all__ = ["Digests", "Places", "read_digests"]

_MAX_SEGMENTS = 64  # a hostile key can have a million
_BEGIN = 1 << 16  # bytes of a tensor that show one repeated value; a multiple of the size of every dtype


@dataclass(frozen=True)
class Digests:
    """A digest of every tensor that was read, by key, for both sides; empty if nothing was read.

    ``constant`` has the digests of tensors that begin with one repeated value, such as zeros.
    """

    expected: Mapping[str, str] = field(default_factory=dict)
    found: Mapping[str, str] = field(default_factory=dict)
    constant: Container[str] = frozenset()
    sides: tuple[Checkpoint, Checkpoint] | None = None

    @cached_property
    def _sets(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset(self.expected.values()), frozenset(self.found.values())

    def are_equal(self, expected: str, found: str) -> bool | None:
        """Return whether two tensors have equal bytes; None if one of them was not read."""
        if expected not in self.expected or found not in self.found:
            return None
        return self.expected[expected] == self.found[found]

    def decided_pairs(self) -> dict[str, str]:
        """Return the found key of each expected key that equal bytes decide.

        First, the bytes of two tensors are equal, and no third tensor has them. Then tensors with bytes that several
        have, such as zeros, are paired if they are equal and at the same place beside decided tensors.
        """
        expected, found = (_keys_by_digest(digests) for digests in (self.expected, self.found))
        pairs = {
            keys[0]: found[digest][0]
            for digest, keys in expected.items()
            if len(keys) == 1 and len(found.get(digest, ())) == 1
        }
        if len(pairs) < len(self.expected):
            pairs |= self._pairs_beside(pairs)
        return pairs

    def are_joined(self, expected: tuple[str, ...], found: tuple[str, ...]) -> bool | None:
        """Return whether several tensors have the bytes of several others, one after the other; None if not read.

        The tensors are read again, once for each question.
        """
        if self.sides is None:
            return None
        if (expected, found) not in self._joined:
            infos = [[side[key] for key in keys] for side, keys in zip(self.sides, (expected, found), strict=True)]
            sizes = [sum(info.nbytes for info in infos_of_side) for infos_of_side in infos]
            if len({(info.dtype, info.kind) for side in infos for info in side}) > 1 or infos[0][0].kind != "dense":
                return None
            self._joined[expected, found] = sizes[0] == sizes[1] and (
                hash_payloads(map(self.sides[0].payload, expected)) == hash_payloads(map(self.sides[1].payload, found))
            )
        return self._joined[expected, found]

    @cached_property
    def _joined(self) -> dict[tuple[tuple[str, ...], tuple[str, ...]], bool]:
        return {}

    def contradict(self, expected: str, found: str) -> bool:
        """Return whether bytes say that two tensors do not belong together, because another tensor has the bytes."""
        if expected == found or self.are_equal(expected, found) is not False:
            return False
        return any(
            own[key] in others and own[key] not in self.constant
            for own, key, others in zip(
                (self.expected, self.found), (expected, found), reversed(self._sets), strict=True
            )
        )

    def _pairs_beside(self, pairs: Mapping[str, str]) -> dict[str, str]:
        places = Places.of(pairs)
        used = set(pairs.values())
        leaves: dict[str, list[str]] = defaultdict(list)  # module -> open found keys
        for key in self.found:
            if key not in used:
                leaves[_module_of(key)[0]].append(key)
        options: dict[str, str] = {}
        for key in self.expected:
            if key in pairs:
                continue
            given = places.found_key(key)
            if given is None or given in used or self.are_equal(key, given) is not True:
                module, kind = _module_of(key)
                given = next(
                    (
                        other
                        for other in leaves.get(places.modules.get(module, "\0"), ())
                        if _module_of(other)[1] == kind and self.are_equal(key, other)
                    ),
                    None,
                )
            if given is not None:
                options[key] = given
        takers = defaultdict(list)
        for key, given in options.items():
            takers[given].append(key)
        return {keys[0]: given for given, keys in takers.items() if len(keys) == 1}


@dataclass(frozen=True, slots=True)
class Places:
    """Where decided pairs put modules, and the layers and blocks around them; only what has one place is listed."""

    modules: Mapping[str, str]
    heads: Mapping[str, str]

    @classmethod
    def of(cls, pairs: Mapping[str, str]) -> Places:
        """Return the places that pairs of an expected and a found key show."""
        modules, heads = set(), set()
        for expected, found in pairs.items():
            modules.add((_module_of(expected)[0], _module_of(found)[0]))
            heads.add(_heads(expected, found))
        return cls(_one_to_one(modules), _one_to_one(heads))

    def found_key(self, expected: str) -> str | None:
        """Return the found key at the place of an expected key, by the longest beginning with a known place."""
        for at in sorted(_ends(expected), reverse=True):
            if expected[:at] in self.heads:
                return self.heads[expected[:at]] + expected[at:]
        return None

    def found_head(self, expected: str) -> str | None:
        """Return what the found key must begin with: the place of the longest known beginning of an expected key."""
        at = max((at for at in _ends(expected) if expected[:at] in self.heads), default=None)
        return None if at is None else self.heads[expected[:at]]


def _one_to_one(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    wanted, given = defaultdict(set), defaultdict(set)
    for expected, found in pairs:
        wanted[expected].add(found)
        given[found].add(expected)
    return {
        expected: next(iter(founds))
        for expected, founds in wanted.items()
        if len(founds) == 1 and len(given[next(iter(founds))]) == 1
    }


def _module_of(key: str) -> tuple[str, str]:
    """Return the path of a tensor's module, and torch's name for the tensor."""
    cut = max(key.rfind("."), key.rfind("/")) + 1
    leaf = split_leaf(key[cut:])
    return (key[:cut] + leaf[0], leaf[1]) if leaf else (key, "")


def _heads(expected: str, found: str) -> tuple[str, str]:
    """Return what two keys begin with, before the segments at their end that are equal."""
    ours, theirs = expected.split("."), found.split(".")
    common = 0
    for left, right in zip(reversed(ours[-_MAX_SEGMENTS:]), reversed(theirs[-_MAX_SEGMENTS:]), strict=False):
        if left != right:
            break
        common += len(left) + 1
    if not common:
        return expected, found
    return expected[: max(len(expected) - common + 1, 0)], found[: max(len(found) - common + 1, 0)]


def _ends(key: str) -> Iterator[int]:
    """Yield the lengths of the beginnings of a key that end with a dot, and 0."""
    at = 0
    for _ in range(_MAX_SEGMENTS):
        yield at
        at = key.find(".", at) + 1
        if not at:
            return


def _keys_by_digest(digests: Mapping[str, str]) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = defaultdict(list)
    for key, digest in digests.items():
        keys[digest].append(key)
    return keys


def read_digests(expected: Checkpoint, found: Checkpoint, progress: Progress | None = None) -> Digests:
    """Return the digests of the tensors with a dtype and shape that both sides have; tensors are read in pieces.

    Raises ``FormatError`` if bytes cannot be read, and ``PlanError`` if a side has no bytes.
    """
    dense = [[info for info in side.values() if info.kind == "dense" and info.elements] for side in (expected, found)]
    kinds = [{(info.dtype, info.shape) for info in infos} for infos in dense]
    shared = kinds[0] & kinds[1]
    digests = [
        digests_by_key(side, [info.key for info in infos if (info.dtype, info.shape) in shared], progress=progress)
        for side, infos in zip((expected, found), dense, strict=True)
    ]
    places = {digest: (found, key) for key, digest in digests[1].items()}
    places |= {digest: (expected, key) for key, digest in digests[0].items()}
    return Digests(digests[0], digests[1], _Constant(places), (expected, found))


class _Constant(Container[str]):
    """The digests of tensors that begin with one repeated value, such as zeros; a tensor is read at its question."""

    def __init__(self, places: Mapping[str, tuple[Checkpoint, str]]) -> None:
        """Take a tensor that has each digest."""
        self._places = places
        self._known: dict[str, bool] = {}

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, str) or digest not in self._places:
            return False
        if digest not in self._known:
            side, key = self._places[digest]
            info = side[key]
            begin = part_of(side.payload(key), 0, min(info.nbytes, _BEGIN))
            data = b"".join(map(bytes, begin.chunks()))
            size = max(info.nbytes // info.elements, 1)
            self._known[digest] = data[:size] == data[-size:] and data == data[:size] * (len(data) // size)
        return self._known[digest]
