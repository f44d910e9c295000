"""Live groups as they were given: who is in which, at which place, read without consuming or changing anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_bridge import shape_or_none
from ckptkit.core.torch_optim import OptimizerSchema, schema_of
from ckptkit.errors import GroupsError
from ckptkit.param_groups.parameters import Inventory
from ckptkit.param_groups.spec import is_tensor

__all__ = [
    "LiveGroup",
    "LiveOptimizer",
    "Member",
    "by_optimizer",
    "member_name",
    "member_names",
    "read_groups",
    "single_optimizer",
    "unwrap_optimizer",
]


_FORMS = "pass the list of group dicts, a list of parameters, an optimizer, or a list of optimizers"


@dataclass(frozen=True, slots=True, eq=False)
class LiveGroup:
    """One group: what to call it in a sentence, its options, and its optimizer where it has one."""

    where: str
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    is_readable: bool = True  # whether its members could be told without consuming them


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One place in a group: the tensor, held alive while its id is compared, and the name recorded with it."""

    group: LiveGroup
    index: int
    tensor: Any
    name: str | None

    @property
    def where(self) -> str:
        """The place in a sentence, as one would index it."""
        return f"{self.group.where}[{self.index}]"

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the tensor, or None before the first forward pass of a lazy module."""
        return shape_or_none(self.tensor)


def read_groups(given: Any) -> tuple[list[LiveGroup], list[Member], list[Finding]]:
    """Return the groups, the tensors in them, and what is wrong with the form they were given in.

    Raises ``GroupsError`` where ``given`` is none of the forms that hold parameters at all.
    """
    groups: list[LiveGroup] = []
    members: list[Member] = []
    findings: list[Finding] = []
    for group, params, names in _groups(given):
        items = _listed(group, params, findings)
        if items is None:
            groups.append(LiveGroup(group.where, group.options, group.optimizer, is_readable=False))
            continue
        groups.append(group)
        if not items:
            findings.append(
                _finding(
                    "groups.empty",
                    f"{group.where} is empty, so nothing trains with its options: an exhausted filter() or generator?",
                    "whoever reads an iterator first leaves it empty: build the groups from lists, or drop this one",
                )
            )
        members.extend(_members(group, items, names, findings))
    return groups, members, findings


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that accelerate, Lightning and their like have wrapped and whose groups they pass through.

    Raises ``GroupsError`` for DeepSpeed's, whose groups hold flat copies in the place of parameters.
    """
    while True:
        if type(optimizer).__module__.partition(".")[0] == "deepspeed":
            raise GroupsError(
                f"the optimizer is DeepSpeed's {type(optimizer).__name__}, whose groups hold flat copies, not the "
                "parameters of the model",
                hint="check the optimizer before deepspeed.initialize or accelerator.prepare takes it",
            )
        inner = getattr(optimizer, "optimizer", None)
        if inner is optimizer or not hasattr(inner, "param_groups"):
            return optimizer
        optimizer = inner


def single_optimizer(given: Any) -> Any:
    """Return the optimizer itself, unwrapped; raises ``GroupsError`` for what is none, or is several."""
    optimizer = unwrap_optimizer(given)
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise GroupsError(f"an optimizer cannot be a {type(given).__name__}", hint="pass one torch optimizer")
    return optimizer


def _groups(given: Any) -> Iterator[tuple[LiveGroup, Any, Any]]:
    """Yield each group with its ``params`` and its ``param_names`` as they stand."""
    if hasattr(given, "param_groups"):
        optimizer = unwrap_optimizer(given)
        yield from _dicts(optimizer.param_groups, optimizer=optimizer)
        return
    if isinstance(given, str | bytes | Mapping) or hasattr(given, "named_parameters") or is_tensor(given):
        raise GroupsError(f"param groups cannot be a {type(given).__name__}", hint=_FORMS)
    if not isinstance(given, Iterable):
        raise GroupsError(f"param groups cannot be a {type(given).__name__}", hint=_FORMS)
    items = None if _one_shot(given) else list(given)
    if items and any(hasattr(item, "param_groups") for item in items[:1]):
        if not all(hasattr(item, "param_groups") for item in items):
            raise GroupsError("the list holds both optimizers and other things", hint=_FORMS)
        for number, optimizer in enumerate(map(unwrap_optimizer, items)):
            yield from _dicts(optimizer.param_groups, f"optimizer {number}, ", optimizer)
    elif items and any(isinstance(item, Mapping) for item in items):
        if not all(isinstance(item, Mapping) for item in items):
            raise GroupsError("the list holds both group dicts and other things", hint=_FORMS)
        yield from _dicts(items)
    else:
        yield LiveGroup("group 0"), given, None


