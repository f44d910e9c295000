"""The inputs of a plan by role, and the bytes of each tensor that the plan makes from them."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from ckptkit.core.arguments import require_flags
from ckptkit.core.cast_losses import CastLoss, wider_dtype
from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo, View, row_major
from ckptkit.core.checkpoint.reading import read_tensor, torch_dtype_of
from ckptkit.core.checkpoint.state_dict import read_state_dict
from ckptkit.core.files.payloads import same_bytes
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import printable, quoted
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import PlanError
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.plans.deltas.base import BASE, BaseOfPatch, ResultTensor
from ckptkit.plans.plan.merged import MergedFacts
from ckptkit.plans.plan.step import Source, Step
from ckptkit.plans.produce import Producer, overflow_error
from ckptkit.plans.quantized import QuantizedInputs
from ckptkit.plans.steps import check_steps, equal_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "PlanInputs",
    "Sources",
    "materialize_steps",
    "opened_inputs",
    "opened_roles",
    "sources_by_role",
    "stream_tensors",
]

Sources: TypeAlias = Mapping[str, object] | CheckpointLike  # object: a dict of a path and a model has no narrower type
_Input = TypeVar("_Input")
_BY_ROLE = "pass sources={role: checkpoint, ...}"


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """The bytes of the output's tensors, read or computed from the inputs."""

    steps: Mapping[str, Step]
    roles: Mapping[str, Checkpoint]
    producer: Producer
    allow_overflow: bool
    patched_base: BaseOfPatch | None = None

    def payload(self, info: TensorInfo) -> Payload:
        """Return the bytes of a tensor of the output."""
        step = self.steps[info.key]
        if step.recipe is not None or step.is_cast:
            return self.producer.payload(step)
        source = step.sources[0]  # of a copy, which was checked when the inputs were opened
        return self.roles[source.role].payload(source.key)

    def span(self, info: TensorInfo) -> Payload | None:
        """Return the stored bytes from the first to the last element of a tensor of the output."""
        step = self.steps[info.key]
        source = step.sources[0]
        # Only a copy can share the storage of its source; any other tensor is written as its contiguous bytes.
        if not step.is_copy or step.out.view is None:
            return self.payload(info)
        return self.roles[source.role].span(source.key)

    def with_views(self, infos: Sequence[TensorInfo]) -> list[TensorInfo]:
        """Return the infos with views that share a storage where their inputs do, and only there."""
        order = {role: number for number, role in enumerate(self.roles)}
        identities = {info.key: self._identity(self.steps[info.key]) for info in infos}
        count = Counter(identities.values())
        storages = {identity: -1 - number for number, identity in enumerate(count)}
        viewed = []
        for info in infos:
            step, identity = self.steps[info.key], identities[info.key]
            if info.view is not None and step.is_copy:
                # The storages of each input have numbers of their own.
                storage = info.view.storage * len(order) + order[step.sources[0].role]
                view: View | None = info.view._replace(storage=storage)
            else:
                view = View(storages[identity], 0, row_major(info.shape)) if count[identity] > 1 else None
            viewed.append(TensorInfo(info.key, info.dtype, info.shape, view, info.kind, info.stored_bytes))
        return viewed

    def _identity(self, step: Step) -> tuple[object, ...]:
        """Return a value that is equal for two steps that make the same tensor."""
        source = step.sources[0]
        origin = step.sources if step.recipe else step.out.view or source.key
        return source.role, origin, step.recipe, step.out.shape, step.out.dtype, step.operation

    def losses(self, keys: Iterable[str] | None = None) -> tuple[CastLoss, ...]:
        """Return the losses of the tensors that were read so far, or of ``keys``, in the order of the plan."""
        return tuple(loss for key in (self.steps if keys is None else keys) if (loss := self.producer.losses.get(key)))

    def merged(self, keys: Iterable[str] | None = None) -> tuple[MergedFacts, ...]:
        """Return what a user should know of merged tensors, of those that ``losses`` is about."""
        facts = self.producer.merged
        return tuple(
            MergedFacts(key, facts[key].warning, dict(facts[key].numbers))
            for key in (self.steps if keys is None else keys)
            if key in facts
        )

    def refuse_overflow(self, keys: Iterable[str] | None = None) -> None:
        """Raise ``PlanError`` where a cast made inf of finite values, unless the user allowed it."""
        overflowed = [loss for loss in self.losses(keys) if loss.overflowed]
        if overflowed and not self.allow_overflow:
            self.check_unchanged()  # the values of a file that changed mean nothing
            role = self.steps[overflowed[0].key].sources[0].role
            raise overflow_error(overflowed, _wider_dtype_hint(overflowed, self.roles), self.roles[role].path)

    def refuse_different_bytes(self) -> None:
        """Raise ``PlanError`` where two tensors that would have one key are not equal, or a patch has another base."""
        for step in self.steps.values():
            for source in step.equals:
                first = equal_of(step, source)
                if not same_bytes(
                    self.roles[first.role].payload(first.key), self.roles[source.role].payload(source.key)
                ):
                    raise _difference(step, first, source, self.roles[source.role].path)
        if self.patched_base is not None:
            self.patched_base.refuse_another(self.roles[BASE], self._results)

    def _results(self) -> dict[str, ResultTensor]:
        from ckptkit.plans.deltas.operation import results_of

        return results_of(self.steps.values())

    def check_unchanged(self) -> None:
        """Raise ``ChangedError`` where a file of an input changed since it was opened."""
        for checkpoint in self.roles.values():
            checkpoint.check_unchanged(by_path=True)


