"""A pickled ``nn.Module`` as its state_dict: read from the dicts that every module keeps, with no class imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ckptkit.core.text import plural, printable, quoted
from ckptkit.errors import FormatError
from ckptkit.formats.pickle.values import PickledMapping, Placeholder
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.tree import type_name

__all__ = ["ModuleWalker", "Parts", "replace_modules"]

_DEEPEST = 200
_PARTS = ("_parameters", "_buffers", "_modules")


class Parts(NamedTuple):
    """What a module keeps itself, by name: entries of its state_dict, its children, and tensors that are no entries."""

    entries: list[tuple[str, object]]
    children: list[tuple[str, object]]
    hidden: list[str]
    loose: list[str]


def replace_modules(tree: object, budget: int) -> tuple[object, list[str]]:
    """Return the tree with a pickled module, at its root or directly below, replaced by its state_dict; and notes.

    As torch does, buffers that the module calls non-persistent are left out; they are named in a note, as
    are tensors that it keeps as plain attributes. Raises ``FormatError`` where modules are nested too
    deeply, or refer to each other so often that there are more than ``budget`` places.
    """
    walker = ModuleWalker(_parts, budget)
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
        and all(isinstance(value.state.get(part), Mapping) for part in _PARTS)
    )


def _parts(state: Mapping[object, object]) -> Parts:
    skipped = state.get("_non_persistent_buffers_set")
    skipped = set(skipped) if isinstance(skipped, set | frozenset | list | tuple) else set()
    buffers = _items(state, "_buffers")
    kept = [(name, value) for name, value in buffers if name not in skipped]
    return Parts(
        [(name, value) for name, value in _items(state, "_parameters") + kept if value is not None],
        _items(state, "_modules"),
        [name for name, _ in buffers if name in skipped],
        [str(name) for name, value in state.items() if isinstance(value, TensorRef)],
    )


def _items(state: Mapping[object, object], part: str) -> list[tuple[str, object]]:
    items = state.get(part)
    pairs = items.items() if isinstance(items, Mapping) else ()
    return [(name, value) for name, value in pairs if isinstance(name, str)]


class ModuleWalker:
    """Walks over nested modules in the order of ``state_dict``: parameters, buffers, then children."""

    def __init__(self, parts: Callable[[Mapping[object, object]], Parts], budget: int) -> None:
        """Take what finds the parts in the state of a module, and how many places there may be."""
        self.parts = parts
        self.budget = budget
        self.notes: list[str] = []

    def state_dict(self, module: object) -> PickledMapping:
        """Return the state_dict of a module, and note what it leaves out; raises ``FormatError`` beyond the bounds."""
        made = PickledMapping(type_name(module))
        loose: list[str] = []
        hidden: list[str] = []
        stack: list[tuple[str, object, int]] = [("", module, 0)]
        while stack:
            prefix, current, depth = stack.pop()
            if not isinstance(current, Placeholder) or not isinstance(current.state, Mapping):
                continue
            if depth > _DEEPEST:
                raise FormatError(f"modules are nested too deeply: more than {_DEEPEST} levels")
            parts = self.parts(current.state)
            self.budget -= 3 + len(parts.entries) + len(parts.children) + len(parts.hidden)
            if self.budget < 0:
                raise FormatError("modules refer to each other so often that they expand too far")
            for name, value in parts.entries:
                if prefix + name in made:
                    raise FormatError(f"two tensors of the module would both be called {quoted(prefix + name)}")
                made[prefix + name] = value
            hidden += [prefix + name for name in parts.hidden]
            loose += [prefix + name for name in parts.loose]
            stack.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(parts.children))
        for keys, what in ((hidden, "non-persistent buffer"), (loose, "tensor attribute")):
            if keys:
                self.notes.append(f"{plural(len(keys), what)} not part of the state_dict: {printable(keys[0])}")
        return made
