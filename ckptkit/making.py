"""From a step of a plan to the tensor that it makes: read, operated on, cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptkit.errors import PlanError, RuleError
from ckptkit.plan import Step
from ckptkit.tensors import DTYPES, Checkpoint, Payload, TensorInfo
from ckptkit.text import quoted
from ckptkit.torch_bridge import Cast, Live

if TYPE_CHECKING:
    import torch

__all__ = ["Maker"]


@dataclass(slots=True)
class Maker:
    """Makes the tensors of a plan out of its inputs, by role.

    The outputs of one recipe are made together, and kept until another recipe is asked for: of a tensor that is split
    in three, the bytes are read once.
    """

    roles: Mapping[str, Checkpoint]
    _made: tuple[object, tuple[torch.Tensor, ...]] | None = field(default=None, repr=False)

    def payload(self, step: Step) -> Payload:
        """Return the bytes of the step's tensor, made when they are asked for.

        Raises ``PlanError`` where an input no longer holds what the plan was made from.
        """
        found = self._found(step)
        if step.recipe is not None:
            return _Cooked(step.out.nbytes, lambda: self.tensor(step))
        payload = self.roles[step.sources[0].role].payload(step.sources[0].key)
        return payload if found.dtype == step.out.dtype else Cast(payload, found, step.out)

    def tensor(self, step: Step) -> torch.Tensor:
        """Return the step's tensor; it may share memory with others that this maker made."""
        import torch

        self._found(step)
        if step.recipe is None:
            made = self._read(step, 0)
        else:
            from ckptkit.recipes import Recipe, cook

            # All outputs of one chain over the same sources are one piece of work.
            work = step.sources, Recipe(step.recipe.inputs, step.recipe.operations)
            if self._made is None or self._made[0] != work:
                self._made = None
                self._made = work, cook(step.recipe, lambda number: self._read(step, number))
            made = self._made[1][step.recipe.part]
        dtype: torch.dtype = getattr(torch, DTYPES[step.out.dtype].torch_name)
        return made.to(dtype)

    def _read(self, step: Step, number: int) -> torch.Tensor:
        source = step.sources[number]
        return self.roles[source.role].read(source.key)

    def _found(self, step: Step) -> TensorInfo:
        """Return the tensor before the last cast; raises ``PlanError`` where it is not what was planned."""
        infos = []
        for source in step.sources:
            checkpoint = self.roles[source.role]
            if source.key not in checkpoint:
                raise PlanError(f"{quoted(source.key)} is no longer in the {source.role}", path=checkpoint.path)
            infos.append(checkpoint[source.key])
        shape, dtype = infos[0].shape, infos[0].dtype
        try:
            if step.recipe is not None:
                from ckptkit.recipes import recipe_dtype, recipe_shape

                shape = recipe_shape(step.recipe, [info.shape for info in infos])
                dtype = recipe_dtype(step.recipe, [info.dtype for info in infos])
            same = shape == step.out.shape and (dtype == step.out.dtype or step.operation.endswith("cast"))
        except RuleError:
            same = False
        if not same:
            path = self.roles[step.sources[0].role].path
            raise PlanError(f"{quoted(step.sources[0].key)} is not what the plan was made from", path=path)
        return TensorInfo(step.out.key, dtype, shape)


@dataclass(frozen=True, slots=True)
class _Cooked:
    nbytes: int
    make: Callable[[], torch.Tensor] = field(repr=False)

    def chunks(self) -> Iterator[memoryview]:
        yield from Live(self.make(), self.nbytes).chunks()
