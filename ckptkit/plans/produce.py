"""The tensor of a step: read from the inputs, computed by its recipe, and cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import CastPayload, TensorPayload, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import PlanError, RuleError
from ckptkit.plans.plan import Step

__all__ = ["Producer"]

_CACHE_BYTES = 128 << 20


@dataclass(slots=True)
class Producer:
    """Produces the tensors of a plan from its inputs, which ``roles`` maps by role.

    One evaluation of a recipe gives all its outputs, and a cache of 128 MB keeps the latest ones. So the sources of a
    split are read once for all its parts, even where the plan has other steps between the parts.
    """

    roles: Mapping[str, Checkpoint]
    _outputs: dict[object, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)  # the latest is last

    def payload(self, step: Step) -> Payload:
        """Return the bytes of the step's tensor, which are read or computed only with the chunks.

        Raises ``PlanError`` where an input changed since the plan was made.
        """
        found = self._describe(step)
        if step.recipe is not None:
            return _ComputedPayload(step.out.nbytes, lambda: self.tensor(step))
        payload = self.roles[step.sources[0].role].payload(step.sources[0].key)
        return payload if found.dtype == step.out.dtype else CastPayload(payload, found, step.out)

    def tensor(self, step: Step) -> Tensor:
        """Return the step's tensor; it may share memory with other tensors of this producer.

        Raises ``PlanError`` where an input changed since the plan was made.
        """
        self._describe(step)
        if step.recipe is None:
            tensor = self._read(step, 0)
        else:
            from ckptkit.tensor_ops.recipes import Recipe, evaluate_recipe

            # The outputs of one chain over the same sources are computed together.
            chain = step.sources, Recipe(step.recipe.inputs, step.recipe.operations)
            outputs = self._outputs.pop(chain, None)
            if outputs is None:
                self._shrink_cache()
                outputs = evaluate_recipe(step.recipe, step.sources, lambda number: self._read(step, number))
            self._outputs[chain] = outputs
            tensor = outputs[step.recipe.part]
        return tensor.to(torch_dtype(step.out.dtype))

    def _shrink_cache(self) -> None:
        rest = _CACHE_BYTES
        for chain, outputs in reversed(list(self._outputs.items())):
            rest -= sum(tensor.nbytes for tensor in outputs)
            if rest < 0:
                del self._outputs[chain]

    def _read(self, step: Step, number: int) -> Tensor:
        source = step.sources[number]
        return self.roles[source.role].read(source.key)

    def _describe(self, step: Step) -> TensorInfo:
        """Return the description of the tensor before the last cast.

        Raises ``PlanError`` where the shape or the dtype differs from the plan.
        """
        infos = []
        for source in step.sources:
            checkpoint = self.roles[source.role]
            if source.key not in checkpoint:
                raise PlanError(f"{quoted(source.key)} is no longer in the {source.role}", path=checkpoint.path)
            infos.append(checkpoint[source.key])
        shape, dtype = infos[0].shape, infos[0].dtype
        try:
            if step.recipe is not None:
                from ckptkit.tensor_ops.recipes import recipe_dtype, recipe_shape

                shape = recipe_shape(step.recipe, [info.shape for info in infos])
                dtype = recipe_dtype(step.recipe, [info.dtype for info in infos])
            as_planned = shape == step.out.shape and (dtype == step.out.dtype or step.is_cast)
        except RuleError:
            as_planned = False
        if not as_planned:
            path = self.roles[step.sources[0].role].path
            raise PlanError(f"{quoted(step.sources[0].key)} has another shape or dtype than in the plan", path=path)
        return TensorInfo(step.out.key, dtype, shape)


@dataclass(frozen=True, slots=True)
class _ComputedPayload:
    nbytes: int
    compute: Callable[[], Tensor] = field(repr=False)

    def chunks(self) -> Iterator[memoryview]:
        yield from TensorPayload(self.compute(), self.nbytes).chunks()
