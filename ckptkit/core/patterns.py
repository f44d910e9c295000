"""The one pattern language: which keys are meant, and what they are called afterwards."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ckptkit.core.text import quoted
from ckptkit.errors import RuleError

__all__ = [
    "KeyMatch",
    "Pattern",
    "Template",
    "literal",
    "matches_any",
    "parse_pattern",
    "parse_rename",
    "parse_template",
    "suggest_pattern",
]


_NAME = r"[A-Za-z][A-Za-z0-9_]*"  # a leading underscore is left to the groups that stars make
_PATTERN_TOKEN = re.compile(
    rf"(?P<star>\*)|\{{(?P<name>{_NAME})(?P<int>:int)?\}}|(?P<literal>[^*{{}}]+)|(?P<bad>[{{}}])"
)
_TEMPLATE_TOKEN = re.compile(
    rf"(?P<star>\*)|\{{(?P<name>{_NAME})(?P<shift>[+-][0-9]{{1,18}})?\}}|(?P<literal>[^*{{}}]+)|(?P<bad>[{{}}])"
)
_SPECIAL = re.compile(r"[*{}]|^re:")  # what a pattern does not take as it stands
_AS_REGEX = "to match a brace itself, write the pattern as a regex: re:..."


@dataclass(frozen=True, slots=True)
class KeyMatch:
    """What the stars of a pattern stand for in ``string``; read like the match of a regex."""

    string: str
    gaps: tuple[str, ...]

    def __getitem__(self, name: str) -> str:
        """Return the text of a star, by the name of its group: ``_0`` is the first."""
        return self.gaps[int(name[1:])]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern; it fits a whole key or not at all."""

    text: str
    stars: int = 0
    captures: Mapping[str, bool] = field(default_factory=dict)  # name -> whether it is an int
    regex: re.Pattern[str] = field(default=re.compile(""), repr=False)
    literals: tuple[str, ...] = field(default=(), repr=False)  # the texts between stars and captures

    def match(self, key: str) -> re.Match[str] | KeyMatch | None:
        """Return the match of the whole ``key``, or None."""
        if len(self.literals) > 2:  # a regex tries every choice of places, and a long key has millions of them
            gaps = _gaps(self.literals, key)
            if gaps is None or not self.captures:
                return None if gaps is None else KeyMatch(key, gaps)
        return self.regex.fullmatch(key)

    @property
    def is_regex(self) -> bool:
        """Whether it was written as ``re:...``."""
        return self.text.startswith("re:")


def _gaps(literals: Sequence[str], key: str) -> tuple[str, ...] | None:
    """Return what lies between the literals, laid over the key from its end: so the first gap is the longest."""
    first, *middle, last = literals
    start, end = len(first), len(key) - len(last)
    if start > end or not key.startswith(first) or not key.endswith(last):
        return None
    gaps = []
    for literal in reversed(middle):
        at = key.rfind(literal, start, end)
        if at < 0:
            return None
        gaps.append(key[at + len(literal) : end])
        end = at
    return (key[start:end], *reversed(gaps))


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Pattern:
    """Return the pattern that ``text`` describes.

    ``*`` is any run of characters, dots included; ``{name}`` is one dot-separated segment and
    ``{name:int}`` one of digits; ``re:`` in front makes the rest a Python regex. All else is literal.
    Raises ``RuleError`` for an empty pattern, a stray brace or a regex that does not compile.
    """
    if text.startswith("re:"):
        try:
            return Pattern(text, regex=re.compile(text[3:], re.DOTALL))
        except (re.error, RecursionError, OverflowError, ValueError) as error:
            raise RuleError(f"{quoted(text)} is not a regular expression: {error}") from None
    if not text:
        raise RuleError("a pattern is empty", hint="'*' matches every key")
    parts: list[str] = []
    captures: dict[str, bool] = {}
    literals = [""]
    stars = 0
    for token in _PATTERN_TOKEN.finditer(text):
        if token["bad"]:
            raise RuleError(f"{quoted(text)} has a brace that closes no capture", hint=_AS_REGEX)
        if token["literal"]:
            parts.append(re.escape(token["literal"]))
            literals[-1] = token["literal"]
            continue
        literals.append("")
        if token["star"]:
            parts.append(f"(?P<_{stars}>.*)")
            stars += 1
        elif (name := token["name"]) in captures:
            parts.append(f"(?P={name})")
        else:
            captures[name] = token["int"] is not None
            parts.append(f"(?P<{name}>{'[0-9]+' if captures[name] else '[^.]+'})")
    return Pattern(text, stars, captures, re.compile("".join(parts), re.DOTALL), tuple(literals))


def literal(key: str) -> str:
    """Return a pattern that fits ``key`` and nothing else."""
    return f"re:{re.escape(key)}" if not key or _SPECIAL.search(key) else key


