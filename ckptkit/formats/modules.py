"""A pickled ``nn.Module`` as its state_dict: read from the dicts that every module keeps, with no class imported."""

from __future__ import annotations

from collections.abc import Mapping

from ckptkit.errors import FormatError
from ckptkit.formats.inert import MappingValue, Placeholder
from ckptkit.formats.torch_objects import TensorRef
from ckptkit.formats.tree import type_name
from ckptkit.text import plural, printable

__all__ = ["open_modules"]

_DEEPEST = 200
_PARTS = ("_parameters", "_buffers", "_modules")


def open_modules(tree: object, budget: int) -> tuple[object, list[str]]:
    """Return the tree with a pickled module, at its root or directly below, replaced by its state_dict; and notes.

    As torch does, buffers that the module calls non-persistent are left out; they are named in a note, as
    are tensors that it keeps as plain attributes. Raises ``FormatError`` where modules are nested too
    deeply, or refer to each other so often that there are more than ``budget`` places.
    """
    walker = _Walker(budget)
    if _is_module(tree):
        return walker.state_dict(tree), walker.notes
    if isinstance(tree, Mapping) and any(map(_is_module, tree.values())):
        opened = MappingValue(type_name(tree))
        opened.update({key: walker.state_dict(value) if _is_module(value) else value for key, value in tree.items()})
        return opened, walker.notes
    return tree, []


def _is_module(value: object) -> bool:
    return (
        isinstance(value, Placeholder)
        and isinstance(value.state, Mapping)
        and all(isinstance(value.state.get(part), Mapping) for part in _PARTS)
    )


class _Walker:
    """One walk over nested modules, in the order of ``state_dict``: parameters, buffers, then children."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.notes: list[str] = []

    def state_dict(self, module: object) -> MappingValue:
        made = MappingValue(type_name(module))
        loose: list[str] = []
        hidden: list[str] = []
        stack: list[tuple[str, object, int]] = [("", module, 0)]
        while stack:
            prefix, current, depth = stack.pop()
            if not isinstance(current, Placeholder) or not isinstance(current.state, Mapping):
                continue
            if depth > _DEEPEST:
                raise FormatError(f"modules are nested too deeply: more than {_DEEPEST} levels")
            state = current.state
            skipped = state.get("_non_persistent_buffers_set")
            skipped = set(skipped) if isinstance(skipped, set | frozenset | list | tuple) else set()
            for part in ("_parameters", "_buffers"):
                for name, value in self._items(state, part):
                    if part == "_buffers" and name in skipped:
                        hidden.append(prefix + name)
                    elif value is not None:
                        made[prefix + name] = value
            loose += [f"{prefix}{name}" for name, value in state.items() if isinstance(value, TensorRef)]
            children = [(f"{prefix}{name}.", child, depth + 1) for name, child in self._items(state, "_modules")]
            stack.extend(reversed(children))
        for keys, what in ((hidden, "non-persistent buffer"), (loose, "tensor attribute")):
            if keys:
                self.notes.append(f"{plural(len(keys), what)} not part of the state_dict: {printable(keys[0])}")
        return made

    def _items(self, state: Mapping[object, object], part: str) -> list[tuple[str, object]]:
        items = state.get(part)
        pairs = list(items.items()) if isinstance(items, Mapping) else []
        self.budget -= 1 + len(pairs)
        if self.budget < 0:
            raise FormatError("modules refer to each other so often that they expand too far")
        return [(name, value) for name, value in pairs if isinstance(name, str)]
