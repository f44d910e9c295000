"""Who stands in the groups: every trainable parameter of the model once, or who instead, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_types import Tensor
from ckptkit.param_groups.live import LiveGroup, Member
from ckptkit.param_groups.parameters import Inventory, LiveParameter, bare_name
from ckptkit.param_groups.validate.model import check_hidden, find_hidden
from ckptkit.param_groups.validate.stale import (
    REBIND_HINT,
    ModelContext,
    UnknownTensor,
    find_rename,
    match_to_model,
    shape_of,
    unknown_tensor_finding,
)

__all__ = [
    "Placements",
    "check_dicts",
    "check_membership",
    "check_name",
    "check_names",
    "check_wrappers",
    "find_missing",
    "find_placements",
]


def check_dicts(groups: Sequence[LiveGroup]) -> Iterator[Finding]:
    """Yield a finding for each group dict that is in use twice."""
    seen: dict[int, LiveGroup] = {}
    twice: set[int] = set()
    for group in groups:
        other = seen.setdefault(id(group.options), group)
        if other is group:
            continue
        if other.optimizer is not None and other.optimizer is group.optimizer:
            if id(group.optimizer) not in twice:
                yield _shared(f"{other.where} and {group.where} are of one optimizer, listed twice", "list it once")
            twice.add(id(group.optimizer))
        else:
            took = f" (lr={group.options['lr']})" if "lr" in group.options and group.optimizer is not None else ""
            yield _shared(
                f"{other.where} and {group.where} are one dict, as where a list of groups is used twice: the second "
                f"took over the options of the first{took}, and what changes in one changes in both",
                "make the list anew for each optimizer, as build_param_groups does",
            )


def _shared(message: str, hint: str) -> Finding:
    return Finding("groups.shared", "error", "", message, hint)


def check_wrappers(given: Any) -> Iterator[Finding]:
    """Yield a finding for each wrapper (Lookahead, SAM, LARC, ...) whose groups are not those of its optimizer."""
    wrappers = given if isinstance(given, list | tuple) else [given]
    for wrapper in wrappers:
        if hasattr(wrapper, "param_groups"):
            yield from _cached(wrapper)


def _cached(wrapper: Any) -> Iterator[Finding]:
    held = {id(group) for group in wrapper.param_groups}
    for name, inner in getattr(wrapper, "__dict__", {}).items():
        if hasattr(inner, "param_groups") and hasattr(inner, "step") and inner is not wrapper:
            stale = [group for group in inner.param_groups if id(group) not in held]
            if stale:
                kind = type(wrapper).__name__
                yield Finding(
                    "groups.cached",
                    "warning",
                    "",
                    f"{kind}.param_groups are not those of {kind}.{name} ({type(inner).__name__}), as after "
                    "load_state_dict(), which replaces them: what is set in one is not what the other steps with",
                    f"let the wrapper pass them on: a property that returns self.{name}.param_groups",
                )


def check_names(inventory: Inventory, groups: Iterable[LiveGroup], members: Iterable[Member]) -> Iterator[Finding]:
    """Yield a finding where an optimizer names only some of its parameters, or two of them alike."""
    named = Counter[LiveGroup]()
    total = Counter[LiveGroup]()
    places: dict[tuple[int, str], Member] = {}
    told: set[tuple[int, str]] = set()
    for member in members:
        total[member.group] += 1
        if member.name is None:
            continue
        named[member.group] += 1
        if id(member.tensor) not in inventory.parameters:
            continue  # an older object of that name, or none of the model: that is another finding
        key = (id(member.group.optimizer), member.name)
        first = places.setdefault(key, member)
        if first.tensor is not member.tensor and key not in told:
            told.add(key)
            # Recorded from two parts of the model, each is true as far as it goes.
            parts = all(_ends(inventory.parameters[id(one.tensor)], bare_name(member.name)) for one in (first, member))
            yield Finding(
                "groups.names",
                "warning" if parts else "error",
                "",
                f"{first.where} and {member.where} are two parameters, both recorded as {quoted(member.name)}",
                "build the optimizer again from model.named_parameters(): names tell whose saved state is whose",
            )
    full: dict[int, LiveGroup] = {}
    for group in groups:
        if named[group] and named[group] == total[group]:
            full.setdefault(id(group.optimizer), group)
    for group in groups:
        count = plural(total[group], "parameter")
        other = full.get(id(group.optimizer))
        if 0 < named[group] < total[group]:
            yield _names(f"{group.where} names {named[group]} of its {count}, which torch refuses", _ALL_OR_NONE)
        elif other is not None and total[group] and not named[group] and "param_names" not in group.options:
            yield _names(
                f"{group.where} names none of its {count} while {other.where} names all, which torch refuses",
                _ALL_OR_NONE,
            )


_ALL_OR_NONE = "name all or none: list(model.named_parameters())"


def _names(message: str, hint: str) -> Finding:
    return Finding("groups.names", "error", "", message, hint)


def _ends(live: LiveParameter, ending: str) -> bool:
    """Return whether one of the names of ``live`` ends so, by whole segments."""
    return any(f".{bare_name(name)}".endswith(f".{ending}") for name in (live.name, *live.aliases))


def check_name(inventory: Inventory, live: LiveParameter, member: Member) -> Iterator[Finding]:
    """Yield a finding where the name recorded with a parameter of the model is none of its names."""
    name = member.name or ""
    bare, other = bare_name(name), inventory.named(name)
    # Recorded from a part of the model, as of the network inside a LightningModule, it lacks the beginning.
    if other is live or (other is None and _ends(live, bare)):
        return
    start = f"{member.where} {live.shape} is recorded as {quoted(name)} but is {quoted(live.name)}"
    again = "build the optimizer again from model.named_parameters(), so that its state is saved under true names"
    if other is not None:
        lie = ", while the model has another parameter of that name, as after load_state_dict() of another order"
        yield Finding("groups.names", "error", live.name, start + lie, again)
        return
    # It is the same object and trains on; only what is saved under the old name will not be found.
    rename = find_rename(inventory, name)
    if rename is None or live.name not in rename.names:
        why = ", as the model calls it now"
    else:
        why = f", its name since {rename.event}"
    yield Finding(
        "groups.names",
        "warning",
        live.name,
        start + why,
        f"{again}, or rename {quoted(name)} to {quoted(live.name)} in it",
    )


@dataclass(frozen=True, slots=True, eq=False)
class Placements:
    """Where each tensor stands, by ``id()``: its first place, and all of them for those with more than one."""

    first: dict[int, Member] = field(default_factory=dict)
    several: dict[int, list[Member]] = field(default_factory=dict)


def find_placements(members: Iterable[Member]) -> Placements:
    """Return the places of all that stands in groups."""
    stand = Placements()
    for member in members:
        first = stand.first.setdefault(id(member.tensor), member)
        if first is not member:
            stand.several.setdefault(id(member.tensor), [first]).append(member)
    return stand


def find_missing(inventory: Inventory, groups: Iterable[LiveGroup], stand: Placements) -> list[LiveParameter]:
    """Return the trainable parameters in no group; none where what a group holds could not be told."""
    if not all(group.is_readable for group in groups):
        return []
    return [live for key, live in inventory.parameters.items() if key not in stand.first and live.trainable]


def check_membership(inventory: Inventory, stand: Placements, missing: Sequence[LiveParameter]) -> Iterator[Finding]:
    """Yield what is wrong with each place, who stands in it instead of whom, and who stands in none."""
    hidden = find_hidden(inventory)
    kept = {id(tensor) for part in hidden for _, tensor in part.tensors}
    strangers: list[UnknownTensor] = []
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
            strangers.append(UnknownTensor(first.tensor, tuple(places)))
    yield from _check_strangers(inventory, stand.first, strangers, missing)
    yield from (check_hidden(part, stand.first) for part in hidden)


def _check_strangers(
    inventory: Inventory,
    places: Mapping[int, Member],
    strangers: Sequence[UnknownTensor],
    missing: Sequence[LiveParameter],
) -> Iterator[Finding]:
    """Yield who stands in a group instead of whom, and who stands in none."""
    if strangers and any(hasattr(live.tensor, "ds_id") for live in inventory.parameters.values()):
        yield _partitioned(strangers[0], len(strangers), missing)
        return
    identified = match_to_model(inventory, strangers, missing)
    older: dict[str, Member] = {}
    for stranger in identified:
        if stranger.live is not None:
            older.setdefault(stranger.live.name, stranger.places[0])
    scene = ModelContext(inventory, places, older)
    yield from (unknown_tensor_finding(stranger, scene) for stranger in identified)
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


def _partitioned(stranger: UnknownTensor, count: int, missing: Sequence[LiveParameter]) -> Finding:
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
        hint = REBIND_HINT
    else:
        message = (
            f"{quoted(live.name)}{shape} is trainable but in no group: no step moves it, and its .grad piles up, as "
            "optimizer.zero_grad() skips it"
        )
        hint = "add it to a group, or freeze it: requires_grad_(False)"
        if ".lora_" in f".{live.name}":
            hint = "build the groups after the adapter is in the model, or give it to optimizer.add_param_group()"
    return Finding("groups.missing", "error", live.name, message, hint)
