"""The type of a progress callback."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress"]

Progress = Callable[[int], None]
"""A function that is called with the number of bytes done since its last call."""
