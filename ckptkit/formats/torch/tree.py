"""Walking the inert tree of a pickle: where the weights are, what else there is, all within bounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.core.checkpoint import Entry, KeyPath
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, printable, quoted, shell_word
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.pickle.values import CodeName, PickledMapping, Placeholder
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.wrappers.envelopes import Selection, choose_envelope, find_optimizers

__all__ = [
    "UniqueNames",
    "bracketed_key",
    "children",
    "describe_entry",
    "dotted_key",
    "find_mapping",
    "is_tensor",
    "key_name",
    "leaves",
    "type_name",
    "unique_names",
]


_LONGEST_SPELLED = 80
_MOST_TOLD = 8


def key_name(key: object) -> str:
    """Return a key as a part of a dotted name: strings as they are, everything else as Python writes it."""
    return key if isinstance(key, str) else _spelled(key)


def _spelled(key: object) -> str:
    text = None
    if isinstance(key, str | int | float | bytes | None):
        text = repr(key)
    elif isinstance(key, tuple) and len(key) <= _LONGEST_SPELLED:
        text = f"({', '.join(map(_spelled, key))}{',' * (len(key) == 1)})"
    if text is None or (len(text) > _LONGEST_SPELLED and not isinstance(key, str)):
        return f"<{type_name(key)}>"
    return text


def dotted_key(path: KeyPath) -> str:
    """Return the dotted key of a path, as ``state_dict`` would name it."""
    return path[0] if len(path) == 1 and isinstance(path[0], str) else ".".join(map(key_name, path))


def bracketed_key(path: KeyPath) -> str:
    """Return the path written out key by key, for where dotted keys would collide: ``['a']['b']``."""
    return "".join(f"[{_spelled(key)}]" for key in path)


@dataclass(frozen=True, slots=True)
class UniqueNames:
    """A name for each place, all different; ``ambiguous`` has the dotted name of those that could not keep it."""

    names: Sequence[str]
    ambiguous: dict[str, str]
    warnings: list[str]


def unique_names(places: Sequence[KeyPath]) -> UniqueNames:
    """Return a name for each place: dotted, or written out key by key where two dotted ones would be equal.

    A key at the top of a mapping keeps its name, since it is what ``load_state_dict`` would find there. A dotted
    name is made up where one of the keys in it is neither a string nor an integer.
    """
    flat = [dotted_key(place) for place in places]
    count = Counter(flat)
    taken = {name for name, times in count.items() if times == 1}
    ambiguous: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    names: list[str] = []
    for place, dotted in zip(places, flat, strict=True):
        name = dotted
        if count[dotted] > 1:
            if len(place) != 1 or type(place[0]) is not str:
                name = bracketed_key(place)
                if name in taken:  # nan is not equal to nan, and a string can look like a path
                    name = f"{name}#{len(names)}"
                ambiguous[name] = dotted
            groups.setdefault(dotted, []).append(name)
            taken.add(name)
        elif not all(type(key) in (str, int) for key in place):
            ambiguous[name] = dotted
        names.append(name)
    said = [_told(dotted, members) for dotted, members in list(groups.items())[:_MOST_TOLD]]
    if len(groups) > _MOST_TOLD:
        said.append(f"{len(groups) - _MOST_TOLD:,} more names would each be that of several entries")
    warnings: list[str] = [ReaderWarning(text, codes.SAME_NAME) for text in said]
    return UniqueNames(names, ambiguous, warnings)


def _told(dotted: str, members: Sequence[str]) -> str:
    more = f" and {len(members) - 3:,} more" if len(members) > 3 else ""
    return f"{', '.join(map(quoted, members[:3]))}{more} would both be called {quoted(dotted)}"


def type_name(value: object) -> str:
    """Return what kind of thing ``value`` is, by the class that the pickle names for it."""
    if isinstance(value, TensorRef):
        return "tensor"
    if isinstance(value, PickledMapping):
        return value.kind
    if isinstance(value, Placeholder):
        return str(value.factory) if isinstance(value.factory, CodeName) else "object"
    if isinstance(value, CodeName):
        return str(value)
    return "null" if value is None else type(value).__name__


_DEEPEST = 200
_MOST_SHOWN = 64
_MOST_LISTED = 8
_LONGEST_SHOWN = 2000
_LONGEST_LISTED = 1000
_SCALARS = frozenset({int, float, bool, str, bytes, type(None)})


def is_tensor(value: object) -> bool:
    """Return whether a node of a tree is a tensor."""
    return isinstance(value, TensorRef)


def find_mapping(tree: object, selection: Selection) -> tuple[object, KeyPath]:
    """Return the selected mapping and its path in the tree.

    Raises ``FormatError`` where there is no such mapping, and where several could be the weights or the optimizer.
    """
    if selection.optimizer:
        return _the_optimizer(tree)
    if selection.key:
        return _descend(tree, selection.key)
    if not isinstance(tree, Mapping):
        return tree, ()
    path = choose_envelope(tree, is_tensor)
    value: object = tree
    for key in path:
        value = value[key] if isinstance(value, Mapping) else None
    return value, path


def _the_optimizer(tree: object) -> tuple[object, KeyPath]:
    found = find_optimizers(tree)
    if not found:
        raise FormatError("holds no optimizer state", hint="it is what optimizer.state_dict() gives; save that too")
    if len(found) > 1:
        names = [dotted_key(path) for path in found[:_MOST_LISTED]]
        raise FormatError(
            f"holds the states of {len(found)} optimizers: {', '.join(map(quoted, names))}",
            hint=f"say which is meant by adding {', '.join(shell_word(f'::{name}') for name in names)} to the path",
        )
    value = tree
    for key in found[0]:
        value = children(value)[key]
    return value, found[0]


def _descend(tree: object, wanted: str) -> tuple[object, KeyPath]:
    """Follow every reading of ``wanted`` at once: keys have dots themselves, and may be given as ``['a.b']`` too."""
    reached: list[tuple[object, KeyPath]] = []
    open_: list[tuple[object, KeyPath, str]] = [(tree, (), wanted)]
    seen: set[tuple[int, int]] = set()
    stuck, deepest = tree, 0
    while open_:
        value, path, rest = open_.pop()
        if not rest:
            reached.append((value, path))
            continue
        if (id(value), len(rest)) in seen:  # a small file can reach one value on many ways
            continue
        seen.add((id(value), len(rest)))
        further = list(_steps(value, rest))
        open_.extend((inside, (*path, key), left) for key, inside, left in reversed(further))
        if not further and len(path) >= deepest:
            stuck, deepest = value, len(path)
    if len(reached) > 1:
        listed = " or ".join(shell_word(f"::{bracketed_key(path)}") for _, path in reached[:4])
        raise FormatError(f"{quoted(wanted)} is {len(reached)} things in it", hint=f"write {listed}")
    if not reached:
        known = ", ".join(printable(key_name(key)) for key in list(children(stuck))[:12])
        raise FormatError(f"holds nothing at {quoted(wanted)}", hint=f"at that level there is: {known or 'nothing'}")
    return reached[0]


def _steps(value: object, rest: str) -> Iterator[tuple[object, object, str]]:
    """Yield each key of ``value`` that ``rest`` can begin with, what is there, and what is left of ``rest``."""
    for key, inside in children(value).items():
        for written in (key_name(key), bracketed_key((key,))):
            if rest.startswith(written) and rest[len(written) : len(written) + 1] in ("", ".", "["):
                yield key, inside, rest[len(written) :].removeprefix(".")


def children(value: object) -> Mapping[object, object]:
    """Return what can be reached in a value by a key or a position; of what holds nothing, nothing."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, Placeholder) and isinstance(value.state, Mapping):
        return value.state
    return {}


