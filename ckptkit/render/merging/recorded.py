"""What a checkpoint says about the merge that made it, as a block of its page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ckptkit.core.checkpoint.provenance import PROVENANCE
from ckptkit.core.config_files import json_value
from ckptkit.core.text import human_bytes, plural, short_number
from ckptkit.render.page import Block, Code, Line, Table
from ckptkit.render.summary import value_cell

__all__ = ["recorded_blocks", "recorded_in"]

_FIELDS = ("version", "method", "base", "input", "set", "slice", "copy", "name", "path")  # that are not parameters
_TABLES = {"set": "[[set]]", "slice": "[[slice]]", "copy": "copy"}


def recorded_in(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what the metadata of a checkpoint says about its merge; None without that, and for any other text."""
    try:
        document = json_value(metadata.get(PROVENANCE, ""))
        json.dumps(document, allow_nan=False)  # NaN is valid for Python's parser, and not in a document
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def recorded_blocks(document: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the recipe in short: the method, what holds for all keys, and each input. Nothing of it is trusted."""
    recipe, described = _table(document, "recipe"), document.get("inputs")
    if not recipe:
        count = len(described) if isinstance(described, list | dict) else 0
        yield Line((f"merged of {plural(count, 'input')}; the recipe was left out",))
        return
    files = described if isinstance(described, dict) else {}
    given = recipe.get("input")
    inputs = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
    named = {str(each.get("name", "")) for each in inputs}
    apart = [{"name": name} for name in files if name not in named]  # a base that is not merged as an input
    base = recipe.get("base")
    rows = []
    for each in (*apart, *inputs):
        name = str(each.get("name", ""))
        about = _table(files, name)
        size = about.get("size")
        bytes_text = human_bytes(size) if isinstance(size, int) else ""
        role = " (base)" if name == base or name not in named else ""
        rows.append((f"{value_cell(name)}{role}", value_cell(str(about.get("file", ""))), bytes_text, _values(each)))
    about_all = f", {values}" if (values := _values(recipe)) else ""
    more = [f"{len(recipe[name])} {text}" for name, text in _TABLES.items() if isinstance(recipe.get(name), list)]
    method = Code(value_cell(str(recipe.get("method", ""))))
    yield Line(("merged by ", method, about_all, f"; {', '.join(more)}" if more else ""))
    yield Table(("input", "file", "size", "parameters"), tuple(rows), frozenset({"size"}), ("size", "parameters"))


def _values(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{value_cell(name)} {_shown(value)}" for name, value in table.items() if name not in _FIELDS)


def _shown(value: object) -> str:
    if isinstance(value, float) and value == value and abs(value) < 1e300:  # noqa: PLR0124 - NaN is not itself
        return short_number(value)
    return str(value).lower() if isinstance(value, bool) else value_cell(str(value))


def _table(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return found if isinstance(found, dict) else {}
