"""The tensor of a step: read from the inputs, computed by its recipe, and cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from ckptkit.core.cast_losses import CastLoss, describe_overflow
from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.checkpoint.reading import read_tensor
from ckptkit.core.checkpoint.stored import StoredBytes
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import TensorPayload, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import PlanError, RuleError
from ckptkit.plans.plan.extracted import ExtractedChange
from ckptkit.plans.plan.step import Step
from ckptkit.plans.steps import describe_step
from ckptkit.rules.model import describe_output

if TYPE_CHECKING:
    from ckptkit.digests.checked import CheckedPayload
    from ckptkit.plans.methods.limits import Group, Limits
    from ckptkit.plans.methods.operation import Merge
    from ckptkit.tensor_ops.casting import RecipeCounter
    from ckptkit.tensor_ops.dequantize import Dequantize
    from ckptkit.tensor_ops.operation import Rounded
    from ckptkit.tensor_ops.recipes import Recipe
    from ckptkit.values.cast_payload import CastPayload
    from ckptkit.values.dequantize.payload import DequantizedPayload
    from ckptkit.values.merging.model import Facts
    from ckptkit.values.merging.payload import MergedPayload, MergeInput
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
    ``merged`` has what a user should know of merged tensors, by their keys; most have nothing.
    ``steps`` are all steps of the plan, of which some merges need to know; another producer may have some of them.
    """

    roles: Mapping[str, Checkpoint]
    steps: Sequence[Step] = ()
    losses: dict[str, CastLoss] = field(default_factory=dict)
    extracted: dict[str, ExtractedChange] = field(default_factory=dict)
    merged: dict[str, Facts] = field(default_factory=dict)
    _outputs: dict[object, tuple[tuple[Tensor, ...], RecipeCounter]] = field(default_factory=dict, repr=False)
    _workers: Workers | None = field(default=None, repr=False)
    _stored: dict[str, StoredBytes] = field(default_factory=dict, repr=False)
    _limits: Limits | None = field(default=None, repr=False)

    def again(self) -> Producer:
        """Return a producer that makes the same tensors again, but keeps what was found in the values of all inputs."""
        limits = self._all_limits() if any(map(_only_merge, self.steps)) else None
        return Producer(self.roles, self.steps, _limits=limits)

    def found_limits(self) -> Mapping[Group, float] | None:
        """Return what was found in the values of all inputs, for the producer of another process, or None.

        Raises ``PlanError`` where the steps lack tensors that it is of, and what reading the inputs raises.
        """
        if not any(map(_only_merge, self.steps)):
            return None
        limits = self._all_limits()
        limits.find(self._unlimited, self._shared_workers())
        return limits.found

    @classmethod
    def of_some(
        cls, roles: Mapping[str, Checkpoint], steps: Sequence[Step], found: Mapping[Group, float] | None
    ) -> Self:
        """Return a producer for some steps of a plan, with ``found_limits`` of the producer for all of them."""
        from ckptkit.plans.methods.limits import Limits

        return cls(roles, steps, _limits=None if found is None else Limits(steps, found))

    def payload(self, step: Step) -> Payload:
        """Return the bytes of the step's tensor, which are read or computed only with the chunks.

        Raises ``PlanError`` where the step does not fit the inputs.
        """
        if step.is_patched:  # the inputs were checked with the plan, and the result has a digest
            return self._patched(step)
        found = describe_step(step, self.roles)
        if step.recipe is not None:
            return self._made(step, found, self.losses)
        payload = self.roles[step.sources[0].role].payload(step.sources[0].key)
        if found.dtype == step.out.dtype:
            return payload
        return self._cast(payload, TensorInfo(step.out.key, found.dtype, found.shape), step.out)

    def _made(self, step: Step, found: TensorInfo, losses: MutableMapping[str, CastLoss] | None) -> Payload:
        """Return the bytes of a step with a recipe, given the description before its last cast."""
        merge = _only_merge(step)
        if merge is not None:
            return self._merged(step, merge, losses)
        operation, numbers = self._only_dequantize(step)
        if operation is not None and found.dtype == step.out.dtype:
            return self._dequantized(step, operation, numbers, step.out, losses)
        return ComputedPayload(step.out.nbytes, lambda: self.tensor(step))

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
        from ckptkit.tensor_ops.recipes import Recipe, evaluate_recipe, lift_dequantize

        merge = _only_merge(step)
        if merge is not None:
            merged = self._merged(step, merge, self.losses)
            return read_tensor(step.out, lambda _: merged)
        if step.is_patched:
            patched = self._patched(step)
            return read_tensor(step.out, lambda _: patched)
        operation, numbers = self._only_dequantize(step)
        if operation is not None:
            tensor = self._dequantized_tensor(step, operation, numbers, self.losses)
            return tensor if found.dtype == step.out.dtype else self._cast_tensor(tensor, found, step.out)
        # The outputs of one chain over the same sources are computed together; the latest chain is the last one.
        chain = step.sources, Recipe(step.recipe.inputs, step.recipe.operations)
        evaluated = self._outputs.pop(chain, None)
        if evaluated is None:
            self._shrink_cache()
            counter = RecipeCounter()
            rounded = self._recorded(step, counter.add)
            recipe, decoded = lift_dequantize(step.recipe, len(step.sources))
            assert isinstance(recipe, Recipe)  # noqa: S101 - else the step only dequantises
            identities = [*step.sources, *decoded]

            def read(number: int) -> Tensor:
                if number < len(step.sources):
                    return self._read(step, number)
                found: dict[str, CastLoss] = {}
                tensor = self._dequantized_tensor(step, *decoded[number - len(step.sources)], found)
                counter.add_loss(found.get(step.out.key))
                return tensor

            try:
                outputs = evaluate_recipe(recipe, identities, read, rounded)
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

    def _only_dequantize(self, step: Step) -> tuple[Dequantize | None, tuple[int, ...]]:
        """Return the operation of a step that dequantises a weight and does nothing else, and the numbers of parts."""
        from ckptkit.tensor_ops.dequantize import Dequantize

        recipe = step.recipe
        if recipe is None or len(recipe.operations) != 1 or not isinstance(recipe.operations[0], Dequantize):
            return None, ()
        operation = recipe.operations[0]
        return (operation if operation.scheme else None), tuple(n for n in recipe.inputs if isinstance(n, int))

    def _dequantized(
        self,
        step: Step,
        operation: Dequantize,
        numbers: Sequence[int],
        out: TensorInfo,
        losses: MutableMapping[str, CastLoss] | None,
    ) -> DequantizedPayload:
        """Return the numbers of a quantised weight, given the numbers of the sources that are its parts."""
        from ckptkit.values.dequantize.payload import DequantizedPayload

        sources = [step.sources[number] for number in numbers]
        decoder = operation.decoder(out.key, [self.roles[source.role][source.key] for source in sources])
        payloads = [self._stored_bytes(source.role).payload(source.key) for source in sources]
        return DequantizedPayload(decoder, operation.sources(payloads), out, losses, self._shared_workers())

    def _dequantized_tensor(
        self, step: Step, operation: Dequantize, numbers: Sequence[int], losses: MutableMapping[str, CastLoss]
    ) -> Tensor:
        out = TensorInfo(step.out.key, operation.dtype or "F32", operation.shape)
        payload = self._dequantized(step, operation, numbers, out, losses)
        return read_tensor(out, lambda _: payload)

    def _merged(self, step: Step, merge: Merge, losses: MutableMapping[str, CastLoss] | None) -> MergedPayload:
        """Return the tensor of a step that merges its sources, or what recipes make of them, and does nothing else.

        The numbers are rounded once, also where the step ends with a cast.
        """
        inputs = self._merge_inputs(step)
        limits: tuple[float, ...] = ()
        if merge.method.shares():
            limits = self._all_limits().of(merge, self._unlimited, self._shared_workers())
        return merge.payload(inputs, step.out, losses, self.merged, self._shared_workers(), limits=limits)

    def _patched(self, step: Step) -> CheckedPayload:
        from ckptkit.plans.deltas.operation import patched_tensor

        return patched_tensor(step, self.roles).payload(self._shared_workers())

    def _unlimited(self, step: Step, merge: Merge) -> MergedPayload:
        """Return a merge whose inputs are read before its limits are known."""
        return merge.payload(self._merge_inputs(step), step.out, workers=self._shared_workers())

    def _all_limits(self) -> Limits:
        from ckptkit.plans.methods.limits import Limits

        if self._limits is None:
            self._limits = Limits(self.steps)
        return self._limits

    def _merge_inputs(self, step: Step) -> list[MergeInput]:
        from ckptkit.values.merging.payload import MergeInput

        assert step.recipe is not None  # noqa: S101 - it has the merge
        inputs = []
        for item in step.recipe.inputs:
            source = step.sources[_first_source(item)]
            checkpoint = self.roles[source.role]
            if isinstance(item, int):
                inputs.append(MergeInput(source.role, checkpoint[source.key], checkpoint.payload(source.key)))
                continue
            infos = [self.roles[one.role][one.key] for one in step.sources]
            found = describe_output(step.out.key, infos, item, step.rule)
            made = Step(TensorInfo(step.out.key, found.dtype, found.shape), step.sources, rule=step.rule, recipe=item)
            inputs.append(MergeInput(source.role, made.out, self._made(made, found, None)))
        return inputs

    def _stored_bytes(self, role: str) -> StoredBytes:
        if role not in self._stored:
            self._stored[role] = StoredBytes(self.roles[role])
        return self._stored[role]

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
            from ckptkit.values.computed import BlockPayload

            payload = self.payload(step)
            if isinstance(payload, BlockPayload):
                payload.find_losses()
            else:
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

        return CastPayload(payload, found, out, self.losses, self._shared_workers())

    def _shared_workers(self) -> Workers:
        from ckptkit.values.workers import Workers

        if self._workers is None:
            self._workers = Workers()
        return self._workers

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


def _only_merge(step: Step) -> Merge | None:
    """Return the operation of a step that merges tensors and does nothing else after it."""
    operations = step.recipe.operations if step.recipe is not None else ()
    if len(operations) != 1 or operations[0].name != "merge":
        return None
    from ckptkit.plans.methods.operation import Merge

    assert isinstance(operations[0], Merge)  # noqa: S101 - no other operation has its name
    return operations[0]


def _first_source(recipe: int | Recipe) -> int:
    return recipe if isinstance(recipe, int) else _first_source(recipe.inputs[0])


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
