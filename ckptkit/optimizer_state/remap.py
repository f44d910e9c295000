"""States that follow their weights: the same rules, and the same moves of elements, for every slot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, TensorInfo
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
from ckptkit.plans.produce import Producer
from ckptkit.plans.steps import make_step
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Derivation, Rules, describe_output
from ckptkit.rules.parse import as_rules
from ckptkit.tensor_ops.resizing import Pad

if TYPE_CHECKING:
    from ckptkit.tensor_ops.operation import Operation
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["remap"]

_ANEW = "drop its state, so that it starts anew: ckpt optim prune --reset PATTERN"


def remap(
    state: OptimizerState, rules: Rules | list[str] | Mapping[str, Any] | None, *, elementwise: Collection[str] = ()
) -> OptimizerState:
    """Return the state of the parameters that ``rules`` make: those that make the weights of a model are meant.

    A slot with a number for each element (``exp_avg``, ``momentum_buffer``; ``elementwise`` names more) is split,
    joined, padded (as new rows begin) and turned with its weight, bit by bit, when it is read. One number for the
    whole parameter (``step``) is copied; of parameters that become one it has to be equal. All else follows a renaming
    alone. A parameter is in the group of those that it is made of.

    Raises ``RuleError`` as for weights, and ``PlanError`` where a rule computes, where parameters of different options
    or numbers become one, or where a slot cannot follow.
    """
    key_map = apply_rules(as_rules(rules), require_named(state).names)
    outputs = key_map.outputs()
    work = _Work(state, frozenset(elementwise), {name: group for group in state.groups for name in group.names})
    slots = {new: work.slots(new, how) for new, how in outputs.items()}
    made = {new: own for new, own in slots.items() if own is not None}
    groups, remarks = _groups(state, outputs)
    changes = [
        Change(new, how.sources, "copy" if how.recipe is None else how.recipe.outline(), how.rule)
        for new, how in outputs.items()
    ]
    changes += [Change(old, (old,), "dropped", reason) for old, reason in key_map.dropped.items()]
    said = (*state.remarks, *key_map.notes, *remarks, *work.remarks)
    return replace(state, state=made, groups=groups, remarks=tuple(dict.fromkeys(said)), changes=tuple(changes))


def _groups(state: OptimizerState, outputs: Mapping[str, Derivation]) -> tuple[tuple[NamedGroup, ...], list[str]]:
    home = {name: number for number, group in enumerate(state.groups) for name in group.names}
    members: list[list[str]] = [[] for _ in state.groups]
    for new, how in outputs.items():
        first, *others = dict.fromkeys(home[source] for source in how.sources)
        for other in others:
            one, two = state.groups[first].options, state.groups[other].options
            if differing := [key for key in one.keys() | two.keys() if not same_value(one.get(key), two.get(key))]:
                raise PlanError(
                    f"{quoted(new)} would be of groups {first} and {other}, which differ in {min(differing)}",
                    hint="bring them into one group first: ckpt optim resplit",
                )
        members[first].append(new)
    return with_members(state.groups, members)


@dataclass(slots=True)
class _Work:
    """The slots of the new parameters, one after the other; what is made of one slot is made by one maker."""

    state: OptimizerState
    elementwise: frozenset[str]
    home: Mapping[str, NamedGroup]
    remarks: list[str] = field(default_factory=list)
    producers: dict[str, tuple[Checkpoint, Producer]] = field(default_factory=dict)

    def slots(self, new: str, how: Derivation) -> Mapping[str, SlotValue] | None:
        """Return the slots of a new parameter; None where none of those that it is made of has any."""
        sources = [self.state.state.get(name) for name in how.sources]
        for other in how.equals:
            if not same_value(self.state.state.get(other), sources[0]):
                raise PlanError(
                    f"the states of {quoted(how.sources[0])} and {quoted(other)} would both be that of {quoted(new)}, "
                    "and are not equal"
                )
        if how.recipe is None or all(slots is None for slots in sources):
            return sources[0]
        self._hold_whole(new, how)
        there = [slots for slots in sources if slots is not None]
        if any(_MUON in group.options for group in self.state.groups if how.sources[0] in group.names):
            self.remarks.append(
                "Muon's momentum moves with its matrix, and its next update is that of the new matrices"
            )
        names = tuple(dict.fromkeys(slot for slots in there for slot in slots))
        for name, slots in zip(how.sources, sources, strict=True):
            lacking = [slot for slot in names if slots is None or slot not in slots]
            if lacking:
                raise PlanError(
                    f"{quoted(new)} would be made of {quoted(name)} too, which has no {lacking[0]}: never stepped?",
                    hint=_ANEW,
                )
        return {slot: self._made(slot, new, how, [slots[slot] for slots in there]) for slot in names}

    def _hold_whole(self, new: str, how: Derivation) -> None:
        """Refuse what would go on without an error, and train otherwise: an update that looks at whole matrices."""
        group = self.home.get(how.sources[0])
        schema = None if group is None else schema_from_options(group.options)
        if schema is not None and not schema.is_elementwise:
            raise PlanError(
                f"{how.rule} makes {quoted(new)} of parts: {schema.name} computes each update from the whole "
                "parameter, so that with the same state it would train otherwise",
                hint=_ANEW,
            )

    def _made(self, slot: str, new: str, how: Derivation, values: Sequence[SlotValue]) -> SlotValue:
        kinds = {slot_kind(slot, value, self.elementwise) for value in values}
        if kinds == {"scalar"}:
            for name, value in zip(how.sources, values, strict=True):
                if not same_value(value, values[0]):
                    raise PlanError(
                        f"{quoted(new)} cannot be made of {quoted(how.sources[0])}, whose {slot} is "
                        f"{number_of(values[0])}, and {quoted(name)}, whose {slot} is {number_of(value)}",
                        hint=_ANEW,
                    )
            return values[0]
        if kinds != {"elementwise"}:
            raise PlanError(
                f"{slot} of {quoted(how.sources[0])} has no number for each element, and cannot follow "
                f"{how.rule} into {quoted(new)}",
                hint=_ANEW if "factored" in kinds else f"{_ANEW}; or, if it has, --elementwise {slot}",
            )
        return self._moved(slot, new, how)

    def _moved(self, slot: str, new: str, how: Derivation) -> LazyTensor:
        assert how.recipe is not None  # noqa: S101 - a parameter that is renamed alone is not moved
        fill = self._beginning(slot, how.sources[0])
        how = replace(how, recipe=self._moves(how.recipe, new, how.rule, fill), equals=())
        if slot not in self.producers:
            checkpoint = _checkpoint_of(self.state.slot(slot), f"the {slot} of the optimizer state")
            self.producers[slot] = checkpoint, Producer({_ROLE: checkpoint})
        checkpoint, producer = self.producers[slot]
        described = describe_output(new, [checkpoint[name] for name in how.sources], how.recipe, how.rule)
        step = make_step(replace(described, key=new), how, _ROLE, checkpoint)
        return LazyTensor(step.out, _made_by(step, producer, checkpoint.path))

    def _beginning(self, slot: str, name: str) -> float:
        """Return what an optimizer puts into each element of a slot before its first step."""
        group, option = self.home.get(name), _BEGINNINGS.get(slot, "")
        number = None if group is None else number_of(group.options.get(option))
        return 0.0 if number is None else float(number)

    def _moves(self, recipe: Recipe, new: str, rule: str, fill: float) -> Recipe:
        inputs = tuple(item if isinstance(item, int) else self._moves(item, new, rule, fill) for item in recipe.inputs)
        moved = tuple(self._move(one, new, rule, fill) for one in recipe.operations)
        return replace(recipe, inputs=inputs, operations=moved)

    def _move(self, operation: Operation, new: str, rule: str, fill: float) -> Operation:
        moving = operation.for_optimizer_state()
        if fill and isinstance(moving, Pad):
            moving = replace(moving, fill=fill)
        if moving is None:
            way = "leave it out: torch casts a state as it loads it" if operation.name == "cast" else _ANEW
            raise PlanError(
                f"{rule}: {quoted(new)}: {operation.name} computes with weights, and their state cannot follow that",
                hint=way,
            )
        if moving != operation:
            self.remarks.append(f"the state follows {operation} as {moving}: no gradient has been there")
        return moving


_ROLE = "state"
_BEGINNINGS = {
    slot.name: slot.initial_value_option
    for schema in SCHEMAS.values()
    for slot in schema.slots
    if slot.initial_value_option
}
_MUON = "ns_steps"  # the option by which a group is told to be of torch.optim.Muon


def _checkpoint_of(tensors: Mapping[str, LazyTensor], path: str) -> Checkpoint:
    """Return the tensors of one slot as a Checkpoint, by the names of their parameters."""
    infos = {name: replace(tensor.info, key=name) for name, tensor in tensors.items()}
    return Checkpoint(
        infos,
        Access(lambda info: tensors[info.key].payload(), lambda info: tensors[info.key].span()),
        Description(path, "optimizer state"),
    )


def _made_by(step: Step, producer: Producer, path: str) -> Checkpoint:
    def payload(_: TensorInfo) -> Payload:
        return producer.payload(step)

    return Checkpoint({step.out.key: step.out}, Access(payload), Description(path, "optimizer state"))
