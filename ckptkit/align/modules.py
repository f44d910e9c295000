"""Group the keys of a checkpoint into modules; the same module of many layers becomes one ``LayeredModule``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise

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
    def distinct_words(self) -> frozenset[str]:
        """The words, with a mark at numbers that come again: ``1`` of ``nets.1.fc1`` is in ``fc1`` only once."""
        return _with_marks(self.words)

    @cached_property
    def role(self) -> str:
        """The role that the spelling of the path gives the module, such as ``query``; empty if it is not known."""
        role = role_of(self.path_in_layer, in_layer=self.stack is not None)[0]
        return "qkv" if not role and self._is_fused_attention else role

    @property
    def _is_fused_attention(self) -> bool:
        """Whether the module is called attention and is itself a layer with more rows than columns, as fused ones have.

        The shapes of the parts decide then.
        """
        if self.words[-1:] != ("attn",) or "weight" not in self.members:
            return False
        shapes = (info.shape for info in self.members["weight"].tensors.values())
        return all(len(shape) == 2 and shape[0] > shape[1] for shape in shapes)

    @cached_property
    def meaning(self) -> frozenset[str]:
        """The words of ``path_in_layer``, with the role in place of its spelling."""
        role, words = role_of(self.path_in_layer, in_layer=self.stack is not None)
        return _with_marks((*words, role) if role else words)

    @cached_property
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


def _with_marks(words: Iterable[str]) -> frozenset[str]:
    marked: set[str] = set()
    for word in words:
        marked.add(f"{word} again" if word in marked and word.isdigit() else word)
    return frozenset(marked)


def group_into_modules(infos: Mapping[str, TensorInfo]) -> list[LayeredModule]:
    """Return the modules of a checkpoint, in its order; only numbers that count layers become indices."""
    tensors_by_template: dict[tuple[str, ...], dict[Index, TensorInfo]] = {}
    places = _Tree.of(infos).places()
    for key, info in infos.items():
        texts, index = places[key]
        tensors_by_template.setdefault(texts, {})[index] = info
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


_SEGMENT = re.compile(r"[^./]*[./]", re.DOTALL)
_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})([./]?)", re.DOTALL)
_MAX_SEGMENTS = 32  # a hostile key can have a million
_MAX_NAMES = 4  # w1, w2 and w3 are names, but layer_0 to layer_11 are counted
_ENDED = frozenset({"./"})  # the name of the end of a key: no segment has two separators
_Texts = tuple[str, ...]
_Place = tuple[_Texts, Index]


@dataclass(eq=False, slots=True)
class _Node:
    """What follows a beginning of keys: the next segments, each with what follows it; None where the key ends.

    The segment ``""`` is the end of a key that is the beginning itself. Equal nodes, such as those of layers, are one
    object after ``_Tree.of``.
    """

    children: dict[str, _Node | None] = field(default_factory=dict)
    names: frozenset[str] = frozenset()  # the keys below, with every number written as ``#``
    counted: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # the text, number and separator of children
    keys: list[tuple[str, _Texts, Index]] = field(default_factory=list)  # each key below, and its place


@dataclass(frozen=True, slots=True)
class _Tree:
    """All keys of a checkpoint by their segments."""

    root: _Node

    @classmethod
    def of(cls, keys: Iterable[str]) -> _Tree:
        root = _Node()
        by_beginning = {"": root}
        for key in keys:
            cut = max(key.rfind("."), key.rfind("/")) + 1
            node = by_beginning.get(key[:cut])
            if node is None:
                node, cut = _add_beginning(by_beginning, key[:cut])
            node.children[key[cut:]] = None
        return cls(_merged(root, {}))

    def places(self) -> dict[str, _Place]:
        """Return the texts and the indices of each key."""
        return {key: (texts, index) for key, texts, index in _keys_below(self.root)}


def _add_beginning(by_beginning: dict[str, _Node], beginning: str) -> tuple[_Node, int]:
    """Add a node for a beginning of keys, or for as many of its segments as are split; return it and its length."""
    if beginning.count(".") + beginning.count("/") >= _MAX_SEGMENTS:
        beginning = "".join(found[0] for found in islice(_SEGMENT.finditer(beginning), _MAX_SEGMENTS - 1))
    cuts = [len(beginning)]
    while beginning[: cuts[-1]] not in by_beginning:
        last = cuts[-1] - 1
        cuts.append(max(beginning.rfind(".", 0, last), beginning.rfind("/", 0, last)) + 1)
    node = by_beginning[beginning[: cuts[-1]]]
    for start, end in pairwise(reversed(cuts)):
        child = node.children[beginning[start:end]] = by_beginning[beginning[:end]] = _Node()
        node = child
    return node, len(beginning)


def _merged(node: _Node, known: dict[object, _Node]) -> _Node:
    """Return one object for all equal nodes, with the names and the places of the keys below."""
    for segment, child in node.children.items():
        if child is not None:
            node.children[segment] = _merged(child, known)
    value = tuple((segment, id(child)) for segment, child in node.children.items())
    same = known.get(value)
    if same is not None:
        return same
    known[value] = node
    node.names = _names(node)
    node.counted = _counted_children(node)
    return node


def _names(node: _Node) -> frozenset[str]:
    names: set[str] = set()
    for plain, child in dict.fromkeys((_without_number(segment), child) for segment, child in node.children.items()):
        names.update(f"{plain}{name}" for name in (child.names if child is not None else _ENDED))
    return frozenset(names)


def _without_number(segment: str) -> str:
    match = _NUMBERED.fullmatch(segment)
    return f"#{match[3]}" if match and not match[1] else segment


def _counted_children(node: _Node) -> dict[str, tuple[str, str, str]]:
    """Return the children of a node that are counted, each with its text, number and separator."""
    families: dict[tuple[str, str], list[tuple[str, re.Match[str]]]] = {}
    for segment in node.children:
        match = _NUMBERED.fullmatch(segment)
        if match:
            families.setdefault((match[1], match[3]), []).append((segment, match))
    counted: dict[str, tuple[str, str, str]] = {}
    for (text, _), members in families.items():
        numbers = {int(match[2]) for _, match in members}
        below = [node.children[segment] for segment, _ in members]
        layers = [_ENDED if child is None else child.names for child in below]
        have_children = any(layer != _ENDED for layer in layers)
        are_counted = have_children and len(numbers) > 1 and (0 in numbers or len(numbers) > _MAX_NAMES)
        if (not text or are_counted) and _are_alike(layers):
            counted |= {segment: (match[1], match[2], match[3]) for segment, match in members}
    return counted


def _are_alike(layers: Sequence[frozenset[str]]) -> bool:
    """Return whether most children have the same names below them, like layers, unlike modules of a Sequential."""
    usual = Counter(layers).most_common(1)[0][0]
    share_of = {layer: len(layer & usual) / max(len(layer | usual), 1) for layer in set(layers)}
    # The usual layer itself does not count.
    return len(layers) == 1 or sum(share_of[layer] for layer in layers) - 1 >= 0.5 * (len(layers) - 1)


def _keys_below(node: _Node) -> list[tuple[str, _Texts, Index]]:
    """Return each key below a node, without what is before the node, with its texts and indices."""
    if node.keys:
        return node.keys
    texts_below: dict[tuple[_Texts, _Node], list[_Texts]] = {}
    for segment, child in node.children.items():
        number = node.counted.get(segment)
        head, index = ((segment,), ()) if number is None else ((number[0], number[2]), (int(number[1]),))
        if child is None:
            node.keys.append((segment, head, index))
            continue
        below = _keys_below(child)
        if (head, child) not in texts_below:
            texts_below[head, child] = [(*head[:-1], head[-1] + texts[0], *texts[1:]) for _, texts, _ in below]
        node.keys += [
            (segment + key, texts, index + inner)
            for (key, _, inner), texts in zip(below, texts_below[head, child], strict=True)
        ]
    return node.keys
