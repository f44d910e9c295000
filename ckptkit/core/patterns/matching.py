"""Match keys in bounded time: stars and captures with a table of positions, regexes with a limit on processor time.

A regex with several repetitions can try every combination of their lengths, which takes minutes for one long key.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import FrameType, MappingProxyType
from typing import Final

from ckptkit.core.frozen import slot_setters
from ckptkit.core.text import quoted
from ckptkit.errors import RuleError

__all__ = [
    "KeyMatch",
    "Token",
    "compile_regex",
    "longest_fast_key",
    "match_regex",
    "match_stars",
    "match_tokens",
    "ranges_of",
    "repetitions",
]

_MOST_STEPS = 4_000_000  # of a regex, counted before it runs
_MOST_VALUES = 50_000  # of captures that are repeated in a pattern, tried on one key
_MOST_COMPARED = 8_000_000  # texts that are counted to find these values
_SECONDS = 0.5  # of processor time for one key and one regex
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_MOST_DIGITS = 18  # of a number in a pattern
_SEGMENT, _DIGITS = re.compile("[^.]+"), re.compile("[0-9]+")


@dataclass(frozen=True, slots=True, init=False)
class KeyMatch:
    """A match of a pattern with stars and captures; it has the interface of a regex match.

    ``stars`` holds the text that each star matched, and ``captures`` the text of each capture by its name.
    """

    string: str
    stars: tuple[str, ...]
    captures: Mapping[str, str]

    def __init__(self, string: str, stars: tuple[str, ...], captures: Mapping[str, str] = _NOTHING) -> None:
        """Set all fields through their slots: every key of a large checkpoint that is renamed has a match."""
        _set_string(self, string)
        _set_stars(self, stars)
        _set_captures(self, captures)

    def __getitem__(self, name: str) -> str:
        """Return the text of a capture, or of a star by the name of its group; ``_0`` is the first star."""
        return self.stars[int(name[1:])] if name.startswith("_") else self.captures[name]


_set_string, _set_stars, _set_captures = slot_setters(KeyMatch)


@dataclass(frozen=True, slots=True)
class Token:
    """A part of a pattern: its kind is ``literal``, ``star``, ``segment``, ``digits``, ``repeat`` or ``numbers``.

    ``text`` is the literal, or the name of the capture, or the numbers, such as ``0..5,7``. A ``repeat`` is a capture
    that was captured before.
    """

    kind: str
    text: str = ""


def match_stars(literals: Sequence[str], key: str) -> tuple[str, ...] | None:
    """Return the texts between the literals in the key, or None where the key does not match.

    The literals are searched from the end of the key, so the first star is as long as possible, as in a regex.
    """
    first, *middle, last = literals
    start, end = len(first), len(key) - len(last)
    if start > end or not key.startswith(first) or not key.endswith(last):
        return None
    stars = []
    for literal in reversed(middle):
        at = key.rfind(literal, start, end)
        if at < 0:
            return None
        stars.append(key[at + len(literal) : end])
        end = at
    return (key[start:end], *reversed(stars))


def match_tokens(tokens: Sequence[Token], key: str, text: str) -> KeyMatch | None:
    """Return the match of the whole key that a regex would find: the first token is as long as possible, and so on.

    The time grows with the tokens times the length of the key. Where a capture is repeated, each text that the capture
    can have is tried. Raises ``RuleError``, which names the pattern ``text``, where these are too many.
    """
    repeated = list(dict.fromkeys(token.text for token in tokens if token.kind == "repeat"))
    if not repeated:
        ends = _ends(tokens, key)
        return None if ends is None else _key_match(tokens, key, ends)
    kinds = {token.text: token.kind for token in reversed(tokens) if token.kind in ("segment", "digits")}
    best: list[int] | None = None
    counts = Counter(token.text for token in tokens if token.kind not in ("literal", "star"))
    values_of = [_repeated_texts(kinds[name], key, counts[name]) for name in repeated]
    if math.prod(map(len, values_of)) > _MOST_VALUES:
        raise _too_long(text, key)
    for values in product(*values_of):
        fixed = dict(zip(repeated, values, strict=True))
        ends = _ends([Token("literal", fixed[token.text]) if token.text in fixed and token.kind != "literal" else token
                      for token in tokens], key)  # fmt: skip
        if ends is not None and (best is None or ends > best):
            best = ends
    return None if best is None else _key_match(tokens, key, best)


def _repeated_texts(kind: str, key: str, count: int) -> list[str]:
    """Return each text that a capture of this kind can have if it is in the key ``count`` times; at most a few more.

    The list has more than ``_MOST_VALUES`` items if counting all takes too long.
    """
    runs = [run[0] for run in (_DIGITS if kind == "digits" else _SEGMENT).finditer(key)]
    texts: list[str] = []
    if sum(len(run) ** 2 for run in runs) > _MOST_COMPARED:
        return [""] * (_MOST_VALUES + 1)
    for size in range(1, max(map(len, runs), default=0) + 1):
        found = Counter(run[at : at + size] for run in runs for at in range(len(run) - size + 1))
        new = [text for text, times in found.items() if times >= count]
        if not new or len(texts) > _MOST_VALUES:  # a longer text occurs no more often
            break
        texts += new
    return texts


def _too_long(text: str, key: str) -> RuleError:
    return RuleError(
        f"{quoted(text)} takes too long to match a key of {len(key):,} characters, such as {quoted(key[:40])}",
        hint="use fewer repetitions in the pattern",
    )


def _ends(tokens: Sequence[Token], key: str) -> list[int] | None:
    """Return the position in the key at which each token ends, or None where the key does not match."""
    # A set of positions is an integer: bit len(key) - p is set if this token and those after it match from p on.
    # Thus a smaller bit is a later position, and adding a set to the set of a class of characters spreads it to the
    # start of each run, because the carry goes through all set bits.
    size = len(key)
    members_of: dict[str, int] = {}
    after = [1]  # the end of the key
    for token in reversed(tokens):
        rest = after[-1]
        if token.kind == "literal":
            rest = _occurrences(token.text, key) & (rest << len(token.text))
        elif token.kind == "star":
            lowest = rest & -rest
            rest = (1 << (size + 1)) - lowest if rest else 0
        elif token.kind == "numbers":
            rest = _starts_of_numbers(token.text, key, rest)
        else:
            if token.kind not in members_of:
                members_of[token.kind] = int("0" + key.translate(_MEMBERS[token.kind]), 2) << 1
            members = members_of[token.kind]
            last = (rest << 1) & members
            rest = members & (((members + last) ^ members) | last)
        if not rest:
            return None
        after.append(rest)
    if not after.pop() >> size & 1:
        return None
    ends, at = [], 0
    for token in tokens:
        rest = after.pop()
        if token.kind == "literal":
            at += len(token.text)
        elif token.kind == "star":
            at = size - (rest & -rest).bit_length() + 1
        elif token.kind == "numbers":
            at += len(_DIGITS.match(key, at)[0])  # type: ignore[index]  # a number starts here
        else:
            run = (_DIGITS if token.kind == "digits" else _SEGMENT).match(key, at)
            shift = size - (run.end() if run else at)
            reachable = rest >> shift
            at = size - shift - (reachable & -reachable).bit_length() + 1
        ends.append(at)
    return ends


def _starts_of_numbers(numbers: str, key: str, rest: int) -> int:
    """Return the set of the positions of whole runs of digits that are one of the numbers and end in ``rest``."""
    size, ranges, found = len(key), ranges_of(numbers), 0
    for run in _DIGITS.finditer(key):
        if rest >> (size - run.end()) & 1 and _is_in(ranges, run[0]):
            found |= 1 << (size - run.start())
    return found


@lru_cache(maxsize=256)
def ranges_of(numbers: str) -> tuple[tuple[int, int], ...]:
    """Return the first and the last number of each range of a text such as ``0..5,7``."""
    ends = (part.partition("..") for part in numbers.split(","))
    return tuple((int(first), int(last or first)) for first, _, last in ends)


def _is_in(ranges: Sequence[tuple[int, int]], digits: str) -> bool:
    if len(digits) > _MOST_DIGITS or (digits[0] == "0" and len(digits) > 1):
        return False
    return any(first <= int(digits) <= last for first, last in ranges)


def _occurrences(literal: str, key: str) -> int:
    """Return the set of the positions at which the literal occurs in the key."""
    size, at = len(key), key.find(literal)
    if size < 500:  # one bit after another is faster for a short key
        found = 0
        while at >= 0:
            found |= 1 << (size - at)
            at = key.find(literal, at + 1)
        return found
    bits = bytearray(b"0") * (size + 1)
    while at >= 0:
        bits[at] = 49  # the digit 1
        at = key.find(literal, at + 1)
    return int(bits, 2)


class _Translation(dict[int, str]):
    """A table for ``str.translate`` that turns each character that is not in the table into ``other``."""

    def __init__(self, table: Mapping[int, str], other: str) -> None:
        super().__init__(table)
        self.other = other

    def __missing__(self, code: int) -> str:
        return self.other


_MEMBERS: Final = {
    "segment": _Translation({ord("."): "0"}, "1"),
    "digits": _Translation(dict.fromkeys(b"0123456789", "1"), "0"),
}


def _key_match(tokens: Sequence[Token], key: str, ends: Sequence[int]) -> KeyMatch:
    stars: list[str] = []
    captures: dict[str, str] = {}
    start = 0
    for token, end in zip(tokens, ends, strict=True):
        if token.kind == "star":
            stars.append(key[start:end])
        elif token.kind in ("segment", "digits"):
            captures[token.text] = key[start:end]
        start = end
    return KeyMatch(key, tuple(stars), captures)


def longest_fast_key(count: int) -> int:
    """Return the longest key that a regex with ``count`` repetitions matches in a few hundredths of a second."""
    return int(_MOST_STEPS ** (1 / max(count, 1)))


def compile_regex(text: str, flags: int = re.DOTALL) -> re.Pattern[str]:
    """Return the compiled regex. Raises what ``re.compile`` raises, and never warns.

    Python warns of a set such as ``[[a]``: its meaning could change in a later version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(text, flags)


_NESTED: Final = 1000  # repetitions: of a regex with a repetition in a repetition, which can take exponential time


def repetitions(regex: str) -> int:
    """Return the number of parts of a valid regex that can match several lengths; 1000 if one of them is in another."""
    try:
        from re import _parser  # type: ignore[attr-defined]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return min(_count(_parser.parse(regex, re.DOTALL)), _NESTED)
    except (ImportError, RecursionError):  # a private module, which another version of Python need not have
        return _NESTED


def _count(node: object) -> int:
    """Return the number of repetitions in a node of a parsed regex: a list of pairs of a code and its arguments."""
    total = 0
    for code, arguments in node:  # type: ignore[attr-defined]
        name = str(code)
        inner = list(_inner(arguments))
        count = sum(map(_count, inner))
        if "REPEAT" in name and arguments[1] > 1:
            if count or any(_has_choice(part) for part in inner):
                return _NESTED
            count = 1
        elif "REPEAT" in name:
            count += 1  # an optional part
        total += count
    return total


def _has_choice(node: object) -> bool:
    return any(str(code) == "BRANCH" or any(map(_has_choice, _inner(arguments))) for code, arguments in node)  # type: ignore[attr-defined]


def _inner(arguments: object) -> Iterator[object]:
    """Yield the nodes in the arguments of a node."""
    if type(arguments).__name__ == "SubPattern":
        yield arguments
    elif isinstance(arguments, list | tuple):
        for item in arguments:
            yield from _inner(item)


class _OutOfTime(Exception):  # noqa: N818 - a signal, not an error of the caller
    """The processor time of a match is used up."""


def _raise_out_of_time(_number: int, _frame: FrameType | None) -> None:
    raise _OutOfTime


def match_regex(regex: re.Pattern[str], count: int, key: str, text: str) -> re.Match[str] | None:
    """Return the match of the whole key with a regex that has ``count`` repetitions.

    Raises ``RuleError``, which names the pattern ``text``, where the match takes more than a second of processor time.
    Python can stop a match only in the main thread, if the program does not use this timer itself. Elsewhere, a match
    that could take that long is refused before it begins.
    """
    if len(key) <= longest_fast_key(count):
        return regex.fullmatch(key)
    import signal

    number = signal.SIGVTALRM
    handler = signal.getsignal(number)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or handler not in (signal.SIG_DFL, signal.SIG_IGN) or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        if count >= _NESTED or len(key) ** count > _MOST_STEPS * 20:
            raise _too_long(text, key)
        return regex.fullmatch(key)
    signal.signal(number, _raise_out_of_time)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS, _SECONDS)
        found = regex.fullmatch(key)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _OutOfTime:
        raise _too_long(text, key) from None
    finally:
        with contextlib.suppress(_OutOfTime):
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(number, handler)
    return found
