"""How a configuration of PEFT names the modules of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

__all__ = ["TIED_NAMES", "exact_pattern", "modules_of", "target_modules"]

TIED_NAMES = ("embed_tokens", "lm_head")  # the only names with which ensure_weight_tying has an effect


def modules_of(keys: Iterable[str]) -> set[str]:
    """Return the path of every module that tensors with these keys are in."""
    modules = set()
    for key in keys:
        path = key.rpartition(".")[0]
        while path and path not in modules:
            modules.add(path)
            path = path.rpartition(".")[0]
    return modules


def exact_pattern(module: str) -> str:
    """Return a pattern of PEFT that only this module matches: PEFT takes it for a regular expression."""
    return f"^{module}" if re.fullmatch(r"[\w.]+", module) else f"^{re.escape(module)}"


def target_modules(adapted: list[str], modules: Collection[str]) -> list[str] | str:
    """Return the names of the adapted modules, or one regular expression where names would match other modules too.

    PEFT adapts each module whose name ends with a listed name. A number alone could also be that of a layer without
    tensors, which no file names.
    """
    known = set(adapted)
    also = {name for name in modules if name not in known for part in _ends(name) if part in known}
    if also or any(name.isdecimal() for name in adapted):
        return f"(?:{'|'.join(map(re.escape, adapted))})"
    return adapted


def _ends(name: str) -> Iterator[str]:
    while "." in name:
        name = name.partition(".")[2]
        yield name
