"""Write paired modules as rules: as few rules as possible, and no rule that also matches other keys."""

from __future__ import annotations

import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import add

from ckptkit.align.evidence import ModuleMatch, TensorLink
from ckptkit.align.modules import Index, KeyTemplate, LayeredModule
from ckptkit.align.pairing import ModulePair
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.patterns import matches_any, parse_pattern
from ckptkit.errors import RuleError
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.load import preset_rules
from ckptkit.rules.model import Rules
from ckptkit.rules.presets import preset_names, preset_text
from ckptkit.tensor_ops.operation import Operation

__all__ = ["Suggestion", "fitting_presets", "suggestions_for"]

_PATTERN_CHARACTERS = re.compile(r"[*{}=]|^re:")
_VARIABLES = "ijklmnopqrstuvwxyz"
_PRESET_SAMPLE = 64  # keys
_CAPTURE, _BACK_REFERENCE = re.compile(r"\{[^}]*\}"), re.compile(r"\\(?:g<[^>]*>|.)")


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One suggested rule, with its evidence.

    Attributes:
        sources: The patterns of the found keys.
        targets: The new names of the keys; empty for a rule that drops keys whose names other tensors get.
        operations: Tensor operations, in order.
        why: The evidence, in words.
        confidence: Between 0 and 1; 1 if the names alone or equal bytes prove the rule.
        keys: Each expected key that the rule fills, with the found keys that it is made from.
        elements: The number of elements of the filled keys.
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
        """The rule in one line: ``old, old = new``, or ``drop old``."""
        if not self.targets:
            return f"drop {', '.join(self.sources)}"
        return f"{', '.join(self.sources)} = {', '.join(self.targets)}"


@dataclass(frozen=True, slots=True)
class _RuleDraft:
    """A rule of a pair, before its names become patterns."""

    pair: ModulePair
    sources: tuple[KeyTemplate, ...]
    targets: tuple[KeyTemplate, ...]
    operations: tuple[Operation, ...]
    links: tuple[TensorLink, ...]
    ending: str = ""  # follows each name on both sides, such as ".*"

    @property
    def shift(self) -> Index:
        return self.pair.match.shift


def suggestions_for(
    pairs: Iterable[ModulePair], found: Iterable[LayeredModule], *, is_plain: bool = False
) -> list[Suggestion]:
    """Return the rules for these pairs; a pair with equal names needs no rule.

    ``found`` are all found modules: a short rule such as ``layers.{i:int}.*`` is written only if it matches no key of
    another pair. With ``is_plain``, each tensor of a module gets its own rule.
    """
    keys_below: Counter[tuple[str, ...]] = Counter()
    for module in found:
        for member in module.members.values():
            keys_below.update(_beginnings(member.name))
    drafts = [draft for pair in pairs for draft in _drafts(pair, keys_below, is_plain=is_plain)]
    drafts = drafts if is_plain else _join_layers(drafts, keys_below)
    return [suggestion for suggestion in map(_suggestion, drafts) if suggestion is not None]


def _beginnings(name: KeyTemplate) -> Iterator[tuple[str, ...]]:
    """Yield the beginnings of a name that end with a separator."""
    for at, text in enumerate(name.texts):
        for found in re.finditer(r"[./]", text):
            yield (*name.texts[:at], text[: found.end()])


def _drafts(pair: ModulePair, keys_below: Counter[tuple[str, ...]], *, is_plain: bool) -> list[_RuleDraft]:
    """Return one rule for all tensors of a module with the same operations if possible, else one for each tensor."""
    links_by_operations: dict[tuple[Operation, ...], list[TensorLink]] = defaultdict(list)
    for link in pair.match.links:
        links_by_operations[link.operations].append(link)
    drafts = []
    for operations, links in links_by_operations.items():
        if not is_plain and _is_whole_module(pair, links, keys_below):
            targets, sources = (
                tuple(_with_full_prefix(module.path, module) for module in modules)
                for modules in (pair.expected, pair.found)
            )
            ending = f"{links[0].found[0].leaf[:1]}*"
            drafts.append(_RuleDraft(pair, sources, targets, operations, tuple(links), ending))
            continue
        for link in links:
            targets, sources = (
                tuple(_with_full_prefix(member.name, module) for member, module in zip(members, modules, strict=True))
                for members, modules in ((link.expected, pair.expected), (link.found, pair.found))
            )
            drafts.append(_RuleDraft(pair, sources, targets, operations, (link,)))
    return [draft for draft in drafts if draft.operations or draft.sources != draft.targets or any(draft.shift)]


