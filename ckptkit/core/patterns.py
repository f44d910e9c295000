"""The pattern language for keys: patterns that match keys, templates that rename them, and hints for patterns.

Every option and file of ckptkit that selects or renames keys uses this language.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ckptkit.core.text import listed, quoted
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


_NAME = r"[A-Za-z][A-Za-z0-9_]*"  # names with a leading underscore are for the groups of stars
_PATTERN_TOKEN = re.compile(
    rf"(?P<star>\*)|\{{(?P<name>{_NAME})(?P<int>:int)?\}}|(?P<literal>[^*{{}}]+)|(?P<bad>[{{}}])"
)
_TEMPLATE_TOKEN = re.compile(
    rf"(?P<star>\*)|\{{(?P<name>{_NAME})(?P<shift>[+-][0-9]{{1,18}})?\}}|(?P<literal>[^*{{}}]+)|(?P<bad>[{{}}])"
)
_SPECIAL = re.compile(r"[*{}]|^re:")  # not literal in a pattern
_AS_REGEX = "to match a brace itself, write the pattern as a regex: re:..."


@dataclass(frozen=True, slots=True)
class KeyMatch:
    """A match of a pattern that has stars and no captures; it has the interface of a regex match.

    ``stars`` holds the text that each star matched.
    """

    string: str
    stars: tuple[str, ...]

    def __getitem__(self, name: str) -> str:
        """Return the text of a star by the name of its group; ``_0`` is the first star."""
        return self.stars[int(name[1:])]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern, which matches whole keys only.

    ``stars`` is the number of stars. ``captures`` maps the name of each capture to whether it is an int. ``literals``
    are the texts between stars and captures.
    """

    text: str
    stars: int = 0
    captures: Mapping[str, bool] = field(default_factory=dict)
    regex: re.Pattern[str] = field(default=re.compile(""), repr=False)
    literals: tuple[str, ...] = field(default=(), repr=False)

    def match(self, key: str) -> re.Match[str] | KeyMatch | None:
        """Return the match of the whole ``key``, or None."""
        if len(self.literals) > 2:  # a regex with several stars can take minutes for a long key
            stars = _match_stars(self.literals, key)
            if stars is None or not self.captures:
                return None if stars is None else KeyMatch(key, stars)
        return self.regex.fullmatch(key)

    @property
    def is_regex(self) -> bool:
        """Whether the pattern was written as ``re:...``."""
        return self.text.startswith("re:")


def _match_stars(literals: Sequence[str], key: str) -> tuple[str, ...] | None:
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


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Pattern:
    """Return the pattern that ``text`` describes.

    ``*`` matches any characters, dots included. ``{name}`` matches one dot-separated segment, ``{name:int}`` a segment
    of digits. After ``re:`` the rest is a Python regex. Any other text is literal. Raises ``RuleError`` for an empty
    pattern, for a brace outside of a capture, and for a regex that does not compile.
    """
    if text.startswith("re:"):
        try:
            return Pattern(text, regex=re.compile(text[3:], re.DOTALL))
        except (re.error, RecursionError, OverflowError, ValueError) as error:
            raise RuleError(f"{quoted(text)} is not a valid regular expression: {error}") from None
    if not text:
        raise RuleError("a pattern is empty", hint="'*' matches every key")
    parts: list[str] = []
    captures: dict[str, bool] = {}
    literals = [""]
    stars = 0
    for token in _PATTERN_TOKEN.finditer(text):
        if token["bad"]:
            raise RuleError(f"{quoted(text)} has a brace that is not part of a capture", hint=_AS_REGEX)
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
    """Return a pattern that matches ``key`` and no other key."""
    return f"re:{re.escape(key)}" if not key or _SPECIAL.search(key) else key


