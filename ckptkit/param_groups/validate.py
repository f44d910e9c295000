"""Proof that live groups hold every trainable parameter of the model once, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptkit.errors import GroupsError
from ckptkit.findings import Finding, Report
from ckptkit.param_groups.demands import check_demands
from ckptkit.param_groups.holders import holders
from ckptkit.param_groups.inventory import Inventory, LiveParameter, bare_name, take_inventory
from ckptkit.param_groups.members import Member, read_groups
from ckptkit.param_groups.options import check_options
from ckptkit.param_groups.schedulers import check_schedulers, read_schedulers
from ckptkit.param_groups.spread import check_spread
from ckptkit.param_groups.state import check_state
from ckptkit.param_groups.state_values import check_state_values
from ckptkit.param_groups.strangers import Stranger, explain, identify
from ckptkit.text import plural, quoted

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

__all__ = ["validate_param_groups"]


def validate_param_groups(model: Module, groups: Optimizer | Iterable[Any], *, schedulers: Any = None) -> Report:
    """Report whether ``groups`` train every trainable parameter of ``model`` exactly once, and nothing else.

    ``groups`` is a list of group dicts, a list of parameters or of ``(name, parameter)`` pairs, an
    optimizer, or a list of optimizers that share the model. Membership is by identity: equal values
    prove nothing. Nothing is consumed or changed; where a group holds a one-shot iterator, what it
    stands for stays unknown, and so does what is missing. Of an optimizer the options, the state and,
    with ``schedulers`` (one, or several), the schedules are looked at too: state is read once, every value of it.

    Codes: ``groups.missing``, ``duplicate``, ``stale``, ``foreign``, ``frozen``, ``empty``, ``one-shot``,
    ``unordered``, ``buffer``, ``not-a-parameter``, ``names``, ``lazy``; of options ``option-value``,
    ``option-unread``, ``option-missing``, ``option-set``, ``multiplier``, ``decay``, ``shared-lr``, ``many``,
    ``matrices-only``, ``one-group``, ``decoupled``, ``capturable``, ``mixed``; of state ``state-shape``,
    ``state-dtype``, ``state-device``, ``state-incomplete``, ``state-orphan``, ``state-stray``, ``state-steps``,
    ``state-absent``, ``state-empty``, ``state-value``, ``state-shared``, ``state-dead``; of schedulers
    ``scheduler-length``, ``scheduler-base-lr``, ``scheduler-initial-lr``, ``scheduler-optimizer``, ``scheduler-flat``.
    Raises ``GroupsError`` where ``model``, ``groups`` or ``schedulers`` is nothing of the kind.
    """
    inventory = take_inventory(model)
    driving = read_schedulers(schedulers)
    read, members, findings = read_groups(groups)
    owners = holders(read, members)
    findings.extend(check_options(read))
    findings.extend(check_demands(inventory, owners))
    findings.extend(check_spread(inventory, owners, driving))
    findings.extend(check_state(inventory, owners))
    findings.extend(check_state_values(inventory, owners))
    findings.extend(check_schedulers(owners, driving))
    places: dict[int, list[Member]] = {}
    for member in members:
        places.setdefault(id(member.tensor), []).append(member)
    missing: list[LiveParameter] = []
    if all(group.known for group in read):
        missing = [live for live in inventory.trainable() if id(live.tensor) not in places]
        if members and not missing:
            # The half of a split that nothing fell into: the Trainer of transformers always makes two groups, and with
            # LoRA the one without decay is empty.
            findings = [replace(one, severity="note") if one.code == "groups.empty" else one for one in findings]
    strangers: list[Stranger] = []
    for key, stand in places.items():
        live = inventory.parameters.get(key)
        if len(stand) > 1:
            findings.append(_duplicate(stand, live))
        if live is not None:
            findings.extend(_check_live(inventory, live, stand))
        elif key in inventory.buffers:
            findings.append(_buffer(inventory.buffers[key][0], stand[0]))
        elif not _is_leaf(stand[0].tensor):
            findings.append(_computed(stand[0]))
        else:
            strangers.append(Stranger(stand[0].tensor, tuple(stand)))
    older: dict[str, Member] = {}
    for stranger in identify(inventory, strangers, missing):
        findings.append(explain(stranger))
        if stranger.live is not None:
            older.setdefault(stranger.live.name, stranger.places[0])
    findings.extend(_missing(live, older.get(live.name)) for live in missing)
    return Report(tuple(findings), GroupsError)


def _check_live(inventory: Inventory, live: LiveParameter, stand: Sequence[Member]) -> Iterator[Finding]:
    for member in stand:
        if member.name is not None and member.name != live.name and member.name not in live.aliases:
            yield from _check_name(inventory, live, member)
    if not live.trainable:
        moves = live.tensor.grad is not None
        yield Finding(
            "groups.frozen",
            "error" if moves else "warning",
            live.name,
            f"{quoted(live.name)} in {stand[0].where} is frozen (requires_grad=False)"
            + (", but its .grad is not None, so the optimizer still moves it" if moves else ""),
            "set its .grad to None, or leave it out of the groups" if moves else "leave it out of the groups",
        )
    if live.lazy:
        yield Finding(
            "groups.lazy",
            "warning",
            live.name,
            f"{quoted(live.name)} in {stand[0].where} is uninitialised until the first forward pass",
            "run the model once on a sample batch before the first step",
        )


def _check_name(inventory: Inventory, live: LiveParameter, member: Member) -> Iterator[Finding]:
    name = member.name or ""
    bare = bare_name(name)
    true = [bare_name(known) for known in (live.name, *live.aliases)]
    # Recorded from a part of the model, as of the network inside a LightningModule, it lacks the beginning.
    if bare in true or (inventory.named(name) is None and any(known.endswith(f".{bare}") for known in true)):
        return
    # A name that nobody has is what parametrize, prune and LoRA leave behind; the name of another one misleads.
    lies = inventory.named(name) is not None
    yield Finding(
        "groups.names",
        "error" if lies else "warning",
        live.name,
        f"{member.where} is recorded as {quoted(name)} but is {quoted(live.name)}"
        + (", while the model has another parameter of that name" if lies else ", as the model calls it now"),
        "build the optimizer again from model.named_parameters(), so that its state is saved under true names",
    )


def _duplicate(stand: Sequence[Member], live: LiveParameter | None) -> Finding:
    name = live.name if live is not None else stand[0].name or ""
    shown = " and ".join(member.where for member in stand[:3]) + (" and more" if len(stand) > 3 else "")
    return Finding(
        "groups.duplicate",
        "error",
        name,
        f"{quoted(name) if name else 'one tensor'} is in the groups {plural(len(stand), 'time')}, as {shown}: "
        "each of them moves it",
        "keep one of them; tied parameters come twice from named_parameters(remove_duplicate=False)",
    )


def _buffer(name: str, member: Member) -> Finding:
    return Finding(
        "groups.buffer",
        "error",
        name,
        f"{quoted(name)} in {member.where} is a buffer, which gets no gradient",
        "leave it out, or register it as an nn.Parameter",
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
        hint = "build the groups and the optimizer again, after the last change to the model"
    else:
        message = f"{quoted(live.name)}{shape} is trainable but in no group: no step moves it, and its .grad piles up"
        hint = "add it to a group, or freeze it: requires_grad_(False)"
    return Finding("groups.missing", "error", live.name, message, hint)
