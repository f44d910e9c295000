"""A checkpoint as lines that ``git diff`` compares: one for each tensor, and equal for equal content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Final

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.text import printable

__all__ = ["DIGITS", "lines_for_git"]

DIGITS: Final = 16  # of a digest, as in the table of ``ckpt show --digests``
_LONGEST_VALUE: Final = 200
_NUMBERS: Final = re.compile(r"([0-9]+)", re.ASCII)


def lines_for_git(checkpoint: Checkpoint, digests: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for the format, for each tensor, and for everything else in the file.

    ``digests`` has the digest of each tensor whose bytes can be read. The lines of a kind are sorted by name, and
    numbers in names by their size. So a tensor that only moves inside the file changes no line.
    """
    yield f"format: {checkpoint.format}"
    for key in sorted(checkpoint, key=_by_numbers):
        digest = digests.get(key, "").partition(":")[2][:DIGITS] or "not read"
        yield f"{printable(key)}  {checkpoint[key]}  {digest}"
    entries = {(entry.path, entry.type): entry.value for entry in checkpoint.entries}
    for path, kind in sorted(entries, key=lambda entry: (_by_numbers(entry[0]), entry[1])):
        yield f"{printable(path)}  {printable(kind)}  {_value(entries[path, kind])}"
    for name in sorted(checkpoint.metadata):
        yield f"metadata {printable(name)}  {_value(checkpoint.metadata[name])}"
    for name in sorted(set(checkpoint.references)):
        yield f"code reference, not run  {printable(name)}"


def _by_numbers(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return what sorts ``layers.2`` before ``layers.10``."""
    parts = _NUMBERS.split(name)
    # Every second part is a number; its length comes first, which compares numbers of any length as text.
    numbers = [(len(part := text.lstrip("0")), part) if at % 2 else (0, text) for at, text in enumerate(parts)]
    return numbers, name


def _value(value: object) -> str:
    """Return a value on one line; one that is long is cut, and has the start of its SHA-256."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= _LONGEST_VALUE:
        return printable(text)
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:DIGITS]
    return f"{printable(text[:_LONGEST_VALUE])}... ({len(text):,} characters, {digest})"
