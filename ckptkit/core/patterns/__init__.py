"""The pattern language for keys: patterns that match keys, templates that rename them, and hints for patterns.

Every option and file of ckptkit that selects or renames keys uses this language.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import string
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from ckptkit.core.patterns.matching import (
    KeyMatch,
    Token,
    compile_regex,
    longest_fast_key,
    match_regex,
    match_stars,
    match_tokens,
    ranges_of,
    repetitions,
)
from ckptkit.core.text import listed, nearest, quoted, shell_word
from ckptkit.errors import RuleError

__all__ = [
    "KeyMatch",
    "Pattern",
    "Template",
    "drop_options",
    "literal",
    "matches_any",
    "parse_pattern",
    "parse_rename",
    "parse_template",
    "pattern_for",
    "suggest_pattern",
]


_NAME = r"[A-Za-z][A-Za-z0-9_]*"  # names with a leading underscore are for the groups of stars
_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_RANGE = rf"{_NUMBER}(?:\.\.{_NUMBER})?"
_PATTERN_TOKEN = re.compile(
    rf"(?P<star>\*)|\{{(?P<name>{_NAME})(?P<int>:int)?\}}|\{{(?P<numbers>{_RANGE}(?:,{_RANGE})*)\}}"
    r"|(?P<literal>[^*{}]+)|(?P<bad>[{}])"
)
_TEMPLATE_TOKEN = re.compile(
    rf"(?P<star>\*)|\{{(?P<name>{_NAME})(?P<shift>[+-][0-9]{{1,18}})?\}}|(?P<literal>[^*{{}}]+)|(?P<bad>[{{}}])"
)
_SPECIAL = re.compile(r"[*{}]|^re:")  # not literal in a pattern
_DIGIT_SET = re.compile(r"\[((?:[0-9](?:-[0-9])?)+)\]")
_OUTSIDE_BRACES = re.compile(r",\s*(?![^{]*\})")
_ARROW = re.compile(r"\s*(?:[-=]?>|[:,])\s*|\s+")  # what people write between an old and a new name
_REGEX_SIGNS = frozenset("\\()[]|+?^$")
_GROUP_IN_NAME = re.compile(r"\\[1-9g]")
_REST = r"(\..*)"  # what follows a name that a rename keeps
_MOST_COMPARED = 10_000  # names that are compared with a pattern that matches none
_SHORTEST_INSIDE = 3  # characters that are searched inside of names
_MOST_NUMBERS = 1000  # of a range that the regex of a pattern spells
_NAMED_NUMBER = "to keep a number, name it on both sides, as in 'h.{i:int}.*=layers.{i}.*'"
_RANGES = "several numbers are written {0..5} or {2,3}; "
_AS_REGEX = "to match a brace itself, write the pattern as a regex: re:..."


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern, which matches whole keys only.

    ``stars`` is the number of stars. ``captures`` maps the name of each capture to whether it is an int. ``literals``
    are the texts between stars, captures and numbers. ``repetitions`` is the number of parts that can match several
    lengths at one place. The regex is fast for keys of at most ``longest`` characters.
    """

    text: str
    stars: int = 0
    captures: Mapping[str, bool] = field(default_factory=dict)
    regex: re.Pattern[str] = field(default=re.compile(""), repr=False)
    literals: tuple[str, ...] = field(default=(), repr=False)
    tokens: tuple[Token, ...] = field(default=(), repr=False)
    repetitions: int = field(default=0, repr=False)
    longest: int = field(default=0, repr=False)

    def match(self, key: str) -> re.Match[str] | KeyMatch | None:
        """Return the match of the whole ``key``, or None.

        Raises ``RuleError`` for a ``re:`` pattern that takes too long.
        """
        if len(self.literals) > 2:
            stars = match_stars(self.literals, key)
            if stars is None or self.stars == len(self.literals) - 1:
                return None if stars is None else KeyMatch(key, stars)
        if len(key) <= self.longest:
            return self.regex.fullmatch(key)
        if self.is_regex:
            return match_regex(self.regex, self.repetitions, key, self.text)
        return match_tokens(self.tokens, key, self.text)

    @property
    def is_regex(self) -> bool:
        """Whether the pattern was written as ``re:...``."""
        return self.text.startswith("re:")

    @property
    def is_literal(self) -> bool:
        """Whether the pattern is the only key that it matches."""
        return not (self.is_regex or len(self.literals) > 1)


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Pattern:
    """Return the pattern that ``text`` describes.

    ``*`` matches any characters, dots included. ``{name}`` matches one dot-separated segment, ``{name:int}`` a segment
    of digits. ``{0..5}``, ``{2,3}`` and ``{0..5,7}`` match one of these numbers, with all its digits. After ``re:`` the
    rest is a Python regex. Any other text is literal. Raises ``RuleError`` for an empty pattern, for any other brace,
    for a range that ends before it begins, and for a regex that does not compile.
    """
    if text.startswith("re:"):
        try:
            regex, count = compile_regex(text[3:]), repetitions(text[3:])
        except (re.error, RecursionError, OverflowError, ValueError) as error:
            raise RuleError(f"{quoted(text)} is not a valid regular expression: {error}") from None
        return Pattern(text, regex=regex, repetitions=count, longest=longest_fast_key(count))
    if not text:
        raise RuleError("a pattern is empty", hint="'*' matches every key")
    parts: list[str] = []
    captures: dict[str, bool] = {}
    literals = [""]
    tokens: list[Token] = []
    stars = 0
    is_long = False
    for token in _PATTERN_TOKEN.finditer(text):
        if token["bad"]:
            raise RuleError(f"{quoted(text)} has a brace that is not part of a capture", hint=_RANGES + _AS_REGEX)
        if token["literal"]:
            parts.append(re.escape(token["literal"]))
            literals[-1] = token["literal"]
            tokens.append(Token("literal", token["literal"]))
            continue
        literals.append("")
        if token["star"]:
            parts.append(f"(?P<_{stars}>.*)")
            tokens.append(Token("star"))
            stars += 1
        elif token["numbers"]:
            numbers = _spelled(token["numbers"], text)
            is_long = is_long or not numbers
            parts.append(f"(?<![0-9])(?:{numbers})(?![0-9])")
            tokens.append(Token("numbers", token["numbers"]))
        elif (name := token["name"]) in captures:
            parts.append(f"(?P={name})")
            tokens.append(Token("repeat", name))
        else:
            captures[name] = token["int"] is not None
            parts.append(f"(?P<{name}>{'[0-9]+' if captures[name] else '[^.]+'})")
            tokens.append(Token("digits" if captures[name] else "segment", name))
    count = 1 + sum(map(_has_several_lengths, tokens, (*tokens[1:], None)))  # the last part can have any length too
    regex = re.compile("".join(parts), re.DOTALL)
    longest = -1 if is_long else longest_fast_key(count)
    return Pattern(text, stars, captures, regex, tuple(literals), tuple(tokens), count, longest)


