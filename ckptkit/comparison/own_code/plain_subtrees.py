"""Load the modules without own code below a module with it by their names, as torch does, in one pass over the keys."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

from ckptkit.comparison.own_code import every_module, own_code_test
from ckptkit.core.torch_types import Module, Tensor

__all__ = ["PlainSubtrees"]


@dataclass(frozen=True, slots=True)
class _Subtree:
    """The tensors of a child by name, each with its shape, and the modules below; all of them are plain.

    ``holders`` has what the module held: a hook of a module above can change it before it is loaded.
    """

    tensors: Mapping[str, tuple[Tensor, tuple[int, ...]]]
    holders: tuple[tuple[dict[str, Any], tuple[Any, ...]], ...]
    fills_missing: bool  # batch norm has a value for a counter that is missing
    below: tuple[tuple[str, _Subtree], ...]

    def parts(self, prefix: str) -> list[tuple[str, _Subtree]]:
        """Return the subtree of each module, the first of them this one, with the beginning of its keys."""
        found = [(prefix, self)]
        for start, part in found:  # grows
            found += [(f"{start}{name}.", child) for name, child in part.below]
        return found


class _Children(dict[str, Any]):
    """The children of a module. torch's own load gets only those from ``items()`` that it must load itself."""

    rest: Callable[[Iterable[tuple[str, Any]]], Iterable[tuple[str, Any]]] | None = None

    def items(self) -> Any:
        """Return the names and the modules."""
        rest, caller = self.rest, sys._getframe(1)  # noqa: SLF001 - hooks must see all children
        is_load = caller.f_code.co_name == "load" and caller.f_globals.get("__name__") == "torch.nn.modules.module"
        return super().items() if rest is None or not is_load else rest(super().items())


class PlainSubtrees:
    """The subtrees of some modules that have no own code. torch would filter all keys once for each of their modules.

    A subtree that would raise or report unexpected keys is left to torch. So is one with a value that a hook made.
    """

    def __init__(
        self,
        root: Module,
        given: Mapping[str, Any],
        write: Callable[[Tensor, Any], None],
        watch: Callable[[Module], None],
    ) -> None:
        """Take note of the subtrees of ``root``.

        ``write`` is called for each tensor and the value that it gets, ``watch`` for each module that torch loads.
        """
        self._write = write
        self._watch = watch
        self._is_simple = _simple_test()
        self._shapes = {id(value): tuple(value.shape) for value in given.values() if self._is_simple(value)}
        self._has_own_code = own_code_test(saving=True)  # the modules that were copied for it are watched
        self._subtrees: dict[int, _Subtree | None] = {}
        self._classes: dict[type, tuple[bool, bool]] = {}  # whether it has an extra state, and fills what is missing
        self._note(root)

    def _note(self, root: Module) -> None:
        modules = every_module(root)
        for module in reversed(modules):
            self._subtrees[id(module)] = self._subtree(module)
        for module in modules:
            if self._subtrees[id(module)] is None:
                self._watch(module)
                module.__dict__["_modules"] = _Children(module._modules)  # noqa: SLF001

    def _subtree(self, module: Module) -> _Subtree | None:
        import torch

        cls = type(module)
        if cls not in self._classes:
            usual = torch.nn.Module
            own = (getattr(cls, name) is not getattr(usual, name) for name in ("get_extra_state", "set_extra_state"))
            fills_missing = cls._load_from_state_dict is not usual._load_from_state_dict  # noqa: SLF001
            self._classes[cls] = any(own), fills_missing
        has_state, fills_missing = self._classes[cls]
        if has_state or self._has_own_code(module):
            return None
        below = []
        for name, child in module._modules.items():  # noqa: SLF001
            if child is not None:
                subtree = self._subtrees.get(id(child))
                if subtree is None:
                    return None
                below.append((name, subtree))
        tensors: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        for held in (module._parameters, module._buffers):  # noqa: SLF001
            for name, tensor in held.items():
                if tensor is None or name in module._non_persistent_buffers_set:  # noqa: SLF001
                    continue
                if not self._is_simple(tensor):
                    return None
                tensors[name] = tensor, tuple(tensor.shape)
        dicts: list[dict[str, Any]] = [module._parameters, module._buffers, module._modules]  # noqa: SLF001
        holders = [(held, tuple(held.values())) for held in dicts if held]
        return _Subtree(tensors, tuple(holders), fills_missing, tuple(below))

    def follow(self, module: Module, state: Mapping[str, Any], prefix: str, missing: list[str]) -> None:
        """Prepare the children of a module for torch's load, which has just loaded the module itself."""
        children = module._modules  # noqa: SLF001
        if isinstance(children, _Children):
            children.rest = lambda items: self._rest(items, state, prefix, missing)

    def _rest(
        self, items: Iterable[tuple[str, Any]], state: Mapping[str, Any], prefix: str, missing: list[str]
    ) -> Iterator[tuple[str, Any]]:
        by_child, count = _keys_by_child(state, prefix), len(state)
        for name, child in items:
            if len(state) != count:  # code of another child can change the state of its parent
                by_child, count = _keys_by_child(state, prefix), len(state)
            subtree = self._subtrees.get(id(child))
            if subtree is None:
                yield name, child
            elif not self._load(subtree, f"{prefix}{name}.", by_child.get(name, []), state, missing):
                for module in every_module(child):
                    self._watch(module)
                yield name, child

    def _load(
        self, subtree: _Subtree, prefix: str, keys: list[str], state: Mapping[str, Any], missing: list[str]
    ) -> bool:
        """Load a subtree and return True, or do nothing where torch must do it."""
        parts = subtree.parts(prefix)
        expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        for start, part in parts:
            for held, before in part.holders:
                if len(held) != len(before) or not all(map(is_, held.values(), before)):
                    return False
            for name, found in part.tensors.items():
                expected[start + name] = found
        writes = []
        for key in keys:
            place = expected.get(key)
            value = state[key]
            if place is None or self._shapes.get(id(value)) != place[1]:
                return False
            writes.append((place[0], value))
        lacks = len(keys) < len(expected)
        if lacks and any(part.fills_missing for _, part in parts):
            return False
        for target, value in writes:
            self._write(target, value)
        if lacks:
            missing += [key for key in expected if key not in state]
        return True


def _keys_by_child(state: Mapping[str, Any], prefix: str) -> Mapping[str, list[str]]:
    by_child: dict[str, list[str]] = defaultdict(list)
    for key in state:
        if key.startswith(prefix):
            by_child[key[len(prefix) :].partition(".")[0]].append(key)
    return by_child


def _simple_test() -> Callable[[Any], bool]:
    """Return a function that tells whether torch can copy between a tensor and any other simple one of its shape."""
    import torch

    kinds = (torch.nn.Parameter, torch.Tensor)
    dtypes = frozenset(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
    )
    strided = torch.strided

    def is_simple(value: Any) -> bool:
        return type(value) in kinds and value.dtype in dtypes and value.layout is strided and not value.is_nested

    return is_simple
