"""Regular expressions that are compiled when they are first used: most commands need few of them, and start sooner."""

from __future__ import annotations

import re
from typing import Any, cast

__all__ = ["lazy_pattern"]


class _LazyPattern:
    """Has the methods of the compiled pattern, each from its first use on."""

    def __init__(self, text: str, flags: int) -> None:
        self._given = (text, flags)

    def __getattr__(self, name: str) -> Any:
        method = getattr(re.compile(*self._given), name)  # re keeps the patterns that it has compiled
        setattr(self, name, method)
        return method


def lazy_pattern(text: str, flags: int = 0) -> re.Pattern[str]:
    """Return what ``re.compile`` returns, but compile it only when a method is first called; errors come then too."""
    return cast("re.Pattern[str]", _LazyPattern(text, flags))
