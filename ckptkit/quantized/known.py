"""What a checkpoint tells about one quantised weight, beside the headers of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ckptkit.core.checkpoint import Affine, TensorInfo

__all__ = ["Known", "integers_of", "small_part", "weights_of_groups"]

_MOST_BYTES: Final = 1 << 16  # of a part that has a shape, a number or a few lines of text


@dataclass(frozen=True, slots=True)
class Known:
    """The parts of a weight by role, the configuration and metadata of its checkpoint, and how to read a part.

    Attributes:
        key: The name of the weight.
        parts: The parts by role.
        sections: The sections about quantisation of the configuration files.
        metadata: The metadata of the files.
        read: Returns the bytes of the part with a role.
        affine: How torch itself quantised the tensor, if it did.
    """

    key: str
    parts: Mapping[str, TensorInfo]
    sections: tuple[Mapping[str, object], ...]
    metadata: Mapping[str, str]
    read: Callable[[str], bytes]
    affine: Affine | None = None

    def configured(self, *names: str) -> object:
        """Return the value of the first of these names that a section has, or None."""
        found = (section.get(name) for name in names for section in self.sections)
        return next((value for value in found if value is not None), None)


def small_part(known: Known, role: str) -> bytes:
    """Return the bytes of a part that describes a weight. Raises ``BrokenPartError`` if it is too large for that."""
    from ckptkit.values.dequantize.model import BrokenPartError

    info = known.parts[role]
    if info.nbytes > _MOST_BYTES:
        raise BrokenPartError(role, f"is {info}, which is too large to describe a weight")
    return known.read(role)


def weights_of_groups(section: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Yield what each group of a configuration of compressed-tensors says about weights."""
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights


def integers_of(known: Known, role: str) -> tuple[int, ...]:
    """Return the values of a part that holds integers, such as the sizes of a shape.

    Raises ``BrokenPartError`` as ``small_part``.
    """
    data = small_part(known, role)
    width = known.parts[role].nbytes // max(known.parts[role].elements, 1)
    starts = range(0, len(data), max(width, 1))
    return tuple(int.from_bytes(data[start : start + width], "little", signed=True) for start in starts)
