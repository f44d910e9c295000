"""Who stands in the groups: every trainable parameter of the model once, or who instead, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.param_groups.live import Group, Member
from ckptkit.param_groups.parameters import Inventory, LiveParameter
from ckptkit.param_groups.validate.hidden import check_hidden, find_hidden
from ckptkit.param_groups.validate.reasons import REBIND, Scene, shape_of
from ckptkit.param_groups.validate.records import check_name
from ckptkit.param_groups.validate.stale import Stranger, explain, identify

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Standing", "check_membership", "find_missing", "standing"]


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """Where each tensor stands, by ``id()``: its first place, and all of them for those with more than one."""

    first: dict[int, Member] = field(default_factory=dict)
    several: dict[int, list[Member]] = field(default_factory=dict)


def standing(members: Iterable[Member]) -> Standing:
    """Return the places of all that stands in groups."""
    stand = Standing()
    for member in members:
        first = stand.first.setdefault(id(member.tensor), member)
        if first is not member:
            stand.several.setdefault(id(member.tensor), [first]).append(member)
    return stand


def find_missing(inventory: Inventory, groups: Iterable[Group], stand: Standing) -> list[LiveParameter]:
    """Return the trainable parameters in no group; none where what a group holds could not be told."""
    if not all(group.known for group in groups):
        return []
    return [live for key, live in inventory.parameters.items() if key not in stand.first and live.trainable]


def check_membership(inventory: Inventory, stand: Standing, missing: Sequence[LiveParameter]) -> Iterator[Finding]:
    """Yield what is wrong with each place, who stands in it instead of whom, and who stands in none."""
    hidden = find_hidden(inventory)
    kept = {id(tensor) for part in hidden for _, tensor in part.tensors}
    strangers: list[Stranger] = []
    for key, first in stand.first.items():
        live = inventory.parameters.get(key)
        places = stand.several.get(key, (first,))
        if len(places) > 1:
            yield _duplicate(places, live)
        if live is not None:
            if first.name != live.name or len(places) > 1 or live.lazy or not live.trainable:
                yield from _check_live(inventory, live, places)
        elif key in inventory.buffers:
            yield _buffer(*inventory.buffers[key], first)
        elif not _is_leaf(first.tensor):
            yield _computed(first)
        elif key not in kept:
            strangers.append(Stranger(first.tensor, tuple(places)))
    yield from _check_strangers(inventory, stand.first, strangers, missing)
    yield from (check_hidden(part, stand.first) for part in hidden)


def _check_strangers(
    inventory: Inventory,
    places: Mapping[int, Member],
    strangers: Sequence[Stranger],
    missing: Sequence[LiveParameter],
) -> Iterator[Finding]:
    """Yield who stands in a group instead of whom, and who stands in none."""
    if strangers and any(hasattr(live.tensor, "ds_id") for live in inventory.parameters.values()):
        yield _partitioned(strangers[0], len(strangers), missing)
        return
    identified = identify(inventory, strangers, missing)
    older: dict[str, Member] = {}
    for stranger in identified:
        if stranger.live is not None:
            older.setdefault(stranger.live.name, stranger.places[0])
    scene = Scene(inventory, places, older)
    yield from (explain(stranger, scene) for stranger in identified)
    yield from (_missing(live, older.get(live.name)) for live in missing)


def _check_live(inventory: Inventory, live: LiveParameter, stand: Sequence[Member]) -> Iterator[Finding]:
    for member in stand:
        if member.name is not None and member.name != live.name and member.name not in live.aliases:
            yield from check_name(inventory, live, member)
    if not live.trainable:
        moves = live.tensor.grad is not None
        yield Finding(
            "groups.frozen",
            "error" if moves else "warning",
            live.name,
            f"{quoted(live.name)} {live.shape} in {stand[0].where} is frozen (requires_grad=False)"
            + (
                ", but its .grad is not None, so the optimizer still moves it, by momentum and decay even where it is 0"
                if moves
                else ": no step moves it while its .grad is None"
            ),
            "set its .grad to None, or leave it out of the groups" if moves else "leave it out of the groups",
        )
    if live.lazy:
        yield Finding(
            "groups.lazy",
            "warning",
            live.name,
            f"{quoted(live.name)} in {stand[0].where} is uninitialised until the first forward pass, and its shape "
            "unknown (ndim says 1)",
            "run the model once on a sample batch before the first step",
        )


def _duplicate(stand: Sequence[Member], live: LiveParameter | None) -> Finding:
    name = live.name if live is not None else stand[0].name or ""
    shown = " and ".join(member.where for member in stand[:3]) + (" and more" if len(stand) > 3 else "")
    shape = "" if live is not None and live.lazy else f" {shape_of(stand[0].tensor)}"
    if live is not None and live.aliases and len({id(member.group) for member in stand}) > 1:
        names = " and ".join(map(quoted, (live.name, *live.aliases)))
        return Finding(
            "groups.tied",
            "error",
            name,
            f"{names} are one tied parameter{shape}, but stand in different groups, as {shown}: only one set of "
            "options can be its own",
            f"leave it in one of them, as {quoted(live.name)}",
        )
    return Finding(
        "groups.duplicate",
        "error",
        name,
        f"{quoted(name) if name else 'one tensor'}{shape} is in the groups {plural(len(stand), 'time')}, as {shown}: "
        "each of them moves it",
        "keep one of them; tied parameters come twice from named_parameters(remove_duplicate=False)",
    )


def _buffer(name: str, buffer: Tensor, member: Member) -> Finding:
    return Finding(
        "groups.buffer",
        "error",
        name,
        f"{quoted(name)} {tuple(buffer.shape)} in {member.where} is a buffer ({buffer.dtype}), which gets no gradient",
        "leave it out, or register it as an nn.Parameter",
    )


def _partitioned(stranger: Stranger, count: int, missing: Sequence[LiveParameter]) -> Finding:
    example = f", such as {quoted(missing[0].name)} {missing[0].shape}" if missing else ""
    return Finding(
        "groups.sharded",
        "error",
        missing[0].name if missing else "",
        f"the parameters{example}, are placeholders of ZeRO-3 (ds_id), while {stranger.places[0].where} "
        f"{shape_of(stranger.tensor)} is one of {plural(count, 'tensor')} of its own in the groups: "
        "deepspeed.initialize() put flat shards there, and who trains with which options cannot be told from them",
        "validate the model and the optimizer before deepspeed.initialize()",
    )


def _computed(member: Member) -> Finding:
    return Finding(
        "groups.not-a-parameter",
        "error",
        member.name or "",
        f"{member.where} is the result of a computation (not a leaf), which no optimizer can train",
        "take the parameter that it was computed from: model.named_parameters()",
    )


def _is_leaf(tensor: Any) -> bool:
    return bool(tensor.is_leaf or tensor.retains_grad)


def _missing(live: LiveParameter, older: Member | None) -> Finding:
    shape = "" if live.lazy else f" {live.shape}"
    if older is not None:
        message = f"{quoted(live.name)}{shape} is in no group: {older.where} holds another object in its place"
        hint = REBIND
    else:
        message = (
            f"{quoted(live.name)}{shape} is trainable but in no group: no step moves it, and its .grad piles up, as "
            "optimizer.zero_grad() skips it"
        )
        hint = "add it to a group, or freeze it: requires_grad_(False)"
        if ".lora_" in f".{live.name}":
            hint = "build the groups after the adapter is in the model, or give it to optimizer.add_param_group()"
    return Finding("groups.missing", "error", live.name, message, hint)