def _dicts(
    groups: Iterable[Mapping[str, Any]], prefix: str = "", optimizer: Any = None
) -> Iterator[tuple[LiveGroup, Any, Any]]:
    for number, group in enumerate(groups):
        name = group.get("name", group.get("group_name"))
        called = f" ({quoted(name)})" if isinstance(name, str) and name else ""
        yield (
            LiveGroup(f"{prefix}group {number}{called}", group, optimizer),
            group.get("params"),
            group.get("param_names"),
        )


def _one_shot(value: Any) -> bool:
    """Tell an iterator from a container: only an iterator is its own ``iter()``, and asking takes nothing from it."""
    return isinstance(value, Iterable) and iter(value) is value


def _listed(group: LiveGroup, params: Any, findings: list[Finding]) -> list[Any] | None:
    """Return what ``params`` holds, or None where that cannot be told."""
    if is_tensor(params):
        return [params]
    if isinstance(params, str | bytes | Mapping) or not isinstance(params, Iterable):
        what = "has no params" if params is None else f"has a {type(params).__name__} as params"
        findings.append(
            _finding("groups.not-a-parameter", f"{group.where} {what}", "params is a list of parameters of the model")
        )
        return None
    if _one_shot(params):
        findings.append(
            _finding(
                "groups.one-shot",
                f"{group.where} has a one-shot {type(params).__name__} as params: whoever reads it first leaves it "
                "empty, so which parameters it stands for was not looked at",
                "make it a list: list(...)",
            )
        )
        return None
    if isinstance(params, set | frozenset):
        findings.append(
            _finding(
                "groups.unordered",
                f"{group.where} has a {type(params).__name__} as params: its order changes from run to run, and "
                "optimizer state is saved by position",
                "make it a list in the order of model.named_parameters()",
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
                _finding(
                    "groups.names",
                    f"{group.where} has {plural(len(names), 'name')} in param_names for "
                    f"{plural(len(items), 'parameter')}",
                    "build the optimizer from model.named_parameters(), or remove param_names",
                )
            )
    for index, (item, name) in enumerate(zip(items, recorded, strict=True)):
        paired = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        called, tensor = item if paired else (name, item)
        if is_tensor(tensor):
            yield Member(group, index, tensor, called if isinstance(called, str) else None)
        else:
            findings.append(
                _finding(
                    "groups.not-a-parameter",
                    f"{group.where}[{index}] is a {type(tensor).__name__}, not a parameter",
                    "a module gives its parameters by .parameters(), a dict by .values()",
                )
            )


def _finding(code: str, message: str, hint: str) -> Finding:
    return Finding(code, "error", "", message, hint)


_SHOWN = 3


@dataclass(frozen=True, eq=False)
class LiveOptimizer:
    """One optimizer, its groups and all that stands in them; groups that nobody steps yet have ``instance`` None."""

    instance: Any
    label: str
    groups: tuple[LiveGroup, ...]
    members: tuple[Member, ...]

    @cached_property
    def schema(self) -> OptimizerSchema | None:
        """What its class keeps for a parameter, where it is one of torch.optim."""
        return None if self.instance is None else schema_of(type(self.instance))


def by_optimizer(groups: Sequence[LiveGroup], members: Sequence[Member]) -> list[LiveOptimizer]:
    """Return the optimizers of ``groups`` in order, each with what it steps."""
    own: dict[int, tuple[Any, list[LiveGroup], list[Member]]] = {}
    for group in groups:
        own.setdefault(id(group.optimizer), (group.optimizer, [], []))[1].append(group)
    for member in members:
        own[id(member.group.optimizer)][2].append(member)
    several = len(own) > 1
    return [
        LiveOptimizer(optimizer, _called(optimizer, number if several else None), tuple(some), tuple(inside))
        for number, (optimizer, some, inside) in enumerate(own.values())
    ]


def _called(optimizer: Any, number: int | None) -> str:
    kind = type(optimizer).__name__
    return kind if number is None else f"optimizer {number} ({kind})"


def member_name(inventory: Inventory, member: Member) -> str:
    """Return the FQN of what stands at ``member``, the name recorded with it, or nothing."""
    live = inventory.parameters.get(id(member.tensor))
    return live.name if live is not None else member.name or ""


def member_names(inventory: Inventory, members: Sequence[Member]) -> str:
    """Return the first few of ``members`` by name, and how many more there are."""
    shown = [quoted(name) if (name := member_name(inventory, one)) else one.where for one in members[:_SHOWN]]
    more = f" and {plural(len(members) - _SHOWN, 'more', 'more')}" if len(members) > _SHOWN else ""
    return ", ".join(shown) + more
