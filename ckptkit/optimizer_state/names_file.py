"""Read the names of parameters that a user wrote into a file."""

from __future__ import annotations

from ckptkit.core.config_files import MOST_NAMES, json_value, read_text_file
from ckptkit.core.files.places import clean_path
from ckptkit.errors import RuleError

__all__ = ["read_names_file"]


def read_names_file(path: str) -> list[str]:
    """Return the names in a file: a JSON list, or words, such as one name a line.

    Raises ``PathError`` if the file cannot be read, and ``RuleError`` if its content is not a list of names.
    """
    path = clean_path(path)
    text = read_text_file(path)
    if not text.lstrip().startswith("["):
        names = text.split(maxsplit=MOST_NAMES)
        if len(names) > MOST_NAMES:
            raise RuleError(f"more than {MOST_NAMES:,} names", path=path)
        return names
    hint = 'write ["first.weight", "first.bias"], or one name a line'
    try:
        items = json_value(text)
    except ValueError as error:
        raise RuleError(f"not a valid JSON list of names: {error}", hint=hint, path=path) from None
    assert isinstance(items, list)  # noqa: S101 - the text starts with a bracket
    strings = [name for name in items if isinstance(name, str)]
    if len(strings) != len(items):
        raise RuleError("not a valid JSON list of names: an item is not a string", hint=hint, path=path)
    return strings
