"""The layers of an output that has others than its input."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LayerCount"]


class LayerCount(NamedTuple):
    """How many layers an input has, and which layer each layer of the output was in its own input.

    ``field`` is the name of the count in ``config.json``, or empty where it is to be found.
    """

    before: int
    order: tuple[int, ...]
    field: str = ""
