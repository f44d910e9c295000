"""What the class of an optimizer demands of its groups, where torch finds out late or never."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_bridge import shape_or_none
from ckptkit.core.torch_optim import OPTIONS, initial_lr, options_of_kind
from ckptkit.param_groups.live import LiveGroup, LiveOptimizer, Member, member_name, member_names, unwrap_optimizer
from ckptkit.param_groups.parameters import Inventory
from ckptkit.param_groups.spec import is_tensor, number_fault

__all__ = ["check_across_groups", "check_optimizer_rules", "trained_options"]


# Devices for which torch has no capturable step.
_NOT_CAPTURABLE = frozenset({"cpu", "mps"})
# The reference implementation of Muon by its author asserts that a group has exactly these keys.
_MUON_KEYS = {
    True: frozenset({"params", "lr", "momentum", "weight_decay", "use_muon"}),
    False: frozenset({"params", "lr", "betas", "eps", "weight_decay", "use_muon"}),
}


def check_optimizer_rules(inventory: Inventory, optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    """Yield what a step of each optimizer would refuse, or do otherwise than its class says."""
    for optimizer in optimizers:
        within: dict[int, list[Member]] = {id(group): [] for group in optimizer.groups}
        for member in optimizer.members:
            within[id(member.group)].append(member)
        if optimizer.instance is None:
            yield from _two_kinds(inventory, optimizer, within)
            continue
        if optimizer.schema is None:
            continue
        if optimizer.schema.name == "Muon":
            yield from _matrices(inventory, optimizer.label, optimizer.members)
        if optimizer.schema.has_shared_state and len(optimizer.groups) > 1:
            yield Finding(
                "groups.one-group",
                "error",
                "",
                f"{optimizer.label} has {len(optimizer.groups)} groups, and takes one: its next step fails",
                "build it with all parameters in one list; it knows no options of a single parameter",
            )
        yield from _decoupled(optimizer)
        for group in optimizer.groups:
            yield from _kernels(inventory, optimizer, group, within[id(group)])


def _matrices(inventory: Inventory, reader: str, members: Sequence[Member]) -> Iterator[Finding]:
    for member in members:
        if (shape := shape_or_none(member.tensor)) is not None and len(shape) != 2:
            name = member_name(inventory, member)
            yield Finding(
                "groups.matrices-only",
                "error",
                name,
                f"{quoted(name) if name else member.where} {shape} in {member.where} is no matrix, and {reader} steps "
                "nothing else: add_param_group does not look, and the first step fails",
                "give vectors, embeddings and convolutions to a second optimizer, such as AdamW",
            )


def _two_kinds(
    inventory: Inventory, optimizer: LiveOptimizer, within: Mapping[int, Sequence[Member]]
) -> Iterator[Finding]:
    """Hold groups that say ``use_muon``, each of them, to what the optimizer that reads it asserts without a word."""
    if not all("use_muon" in group.options for group in optimizer.groups):
        return
    for group in optimizer.groups:
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
            if (shape := shape_or_none(member.tensor)) is not None and len(shape) < 2:
                name = member_name(inventory, member)
                yield Finding(
                    "groups.matrices-only",
                    "error",
                    name,
                    f"{quoted(name) if name else member.where} {shape} in {member.where} is a vector under "
                    "use_muon = True, which orthogonalises matrices",
                    "move it to a group with use_muon = False",
                )


def _decoupled(optimizer: LiveOptimizer) -> Iterator[Finding]:
    wanted = optimizer.instance.defaults.get("decoupled_weight_decay")
    if wanted is None:
        return
    other = [group for group in optimizer.groups if bool(group.options.get("decoupled_weight_decay", wanted)) != wanted]
    if not other:
        return
    # Some groups alone may be meant so; all of them are what a file of the other class leaves behind.
    meant = len(other) < len(optimizer.groups) and optimizer.schema is not None and optimizer.schema.name != "AdamW"
    acts = "subtracts weight decay from the weights" if not wanted else "adds weight decay to the gradient"
    yield Finding(
        "groups.decoupled",
        "warning" if meant else "error",
        "",
        f"{other[0].where} says decoupled_weight_decay={not wanted}, which {optimizer.label} was not built with: it "
        f"now {acts}, as after a state_dict of {'AdamW' if not wanted else 'Adam'} was loaded",
        f'set it back: group["decoupled_weight_decay"] = {wanted}, or build the class that the state was saved from',
    )


def _kernels(
    inventory: Inventory, optimizer: LiveOptimizer, group: LiveGroup, members: Sequence[Member]
) -> Iterator[Finding]:
    options, defaults = group.options, optimizer.instance.defaults
    fast = next((key for key in ("fused", "foreach") if key in defaults and options.get(key)), None)
    if "capturable" in defaults and options.get("capturable") and fast != "fused":
        slow = [member for member in members if member.tensor.device.type in _NOT_CAPTURABLE]
        if slow:
            yield Finding(
                "groups.capturable",
                "error",
                member_name(inventory, slow[0]),
                f"{group.where} has capturable=True with {plural(len(slow), 'parameter')} on "
                f"{slow[0].tensor.device}, where the step fails: {member_names(inventory, slow)}",
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
            member_name(inventory, plain[0]),
            f"{group.where} has {fast}=True with {plural(len(plain), 'plain tensor')} among DTensors, which one kernel "
            f"cannot step together: {member_names(inventory, plain)}",
            f"put them into a group of their own, or set {fast}=False",
        )
    adam = optimizer.schema is not None and optimizer.schema.name in {"Adam", "AdamW"}
    if adam and fast == "foreach" and is_tensor(options.get("lr")) and not options.get("capturable"):
        yield Finding(
            "groups.option-value",
            "error",
            "",
            f"{group.where}: lr is a tensor, which foreach=True without capturable=True does not take",
            "make it a number: float(lr), or set foreach=False",
        )


_MULTIPLIERS = {option.name: option.multiplies for option in OPTIONS.values() if option.multiplies}
# What tells groups apart without being trained with.
_LABELS = options_of_kind("members", "name", "recipe", "schedule")
# From here on a step costs several times what it would in few groups: kernels run over one group at a time.
_MANY = 64
# Above what recipes use for everything: torch's defaults are 0 and 0.01, language models are trained with 0.1.
_STRONG = 0.2


def trained_options(group: LiveGroup, *without: str) -> tuple[tuple[str, str], ...]:
    """Return what a group trains with, in a form that can be compared, leaving out ``without``."""
    return tuple(sorted((key, repr(value)) for key, value in group.options.items() if key not in _LABELS | {*without}))


def check_across_groups(
    inventory: Inventory, optimizers: Sequence[LiveOptimizer], schedulers: Iterable[Any]
) -> Iterator[Finding]:
    """Yield what only several groups together show; ``schedulers`` may apply the multipliers among their options."""
    scaled = {id(unwrap_optimizer(scheduler.optimizer)) for scheduler in schedulers if _applies_scales(scheduler)}
    for optimizer in optimizers:
        if optimizer.instance is None:
            continue
        if optimizer.schema is not None:
            for key, option in _MULTIPLIERS.items():
                if option != "lr" or id(optimizer.instance) not in scaled:
                    yield from _unapplied(optimizer, key, option)
        if optimizer.schema is None or optimizer.schema.name != "Muon":  # it steps no vector at all
            yield from _decayed(inventory, optimizer)
        distinct = len({trained_options(group) for group in optimizer.groups})
        if len(optimizer.groups) >= _MANY and distinct * 4 <= len(optimizer.groups):
            yield Finding(
                "groups.many",
                "note",
                "",
                f"{optimizer.label} has {len(optimizer.groups):,} groups with {plural(distinct, 'set')} of options "
                "among them: fused and foreach kernels run over one group at a time",
                "put parameters with the same options into one group",
            )
    yield from _one_tensor(optimizers)


def _applies_scales(scheduler: Any) -> bool:
    """Tell a scheduler of timm's kind, which multiplies ``lr_scale`` in, by the method that does it."""
    return hasattr(scheduler, "update_groups") and hasattr(scheduler, "optimizer")


