"""Read live param groups from a list, an optimizer or several optimizers, without changing or consuming them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import kind_of, plural, quoted
from ckptkit.core.torch_bridge import get_or_none, shape_or_none
from ckptkit.core.torch_optim import OptimizerSchema, schema_of, source_of_names
from ckptkit.errors import GroupsError
from ckptkit.param_groups import codes
from ckptkit.param_groups.parameters import LiveModel
from ckptkit.param_groups.spec.fields import is_tensor

__all__ = [
    "LiveGroup",
    "LiveGroups",
    "LiveOptimizer",
    "Member",
    "group_dicts",
    "member_keys",
    "member_name",
    "member_names",
    "read_groups",
    "single_optimizer",
    "unwrap_optimizer",
]

_ACCEPTED = "pass the list of group dicts, a list of parameters, an optimizer, or a list of optimizers"
_SHOWN = 3


@dataclass(frozen=True, slots=True, eq=False)
class LiveGroup:
    """One group: ``where`` names its position in messages, and ``optimizer`` is None for a group without optimizer."""

    where: str
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    is_readable: bool = True  # False where reading the members would consume them

    @property
    def name(self) -> str | None:
        """The name in the options of the group, or None."""
        name = self.options.get("name", self.options.get("group_name"))
        return None if name is None else str(name)


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One entry of a group: the tensor, its index in ``params``, and the name recorded with it."""

    group: LiveGroup
    index: int
    tensor: Any  # a strong reference, so that its id is not reused while ids are compared
    name: str | None

    @property
    def where(self) -> str:
        """The group and the index, for messages: ``group 0[3]``."""
        return f"{self.group.where}[{self.index}]"

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the tensor, or None before the first forward pass of a lazy module."""
        return shape_or_none(self.tensor)


@dataclass(frozen=True, eq=False)
class LiveOptimizer:
    """One optimizer with its groups and all their members; ``instance`` is None for groups without an optimizer."""

    instance: Any
    label: str
    groups: tuple[LiveGroup, ...]
    members: tuple[Member, ...]

    @cached_property
    def schema(self) -> OptimizerSchema | None:
        """The schema of the optimizer class, or None for a class outside torch.optim."""
        return None if self.instance is None else schema_of(type(self.instance))

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """The default options of the optimizer; empty where the class keeps none."""
        found = get_or_none(self.instance, "defaults")
        return found if isinstance(found, Mapping) else {}

    @property
    def class_name(self) -> str:
        """The name of the optimizer class."""
        return type(self.instance).__name__

    def members_of(self, group: LiveGroup) -> tuple[Member, ...]:
        """Return the members of ``group``, in order."""
        return tuple(self._members.get(id(group), ()))

    @cached_property
    def _members(self) -> Mapping[int, Sequence[Member]]:
        found: dict[int, list[Member]] = {}
        for member in self.members:
            found.setdefault(id(member.group), []).append(member)
        return found


@dataclass(frozen=True, eq=False)
class LiveGroups:
    """All groups and members that were given, in order, and findings about the form of the argument."""

    groups: tuple[LiveGroup, ...]
    members: tuple[Member, ...]
    findings: tuple[Finding, ...]

    @cached_property
    def optimizers(self) -> tuple[LiveOptimizer, ...]:
        """The optimizers in order, each with its groups and members."""
        found: dict[int, tuple[Any, list[LiveGroup], list[Member]]] = {}
        for group in self.groups:
            found.setdefault(id(group.optimizer), (group.optimizer, [], []))[1].append(group)
        for member in self.members:
            found[id(member.group.optimizer)][2].append(member)
        return tuple(
            LiveOptimizer(optimizer, _label(optimizer, number if len(found) > 1 else None), tuple(groups), tuple(held))
            for number, (optimizer, groups, held) in enumerate(found.values())
        )


def _label(optimizer: Any, number: int | None) -> str:
    kind = type(optimizer).__name__
    return kind if number is None else f"optimizer {number} ({kind})"


def read_groups(given: Any) -> LiveGroups:
    """Return the groups in ``given``, their members, and findings about its form.

    Raises ``GroupsError`` where ``given`` cannot hold parameters at all.
    """
    groups: list[LiveGroup] = []
    members: list[Member] = []
    findings: list[Finding] = []
    for group, params, names in _given_groups(given):
        items = _params_list(group, params, findings)
        if items is None:
            groups.append(LiveGroup(group.where, group.options, group.optimizer, is_readable=False))
            continue
        groups.append(group)
        if not items:
            findings.append(
                codes.EMPTY.finding(
                    "",
                    f"{group.where} is empty, so nothing trains with its options; was it built from a filter() or a "
                    "generator that had been read before?",
                    "build the groups from lists, because an iterator can be read only once; or remove this group",
                )
            )
        members.extend(_members(group, items, names, findings))
    return LiveGroups(tuple(groups), tuple(members), tuple(findings))


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate, Lightning and others that pass its groups through.

    Raises ``GroupsError`` for an optimizer of DeepSpeed: its groups hold flat copies instead of the parameters.
    """
    while True:
        if type(optimizer).__module__.partition(".")[0] == "deepspeed":
            raise GroupsError(
                f"the optimizer is DeepSpeed's {type(optimizer).__name__}, and its groups hold flat copies, not the "
                "parameters of the model",
                hint="check the optimizer before you pass it to deepspeed.initialize or accelerator.prepare",
            )
        inner = get_or_none(optimizer, "optimizer")
        if inner is optimizer or get_or_none(inner, "param_groups") is None:
            return optimizer
        optimizer = inner


