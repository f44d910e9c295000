"""The lines on which the keys and tables of a TOML text begin, for messages about their values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["TomlPath", "toml_lines"]

TomlPath: TypeAlias = tuple[str | int, ...]  # the names of tables and keys, and the numbers of tables in an array

_TOKEN = lazy_pattern(
    r'(?P<text>"""(?:[^"\\]|\\.|"(?!""))*+"{3,5}|\'\'\'(?:[^\']|\'(?!\'\'))*+\'{3,5}|"(?:[^"\\\n]|\\.)*+"|\'[^\'\n]*+\')'
    r"|(?P<skip>#[^\n]*+|[ \t\r]++)|(?P<end>\n)|(?P<open>[\[{])|(?P<close>[\]}])|(?P<sign>[=.,])"
    r"|(?P<word>[^\s#\"'=.,\[\]{}]++)",
    re.DOTALL,
)


def toml_lines(text: str) -> Mapping[TomlPath, int]:
    r"""Return the line, counted from 1, of each table and each key of a valid TOML text.

    A path of ``("set", 0, "keys")`` is the key ``keys`` of the first ``[[set]]``. The keys of an inline table have no
    path of their own. Any other text, such as JSON, has no lines or wrong ones.

    Example:
        >>> toml_lines('a = 1\n[[set]]\nkeys = "*"\n')
        {('a',): 1, ('set', 0): 2, ('set', 0, 'keys'): 3}
    """
    lines: dict[TomlPath, int] = {}
    counts: dict[TomlPath, int] = {}
    table: TomlPath = ()
    for line, statement in _statements(text):
        if statement[:1] != ["["]:
            name = statement[: statement.index("=")] if "=" in statement else []
            path = (*table, *_names(name))
            for end in range(len(table) + 1, len(path) + 1):
                lines.setdefault(path[:end], line)
            continue
        is_array = statement[:2] == ["[", "["]
        table = _with_numbers(_names(statement), counts, is_array=is_array)
        lines.setdefault(table, line)
    return lines


def _statements(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line of each header and each pair of a key and a value, with its tokens."""
    line, first, depth = 1, 1, 0
    statement: list[str] = []
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "end" and depth == 0:
            if statement:
                yield first, statement
            statement = []
        elif kind not in ("end", "skip"):
            if not statement:
                first = line
            statement.append(token[0])
            depth += (kind == "open") - (kind == "close")
        line += token[0].count("\n")
    if statement:
        yield first, statement


def _names(tokens: list[str]) -> tuple[str, ...]:
    """Return the parts of a dotted key."""
    parts = (token for token in tokens if token not in (".", "[", "]"))
    return tuple(part[1:-1] if part[0] in "\"'" else part for part in parts)


def _with_numbers(names: tuple[str, ...], counts: dict[TomlPath, int], *, is_array: bool) -> TomlPath:
    """Return the path of a table, with the numbers of the tables in arrays that it is in."""
    path: TomlPath = ()
    for number, name in enumerate(names):
        path = (*path, name)
        if is_array and number == len(names) - 1:
            counts[path] = counts.get(path, 0) + 1
        if path in counts:
            path = (*path, counts[path] - 1)
    return path