def leaves(value: object, budget: list[int]) -> Iterator[tuple[KeyPath, object]]:
    """Yield each leaf below ``value`` with its path, in order, descending into plain containers only.

    A long list of nothing but numbers, such as the losses of a run, is one leaf.

    Raises ``FormatError`` where the structure is nested too deeply, or expands to more places than
    ``budget[0]``, which is counted down: a kilobyte of shared lists can stand for 2^60 of them.
    """
    stack: list[Iterator[tuple[KeyPath, object]]] = [iter([((), value)])]
    while stack:
        for path, item in stack[-1]:
            budget[0] -= 1
            if budget[0] < 0:
                raise FormatError("the structure refers to its own parts so often that it expands too far")
            if isinstance(item, Mapping | list | tuple) and item and not _is_long_list(item, budget):
                if len(stack) > _DEEPEST:
                    raise FormatError(f"nested too deeply: more than {_DEEPEST} levels")
                pairs = item.items() if isinstance(item, Mapping) else enumerate(item)
                stack.append(_below(path, pairs))
                break
            yield path, item
        else:
            stack.pop()


def _is_long_list(item: Mapping[object, object] | list[object] | tuple[object, ...], budget: list[int]) -> bool:
    if isinstance(item, Mapping) or len(item) <= _LONGEST_LISTED or not isinstance(item[0], int | float | str | None):
        return False
    budget[0] -= len(item)
    return _SCALARS.issuperset(map(type, item))


def _below(path: KeyPath, pairs: object) -> Iterator[tuple[KeyPath, object]]:
    for key, value in pairs:  # type: ignore[attr-defined]
        yield (*path, key), value


def describe_entry(name: str, value: object, budget: list[int]) -> Entry:
    """Return an entry for ``value``: itself where it is small and JSON can hold it, else what it is made of.

    ``budget[0]`` bounds the places that are looked at, over all calls together.
    """
    shown = _plain(value, [_MOST_SHOWN], 4)
    return Entry(name, type_name(value), _outline(value, budget) if shown is _TOO_MUCH else shown)


_TOO_MUCH = object()


def _plain(value: object, left: list[int], depth: int) -> object:
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        return _TOO_MUCH
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= 64 else _TOO_MUCH
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value if len(value) <= _LONGEST_SHOWN else _TOO_MUCH
    if isinstance(value, Placeholder) and isinstance(value.state, dict) and not value.items and not value.pairs:
        return _plain(value.state, left, depth)
    if isinstance(value, Mapping):
        if len(value) > _MOST_SHOWN or not all(isinstance(key, str) for key in value):
            return _TOO_MUCH
        pairs = {str(key): _plain(item, left, depth - 1) for key, item in value.items()}
        return _TOO_MUCH if _TOO_MUCH in pairs.values() else pairs
    if isinstance(value, list | tuple):
        items = [_plain(item, left, depth - 1) for item in value[: _MOST_SHOWN + 1]]
        return _TOO_MUCH if any(item is _TOO_MUCH for item in items) else items
    return _TOO_MUCH


def _outline(value: object, budget: list[int]) -> str:
    if isinstance(value, TensorRef):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, int):
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes | bytearray):
        return plural(len(value), "character" if isinstance(value, str) else "byte")
    if isinstance(value, Placeholder):
        return "code reference, not run"
    if not isinstance(value, Mapping | list | tuple):
        return "not shown"
    tensors = 0
    try:
        for _, leaf in leaves(value, budget):
            tensors += isinstance(leaf, TensorRef)
    except FormatError:
        return f"{plural(len(value), 'item')}, too deep or too many to count"
    return plural(len(value), "item") + (f", {plural(tensors, 'tensor')}" if tensors else "")
