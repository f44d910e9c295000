"""What the class of an optimizer demands of its groups, where torch finds out late or never."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.param_groups.holders import Holder, listed, name_of
from ckptkit.param_groups.live import Group, Member
from ckptkit.param_groups.parameters import Inventory
from ckptkit.param_groups.spec import is_tensor

__all__ = ["check_demands"]

# Devices for which torch has no capturable step.
_NOT_CAPTURABLE = frozenset({"cpu", "mps"})
# The reference implementation of Muon by its author asserts that a group has exactly these keys.
_MUON_KEYS = {
    True: frozenset({"params", "lr", "momentum", "weight_decay", "use_muon"}),
    False: frozenset({"params", "lr", "betas", "eps", "weight_decay", "use_muon"}),
}


def check_demands(inventory: Inventory, holders: Sequence[Holder]) -> Iterator[Finding]:
    """Yield what a step of each optimizer would refuse, or do otherwise than its class says."""
    for holder in holders:
        within: dict[int, list[Member]] = {id(group): [] for group in holder.groups}
        for member in holder.members:
            within[id(member.group)].append(member)
        if holder.optimizer is None:
            yield from _two_kinds(inventory, holder, within)
            continue
        if holder.schema is None:
            continue
        if holder.schema.name == "Muon":
            yield from _matrices(inventory, holder.called, holder.members)
        if holder.schema.shared and len(holder.groups) > 1:
            yield Finding(
                "groups.one-group",
                "error",
                "",
                f"{holder.called} has {len(holder.groups)} groups, and takes one: its next step fails",
                "build it with all parameters in one list; it knows no options of a single parameter",
            )
        yield from _decoupled(holder)
        for group in holder.groups:
            yield from _kernels(inventory, holder, group, within[id(group)])


def _matrices(inventory: Inventory, reader: str, members: Sequence[Member]) -> Iterator[Finding]:
    for member in members:
        if (shape := _shape(member.tensor)) is not None and len(shape) != 2:
            name = name_of(inventory, member)
            yield Finding(
                "groups.matrices-only",
                "error",
                name,
                f"{quoted(name) if name else member.where} {shape} in {member.where} is no matrix, and {reader} steps "
                "nothing else: add_param_group does not look, and the first step fails",
                "give vectors, embeddings and convolutions to a second optimizer, such as AdamW",
            )


def _two_kinds(inventory: Inventory, holder: Holder, within: Mapping[int, Sequence[Member]]) -> Iterator[Finding]:
    """Hold groups that say ``use_muon``, each of them, to what the optimizer that reads it asserts without a word."""
    if not all("use_muon" in group.options for group in holder.groups):
        return
    for group in holder.groups:
        muon = bool(group.options["use_muon"])
        extra = sorted(str(key) for key in group.options if key not in _MUON_KEYS[muon])
        if extra:
            yield Finding(
                "groups.option-set",
                "warning",
                "",
                f"{group.where} has {', '.join(map(quoted, extra))} beside use_muon: MuonWithAuxAdam asserts that "
                f"its keys are {', '.join(sorted(_MUON_KEYS[muon]))} and no others",
                "leave the others out of the groups that it is built with",
            )
        for member in within[id(group)] if muon else ():
            if (shape := _shape(member.tensor)) is not None and len(shape) < 2:
                name = name_of(inventory, member)
                yield Finding(
                    "groups.matrices-only",
                    "error",
                    name,
                    f"{quoted(name) if name else member.where} {shape} in {member.where} is a vector under "
                    "use_muon = True, which orthogonalises matrices",
                    "move it to a group with use_muon = False",
                )


def _decoupled(holder: Holder) -> Iterator[Finding]:
    wanted = holder.optimizer.defaults.get("decoupled_weight_decay")
    if wanted is None:
        return
    other = [group for group in holder.groups if bool(group.options.get("decoupled_weight_decay", wanted)) != wanted]
    if not other:
        return
    # Some groups alone may be meant so; all of them are what a file of the other class leaves behind.
    meant = len(other) < len(holder.groups) and holder.schema is not None and holder.schema.name != "AdamW"
    acts = "subtracts weight decay from the weights" if not wanted else "adds weight decay to the gradient"
    yield Finding(
        "groups.decoupled",
        "warning" if meant else "error",
        "",
        f"{other[0].where} says decoupled_weight_decay={not wanted}, which {holder.called} was not built with: it now "
        f"{acts}, as after a state_dict of {'AdamW' if not wanted else 'Adam'} was loaded",
        f'set it back: group["decoupled_weight_decay"] = {wanted}, or build the class that the state was saved from',
    )


def _kernels(inventory: Inventory, holder: Holder, group: Group, members: Sequence[Member]) -> Iterator[Finding]:
    options, defaults = group.options, holder.optimizer.defaults
    fast = next((key for key in ("fused", "foreach") if key in defaults and options.get(key)), None)
    if "capturable" in defaults and options.get("capturable") and fast != "fused":
        slow = [member for member in members if member.tensor.device.type in _NOT_CAPTURABLE]
        if slow:
            yield Finding(
                "groups.capturable",
                "error",
                name_of(inventory, slow[0]),
                f"{group.where} has capturable=True with {plural(len(slow), 'parameter')} on "
                f"{slow[0].tensor.device}, where the step fails: {listed(inventory, slow)}",
                'set group["capturable"] = False; a state_dict saved on a GPU brings it along',
            )
    if fast is None:
        return
    meshes = {id(getattr(member.tensor, "device_mesh", None)): member for member in members}
    plain = [member for member in members if not hasattr(member.tensor, "device_mesh")]
    if plain and len(meshes) > 1:
        yield Finding(
            "groups.mixed",
            "error",
            name_of(inventory, plain[0]),
            f"{group.where} has {fast}=True with {plural(len(plain), 'plain tensor')} among DTensors, which one kernel "
            f"cannot step together: {listed(inventory, plain)}",
            f"put them into a group of their own, or set {fast}=False",
        )
    adam = holder.schema is not None and holder.schema.name in {"Adam", "AdamW"}
    if adam and fast == "foreach" and is_tensor(options.get("lr")) and not options.get("capturable"):
        yield Finding(
            "groups.option-value",
            "error",
            "",
            f"{group.where}: lr is a tensor, which foreach=True without capturable=True does not take",
            "make it a number: float(lr), or set foreach=False",
        )


def _shape(tensor: Any) -> tuple[int, ...] | None:
    try:
        return tuple(tensor.shape)
    except RuntimeError:  # uninitialised
        return None
