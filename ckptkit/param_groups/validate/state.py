"""Whether the state of live optimizers belongs to the parameters beside which it is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import human_bytes, plural, quoted
from ckptkit.core.torch_bridge import shape_or_none
from ckptkit.core.torch_optim import OptimizerSchema, SlotSchema
from ckptkit.param_groups.live import LiveOptimizer, Member, member_name, member_names
from ckptkit.param_groups.parameters import Inventory, address
from ckptkit.param_groups.spec import is_tensor

__all__ = ["check_state", "check_state_values"]


Kept = tuple[Member, Mapping[str, Any]]  # a place in a group, and the slots of what stands there
_FORGET = "forget it, and the next step starts it again: optimizer.state.pop(parameter)"
_AGAIN = "load the state again from a file that has it, or forget it: optimizer.state.pop(parameter)"


def check_state(inventory: Inventory, optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    """Yield what is wrong with the state of each optimizer: whose it is, which slots it has, and how far it got."""
    for optimizer in optimizers:
        state = getattr(optimizer.instance, "state", None)
        if not isinstance(state, Mapping):
            continue
        places = {id(member.tensor): member for member in optimizer.members}
        yield from _keys(optimizer, state, places)
        kept = [(one, state[one.tensor]) for one in places.values() if state.get(one.tensor)]
        kept = [(member, slots) for member, slots in kept if isinstance(slots, Mapping)]
        yield from _dead(inventory, optimizer, kept)
        if optimizer.schema is not None and not optimizer.schema.has_shared_state:
            yield from _slots(inventory, optimizer, optimizer.schema, kept)
            yield from _steps(inventory, optimizer, kept)
            yield from _absent(inventory, optimizer, optimizer.schema, kept)


def _keys(optimizer: LiveOptimizer, state: Mapping[Any, Any], places: Mapping[int, Member]) -> Iterator[Finding]:
    orphans = [key for key in state if is_tensor(key) and id(key) not in places]
    if orphans:
        yield Finding(
            "groups.state-orphan",
            "error",
            "",
            f"{optimizer.label} keeps the state of {plural(len(orphans), 'tensor')} that none of its groups has (the "
            f"first is {tuple(orphans[0].shape)}): state_dict() fails with a KeyError that names nobody",
            "forget it: optimizer.state.pop(tensor), or move it to the parameter that took its place",
        )
    # Other people's optimizers keep things of their own under strings; numbers are ids that a file left behind.
    strays = [key for key in state if not is_tensor(key) and (optimizer.schema is not None or isinstance(key, int))]
    if strays:
        yield Finding(
            "groups.state-stray",
            "warning",
            "",
            f"{optimizer.label} keeps state under {strays[0]!r}"
            + (f" and {plural(len(strays) - 1, 'more key')}" if strays[1:] else "")
            + ", which is no parameter: it came with a loaded file, and is saved again with every checkpoint",
            "forget it: optimizer.state.pop(key)",
        )


def _dead(inventory: Inventory, optimizer: LiveOptimizer, kept: Sequence[Kept]) -> Iterator[Finding]:
    dead = [(member, slots) for member, slots in kept if id(member.tensor) not in inventory.parameters]
    if dead:
        size = sum(value.nbytes for _, slots in dead for value in slots.values() if is_tensor(value))
        yield Finding(
            "groups.state-dead",
            "note",
            "",
            f"{optimizer.label} still keeps {human_bytes(size)} of state for {plural(len(dead), 'tensor')} that the "
            f"model does not have: {member_names(inventory, [member for member, _ in dead])}",
            "build the optimizer again, after the last change to the model, or rebind(optimizer, model)",
        )


def _slots(
    inventory: Inventory, optimizer: LiveOptimizer, schema: OptimizerSchema, kept: Sequence[Kept]
) -> Iterator[Finding]:
    unknown: dict[str, list[Member]] = defaultdict(list)
    converted: dict[tuple[str, Any, Any], dict[Member, bool]] = defaultdict(dict)
    for member, slots in kept:
        shape = shape_or_none(member.tensor)
        if shape is None:
            continue
        wanted = schema.slots_for(member.group.options, shape)
        yield from _incomplete(inventory, optimizer, member, [slot for slot in wanted if slots.get(slot.name) is None])
        wrong: dict[str, str] = {}
        for name, value in slots.items():
            slot = schema.slot(name)
            if slot is None:
                unknown[name].append(member)
            elif (fault := _misshapen(slot, value, shape)) is not None:
                wrong[name] = fault
            elif slot.layout != "scalar" and is_tensor(value):
                if value.dtype != member.tensor.dtype:
                    exact = slot.needs_parameter_dtype or bool(member.group.options.get("fused"))
                    alike = converted["dtype", value.dtype, member.tensor.dtype]
                    alike[member] = alike.get(member, False) or exact
                if value.device != member.tensor.device:
                    converted["device", value.device, member.tensor.device][member] = True
        if wrong:
            yield _mismatch(inventory, member, wrong, shape)
    for name, members in unknown.items():
        yield Finding(
            "groups.state-stray",
            "warning",
            member_name(inventory, members[0]),
            f"{optimizer.label} keeps {quoted(name)} for {member_names(inventory, members)}, which it does not read: "
            "the state came from an optimizer of another class",
            "load the state of the same class, or start without: optimizer.state.clear()",
        )
    for (what, there, here), alike in converted.items():
        yield _converted(inventory, f"groups.state-{what}", there, here, alike)


def _incomplete(
    inventory: Inventory, optimizer: LiveOptimizer, member: Member, lacking: Sequence[SlotSchema]
) -> Iterator[Finding]:
    if not lacking:
        return
    restarts = all(slot.is_optional for slot in lacking)
    name = member_name(inventory, member)
    yield Finding(
        "groups.state-incomplete",
        "warning" if restarts else "error",
        name,
        f"the state of {quoted(name) if name else member.where} has no {', '.join(slot.name for slot in lacking)}, "
        f"which {optimizer.label} {'starts again from zero' if restarts else 'reads in its step, and fails without'}",
        _AGAIN,
    )


def _misshapen(slot: SlotSchema, value: Any, shape: tuple[int, ...]) -> str | None:
    """Return what ``value`` is where it cannot be this slot of a parameter of ``shape``."""
    expected = slot.shape(shape)
    if expected is None or value is None:
        return None
    if not is_tensor(value):
        return None if slot.layout == "scalar" and isinstance(value, int | float) else f"a {type(value).__name__}"
    if slot.layout == "scalar":
        return None if value.numel() == 1 else f"{tuple(value.shape)}"
    return None if tuple(value.shape) == expected else f"{tuple(value.shape)}"


def _mismatch(inventory: Inventory, member: Member, wrong: Mapping[str, str], shape: tuple[int, ...]) -> Finding:
    name = member_name(inventory, member)
    found = ", ".join(f"{slot} {fault}" for slot, fault in wrong.items())
    return Finding(
        "groups.state-shape",
        "error",
        name,
        f"{quoted(name) if name else member.where} is {shape} but its state is of another shape ({found}): it belongs "
        "to another parameter, or to this one before it was resized, and the next step fails",
        _FORGET,
    )


def _converted(inventory: Inventory, code: str, there: Any, here: Any, exact: Mapping[Member, bool]) -> Finding:
    members, fails = list(exact), any(exact.values())
    return Finding(
        code,
        "error" if fails else "warning",
        member_name(inventory, members[0]),
        f"the state of {member_names(inventory, members)} is {there}, beside "
        f"{plural(len(members), 'parameter that is', 'parameters that are')} {here}: "
        + ("the next step fails" if fails else "torch computes in the wider of both"),
        "load the state_dict after the model is converted: torch converts it then",
    )


def _steps(inventory: Inventory, optimizer: LiveOptimizer, kept: Sequence[Kept]) -> Iterator[Finding]:
    counted: dict[float, list[Member]] = defaultdict(list)
    for count, member in _counts(kept):
        counted[count].append(member)
    if len(counted) > 1:
        some = sorted(counted.items(), key=lambda item: -len(item[1]))
        parts = [f"{count:g} for {member_names(inventory, members)}" for count, members in some[:3]]
        more = f", and {plural(len(some) - 3, 'other count')}" if len(some) > 3 else ""
        yield Finding(
            "groups.state-steps",
            "warning",
            member_name(inventory, some[-1][1][0]),
            f"{optimizer.label} has counted different numbers of steps: {'; '.join(parts)}{more}. Those with fewer are "
            "corrected as if training had just begun",
            "this is right for parameters that were unfrozen or got no gradient; otherwise their state was not loaded",
        )


def _counts(kept: Sequence[Kept]) -> Iterator[tuple[float, Member]]:
    """Yield the step counts, those of one device fetched at once."""
    import torch

    tensors: dict[Any, list[tuple[Any, Member]]] = defaultdict(list)
    for member, slots in kept:
        step = slots.get("step")
        if isinstance(step, int | float):
            yield float(step), member
        elif (
            isinstance(step, torch.Tensor) and step.numel() == 1 and not step.is_meta and not hasattr(step, "to_local")
        ):
            tensors[step.device].append((step.detach().reshape(()).double(), member))
    for pairs in tensors.values():
        counts = torch.stack([step for step, _ in pairs]).tolist()
        yield from zip(counts, (member for _, member in pairs), strict=True)


def _absent(
    inventory: Inventory, optimizer: LiveOptimizer, schema: OptimizerSchema, kept: Sequence[Kept]
) -> Iterator[Finding]:
    there = {id(member.tensor) for member, _ in kept}
    without = [
        member
        for member in optimizer.members
        if id(member.tensor) not in there
        and member.tensor.requires_grad
        and schema.slots_for(member.group.options, shape_or_none(member.tensor) or ())
    ]
    if there and without:
        yield Finding(
            "groups.state-absent",
            "note",
            member_name(inventory, without[0]),
            f"{optimizer.label} has no state for {len(without)} of {plural(len(there) + len(without), 'parameter')}: "
            f"{member_names(inventory, without)}",
            "they got no gradient so far, or their state was not loaded",
        )


def check_state_values(inventory: Inventory, optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    """Yield the slots whose values no step can use, and those that share memory with what another step writes."""
    for optimizer in optimizers:
        for member, slot, value in _tensors(optimizer):
            fault = _fault(value)
            known = optimizer.schema.slot(slot) if optimizer.schema is not None else None
            if fault == "negative" and (known is None or not known.is_non_negative):
                continue
            if fault is not None:
                name = member_name(inventory, member)
                yield Finding(
                    "groups.state-value",
                    "error",
                    name,
                    f"{slot} of {quoted(name) if name else member.where} "
                    + (
                        "is negative, where its root is taken or it is divided by"
                        if fault == "negative"
                        else f"holds {fault}, which it keeps: every step from here on writes it into the parameter"
                    ),
                    "load the state again from a file that is whole, or forget it: optimizer.state.pop(parameter)",
                )
    yield from _shared(inventory, optimizers)


def _tensors(optimizer: LiveOptimizer) -> Iterator[tuple[Member, str, Any]]:
    """Yield every tensor in the state of what stands in the groups."""
    state = getattr(optimizer.instance, "state", None)
    if not isinstance(state, Mapping):
        return
    for member in {id(member.tensor): member for member in optimizer.members}.values():
        slots = state.get(member.tensor)
        if isinstance(slots, Mapping):
            yield from ((member, name, value) for name, value in slots.items() if is_tensor(value))


def _fault(value: Any) -> str | None:
    """Return ``NaN``, ``Inf``, ``negative`` or None, after one pass over the values and without a copy of them."""
    import torch

    if hasattr(value, "to_local"):
        value = value.to_local()
    # A subclass of Tensor (quantised, functional) may not know the operation, and means something else by it.
    if type(value) not in {torch.Tensor, torch.nn.Parameter} or value.is_meta or not value.numel():
        return None
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if not value.is_floating_point() or value.layout != torch.strided:
        return None
    low, high = (bound.item() for bound in torch.aminmax(value.detach()))
    if low != low:  # noqa: PLR0124  NaN alone is not itself
        return "NaN"
    if float("inf") in {high, -low}:
        return "Inf"
    return "negative" if low < 0 else None


def _shared(inventory: Inventory, optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    parameters = {
        (member.tensor.device, address(member.tensor)): member for one in optimizers for member in one.members
    }
    seen: dict[tuple[Any, int], str] = {}
    count, first = 0, ""
    for optimizer in optimizers:
        for member, slot, value in _tensors(optimizer):
            place = (value.device, address(value))
            if not place[1]:
                continue
            mine = f"{slot} of {member_names(inventory, [member])} in {optimizer.label}"
            theirs = seen.setdefault(place, mine)
            if theirs == mine and place in parameters:
                theirs = f"the parameter {member_names(inventory, [parameters[place]])}"
            if theirs != mine:
                count += 1
                first = first or f"{mine} is in the memory of {theirs}"
    if count:
        more = f", and {plural(count - 1, 'more tensor', 'more tensors')} of state likewise" if count > 1 else ""
        yield Finding(
            "groups.state-shared",
            "error",
            "",
            f"{first}{more}: a step of one changes the other",
            "load_state_dict keeps the tensors that it is given: give each optimizer a copy.deepcopy of its own",
        )