def _unapplied(optimizer: LiveOptimizer, key: str, option: str) -> Iterator[Finding]:
    base = _number(optimizer.instance.defaults.get(option))
    waiting: list[LiveGroup] = []
    for group in optimizer.groups:
        scale = _number(group.options.get(key))
        value = _number(initial_lr(group.options) if option == "lr" else group.options.get(option))
        # Recipes that resolve the multiplier leave it in the group too: there the option differs from the default.
        if scale is not None and scale != 1 and value is not None and value == base != 0:
            waiting.append(group)
    if waiting:
        yield Finding(
            "groups.multiplier",
            "warning",
            "",
            f"{key} is in {plural(len(waiting), 'group')} of {optimizer.label} (the first is {waiting[0].where}), "
            f"where {option} is the default {base:g}: neither the optimizer nor a scheduler of torch multiplies it in",
            f'pass the scheduler that reads it, or apply it: group["{option}"] *= group["{key}"]',
        )


def _number(value: Any) -> float | None:
    return None if value is None or number_fault(value) is not None else float(value)


def _decayed(inventory: Inventory, optimizer: LiveOptimizer) -> Iterator[Finding]:
    """Note vectors under weight decay, where other vectors were kept from it or the decay is strong.

    Without either sign it is what every optimizer does by default, and nobody's slip.
    """
    within: dict[int, list[Member]] = defaultdict(list)
    for member in optimizer.members:
        if _vector(member) is not None:
            within[id(member.group)].append(member)
    decay = {id(group): _number(group.options.get("weight_decay")) or 0.0 for group in optimizer.groups}
    spared = [members for key, members in within.items() if not decay[key] and _of_vectors(members)]
    for group in optimizer.groups:
        vectors = [member for member in within[id(group)] if _vector(member)]
        strong = decay[id(group)] >= _STRONG
        if vectors and (strong or (spared and decay[id(group)])):
            why = (
                f"while {plural(sum(map(len, spared)), 'parameter')} without decay are nearly all of this kind"
                if spared
                else "which pulls norms and biases to zero"
            )
            yield Finding(
                "groups.decay",
                "note",
                member_name(inventory, vectors[0]),
                f"{group.where} decays {plural(len(vectors), 'vector')} (norms, biases, scales) by "
                f"{decay[id(group)]:g}, {why}: {member_names(inventory, vectors)}",
                "if that is not meant, give them a group with weight_decay = 0",
            )


def _vector(member: Member) -> bool | None:
    try:
        return len(member.tensor.shape) < 2
    except RuntimeError:  # uninitialised: it says one dimension, whatever it will have
        return None


def _of_vectors(members: Sequence[Member]) -> bool:
    vectors = sum(map(bool, map(_vector, members)))
    return vectors >= 2 and vectors >= 0.75 * len(members)


def _one_tensor(optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    stand: dict[int, list[LiveGroup]] = defaultdict(list)
    for group in chain.from_iterable(optimizer.groups for optimizer in optimizers if optimizer.instance is not None):
        if is_tensor(group.options.get("lr")):
            stand[id(group.options["lr"])].append(group)
    for groups in stand.values():
        if len(groups) > 1:
            yield Finding(
                "groups.shared-lr",
                "warning",
                "",
                f"{groups[0].where} and {groups[1].where} have one tensor as lr"
                + (f", and {plural(len(groups) - 2, 'more group')}" if groups[2:] else "")
                + ": what is written into one, as schedulers do, is the lr of all",
                "give each group a tensor of its own: lr.clone()",
            )
