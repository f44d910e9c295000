"""From paired modules to rules: as few as say it, and none that says more."""

from __future__ import annotations

import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from ckptkit.align.evidence import Link
from ckptkit.align.modules import Index, Module, Name
from ckptkit.align.pairing import Pair
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.config_files import toml_value
from ckptkit.core.text import plural, printable
from ckptkit.errors import RuleError
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules
from ckptkit.rules.presets import preset_names, preset_rules, preset_text
from ckptkit.tensor_ops.operation import Operation

__all__ = ["Prefix", "Suggestion", "fitting_presets", "rule_table", "rule_text", "suggestions_of"]


_SPECIAL = re.compile(r"[*{}=]|^re:")
_VARIABLES = "ijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One rule of a rule file, with what speaks for it.

    ``keys`` maps each key expected that it fills to the keys of found that it takes; ``elements`` are those of the
    keys expected. ``confidence`` lies between 0 and 1, where 1 is certain by names alone or by equal bytes.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...]
    why: str
    confidence: float
    keys: dict[str, tuple[str, ...]]
    elements: int

    @property
    def names(self) -> str:
        """The rule in one line: ``old, old = new``."""
        return f"{', '.join(self.sources)} = {', '.join(self.targets)}"


@dataclass(frozen=True, slots=True)
class Prefix:
    """A text that all keys of found have in front and those expected do not, or the other way about."""

    text: str = ""
    added: bool = False

    @property
    def rule(self) -> tuple[str, str]:
        """Both sides of the rename."""
        return ("*", f"{self.text}*") if self.added else (f"{self.text}*", "*")


@dataclass(frozen=True, slots=True)
class _Line:
    """A pair's rule before patterns are written: the names of both sides, and what they fill."""

    pair: Pair
    sources: tuple[Name, ...]
    targets: tuple[Name, ...]
    operations: tuple[Operation, ...]
    links: tuple[Link, ...]
    tail: str = ""  # what stands behind each name on both sides

    @property
    def shift(self) -> Index:
        return self.pair.fit.shift


def suggestions_of(pairs: Iterable[Pair], found: Iterable[Module], *, plainly: bool = False) -> list[Suggestion]:
    """Return the rules for these pairs; pairs that keep their name need none.

    ``plainly`` writes one rule for each kind of tensor, where the shorter ones would take what is none of theirs.
    """
    below: Counter[tuple[str, ...]] = Counter()
    for module in found:
        for member in module.members.values():
            below.update(_beginnings(member.name))
    lines = [line for pair in pairs for line in _lines(pair, below, plainly=plainly)]
    lines = lines if plainly else _whole_layers(lines, below)
    return [made for made in map(_suggestion, lines) if made is not None]


def _beginnings(name: Name) -> Iterable[tuple[str, ...]]:
    for at, text in enumerate(name.texts):
        for found in re.finditer(r"[./]", text):
            yield (*name.texts[:at], text[: found.end()])


def _lines(pair: Pair, below: Counter[tuple[str, ...]], *, plainly: bool) -> list[_Line]:
    groups: dict[tuple[Operation, ...], list[Link]] = defaultdict(list)
    for link in pair.fit.links:
        groups[link.operations].append(link)
    lines = []
    for operations, links in groups.items():
        tails = {member.leaf for link in links for member in (*link.expected, *link.found)}
        modules = (*pair.expected, *pair.found)
        covered = all(
            below[*module.path.texts[:-1], module.path.texts[-1] + next(iter(tails))[:1]] == len(links)
            for module in pair.found
        )
        same = all({member.leaf for member in (*link.expected, *link.found)} == {link.found[0].leaf} for link in links)
        separators = {tail[:1] for tail in tails}
        joins = len(links) > 1 and len(separators) == 1 and separators <= {".", "/"} and min(map(len, tails)) > 1
        if joins and same and covered and not plainly:
            names = [_real(module.path, module) for module in modules]
            count = len(pair.expected)
            tail = f"{min(separators)}*"
            lines.append(_Line(pair, tuple(names[count:]), tuple(names[:count]), operations, tuple(links), tail))
            continue
        for link in links:
            sources, targets = (
                tuple(_real(member.name, module) for member, module in zip(members, side, strict=True))
                for members, side in ((link.found, pair.found), (link.expected, pair.expected))
            )
            lines.append(_Line(pair, sources, targets, operations, (link,)))
    return [line for line in lines if line.operations or line.sources != line.targets or any(line.shift)]