def matches_any(patterns: Iterable[Pattern], key: str) -> bool:
    """Return whether at least one pattern matches the whole key."""
    return any(pattern.match(key) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Template:
    """The right side of a rename: the new name of the keys that match ``pattern``.

    A part has a kind (``literal`` or ``group``), its text or the name of its group, and the number to add to an index.
    """

    text: str
    pattern: Pattern
    parts: tuple[tuple[str, str, int | None], ...] = ()

    def apply(self, key: str) -> str | None:
        """Return the new name of ``key``, or None where the pattern does not match.

        Raises ``RuleError`` where arithmetic gives a negative index.
        """
        match = self.pattern.match(key)
        return None if match is None else self.expand(match)

    def expand(self, match: re.Match[str] | KeyMatch) -> str:
        """Return the new name for a match of the template's pattern; raise ``RuleError`` as ``apply`` does."""
        if self.pattern.is_regex and isinstance(match, re.Match):
            return match.expand(self.text)
        texts = []
        for kind, value, shift in self.parts:
            if kind == "literal":
                texts.append(value)
            elif shift is None:
                texts.append(match[value])
            else:
                texts.append(self._shifted(match, value, shift))
        return "".join(texts)

    def _shifted(self, match: re.Match[str] | KeyMatch, name: str, shift: int) -> str:
        digits = match[name]
        if len(digits) > 18:
            raise RuleError(
                f"{quoted(match.string)}: index {{{name}}} has {len(digits)} digits, which is too many for arithmetic"
            )
        index = int(digits) + shift
        if index < 0:
            raise RuleError(f"{quoted(self.text)} gives {quoted(match.string)} the negative index {index}")
        return str(index)


def parse_template(text: str, pattern: Pattern) -> Template:
    """Return the template ``text`` for keys that match ``pattern``.

    Raises ``RuleError`` for a ``*`` or a capture that the pattern does not have, and for arithmetic on a capture that
    is not ``{name:int}``.
    """
    if pattern.is_regex:
        return _regex_template(text, pattern)
    parts: list[tuple[str, str, int | None]] = []
    stars = 0
    for token in _TEMPLATE_TOKEN.finditer(text):
        if token["bad"]:
            raise RuleError(f"{quoted(text)} has a brace that is not part of a capture", hint=_AS_REGEX)
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
            hint="each '*' is copied in order; to move or leave out a segment, name it {like_this}",
        )
    return Template(text, pattern, tuple(parts))


def _shift(token: re.Match[str], text: str, pattern: Pattern) -> int | None:
    name = token["name"]
    if name not in pattern.captures:
        raise RuleError(f"{quoted(text)} uses {{{name}}}, which {quoted(pattern.text)} does not capture")
    if token["shift"] is None:
        return None
    if not pattern.captures[name]:
        raise RuleError(f"{quoted(text)} does arithmetic on {{{name}}}", hint=f"write {{{name}:int}} on the left side")
    return int(token["shift"])


def _regex_template(text: str, pattern: Pattern) -> Template:
    # The alternative (?:) matches the empty string, so the template is parsed even without a matching key.
    try:
        re.compile(pattern.regex.pattern + "|(?:)").sub(text, "")
    except (re.error, IndexError) as error:
        raise RuleError(f"{quoted(text)} is not a valid template for {quoted(pattern.text)}: {error}") from None
    return Template(text, pattern)


def parse_rename(text: str) -> Template:
    """Return the rename that ``OLD=NEW`` describes.

    ``re:OLD=NEW`` is divided at its last ``=``; any other text must have exactly one. Raises ``RuleError`` for a text
    of another form, and as ``parse_pattern`` and ``parse_template`` do.
    """
    regex = text.startswith("re:")
    if "=" not in text or (not regex and text.count("=") > 1):
        raise RuleError(f"{quoted(text)} is not of the form OLD=NEW", hint="for example 'module.*=*'")
    old, _, new = text.rpartition("=")
    return parse_template(new, parse_pattern(old))


def suggest_pattern(pattern: Pattern, names: Collection[str]) -> str:
    """Return a hint for a pattern that matches none of ``names``: a similar pattern that does, or some of the names."""
    for text in _variants(pattern, names):
        try:
            variant = parse_pattern(text)
        except RuleError:
            continue
        if any(variant.match(name) for name in names):
            return f"did you mean {quoted(text)}?"
    if close := difflib.get_close_matches(pattern.text, names, n=1, cutoff=0.5):
        return f"the nearest name is {quoted(close[0])}"
    return f"the model has {listed(names, 3)}"


def _variants(pattern: Pattern, names: Collection[str]) -> Iterator[str]:
    """Yield similar patterns: for the children of a module, with or without a prefix, or with a typo corrected."""
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
    """Yield the end of each prefix of a name: at every dot, and at its end."""
    end = name.find(".")
    while end != -1:
        yield end
        end = name.find(".", end + 1)
    yield len(name)
