"""Options as text files hold them: numbers, strings, lists and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["plain_option"]


def plain_option(value: Any) -> Any:
    """Return what JSON can hold of an option: NaN and Inf as strings, a tensor as its number, else its ``str``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_option(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_option(inner) for inner in value]
    if hasattr(value, "tolist") and not getattr(value, "is_meta", False):
        return plain_option(value.tolist())
    return str(value)