def _spelled(numbers: str, text: str) -> str:
    """Return a regex of all numbers, such as ``0|1|2``, or an empty string where they are too many for a regex."""
    ranges = ranges_of(numbers)
    if wrong := next((pair for pair in ranges if pair[0] > pair[1]), None):
        raise RuleError(f"{quoted(text)} has the range {wrong[0]}..{wrong[1]}, which ends before it begins")
    if sum(last - first + 1 for first, last in ranges) > _MOST_NUMBERS:
        return ""
    return "|".join(str(number) for first, last in ranges for number in range(first, last + 1))


def _has_several_lengths(token: Token, following: Token | None) -> bool:
    """Return whether a part of a pattern can end at several positions of a key, and the next part allows this."""
    if token.kind in ("literal", "repeat", "numbers") or following is None:
        return False
    if token.kind == "star" or following.kind != "literal":
        return True
    return following.text[0] != "." if token.kind == "segment" else following.text[0] in string.digits


def literal(key: str) -> str:
    """Return a pattern that matches ``key`` and no other key."""
    return f"re:{re.escape(key)}" if not key or _SPECIAL.search(key) else key


def drop_options(keys: Iterable[str]) -> str:
    """Return the options of a command that leave out exactly these keys."""
    return " ".join(f"--drop {shell_word(literal(key))}" for key in keys)


