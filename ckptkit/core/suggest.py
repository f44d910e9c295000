"""What a pattern that fits no parameter was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator

from ckptkit.core.patterns import Pattern, parse_pattern
from ckptkit.core.text import quoted
from ckptkit.errors import RuleError

__all__ = ["suggest_pattern"]


def suggest_pattern(pattern: Pattern, names: Collection[str]) -> str:
    """Return the nearest pattern that fits one of ``names``, as a sentence for a hint; else some of the names."""
    for text in _variants(pattern, names):
        try:
            meant = parse_pattern(text)
        except RuleError:
            continue
        if any(meant.match(name) for name in names):
            return f"did you mean {quoted(text)}?"
    if close := difflib.get_close_matches(pattern.text, names, n=1, cutoff=0.5):
        return f"the nearest name is {quoted(close[0])}"
    some = list(names)[:3]
    return f"the model has {', '.join(map(quoted, some))}{', ...' if len(names) > len(some) else ''}"


def _variants(pattern: Pattern, names: Collection[str]) -> Iterator[str]:
    """Yield what people write instead: a module for its parameters, a name without its prefix, a slip of the pen."""
    text = pattern.text
    if pattern.is_regex:
        body = f"(?:{text[3:]})"
        yield from (f"re:{body}.*", f"re:.*{body}", f"re:.*{body}.*")
        return
    yield from (f"{text.rstrip('.')}.*", f"{text}*", f"*.{text}", f"*.{text}.*")
    prefix, _, inner = text.partition(".")
    if inner[:1] not in ("", "*", "{") and not {"*", "{"} & set(prefix):
        yield inner
    stem = text[: min((text.find(mark) for mark in "*{" if mark in text), default=len(text))].rstrip(".")
    prefixes = {name[:end] for name in names for end in _ends(name)}
    for close in difflib.get_close_matches(stem, prefixes, n=3):
        yield close + text[len(stem) :]
        yield f"{close}.*"


def _ends(name: str) -> Iterator[int]:
    end = name.find(".")
    while end != -1:
        yield end
        end = name.find(".", end + 1)
    yield len(name)
