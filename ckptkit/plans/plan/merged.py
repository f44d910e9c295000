"""What is known of a merged tensor only after it was merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["MergedFacts"]


@dataclass(frozen=True, slots=True)
class MergedFacts:
    """What a user should know of one merged tensor.

    ``warning`` is a sentence without the key, such as that the inputs are opposite, or empty. ``numbers`` are those
    that the method found by itself, such as the ``t`` of ``model_stock``.
    """

    key: str
    warning: str
    numbers: Mapping[str, float]
