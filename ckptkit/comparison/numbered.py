"""Group keys that differ in one number: the same tensor of every expert, head or layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptkit.tensor_ops.operation import Shape

__all__ = ["NUMBER", "NumberedFamily", "numbered_families"]

NUMBER = re.compile(r"(?<![^./])(?:0|[1-9][0-9]{0,8})(?![^./])")
_MOST_NUMBERS = 16  # of one key; a hostile key can have a million


@dataclass(frozen=True, slots=True)
class NumberedFamily:
    """Tensors of one shape: ``head`` + number + ``tail``, for the numbers from 0 to ``count`` - 1."""

    head: str
    tail: str
    count: int
    shape: Shape

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, in the order of their numbers."""
        return tuple(f"{self.head}{number}{self.tail}" for number in range(self.count))

    @property
    def numbers(self) -> tuple[str, ...]:
        """The numbers in the keys that are the same in all of them, such as that of the layer."""
        return (*NUMBER.findall(self.head), *NUMBER.findall(self.tail))


def numbered_families(shapes: Mapping[str, Shape]) -> list[NumberedFamily]:
    """Return the tensors whose keys differ in one number, which counts from 0 without a gap.

    A key with several numbers can be in several families.

    Example:
        >>> [family.keys for family in numbered_families({"heads.0.weight": (2, 3), "heads.1.weight": (2, 3)})]
        [('heads.0.weight', 'heads.1.weight')]
    """
    found: dict[tuple[str, str], dict[int, Shape]] = defaultdict(dict)
    for key, shape in shapes.items():
        for match in islice(NUMBER.finditer(key), _MOST_NUMBERS):
            start, end = match.span()
            found[key[:start], key[end:]][int(key[start:end])] = shape
    return [
        NumberedFamily(head, tail, len(by_number), by_number[0])
        for (head, tail), by_number in found.items()
        if 0 in by_number and len(by_number) - 1 in by_number  # most candidates end here
        if len(set(by_number.values())) == 1 and by_number.keys() == set(range(len(by_number)))
    ]
