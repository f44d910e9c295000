"""What is worth knowing of the model itself: tied, shared and overlapping parameters, and those without memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.param_groups.live import LiveGroup, Member
from ckptkit.param_groups.parameters import Inventory, LiveParameter, address, bare_name, flat_names

__all__ = ["Hidden", "check_empty", "check_hidden", "check_memory", "check_meta", "check_tied", "find_hidden"]


_MOST_NAMES = 3


def check_empty(inventory: Inventory) -> Iterator[Finding]:
    """Yield a note where the model has modules, and nothing in them that could train."""
    if not inventory.parameters:
        kinds = sorted({type(module).__name__ for module in inventory.modules.values() if not list(module.children())})
        yield Finding(
            "groups.no-parameters",
            "note",
            "",
            f"the {type(inventory.model).__name__} has {plural(len(inventory.modules), 'module')} and no parameter "
            f"({_and(kinds)}): quantised modules keep packed weights, which no optimizer can train",
            "train the model before it is quantised, or add an adapter that trains",
        )


def check_meta(inventory: Inventory, members: Sequence[Member]) -> Iterator[Finding]:
    """Yield a finding for each group of an optimizer that steps on parameters without memory.

    A list of groups is a plan still: the model may get its memory before the optimizer is built.
    """
    by_group: dict[LiveGroup, list[str]] = {}
    for member in members:
        if member.tensor.is_meta and member.group.optimizer is not None:
            live = inventory.parameters.get(id(member.tensor))
            if live is not None:
                by_group.setdefault(member.group, []).append(live.name)
    for group, names in by_group.items():
        yield Finding(
            "groups.meta",
            "error",
            names[0],
            f"{group.where} holds {plural(len(names), 'parameter')} on the meta device ({_and(names)}): they have no "
            "values, a step on them does nothing, and to_empty() or load_state_dict(assign=True) will replace them",
            "give the model its memory first, then build the optimizer",
        )


def check_tied(inventory: Inventory, places: Mapping[int, Member]) -> Iterator[Finding]:
    """Yield a note for each module that is registered twice, and for each tie between groups of different rates."""
    tied = [live for live in inventory.parameters.values() if live.aliases]
    if not tied:
        return
    names: dict[int, list[str]] = {}
    for name, module in inventory.modules.items():
        names.setdefault(id(module), []).append(name)
    shared = {id(inventory.modules[first]): [first, *others] for first, *others in names.values() if others}
    inner = {name for row in shared.values() for name in row}
    for first, *others in shared.values():
        inside = [live for live in tied if f"{bare_name(live.name)}.".startswith(f"{first}.")]
        if inside and first.rpartition(".")[0] not in inner:
            yield Finding(
                "groups.shared-module",
                "note",
                others[0],
                f"{_and(others)} {'is' if len(others) == 1 else 'are'} the module {quoted(first)} again: "
                f"its {plural(len(inside), 'parameter')} ({_and([live.name for live in inside])}) train once",
                "deepcopy() one of them where they were not meant to share",
            )
    rates = {rate for rate in map(_rate, {id(m.group): m.group for m in places.values()}.values()) if rate is not None}
    for live in tied:
        member = places.get(id(live.tensor))
        if len(rates) < 2 or member is None or _rate(member.group) is None:
            continue
        if all(_module_id(inventory, name) == _module_id(inventory, live.name) for name in live.aliases):
            continue
        yield Finding(
            "groups.tied",
            "note",
            live.name,
            f"{_and([live.name, *live.aliases])} are one tied parameter {live.shape}: under all of its names it "
            f"trains in {member.group.where} with lr={_rate(member.group):g}, while other groups have another rate",
            "see that this is the rate that was meant for all of them",
        )


def _module_id(inventory: Inventory, name: str) -> int:
    return id(inventory.modules.get(bare_name(name).rpartition(".")[0]))


def _rate(group: LiveGroup) -> float | None:
    try:
        return float(group.options["lr"])
    except (KeyError, TypeError, ValueError):
        return None


def check_memory(inventory: Inventory, places: Mapping[int, Member]) -> Iterator[Finding]:
    """Yield a finding for each parameter that lies in the memory of another, of which at least one trains."""
    spans = [(address(live.tensor), live) for live in inventory.parameters.values()]
    spans.sort(key=_start)
    end, before = 0, None
    for start, live in spans:
        stop = start + _reach(live.tensor) if start else 0
        if before is not None and start < end and _overlap(before, live):
            yield _overlapping(before, live, places)
        if stop > end:
            end, before = stop, live


def _start(span: tuple[int, Any]) -> int:
    return span[0]


def _reach(tensor: Tensor) -> int:
    """Return how many bytes lie from the first element of ``tensor`` to behind its last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _overlap(before: LiveParameter, live: LiveParameter) -> bool:
    """Return whether two that meet in memory share an element that trains: columns of one matrix share none."""
    one, other = before.tensor, live.tensor
    if not (before.trainable or live.trainable) or one.device != other.device:
        return False
    size = one.element_size()
    base = min(one.data_ptr(), other.data_ptr())
    offsets = [tensor.data_ptr() - base for tensor in (one, other)]
    if (
        (one.is_contiguous() and other.is_contiguous())
        or size != other.element_size()
        or any(x % size for x in offsets)
    ):
        return True
    import torch

    # Both are laid over a map of the memory that they span, one byte an element.
    reach = max(offset + _reach(tensor) for offset, tensor in zip(offsets, (one, other), strict=True))
    taken = torch.zeros(reach // size, dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), offsets[0] // size).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), offsets[1] // size).any())


def _overlapping(one: LiveParameter, other: LiveParameter, places: Mapping[int, Member]) -> Finding:
    def called(live: LiveParameter) -> str:
        member = places.get(id(live.tensor))
        return f"{quoted(live.name)} {live.shape} in " + (member.where if member is not None else "no group")

    same = one.shape == other.shape and address(one.tensor) == address(other.tensor)
    how = "are two parameters over one memory" if same else "overlap in memory"
    return Finding(
        "groups.shared-memory",
        "warning",
        other.name,
        f"{called(one)} and {called(other)} {how}: what one step does to one of them, it does to the other as well",
        "tie them, so that they are one parameter (b.weight = a.weight), or .clone() one of them",
    )


def _and(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    shown = [quoted(name) for name in names[:_MOST_NAMES]] + ([f"{more:,} more"] if more > 0 else [])
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1]))) if shown else ""