def _difference(step: Step, first: Source, source: Source, path: str | None) -> PlanError:
    """Return the error about two tensors that must be equal and are not."""
    names = f"{quoted(first.key)} and {quoted(source.key)}"
    if first.role != source.role:
        return PlanError(
            f"{quoted(step.out.key)} differs in {quoted(first.role)} and {quoted(source.role)}, and is not merged, "
            "because it has no floating-point numbers",
            hint='--param non_float=max, base or first, or in a recipe non_float = "max", chooses one',
            call='non_float = "base", "first" or "max" in the recipe chooses one',
            path=path,
        )
    if step.recipe is not None and step.recipe.operations[-1].name == "merge":
        return PlanError(
            f"{names} are tied in the base, and differ in {quoted(source.role)}",
            hint="untie them in the base first, or leave one of them out of this input",
            path=path,
        )
    return PlanError(f"{names} would both be called {quoted(step.out.key)}, and their bytes differ", path=path)


def _wider_dtype_hint(overflowed: Sequence[CastLoss], roles: Mapping[str, Checkpoint]) -> str:
    wider = wider_dtype(overflowed)
    if wider is None:
        return ""
    if "base" not in roles:
        return f"{wider} holds them"
    path = CheckpointSummary.of(roles["base"], ()).argument or "BASE"
    return f"cast the base first: ckpt convert {path} -o OUT --dtype {wider}"


def roles_of(base: _Input, donors: Sequence[_Input]) -> dict[str, _Input]:
    """Return the inputs of a merge by the roles that its plan gives them: ``base``, and ``donor`` or ``donor1``, ..."""
    roles = ["donor"] if len(donors) == 1 else [f"donor{number}" for number in range(1, len(donors) + 1)]
    return {"base": base, **dict(zip(roles, donors, strict=True))}


def _by_role(sources: Mapping[str, object] | CheckpointLike, wanted: Sequence[str]) -> dict[str, object]:
    """Return the inputs by role; ``sources`` may be the only input, without its role."""
    by_role = sources if isinstance(sources, Mapping) and not isinstance(sources, Checkpoint) else None
    # A state_dict can have a tensor called "source".
    if by_role is not None and all(role in by_role and _is_input(by_role[role]) for role in wanted):
        return dict(by_role)
    if not wanted:
        raise PlanError("the plan writes no tensor", hint="keep at least one step")
    if by_role and wanted[0] not in by_role and all(map(_is_input, by_role.values())):
        given = ", ".join(printable(str(role)) for role in by_role)
        raise PlanError(f"the plan reads {', '.join(wanted)}, and sources has {given}", hint=_BY_ROLE)
    if len(wanted) != 1:
        raise PlanError(f"the plan reads {', '.join(wanted)}", hint=_BY_ROLE)
    return {wanted[0]: sources}


