"""From a step of a plan to the tensor that it makes: read, operated on, cast."""

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

_KEPT = 128 << 20


@dataclass(slots=True)
class Producer:
    """Makes the tensors of a plan out of its inputs, by role.

    The outputs of one recipe are made together, and kept while others are asked for, as far as together they are small:
    of a weight and a bias that are both split in three, the bytes are read once, whatever the order.
    """

    roles: Mapping[str, Checkpoint]
    _made: dict[object, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)  # the latest last

    def payload(self, step: Step) -> Payload:
        """Return the bytes of the step's tensor, made when they are asked for.

        Raises ``PlanError`` where an input no longer holds what the plan was made from.
        """
        found = self._found(step)
        if step.recipe is not None:
            return _ComputedPayload(step.out.nbytes, lambda: self.tensor(step))
        payload = self.roles[step.sources[0].role].payload(step.sources[0].key)
        return payload if found.dtype == step.out.dtype else CastPayload(payload, found, step.out)

    def tensor(self, step: Step) -> Tensor:
        """Return the step's tensor; it may share memory with others that this maker made."""
        self._found(step)
        if step.recipe is None:
            made = self._read(step, 0)
        else:
            from ckptkit.tensor_ops.recipes import Recipe, evaluate_recipe

            # All outputs of one chain over the same sources are one piece of work.
            work = step.sources, Recipe(step.recipe.inputs, step.recipe.operations)
            outputs = self._made.pop(work, None)
            if outputs is None:
                self._make_room()
                outputs = evaluate_recipe(step.recipe, step.sources, lambda number: self._read(step, number))
            self._made[work] = outputs
            made = outputs[step.recipe.part]
        return made.to(torch_dtype(step.out.dtype))

    def _make_room(self) -> None:
        rest = _KEPT
        for work, outputs in reversed(list(self._made.items())):
            rest -= sum(tensor.nbytes for tensor in outputs)
            if rest < 0:
                del self._made[work]

    def _read(self, step: Step, number: int) -> Tensor:
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
                from ckptkit.tensor_ops.recipes import recipe_dtype, recipe_shape

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
class _ComputedPayload:
    nbytes: int
    make: Callable[[], Tensor] = field(repr=False)

    def chunks(self) -> Iterator[memoryview]:
        yield from TensorPayload(self.make(), self.nbytes).chunks()