def pattern_for(key: str, others: Iterable[str], fits: Callable[[str], bool] = lambda _key: True) -> str:
    """Return the pattern that a hint about ``key`` shows: all of its module, or the key alone.

    It is the module where ``others`` has further keys of the module, and all of them pass ``fits``.
    """
    module = key.rpartition(".")[0]
    siblings = [other for other in others if other != key and other.startswith(f"{module}.")]
    whole = module and siblings and literal(module) == module and all(map(fits, siblings))
    return f"{module}.*" if whole else literal(key)


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
            hint = _NAMED_NUMBER if _PATTERN_TOKEN.match(text, token.start())["numbers"] else _AS_REGEX  # type: ignore[index]
            raise RuleError(f"{quoted(text)} has a brace that is not part of a capture", hint=hint)
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
            hint=_hint_of_stars(text, pattern),
        )
    return Template(text, pattern, tuple(parts))


def _hint_of_stars(text: str, pattern: Pattern) -> str:
    """Return the way out for a template that has other stars than its pattern: a regex, or what was meant."""
    if _GROUP_IN_NAME.search(text):
        return f"a regex begins with re: {shell_word(f're:{pattern.text}={text}')}"
    is_short = pattern.stars == 1 and pattern.text.endswith(".*") and text and "*" not in text
    start = f"did you mean {shell_word(f'{pattern.text}={text}.*')}? " if is_short else ""
    return f"{start}each '*' is copied in order; to move or leave out a segment, name it {{like_this}}"


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
        compile_regex(pattern.regex.pattern + "|(?:)").sub(text, "")
    except (re.error, IndexError) as error:
        raise RuleError(f"{quoted(text)} is not a valid template for {quoted(pattern.text)}: {error}") from None
    return Template(text, pattern)


def parse_rename(text: str) -> Template:
    """Return the rename that ``OLD=NEW`` describes.

    ``re:OLD=NEW`` is divided at its last ``=``; any other text must have exactly one. Raises ``RuleError`` for a text
    of another form, and as ``parse_pattern`` and ``parse_template`` do.
    """
    regex = text.startswith("re:")
    if "=" not in text or (not regex and text.count("=") > 1) or text.rpartition("=")[2].startswith(">"):
        parts = [part.strip() for part in _ARROW.split(text)]
        is_pair = len(parts) == 2 and all(parts) and "=" not in "".join(parts) and not regex
        right = shell_word("=".join(parts)) if is_pair else ""
        hint = f"write {right}" if right else "for example 'module.*=*'"
        raise RuleError(f"{quoted(text)} is not of the form OLD=NEW", hint=hint)
    old, _, new = text.rpartition("=")
    return parse_template(new, parse_pattern(old))


def suggest_pattern(
    pattern: Pattern,
    names: Collection[str],
    owner: str = "the model",
    accepts: Callable[[Collection[str]], bool] = lambda _matched: True,
    new: str | None = None,
) -> str:
    """Return a hint for a pattern that matches none of ``names``: a similar pattern that does, or some of the names.

    ``owner`` is what has the names. It must be such that the request ``accepts`` all
    names that it matches. For a rename, ``new`` is its right side, and the hint is a whole rename.
    """
    parts = [] if pattern.is_regex else _OUTSIDE_BRACES.split(pattern.text)
    if len(parts) > 1 and all(parts):
        with contextlib.suppress(RuleError):
            patterns = [parse_pattern(part) for part in parts]
            found = [[name for name in names if one.match(name)] for one in patterns]
            if all(found) and accepts([name for matched in found for name in matched]):
                return f"these are {len(parts)} patterns, and each needs its own option: {listed(parts, 3)}"
    for text in _variants(pattern, names, _REST if new else r"\..*"):
        try:
            variant = parse_pattern(text)
            shown = text if new is None else _as_rename(variant, pattern, new)
        except RuleError:
            continue
        with contextlib.suppress(RuleError):  # a regex that takes too long
            matched = [name for name in names if variant.match(name)]
            if matched and accepts(matched):
                return f"did you mean {shell_word(shown)}?"
    if close := nearest(pattern.text, islice(names, _MOST_COMPARED), cutoff=0.5):
        return f"the nearest name is {quoted(close)}"
    return f"{owner} has {listed(names, 3)}"


