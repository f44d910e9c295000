"""Take ``*`` in the last part of a URL, and in a path that the shell left as it is, as the shell does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ckptkit.core.files.live_prefix import is_live_path
from ckptkit.core.files.places import folder_at, is_url, join, split
from ckptkit.core.files.wildcards import expand_path
from ckptkit.core.text import quoted
from ckptkit.errors import PathError
from ckptkit.formats import split_path

__all__ = ["expand_wildcards"]

_MOST_NAMES = 100_000
_MOST_MATCHES = 1_000


def expand_wildcards(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the paths, with each URL that has ``*`` in its last part replaced by those that match, sorted by name.

    A path of files is as it is where nothing matches; a shell leaves ``*.ckpt::part``, and what is in quotes. A hidden
    name needs a pattern that begins with a dot. Raises ``PathError`` where no URL matches, or too many.
    """
    return tuple(one for path in paths for one in _expanded(path))


def _expanded(path: str) -> Iterator[str]:
    if not is_url(path):
        yield from (path,) if is_live_path(path) else expand_path(path) or (path,)
        return
    url, key = split_path(path)
    folder, pattern = split(url)
    if "*" not in pattern:
        yield path
        return
    names = folder_at(folder).names(_MOST_NAMES)
    if not names.is_listed:
        raise PathError("the server does not list its files", hint="give the URL of each file", path=url)
    matches = re.compile(".*".join(map(re.escape, re.split(r"\*+", pattern))), re.DOTALL).fullmatch
    found = sorted(
        name for name in names.all if matches(name) and (pattern.startswith(".") or not name.startswith("."))
    )
    if not found:
        raise PathError(f"no name matches {quoted(pattern)}", path=url)
    if len(found) > _MOST_MATCHES:
        raise PathError(
            f"more than {_MOST_MATCHES:,} names match {quoted(pattern)}", hint="give a narrower pattern", path=url
        )
    for name in found:
        yield f"{join(folder, name)}{'::' if key else ''}{key}"
