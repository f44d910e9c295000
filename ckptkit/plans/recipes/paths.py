"""The names that inputs have by their paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from ckptkit.core.files.places import is_url, kind_at, name_of
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["distinct_names", "input_name", "looks_like_path"]

_SUFFIX = lazy_pattern(r"(\.safetensors\.index\.json|\.bin\.index\.json|\.pth?\.tar|\.[A-Za-z][A-Za-z0-9]{0,11})$")


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


def distinct_names(paths: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Return ``input_name`` of each path; the name of the file or of a folder above where that one is not distinct.

    ``taken`` has names that other inputs have. Names of equal paths stay equal.

    Example:
        >>> distinct_names(["run1.ckpt::model", "run2.ckpt::model", "base.pt"]), distinct_names(["a/x.pt", "b/x.pt"])
        (['run1', 'run2', 'base'], ['a', 'b'])
    """
    choices = [_names_from_the_end(path) for path in paths]
    names = [choice.pop(0) for choice in choices]
    while True:
        counts = Counter([*names, *taken])
        moving = [at for at, choice in enumerate(choices) if choice and counts[names[at]] > 1]
        if not moving:
            return names
        for at in moving:
            names[at] = choices[at].pop(0)


def _names_from_the_end(path: str) -> list[str]:
    """Return the names that an input can have by its path: of its part, its file, and each folder above."""
    file, _, part = path.rpartition("::") if not is_url(path) else ("", "", path)
    has_part = bool(file and part)
    folders = (file if has_part else path).rstrip("/").split("/")[:-1]
    above = [folder.removeprefix("hf:") for folder in reversed(folders) if folder.strip(".:")]
    return [input_name(path), *([input_name(file)] if has_part else []), *above]


def looks_like_path(text: str) -> bool:
    """Return whether a text is a path rather than a name: it exists, is a URL, or has a separator or a suffix."""
    is_written = is_url(text) or text.startswith(("hf:", ".", "~")) or "/" in text or "::" in text
    return is_written or _SUFFIX.search(text) is not None or bool(kind_at(text))
