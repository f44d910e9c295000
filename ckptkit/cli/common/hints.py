"""Hints of errors for the command that ran: they name only options that the command has."""

from __future__ import annotations

import re
from collections.abc import Collection, Container

from ckptkit.errors import COMMAND, OPTION, RULE_OPTIONS

__all__ = ["hint_for_command"]

_BETWEEN = re.compile(r"(; or |, or |; )")
_REMAP = "ckpt remap PATH -o OUT"


def hint_for_command(hint: str, options: Container[str], known: Collection[str]) -> str:
    """Return the ways out in ``hint`` that a command with these ``options`` has; ``known`` are those of all commands.

    Where the command does not take the options of rules, they are shown with ``ckpt remap``. A hint may also name
    options of other programs, which stay.
    """
    kept: list[str] = []
    pieces = ["", *_BETWEEN.split(hint)]
    for between, way in zip(pieces[::2], pieces[1::2], strict=True):
        named = [match["name"] for match in OPTION.finditer(COMMAND.sub("", way))]
        absent = [name for name in named if f"--{name}" in known and f"--{name}" not in options]
        if all(name in RULE_OPTIONS for name in absent):
            kept += [between if kept else "", _with_remap(way) if absent else way]
    return "".join(kept)


def _with_remap(way: str) -> str:
    """Return a way out with each option, which stands outside of a command, as one of ``ckpt remap``."""
    commands = [match.span() for match in COMMAND.finditer(way)]

    def replaced(match: re.Match[str]) -> str:
        is_inside = any(start <= match.start() < end for start, end in commands)
        return match[0] if is_inside else f"{_REMAP} {match[0]}"

    return OPTION.sub(replaced, way)
