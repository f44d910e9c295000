"""Text for messages: names from files made printable, counts with nouns, lists of names, sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice, takewhile

from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["did_you_mean",
    "first_line", "human_bytes", "in_quotes", "kind_of", "listed", "look_alikes", "nearest", "option_text",
    "option_texts", "percent", "plural", "printable", "quoted", "shared_start", "shell_word", "short_number",
]  # fmt: skip

_MAX_CHARS = 400  # of one name
# Cyrillic and Greek letters that look like Latin letters, which follow in the same order. Compatibility forms, such as
# wide letters, are not in this table, because Unicode normalization handles them.
_LOOKS_LATIN = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u0501\u04bb\u051b\u051d"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0406\u0408\u0405"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7"
    "\u03b1\u03b3\u03b9\u03bd\u03bf\u03c1\u03c5\u0131",
    "aeopcyxijsdhqwABEKMHOPCTXIJSABEZHIKMNOPTYXayivopui",
)
# Characters that str.isprintable() accepts although they are invisible: fillers, joiners, variation selectors.
_INVISIBLE = lazy_pattern(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Spaces that cannot be seen in a table: at the ends of a name, and after another space.
_HIDDEN_SPACES = lazy_pattern(r"(?<= ) +|^ +| +$")
_MAX_COMPARED = 2_000_000  # characters of all names together
_SMALL = 1e-3  # people write 0.001, but 3e-4
_LARGE = 1e9  # whole numbers below this are written in full


def printable(name: str) -> str:
    r"""Return ``name`` with every character that could move a cursor, break a line or hide text escaped.

    Backslashes are doubled and hidden spaces become ``\x20``, so that the printed form is unambiguous. Very long names
    are cut in the middle, with the number of missing characters.
    """
    if len(name) > _MAX_CHARS:
        cut = len(name) - _MAX_CHARS
        return f"{printable(name[: _MAX_CHARS // 2])}...<{cut} more characters>...{printable(name[-_MAX_CHARS // 2 :])}"
    if name.isascii() and name.isprintable() and "\\" not in name:
        return _HIDDEN_SPACES.sub(_escaped, name) if " " in name else name
    shown = name.replace("\\", "\\\\")
    if not shown.isprintable():
        shown = "".join(char if char.isprintable() else _escape(char) for char in shown)
    return _HIDDEN_SPACES.sub(_escaped, _INVISIBLE.sub(_escaped, shown))


def _escaped(match: re.Match[str]) -> str:
    return "".join(map(_escape, match[0]))


def _escape(char: str) -> str:
    code = ord(char)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def quoted(name: str) -> str:
    """Return ``name`` printable and in quotes, as Python writes it, for use inside a sentence."""
    return in_quotes(printable(name))


def in_quotes(shown: str) -> str:
    """Return printable text in quotes, as Python writes it."""
    if "'" in shown and '"' not in shown:
        return f'"{shown}"'
    inner = shown.replace("'", "\\'")
    return f"'{inner}'"


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its text, in printable form."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # noqa: BLE001 - the class may be code of the user, which can fail too
        lines = []
    return f"{type(error).__name__}: {printable(lines[0])}" if lines else type(error).__name__


def listed(
    names: Collection[object], most: int = 8, *, show: Callable[[str], str] = quoted, separator: str = ", "
) -> str:
    """Return the first ``most`` names and how many more there are, for use inside a sentence: ``'a', 'b' and 3 more``.

    ``show`` makes a string printable; by default, strings are quoted. Other values are converted by ``str``.
    """
    first = [show(name) if isinstance(name, str) else str(name) for name in islice(names, most)]
    return separator.join(first) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def shell_word(text: str) -> str:
    r"""Return ``text`` as one shell word, for a hint that users paste: the shell runs and expands nothing in it.

    Characters that cannot be printed are written as in ``$'\x1b'``, which bash and zsh understand.
    """
    plain = text.replace("\\", "/")
    if printable(plain) == plain and "'" not in text and not text.endswith("\\"):
        return f"'{text}'"
    if printable(text) == text and not any(char in text for char in '"$`\\!'):
        return f'"{text}"'
    if len(text) > _MAX_CHARS:
        return quoted(text)
    return "$'" + "".join(map(_for_shell, text)) + "'"


def _for_shell(char: str) -> str:
    if char in "\\'":
        return f"\\{char}"
    if char.isprintable() and not _INVISIBLE.match(char):
        return char
    code = ord(char)
    # In a shell \x is a byte and \u is a character.
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def look_alikes(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two different names that look the same to a person, or None.

    Such names differ only in the encoding of accents, in invisible characters, in wide letters, or in Cyrillic and
    Greek letters that look Latin.
    """
    names = list(names)
    if all(map(str.isascii, names)):
        return None
    import unicodedata

    seen: dict[str, str] = {}
    left = _MAX_COMPARED
    for name in names:
        look = name
        # Longer names are never printed whole, and normalizing a run of accents takes quadratic time.
        if not name.isascii() and len(name) <= _MAX_CHARS:
            look = _INVISIBLE.sub("", unicodedata.normalize("NFKC", name).translate(_LOOKS_LATIN))
            if not look.isprintable():
                look = "".join(char for char in look if unicodedata.category(char) != "Cf")
            left -= len(look)
            if left < 0:
                return None
        if seen.setdefault(look, name) != name:
            return seen[look], name
    return None


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the one of ``names`` that is most like ``name``, or None; ``cutoff`` is the least likeness, up to 1.

    A name that differs only in upper and lower case is the nearest.
    """
    import difflib  # takes a millisecond of the start of every command

    names = list(names)
    same = [one for one in names if one.casefold() == name.casefold()]
    return next(iter(same or difflib.get_close_matches(name, names, n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, names: Iterable[str], otherwise: str) -> str:
    """Return the hint for a name that is not one of ``names``: the nearest one, or ``otherwise`` if none is near."""
    near = nearest(name, names)
    return f"did you mean {quoted(near)}?" if near else otherwise


def shared_start(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many characters of two texts, or segments of two paths, are the same before the first difference."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return ``1 tensor`` or ``1,234 tensors``."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def kind_of(value: object) -> str:
    """Return a description of ``value`` for an error message: ``the string 'x'``, ``the class Net``, ``a list``."""
    if isinstance(value, type):
        return f"the class {printable(value.__name__)}"
    if isinstance(value, str):
        return f"the string {quoted(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    article = "an" if type(value).__name__[:1].lower() in "aeiou" else "a"
    return f"{article} {type(value).__name__}"


def percent(share: float) -> str:
    """Return a share as a percentage; only shares of exactly 0 and 1 give 0.0 % and 100 %.

    A size can be more than the whole: of two files, the second may be larger.
    """
    if share == 1:
        return "100 %"
    if share > 1:
        return f"{short_number(max(100 * share, 101), 3)} %"
    text = f"{min(100 * share, 99.9):.1f} %"
    return "< 0.1 %" if share and text == "0.0 %" else text


def short_number(value: float | None, digits: int = 6) -> str:
    """Return a number as people write it, with at most ``digits`` digits: ``3e-4``, ``0.1``, ``65504``; None is empty.

    It is for people only: JSON documents and files have the exact number. Whole numbers below 1e9 are never rounded,
    and -0.0 is ``0``.
    """
    if value is None:
        return ""
    if abs(value) < _LARGE and value == int(value):
        return str(int(value))
    text = f"{value:.{digits}g}"
    if abs(float(text)) < _SMALL:
        text = f"{value:.{digits - 1}e}"
    mantissa, sign, exponent = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if sign else text


def option_text(value: object) -> str:
    """Return an option of an optimizer for a table: numbers in it are short, and text is printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return short_number(value)
    if isinstance(value, list | tuple):
        marks = "[]" if isinstance(value, list) else "()"
        return f"{marks[0]}{', '.join(map(option_text, value))}{marks[1]}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{option_text(name)}: {option_text(item)}' for name, item in value.items())}}}"
    return printable(str(value))


def option_texts(first: object, second: object) -> tuple[str, str]:
    """Return two options that differ, for a message: strings are quoted, and numbers have the digits to tell apart."""
    texts = [quoted(value) if isinstance(value, str) else option_text(value) for value in (first, second)]
    if texts[0] == texts[1]:
        texts = [printable(repr(value)) for value in (first, second)]
    return texts[0], texts[1]


def human_bytes(count: int) -> str:
    """Return a size in decimal units: ``248.0 kB``."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB", "TB", "PB", "EB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} ZB"