def _is_input(value: object) -> bool:
    is_path = isinstance(value, str | os.PathLike)
    return is_path or isinstance(value, Mapping) or callable(getattr(value, "state_dict", None))


def sources_by_role(steps: Sequence[Step], sources: Sources) -> dict[str, object]:
    """Return the inputs of these steps by role. Raises ``PlanError`` for a role that is missing."""
    return _by_role(sources, _roles_read(steps))


def _roles_read(steps: Sequence[Step]) -> list[str]:
    return list(dict.fromkeys(source.role for step in steps for source in (*step.sources, *step.equals)))


@contextlib.contextmanager
def opened_roles(wanted: Iterable[str], sources: Sources) -> Iterator[dict[str, Checkpoint]]:
    """Give the inputs of a plan that reads the roles ``wanted``; paths are opened, and closed at the end.

    Raises what ``opened`` raises, and ``PlanError`` where a role is missing.
    """
    with contextlib.ExitStack() as stack:
        yield {
            role: stack.enter_context(opened(cast("CheckpointLike", value), role))
            for role, value in _by_role(sources, list(dict.fromkeys(wanted))).items()
        }


@contextlib.contextmanager
def opened_inputs(
    steps: Sequence[Step],
    sources: Sources,
    others: Iterable[str] = (),
    *,
    patched_base: BaseOfPatch | None = None,
    allow_overflow: bool = False,
) -> Iterator[PlanInputs]:
    """Give the inputs of the steps of a plan, after a check of the steps; paths are opened, and closed at the end.

    ``others`` are roles that the output needs besides those that the steps read. ``patched_base`` is that of the plan.
    Raises what ``check_steps`` and
    ``opened_roles`` raise, and ``PlanError`` where a quantised weight would be taken for numbers.
    """
    if not steps:
        raise PlanError("the plan writes no tensor")
    base = [BASE] if patched_base is not None else []
    with opened_roles([*_roles_read(steps), *others, *base], sources) as inputs:
        checked = check_steps(steps, inputs)
        for problem in QuantizedInputs(inputs, inputs.get("base"), "base").problems(checked):
            raise problem.error()
        with contextlib.closing(Producer(inputs, checked)) as producer:
            yield PlanInputs({step.out.key: step for step in checked}, inputs, producer, allow_overflow, patched_base)


def stream_tensors(
    steps: Sequence[Step], sources: Sources, patched_base: BaseOfPatch | None, *, allow_overflow: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over keys and tensors, as ``Plan.tensors`` says; the steps are checked before the first."""
    require_flags(allow_overflow=allow_overflow)
    with opened_inputs(steps, sources):
        for step in steps:
            torch_dtype_of(step.out)
    return _stream(steps, sources, patched_base, allow_overflow=allow_overflow)


def _stream(
    steps: Sequence[Step], sources: Sources, patched_base: BaseOfPatch | None, *, allow_overflow: bool
) -> Iterator[tuple[str, Tensor]]:
    with opened_inputs(steps, sources, patched_base=patched_base, allow_overflow=allow_overflow) as inputs:
        inputs.refuse_different_bytes()
        for step in inputs.steps.values():
            tensor = read_tensor(step.out, inputs.payload)
            inputs.refuse_overflow([step.out.key])
            yield step.out.key, tensor
        inputs.check_unchanged()


def materialize_steps(inputs: PlanInputs, device: torch.device | None) -> dict[str, Tensor]:
    """Return the tensors by key, as ``Plan.materialize`` says."""
    inputs.refuse_different_bytes()
    infos = inputs.with_views([step.out for step in inputs.steps.values()])
    tensors = read_state_dict(infos, inputs.payload, inputs.span, device, None)
    inputs.refuse_overflow()
    inputs.check_unchanged()
    return tensors
