"""Names from other people's files, made harmless to print and still exact."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["html_table", "human_bytes", "plural", "printable", "quoted", "shell_word"]

_LONGEST = 400
# Characters that str.isprintable() lets pass and that nothing is drawn for: fillers, joiners, variation selectors.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Tables are laid out with spaces: those at an end of a name and those beside another have to show.
_SPACES = re.compile(r"(?<= ) +|^ +| +$")
_MOST_ROWS = 500


def printable(name: str) -> str:
    r"""Return ``name`` with every character that could move a cursor, break a line or hide text escaped.

    A backslash becomes two, and a space that could be overlooked ``\x20``, so the printed form can be read back
    without doubt. Very long names are cut in the middle and say by how much.
    """
    if len(name) > _LONGEST:
        cut = len(name) - _LONGEST
        return f"{printable(name[: _LONGEST // 2])}...<{cut} more characters>...{printable(name[-_LONGEST // 2 :])}"
    if name.isascii() and name.isprintable() and "\\" not in name:
        return _SPACES.sub(_escaped, name) if " " in name else name
    shown = "".join(char if char.isprintable() else _escape(char) for char in name.replace("\\", "\\\\"))
    return _SPACES.sub(_escaped, _INVISIBLE.sub(_escaped, shown))


def _escaped(match: re.Match[str]) -> str:
    return "".join(map(_escape, match[0]))


def _escape(char: str) -> str:
    code = ord(char)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def quoted(name: str) -> str:
    """Return ``name`` printable and in quotes, as Python would write it, for use inside a sentence."""
    shown = printable(name)
    if "'" in shown and '"' not in shown:
        return f'"{shown}"'
    inner = shown.replace("'", "\\'")
    return f"'{inner}'"


def shell_word(text: str) -> str:
    r"""Return ``text`` as one word of a shell, for a hint that is pasted there: nothing in it is run or expanded.

    What cannot be printed takes the form ``$'\x1b'``, which bash and zsh read.
    """
    if printable(text) == text and "'" not in text:
        return f"'{text}'"
    if printable(text) == text and not any(char in text for char in '"$`\\!'):
        return f'"{text}"'
    if len(text) > _LONGEST:
        return quoted(text)
    return "$'" + "".join(map(_for_shell, text)) + "'"


def _for_shell(char: str) -> str:
    if char in "\\'":
        return f"\\{char}"
    if char.isprintable() and not _INVISIBLE.match(char):
        return char
    code = ord(char)
    # A shell takes \x for a byte, and \u for a character.
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return ``1 tensor`` or ``1,234 tensors``."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def human_bytes(count: int) -> str:
    """Return a size in decimal units, as disks and downloads give it: ``248.0 kB``."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB", "TB", "PB", "EB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} ZB"


def html_table(headers: Iterable[str], rows: Sequence[Iterable[str]]) -> str:
    """Return printable cells as an HTML table, each escaped; of very many rows the first, and how many more."""
    import html

    head = "".join(f"<th>{html.escape(name)}</th>" for name in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[:_MOST_ROWS]
    )
    more = f"<p>and {plural(len(rows) - _MOST_ROWS, 'row')} more</p>" if len(rows) > _MOST_ROWS else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"