def _is_whole_module(pair: ModulePair, links: Sequence[TensorLink], keys_below: Counter[tuple[str, ...]]) -> bool:
    """Return whether one rule that ends in ``.*`` renames all these tensors and matches no other found key."""
    leaves = {member.leaf for link in links for member in (*link.expected, *link.found)}
    separators = {leaf[:1] for leaf in leaves}
    if len(links) < 2 or len(separators) != 1 or not separators <= {".", "/"} or min(map(len, leaves)) < 2:
        return False
    if any({member.leaf for member in (*link.expected, *link.found)} != {link.found[0].leaf} for link in links):
        return False
    (separator,) = separators
    return all(
        keys_below[*module.path.texts[:-1], module.path.texts[-1] + separator] == len(links) for module in pair.found
    )


def _with_full_prefix(name: KeyTemplate, module: LayeredModule) -> KeyTemplate:
    """Return a name as the file has it: the keys of the modules may have a prefix added or removed."""
    member = module.main
    index, info = next(iter(member.tensors.items()))
    compared = member.name.key_at(index)
    if compared.endswith(info.key):
        return KeyTemplate((name.texts[0][len(compared) - len(info.key) :], *name.texts[1:]))
    return KeyTemplate((info.key[: len(info.key) - len(compared)] + name.texts[0], *name.texts[1:]))


def _join_layers(drafts: Sequence[_RuleDraft], keys_below: Counter[tuple[str, ...]]) -> list[_RuleDraft]:
    """Join the rules of all modules of a layer if they change only the layer's index and the text before the index."""
    groups: dict[tuple[object, ...], list[_RuleDraft]] = defaultdict(list)
    for draft in drafts:
        groups[_layer_rename(draft)].append(draft)
    joined: list[_RuleDraft] = []
    for rename, members in groups.items():
        first = members[0]
        texts = first.pair.found[0].path.texts
        count = sum(len(draft.links) for draft in members)
        if rename and keys_below[texts[0], texts[1][:1]] == count and len(members) > 1:
            source, target = (KeyTemplate((names[0].texts[0], "")) for names in (first.sources, first.targets))
            links = tuple(link for draft in members for link in draft.links)
            weakest = min(members, key=lambda draft: draft.pair.confidence).pair
            pair = replace(weakest, match=ModuleMatch(first.shift[:1], links))
            joined.append(_RuleDraft(pair, (source,), (target,), (), links, f"{texts[1][:1]}*"))
        else:
            joined += members
    return joined


def _layer_rename(draft: _RuleDraft) -> tuple[object, ...]:
    """Return the rename of a layer that has the same effect as the rule; empty if the rule changes more."""
    source, target = draft.sources[0].texts, draft.targets[0].texts
    is_rename = len(draft.sources) == len(draft.targets) == 1 and not draft.operations and not any(draft.shift[1:])
    if not is_rename or len(source) < 2 or source[1:] != target[1:] or source[1][:1] not in (".", "/"):
        return ()
    return source[0], target[0], draft.shift[:1], source[1][:1]


def _suggestion(draft: _RuleDraft) -> Suggestion | None:
    """Return the finished rule; None if the pattern language cannot express the names."""
    keys: dict[str, tuple[str, ...]] = {}
    elements = 0
    for link in draft.links:
        # A joined rule has the shift of the layer only; further indices do not change.
        shift = draft.shift + (0,) * (len(link.found[0].name.texts) - 1 - len(draft.shift))
        is_shifted = any(shift)
        for index in link.found[0].tensors:
            shifted = tuple(map(add, index, shift)) if is_shifted else index
            are_expected = all(shifted in member.tensors for member in link.expected)
            if are_expected and all(index in member.tensors for member in link.found):
                sources = tuple(member.tensors[index].key for member in link.found)
                for member in link.expected:
                    keys[member.tensors[shifted].key] = sources
                    elements += member.tensors[shifted].elements
    patterns = _patterns(draft)
    if patterns is None:
        return None
    why = "; ".join(dict.fromkeys([draft.pair.why, *(link.note for link in draft.links if link.note)]))
    pair = draft.pair
    return Suggestion(*patterns, draft.operations, why, pair.confidence, keys, elements)


