"""The tensors that rules make of a checkpoint: renamed ones as they are stored, others computed when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.torch_types import Tensor
from ckptkit.rules.model import Derivation, KeyMap

if TYPE_CHECKING:
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["MadeTensors"]


class MadeTensors:
    """The tensors of a checkpoint under their names after the rules.

    An operation reads its sources whole, with torch. The outputs of the latest one are kept, so that the sources of a
    split are read once for all its parts.
    """

    def __init__(self, checkpoint: Checkpoint, key_map: KeyMap) -> None:
        """Describe the tensors that ``key_map`` makes of ``checkpoint``; nothing is read."""
        self._checkpoint = checkpoint
        self._plain = {new: old for old, new in key_map.renamed.items()}
        self._others = key_map.copied_or_computed
        self._latest: tuple[object, tuple[Tensor, ...]] | None = None

    def origin(self, name: str) -> Derivation:
        """Return the keys and the operations that the tensor with this new name is made of."""
        old = self._plain.get(name)
        return Derivation((old,)) if old is not None else self._others[name]

    def is_renamed(self, name: str) -> bool:
        """Return whether the tensor with this new name is one of the checkpoint, under its first new name."""
        return name in self._plain

    def describe(self, name: str) -> TensorInfo:
        """Return the description of a tensor by its new name, under the keys of its sources."""
        old = self._plain.get(name)
        return self._checkpoint[old] if old is not None else self._others[name].describe(name, self._checkpoint)

    def payload(self, name: str) -> Payload:
        """Return the bytes of a tensor by its new name, which are read or computed only with the chunks."""
        old = self._plain.get(name)
        if old is not None:
            return self._checkpoint.payload(old)
        derivation = self._others[name]
        if derivation.recipe is None:
            return self._checkpoint.payload(derivation.sources[0])
        return _Computed(self, derivation.sources, derivation.recipe, self.describe(name).nbytes)

    def make(self, sources: Sequence[str], recipe: Recipe) -> Tensor:
        """Return the tensor that a recipe makes of tensors of the checkpoint."""
        from ckptkit.tensor_ops.recipes import Recipe, evaluate_recipe

        chain = tuple(sources), Recipe(recipe.inputs, recipe.operations)
        if self._latest is None or self._latest[0] != chain:
            self._latest = None  # its memory is free before the next outputs are made
            self._latest = chain, evaluate_recipe(recipe, sources, lambda at: self._checkpoint.read(sources[at]))
        return self._latest[1][recipe.part]


@dataclass(frozen=True, slots=True)
class _Computed:
    made: MadeTensors = field(repr=False)
    sources: tuple[str, ...]
    recipe: Recipe
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        from ckptkit.core.torch_bridge import TensorPayload

        yield from TensorPayload(self.made.make(self.sources, self.recipe), self.nbytes).chunks()