def single_optimizer(given: Any) -> Any:
    """Return ``given`` unwrapped; raise ``GroupsError`` where it is not one torch optimizer."""
    optimizer = unwrap_optimizer(given)
    if isinstance(optimizer, type) or get_or_none(optimizer, "param_groups") is None:
        raise GroupsError(f"an optimizer cannot be a {type(given).__name__}", hint="pass one torch optimizer")
    for name, kind in (("state", MutableMapping), ("defaults", Mapping)):
        if not isinstance(found := get_or_none(optimizer, name), kind):
            raise GroupsError(
                f"the {name} of {type(optimizer).__name__} is {kind_of(found)}, not a dict",
                hint="pass one torch optimizer",
            )
    for group in group_dicts(optimizer):
        if not isinstance(group.get("params"), MutableSequence):
            raise GroupsError(
                f"a group of {type(optimizer).__name__} has {kind_of(group.get('params'))} as params, not a list",
                hint="torch makes the lists: build the optimizer again",
            )
    return optimizer


def _is_optimizer(value: object) -> bool:
    import torch

    return isinstance(value, torch.optim.Optimizer)


def group_dicts(optimizer: Any) -> list[dict[str, Any]]:
    """Return the group dicts of an optimizer; raise ``GroupsError`` where ``param_groups`` is not a list of dicts."""
    groups = get_or_none(optimizer, "param_groups")
    is_list = isinstance(groups, Sequence) and not isinstance(groups, str | bytes)
    if not is_list or not all(isinstance(group, Mapping) for group in groups):
        raise GroupsError(
            f"param_groups of {type(optimizer).__name__} is {kind_of(groups)}, not a list of dicts", hint=_ACCEPTED
        )
    return list(groups)


def _given_groups(given: Any) -> Iterator[tuple[LiveGroup, Any, Any]]:
    """Yield each group with its ``params`` and its ``param_names``, both unread."""
    if get_or_none(given, "param_groups") is not None or _is_optimizer(given):
        optimizer = unwrap_optimizer(given)
        yield from _from_dicts(group_dicts(optimizer), optimizer=optimizer)
        return
    is_other = isinstance(given, str | bytes | Mapping) or hasattr(given, "named_parameters") or is_tensor(given)
    if is_other or not isinstance(given, Iterable):
        raise GroupsError(f"param groups cannot be a {type(given).__name__}", hint=_ACCEPTED)
    items = None if _is_iterator(given) else list(given)
    if items and get_or_none(items[0], "param_groups") is not None:
        if not all(get_or_none(item, "param_groups") is not None for item in items):
            raise GroupsError("the list holds both optimizers and other things", hint=_ACCEPTED)
        for number, optimizer in enumerate(map(unwrap_optimizer, items)):
            yield from _from_dicts(group_dicts(optimizer), f"optimizer {number}, ", optimizer)
    elif items and any(isinstance(item, Mapping) for item in items):
        if not all(isinstance(item, Mapping) for item in items):
            raise GroupsError("the list holds both group dicts and other things", hint=_ACCEPTED)
        yield from _from_dicts(items)
    else:
        yield LiveGroup("group 0"), given, None


