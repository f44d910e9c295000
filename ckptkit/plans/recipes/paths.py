"""The names that inputs have by their paths, and the files of a path with wildcards."""

from __future__ import annotations

import glob
import re

from ckptkit.core.files.places import is_url, kind_at, name_of
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["expand_path", "input_name", "looks_like_path"]

_WILDCARDS = lazy_pattern(r"[*?\[]")
_DIGITS = lazy_pattern(r"([0-9]+)")
_SUFFIX = lazy_pattern(r"(\.safetensors\.index\.json|\.bin\.index\.json|\.[A-Za-z][A-Za-z0-9]{0,11})$")


def input_name(path: str) -> str:
    """Return the name of the input at a path: the file name without its suffix, or the name of the directory.

    Example:
        >>> input_name("models/llama/"), input_name("step_0100.safetensors"), input_name("a.pt::ema")
        ('llama', 'step_0100', 'ema')
    """
    file, _, part = path.rpartition("::") if not is_url(path) else ("", "", path)
    if file and part:
        return part
    name = name_of(path.rstrip("/")) or path
    return _SUFFIX.sub("", name) or name


def looks_like_path(text: str) -> bool:
    """Return whether a text is a path rather than a name: it exists, is a URL, or has a separator or a suffix."""
    is_written = is_url(text) or text.startswith(("hf:", ".", "~")) or "/" in text or "::" in text
    return is_written or _SUFFIX.search(text) is not None or bool(kind_at(text))


def expand_path(path: str) -> list[str] | None:
    """Return the files and folders that a path with wildcards fits, with numbers in their natural order.

    None is the answer for a path without wildcards, and for one that exists as it is written.
    """
    if is_url(path) or not _WILDCARDS.search(path) or kind_at(path):
        return None
    return sorted(glob.glob(path), key=_natural)


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a key for sorting by which ``step_9`` is before ``step_10``."""
    return [(int(part), part) if part.isdecimal() else (0, part) for part in re.split(_DIGITS.pattern, path)]
