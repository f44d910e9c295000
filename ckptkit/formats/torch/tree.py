"""Find the weights in the values of a pickle, and list everything else, with bounds on time and memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeGuard

from ckptkit.core.checkpoint import Entry, KeyPath
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import listed, nearest, plural, printable, quoted, shell_word, short_number
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.pickle.values import CodeName, PickledMapping, Placeholder
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.wrappers.entries import KnownEntry, known_entries
from ckptkit.wrappers.envelopes import Selection, find_optimizers, find_weights

__all__ = [
    "FoundMapping",
    "UniqueNames",
    "bracketed_key",
    "children",
    "describe_entry",
    "dotted_key",
    "find_mapping",
    "find_object",
    "is_tensor",
    "key_name",
    "leaves",
    "type_name",
    "unique_names",
    "without_numbers",
]


_DEEPEST = 200
_LONGEST_KEY = 80  # as a part of a name
_MOST_WARNINGS = 8
_MOST_OPTIMIZERS = 8  # named in an error
_MOST_COMPARED = 10_000  # keys that are compared with an unknown one
_MOST_NAMED = 12  # keys in a hint
_MOST_ITEMS = 64  # of an entry that is shown with all its values
_LONGEST_TEXT = 2000  # that is shown
_SCALARS_PER_PLACE = 10  # that are looked at in the time of one place
_LONGEST_LIST = 1000  # up to this length, each scalar of a list is a leaf
_FIRST_NUMBERS = 3  # of a longer list that are shown
_LARGE = 10**15
_SCALARS = frozenset({int, float, bool, str, bytes, type(None)})
_NOT_SHOWN = object()


def key_name(key: object) -> str:
    """Return a key as a part of a dotted name: a string unchanged, any other key as Python writes it."""
    return key if isinstance(key, str) else _key_repr(key)


def _key_repr(key: object) -> str:
    text = None
    if isinstance(key, str | int | float | bytes | None):
        text = repr(key)
    elif isinstance(key, tuple) and len(key) <= _LONGEST_KEY:
        text = f"({', '.join(map(_key_repr, key))}{',' * (len(key) == 1)})"
    if text is None or (len(text) > _LONGEST_KEY and not isinstance(key, str)):
        return f"<{type_name(key)}>"
    return text


def dotted_key(path: KeyPath) -> str:
    """Return the dotted key of a key path, as in a ``state_dict``."""
    return path[0] if len(path) == 1 and isinstance(path[0], str) else ".".join(map(key_name, path))


def bracketed_key(path: KeyPath) -> str:
    """Return a key path in brackets, ``['a']['b']``, which tells apart places with equal dotted keys."""
    return "".join(f"[{_key_repr(key)}]" for key in path)


@dataclass(frozen=True, slots=True)
class UniqueNames:
    """A unique name for each key path. ``ambiguous`` maps each name that differs from the dotted key to that key."""

    names: Sequence[str]
    ambiguous: dict[str, str]
    warnings: list[str]


def unique_names(places: Sequence[KeyPath]) -> UniqueNames:
    """Return a unique name for each key path: dotted, or in brackets if two dotted names would be equal.

    A key at the top of the mapping keeps its name, because ``load_state_dict`` looks for that name. A name is also
    ambiguous if one of the keys in the path is neither a string nor an integer.
    """
    flat = [dotted_key(place) for place in places]
    count = Counter(flat)
    used = {name for name, times in count.items() if times == 1}
    ambiguous: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    names: list[str] = []
    for place, dotted in zip(places, flat, strict=True):
        name = dotted
        if count[dotted] > 1:
            if len(place) != 1 or type(place[0]) is not str:
                name = bracketed_key(place)
                if name in used:  # nan is not equal to nan, and a string can look like a path in brackets
                    name = f"{name}#{len(names)}"
                ambiguous[name] = dotted
            groups.setdefault(dotted, []).append(name)
            used.add(name)
        elif not all(type(key) in (str, int) for key in place):
            ambiguous[name] = dotted
        names.append(name)
    texts = [_same_name(dotted, members) for dotted, members in list(groups.items())[:_MOST_WARNINGS]]
    if len(groups) > _MOST_WARNINGS:
        texts.append(f"{len(groups) - _MOST_WARNINGS:,} more names would each mean several entries")
    warnings: list[str] = [ReaderWarning(text, codes.SAME_NAME) for text in texts]
    return UniqueNames(names, ambiguous, warnings)


def _same_name(dotted: str, members: Sequence[str]) -> str:
    return f"{listed(members, 3)} would both be called {quoted(dotted)}"


def type_name(value: object) -> str:
    """Return the name of the class of a value, as the pickle names the class."""
    if isinstance(value, TensorRef):
        return "tensor" if is_tensor(value) else "numpy.ndarray"
    if isinstance(value, PickledMapping):
        return value.kind
    if isinstance(value, Placeholder):
        return str(value.factory) if isinstance(value.factory, CodeName) else "object"
    if isinstance(value, CodeName):
        return str(value)
    return "null" if value is None else type(value).__name__


def is_tensor(value: object) -> TypeGuard[TensorRef]:
    """Return whether a value is a tensor, and not an array of text, dates or objects."""
    return isinstance(value, TensorRef) and value.kind != "values"


class FoundMapping(NamedTuple):
    """The selected mapping, its path in the tree, and the keys in it that hold no weights.

    ``beside`` names the keys next to the first key of the path with tensors that can be weights too.
    """

    value: object
    path: KeyPath
    left_out: Mapping[object, KnownEntry]
    beside: tuple[str, ...] = ()


def find_mapping(tree: object, selection: Selection) -> FoundMapping:
    """Return the selected mapping of the tree.

    Raises ``FormatError`` if no mapping or more than one mapping fits the selection.
    """
    if selection.optimizer:
        return FoundMapping(*_only_optimizer(tree), {})
    if selection.key:
        return FoundMapping(*_descend(tree, selection.key), {})
    if selection.everything:
        return FoundMapping(tree, (), {})
    if not isinstance(tree, Mapping):
        items: dict[object, object] = dict(enumerate(tree)) if isinstance(tree, list | tuple) else {}
        return FoundMapping(tree, (), known_entries(items, is_tensor, keep_tensors=True))
    # Modules save their state_dict as an OrderedDict, and "step" can be a buffer. A dict was put together by a script.
    is_state_dict = isinstance(tree, PickledMapping) and tree.kind == "OrderedDict"
    path, left_out, beside = find_weights(tree, is_tensor, keep_tensors=is_state_dict)
    value: object = tree
    for key in path:
        value = value[key] if isinstance(value, Mapping) else None
    return FoundMapping(value, path, left_out, beside)


def _only_optimizer(tree: object) -> tuple[object, KeyPath]:
    found = find_optimizers(tree)
    if not found:
        raise FormatError("holds no optimizer state", hint="save optimizer.state_dict() too")
    if len(found) > 1:
        names = [dotted_key(path) for path in found[:_MOST_OPTIMIZERS]]
        raise FormatError(
            f"holds the states of {len(found)} optimizers: {', '.join(map(quoted, names))}",
            hint=f"choose one: add {' or '.join(shell_word(f'::{name}') for name in names)} to the path",
        )
    value = tree
    for key in found[0]:
        value = children(value)[key]
    return value, found[0]


def _descend(tree: object, wanted: str) -> tuple[object, KeyPath]:
    """Return the value at the dotted name ``wanted``, and its key path.

    All readings of the name are tried, since a key can contain dots. ``['a.b']`` names exactly one key.
    """
    matches: list[tuple[object, KeyPath]] = []
    pending: list[tuple[object, KeyPath, str]] = [(tree, (), wanted)]
    seen: set[tuple[int, int]] = set()
    closest: tuple[object, KeyPath, str] = (tree, (), wanted)
    while pending:
        value, path, left = pending.pop()
        if not left:
            matches.append((value, path))
            continue
        if (id(value), len(left)) in seen:  # even a small file can reach one value in many ways
            continue
        seen.add((id(value), len(left)))
        steps = list(_steps(value, left))
        pending.extend((child, (*path, key), remaining) for key, child, remaining in reversed(steps))
        if not steps and len(path) >= len(closest[1]):
            closest = (value, path, left)
    if len(matches) > 1:
        choices = " or ".join(shell_word(f"::{bracketed_key(path)}") for _, path in matches[:4])
        raise FormatError(f"{quoted(wanted)} fits {len(matches)} places in the file", hint=f"write {choices}")
    if not matches:
        value, path, left = closest
        keys = {key_name(key): key for key in islice(children(value), _MOST_COMPARED)}
        first, dot, rest = left.partition(".")
        near = nearest(first, keys)
        meant = shell_word(f"::{dotted_key((*path, keys[near]))}{dot}{rest}") if near else ""
        hint = f"the keys at that level: {', '.join(map(printable, list(keys)[:_MOST_NAMED])) or 'none'}"
        if (holder := _holder(value, path, left)) is not None:
            where = f"with {shell_word(f'::{dotted_key(holder)}')} alone" if holder else "without the :: part"
            hint = f"{where}, --keep {shell_word(left + '.*')} selects keys by their names"
        raise FormatError(f"holds nothing at {quoted(wanted)}", hint=f"did you mean {meant}? {hint}" if near else hint)
    return matches[0]


def _holder(value: object, path: KeyPath, start: str) -> KeyPath | None:
    """Return the path of the mapping with keys that begin with a text and a dot: ``value``, or one mapping inside."""
    inside = [(path, value), *(((*path, key), child) for key, child in islice(children(value).items(), _MOST_NAMED))]
    found = [
        place
        for place, mapping in inside
        if any(key_name(key).startswith(f"{start}.") for key in islice(children(mapping), _MOST_COMPARED))
    ]
    return found[0] if found and (found[0] == path or len(found) == 1) else None


def _steps(value: object, name: str) -> Iterator[tuple[object, object, str]]:
    """Yield each key of ``value`` with which ``name`` can begin, the value at the key, and the rest of ``name``."""
    for key, child in children(value).items():
        for prefix in (key_name(key), bracketed_key((key,))):
            if name.startswith(prefix) and name[len(prefix) : len(prefix) + 1] in ("", ".", "["):
                yield key, child, name[len(prefix) :].removeprefix(".")


def children(value: object) -> Mapping[object, object]:
    """Return the values inside a value, by key or position; a scalar has none."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, Placeholder) and isinstance(value.state, Mapping):
        return value.state
    return {}


