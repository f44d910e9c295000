"""Text that people write tables in, TOML, JSON and YAML: read into one plain value, and written as TOML again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ckptkit.core.text import quoted
from ckptkit.errors import RuleError

__all__ = ["TEXT_FORMS", "form_of", "parse_table", "toml_key", "toml_value"]

TEXT_FORMS = ("toml", "json", "yaml")
_KINDS = {list: "array", str: "string", bool: "boolean", type(None): "null"}
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def form_of(path: str) -> str:
    """Return the form that the suffix of a file says: TOML where it says none."""
    return "json" if path.endswith(".json") else "yaml" if path.endswith((".yaml", ".yml", ".bsh")) else "toml"


def parse_table(text: str, form: str) -> dict[str, Any]:
    """Return the table that ``text`` holds in one of ``TEXT_FORMS``.

    YAML is read as version 1.2, in which ``1e-5`` is a number and ``no`` a word; a key that stands twice is refused in
    it and in TOML, and no tag makes an object. Raises ``RuleError`` where the text is not of that form or no table.
    """
    import tomllib

    readers: dict[str, Callable[[str], Any]] = {"toml": tomllib.loads, "json": json.loads, "yaml": _yaml}
    try:
        content = readers[form](text)
    except (ValueError, RecursionError) as error:
        raise RuleError(f"is no {form.upper()}: {error}") from None
    if not isinstance(content, dict):
        kind = _KINDS.get(type(content), "number")
        raise RuleError(f"holds a {form.upper()} {kind}, not an object", hint="write the same keys as in the TOML form")
    return content


def _yaml(text: str) -> Any:
    try:
        from ruamel.yaml import YAML
        from ruamel.yaml.constructor import SafeConstructor
        from ruamel.yaml.error import YAMLError
    except ImportError:
        raise RuleError(
            "is YAML, which needs ruamel.yaml to be read", hint="install the extra [yaml], or write it in TOML"
        ) from None
    reader = YAML(pure=True)
    reader.Constructor = SafeConstructor
    try:
        return reader.load(text)
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def toml_key(key: str) -> str:
    """Return a key as TOML writes it."""
    return key if _BARE.fullmatch(key) else toml_value(key)


def toml_value(value: Any) -> str:
    """Return a plain value as TOML writes it on one line; raises ``RuleError`` for what TOML has no word for."""
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
        inner = ", ".join(f"{toml_key(str(key))} = {toml_value(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    what = "null" if value is None else quoted(type(value).__name__)
    raise RuleError(f"TOML has no {what}", hint="leave the key out, or write JSON")
