"""Check that the state of live optimizers fits its parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ckptkit.core.findings import Code, Finding
from ckptkit.core.text import human_bytes, plural, quoted, short_number
from ckptkit.core.torch_bridge import has_same_layout, is_plain, shape_or_none
from ckptkit.core.torch_optim import OptimizerSchema, SlotSchema
from ckptkit.core.torch_optim.step_counts import have_one_count_in_each_part
from ckptkit.core.torch_types import Tensor
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import LiveOptimizer, Member, member_keys, member_name, member_names
from ckptkit.param_groups.parameters import LiveModel, address
from ckptkit.param_groups.spec.fields import is_tensor
from ckptkit.param_groups.validate.options import read_number
from ckptkit.param_groups.validate.stale import REBIND_HINT

__all__ = ["check_state", "check_state_values"]


MemberState = tuple[Member, Mapping[str, object]]  # a member of a group, and the slots that the optimizer keeps for it
_DROP = "drop the state, so that the next step makes a new one: optimizer.state.pop(parameter)"
_LOAD_AGAIN = "load the state again from an intact file, or drop the state: optimizer.state.pop(parameter)"


def check_state(live_model: LiveModel, optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    """Yield a finding for state of no parameter, for wrong or missing slots, and for different step counts."""
    for optimizer in optimizers:
        state = getattr(optimizer.instance, "state", None)
        if not isinstance(state, Mapping):
            continue
        members = {id(member.tensor): member for member in optimizer.members}
        yield from _check_keys(optimizer, state, members)
        found = ((member, state.get(member.tensor)) for member in members.values())
        states = [(member, slots) for member, slots in found if isinstance(slots, Mapping) and slots]
        yield from _check_dead(live_model, optimizer, states)
        yield from _check_zero(live_model, optimizer, states)
        if optimizer.schema is not None and not optimizer.schema.has_shared_state:
            yield from _check_slots(live_model, optimizer, optimizer.schema, states)
            yield from _check_steps(live_model, optimizer, states)
            yield from _check_absent(live_model, optimizer, optimizer.schema, states)


def _check_keys(
    optimizer: LiveOptimizer, state: Mapping[object, object], members: Mapping[int, Member]
) -> Iterator[Finding]:
    orphans = [key for key in state if is_tensor(key) and id(key) not in members]
    if orphans:
        yield codes.STATE_ORPHAN.finding(
            "",
            f"{optimizer.label} keeps state for {plural(len(orphans), 'tensor')} that none of its groups holds (the "
            f"first has shape {tuple(orphans[0].shape)}), so state_dict() fails with a KeyError",
            "drop the state: optimizer.state.pop(tensor), or move it to the parameter that replaced the tensor",
        )
    # Optimizers from other packages keep data of their own under strings. Integers are positions from a loaded file.
    strays = [key for key in state if not is_tensor(key) and (optimizer.schema is not None or isinstance(key, int))]
    if strays:
        more = f" and {plural(len(strays) - 1, 'more key')}" if strays[1:] else ""
        yield codes.STATE_STRAY.finding(
            "",
            f"{optimizer.label} keeps state under {strays[0]!r}{more}, which belongs to no parameter: the state was "
            "loaded from a file, and every checkpoint saves it again",
            "drop the state: optimizer.state.pop(key)",
        )


def _check_dead(live_model: LiveModel, optimizer: LiveOptimizer, states: Sequence[MemberState]) -> Iterator[Finding]:
    dead = [(member, slots) for member, slots in states if id(member.tensor) not in live_model.parameters]
    if dead:
        values = (value for _, slots in dead for value in slots.values() if is_tensor(value))
        size = sum(value.numel() * value.element_size() for value in values)
        yield codes.STATE_DEAD.finding(
            "",
            f"{optimizer.label} still keeps {human_bytes(size)} of state for {plural(len(dead), 'tensor')} that the "
            f"model does not have: {member_names(live_model, [member for member, _ in dead])}",
            REBIND_HINT,
        )


def _check_zero(live_model: LiveModel, optimizer: LiveOptimizer, states: Sequence[MemberState]) -> Iterator[Finding]:
    """Yield a finding if every parameter has made steps, and all its other values of state are 0."""
    counts = {id(member): count for count, member in _step_counts(states)}
    stepped = [(member, slots) for member, slots in states if counts.get(id(member), 0) > 0]
    if not stepped or not any(_moments(slots) for _, slots in stepped):
        return
    moments = [moment for _, slots in stepped for moment in _moments(slots)]
    if not all(is_plain(moment) and address(moment) for moment in moments):  # the others cannot be read as they are
        return
    if any(bool(moment.any()) for moment in moments):
        return
    members = [member for member, _ in stepped]
    yield codes.STATE_ZERO.finding(
        member_name(live_model, members[0]),
        f"{optimizer.label} counts up to {short_number(max(counts.values()))} steps, but all other values in the "
        f"state of {member_names(live_model, members)} are 0, so the bias correction no longer fits",
        "load the state again from an intact file, or start without state: optimizer.state.clear()",
    )


def _moments(slots: Mapping[str, object]) -> list[Any]:
    """Return the tensors of the state of a parameter that are not one number and have values."""
    return [
        value
        for name, value in slots.items()
        if name != "step" and is_tensor(value) and value.numel() > 1 and not value.is_meta
    ]


def _check_slots(
    live_model: LiveModel, optimizer: LiveOptimizer, schema: OptimizerSchema, states: Sequence[MemberState]
) -> Iterator[Finding]:
    unread: dict[object, list[Member]] = defaultdict(list)
    converted: dict[tuple[Code, object, object], dict[Member, bool]] = defaultdict(dict)
    other_layout: dict[str, dict[Member, tuple[int, ...]]] = defaultdict(dict)
    for member, slots in states:
        shape = member.shape
        if shape is None:
            continue
        expected = schema.slots_for(member.group.options, shape)
        lacking = [slot for slot in expected if slots.get(slot.name) is None]
        yield from _check_incomplete(live_model, optimizer, member, lacking)
        wrong: dict[str, str] = {}
        for name, value in slots.items():
            slot = schema.slot(name)
            if slot is None:
                unread[name].append(member)
            elif (mismatch := slot.mismatch(value, _shape_of(value), shape)) is not None:
                wrong[name] = mismatch
            elif slot.layout != "scalar" and is_tensor(value):
                if value.dtype != member.tensor.dtype:
                    fails = slot.needs_parameter_dtype or bool(member.group.options.get("fused"))
                    members = converted[codes.STATE_DTYPE, value.dtype, member.tensor.dtype]
                    members[member] = members.get(member, False) or fails
                if value.device != member.tensor.device:
                    converted[codes.STATE_DEVICE, value.device, member.tensor.device][member] = True
                if member.group.options.get("fused") and _is_read_in_other_order(value, member.tensor):
                    other_layout[name][member] = tuple(value.stride())
        if wrong:
            yield _wrong_shape(live_model, member, wrong, shape)
    for key, holders in unread.items():
        yield codes.STATE_STRAY.finding(
            member_name(live_model, holders[0]),
            f"{optimizer.label} keeps {quoted(str(key))} for {member_names(live_model, holders)} but does not read it: "
            "the state is from an optimizer of another class",
            "load the state of the same class, or start without state: optimizer.state.clear()",
            keys=member_keys(live_model, holders),
        )
    for name, strides in other_layout.items():
        yield _other_layout(live_model, name, strides)
    for (code, of_state, of_parameter), members in converted.items():
        yield _converted(live_model, code, of_state, of_parameter, members)


def _is_read_in_other_order(value: Tensor, parameter: Tensor) -> bool:
    """Return whether a fused step takes elements of ``value`` for other elements of the parameter."""
    if not is_plain(value) or not is_plain(parameter) or value.shape != parameter.shape or value.is_meta:
        return False
    return not has_same_layout(value, parameter)


def _other_layout(live_model: LiveModel, slot: str, strides: Mapping[Member, tuple[int, ...]]) -> Finding:
    members = list(strides)
    return codes.STATE_LAYOUT.finding(
        member_name(live_model, members[0]),
        f"{slot} of {member_names(live_model, members)} has the strides {strides[members[0]]}, but the parameter has "
        f"{tuple(members[0].tensor.stride())}: a fused step reads both in the order of memory, so it takes the state "
        "of other elements",
        "rebind(optimizer, model) lays the state out like its parameter; fused=False reads any layout",
        keys=member_keys(live_model, members),
    )


def _shape_of(value: object) -> tuple[int, ...] | None:
    return shape_or_none(value) if is_tensor(value) else None


def _check_incomplete(
    live_model: LiveModel, optimizer: LiveOptimizer, member: Member, lacking: Sequence[SlotSchema]
) -> Iterator[Finding]:
    if not lacking:
        return
    is_optional = all(slot.is_optional for slot in lacking)
    effect = "starts again from zero" if is_optional else "reads in its step, so the step fails"
    yield codes.STATE_INCOMPLETE.finding(
        member_name(live_model, member),
        f"the state of {member_names(live_model, [member])} has no {', '.join(slot.name for slot in lacking)}, which "
        f"{optimizer.label} {effect}",
        _LOAD_AGAIN,
        severity="warning" if is_optional else "error",
    )


def _wrong_shape(live_model: LiveModel, member: Member, wrong: Mapping[str, str], shape: tuple[int, ...]) -> Finding:
    found = ", ".join(f"{slot} {mismatch}" for slot, mismatch in wrong.items())
    return codes.STATE_SHAPE.finding(
        member_name(live_model, member),
        f"{member_names(live_model, [member])} has shape {shape}, but its state does not fit ({found}), so the next "
        "step fails: the state is from another parameter, or from before a resize",
        _DROP,
    )


def _converted(
    live_model: LiveModel, code: Code, of_state: object, of_parameter: object, fails: Mapping[Member, bool]
) -> Finding:
    members = list(fails)
    effect = "the next step fails" if any(fails.values()) else "torch computes in the wider dtype"
    return code.finding(
        member_name(live_model, members[0]),
        f"the state of {member_names(live_model, members)} is {of_state}, but "
        f"{plural(len(members), 'parameter is', 'parameters are')} {of_parameter}: {effect}",
        "load the state_dict after you convert the model, because torch then converts the state too",
        severity="error" if any(fails.values()) else "warning",
        keys=member_keys(live_model, members),
    )


def _check_steps(live_model: LiveModel, optimizer: LiveOptimizer, states: Sequence[MemberState]) -> Iterator[Finding]:
    by_count: dict[float, list[Member]] = defaultdict(list)
    for count, member in _step_counts(states):
        by_count[count].append(member)
    if len(by_count) > 1:
        counts = sorted(by_count.items(), key=lambda item: -len(item[1]))
        parts = [f"{short_number(count)} for {member_names(live_model, members)}" for count, members in counts[:3]]
        names = {id(member): member_name(live_model, member) for _, members in counts for member in members}
        is_usual = have_one_count_in_each_part(
            {names[id(member)]: count for count, members in counts for member in members},
            [[names[id(m)] for m in optimizer.members_of(g) if id(m) in names] for g in optimizer.groups],
            {names[id(m)] for _, members in counts for m in members if not m.tensor.requires_grad},
        )
        more = f", and {plural(len(counts) - 3, 'other count')}" if len(counts) > 3 else ""
        yield codes.STATE_STEPS.finding(
            member_name(live_model, counts[-1][1][0]),
            f"{optimizer.label} has different step counts: {'; '.join(parts)}{more}. Parameters with a low count get "
            "the bias correction of the first steps",
            "this is right for parameters that were unfrozen or had no gradient; otherwise their state was not loaded",
            keys=member_keys(live_model, (member for _, members in reversed(counts[1:]) for member in members)),
            severity="note" if is_usual else "warning",
        )


def _step_counts(states: Sequence[MemberState]) -> Iterator[tuple[float, Member]]:
    """Yield the step count of each member; the counts on one device are fetched together."""
    import torch

    by_device: dict[object, list[tuple[Tensor, Member]]] = defaultdict(list)
    for member, slots in states:
        step = slots.get("step")
        if isinstance(step, int | float):
            if (count := read_number(step)) is not None:
                yield count, member
        elif is_plain(step) and step.numel() == 1 and not step.is_meta and not step.is_complex():
            by_device[step.device].append((step.detach().reshape(()).double(), member))
    for pairs in by_device.values():
        counts = torch.stack([step for step, _ in pairs]).tolist()
        yield from zip(counts, (member for _, member in pairs), strict=True)


def _check_absent(
    live_model: LiveModel, optimizer: LiveOptimizer, schema: OptimizerSchema, states: Sequence[MemberState]
) -> Iterator[Finding]:
    with_state = {id(member.tensor) for member, _ in states}
    without = [
        member
        for member in optimizer.members
        if id(member.tensor) not in with_state
        and member.tensor.requires_grad
        and schema.slots_for(member.group.options, member.shape or ())
    ]
    if with_state and without:
        total = plural(len(with_state) + len(without), "parameter")
        yield codes.STATE_ABSENT.finding(
            member_name(live_model, without[0]),
            f"{optimizer.label} has no state for {len(without)} of {total}: {member_names(live_model, without)}",
            "these parameters had no gradient so far, or their state was not loaded",
            keys=member_keys(live_model, without),
        )


def check_state_values(live_model: LiveModel, optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    """Yield a finding for each slot with unusable values, and for state tensors that share memory."""
    for optimizer in optimizers:
        for member, name, value in _state_tensors(optimizer):
            fault = _value_fault(value)
            slot = optimizer.schema.slot(name) if optimizer.schema is not None else None
            if fault is None or (fault == "negative" and (slot is None or not slot.is_non_negative)):
                continue
            problem = (
                "has negative values, but the step takes its root or divides by it"
                if fault == "negative"
                else f"contains {fault}, and every further step writes {fault} into the parameter"
            )
            yield codes.STATE_VALUE.finding(
                member_name(live_model, member),
                f"{name} of {member_names(live_model, [member])} {problem}",
                _LOAD_AGAIN,
            )
    yield from _check_shared_memory(live_model, optimizers)


def _state_tensors(optimizer: LiveOptimizer) -> Iterator[tuple[Member, str, Tensor]]:
    """Yield every tensor in the state of the members of the groups, with the name of its slot."""
    state = getattr(optimizer.instance, "state", None)
    if not isinstance(state, Mapping):
        return
    for member in {id(member.tensor): member for member in optimizer.members}.values():
        slots = state.get(member.tensor)
        if isinstance(slots, Mapping):
            yield from ((member, name, value) for name, value in slots.items() if is_tensor(value))


def _value_fault(value: Any) -> Literal["NaN", "Inf", "negative"] | None:
    """Return the fault of the values, or None; the values are read once and not copied."""
    import torch

    if hasattr(value, "to_local"):
        value = value.to_local()
    # A subclass of Tensor (quantised, functional) may lack this operation, or give it another meaning.
    if type(value) not in {torch.Tensor, torch.nn.Parameter} or value.is_meta or value.is_nested or not value.numel():
        return None
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if not value.is_floating_point() or value.layout != torch.strided:
        return None
    if not address(value):  # the memory was freed
        return None
    if value.element_size() == 1:
        value = value.float()  # torch has no minimum of an 8-bit float
    low, high = (bound.item() for bound in torch.aminmax(value.detach()))
    if low != low:  # noqa: PLR0124  only NaN is not equal to itself
        return "NaN"
    if float("inf") in {high, -low}:
        return "Inf"
    return "negative" if low < 0 else None


def _check_shared_memory(live_model: LiveModel, optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    parameters = {
        (member.tensor.device, address(member.tensor)): member
        for optimizer in optimizers
        for member in optimizer.members
    }
    seen: dict[tuple[object, int], tuple[LiveOptimizer, Member, str]] = {}
    count, first = 0, ""
    for optimizer in optimizers:
        for member, name, value in _state_tensors(optimizer):
            place = (value.device, address(value))
            if not place[1]:
                continue
            other = seen.setdefault(place, (optimizer, member, name))
            text = ""
            if other != (optimizer, member, name):
                is_table = other[0] is optimizer and other[2] == name and _is_table(value, member, other[1])
                text = "" if is_table else _slot_text(live_model, *other)
            elif place in parameters:
                text = f"the parameter {member_names(live_model, [parameters[place]])}"
            if text:
                count += 1
                first = first or f"{_slot_text(live_model, optimizer, member, name)} shares its memory with {text}"
    if count:
        more = f" (and {plural(count - 1, 'more state tensor')} in the same way)" if count > 1 else ""
        yield codes.STATE_SHARED.finding(
            "",
            f"{first}{more}, so a step that changes one tensor changes both",
            "load_state_dict() keeps the tensors that it gets: give each optimizer its own copy.deepcopy() of them",
        )


def _slot_text(live_model: LiveModel, optimizer: LiveOptimizer, member: Member, slot: str) -> str:
    return f"{slot} of {member_names(live_model, [member])} in {optimizer.label}"


def _is_table(value: Tensor, *members: Member) -> bool:
    """Return whether a tensor that parameters share is a constant of the optimizer, such as the codes of 8-bit state.

    A tensor that a step updates has the shape of its parameter, or is a single number.
    """
    return value.ndim > 0 and value.numel() > 1 and any(tuple(value.shape) != member.shape for member in members)
