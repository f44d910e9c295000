"""How much of a change the factors of an extracted adapter hold."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ExtractedChange"]


@dataclass(frozen=True, slots=True)
class ExtractedChange:
    """How much of the change of one weight its extracted factors hold.

    ``change`` is the norm of the change, and ``left_out`` the norm of what the factors leave out of it.
    """

    key: str
    change: float
    left_out: float
