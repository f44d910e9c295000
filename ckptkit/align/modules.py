"""Group the keys of a checkpoint into modules; the same module of many layers becomes one ``LayeredModule``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ckptkit.comparison.roles import role_of, split_leaf, split_words
from ckptkit.core.checkpoint import TensorInfo

__all__ = [
    "Index",
    "KeyTemplate",
    "LayeredModule",
    "ModuleMember",
    "group_into_modules",
]

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KeyTemplate:
    """A key without its indices: the texts before, between and after them."""

    texts: tuple[str, ...]

    def key_at(self, index: Index) -> str:
        """Return the key with these indices."""
        pieces = [self.texts[0]]
        for number, text in zip(index, self.texts[1:], strict=True):
            pieces += [str(number), text]
        return "".join(pieces)

    def with_fixed(self, index: Index) -> KeyTemplate:
        """Return the template with its last indices written into the text."""
        kept = len(self.texts) - len(index)
        return KeyTemplate((*self.texts[: kept - 1], KeyTemplate(self.texts[kept - 1 :]).key_at(index)))


@dataclass(frozen=True, slots=True)
class ModuleMember:
    """One tensor of a module, such as its weight, in every layer."""

    name: KeyTemplate
    leaf: str  # the end of the key, after the path of the module
    tensors: dict[Index, TensorInfo]


@dataclass(eq=False)
class LayeredModule:
    """A module of a checkpoint, in all layers that have it.

    ``members`` holds the tensors by torch's name (``weight``, ``bias``); a tensor without a module has the name ``""``.
    """

    path: KeyTemplate
    order: tuple[int, ...]  # the position of its first key in the checkpoint
    members: dict[str, ModuleMember] = field(default_factory=dict)

    @property
    def stack(self) -> str | None:
        """The path before the first index, such as ``layers.``; None for a module outside of layers."""
        return self.path.texts[0] if len(self.path.texts) > 1 else None

    @cached_property
    def path_in_layer(self) -> str:
        """The path after the first index, with ``#`` for further indices; outside of layers the whole path."""
        return "#".join(self.path.texts[1:] if len(self.path.texts) > 1 else self.path.texts).strip("./")

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words of ``path_in_layer``."""
        return split_words(self.path_in_layer)

    @cached_property
    def role(self) -> str:
        """The role that the spelling of the path gives the module, such as ``query``; empty if it is not known."""
        return role_of(self.path_in_layer, in_layer=self.stack is not None)[0]

    @cached_property
    def meaning(self) -> frozenset[str]:
        """The words of ``path_in_layer``, with the role in place of its spelling."""
        role, words = role_of(self.path_in_layer, in_layer=self.stack is not None)
        return frozenset((*words, role) if role else words)

    @property
    def indices(self) -> frozenset[Index]:
        """Every index that at least one of its tensors has."""
        return frozenset(index for member in self.members.values() for index in member.tensors)

    @property
    def main(self) -> ModuleMember:
        """The member that identifies the module best: its weight, if it has one."""
        return self.members.get("weight") or next(iter(self.members.values()))

    def split(self, kept: int = 0) -> list[LayeredModule]:
        """Return one module for each index; the first ``kept`` numbers of an index remain an index."""
        modules: dict[Index, LayeredModule] = {}
        for kind, member in self.members.items():
            for index, info in member.tensors.items():
                head, tail = index[:kept], index[kept:]
                if tail not in modules:
                    modules[tail] = LayeredModule(self.path.with_fixed(tail), (*self.order, *tail))
                    if not kept:
                        modules[tail].role = self.role
                empty = ModuleMember(member.name.with_fixed(tail), member.leaf, {})
                modules[tail].members.setdefault(kind, empty).tensors[head] = info
        return list(modules.values())


def group_into_modules(infos: Mapping[str, TensorInfo]) -> list[LayeredModule]:
    """Return the modules of a checkpoint, in its order; only numbers that count layers become indices."""
    tensors_by_template: dict[tuple[str, ...], dict[Index, TensorInfo]] = {}
    for key, (texts, index) in _split_indices(infos).items():
        tensors_by_template.setdefault(texts, {})[index] = infos[key]
    modules: dict[tuple[tuple[str, ...], str], LayeredModule] = {}
    for order, (texts, tensors) in enumerate(tensors_by_template.items()):
        cut = max(texts[-1].rfind("."), texts[-1].rfind("/")) + 1
        found = split_leaf(texts[-1][cut:])
        rest, kind = found or ("", "")
        owner = texts[-1][:cut] + rest if rest else texts[-1][: max(cut - 1, 0)]
        path = (*texts[:-1], owner if found else texts[-1])
        leaf = texts[-1][len(path[-1]) :]
        module = modules.setdefault((path, "" if found else "bare"), LayeredModule(KeyTemplate(path), (order,)))
        if kind in module.members:  # with both gamma and weight, the weight of the module cannot be known
            module = modules[path, texts[-1]] = LayeredModule(KeyTemplate(texts), (order,))
            leaf, kind = "", ""
        module.members[kind] = ModuleMember(KeyTemplate(texts), leaf, tensors)
    return list(modules.values())


_SEGMENT = re.compile(r"[^./]*[./]?", re.DOTALL)
_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})([./]?)", re.DOTALL)
_MAX_SEGMENTS = 32  # a hostile key can have a million
_MAX_NAMES = 4  # w1, w2 and w3 are names, but layer_0 to layer_11 are counted
_END = "./"  # marks the end of a key: no segment has two separators
_Node = dict[str, "_Node"]


def _split_indices(keys: Iterable[str]) -> dict[str, tuple[tuple[str, ...], Index]]:
    """Return the texts and the indices of each key."""
    root: _Node = {}
    for key in keys:
        node = root
        for segment in _segments(key):
            node = node.setdefault(segment, {})
    found: dict[str, tuple[tuple[str, ...], Index]] = {}
    waiting: list[tuple[_Node, str, tuple[str, ...], Index]] = [(root, "", ("",), ())]
    names_below: dict[int, frozenset[str]] = {}
    _collect_names(root, names_below)
    while waiting:
        node, key, texts, index = waiting.pop()
        counted = _counted_children(node, names_below)
        for segment, child in node.items():
            number = counted.get(segment)
            if number is None:
                child_texts, child_index = (*texts[:-1], texts[-1] + segment), index
            else:
                child_texts = (*texts[:-1], texts[-1] + number[0], number[2])
                child_index = (*index, int(number[1]))
            if segment == _END:
                found[key] = (texts, index)
            else:
                waiting.append((child, key + segment, child_texts, child_index))
    return {key: found[key] for key in keys}


def _segments(key: str) -> list[str]:
    parts = [part for part in _SEGMENT.findall(key) if part]
    if len(parts) > _MAX_SEGMENTS:
        parts = [*parts[: _MAX_SEGMENTS - 1], "".join(parts[_MAX_SEGMENTS - 1 :])]
    return [*parts, _END]


def _collect_names(node: _Node, names_below: dict[int, frozenset[str]]) -> frozenset[str]:
    """Return the names below a node, with every number written as ``#``, and store them for each node by its id."""
    names: set[str] = set()
    for segment, child in node.items():
        match = _NUMBERED.fullmatch(segment)
        plain = f"#{match[3]}" if match and not match[1] else segment
        inner = _collect_names(child, names_below)
        names.update(f"{plain}{name}" for name in inner) if inner else names.add(plain)
    names_below[id(node)] = frozenset(names)
    return names_below[id(node)]


