"""How options are spread over groups: multipliers that nobody applies, one tensor for several, far too many groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural
from ckptkit.param_groups.holders import Holder, listed, name_of
from ckptkit.param_groups.live import Group, Member, unwrapped
from ckptkit.param_groups.parameters import Inventory
from ckptkit.param_groups.spec import is_tensor, number_fault

__all__ = ["check_spread", "options_of"]

_MULTIPLIERS = {"lr_scale": "lr", "lr_mult": "lr", "decay_mult": "weight_decay"}
# What tells groups apart without being trained with.
_LABELS = frozenset(
    {
        *("params", "param_names", "name", "group_name", "layer_id", *_MULTIPLIERS),
        *("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"),
    }
)
# From here on a step costs several times what it would in few groups: kernels run over one group at a time.
_MANY = 64
# Above what recipes use for everything: torch's defaults are 0 and 0.01, language models are trained with 0.1.
_STRONG = 0.2


def options_of(group: Group, *without: str) -> tuple[tuple[str, str], ...]:
    """Return what a group trains with, in a form that can be compared, leaving out ``without``."""
    return tuple(sorted((key, repr(value)) for key, value in group.options.items() if key not in _LABELS | {*without}))


def check_spread(inventory: Inventory, holders: Sequence[Holder], schedulers: Iterable[Any]) -> Iterator[Finding]:
    """Yield what only several groups together show; ``schedulers`` may apply the multipliers among their options."""
    scaled = {id(unwrapped(scheduler.optimizer)) for scheduler in schedulers if _applies_scales(scheduler)}
    for holder in holders:
        if holder.optimizer is None:
            continue
        if holder.schema is not None:
            for key, option in _MULTIPLIERS.items():
                if option != "lr" or id(holder.optimizer) not in scaled:
                    yield from _unapplied(holder, key, option)
        if holder.schema is None or holder.schema.name != "Muon":  # it steps no vector at all
            yield from _decayed(inventory, holder)
        distinct = len({options_of(group) for group in holder.groups})
        if len(holder.groups) >= _MANY and distinct * 4 <= len(holder.groups):
            yield Finding(
                "groups.many",
                "note",
                "",
                f"{holder.called} has {len(holder.groups):,} groups with {plural(distinct, 'set')} of options among "
                "them: fused and foreach kernels run over one group at a time",
                "put parameters with the same options into one group",
            )
    yield from _one_tensor(holders)


def _applies_scales(scheduler: Any) -> bool:
    """Tell a scheduler of timm's kind, which multiplies ``lr_scale`` in, by the method that does it."""
    return hasattr(scheduler, "update_groups") and hasattr(scheduler, "optimizer")


def _unapplied(holder: Holder, key: str, option: str) -> Iterator[Finding]:
    base = _number(holder.optimizer.defaults.get(option))
    waiting: list[Group] = []
    for group in holder.groups:
        scale = _number(group.options.get(key))
        value = _number(group.options.get("initial_lr" if option == "lr" else option, group.options.get(option)))
        # Recipes that resolve the multiplier leave it in the group too: there the option differs from the default.
        if scale is not None and scale != 1 and value is not None and value == base != 0:
            waiting.append(group)
    if waiting:
        yield Finding(
            "groups.multiplier",
            "warning",
            "",
            f"{key} is in {plural(len(waiting), 'group')} of {holder.called} (the first is {waiting[0].where}), where "
            f"{option} is the default {base:g}: neither the optimizer nor a scheduler of torch multiplies it in",
            f'pass the scheduler that reads it, or apply it: group["{option}"] *= group["{key}"]',
        )


def _number(value: Any) -> float | None:
    return None if value is None or number_fault(value) is not None else float(value)


def _decayed(inventory: Inventory, holder: Holder) -> Iterator[Finding]:
    """Note vectors under weight decay, where other vectors were kept from it or the decay is strong.

    Without either sign it is what every optimizer does by default, and nobody's slip.
    """
    within: dict[int, list[Member]] = defaultdict(list)
    for member in holder.members:
        if _vector(member) is not None:
            within[id(member.group)].append(member)
    decay = {id(group): _number(group.options.get("weight_decay")) or 0.0 for group in holder.groups}
    spared = [members for key, members in within.items() if not decay[key] and _of_vectors(members)]
    for group in holder.groups:
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
                name_of(inventory, vectors[0]),
                f"{group.where} decays {plural(len(vectors), 'vector')} (norms, biases, scales) by "
                f"{decay[id(group)]:g}, {why}: {listed(inventory, vectors)}",
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


def _one_tensor(holders: Sequence[Holder]) -> Iterator[Finding]:
    stand: dict[int, list[Group]] = defaultdict(list)
    for group in chain.from_iterable(holder.groups for holder in holders if holder.optimizer is not None):
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
