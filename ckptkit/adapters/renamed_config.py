"""The ``adapter_config.json`` of an adapter whose modules were renamed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from ckptkit.adapters.keys import PEFT_PREFIX

__all__ = ["moved_modules_of", "rename_in_config"]

_MODULE = re.compile(r"(?P<module>.+?)\.(?:lora_|hada_|lokr_|ia3_|vera_|modules_to_save(?=\.|$))")
_LITERAL = re.compile(r"\^?[\w.]+")  # any other pattern is a regular expression, which is never evaluated
_ALL = "all-linear"


def moved_modules_of(keys: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the new name of each module of an adapter, from pairs of an old and a new key."""
    moved = {}
    for old, new in keys:
        before, after = (_MODULE.match(key.removeprefix(PEFT_PREFIX)) for key in (old, new))
        if before is not None and after is not None:
            moved[before["module"]] = after["module"]
    return moved


def rename_in_config(config: Mapping[str, object], moved: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    """Yield each field of a configuration that has to change, with its new value.

    PEFT takes a name for every module that ends with it. A name that no longer finds its modules is replaced by their
    whole names, and so is a regular expression.
    """
    if all(old == new for old, new in moved.items()):
        return
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != _ALL and not _LITERAL.fullmatch(targets):
        yield "target_modules", list(moved.values())
    for name in ("target_modules", "modules_to_save"):
        entries = config.get(name)
        if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
            written = list(dict.fromkeys(new for entry in entries for new in _renamed(entry, moved)))
            if written != entries:
                yield name, written
    for name in ("rank_pattern", "alpha_pattern"):
        table = config.get(name)
        if isinstance(table, dict):
            new_table = {
                new: value
                for pattern, value in table.items()
                for new in (_renamed(pattern, moved, "^") if _LITERAL.fullmatch(pattern) else [pattern])
            }
            if new_table != table:
                yield name, new_table


def _renamed(entry: str, moved: Mapping[str, str], exact: str = "") -> list[str]:
    """Return what finds the modules of ``entry`` after they moved; ``exact`` marks a whole name."""
    hits = [new for old, new in moved.items() if _finds(entry, old)]
    return [entry] if all(_finds(entry, new) for new in hits) else [f"{exact}{new}" for new in hits]


def _finds(entry: str, module: str) -> bool:
    if entry.startswith("^"):
        return module == entry[1:]
    return module == entry or module.endswith(f".{entry}")
