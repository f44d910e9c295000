"""Check that the groups hold every trainable parameter of the model exactly once, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import option_text, plural, quoted
from ckptkit.core.torch_optim import source_of_names
from ckptkit.core.torch_types import Tensor
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import LiveGroup, Member
from ckptkit.param_groups.parameters import LiveModel, LiveParameter, bare_name
from ckptkit.param_groups.validate.model import find_unregistered, unregistered_finding
from ckptkit.param_groups.validate.stale import (
    REBIND_HINT,
    ModelContext,
    UnknownTensor,
    find_rename,
    match_to_model,
    shape_text,
    unknown_tensor_finding,
)

__all__ = [
    "MembersByTensor",
    "check_membership",
    "check_names",
    "check_shared_groups",
    "check_wrappers",
    "find_missing",
    "group_by_tensor",
]


def check_shared_groups(groups: Sequence[LiveGroup]) -> Iterator[Finding]:
    """Yield a finding for each group dict, and each optimizer, that was given twice."""
    seen: dict[int, LiveGroup] = {}
    reported: set[int] = set()
    for group in groups:
        first = seen.setdefault(id(group.options), group)
        if first is group:
            continue
        if first.optimizer is not None and first.optimizer is group.optimizer:
            if id(group.optimizer) not in reported:
                yield codes.SHARED.finding(
                    "",
                    f"{first.where} and {group.where} are of one optimizer, which was given twice",
                    "give the optimizer once",
                )
            reported.add(id(group.optimizer))
        else:
            has_lr = "lr" in group.options and group.optimizer is not None
            options = f" (now lr={option_text(group.options['lr'])})" if has_lr else ""
            yield codes.SHARED.finding(
                "",
                f"{first.where} and {group.where} are one dict{options}, as when one list of groups is used for two "
                "optimizers: an option that is set in one is set in both",
                "make a new list of groups for each optimizer, as build_param_groups does",
            )


def check_wrappers(given: Any) -> Iterator[Finding]:
    """Yield a finding for each wrapper (Lookahead, SAM, LARC) that has other groups than its inner optimizer."""
    for wrapper in given if isinstance(given, list | tuple) else [given]:
        if hasattr(wrapper, "param_groups"):
            yield from _check_wrapper(wrapper)


def _check_wrapper(wrapper: Any) -> Iterator[Finding]:
    own = {id(group) for group in wrapper.param_groups}
    for name, inner in getattr(wrapper, "__dict__", {}).items():
        if not hasattr(inner, "param_groups") or not hasattr(inner, "step") or inner is wrapper:
            continue
        if any(id(group) not in own for group in inner.param_groups):
            kind = type(wrapper).__name__
            yield codes.CACHED.finding(
                "",
                f"{kind}.param_groups are not the groups of {kind}.{name} ({type(inner).__name__}), as after "
                f"load_state_dict(): an option that you set in {kind}.param_groups does not reach {kind}.{name}",
                f"make param_groups a property of {kind} that returns self.{name}.param_groups",
            )


def check_names(live_model: LiveModel, groups: Iterable[LiveGroup], members: Iterable[Member]) -> Iterator[Finding]:
    """Yield a finding if an optimizer has names for some parameters only, or one name for two parameters."""
    named = Counter[LiveGroup]()
    total = Counter[LiveGroup]()
    first_with: dict[tuple[int, str], Member] = {}
    reported: set[tuple[int, str]] = set()
    for member in members:
        total[member.group] += 1
        if member.name is None:
            continue
        named[member.group] += 1
        if id(member.tensor) not in live_model.parameters:
            continue  # a stale or foreign tensor, which has a finding of its own
        key = (id(member.group.optimizer), member.name)
        first = first_with.setdefault(key, member)
        if first.tensor is not member.tensor and key not in reported:
            reported.add(key)
            # Each name is right within the part of the model that it was recorded from.
            are_partial = all(
                _has_name_ending(live_model.parameters[id(holder.tensor)], bare_name(member.name))
                for holder in (first, member)
            )
            yield codes.NAMES.finding(
                "",
                f"{first.where} and {member.where} are two parameters, both recorded as {quoted(member.name)}",
                f"build the optimizer again from {source_of_names()}: loading by name needs unique names",
                severity="warning" if are_partial else "error",
            )
    fully_named: dict[int, LiveGroup] = {}
    for group in groups:
        if named[group] and named[group] == total[group]:
            fully_named.setdefault(id(group.optimizer), group)
    for group in groups:
        count = plural(total[group], "parameter")
        other = fully_named.get(id(group.optimizer))
        if 0 < named[group] < total[group]:
            yield codes.NAMES.finding(
                "", f"{group.where} names {named[group]} of its {count}, which torch refuses", _all_or_none()
            )
        elif other is not None and total[group] and not named[group] and "param_names" not in group.options:
            yield codes.NAMES.finding(
                "",
                f"{group.where} names none of its {count} while {other.where} names all, which torch refuses",
                _all_or_none(),
            )


def _all_or_none() -> str:
    return f"name all parameters or none: list({source_of_names()})"


def _has_name_ending(live: LiveParameter, ending: str) -> bool:
    """Return whether a name of ``live`` ends with the segments of ``ending``."""
    return any(f".{bare_name(name)}".endswith(f".{ending}") for name in (live.name, *live.aliases))


def _check_name(live_model: LiveModel, live: LiveParameter, member: Member) -> Iterator[Finding]:
    """Yield a finding if the name that was recorded with a parameter is not one of its names."""
    name = member.name or ""
    other = live_model.named(name)
    # A name that was recorded from a part of the model, as from the network of a LightningModule, lacks the beginning.
    if other is live or (other is None and _has_name_ending(live, bare_name(name))):
        return
    message = f"{member.where} {live.shape} is recorded as {quoted(name)} but is {quoted(live.name)}"
    build_again = f"build the optimizer again from {source_of_names()}, so that it saves state by the right names"
    if other is not None:
        yield codes.NAMES.finding(
            live.name,
            f"{message}, and {quoted(name)} is another parameter, as after loading a state with another order",
            build_again,
        )
        return
    # It is the same object and still trains, but state that was saved under the old name will not be found.
    rename = find_rename(live_model, name)
    known = rename is not None and live.name in rename.names
    reason = f", its name since {rename.event}" if rename is not None and known else ", its name in the model now"
    yield codes.NAMES.finding(
        live.name,
        f"{message}{reason}",
        f"{build_again}, or rename {quoted(name)} to {quoted(live.name)} in param_names",
        severity="warning",
    )


@dataclass(frozen=True, slots=True, eq=False)
class MembersByTensor:
    """The members that hold each tensor, by the ``id()`` of the tensor.

    ``first`` has the first member of every tensor. ``several`` has all members of each tensor with more than one.
    """

    first: dict[int, Member] = field(default_factory=dict)
    several: dict[int, list[Member]] = field(default_factory=dict)


def group_by_tensor(members: Iterable[Member]) -> MembersByTensor:
    """Return the members that hold each tensor."""
    by_tensor = MembersByTensor()
    for member in members:
        first = by_tensor.first.setdefault(id(member.tensor), member)
        if first is not member:
            by_tensor.several.setdefault(id(member.tensor), [first]).append(member)
    return by_tensor


def find_missing(live_model: LiveModel, groups: Iterable[LiveGroup], by_tensor: MembersByTensor) -> list[LiveParameter]:
    """Return the trainable parameters that are in no group, or none if the content of a group is unknown."""
    if not all(group.is_readable for group in groups):
        return []
    return [live for key, live in live_model.parameters.items() if key not in by_tensor.first and live.trainable]


def check_membership(
    live_model: LiveModel, by_tensor: MembersByTensor, missing: Sequence[LiveParameter]
) -> Iterator[Finding]:
    """Yield a finding for each tensor that does not belong in its group, and for each missing parameter."""
    unregistered = find_unregistered(live_model)
    unregistered_ids = {id(tensor) for part in unregistered for _, tensor in part.tensors}
    unknown: list[UnknownTensor] = []
    for key, first in by_tensor.first.items():
        live = live_model.parameters.get(key)
        members = by_tensor.several.get(key, (first,))
        if len(members) > 1:
            yield _duplicate(members, live)
        if live is not None:
            if first.name != live.name or len(members) > 1 or live.lazy or not live.trainable:
                yield from _check_live(live_model, live, members)
        elif key in live_model.buffers:
            yield _buffer(*live_model.buffers[key], first)
        elif not (first.tensor.is_leaf or first.tensor.retains_grad):
            yield _computed(first)
        elif key not in unregistered_ids:
            unknown.append(UnknownTensor(first.tensor, tuple(members)))
    yield from _check_unknown(live_model, by_tensor.first, unknown, missing)
    yield from (unregistered_finding(part, by_tensor.first) for part in unregistered)


def _check_unknown(
    live_model: LiveModel,
    held_ids: Collection[int],
    unknown: Sequence[UnknownTensor],
    missing: Sequence[LiveParameter],
) -> Iterator[Finding]:
    """Yield a finding for each tensor that is not in the model, and for each missing parameter."""
    if unknown and any(hasattr(live.tensor, "ds_id") for live in live_model.parameters.values()):
        yield _sharded(unknown[0], len(unknown), missing)
        return
    matched = match_to_model(live_model, unknown, missing)
    replaced: dict[str, Member] = {}
    for tensor in matched:
        if tensor.live is not None:
            replaced.setdefault(tensor.live.name, tensor.members[0])
    context = ModelContext(live_model, held_ids, replaced)
    yield from (unknown_tensor_finding(tensor, context) for tensor in matched)
    yield from (_missing(live, replaced.get(live.name)) for live in missing)


def _check_live(live_model: LiveModel, live: LiveParameter, members: Sequence[Member]) -> Iterator[Finding]:
    for member in members:
        if member.name is not None and member.name != live.name and member.name not in live.aliases:
            yield from _check_name(live_model, live, member)
    where = members[0].where
    if not live.trainable and live.tensor.grad is not None:
        yield codes.FROZEN.finding(
            live.name,
            f"{quoted(live.name)} {live.shape} in {where} is frozen (requires_grad=False), but its .grad is not None: "
            "a step still changes it, even if .grad is 0 (momentum, weight decay)",
            "set .grad of the parameter to None, or remove the parameter from the groups",
        )
    elif not live.trainable:
        yield codes.FROZEN.finding(
            live.name,
            f"{quoted(live.name)} {live.shape} in {where} is frozen (requires_grad=False): no step changes it while "
            "its .grad is None",
            "remove the parameter from the groups, or unfreeze it: requires_grad_(True)",
            severity="warning",
        )
    if live.lazy:
        yield codes.LAZY.finding(
            live.name,
            f"{quoted(live.name)} in {where} is uninitialised: its shape is unknown before the first forward pass",
            "run the model once on a sample batch before the first step",
            severity="warning",
        )


def _duplicate(members: Sequence[Member], live: LiveParameter | None) -> Finding:
    name = live.name if live is not None else members[0].name or ""
    where = " and ".join(member.where for member in members[:3]) + (" and more" if len(members) > 3 else "")
    shape = "" if live is not None and live.lazy else f" {shape_text(members[0].tensor)}"
    if live is not None and live.aliases and len({id(member.group) for member in members}) > 1:
        names = " and ".join(map(quoted, (live.name, *live.aliases)))
        return codes.TIED.finding(
            name,
            f"{names} are one tied parameter{shape}, but several groups hold it ({where}): a parameter can have only "
            "one set of options",
            f"keep the parameter in one group, under the name {quoted(live.name)}",
        )
    return codes.DUPLICATE.finding(
        name,
        f"{quoted(name) if name else 'one tensor'}{shape} is in the groups {plural(len(members), 'time')} ({where}), "
        "so each step updates it several times",
        "remove the repeated entries; named_parameters(remove_duplicate=False) yields tied parameters twice",
    )


def _buffer(name: str, buffer: Tensor, member: Member) -> Finding:
    return codes.BUFFER.finding(
        name,
        f"{quoted(name)} {tuple(buffer.shape)} in {member.where} is a buffer ({buffer.dtype}), which gets no gradient",
        "remove the buffer from the group, or register it as an nn.Parameter",
    )


def _sharded(unknown: UnknownTensor, count: int, missing: Sequence[LiveParameter]) -> Finding:
    example = f", such as {quoted(missing[0].name)} {missing[0].shape}," if missing else ""
    return codes.SHARDED.finding(
        missing[0].name if missing else "",
        f"the parameters{example} are placeholders of ZeRO-3 (ds_id), but the groups hold {plural(count, 'shard')} of "
        f"deepspeed.initialize(), such as {unknown.members[0].where} {shape_text(unknown.tensor)}: options cannot be "
        "checked by parameter",
        "validate the model and the optimizer before deepspeed.initialize()",
    )


def _computed(member: Member) -> Finding:
    return codes.NOT_A_PARAMETER.finding(
        member.name or "",
        f"{member.where} is the result of a computation (not a leaf), which no optimizer can train",
        "use the parameter that it was computed from: model.named_parameters()",
    )


def _missing(live: LiveParameter, replaced: Member | None) -> Finding:
    shape = "" if live.lazy else f" {live.shape}"
    if replaced is not None:
        return codes.MISSING.finding(
            live.name, f"{quoted(live.name)}{shape} is in no group: {replaced.where} holds an older object", REBIND_HINT
        )
    hint = "add the parameter to a group, or freeze it: requires_grad_(False)"
    if ".lora_" in f".{live.name}":
        hint = "build the groups after you add the adapter, or call rebind(optimizer, model, add_missing=...)"
    return codes.MISSING.finding(
        live.name,
        f"{quoted(live.name)}{shape} is trainable but in no group: no step changes it, and its .grad grows, because "
        "optimizer.zero_grad() skips it",
        hint,
    )
