"""Keys gathered into modules, and modules of many layers into one with an index."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType

from ckptkit.core.checkpoint import TensorInfo

__all__ = ["FUSED", "Index", "Member", "Module", "Name", "leaf_of", "likeness", "modules_of", "part_of", "words_of"]


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\x00-\x7f]+")
_SAME: Mapping[str, str] = MappingProxyType(
    {
        "attention": "attn", "attentions": "attn", "layernorm": "norm", "ln": "norm", "bn": "norm", "batchnorm": "norm",
        "rmsnorm": "norm", "groupnorm": "norm", "gn": "norm", "norms": "norm", "embedding": "embed",
        "embeddings": "embed", "emb": "embed", "tokens": "tok", "token": "tok", "position": "pos", "positions": "pos",
        "positional": "pos", "projection": "proj", "ffn": "mlp", "ff": "mlp", "patches": "patch", "convolution": "conv",
        "classification": "classifier", "downsampling": "downsample",
    }
)  # fmt: skip

# What the last part of a key is of a module; the names of several libraries for one thing.
_LEAVES: Mapping[str, str] = MappingProxyType(
    {
        "weight": "weight", "kernel": "weight", "gamma": "weight", "weights": "weight", "w": "weight", "g": "weight",
        "gain": "weight", "scale": "weight", "embedding": "weight", "bias": "bias", "beta": "bias", "b": "bias",
        "biases": "bias", "offset": "bias", "running_mean": "running_mean", "moving_mean": "running_mean",
        "running_var": "running_var", "moving_variance": "running_var", "moving_var": "running_var",
        "num_batches_tracked": "num_batches_tracked",
    }
)  # fmt: skip
_JOINED_LEAF = re.compile(r"(.+)_(weights?|kernel|bias)")


def leaf_of(segment: str) -> tuple[str, str] | None:
    """Return what of a key's last segment still names the module, and what the tensor is of it; None: a bare one."""
    if segment in _LEAVES:
        return "", _LEAVES[segment]
    joined = _JOINED_LEAF.fullmatch(segment)
    return (joined[1], _LEAVES[joined[2]]) if joined else None


@lru_cache(maxsize=65536)
def words_of(path: str) -> tuple[str, ...]:
    """Return the words of a path, in small letters, spelled one way where several are common."""
    words = [_SAME.get(word, word) for word in (found[0].lower() for found in _WORD.finditer(path))]
    made: list[str] = []
    for word in words:
        before = made[-1] if made else ""
        if (before, word) == ("layer", "norm"):
            made.pop()
        elif (before, word) == ("encoder", "attn"):  # attention to what the encoder made
            made[-1] = "cross"
        made.append(word)
    return tuple(made)


def _spelled(**parts: str) -> dict[tuple[str, ...], str]:
    return {tuple(text.split()): part for part, texts in parts.items() for text in texts.split(", ")}


# The end of a module's path inside a layer. Where one is the end of another, the longer decides.
_IN_LAYERS = _spelled(
    query="q proj, q, query, wq, q lin, to q, linear q, query proj",
    key="k proj, k, key, wk, k lin, to k, linear k, key proj",
    value="v proj, v, value, wv, v lin, to v, linear v, value proj",
    qkv="qkv, qkv proj, wqkv, in proj, c attn, to qkv",
    query_key_value="query key value, linear qkv",
    attn_out="o proj, wo, out proj, attn proj, attn output dense, attn c proj, attn dense, out lin, attn out",
    gate="gate proj, w 1",
    up="up proj, w 3",
    down="down proj, w 2",
    gate_up="gate up proj, gate up",
    fc1="fc 1, c fc, intermediate dense, linear 1, lin 1",
    fc2="fc 2, mlp c proj, output dense, linear 2, lin 2",
    norm1="norm 1, input norm, attn norm, norm before",
    norm2="norm 2, post attn norm, mlp norm, norm after",
)
# The end of a path outside of layers, behind any name.
_EMBEDDINGS = _spelled(
    word_embedding="tok embed, embed tok, wte, word embed",
    position_embedding="pos embed, embed pos, wpe",
    type_embedding="type embed",
)
# The whole of a path outside of layers, behind at most one other word: the model's name.
_ENDS = _spelled(
    head="lm head, head, classifier, fc, linear, output, score",
    final_norm="norm, norm f, final norm, norm final",
)
# What a fused projection holds, in the order in which its name says so, or in which everybody has it.
FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType({"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")})