def find_object(tree: object, wanted: Container[int]) -> KeyPath | None:
    """Return the key path of the first value in the tree whose ``id`` is wanted, or None."""
    stack: list[tuple[object, KeyPath]] = [(tree, ())]
    seen: set[int] = set()
    while stack:
        value, path = stack.pop()
        if id(value) in wanted:
            return path
        if id(value) not in seen and len(path) <= _DEEPEST:
            seen.add(id(value))
            stack.extend((child, (*path, key)) for key, child in children(value).items())
    return None


def leaves(value: object, budget: list[int], whole: Collection[object] = ()) -> Iterator[tuple[KeyPath, object]]:
    """Yield each leaf below ``value`` with its key path, in order; only dicts, lists and tuples have leaves.

    The value at each key of ``whole`` is one leaf, and so is a long list of scalars, such as the losses of a run.
    ``budget[0]`` is the number of places that may be visited, and is counted down: a kilobyte of shared lists can
    expand to 2^60 places. Raises ``FormatError`` for a value that is nested too deeply or has more places.
    """
    stack: list[Iterator[tuple[KeyPath, object]]] = [iter([((), value)])]
    while stack:
        for path, item in stack[-1]:
            budget[0] -= 1
            if budget[0] < 0:
                raise FormatError("the structure refers to its own parts so often that it expands too far")
            is_whole = len(path) == 1 and path[0] in whole
            if isinstance(item, Mapping | list | tuple) and item and not is_whole and not _is_long_list(item, budget):
                if len(stack) > _DEEPEST:
                    raise FormatError(f"nested too deeply: more than {_DEEPEST} levels")
                items = item.items() if isinstance(item, Mapping) else enumerate(item)
                stack.append(_below(path, items))
                break
            yield path, item
        else:
            stack.pop()


