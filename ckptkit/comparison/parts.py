"""Find tensors that one state_dict has whole and the other in parts: stacked experts, and fused projections."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

from ckptkit.comparison.numbered import NUMBER, numbered_families
from ckptkit.comparison.roles import FUSED_ROLES, role_of, split_leaf, split_words
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import plural, quoted, shared_start

__all__ = ["PartedTensor", "align_command", "find_parted", "fold_command", "parted_hint"]

_MAX_SEGMENTS = 32  # a hostile key can have a million
_MAX_LISTS = 200  # of one layer; real layers have a dozen
_PARTS_OF: Mapping[str, tuple[str, ...]] = {**FUSED_ROLES, "query_key_value": FUSED_ROLES["qkv"]}
_MOST_PAIRS_OF_SHAPES = 10_000  # a model has some dozens of shapes
_SEGMENT_OF_DIGITS = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?![^.])")
_Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PartedTensor:
    """A tensor that one side has under the key ``whole``, and the other side as the tensors ``parts``.

    ``is_whole_expected`` says which: True where the parts were found, False where they are expected.
    """

    whole: str
    parts: tuple[str, ...]
    is_whole_expected: bool

    @property
    def expected(self) -> tuple[str, ...]:
        """The expected keys that have no value of their own in the other state_dict."""
        return (self.whole,) if self.is_whole_expected else self.parts

    def sentence(self, expected: str, found: str) -> str:
        """Return what each side has, for the words that name the two sides: ``the base``, ``the donor``."""
        whole, parts = (expected, found) if self.is_whole_expected else (found, expected)
        names = " and ".join([quoted(self.parts[0]), *([quoted(self.parts[1])] if len(self.parts) == 2 else [])])
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 2 else ""
        return f"{whole} has {quoted(self.whole)} whole, and {parts} has it in {len(self.parts)} parts, {names}{more}"


def find_parted(missing: Mapping[str, TensorInfo], unexpected: Mapping[str, TensorInfo]) -> tuple[PartedTensor, ...]:
    """Return the missing tensors that evidently have their values among the unexpected ones, joined or in parts.

    Parts are tensors of one shape that differ in one number of their names, as experts do. Their stack or their
    concatenation has the shape of the whole. Parts are also query, key and value, or gate and up, of one module. Two
    numbered lists can be fused too, such as gate and up of every expert.

    Both mappings have the keys that the model uses. A key belongs to one result at most.

    Example:
        >>> found = {f"experts.{n}.w2.weight": TensorInfo("", "F32", (4, 8)) for n in range(3)}
        >>> find_parted({"experts.down_proj": TensorInfo("", "F32", (3, 4, 8))}, found)[0].parts
        ('experts.0.w2.weight', 'experts.1.w2.weight', 'experts.2.w2.weight')
    """
    results = [PartedTensor(whole, parts, True) for whole, parts in _wholes(missing, unexpected)]
    taken = {key for result in results for key in (result.whole, *result.parts)}
    others = {key: info for key, info in missing.items() if key not in taken} if taken else missing
    for whole, parts in _wholes(unexpected, others):
        if whole not in taken:
            results.append(PartedTensor(whole, parts, False))
    return tuple(results)


def align_command(expected: CheckpointSummary, found: CheckpointSummary) -> str:
    """Return the command that looks for rules; EXPECTED or FOUND stands for a side that is only in memory."""
    return f"ckpt align {expected.argument or 'EXPECTED'} {found.argument or 'FOUND'} -o rules.toml"


def fold_command(expected: CheckpointSummary, found: CheckpointSummary) -> str:
    """Return the command that folds an adapter into its base, with the words of ``align_command``."""
    return f"ckpt merge {expected.argument or 'EXPECTED'} {found.argument or 'FOUND'} -o OUT --method lora"


def parted_hint(parted: Sequence[PartedTensor], expected: CheckpointSummary, found: CheckpointSummary) -> str:
    """Return a sentence about the first of these tensors, and the command that writes rules for all of them."""
    more = f", and {plural(len(parted) - 1, 'more tensor')} in the same way" if len(parted) > 1 else ""
    return f"{parted[0].sentence('EXPECTED', 'FOUND')}{more}; {align_command(expected, found)} looks for the rules"


@dataclass(frozen=True, slots=True)
class _Name:
    """A key in the terms that the names of whole and parts have in common."""

    segments: tuple[str, ...]
    module: tuple[str, ...]  # the segments of the module, with the part of the last one that is not a leaf
    is_bias: bool

    @property
    def role(self) -> str:
        """The role of the module in its layer, such as ``qkv``."""
        last = max((at for at, segment in enumerate(self.module) if segment.isdigit()), default=-1)
        path = ".".join(self.module[last + 1 :])
        # A layer in a module's own name, such as blocks.0.attn.weight, can only be fused; its shape must confirm it.
        return role_of(path, in_layer=True)[0] or ("qkv" if split_words(path)[-1:] == ("attn",) else "")


def _named(key: str) -> _Name:
    segments = tuple(key.split(".", _MAX_SEGMENTS))
    leaf = split_leaf(segments[-1])
    rest = segments[-1] if leaf is None else leaf[0]
    return _Name(segments, (*segments[:-1], *([rest] if rest else [])), leaf is not None and leaf[1] == "bias")


class _Outline(NamedTuple):
    """What is first asked about each key of a large state_dict: its numbers, its role, and the kind of its tensor."""

    numbers: tuple[str, ...]
    role: str
    is_bias: bool


def _outline(key: str) -> _Outline:
    texts = _SEGMENT_OF_DIGITS.split(key)
    # Only the text behind the last number decides the rest, and the layers of a model have few such texts.
    return _Outline(tuple(texts[1::2]), *_ending(f"0{texts[-1]}" if len(texts) > 1 else key))


@lru_cache(maxsize=4096)
def _ending(key: str) -> tuple[str, bool]:
    name = _named(key)
    return name.role, name.is_bias


def _wholes(
    wholes: Mapping[str, TensorInfo], pieces: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each key of ``wholes`` that has parts, with their keys."""
    if not wholes or len(pieces) < 2:
        return
    few_wholes, few_pieces = _of_fitting_shapes(wholes, pieces)
    if (len(few_wholes), len(few_pieces)) == (len(wholes), len(pieces)):
        yield from _search(wholes, pieces)
    # A list of tensors is judged with those of other shapes that continue it, so all pieces are searched in the end.
    elif next(_search(few_wholes, few_pieces), None) is not None:
        yield from _search(few_wholes, pieces)