@lru_cache(maxsize=65536)
def part_of(path: str, *, in_layer: bool) -> tuple[str, tuple[str, ...]]:
    """Return which part of a model a module is by the spelling of its path, and the words in front of that spelling.

    Where no spelling is known the part is empty, and the words are all of them.
    """
    words = words_of(path)
    tables = (_IN_LAYERS,) if in_layer else (_EMBEDDINGS, _ENDS)
    for table in tables:
        for start in range(len(words)):
            if words[start:] in table and (table is not _ENDS or start <= 1):
                return table[words[start:]], words[:start]
    return "", words


def likeness(one: Iterable[str], other: Iterable[str]) -> float:
    """Return the share of words that two names have in common, between 0 and 1."""
    left, right = set(one), set(other)
    return len(left & right) / len(left | right) if left or right else 1.0


Index = tuple[int, ...]
_SEGMENT = re.compile(r"[^./]*[./]?", re.DOTALL)
_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})([./]?)", re.DOTALL)
_DEEPEST = 32  # a hostile name can have a million segments
_FEW = 4  # "w1, w2, w3" are names; "layer_0" to "layer_11" are counted
_END = "./"  # no segment has two separators


@dataclass(frozen=True, slots=True)
class Name:
    """A key with its indices taken out: the texts around them."""

    texts: tuple[str, ...]

    def at(self, index: Index) -> str:
        """Return the key with these indices."""
        pieces = [self.texts[0]]
        for number, text in zip(index, self.texts[1:], strict=True):
            pieces += [str(number), text]
        return "".join(pieces)

    def with_last(self, index: Index) -> Name:
        """Return the name with its last indices made text."""
        kept = len(self.texts) - len(index)
        return Name((*self.texts[: kept - 1], Name(self.texts[kept - 1 :]).at(index)))


@dataclass(frozen=True, slots=True)
class Member:
    """One kind of tensor of a module, in every layer: its name, and the tensor for each index."""

    name: Name
    leaf: str  # the text of the key behind the module's path
    tensors: dict[Index, TensorInfo]


