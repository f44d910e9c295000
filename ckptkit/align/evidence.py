"""Whether one module can be another: the same kinds of tensors, of the same shapes, layer by layer."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptkit.align.modules import Index, Member, Module
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.progress import Progress
from ckptkit.tensor_ops.operation import Operation, Shape
from ckptkit.tensor_ops.suggestions import suggest

__all__ = ["Contents", "Fit", "Link", "best_shift", "digests_of", "fit", "shift_between"]


_COUNTERS = frozenset({"num_batches_tracked"})


@dataclass(frozen=True, slots=True)
class Link:
    """Tensors of found that become one kind of tensor, or several, of what is expected."""

    expected: tuple[Member, ...]
    found: tuple[Member, ...]
    operations: tuple[Operation, ...] = ()
    note: str = ""  # what speaks for the operations


@dataclass(frozen=True, slots=True)
class Fit:
    """How one module is another: by which shift of its indices, and tensor by tensor."""

    shift: Index
    links: tuple[Link, ...] = field(default=())
    whole: bool = True  # whether both have the same kinds of tensors in the same layers

    def pairs(self, link: Link) -> Iterable[tuple[Index, Index]]:
        """Yield the indices of expected and of found that belong together, where both sides have them."""
        first, other = link.expected[0].tensors, link.found[0].tensors
        for index in other:
            moved = tuple(one + by for one, by in zip(index, self.shift, strict=True))
            if moved in first:
                yield moved, index


def best_shift(expected: Iterable[int], found: Iterable[int]) -> int:
    """Return by how much one has to count on so that most indices of found are among those expected."""
    wanted, given = set(expected), set(found)
    by = min(wanted) - min(given)
    return by if len({one + by for one in given} & wanted) > len(given & wanted) else 0


def fit(expected: Module, found: Module, layer_shift: int | None = None, *, partly: bool = False) -> Fit | None:
    """Return how ``found`` can be ``expected``, or None where a shape, a number of indices, or every kind differs.

    ``partly`` leaves out the kinds of tensors whose shapes differ.
    """
    if len(expected.path.texts) != len(found.path.texts):
        return None
    kinds = _kinds(expected, found)
    if not kinds:
        return None
    shift = shift_between(expected.indices, found.indices, layer_shift)
    links = []
    whole = expected.members.keys() - _COUNTERS == found.members.keys() - _COUNTERS
    for left, right in kinds:
        draft = Link((expected.members[left],), (found.members[right],))
        made = Fit(shift, (draft,))
        places = list(made.pairs(draft))
        shapes = [(_shape(found, right, index), _shape(expected, left, moved)) for moved, index in places]
        operations = _operations(shapes)
        if not shapes or operations is None:
            if partly:
                continue
            return None
        whole &= len(places) == len(draft.expected[0].tensors) == len(draft.found[0].tensors)
        note = f"{operations[0].name}d, which its shape asks for" if operations else ""
        links.append(Link(draft.expected, draft.found, operations, note))
    return Fit(shift, tuple(links), whole) if links else None


def _shape(module: Module, kind: str, index: Index) -> Shape:
    return module.members[kind].tensors[index].shape


def _kinds(expected: Module, found: Module) -> list[tuple[str, str]]:
    shared = [(kind, kind) for kind in expected.members if kind in found.members]
    if shared:
        return shared
    one, other = expected.members.keys(), found.members.keys()  # a bare table is what elsewhere is a module's weight
    if {*one, *other} == {"", "weight"} and len(one) == len(other) == 1:
        return [(next(iter(one)), next(iter(other)))]
    return []


def shift_between(expected: frozenset[Index], found: frozenset[Index], layer_shift: int | None) -> Index:
    """Return by how much each index has to be counted on; the first by ``layer_shift`` where that is known."""
    axes = len(next(iter(found)))
    shifts = [best_shift((one[axis] for one in expected), (one[axis] for one in found)) for axis in range(axes)]
    if axes and layer_shift is not None:
        shifts[0] = layer_shift
    return tuple(shifts)


def _operations(shapes: Sequence[tuple[Shape, Shape]]) -> tuple[Operation, ...] | None:
    """Return what turns the first shape of every pair into the second: nothing, or one operation that fits all."""
    if all(one == other for one, other in shapes):
        return ()
    for name in ("transpose", "permute"):
        found = {_operation(name, one, other) for one, other in set(shapes)}
        if len(found) == 1 and None not in found:
            return tuple(operation for operation in found if operation is not None)
    return None


def _operation(name: str, found: Shape, expected: Shape) -> Operation | None:
    return suggest(name, found, expected, "")


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