def _real(name: Name, module: Module) -> Name:
    """Return a name as the checkpoint has it: keys were compared without a prefix that all have."""
    member = module.main
    index, info = next(iter(member.tensors.items()))
    seen = member.name.at(index)
    if seen.endswith(info.key):
        return Name((name.texts[0][len(seen) - len(info.key) :], *name.texts[1:]))
    return Name((info.key[: len(info.key) - len(seen)] + name.texts[0], *name.texts[1:]))


def _whole_layers(lines: Sequence[_Line], below: Counter[tuple[str, ...]]) -> list[_Line]:
    """Join the rules of a layer that all of it follows: its parts keep their names, and only where it is changes."""
    groups: dict[tuple[object, ...], list[_Line]] = defaultdict(list)
    for line in lines:
        groups[_layer_rule(line)].append(line)
    joined: list[_Line] = []
    for rule, members in groups.items():
        module = members[0].pair.found[0]
        texts = module.path.texts
        count = sum(len(line.links) for line in members)
        if rule and below[texts[0], texts[1][:1]] == count and len(members) > 1:
            first = members[0]
            source, target = (Name((names[0].texts[0], "")) for names in (first.sources, first.targets))
            links = tuple(link for line in members for link in line.links)
            weakest = min(members, key=lambda line: line.pair.confidence).pair
            fit = type(weakest.fit)(first.shift[:1], links)
            pair = Pair(weakest.expected, weakest.found, fit, weakest.why, weakest.confidence)
            joined.append(_Line(pair, (source,), (target,), (), links, f"{texts[1][:1]}*"))
        else:
            joined += members
    return joined


def _layer_rule(line: _Line) -> tuple[object, ...]:
    source, target = line.sources[0].texts, line.targets[0].texts
    plain = len(line.sources) == len(line.targets) == 1 and not line.operations and not any(line.shift[1:])
    if not plain or len(source) < 2 or source[1:] != target[1:] or source[1][:1] not in (".", "/"):
        return ()
    return source[0], target[0], line.shift[:1], source[1][:1]


def _suggestion(line: _Line) -> Suggestion | None:
    keys: dict[str, tuple[str, ...]] = {}
    elements = 0
    for link in line.links:
        shift = line.shift + (0,) * (len(link.found[0].name.texts) - 1 - len(line.shift))
        for index in link.found[0].tensors:
            moved = tuple(one + by for one, by in zip(index, shift, strict=True))
            if all(moved in member.tensors for member in link.expected) and all(
                index in member.tensors for member in link.found
            ):
                taken = tuple(member.tensors[index].key for member in link.found)
                for member in link.expected:
                    keys[member.tensors[moved].key] = taken
                    elements += member.tensors[moved].elements
    patterns = _patterns(line)
    if patterns is None:
        return None
    why = "; ".join(dict.fromkeys([line.pair.why, *(link.note for link in line.links if link.note)]))
    return Suggestion(*patterns, line.operations, why, line.pair.confidence, keys, elements)


