"""Which pictures each class of results has."""

from __future__ import annotations

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.sizes import sizes_picture

__all__ = ["show_pictures"]


def show_pictures(checkpoint: Checkpoint) -> tuple[Picture, ...]:
    """Return the size of a checkpoint by section and dtype."""
    return _some(sizes_picture(checkpoint.values()))


def _some(*pictures: Picture | None) -> tuple[Picture, ...]:
    return tuple(picture for picture in pictures if picture is not None)
