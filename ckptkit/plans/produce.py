"""The tensor of a step: read from the inputs, computed by its recipe, and cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptkit.core.cast_losses import CastLoss, describe_overflow
from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.checkpoint.reading import read_tensor
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import TensorPayload, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import PlanError, RuleError
from ckptkit.plans.plan.extracted import ExtractedChange
from ckptkit.plans.plan.step import Step
from ckptkit.plans.steps import describe_step

if TYPE_CHECKING:
    from ckptkit.tensor_ops.casting import RecipeCounter
    from ckptkit.tensor_ops.operation import Rounded
    from ckptkit.values.cast_payload import CastPayload
    from ckptkit.values.workers import Workers

__all__ = ["ComputedPayload", "Producer", "overflow_error"]

_CACHE_BYTES = 128 << 20
_ALLOW_OVERFLOW = "--allow-overflow", "allow_overflow=True"  # on the command line, and in Python


@dataclass(slots=True)
class Producer:
    """Produces the tensors of a plan from its inputs, which ``roles`` maps by role.

    One evaluation of a recipe gives all its outputs, and a cache of 128 MB keeps the latest ones. So the sources of a
    split are read once for all its parts, even where the plan has other steps between the parts.

    ``losses`` has the losses of each tensor that was cast or computed, by its key, once the tensor was read to its end.
    ``extracted`` says of each weight whose change was factored how much the factors hold, by the key of the weight.
    """

    roles: Mapping[str, Checkpoint]
    losses: dict[str, CastLoss] = field(default_factory=dict)
    extracted: dict[str, ExtractedChange] = field(default_factory=dict)
    _outputs: dict[object, tuple[tuple[Tensor, ...], RecipeCounter]] = field(default_factory=dict, repr=False)
    _workers: Workers | None = field(default=None, repr=False)

    def payload(self, step: Step) -> Payload:
        """Return the bytes of the step's tensor, which are read or computed only with the chunks.

        Raises ``PlanError`` where the step does not fit the inputs.
        """
        found = describe_step(step, self.roles)
        if step.recipe is not None:
            return ComputedPayload(step.out.nbytes, lambda: self.tensor(step))
        payload = self.roles[step.sources[0].role].payload(step.sources[0].key)
        if found.dtype == step.out.dtype:
            return payload
        return self._cast(payload, TensorInfo(step.out.key, found.dtype, found.shape), step.out)

    def tensor(self, step: Step) -> Tensor:
        """Return the step's tensor; it may share memory with other tensors of this producer.

        Raises ``PlanError`` where the step does not fit the inputs.
        """
        found = self._describe(step)
        dtype = torch_dtype(step.out.dtype)
        if step.recipe is None:
            tensor = self._read(step, 0)
            return tensor if found.dtype == step.out.dtype else self._cast_tensor(tensor, found, step.out)
        from ckptkit.tensor_ops.casting import RecipeCounter
        from ckptkit.tensor_ops.recipes import Recipe, evaluate_recipe

        # The outputs of one chain over the same sources are computed together; the latest chain is the last one.
        chain = step.sources, Recipe(step.recipe.inputs, step.recipe.operations)
        evaluated = self._outputs.pop(chain, None)
        if evaluated is None:
            self._shrink_cache()
            counter = RecipeCounter()
            rounded = self._recorded(step, counter.add)
            try:
                outputs = evaluate_recipe(step.recipe, step.sources, lambda number: self._read(step, number), rounded)
            except RuleError as error:  # of the values, which the plan does not know
                raise RuleError(f"{quoted(step.sources[0].key)}: {error.reason}", hint=error.hint) from None
            evaluated = outputs, counter
        self._outputs[chain] = evaluated
        outputs, counter = evaluated
        tensor = outputs[step.recipe.part]
        loss = counter.loss(step.out.key, tensor)
        cast = tensor if tensor.dtype == dtype else self._cast_tensor(tensor, found, step.out)
        self.losses[step.out.key] = loss + self.losses[step.out.key] if cast is not tensor else loss
        return cast

    def _recorded(self, step: Step, count: Rounded) -> Rounded:
        """Return ``count``, or for an extraction a function that also records how much of the change it holds."""
        from ckptkit.tensor_ops.lora import ExtractLora

        operation = step.recipe.operations[-1] if step.recipe is not None else None
        if not isinstance(operation, ExtractLora):
            return count
        factors: list[Tensor] = []
        key = step.sources[0].key

        def record(inputs: Sequence[Tensor], before: Tensor, after: Tensor) -> None:
            count(inputs, before, after)
            factors.append(after)
            if len(factors) == operation.outputs:
                self.extracted[key] = ExtractedChange(key, *operation.norms(inputs, factors))
                factors.clear()

        return record

    def loss(self, step: Step) -> CastLoss | None:
        """Return the losses of the step's tensor, or None for a step that cannot lose a value to inf.

        A tensor that is only cast is read in bounded memory.
        """
        if step.recipe is not None:
            if not step.is_cast and not step.recipe.is_lossy:
                return None
            self.tensor(step)
        else:
            from ckptkit.values.losses import can_overflow

            found = self._describe(step)
            if not can_overflow(found.dtype, step.out.dtype):
                return None
            self._cast(self.roles[step.sources[0].role].payload(step.sources[0].key), found, step.out).find_losses()
        return self.losses[step.out.key]

    def _cast(self, payload: Payload, found: TensorInfo, out: TensorInfo) -> CastPayload:
        from ckptkit.values.cast_payload import CastPayload
        from ckptkit.values.workers import Workers

        if self._workers is None:
            self._workers = Workers()
        return CastPayload(payload, found, out, self.losses, self._workers)

    def _cast_tensor(self, tensor: Tensor, found: TensorInfo, out: TensorInfo) -> Tensor:
        payload = self._cast(TensorPayload(tensor, found.nbytes), found, out)
        return read_tensor(out, lambda _: payload)

    def close(self) -> None:
        """End the threads that cast."""
        if self._workers is not None:
            self._workers.close()

    def _shrink_cache(self) -> None:
        rest = _CACHE_BYTES
        for chain, (outputs, _) in reversed(list(self._outputs.items())):
            rest -= sum(tensor.nbytes for tensor in outputs)
            if rest < 0:
                del self._outputs[chain]

    def _read(self, step: Step, number: int) -> Tensor:
        source = step.sources[number]
        return self.roles[source.role].read(source.key)

    def _describe(self, step: Step) -> TensorInfo:
        """Return the description of the tensor before the last cast, under the key of the output."""
        found = describe_step(step, self.roles)
        return TensorInfo(step.out.key, found.dtype, found.shape)


@dataclass(frozen=True, slots=True)
class ComputedPayload:
    nbytes: int
    compute: Callable[[], Tensor] = field(repr=False)

    def chunks(self) -> Iterator[memoryview]:
        yield from TensorPayload(self.compute(), self.nbytes).chunks()


def overflow_error(losses: Sequence[CastLoss], hint: str = "", path: str | None = None) -> PlanError:
    """Return the error for values that the new dtype cannot hold; ``hint`` names a dtype that holds the values."""
    ways = [hint] if hint else []
    if all(loss.is_mask and loss.becomes_inf for loss in losses):
        ways, result = [], "writes -inf, which masks as well"
    else:
        result = "writes the output anyway"
    on_command_line, in_python = ("; ".join([*ways, f"{name} {result}"]) for name in _ALLOW_OVERFLOW)
    return PlanError(describe_overflow(losses), hint=on_command_line, call=in_python, path=path)
