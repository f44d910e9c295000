"""Hold documents of ``--json`` against the schemas in ``docs/schemas``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA_FILES", "problems_of", "read_schema"]

SCHEMA_FILES = {
    path.name.removesuffix(".schema.json"): path
    for path in sorted((Path(__file__).parent.parent / "docs" / "schemas").glob("*.schema.json"))
}


def read_schema(name: str) -> Any:
    """Return the text of a schema."""
    return json.loads(SCHEMA_FILES[name].read_text(encoding="utf-8"))


@cache
def _validator(name: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(read_schema(name))


def problems_of(document: Any) -> list[str]:
    """Return what is wrong with a document, after the schema that it names."""
    name, _, version = document["schema"].removeprefix("ckptkit.").partition("/")
    assert version == "1"
    return [f"{error.json_path}: {error.message}" for error in _validator(name).iter_errors(document)]