def _patterns(line: _Line) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return both sides as patterns; None where the language has no words for them."""
    texts = [text for name in (*line.sources, *line.targets) for text in name.texts]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # a lone surrogate, which no file of rules can hold
        return None
    if not any(_SPECIAL.search(text) for text in texts):
        sources = tuple(_pattern(name, [f"{{{one}:int}}" for one in _VARIABLES]) for name in line.sources)
        shown = [f"{{{one}{by:+d}}}" if by else f"{{{one}}}" for one, by in zip(_VARIABLES, line.shift, strict=False)]
        targets = tuple(_pattern(name, shown) for name in line.targets)
        return tuple(f"{one}{line.tail}" for one in sources), tuple(f"{one}{line.tail}" for one in targets)
    if line.operations or any(line.shift) or line.tail or len(line.sources) + len(line.targets) > 2:
        return None
    (source,), (target,) = line.sources, line.targets
    old = "([0-9]+)".join(map(re.escape, source.texts))
    new = "".join(
        text.replace("\\", "\\\\") + (f"\\g<{at}>" if at < len(target.texts) else "")
        for at, text in enumerate(target.texts, start=1)
    )
    return (f"re:{old}",), (new,)


def _pattern(name: Name, shown: Sequence[str]) -> str:
    pieces = [name.texts[0]]
    for text, variable in zip(name.texts[1:], shown, strict=False):
        pieces += [variable, text]
    return "".join(pieces)


_Item = TypeVar("_Item")


def rule_table(suggestions: Iterable[Suggestion]) -> dict[str, Any]:
    """Return the rules in the form of a parsed rule file."""
    return {"rule": [_table(one) for one in suggestions]}


def _table(one: Suggestion) -> dict[str, Any]:
    made: dict[str, Any] = {"from": _one_or_all(one.sources), "to": _one_or_all(one.targets)}
    if one.operations:
        made["op"] = _one_or_all(tuple(map(_operation, one.operations)))
    return made


def _operation(operation: Operation) -> str | dict[str, Any]:
    return {operation.name: operation.params()} if operation.params() else operation.name


def _one_or_all(items: tuple[_Item, ...]) -> _Item | list[_Item]:
    return items[0] if len(items) == 1 else list(items)


def rule_text(
    title: Iterable[str], suggestions: Iterable[Suggestion], doubts: Iterable[tuple[str, list[Suggestion]]]
) -> str:
    """Return a TOML file with a title, the rules, and those that could be, as comments."""
    lines = [f"# {printable(line)}" for line in title]
    for one in suggestions:
        lines += ["", *_comment(one), *_lines_rule_file(one)]
    for why, candidates in doubts:
        lines += ["", f"# ambiguous: {printable(why)}"]
        for one in candidates:
            lines += [f"# {line}" for line in _lines_rule_file(one)]
    return "\n".join(lines) + "\n"


def _comment(one: Suggestion) -> list[str]:
    return [f"# {plural(len(one.keys), 'tensor')}, confidence {one.confidence:.2f}: {printable(one.why)}"]


def _lines_rule_file(one: Suggestion) -> list[str]:
    table = _table(one)
    lines = ["[[rule]]", f"from = {toml_value(table['from'])}", f"to = {toml_value(table['to'])}"]
    if "op" in table:
        lines.append(f"op = {toml_value(table['op'])}")
    return lines


_SAMPLE = 64


def fitting_presets(expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the names of the presets that make every key expected, in its shape, of what was found."""
    return tuple(name for name in preset_names() if _fits(name, expected, found))


def _fits(name: str, expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> bool:
    variables = tomllib.loads(preset_text(name)).get("vars", {})
    rules = preset_rules(name, dict.fromkeys(variables, 1))  # one head: how many there are changes no shape
    if not _speaks_of(rules, found):
        return False
    try:
        made = apply_rules(rules, found).describe(found)
    except RuleError:
        return False
    return all(key in made and made[key].shape == info.shape for key, info in expected.items())


def _speaks_of(rules: Rules, found: Mapping[str, TensorInfo]) -> bool:
    patterns = [pattern for stage in rules.stages for rule in stage.rules for pattern in rule.sources]
    step = max(len(found) // _SAMPLE, 1)
    sample = list(islice(found, 0, None, step))
    return sum(any(pattern.match(key) for pattern in patterns) for key in sample) > len(sample) / 4
