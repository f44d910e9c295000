"""Say which rules of a library make a checkpoint fit a live model of that library."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ckptkit.core.text import quoted

__all__ = ["library_hint"]


def library_hint(names: Iterable[str], command: str) -> str:
    """Return a sentence where transformers changes the tensors of such a model when it loads a file, else an empty one.

    ``names`` are the model type and the classes of the live model, ``command`` what takes ``--rules``.
    """
    if "transformers" not in sys.modules:  # a live model of the library has imported it
        return ""
    from ckptkit.rules.transformers.skeleton import has_conversions

    name = next(filter(has_conversions, names), None)
    if name is None:
        return ""
    return f"transformers converts the files of {quoted(name)} when it loads them; so does {command}"
