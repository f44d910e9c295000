"""Compute the state_dict of a pickled ``nn.Module`` from its attributes, without importing its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import listed, plural, printable, quoted
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.pickle.values import PickledMapping, Placeholder
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.tree import type_name

__all__ = ["ModuleContents", "ModuleWalker", "replace_modules"]

_DEEPEST = 200
_MODULE_DICTS = ("_parameters", "_buffers", "_modules")


class ModuleContents(NamedTuple):
    """Contents of one module: entries of the state_dict, child modules, and the names of all other tensors."""

    entries: list[tuple[str, object]]
    children: list[tuple[str, object]]
    non_persistent: list[str]
    attributes: list[str]


def replace_modules(tree: object, budget: int) -> tuple[object, list[str]]:
    """Return the tree with each pickled module replaced by its state_dict, and notes about tensors left out.

    Only the root of the tree and the values directly below are replaced. As in torch, non-persistent buffers and
    plain tensor attributes are left out. Raises ``FormatError`` for modules that are nested too deeply, or that
    refer to each other so often that there are more than ``budget`` places.
    """
    walker = ModuleWalker(_contents, budget)
    if _is_module(tree):
        return walker.state_dict(tree), walker.notes
    if isinstance(tree, Mapping) and any(map(_is_module, tree.values())):
        opened = PickledMapping(type_name(tree))
        opened.update({key: walker.state_dict(value) if _is_module(value) else value for key, value in tree.items()})
        return opened, walker.notes
    return tree, []


def _is_module(value: object) -> bool:
    return (
        isinstance(value, Placeholder)
        and isinstance(value.state, Mapping)
        and all(isinstance(value.state.get(name), Mapping) for name in _MODULE_DICTS)
    )


def _contents(state: Mapping[object, object]) -> ModuleContents:
    skipped = state.get("_non_persistent_buffers_set")
    skipped = set(skipped) if isinstance(skipped, set | frozenset | list | tuple) else set()
    buffers = _items(state, "_buffers")
    persistent = [(name, value) for name, value in buffers if name not in skipped]
    return ModuleContents(
        [(name, value) for name, value in _items(state, "_parameters") + persistent if value is not None],
        _items(state, "_modules"),
        [name for name, _ in buffers if name in skipped],
        [str(name) for name, value in state.items() if type(value) is TensorRef],
    )


def _items(state: Mapping[object, object], attribute: str) -> list[tuple[str, object]]:
    items = state.get(attribute)
    pairs = items.items() if isinstance(items, Mapping) else ()
    return [(name, value) for name, value in pairs if isinstance(name, str)]


class ModuleWalker:
    """Visit nested modules in the order of ``state_dict``: parameters, buffers, then child modules."""

    def __init__(self, contents: Callable[[Mapping[object, object]], ModuleContents], budget: int) -> None:
        """Take the function that finds the contents in the state of a module, and the number of places allowed."""
        self.contents = contents
        self.budget = budget
        self.notes: list[str] = []

    def state_dict(self, module: object) -> PickledMapping:
        """Return the state_dict of a module, and add notes; raises ``FormatError`` for too many or too deep modules."""
        result = PickledMapping(type_name(module))
        non_persistent: list[str] = []
        attributes: list[str] = []
        stack: list[tuple[str, object, int]] = [("", module, 0)]
        while stack:
            prefix, current, depth = stack.pop()
            if not isinstance(current, Placeholder) or not isinstance(current.state, Mapping):
                continue
            if depth > _DEEPEST:
                raise FormatError(f"modules are nested too deeply: more than {_DEEPEST} levels")
            own = self.contents(current.state)
            self.budget -= 3 + len(own.entries) + len(own.children) + len(own.non_persistent)
            if self.budget < 0:
                raise FormatError("modules refer to each other so often that they expand too far")
            for name, value in own.entries:
                if prefix + name in result:
                    raise FormatError(f"two tensors of the module would both be called {quoted(prefix + name)}")
                result[prefix + name] = value
            non_persistent += [prefix + name for name in own.non_persistent]
            attributes += [prefix + name for name in own.attributes]
            stack.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(own.children))
        for keys, noun in ((non_persistent, "non-persistent buffer"), (attributes, "tensor attribute")):
            if keys:
                text = f"{plural(len(keys), noun)} not in the state_dict: {listed(keys, 3, show=printable)}"
                self.notes.append(ReaderWarning(text, codes.NOT_IN_STATE_DICT))
        return result