def _below(path: KeyPath, items: Iterable[tuple[object, object]]) -> Iterator[tuple[KeyPath, object]]:
    for key, child in items:
        yield (*path, key), child


def _is_long_list(item: Mapping[object, object] | list[object] | tuple[object, ...], budget: list[int]) -> bool:
    if isinstance(item, Mapping) or len(item) <= _LONGEST_LIST or not isinstance(item[0], int | float | str | None):
        return False
    budget[0] -= len(item)
    return _has_only_scalars(item)


def without_numbers(tree: object) -> object:
    """Return a tree with None in the place of each long list or mapping of scalars directly below it."""
    if not isinstance(tree, Mapping):
        return tree
    long = {id(item): item for item in tree.values() if _is_long(item)}  # each once: many keys can share one
    numbers = {number for number, item in long.items() if _has_only_scalars(item)}
    return {key: None if id(item) in numbers else item for key, item in tree.items()}


def _is_long(item: object) -> TypeGuard[Mapping[object, object] | list[object] | tuple[object, ...]]:
    return isinstance(item, Mapping | list | tuple) and len(item) > _LONGEST_LIST


def _has_only_scalars(item: Mapping[object, object] | list[object] | tuple[object, ...]) -> bool:
    return _SCALARS.issuperset(map(type, item.values() if isinstance(item, Mapping) else item))