def matches_any(patterns: Iterable[Pattern], key: str) -> bool:
    """Return whether at least one pattern fits the whole key."""
    return any(pattern.match(key) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Template:
    """The right side of a rename: what a key that fits ``pattern`` is called afterwards."""

    text: str
    pattern: Pattern
    parts: tuple[tuple[str, str, int | None], ...] = ()  # (kind, text or group name, shift)

    def apply(self, key: str) -> str | None:
        """Return the new name of ``key``, or None where the pattern does not fit it.

        Raises ``RuleError`` where arithmetic on an index leaves it below zero.
        """
        match = self.pattern.match(key)
        return None if match is None else self.expand(match)

    def expand(self, match: re.Match[str] | KeyMatch) -> str:
        """Return the new name for a match of this template's pattern."""
        if self.pattern.is_regex and isinstance(match, re.Match):
            return match.expand(self.text)
        made = []
        for kind, value, shift in self.parts:
            if kind == "literal":
                made.append(value)
            elif shift is None:
                made.append(match[value])
            else:
                made.append(self._shifted(match, value, shift))
        return "".join(made)

    def _shifted(self, match: re.Match[str] | KeyMatch, name: str, shift: int) -> str:
        digits = match[name]
        if len(digits) > 18:
            raise RuleError(
                f"{quoted(match.string)}: index {{{name}}} has {len(digits)} digits, too many to count with"
            )
        index = int(digits) + shift
        if index < 0:
            raise RuleError(f"{quoted(self.text)} turns {quoted(match.string)} into index {index}, below zero")
        return str(index)


def parse_template(text: str, pattern: Pattern) -> Template:
    """Return the template ``text`` for keys that fit ``pattern``.

    Raises ``RuleError`` where it uses a ``*`` or a capture that the pattern does not bind, or does
    arithmetic on a capture that is not ``{name:int}``.
    """
    if pattern.is_regex:
        return _regex_template(text, pattern)
    parts: list[tuple[str, str, int | None]] = []
    stars = 0
    for token in _TEMPLATE_TOKEN.finditer(text):
        if token["bad"]:
            raise RuleError(f"{quoted(text)} has a brace that closes no capture", hint=_AS_REGEX)
        if token["literal"]:
            parts.append(("literal", token["literal"], None))
        elif token["star"]:
            parts.append(("group", f"_{stars}", None))
            stars += 1
        else:
            parts.append(("group", token["name"], _shift(token, text, pattern)))
    if stars != pattern.stars:
        raise RuleError(
            f"{quoted(f'{pattern.text}={text}')} has {pattern.stars} '*' on the left and {stars} on the right",
            hint="each '*' is carried over in order; name a segment {like_this} to move or leave one out",
        )
    return Template(text, pattern, tuple(parts))


def _shift(token: re.Match[str], text: str, pattern: Pattern) -> int | None:
    name = token["name"]
    if name not in pattern.captures:
        raise RuleError(f"{quoted(text)} uses {{{name}}}, which {quoted(pattern.text)} does not capture")
    if token["shift"] is None:
        return None
    if not pattern.captures[name]:
        raise RuleError(f"{quoted(text)} counts with {{{name}}}", hint=f"write {{{name}:int}} on the left side")
    return int(token["shift"])


def _regex_template(text: str, pattern: Pattern) -> Template:
    # Expanding once against a match that cannot fail would need a sample; the regex's own parser tells earlier.
    try:
        re.compile(pattern.regex.pattern + "|(?:)").sub(text, "")
    except (re.error, IndexError) as error:
        raise RuleError(f"{quoted(text)} does not fit {quoted(pattern.text)}: {error}") from None
    return Template(text, pattern)


def parse_rename(text: str) -> Template:
    """Return the rename that ``OLD=NEW`` describes.

    In ``re:OLD=NEW`` the last ``=`` divides, elsewhere the only one. Raises ``RuleError`` for anything else.
    """
    regex = text.startswith("re:")
    if "=" not in text or (not regex and text.count("=") > 1):
        raise RuleError(f"{quoted(text)} is not of the form OLD=NEW", hint="for example 'module.*=*'")
    old, _, new = text.rpartition("=")
    return parse_template(new, parse_pattern(old))


def suggest_pattern(pattern: Pattern, names: Collection[str]) -> str:
    """Return the nearest pattern that fits one of ``names``, as a sentence for a hint; else some of the names."""
    for text in _variants(pattern, names):
        try:
            meant = parse_pattern(text)
        except RuleError:
            continue
        if any(meant.match(name) for name in names):
            return f"did you mean {quoted(text)}?"
    if close := difflib.get_close_matches(pattern.text, names, n=1, cutoff=0.5):
        return f"the nearest name is {quoted(close[0])}"
    some = list(names)[:3]
    return f"the model has {', '.join(map(quoted, some))}{', ...' if len(names) > len(some) else ''}"


def _variants(pattern: Pattern, names: Collection[str]) -> Iterator[str]:
    """Yield what people write instead: a module for its parameters, a name without its prefix, a slip of the pen."""
    text = pattern.text
    if pattern.is_regex:
        body = f"(?:{text[3:]})"
        yield from (f"re:{body}.*", f"re:.*{body}", f"re:.*{body}.*")
        return
    yield from (f"{text.rstrip('.')}.*", f"{text}*", f"*.{text}", f"*.{text}.*")
    prefix, _, inner = text.partition(".")
    if inner[:1] not in ("", "*", "{") and not {"*", "{"} & set(prefix):
        yield inner
    stem = text[: min((text.find(mark) for mark in "*{" if mark in text), default=len(text))].rstrip(".")
    prefixes = {name[:end] for name in names for end in _ends(name)}
    for close in difflib.get_close_matches(stem, prefixes, n=3):
        yield close + text[len(stem) :]
        yield f"{close}.*"


def _ends(name: str) -> Iterator[int]:
    end = name.find(".")
    while end != -1:
        yield end
        end = name.find(".", end + 1)
    yield len(name)
