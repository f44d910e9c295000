"""Names from other people's files, made harmless to print and still exact."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice

__all__ = [
    "html_table", "human_bytes", "kind_of", "listed", "look_alikes", "plural", "printable", "quoted", "shell_word",
]  # fmt: skip

_LONGEST = 400
# Letters of Cyrillic and Greek that are drawn like Latin ones; of compatibility forms, such as wide letters, Unicode
# itself knows what they stand for.
_DRAWN_ALIKE = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u0501\u04bb\u051b\u051d"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0406\u0408\u0405"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7"
    "\u03b1\u03b3\u03b9\u03bd\u03bf\u03c1\u03c5\u0131",
    "aeopcyxijsdhqwABEKMHOPCTXIJSABEZHIKMNOPTYXayivopui",
)
# Characters that str.isprintable() lets pass and that nothing is drawn for: fillers, joiners, variation selectors.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Tables are laid out with spaces: those at an end of a name and those beside another have to show.
_SPACES = re.compile(r"(?<= ) +|^ +| +$")
_MOST_ROWS = 500
_MOST_DRAWN = 2_000_000  # characters that names are compared by


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
    shown = name.replace("\\", "\\\\")
    if not shown.isprintable():
        shown = "".join(char if char.isprintable() else _escape(char) for char in shown)
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


def listed(names: Collection[object], most: int = 8, *, show: Callable[[str], str] = quoted) -> str:
    """Return the first ``most`` names and how many more there are, for use inside a sentence: ``'a', 'b' and 3 more``.

    ``show`` makes a string printable; by default it is quoted. What is not a string is shown by ``str``.
    """
    first = [show(name) if isinstance(name, str) else str(name) for name in islice(names, most)]
    return ", ".join(first) + (f" and {len(names) - most:,} more" if len(names) > most else "")


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


def look_alikes(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two different names that a reader would take for the same, or None.

    Composed and decomposed accents, characters that are not drawn, wide letters, and the letters of Cyrillic and
    Greek that look Latin are told apart by a machine alone.
    """
    names = list(names)
    if all(map(str.isascii, names)):
        return None
    import unicodedata

    seen: dict[str, str] = {}
    left = _MOST_DRAWN
    for name in names:
        drawn = name
        # Of a longer one nobody sees all; and a run of accents takes a time that grows with its square.
        if not name.isascii() and len(name) <= _LONGEST:
            drawn = _INVISIBLE.sub("", unicodedata.normalize("NFKC", name).translate(_DRAWN_ALIKE))
            if not drawn.isprintable():
                drawn = "".join(char for char in drawn if unicodedata.category(char) != "Cf")
            left -= len(drawn)
            if left < 0:
                return None
        if seen.setdefault(drawn, name) != name:
            return seen[drawn], name
    return None


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return ``1 tensor`` or ``1,234 tensors``."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def kind_of(value: object) -> str:
    """Return what ``value`` is, for a sentence that refuses it: ``the string 'x'``, ``a list``, ``null``."""
    if isinstance(value, str):
        return f"the string {quoted(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    article = "an" if type(value).__name__[:1].lower() in "aeiou" else "a"
    return f"{article} {type(value).__name__}"


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
