"""Numbers as a row of bars, in Unicode, or in ASCII for a terminal without Unicode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

__all__ = ["for_encoding", "sparkline"]

_BARS: Final = "▁▂▃▄▅▆▇█"
_ZERO: Final = "·"
_ASCII: Final = str.maketrans(f"{_ZERO}{_BARS}…", ".12345678~")


def sparkline(numbers: Sequence[float]) -> str:
    """Return a bar for each number, of which none is negative: 0 is a dot, and the highest number a full bar.

    Infinity is a full bar, and does not count for the height of the others.
    """
    highest = max((number for number in numbers if number < math.inf), default=0) or 1
    steps = (math.ceil(number * len(_BARS) / highest) if number < math.inf else len(_BARS) for number in numbers)
    return "".join(_BARS[step - 1] if step else _ZERO for step in steps)


def for_encoding(line: str, encoding: str | None) -> str:
    """Return the line with bars of ASCII, ``.`` and ``1`` to ``8``, where ``encoding`` has no characters for bars.

    The sign of a shortened name is ``~`` there.
    """
    return line if line.isascii() or _has_bars(encoding or "utf-8") else line.translate(_ASCII)


@lru_cache(maxsize=8)
def _has_bars(encoding: str) -> bool:
    try:
        _BARS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