def _as_rename(variant: Pattern, pattern: Pattern, new: str) -> str:
    """Return the rename to ``new`` for a variant of its pattern; what the variant adds, the new name gets, too.

    Raises ``RuleError`` where the new name does not fit the variant.
    """
    before, found, after = variant.text.partition(pattern.text)
    if variant.is_regex:
        has_rest = variant.text.endswith(_REST)
        if pattern.is_regex and not has_rest:
            return variant.text  # only the user knows what of the key the new name needs
        before, after = "", f"\\{variant.regex.groups}" if has_rest else ""
    text = f"{variant.text}={before}{new}{after}" if found else f"{variant.text}={new}"
    parse_rename(text)
    return text


def _variants(pattern: Pattern, names: Collection[str], rest: str) -> Iterator[str]:
    """Yield similar patterns: for the children of a module, for a part of a name, with typos corrected, as a regex.

    ``rest`` is the regex of what follows the name of a module.
    """
    text = pattern.text
    if pattern.is_regex:
        body = f"(?:{text[3:]})"
        if rest == _REST and "|" not in text:
            yield f"{text}{rest}"
        yield from (f"re:{body}.*", f"re:.*{body}", f"re:.*{body}.*")
        return
    ranges = _DIGIT_SET.sub(_as_numbers, text)
    if ranges != text:
        yield ranges
    if _REGEX_SIGNS & set(text) and "|" not in text:
        yield from (f"re:{text}", f"re:{text}{rest}")
    yield from (f"{text.rstrip('.')}.*", f"{text}*", f"*.{text}", f"*.{text}.*")
    prefix, _, inner = text.partition(".")
    if inner[:1] not in ("", "*", "{") and not {"*", "{"} & set(prefix):
        yield inner
    if len(text) >= _SHORTEST_INSIDE and text == text.strip("*"):
        yield f"*{text}*"
    known = {segment for name in islice(names, _MOST_COMPARED) for segment in name.split(".")}
    segments = text.split(".")
    for at, segment in enumerate(segments):
        if segment not in known and not {"*", "{"} & set(segment):
            for close in difflib.get_close_matches(segment, known, n=3):
                yield ".".join([*segments[:at], close, *segments[at + 1 :]])
    stem = text[: min((text.find(mark) for mark in "*{" if mark in text), default=len(text))].rstrip(".")
    prefixes = {name[:end] for name in islice(names, _MOST_COMPARED) for end in _ends(name)}
    for close in difflib.get_close_matches(stem, prefixes, n=3):
        yield close + text[len(stem) :]
        if stem == text:  # else the pattern would match far more than what was meant
            yield f"{close}.*"


def _as_numbers(found: re.Match[str]) -> str:
    """Return the digits of a set of characters, such as ``[0-5]`` or ``[23]``, as numbers of a pattern."""
    return "{" + ",".join(re.findall("[0-9]-[0-9]|[0-9]", found[1])).replace("-", "..") + "}"


def _ends(name: str) -> Iterator[int]:
    """Yield the end of each prefix of a name: at every dot, and at its end."""
    end = name.find(".")
    while end != -1:
        yield end
        end = name.find(".", end + 1)
    yield len(name)