def _from_dicts(
    groups: Iterable[Mapping[str, Any]], prefix: str = "", optimizer: Any = None
) -> Iterator[tuple[LiveGroup, Any, Any]]:
    for number, group in enumerate(groups):
        name = group.get("name", group.get("group_name"))
        suffix = f" ({quoted(name)})" if isinstance(name, str) and name else ""
        live = LiveGroup(f"{prefix}group {number}{suffix}", group, optimizer)
        yield live, group.get("params"), group.get("param_names")


def _is_iterator(value: object) -> bool:
    """Return whether ``value`` is an iterator, which can be read only once; ``iter()`` of an iterator reads nothing."""
    return isinstance(value, Iterable) and iter(value) is value


def _params_list(group: LiveGroup, params: Any, findings: list[Finding]) -> list[Any] | None:
    """Return the entries of ``params``, or None where they cannot be read."""
    if is_tensor(params):
        return [params]
    if isinstance(params, str | bytes | Mapping) or not isinstance(params, Iterable):
        fault = "has no params" if params is None else f"has a {type(params).__name__} as params"
        findings.append(
            codes.NOT_A_PARAMETER.finding(
                "", f"{group.where} {fault}", "params must be a list of parameters of the model"
            )
        )
        return None
    if _is_iterator(params):
        findings.append(
            codes.ONE_SHOT.finding(
                "",
                f"{group.where} has a {type(params).__name__} as params, which can be read only once: its parameters "
                "were not checked",
                "make params a list: list(...)",
            )
        )
        return None
    if isinstance(params, set | frozenset):
        findings.append(
            codes.UNORDERED.finding(
                "",
                f"{group.where} has a {type(params).__name__} as params: its order changes from run to run, and "
                "optimizer state is saved by position",
                "make params a list in the order of model.named_parameters()",
            )
        )
    return list(params)


def _members(group: LiveGroup, items: Sequence[Any], names: Any, findings: list[Finding]) -> Iterator[Member]:
    recorded: Sequence[Any] = [None] * len(items)
    if isinstance(names, Sequence) and not isinstance(names, str):
        if len(names) == len(items):
            recorded = names
        else:
            findings.append(
                codes.NAMES.finding(
                    "",
                    f"{group.where} has {plural(len(names), 'name')} in param_names for "
                    f"{plural(len(items), 'parameter')}",
                    f"build the optimizer from {source_of_names()}, or remove param_names",
                )
            )
    for index, (item, recorded_name) in enumerate(zip(items, recorded, strict=True)):
        is_pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        name, tensor = item if is_pair else (recorded_name, item)
        if is_tensor(tensor):
            yield Member(group, index, tensor, name if isinstance(name, str) else None)
        else:
            findings.append(
                codes.NOT_A_PARAMETER.finding(
                    "",
                    f"{group.where}[{index}] is a {type(tensor).__name__}, not a parameter",
                    "use .parameters() of a module, and .values() of a dict",
                )
            )


def member_name(live_model: LiveModel, member: Member) -> str:
    """Return the FQN of a member, else the name recorded with it, else an empty string."""
    live = live_model.parameters.get(id(member.tensor))
    return live.name if live is not None else member.name or ""


def member_keys(live_model: LiveModel, members: Iterable[Member]) -> Iterator[str]:
    """Yield the name of each member, as ``member_name`` returns it."""
    return (member_name(live_model, member) for member in members)


def member_names(live_model: LiveModel, members: Sequence[Member]) -> str:
    """Return the first few names of ``members`` for a sentence, and how many more there are."""
    shown = [quoted(name) if (name := member_name(live_model, member)) else member.where for member in members[:_SHOWN]]
    more = f" and {plural(len(members) - _SHOWN, 'more', 'more')}" if len(members) > _SHOWN else ""
    return ", ".join(shown) + more