@dataclass(eq=False)
class Module:
    """Tensors that belong together, under the texts around the indices of their path.

    ``members`` are told apart by what they are of it (``weight``, ``bias``; empty for a tensor that is no module's).
    """

    path: Name
    order: tuple[int, ...]  # of its first key in the checkpoint
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def layers(self) -> str | None:
        """The path up to its first index; None where it has none."""
        return self.path.texts[0] if len(self.path.texts) > 1 else None

    @cached_property
    def rest(self) -> str:
        """The path behind its first index, with a mark for those that follow; the whole of it where it has none."""
        return "#".join(self.path.texts[1:] if len(self.path.texts) > 1 else self.path.texts).strip("./")

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words of ``rest``."""
        return words_of(self.rest)

    @cached_property
    def part(self) -> str:
        """Which part of a model it is by its spelling."""
        return part_of(self.rest, in_layer=self.layers is not None)[0]

    @cached_property
    def meaning(self) -> frozenset[str]:
        """The words of ``rest``, with one word for the part where its spelling is known."""
        part, words = part_of(self.rest, in_layer=self.layers is not None)
        return frozenset((*words, part) if part else words)

    @property
    def indices(self) -> frozenset[Index]:
        """Every index that one of its tensors has."""
        return frozenset(index for member in self.members.values() for index in member.tensors)

    @property
    def main(self) -> Member:
        """The tensor that says most about it."""
        return self.members.get("weight") or next(iter(self.members.values()))

    def apart(self, kept: int = 0) -> list[Module]:
        """Return the modules of each single index, of which only the first ones are ``kept`` as indices."""
        made: dict[Index, Module] = {}
        for kind, member in self.members.items():
            for index, info in member.tensors.items():
                head, tail = index[:kept], index[kept:]
                if tail not in made:
                    made[tail] = Module(self.path.with_last(tail), (*self.order, *tail))
                    if not kept:
                        made[tail].part = self.part
                single = made[tail].members.setdefault(kind, Member(member.name.with_last(tail), member.leaf, {}))
                single.tensors[head] = info
        return list(made.values())


def modules_of(infos: Mapping[str, TensorInfo]) -> list[Module]:
    """Return the modules of a checkpoint, in its order; numbers that count layers are indices, all else is text."""
    names: dict[tuple[str, ...], dict[Index, TensorInfo]] = {}
    for key, (texts, index) in _indexed(infos).items():
        names.setdefault(texts, {})[index] = infos[key]
    made: dict[tuple[tuple[str, ...], str], Module] = {}
    for order, (texts, tensors) in enumerate(names.items()):
        cut = max(texts[-1].rfind("."), texts[-1].rfind("/")) + 1
        found = leaf_of(texts[-1][cut:])
        joined, kind = found or ("", "")
        owner = texts[-1][:cut] + joined if joined else texts[-1][: max(cut - 1, 0)]
        path = (*texts[:-1], owner if found else texts[-1])
        leaf = texts[-1][len(path[-1]) :]
        module = made.setdefault((path, "" if found else "bare"), Module(Name(path), (order,)))
        if kind in module.members:  # gamma beside weight: which of them is the module's cannot be known
            module = made[path, texts[-1]] = Module(Name(texts), (order,))
            leaf, kind = "", ""
        module.members[kind] = Member(Name(texts), leaf, tensors)
    return list(made.values())


_Node = dict[str, "_Node"]


def _indexed(keys: Iterable[str]) -> dict[str, tuple[tuple[str, ...], Index]]:
    root: _Node = {}
    for key in keys:
        node = root
        for segment in _segments(key):
            node = node.setdefault(segment, {})
    found: dict[str, tuple[tuple[str, ...], Index]] = {}
    waiting: list[tuple[_Node, str, tuple[str, ...], Index]] = [(root, "", ("",), ())]
    below: dict[int, frozenset[str]] = {}
    _gather(root, below)
    while waiting:
        node, key, texts, index = waiting.pop()
        counted = _counted(node, below)
        for segment, child in node.items():
            number = counted.get(segment)
            if number is None:
                here, there = (*texts[:-1], texts[-1] + segment), index
            else:
                here, there = (*texts[:-1], texts[-1] + number[0], number[2]), (*index, int(number[1]))
            if segment == _END:
                found[key] = (texts, index)
            else:
                waiting.append((child, key + segment, here, there))
    return {key: found[key] for key in keys}


def _segments(key: str) -> list[str]:
    parts = [part for part in _SEGMENT.findall(key) if part]
    parts = parts if len(parts) <= _DEEPEST else [*parts[: _DEEPEST - 1], "".join(parts[_DEEPEST - 1 :])]
    return [*parts, _END]


def _gather(node: _Node, below: dict[int, frozenset[str]]) -> frozenset[str]:
    """Return the names below a node, with every number the same, and remember them for each node."""
    names: set[str] = set()
    for segment, child in node.items():
        match = _NUMBERED.fullmatch(segment)
        plain = f"#{match[3]}" if match and not match[1] else segment
        inner = _gather(child, below)
        names.update(f"{plain}{name}" for name in inner) if inner else names.add(plain)
    below[id(node)] = made = frozenset(names)
    return made


def _counted(node: _Node, below: Mapping[int, frozenset[str]]) -> dict[str, tuple[str, str, str]]:
    """Return which children of a node are counted: their text, number and separator."""
    families: dict[tuple[str, str], list[tuple[str, re.Match[str]]]] = {}
    for segment in node:
        match = _NUMBERED.fullmatch(segment)
        if match:
            families.setdefault((match[1], match[3]), []).append((segment, match))
    counted: dict[str, tuple[str, str, str]] = {}
    for (text, _), members in families.items():
        numbers = {int(match[2]) for _, match in members}
        layers = [below[id(node[segment])] for segment, _ in members]
        inside = any(layer != frozenset({_END}) for layer in layers)
        if (not text or (inside and len(numbers) > 1 and (0 in numbers or len(numbers) > _FEW))) and _alike(layers):
            counted |= {segment: (match[1], match[2], match[3]) for segment, match in members}
    return counted


def _alike(layers: Sequence[frozenset[str]]) -> bool:
    """Return whether most of what is counted is built alike, as layers are and the steps of a Sequential are not."""
    usual = Counter(layers).most_common(1)[0][0]
    shares = [len(layer & usual) / max(len(layer | usual), 1) for layer in layers]
    return len(shares) == 1 or sum(shares) - 1 >= 0.5 * (len(shares) - 1)  # one is the usual one itself
