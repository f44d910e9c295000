"""From a place in a nested state to a dotted name, and what to do where two places would have the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ckptkit.core.findings import Remark
from ckptkit.core.text import quoted
from ckptkit.formats.pickle.values import Global, MappingValue, Placeholder
from ckptkit.formats.torch.objects import TensorRef

__all__ = ["Names", "Path", "exact_key", "flat_key", "key_name", "name_places", "type_name"]

_LONGEST_SPELLED = 80
_MOST_TOLD = 8
Path = tuple[object, ...]


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


def flat_key(path: Path) -> str:
    """Return the dotted key of a path, as ``state_dict`` would name it."""
    return path[0] if len(path) == 1 and isinstance(path[0], str) else ".".join(map(key_name, path))


def exact_key(path: Path) -> str:
    """Return the path written out key by key, for where dotted keys would collide: ``['a']['b']``."""
    return "".join(f"[{_spelled(key)}]" for key in path)


@dataclass(frozen=True, slots=True)
class Names:
    """A name for each place, all different; ``made_up`` has the dotted name of those that could not keep it."""

    names: Sequence[str]
    made_up: dict[str, str]
    warnings: list[str]


def name_places(places: Sequence[Path]) -> Names:
    """Return a name for each place: dotted, or written out key by key where two dotted ones would be equal.

    A key at the top of a mapping keeps its name, since it is what ``load_state_dict`` would find there. A dotted
    name is made up where one of the keys in it is neither a string nor an integer.
    """
    flat = [flat_key(place) for place in places]
    count = Counter(flat)
    taken = {name for name, times in count.items() if times == 1}
    made_up: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    names: list[str] = []
    for place, dotted in zip(places, flat, strict=True):
        name = dotted
        if count[dotted] > 1:
            if len(place) != 1 or type(place[0]) is not str:
                name = exact_key(place)
                if name in taken:  # nan is not equal to nan, and a string can look like a path
                    name = f"{name}#{len(names)}"
                made_up[name] = dotted
            groups.setdefault(dotted, []).append(name)
            taken.add(name)
        elif not all(type(key) in (str, int) for key in place):
            made_up[name] = dotted
        names.append(name)
    said = [_told(dotted, members) for dotted, members in list(groups.items())[:_MOST_TOLD]]
    if len(groups) > _MOST_TOLD:
        said.append(f"{len(groups) - _MOST_TOLD:,} more names would each be that of several entries")
    warnings: list[str] = [Remark(text, "same-name") for text in said]
    return Names(names, made_up, warnings)


def _told(dotted: str, members: Sequence[str]) -> str:
    more = f" and {len(members) - 3:,} more" if len(members) > 3 else ""
    return f"{', '.join(map(quoted, members[:3]))}{more} would both be called {quoted(dotted)}"


def type_name(value: object) -> str:
    """Return what kind of thing ``value`` is, by the class that the pickle names for it."""
    if isinstance(value, TensorRef):
        return "tensor"
    if isinstance(value, MappingValue):
        return value.kind
    if isinstance(value, Placeholder):
        return str(value.factory) if isinstance(value.factory, Global) else "object"
    if isinstance(value, Global):
        return str(value)
    return "null" if value is None else type(value).__name__
