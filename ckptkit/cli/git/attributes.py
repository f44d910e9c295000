"""Lines of a ``.gitattributes`` file that give files the driver of ckptkit for ``git diff``."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final

__all__ = ["DRIVER", "attribute_line", "with_lines", "without_lines"]

DRIVER: Final = "ckpt"
_OURS: Final = f"diff={DRIVER}"
_LINE: Final = re.compile(r"[^\n]*\n|[^\n]+")  # with its own end, which may differ from that of other lines
_DIFF: Final = ("diff", "-diff", "!diff", "binary")  # binary is a macro of git, which has -diff in it


def attribute_line(pattern: str) -> str:
    """Return the line that gives files of a pattern the driver; git takes some patterns only in quotes."""
    escaped = pattern.replace("\\", "\\\\").replace('"', '\\"')
    is_plain = not set(' "') & set(pattern) and not pattern.startswith(("#", "[attr]"))
    word = pattern if is_plain else f'"{escaped}"'
    return f"{word} {_OURS}"


def with_lines(text: str, patterns: Sequence[str], overruled: Collection[str]) -> tuple[str, list[str], list[str]]:
    """Return the text with a line for each pattern, the lines that are new, and those that were moved to the end.

    A line stays where it is unless a line below it gives its files another driver. git says that another pattern does
    so for those that are ``overruled``. Every other line is kept as it is.
    """
    lines = _LINE.findall(text)
    end = "\r\n" if "\r\n" in text else "\n"
    added: list[str] = []
    moved: list[str] = []
    for pattern in patterns:
        line = attribute_line(pattern)
        word = line.removesuffix(f" {_OURS}")
        setting = [(at, words[1:]) for at, words in enumerate(map(_words, lines)) if words[:1] == [word]]
        drivers = [(at, given) for at, given in setting if any(_sets_diff(name) for name in given)]
        if drivers and _OURS in drivers[-1][1]:
            below = lines[drivers[-1][0] + 1 :]
            if pattern not in overruled or all(_words(other)[1:] == [_OURS] for other in below):
                continue
        ours = [at for at, given in drivers if given == [_OURS]]
        lines = [other for at, other in enumerate(lines) if at not in ours]
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += end
        lines.append(f"{line}{end}")
        (moved if ours else added).append(line)
    return "".join(lines), added, moved


def without_lines(text: str) -> tuple[str, list[str], list[str]]:
    """Return the text without the lines that set only the driver, these lines, and those that set more beside it."""
    lines = _LINE.findall(text)
    removed = [line for line in lines if _words(line)[1:] == [_OURS]]
    others = [line for line in lines if _OURS in _words(line)[1:] and line not in removed]
    left = "".join(line for line in lines if line not in removed)
    return left, [line.rstrip("\r\n") for line in removed], [line.rstrip("\r\n") for line in others]


def _words(line: str) -> list[str]:
    """Return the pattern of a line, as it is written, and its attributes; nothing for a comment."""
    line = line.strip(" \t\r\n")
    if line.startswith("#"):
        return []
    if line.startswith('"'):
        at = 1
        while at < len(line) and line[at] != '"':
            at += 2 if line[at] == "\\" else 1
        return [line[: at + 1], *line[at + 1 :].split()]
    return line.split()


def _sets_diff(attribute: str) -> bool:
    return attribute in _DIFF or attribute.startswith("diff=")
