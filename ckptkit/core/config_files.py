"""Parse the tables that users write in TOML, JSON or YAML, and write values as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ckptkit.core.text import quoted
from ckptkit.errors import RuleError

__all__ = ["TEXT_FORMATS", "format_of", "parse_table", "toml_key", "toml_value"]

TEXT_FORMATS = ("toml", "json", "yaml")
_KINDS = {list: "array", str: "string", bool: "boolean", type(None): "null"}
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def format_of(path: str) -> str:
    """Return ``"json"``, ``"yaml"`` or ``"toml"`` by the suffix of a path; any other suffix means TOML."""
    return "json" if path.endswith(".json") else "yaml" if path.endswith((".yaml", ".yml", ".bsh")) else "toml"


def parse_table(text: str, text_format: str) -> dict[str, Any]:
    """Return the table in ``text``, which has one of ``TEXT_FORMATS``.

    YAML is read as version 1.2: ``1e-5`` is a number, ``no`` is a word, and tags create no objects. A duplicate key is
    refused in YAML and in TOML. Raises ``RuleError`` if the text is not valid or does not hold a table.
    """
    import tomllib

    readers: dict[str, Callable[[str], object]] = {"toml": tomllib.loads, "json": json.loads, "yaml": _parse_yaml}
    try:
        content = readers[text_format](text)
    except (ValueError, RecursionError) as error:
        raise RuleError(f"not valid {text_format.upper()}: {error}") from None
    if not isinstance(content, dict):
        kind = _KINDS.get(type(content), "number")
        raise RuleError(
            f"holds a {text_format.upper()} {kind}, not an object", hint="write the same keys as in the TOML form"
        )
    return content


def _parse_yaml(text: str) -> object:
    try:
        from ruamel.yaml import YAML
        from ruamel.yaml.constructor import SafeConstructor
        from ruamel.yaml.error import YAMLError
    except ImportError:
        raise RuleError(
            "a YAML file needs ruamel.yaml, which is not installed", hint="install the extra [yaml], or write TOML"
        ) from None
    reader = YAML(pure=True)
    reader.Constructor = SafeConstructor
    try:
        content: object = reader.load(text)
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return content


def toml_key(key: str) -> str:
    """Return a key as TOML writes it."""
    return key if _BARE_KEY.fullmatch(key) else toml_value(key)


def toml_value(value: object) -> str:
    """Return a value as TOML writes it on one line; raises ``RuleError`` for a value that TOML cannot express."""
    if isinstance(value, str):
        return "".join(
            char if char.isprintable() else f"\\U{ord(char):08x}" for char in json.dumps(value, ensure_ascii=False)
        )
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{toml_key(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    kind = "null" if value is None else quoted(type(value).__name__)
    raise RuleError(f"TOML has no {kind}", hint="leave the key out, or write JSON")
