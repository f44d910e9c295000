"""Whether what optimizers keep can be computed with: its values, and whether each tensor has memory of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.param_groups.holders import Holder, listed, name_of
from ckptkit.param_groups.live import Member
from ckptkit.param_groups.parameters import Inventory, address
from ckptkit.param_groups.spec import is_tensor

__all__ = ["check_state_values"]


def check_state_values(inventory: Inventory, holders: Sequence[Holder]) -> Iterator[Finding]:
    """Yield the slots whose values no step can use, and those that share memory with what another step writes."""
    for holder in holders:
        for member, slot, value in _tensors(holder):
            fault = _fault(value)
            known = holder.schema.slot(slot) if holder.schema is not None else None
            if fault == "negative" and (known is None or not known.not_negative):
                continue
            if fault is not None:
                name = name_of(inventory, member)
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
    yield from _shared(inventory, holders)


def _tensors(holder: Holder) -> Iterator[tuple[Member, str, Any]]:
    """Yield every tensor in the state of what stands in the groups."""
    state = getattr(holder.optimizer, "state", None)
    if not isinstance(state, Mapping):
        return
    for member in {id(member.tensor): member for member in holder.members}.values():
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


def _shared(inventory: Inventory, holders: Sequence[Holder]) -> Iterator[Finding]:
    parameters = {(member.tensor.device, address(member.tensor)): member for one in holders for member in one.members}
    seen: dict[tuple[Any, int], str] = {}
    count, first = 0, ""
    for holder in holders:
        for member, slot, value in _tensors(holder):
            place = (value.device, address(value))
            if not place[1]:
                continue
            mine = f"{slot} of {listed(inventory, [member])} in {holder.called}"
            theirs = seen.setdefault(place, mine)
            if theirs == mine and place in parameters:
                theirs = f"the parameter {listed(inventory, [parameters[place]])}"
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
