"""Split the key after ``::`` where it begins with the name of a file or folder of the directory."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["split_key"]


def split_key(names: Iterable[str], key: str) -> tuple[str, str] | None:
    """Split ``key`` into the longest of the names with which it begins, and the key after the name; or return None.

    The name is the whole key, or ``.`` or ``::`` follows the name.
    """
    for name in sorted(names, key=len, reverse=True):
        for separator in (".", "::"):
            if f"{key}{separator}".startswith(f"{name}{separator}"):
                return name, key[len(name) + len(separator) :]
    return None