def describe_entry(name: str, value: object, budget: list[int]) -> Entry:
    """Return an entry with the value itself if it is small and JSON can hold it, else with a summary.

    ``budget[0]`` is the number of places that may be visited, in all calls together; one call leaves a quarter of them.
    """
    shown = _json_value(value, [_MOST_ITEMS], 4)
    return Entry(name, type_name(value), _summary(value, budget) if shown is _NOT_SHOWN else shown)


def _json_value(value: object, left: list[int], depth: int) -> object:
    """Return a value that JSON can hold, or ``_NOT_SHOWN`` for a value that is too large, too deep or of a class."""
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        return _NOT_SHOWN
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= 64 else _NOT_SHOWN
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value if len(value) <= _LONGEST_TEXT else _NOT_SHOWN
    if isinstance(value, Placeholder) and isinstance(value.state, dict) and not value.items and not value.pairs:
        return _json_value(value.state, left, depth)
    if isinstance(value, Mapping):
        if len(value) > _MOST_ITEMS or not all(isinstance(key, str) for key in value):
            return _NOT_SHOWN
        pairs = {str(key): _json_value(item, left, depth - 1) for key, item in value.items()}
        return _NOT_SHOWN if _NOT_SHOWN in pairs.values() else pairs
    if isinstance(value, list | tuple):
        items = [_json_value(item, left, depth - 1) for item in value[: _MOST_ITEMS + 1]]
        return _NOT_SHOWN if any(item is _NOT_SHOWN for item in items) else items
    return _NOT_SHOWN


def _first_numbers(value: Mapping[object, object] | list[object] | tuple[object, ...]) -> str:
    """Return the first and the last numbers of a long list, such as the losses of a run; empty for anything else."""
    if isinstance(value, Mapping) or len(value) <= _FIRST_NUMBERS:
        return ""
    ends = [*value[:_FIRST_NUMBERS], value[-1]]
    shown = [
        short_number(item) for item in ends if isinstance(item, float) or (type(item) is int and abs(item) < _LARGE)
    ]
    return f": {', '.join(shown[:-1])}, ..., {shown[-1]}" if len(shown) == len(ends) else ""


def _summary(value: object, budget: list[int]) -> str:
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
    cost = len(value) // _SCALARS_PER_PLACE
    if cost <= budget[0]:
        budget[0] -= cost
        if _has_only_scalars(value):
            return f"{plural(len(value), 'item')}{_first_numbers(value)}"
    kept = budget[0] // 4
    left = [budget[0] - kept]
    try:
        for _, leaf in leaves(value, left):
            tensors += isinstance(leaf, TensorRef)
    except FormatError:
        return f"{plural(len(value), 'item')}, too deep or too many to count"
    finally:
        budget[0] = kept + max(left[0], 0)
    return plural(len(value), "item") + (f", {plural(tensors, 'tensor')}" if tensors else "")
