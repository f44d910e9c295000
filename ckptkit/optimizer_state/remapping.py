"""Apply the rules of a model's weights to the state of its optimizer, slot by slot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptkit.core.arguments import require_strings
from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, TensorInfo, View, memory_order, row_major
from ckptkit.core.text import quoted
from ckptkit.core.torch_optim import SCHEMAS, schema_from_options
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.groups import with_members
from ckptkit.optimizer_state.model import (
    Change,
    LazyTensor,
    NamedGroup,
    OptimizerState,
    SlotValue,
    number_of,
    require_named,
    same_value,
    slot_kind,
)
from ckptkit.plans.plan import Step
from ckptkit.plans.produce import ComputedPayload, Producer
from ckptkit.plans.steps import make_step
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.load import as_rules
from ckptkit.rules.model import Derivation, RulesLike, describe_output
from ckptkit.tensor_ops.resizing import Pad

if TYPE_CHECKING:
    from ckptkit.tensor_ops.operation import Operation
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["remap"]

_ROLE = "state"
_INITIAL_VALUE_OPTIONS = {
    slot.name: slot.initial_value_option
    for schema in SCHEMAS.values()
    for slot in schema.slots
    if slot.initial_value_option
}
_MUON_OPTION = "ns_steps"  # only groups of torch.optim.Muon have this option
_RESET = "drop its state first: ckpt optim prune PATH -o OUT --reset PATTERN"


def remap(state: OptimizerState, rules: RulesLike | None, *, elementwise: Collection[str] = ()) -> OptimizerState:
    """Return the state of the parameters that ``rules`` make; give the rules that remap the weights of the model.

    - A slot with one number for each element (``exp_avg``, ``momentum_buffer``) is split, joined, padded and transposed
      like its weight. This is done bit by bit, when the slot is read. ``elementwise`` names more such slots. New rows
      have the value that the optimizer starts with.
    - A slot with one number for the whole parameter (``step``) is copied. It must be equal for parameters that become
      one.
    - Any other slot can only be renamed.

    A new parameter is in the group of the parameters that it is made from.

    Raises ``RuleError`` as for weights. Raises ``PlanError`` if a rule computes new values, or if a slot cannot follow
    its weight. Raises it too if parameters with different options or different numbers become one.

    Example:
        >>> from ckptkit.optimizer_state import remap, to_named
        >>> model = torch.nn.Linear(2, 2)
        >>> state = to_named(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), model)
        >>> remap(state, ["*=fc.*"]).names
        ('fc.weight', 'fc.bias')
    """
    elementwise = require_strings(elementwise, "elementwise", "the names of slots")
    key_map = apply_rules(as_rules(rules), require_named(state).names)
    outputs = key_map.outputs()
    group_of = {name: group for group in state.groups for name in group.names}
    remapper = _SlotRemapper(state, frozenset(elementwise), group_of)
    slots = {name: remapper.slots(name, derivation) for name, derivation in outputs.items()}
    groups, group_remarks = _remap_groups(state, outputs)
    changes = [
        Change(
            name,
            derivation.sources,
            "copy" if derivation.recipe is None else derivation.recipe.outline(),
            derivation.rule,
        )
        for name, derivation in outputs.items()
    ]
    changes += [Change(name, (name,), "dropped", reason) for name, reason in key_map.dropped.items()]
    remarks = (*state.remarks, *key_map.notes, *group_remarks, *remapper.remarks)
    return replace(
        state,
        state={name: own for name, own in slots.items() if own is not None},
        groups=groups,
        remarks=tuple(dict.fromkeys(remarks)),
        changes=tuple(changes),
    )


def _remap_groups(state: OptimizerState, outputs: Mapping[str, Derivation]) -> tuple[tuple[NamedGroup, ...], list[str]]:
    number_of_group = {name: number for number, group in enumerate(state.groups) for name in group.names}
    members: list[list[str]] = [[] for _ in state.groups]
    for name, derivation in outputs.items():
        first, *others = dict.fromkeys(number_of_group[source] for source in derivation.sources)
        for other in others:
            left, right = state.groups[first].options, state.groups[other].options
            different = [key for key in left.keys() | right.keys() if not same_value(left.get(key), right.get(key))]
            if different:
                raise PlanError(
                    f"{quoted(name)} would be made from groups {first} and {other}, which differ in {min(different)}",
                    hint="put its sources into one group first: ckpt optim resplit PATH -o OUT --groups FILE",
                )
        members[first].append(name)
    return with_members(state.groups, members)


@dataclass(slots=True)
class _SlotRemapper:
    """Makes the slots of the new parameters; one producer makes all tensors of one slot."""

    state: OptimizerState
    elementwise: frozenset[str]
    group_of: Mapping[str, NamedGroup]
    remarks: list[str] = field(default_factory=list)
    producers: dict[str, tuple[Checkpoint, Producer]] = field(default_factory=dict)

    def slots(self, name: str, derivation: Derivation) -> Mapping[str, SlotValue] | None:
        """Return the slots of a new parameter, or None if no source of it has any."""
        sources = [self.state.state.get(source) for source in derivation.sources]
        for other in derivation.equals:
            if not same_value(self.state.state.get(other), sources[0]):
                raise PlanError(
                    f"the state of {quoted(name)} would be that of {quoted(derivation.sources[0])} and of "
                    f"{quoted(other)}, but these are not equal"
                )
        if derivation.recipe is None or all(slots is None for slots in sources):
            return sources[0]
        self._refuse_whole_parameter_updates(name, derivation)
        if _MUON_OPTION in self.group_of[derivation.sources[0]].options:
            self.remarks.append(
                "the momentum of Muon moves with its matrix, so its next update is computed for the new matrix"
            )
        found = [slots for slots in sources if slots is not None]
        slot_names = tuple(dict.fromkeys(slot for slots in found for slot in slots))
        for source, slots in zip(derivation.sources, sources, strict=True):
            lacking = [slot for slot in slot_names if slots is None or slot not in slots]
            if lacking:
                raise PlanError(
                    f"{quoted(name)} would be made from {quoted(source)} too, which has no {lacking[0]}: was it never "
                    "stepped?",
                    hint=_RESET,
                )
        return {slot: self._slot(slot, name, derivation, [slots[slot] for slots in found]) for slot in slot_names}

    def _refuse_whole_parameter_updates(self, name: str, derivation: Derivation) -> None:
        """Raise ``PlanError`` if the optimizer computes each update from a whole parameter, as Adafactor does."""
        schema = schema_from_options(self.group_of[derivation.sources[0]].options)
        if schema is not None and not schema.is_elementwise:
            raise PlanError(
                f"{derivation.rule} makes {quoted(name)} from parts, but {schema.name} computes each update from the "
                "whole parameter, so the moved state would train otherwise",
                hint=_RESET,
            )

    def _slot(self, slot: str, name: str, derivation: Derivation, values: Sequence[SlotValue]) -> SlotValue:
        kinds = {slot_kind(slot, value, self.elementwise) for value in values}
        first = derivation.sources[0]
        if kinds == {"scalar"}:
            for source, value in zip(derivation.sources, values, strict=True):
                if not same_value(value, values[0]):
                    raise PlanError(
                        f"{quoted(name)} cannot be made from {quoted(first)} with {slot} {number_of(values[0])} and "
                        f"{quoted(source)} with {slot} {number_of(value)}",
                        hint=_RESET,
                    )
            return values[0]
        if kinds != {"elementwise"}:
            way_out = _RESET if "factored" in kinds else f"{_RESET}; or, if it has one, give --elementwise {slot}"
            raise PlanError(
                f"{slot} of {quoted(first)} does not have one number for each element, so it cannot follow "
                f"{derivation.rule} into {quoted(name)}",
                hint=way_out,
            )
        return self._moved_tensor(slot, name, derivation)

    def _moved_tensor(self, slot: str, name: str, derivation: Derivation) -> LazyTensor:
        assert derivation.recipe is not None  # noqa: S101 - a parameter that is only renamed keeps its tensors
        fill = self._initial_value(slot, derivation.sources[0])
        recipe = self._state_recipe(derivation.recipe, name, derivation.rule, fill)
        derivation = replace(derivation, recipe=recipe, equals=())
        if slot not in self.producers:
            checkpoint = _as_checkpoint(self.state.slot(slot), f"the {slot} of the optimizer state")
            self.producers[slot] = checkpoint, Producer({_ROLE: checkpoint})
        checkpoint, producer = self.producers[slot]
        sources = [checkpoint[source] for source in derivation.sources]
        described = describe_output(name, sources, recipe, derivation.rule)
        step = make_step(replace(described, key=name), derivation, _ROLE, checkpoint)
        produced = _produced_checkpoint(step, producer, checkpoint.path, _common_order(sources, step.out))
        return LazyTensor(produced[name], produced)

    def _initial_value(self, slot: str, name: str) -> float:
        """Return the value that the optimizer writes into each element of a slot before its first step."""
        number = number_of(self.group_of[name].options.get(_INITIAL_VALUE_OPTIONS.get(slot, "")))
        return 0.0 if number is None else float(number)

    def _state_recipe(self, recipe: Recipe, name: str, rule: str, fill: float) -> Recipe:
        inputs = tuple(
            item if isinstance(item, int) else self._state_recipe(item, name, rule, fill) for item in recipe.inputs
        )
        operations = tuple(self._state_operation(operation, name, rule, fill) for operation in recipe.operations)
        return replace(recipe, inputs=inputs, operations=operations)

    def _state_operation(self, operation: Operation, name: str, rule: str, fill: float) -> Operation:
        for_state = operation.for_optimizer_state()
        if fill and isinstance(for_state, Pad):
            for_state = replace(for_state, fill=fill)
        if for_state is None:
            is_cast = operation.name == "cast"
            raise PlanError(
                f"{rule}: {quoted(name)}: {operation.name} computes new weights, and the state cannot follow that",
                hint="leave the cast out: torch casts the state when it loads it" if is_cast else _RESET,
            )
        if for_state != operation:
            self.remarks.append(f"the state follows {operation} as {for_state}, because new elements had no gradient")
        return for_state


def _as_checkpoint(tensors: Mapping[str, LazyTensor], path: str) -> Checkpoint:
    """Return the tensors of one slot as a Checkpoint, by the names of their parameters."""
    infos = {name: replace(tensor.info, key=name) for name, tensor in tensors.items()}
    return Checkpoint(
        infos,
        Access(lambda info: tensors[info.key].payload(), lambda info: tensors[info.key].span()),
        Description(path, "optimizer state"),
    )


def _common_order(sources: Sequence[TensorInfo], out: TensorInfo) -> tuple[int, ...] | None:
    """Return the dims from slowest to fastest that all sources have in memory, if they are not in row-major order."""
    orders = set()
    for info in sources:
        if info.view is None or len(info.shape) != len(out.shape) or memory_order(info.shape, info.view.stride) is None:
            return None
        stride = info.view.stride
        orders.add(tuple(sorted(range(len(stride)), key=lambda at: -stride[at])))
    order = orders.pop() if len(orders) == 1 else ()
    return order if list(order) != sorted(order) else None


def _produced_checkpoint(step: Step, producer: Producer, path: str, order: tuple[int, ...] | None) -> Checkpoint:
    """Return the tensor of a step as a Checkpoint; ``order`` has the dims from slowest to fastest in memory."""
    out, span = step.out, None
    if order is not None:
        stride = [0] * len(order)
        for at, elements in zip(order, row_major(tuple(out.shape[at] for at in order)), strict=True):
            stride[at] = elements
        out = replace(out, view=View(0, 0, tuple(stride)))

        def span(info: TensorInfo) -> Payload:
            return ComputedPayload(info.nbytes, lambda: producer.tensor(step).permute(order))

    def payload(_: TensorInfo) -> Payload:
        return producer.payload(step)

    return Checkpoint({out.key: out}, Access(payload, span), Description(path, "optimizer state"))