def _patterns(draft: _RuleDraft) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return both sides as patterns; None if the pattern language cannot express them."""
    texts = [text for name in (*draft.sources, *draft.targets) for text in name.texts]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # a lone surrogate, which a rule file cannot hold
        return None
    if not any(_PATTERN_CHARACTERS.search(text) for text in texts):
        captures = [f"{{{variable}:int}}" for variable in _VARIABLES]
        shifted = [
            f"{{{variable}{by:+d}}}" if by else f"{{{variable}}}"
            for variable, by in zip(_VARIABLES, draft.shift, strict=False)
        ]
        return (
            tuple(f"{_fill_in(name, captures)}{draft.ending}" for name in draft.sources),
            tuple(f"{_fill_in(name, shifted)}{draft.ending}" for name in draft.targets),
        )
    if draft.operations or any(draft.shift) or draft.ending or len(draft.sources) + len(draft.targets) > 2:
        return None
    (source,), (target,) = draft.sources, draft.targets
    old = "([0-9]+)".join(map(re.escape, source.texts))
    new = "".join(
        text.replace("\\", "\\\\") + (f"\\g<{at}>" if at < len(target.texts) else "")
        for at, text in enumerate(target.texts, start=1)
    )
    return (f"re:{old}",), (new,)


def _fill_in(name: KeyTemplate, variables: Sequence[str]) -> str:
    pieces = [name.texts[0]]
    for text, variable in zip(name.texts[1:], variables, strict=False):
        pieces += [variable, text]
    return "".join(pieces)


def fitting_presets(expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the names of the presets that make every expected key, in its shape, from the found keys."""
    return tuple(name for name in preset_names() if _is_fitting(name, expected, found))


def _is_fitting(name: str, expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> bool:
    variables = tomllib.loads(preset_text(name)).get("vars", {})
    rules = preset_rules(name, dict.fromkeys(variables, 1))  # the number of heads changes no shape
    if not _matches_many(rules, found) or not _may_name(rules, expected, found) or _is_unused_in_part(rules, found):
        return False
    try:
        infos = apply_rules(rules, found).describe(found)
    except RuleError:
        return False
    return all(key in infos and infos[key].shape == info.shape for key, info in expected.items())


def _may_name(rules: Rules, expected: Iterable[str], found: Container[str]) -> bool:
    """Return whether each expected key is a found key, or has a form that the rules give to new names.

    Most presets fail at the first key, which is much faster than to apply them to all keys.
    """
    if any(stage.strip for stage in rules.stages):
        return True
    texts = {
        (_BACK_REFERENCE if template.pattern.is_regex else _CAPTURE).sub("*", template.text)
        for stage in rules.stages
        for rule in stage.rules
        for templates in rule.templates
        for template in templates
    }
    forms = [parse_pattern(text) for text in texts]
    return all(key in found or matches_any(forms, key) for key in expected)


def _is_unused_in_part(rules: Rules, found: Mapping[str, TensorInfo]) -> bool:
    """Return whether a rule of the first stage, which must match, matches no key: then the rules are refused.

    To apply them would also look for the name that was meant, which takes longer than the rest of the search.
    """
    first = rules.stages[0]
    if first.strip or first.made or rules.allow_unused:
        return False
    return any(
        not rule.optional and not any(pattern.match(key) for pattern in rule.sources for key in found)
        for rule in first.rules
    )


def _matches_many(rules: Rules, found: Mapping[str, TensorInfo]) -> bool:
    """Return whether the rules match more than a quarter of a sample of keys."""
    patterns = [pattern for stage in rules.stages for rule in stage.rules for pattern in rule.sources]
    step = max(len(found) // _PRESET_SAMPLE, 1)
    sample = list(islice(found, 0, None, step))
    return sum(any(pattern.match(key) for pattern in patterns) for key in sample) > len(sample) / 4