def _counted_children(node: _Node, names_below: Mapping[int, frozenset[str]]) -> dict[str, tuple[str, str, str]]:
    """Return the children of a node that are counted, each with its text, number and separator."""
    families: dict[tuple[str, str], list[tuple[str, re.Match[str]]]] = {}
    for segment in node:
        match = _NUMBERED.fullmatch(segment)
        if match:
            families.setdefault((match[1], match[3]), []).append((segment, match))
    counted: dict[str, tuple[str, str, str]] = {}
    for (text, _), members in families.items():
        numbers = {int(match[2]) for _, match in members}
        layers = [names_below[id(node[segment])] for segment, _ in members]
        have_children = any(layer != frozenset({_END}) for layer in layers)
        are_counted = have_children and len(numbers) > 1 and (0 in numbers or len(numbers) > _MAX_NAMES)
        if (not text or are_counted) and _are_alike(layers):
            counted |= {segment: (match[1], match[2], match[3]) for segment, match in members}
    return counted


def _are_alike(layers: Sequence[frozenset[str]]) -> bool:
    """Return whether most children have the same names below them, like layers, unlike modules of a Sequential."""
    usual = Counter(layers).most_common(1)[0][0]
    shares = [len(layer & usual) / max(len(layer | usual), 1) for layer in layers]
    return len(shares) == 1 or sum(shares) - 1 >= 0.5 * (len(shares) - 1)  # the usual layer itself does not count
