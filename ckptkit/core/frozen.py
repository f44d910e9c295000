"""A mapping that cannot be changed, and fast creation of dataclasses that cannot be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["FrozenDict", "slot_setters"]

K = TypeVar("K")
V_co = TypeVar("V_co", covariant=True)


class FrozenDict(Mapping[K, V_co]):
    """A copy of a mapping that cannot be changed, and that pickle and ``copy`` take, unlike ``MappingProxyType``."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[K, V_co]) -> None:
        """Copy the items."""
        self._items = dict(items)

    def __getitem__(self, key: K) -> V_co:
        """Return the value of a key."""
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        """Iterate over the keys in order."""
        return iter(self._items)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._items)

    def __repr__(self) -> str:
        """Return the text of the dict inside."""
        return repr(self._items)


def slot_setters(frozen: type[Any]) -> list[Callable[[object, object], None]]:
    """Return a function for each field of a frozen dataclass with slots, which sets the field of a new object."""
    return [getattr(frozen, field.name).__set__ for field in fields(frozen)]
