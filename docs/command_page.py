"""A Sphinx extension: the page of the commands shows examples as code, and options in the sections of ``--help``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ckptkit.cli.common.commands import Command

__all__ = ["format_description", "format_options", "remove_arguments", "setup"]

_OPTION = ".. option:: "
_BLOCK = "| "  # sphinx-click begins a line of text that click must not wrap with this mark
# Special characters of reStructuredText, and words that look like options.
_SPECIAL = re.compile(r"(?P<option>(?<![\w-])--[a-z][a-z0-9-]*)|(?P<character>[*`|\\]|(?<=\w)_(?!\w))")


def _text(line: str) -> str:
    """Return a line of help text as reStructuredText: options are literals, and no character has another meaning."""
    mark, required, text = line.rpartition("**Required**")
    text = _SPECIAL.sub(lambda match: f"``{match['option']}``" if match["option"] else f"\\{match['character']}", text)
    return f"{mark}{required}{text}"


def format_description(_app: object, _context: object, lines: list[str]) -> None:
    """Turn the examples of a command into a block of code, and other text that click must not wrap into paragraphs."""
    lines[:] = [*_described(lines), ""]


def _described(lines: list[str]) -> Iterator[str]:
    in_code = False
    for line in lines:
        text = line.removeprefix(_BLOCK)
        if not line.startswith(_BLOCK):
            in_code = False
        elif text.startswith(("ckpt ", "echo ")) and not in_code:
            in_code = True
            yield from ("", ".. code-block:: sh", "")
        yield f"    {text}" if in_code else _text(text)


def format_options(_app: object, context: Any, lines: list[str]) -> None:
    """Put the options in the sections and the order of ``--help-all``."""
    blocks: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        if line.startswith(_OPTION):
            name = max(re.findall(r"--?[a-zA-Z][\w-]*", line), key=len)
        blocks.setdefault(name, []).append(line if line.startswith(_OPTION) or ":options:" in line else _text(line))
    if isinstance(context.command, Command):
        lines[:] = _in_sections(context.command, blocks)
    else:
        lines[:] = [line for block in blocks.values() for line in block]


def _in_sections(command: Command, blocks: dict[str, list[str]]) -> Iterator[str]:
    for number, (title, names) in enumerate(command.sections()):
        listed = [name for name in names if name in blocks]
        if number and listed:
            yield from (f".. rubric:: {title}", "")
        for name in listed:
            yield from blocks[name]


def remove_arguments(_app: object, _context: object, lines: list[str]) -> None:
    """Leave out the list of arguments, which says no more than the usage."""
    lines.clear()


def setup(app: Any) -> dict[str, bool]:
    """Connect the functions with the events of sphinx-click."""
    app.setup_extension("sphinx_click")
    app.connect("sphinx-click-process-description", format_description)
    app.connect("sphinx-click-process-options", format_options)
    app.connect("sphinx-click-process-arguments", remove_arguments)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