def _of_fitting_shapes(
    wholes: Mapping[str, TensorInfo], pieces: Mapping[str, TensorInfo]
) -> tuple[Mapping[str, TensorInfo], Mapping[str, TensorInfo]]:
    """Return the wholes whose shapes can be made of a shape of the pieces and others, and the pieces of such shapes.

    A model has few shapes, and they are compared much faster than names.
    """
    of_wholes, of_pieces = ({info.shape for info in side.values()} for side in (wholes, pieces))
    if len(of_wholes) * len(of_pieces) > _MOST_PAIRS_OF_SHAPES or any(0 in shape for shape in of_pieces):
        return wholes, pieces
    pairs = [(whole, part) for whole in of_wholes for part in of_pieces if _can_be_part(whole, part)]
    if not pairs:
        return {}, {}
    fitting, parts = {whole for whole, _ in pairs}, {part for _, part in pairs}
    return (
        {key: info for key, info in wholes.items() if info.shape in fitting},
        {key: info for key, info in pieces.items() if info.shape in parts},
    )


def _can_be_part(whole: _Shape, part: _Shape) -> bool:
    """Return whether a tensor of the shape ``part`` and others can be stacked or concatenated to the shape ``whole``.

    This holds for everything that ``_numbered_parts`` and ``_fused_parts`` accept.
    """
    stacks = [whole[1:]] if whole else []  # the shapes of one tensor, or of several that are concatenated
    stacks += [shape[::-1] for shape in stacks if len(shape) == 2]
    return part in stacks or any(
        len(shape) == len(part)
        and any(
            shape[:dim] + shape[dim + 1 :] == part[:dim] + part[dim + 1 :] and shape[dim] > part[dim]
            for dim in range(min(len(part), 2))
        )
        for shape in (whole, *stacks)
    )


