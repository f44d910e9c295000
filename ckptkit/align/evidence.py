"""Compare two modules by the shapes of their tensors in every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import add

from ckptkit.align.modules import Index, LayeredModule, ModuleMember
from ckptkit.tensor_ops.operation import Operation, Shape
from ckptkit.tensor_ops.suggestions import suggest

__all__ = ["COUNTERS", "ModuleMatch", "TensorLink", "best_shift", "index_shift", "match_modules"]

COUNTERS = frozenset({"num_batches_tracked"})


@dataclass(frozen=True, slots=True)
class TensorLink:
    """The members of found modules that become members of expected modules, in every layer."""

    expected: tuple[ModuleMember, ...]
    found: tuple[ModuleMember, ...]
    operations: tuple[Operation, ...] = ()
    note: str = ""  # the reason for the operations


@dataclass(frozen=True, slots=True)
class ModuleMatch:
    """How a found module becomes an expected module, tensor by tensor.

    ``shift`` is added to the found indices. ``is_complete`` says whether both modules have the same tensors in the same
    layers.
    """

    shift: Index
    links: tuple[TensorLink, ...] = field(default=())
    is_complete: bool = True

    def index_pairs(self, link: TensorLink) -> Iterator[tuple[Index, Index]]:
        """Yield the expected and the found index of each layer that both sides have."""
        expected, found = link.expected[0].tensors, link.found[0].tensors
        if not any(self.shift):
            yield from ((index, index) for index in found if index in expected)
            return
        for index in found:
            shifted = tuple(map(add, index, self.shift))
            if shifted in expected:
                yield shifted, index


def best_shift(expected: Iterable[int], found: Iterable[int]) -> int:
    """Return the number to add to the found indices: the difference of the first indices if more match, else 0."""
    wanted, given = set(expected), set(found)
    by = min(wanted) - min(given)
    return by if len({number + by for number in given} & wanted) > len(given & wanted) else 0


def index_shift(expected: frozenset[Index], found: frozenset[Index], layer_shift: int | None) -> Index:
    """Return the number to add to each found index; the first number is ``layer_shift`` if that is known."""
    axes = len(next(iter(found)))
    shifts = [best_shift((index[axis] for index in expected), (index[axis] for index in found)) for axis in range(axes)]
    if axes and layer_shift is not None:
        shifts[0] = layer_shift
    return tuple(shifts)


def match_modules(
    expected: LayeredModule, found: LayeredModule, layer_shift: int | None = None, *, partly: bool = False
) -> ModuleMatch | None:
    """Return the match of the tensors of two modules; None if the number of indices, a shape or all names differ.

    With ``partly``, tensors with different shapes are left out.
    """
    if len(expected.path.texts) != len(found.path.texts):
        return None
    kinds = _common_kinds(expected, found)
    if not kinds:
        return None
    shift = index_shift(expected.indices, found.indices, layer_shift)
    links = []
    is_complete = expected.members.keys() - COUNTERS == found.members.keys() - COUNTERS
    for expected_kind, found_kind in kinds:
        wanted, given = expected.members[expected_kind], found.members[found_kind]
        link = TensorLink((wanted,), (given,))
        pairs = list(ModuleMatch(shift).index_pairs(link))
        shapes = [(given.tensors[index].shape, wanted.tensors[shifted].shape) for shifted, index in pairs]
        operations = _operations(shapes)
        if not shapes or operations is None:
            if partly:
                continue
            return None
        is_complete &= len(pairs) == len(wanted.tensors) == len(given.tensors)
        note = f"{operations[0].name}d, because of its shape" if operations else ""
        links.append(TensorLink((wanted,), (given,), operations, note))
    return ModuleMatch(shift, tuple(links), is_complete) if links else None


def _common_kinds(expected: LayeredModule, found: LayeredModule) -> list[tuple[str, str]]:
    """Return the kinds of tensors that both modules have, each with the name on both sides."""
    shared = [(kind, kind) for kind in expected.members if kind in found.members]
    if shared:
        return shared
    # One side may have a bare table where the other has the weight of a module.
    wanted, given = expected.members.keys(), found.members.keys()
    if {*wanted, *given} == {"", "weight"} and len(wanted) == len(given) == 1:
        return [(next(iter(wanted)), next(iter(given)))]
    return []


def _operations(shapes: Sequence[tuple[Shape, Shape]]) -> tuple[Operation, ...] | None:
    """Return the operations that turn the first shape of every pair into the second; None if no operation does.

    The result is empty for equal shapes, else it has one operation.
    """
    if all(found == expected for found, expected in shapes):
        return ()
    for name in ("transpose", "permute"):
        operations = {suggest(name, found, expected, "") for found, expected in set(shapes)}
        if len(operations) == 1 and None not in operations:
            return tuple(operation for operation in operations if operation is not None)
    return None
