"""What a checkpoint tells about one quantised weight, beside the headers of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckptkit.core.checkpoint import Affine, TensorInfo

__all__ = ["Known", "integers_of"]


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


def integers_of(known: Known, role: str) -> tuple[int, ...]:
    """Return the values of a part that holds integers, such as the sizes of a shape."""
    width = known.parts[role].nbytes // max(known.parts[role].elements, 1)
    data = known.read(role)
    starts = range(0, len(data), max(width, 1))
    return tuple(int.from_bytes(data[start : start + width], "little", signed=True) for start in starts)
