"""Live groups by the optimizer that steps them, and what to call a tensor of theirs in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_optim import Schema, schema_of
from ckptkit.param_groups.live import Group, Member
from ckptkit.param_groups.parameters import Inventory

__all__ = ["Holder", "holders", "listed", "name_of"]

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Holder:
    """One optimizer, its groups and all that stands in them; groups that nobody steps yet have ``optimizer`` None."""

    optimizer: Any
    called: str
    groups: tuple[Group, ...]
    members: tuple[Member, ...]

    @cached_property
    def schema(self) -> Schema | None:
        """What its class keeps for a parameter, where it is one of torch.optim."""
        return None if self.optimizer is None else schema_of(type(self.optimizer))


def holders(groups: Sequence[Group], members: Sequence[Member]) -> list[Holder]:
    """Return the optimizers of ``groups`` in order, each with what it steps."""
    own: dict[int, tuple[Any, list[Group], list[Member]]] = {}
    for group in groups:
        own.setdefault(id(group.optimizer), (group.optimizer, [], []))[1].append(group)
    for member in members:
        own[id(member.group.optimizer)][2].append(member)
    several = len(own) > 1
    return [
        Holder(optimizer, _called(optimizer, number if several else None), tuple(some), tuple(inside))
        for number, (optimizer, some, inside) in enumerate(own.values())
    ]


def _called(optimizer: Any, number: int | None) -> str:
    kind = type(optimizer).__name__
    return kind if number is None else f"optimizer {number} ({kind})"


def name_of(inventory: Inventory, member: Member) -> str:
    """Return the FQN of what stands at ``member``, the name recorded with it, or nothing."""
    live = inventory.parameters.get(id(member.tensor))
    return live.name if live is not None else member.name or ""


def listed(inventory: Inventory, members: Sequence[Member]) -> str:
    """Return the first few of ``members`` by name, and how many more there are."""
    shown = [quoted(name) if (name := name_of(inventory, one)) else one.where for one in members[:_SHOWN]]
    more = f" and {plural(len(members) - _SHOWN, 'more', 'more')}" if len(members) > _SHOWN else ""
    return ", ".join(shown) + more
