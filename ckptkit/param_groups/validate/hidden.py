"""Trainable parts that a module holds but does not know of: modules in plain lists and dicts, bare tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.param_groups.parameters import Inventory, flat_names

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["Hidden", "check_hidden", "find_hidden"]

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