def _search(
    wholes: Mapping[str, TensorInfo], pieces: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    outlines = {key: _outline(key) for key in wholes}
    lists = _lists(pieces, {len(outline.numbers) for outline in outlines.values()})
    fused = _by_role(pieces) if any(outline.role in _PARTS_OF for outline in outlines.values()) else {}
    used: set[str] = set()
    for key, info in wholes.items():
        outline = outlines[key]
        near = lists.get(outline.numbers, ())
        if not info.shape or (not near and outline.role not in _PARTS_OF):
            continue
        name = _named(key)
        parts = _numbered_parts(name, outline.role, info.shape, near, used) or _fused_parts(
            name, outline, info.shape, fused, pieces
        )
        if parts and used.isdisjoint(parts):
            used.update(parts)
            yield key, parts


@dataclass(frozen=True, slots=True)
class _NumberedList:
    """A family of tensors by the segments of its keys: those before the number are ``head``, those behind ``tail``."""

    head: tuple[str, ...]
    tail: tuple[str, ...]
    keys: tuple[str, ...]
    shape: _Shape
    is_bias: bool

    @property
    def role(self) -> str:
        """The role of one part in the list, such as ``down``."""
        return _named(".".join(self.tail)).role


def _lists(pieces: Mapping[str, TensorInfo], counts: AbstractSet[int]) -> dict[tuple[str, ...], list[_NumberedList]]:
    """Return the numbered lists by the numbers in their keys that do not count them.

    ``counts`` are the lengths that such a tuple of numbers can have.
    """
    found: dict[tuple[str, ...], list[_NumberedList]] = defaultdict(list)
    shapes = {key: info.shape for key, info in pieces.items() if len(NUMBER.findall(key)) - 1 in counts}
    for family in numbered_families(shapes):
        if family.count > 1 and family.head:
            head = tuple(family.head.removesuffix(".").split("."))
            tail = tuple(family.tail.split(".")[1:])
            is_bias = _outline(family.keys[0]).is_bias
            found[family.numbers].append(_NumberedList(head, tail, family.keys, family.shape, is_bias))
    return found


def _numbered_parts(
    name: _Name, role: str, shape: _Shape, lists: Sequence[_NumberedList], used: AbstractSet[str]
) -> tuple[str, ...]:
    """Return the keys of one list, or of two, whose tensors are the tensor when they are stacked or concatenated."""
    near = [family for family in lists[:_MAX_LISTS] if _is_near(name, family)]
    near = [family for family in near if used.isdisjoint(family.keys)]
    if not near:
        return ()
    # The lists that the name of the whole speaks of come first.
    roles = _PARTS_OF.get(role, (role,) if role else ())
    words = set(split_words(".".join(name.segments)))
    near.sort(key=lambda one: (one.role not in roles, -len(words.intersection(split_words(".".join(one.tail))))))
    for shapes in (_joined, _transposed):
        for family in near:
            if shape in shapes(len(family.keys), family.shape):
                return family.keys
        for first, second in combinations(near, 2):
            total = _concatenated(first.shape, second.shape)
            is_pair = first.head == second.head and len(first.keys) == len(second.keys)
            if is_pair and total and shape in shapes(len(first.keys), total):
                return (*first.keys, *second.keys)
    return ()


def _is_near(name: _Name, family: _NumberedList) -> bool:
    """Return whether a list evidently belongs to a name: the number left out, its own segment, or its words."""
    if name.is_bias != family.is_bias:
        return False
    if name.segments == (*family.head, *family.tail):
        return True
    if not family.head[-1].isdigit() and family.head[-1] in name.module:
        return True
    owner = name.segments[:-1]
    own_words = split_words(name.segments[-1])
    is_inside = bool(owner) and family.head[: len(owner)] == owner
    return is_inside and not set(own_words).isdisjoint(split_words(".".join(family.tail)))


def _joined(count: int, shape: _Shape) -> tuple[_Shape, ...]:
    """Return the shapes of a stack and of a concatenation along the first dim, of ``count`` tensors."""
    return ((count, *shape), *([(count * shape[0], *shape[1:])] if shape else []))


def _transposed(count: int, shape: _Shape) -> tuple[_Shape, ...]:
    """Return the shape of a stack of transposed matrices, as some layers of experts hold them."""
    return ((count, *shape[::-1]),) if len(shape) == 2 else ()


def _concatenated(first: _Shape, second: _Shape) -> _Shape:
    """Return the shape of two tensors that are concatenated along their first dim, or an empty shape."""
    return (first[0] + second[0], *first[1:]) if first and second and first[1:] == second[1:] else ()


def _by_role(pieces: Iterable[str]) -> dict[tuple[object, ...], list[tuple[tuple[str, ...], str]]]:
    """Return module paths and keys by the numbers of a key, the role of its module, and the kind of its tensor."""
    found: dict[tuple[object, ...], list[tuple[tuple[str, ...], str]]] = defaultdict(list)
    roles = {role for parts in _PARTS_OF.values() for role in parts}
    for key in pieces:
        numbers, role, is_bias = _outline(key)
        if role in roles:
            found[numbers, role, is_bias].append((_named(key).module, key))
    return found


def _fused_parts(
    name: _Name,
    outline: _Outline,
    shape: _Shape,
    by_role: Mapping[tuple[object, ...], Sequence[tuple[tuple[str, ...], str]]],
    pieces: Mapping[str, TensorInfo],
) -> tuple[str, ...]:
    """Return the keys of the projections that the tensor fuses, such as query, key and value of its module."""
    roles = _PARTS_OF.get(outline.role, ())
    candidates = [by_role.get((outline.numbers, role, outline.is_bias), ()) for role in roles]
    if not roles or not all(candidates):
        return ()
    parts = []
    for of_role in candidates:
        nearness = [shared_start(name.module, module) for module, _ in of_role]
        best = max(nearness)
        if nearness.count(best) != 1:  # such as self-attention and cross-attention
            return ()
        parts.append(of_role[nearness.index(best)][1])
    shapes = [pieces[key].shape for key in parts]
    dims = range(min(len(shape), 2))
    return tuple(parts) if any(_is_concatenation(shape, shapes, dim) for dim in dims) else ()


def _is_concatenation(whole: _Shape, parts: Sequence[_Shape], dim: int) -> bool:
    return all(
        len(part) == len(whole) and part[:dim] + part[dim + 1 :] == whole[:dim] + whole[dim + 1 :] for part in parts
    ) and whole[dim] == sum(part[dim] for part in parts)