_DEEPEST = 4
_MOST_ITEMS = 10_000  # a module may keep a data set in a list, which is not what is looked for
_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """What no module has registered: where it is kept, and its trainable tensors with their names in it."""

    path: str
    holder: str  # "list", "dict", ... or "" for a plain attribute
    kind: str
    tensors: tuple[tuple[str, Tensor], ...]


def find_hidden(inventory: Inventory) -> list[Hidden]:
    """Return the modules and the trainable tensors that ``vars()`` of a module holds and ``parameters()`` leaves out.

    Only what gets a gradient counts: a list of registered modules, or a frozen teacher in a list, hides nothing.
    """
    return list(_Search(inventory).modules(inventory.model, ""))


class _Search:
    def __init__(self, inventory: Inventory) -> None:
        from torch import Tensor
        from torch.nn import Module, RNNBase

        self._module, self._tensor, self._recurrent = Module, Tensor, RNNBase
        self._own = frozenset(vars(Module()))
        self._known = inventory.parameters
        self._seen: set[int] = set()

    def modules(self, root: Module, path: str) -> Iterator[Hidden]:
        for name, module in root.named_modules():
            held = vars(module)
            keys = [key for key in held.keys() - self._own if type(held[key]) not in _PLAIN]
            if len(keys) > 1:
                keys.sort(key=list(held).index)  # a difference of sets has no order
            for key in keys:
                if key == "_flat_weights" and isinstance(module, self._recurrent):
                    continue  # torch's own copy of the list, out of date until the next forward pass
                yield from self._look(held[key], ".".join(filter(None, (path, name, key))), "", _DEEPEST)

    def _look(self, value: Any, path: str, holder: str, depth: int) -> Iterator[Hidden]:
        if isinstance(value, self._module):
            yield from self._unregistered(value, path, holder)
        elif isinstance(value, self._tensor):
            if self._trains(value):
                yield Hidden(path, holder, "", (("", value),))
        elif isinstance(value, dict | list | tuple | set | frozenset | deque) and depth and value:
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
            kind = type(value).__name__
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in islice(items, _MOST_ITEMS):
                if type(item) not in _PLAIN:
                    yield from self._look(item, f"{path}[{key!r}]", holder or kind, depth - 1)

    def _unregistered(self, module: Module, path: str, holder: str) -> Iterator[Hidden]:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        found = tuple((name, tensor) for name, tensor in module.named_parameters() if self._trains(tensor))
        if found:
            yield Hidden(path, holder, type(module).__name__, found)
            yield from self.modules(module, path)

    def _trains(self, tensor: Tensor) -> bool:
        return tensor.requires_grad and tensor.is_leaf and id(tensor) not in self._known and not flat_names(tensor)


def check_hidden(hidden: Hidden, held: Collection[int]) -> Finding:
    """Return the finding for one hidden part, given the ids of all that the groups hold."""
    count = len(hidden.tensors)
    inside = sum(id(tensor) in held for _, tensor in hidden.tensors)
    where = f"in a plain {hidden.holder}" if hidden.holder else "a plain attribute"
    if hidden.kind:
        size = plural(sum(tensor.numel() for _, tensor in hidden.tensors), "element")
        what = f"({hidden.kind}, {plural(count, 'trainable parameter')}, {size}) is {where}"
        out = "register it: nn.ModuleList for a list, nn.ModuleDict for a dict"
    else:
        shape = tuple(hidden.tensors[0][1].shape)
        what = f"{shape} is a trainable tensor {where}" if hidden.holder else f"{shape} is a trainable tensor, {where}"
        out = (
            "make it an nn.Parameter of the module, in an nn.ParameterList or nn.ParameterDict where there are several"
        )
    if inside == count:
        harm = "it trains, but state_dict() leaves it out, and .to() and .half() pass it by"
    elif inside:
        harm = (
            f"{count - inside} of its {count} parameters get a gradient and are in no group, and state_dict() has none"
        )
    else:
        harm = "model.parameters() leaves it out, so it gets a gradient and never trains"
    return Finding("groups.unregistered", "warning", hidden.path, f"{quoted(hidden.path)} {what}: {harm}", out)
