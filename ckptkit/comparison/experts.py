"""Find the experts of a model that one side keeps in one tensor, and the other side in a tensor for each expert."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptkit.comparison.numbered import NUMBER, NumberedFamily, numbered_families
from ckptkit.comparison.roles import FUSED_ROLES, role_of, split_leaf, split_words, word_overlap
from ckptkit.tensor_ops.operation import Operation, Shape
from ckptkit.tensor_ops.registry import parse_operation

__all__ = ["StackedExperts", "find_stacked_experts"]

_EXPERTS = re.compile(r"expert[^./]*[./]$", re.IGNORECASE)
_GATE_UP = FUSED_ROLES["gate_up"]


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """A tensor that holds all experts, and the tensors that hold one expert each.

    Attributes:
        key: The tensor that holds all experts.
        families: The tensors of single experts; two families where gate and up are fused.
        join: The operations that make the tensor, from all keys of the first family and then of the second.
        divide: The operations that make all these keys from the tensor.
        is_in_order: Whether the bytes of the tensor are those of the parts, one after the other.
    """

    key: str
    families: tuple[NumberedFamily, ...]
    join: tuple[Operation, ...]
    divide: tuple[Operation, ...]
    is_in_order: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """The keys of the parts, in the order that the operations need."""
        return tuple(key for family in self.families for key in family.keys)

    @property
    def parts_as_stored(self) -> tuple[str, ...]:
        """The keys of the parts, in the order in which the tensor holds them: expert by expert."""
        return tuple(key for keys in zip(*(family.keys for family in self.families), strict=True) for key in keys)


def find_stacked_experts(wholes: Mapping[str, Shape], parts: Mapping[str, Shape]) -> list[StackedExperts]:
    """Return the tensors of ``wholes`` that hold the experts which ``parts`` keeps one by one.

    Both sides must number their layers alike, and must name a matrix by the same word, or by known spellings such as
    ``w1`` and ``gate_proj``. A tensor that fits several families equally is left out. Only names and shapes are read,
    and these do not show whether gate comes before up.

    Example:
        >>> apart = {f"experts.{number}.w{name}.weight": (6, 4) for number in range(8) for name in (1, 3)}
        >>> [found.key for found in find_stacked_experts({"experts.gate_up_proj": (8, 12, 4)}, apart)]
        ['experts.gate_up_proj']
    """
    if not any("expert" in key.lower() for key in parts):
        return []
    families = _families(parts)
    ways_by_key = {}
    for key, shape in wholes.items():
        if len(shape) < 2:
            continue
        numbers, place = tuple(NUMBER.findall(key)), _Place.of(key)
        fitting = families.get((numbers, shape[0], place.kind), [])
        ways_by_key[key] = _best_ways(key, shape, place, fitting)
    # A square matrix looks the same transposed, but one model has one orientation.
    orientations = {ways[0].is_in_order for ways in ways_by_key.values() if len(ways) == 1}
    found = []
    for ways in ways_by_key.values():
        if len(ways) > 1 and len(orientations) == 1 and len({way.families for way in ways}) == 1:
            found += [way for way in ways if way.is_in_order in orientations]
        elif len(ways) == 1:
            found += ways
    return _without_rivals(found)


@dataclass(frozen=True, slots=True)
class _Place:
    """What the name of a tensor says: the words of its module, the role of the module, and torch's name for it."""

    words: tuple[str, ...]
    role: str
    kind: str

    @classmethod
    def of(cls, key: str) -> _Place:
        cut = max(key.rfind("."), key.rfind("/")) + 1
        leaf = split_leaf(key[cut:])
        path, kind = (key[:cut] + leaf[0], leaf[1]) if leaf else (key, "weight")
        path = path.strip("./")
        return cls(split_words(path), role_of(path, in_layer=True)[0], kind)


_Families = dict[tuple[tuple[str, ...], int, str], list[tuple[NumberedFamily, _Place]]]


def _families(parts: Mapping[str, Shape]) -> _Families:
    """Return the families by the numbers of their layers, the number of experts, and torch's name for the tensor."""
    families: _Families = defaultdict(list)
    for family in numbered_families(parts):
        if _EXPERTS.search(family.head):
            place = _Place.of(family.head.rstrip("./") + family.tail)
            families[family.numbers, family.count, place.kind].append((family, place))
    return families


def _best_ways(
    key: str, shape: Shape, place: _Place, fitting: Sequence[tuple[NumberedFamily, _Place]]
) -> list[StackedExperts]:
    """Return the ways to make the tensor from parts with the most similar names."""
    scored: list[tuple[float, StackedExperts]] = []
    for family, other in fitting:
        if _are_one_matrix(place, other):
            ways = _ways(key, shape, (family,))
            scored += [(word_overlap(place.words, other.words), way) for way in ways]
    if place.role == "gate_up":
        gates, ups = ([item for item in fitting if item[1].role == role] for role in _GATE_UP)
        for gate, other in gates:
            for up, _ in ups:
                if gate.head == up.head and gate.shape == up.shape:
                    ways = _ways(key, shape, (gate, up))
                    scored += [(word_overlap(place.words, other.words), way) for way in ways]
    best = max((score for score, _ in scored), default=0.0)
    return [way for score, way in scored if score == best]


def _are_one_matrix(first: _Place, second: _Place) -> bool:
    if first.role or second.role:
        return first.role == second.role
    return first.words[-1:] == second.words[-1:]


def _ways(key: str, shape: Shape, families: tuple[NumberedFamily, ...]) -> list[StackedExperts]:
    """Return the ways to make a tensor of this shape, with matrices as they are or transposed."""
    experts, width, part = families[0].count, len(families), families[0].shape
    count = width * experts
    apart: Mapping[str, object] = {"unstack": {"parts": count}}
    ways = []
    if shape == (experts, width * part[0], *part[1:]):
        order = [1, 0, *range(2, len(part) + 2)]
        swap_in = [_reshape(width, experts, *part), _permute(order), _reshape(*shape)] if width > 1 else []
        swap_out = [_reshape(experts, width, *part), _permute(order), _reshape(count, *part)] if width > 1 else []
        ways.append(StackedExperts(key, families, _chain("stack", *swap_in), _chain(*swap_out, apart), True))
    if len(part) == 2 and shape == (experts, part[1], width * part[0]):
        rows, columns = part
        join = _chain("stack", _reshape(width, experts, *part), _permute([1, 3, 0, 2]), _reshape(*shape))
        divide = _chain(_reshape(experts, columns, width, rows), _permute([2, 0, 3, 1]), _reshape(count, *part), apart)
        ways.append(StackedExperts(key, families, join, divide, False))
    return ways


def _chain(*tables: Mapping[str, object] | str) -> tuple[Operation, ...]:
    return tuple(parse_operation(table) for table in tables)


def _reshape(*shape: int) -> Mapping[str, object]:
    return {"reshape": {"shape": list(shape)}}


def _permute(dims: Sequence[int]) -> Mapping[str, object]:
    return {"permute": {"dims": list(dims)}}


def _without_rivals(found: Sequence[StackedExperts]) -> list[StackedExperts]:
    """Leave out the tensors that would be made of the same parts as another tensor."""
    wanted: dict[NumberedFamily, int] = defaultdict(int)
    for one in found:
        for family in one.families:
            wanted[family] += 1
    return [one for one in found if all(wanted[family] == 1 for family in one.families)]
