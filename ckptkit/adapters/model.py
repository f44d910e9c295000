"""Descriptions of what an adapter changes in a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptkit.tensor_ops.lora import FoldLora

__all__ = ["AdapterPlan", "Fold"]


@dataclass(frozen=True, slots=True)
class Fold:
    """One weight of the base, and the factors of the adapter that fold into it.

    The inputs of ``operation`` are the weight, then ``factors`` in order. ``replaced_by`` names the tensor of the
    adapter that replaces the weight before the fold, or is empty.
    """

    key: str
    factors: tuple[str, ...]
    operation: FoldLora
    replaced_by: str = ""


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The changes of an adapter to the base: folds, and replacements (base key → adapter key)."""

    folds: tuple[Fold, ...]
    replacements: Mapping[str, str] = field(default_factory=dict)
