"""Write steps as rules: as few rules as possible, and no rule that also matches another key."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise

from ckptkit.core.patterns import literal, parse_pattern, parse_template
from ckptkit.rules.model import OnCollision, Rule, Stage
from ckptkit.rules.transformers.steps import Step
from ckptkit.tensor_ops.operation import Operation

__all__ = ["stage_of"]

_LETTERS = "ijklmnopqrstuvwxyzabcdefgh"
_SPECIAL = re.compile(r"[*{}=\\]|^re:")
Numbers = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """A name, divided into its numbers, which are the parts between dots that have only digits, and the text around."""

    texts: tuple[str, ...]
    numbers: Numbers

    @classmethod
    def of(cls, name: str) -> _Name:
        texts: list[str] = []
        numbers: list[str] = []
        last: list[str] = []
        for part in name.split("."):
            if part.isascii() and part.isdigit():
                texts.append(".".join(last))
                numbers.append(part)
                last = []
            else:
                last.append(part)
        return cls((*texts, ".".join(last)), tuple(numbers))


def _fill(texts: Sequence[str], numbers: Sequence[str]) -> str:
    """Return a name from the texts around its numbers, and what stands for each number."""
    parts: list[str] = []
    for at, text in enumerate(texts):
        parts += [text] if text else []
        parts += [numbers[at]] if at < len(numbers) else []
    return ".".join(parts)


@dataclass(frozen=True, slots=True)
class _Run:
    """Inputs of a step that follow each other and differ only in numbers."""

    texts: tuple[str, ...]
    numbers: tuple[Numbers, ...]


@dataclass(frozen=True, slots=True)
class _Parsed:
    """A step whose names are divided."""

    step: Step
    runs: tuple[_Run, ...]
    outputs: tuple[_Name, ...]

    @classmethod
    def of(cls, step: Step) -> _Parsed:
        names = [_Name.of(name) for name in step.inputs]
        runs = tuple(
            _Run(texts, tuple(name.numbers for name in members))
            for texts, members in groupby(names, key=lambda name: name.texts)
        )
        return cls(step, runs, tuple(_Name.of(name) for name in step.outputs))

    @property
    def form(self) -> tuple[object, ...]:
        """What steps have in common that may become one rule."""
        return (
            tuple(run.texts for run in self.runs),
            tuple(name.texts for name in self.outputs),
            self.step.operations,
            self.step.must_equal,
        )


@dataclass(frozen=True, slots=True)
class _Draft:
    """A rule for several steps: its patterns, and for each the numbers that are written out, by their position."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...]
    must_equal: bool
    fixed: tuple[tuple[tuple[str, ...], dict[int, str]], ...]


def stage_of(steps: Iterable[Step], names: Iterable[str], where: str) -> Stage:
    """Return the stage whose rules do these steps, and change no other of ``names``, the keys before the stage."""
    parsed = [_Parsed.of(step) for step in steps]
    taken = {name for item in parsed for name in item.step.inputs}
    matched = {run.texts for item in parsed for run in item.runs}
    others = (name for name in names if name not in taken and _Name.of(name).texts in matched)
    groups: dict[tuple[object, ...], list[_Parsed]] = defaultdict(list)
    for item in (*parsed, *(_Parsed.of(Step((name,), (name,))) for name in others)):
        groups[item.form].append(item)
    users: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number, members in enumerate(groups.values()):
        for run in members[0].runs:
            users[run.texts].add(number)
    drafts: dict[int, _Draft | None] = {}
    for number, members in enumerate(groups.values()):
        is_shared = any(len(users[run.texts]) > 1 for run in members[0].runs)
        drafts[number] = _draft(members, is_shared=is_shared)
    for texts, numbers in users.items():
        for one, other in combinations(sorted(numbers), 2):
            first, second = drafts[one], drafts[other]
            if first is not None and second is not None and _overlap(first, second, texts):
                drafts[one if len(list(groups.values())[one]) < len(list(groups.values())[other]) else other] = None
    exact = [
        _literal_rule(item.step, where)
        for number, members in enumerate(groups.values())
        if drafts[number] is None
        for item in members
    ]
    return Stage((), (*exact, *(_rule(draft, where) for draft in drafts.values() if draft is not None)))


def _overlap(first: _Draft, second: _Draft, texts: tuple[str, ...]) -> bool:
    """Return whether a key with these texts may match a pattern of both drafts."""
    return any(
        not any(theirs.get(at, number) != number for at, number in ours.items())
        for own_texts, ours in first.fixed
        for other_texts, theirs in second.fixed
        if own_texts == other_texts == texts
    )


def _draft(members: Sequence[_Parsed], *, is_shared: bool) -> _Draft | None:
    """Return one rule for all these steps, or None where no rule can say it.

    With ``is_shared``, other steps have inputs that differ only in numbers, so numbers are written out if possible.
    """
    first = members[0]
    forms = [run.texts for run in first.runs]
    texts = [text for names in (*forms, *(name.texts for name in first.outputs)) for text in names]
    if len(set(forms)) < len(forms) or any(map(_SPECIAL.search, texts)):
        return None
    sources, fixed = [], []
    targets: set[tuple[str, ...]] = set()
    for at, form in enumerate(forms):
        made = _pattern(members, at, is_shared=is_shared)
        if made is None:
            return None
        source, made_targets, written_out = made
        sources.append(source)
        targets.add(made_targets)
        fixed.append((form, written_out))
    if len(targets) != 1:
        return None
    return _Draft(tuple(sources), targets.pop(), first.step.operations, first.step.must_equal, tuple(fixed))


def _pattern(
    members: Sequence[_Parsed], at: int, *, is_shared: bool
) -> tuple[str, tuple[str, ...], dict[int, str]] | None:
    """Return the pattern of one run of inputs, the new names that fit to it, and the numbers that are written out."""
    texts = members[0].runs[at].texts
    # Rows: the numbers of one input, and of each output of its step.
    rows = [(numbers, [name.numbers for name in item.outputs]) for item in members for numbers in item.runs[at].numbers]
    letters: dict[int, str] = {}
    targets = []
    for output, name in enumerate(members[0].outputs):
        filled = _numbers_of(rows, output, letters, is_shared=is_shared)
        if filled is None:
            return None
        targets.append(_fill(name.texts, filled))
    written_out: dict[int, str] = {}
    gathered = []
    parts = []
    free = (letter for letter in _LETTERS if letter not in letters.values())
    for position in range(len(texts) - 1):
        values = {numbers[position] for numbers, _ in rows}
        if position not in letters and len(values) == 1:
            written_out[position] = next(iter(values))
            parts.append(written_out[position])
            continue
        if position not in letters:
            gathered.append(position)
            letters[position] = next(free)
        parts.append(f"{{{letters[position]}:int}}")
    for item in members:
        order = [tuple(int(numbers[position]) for position in gathered) for numbers in item.runs[at].numbers]
        if any(one >= other for one, other in pairwise(order)):
            return None  # a rule gathers its inputs in the order of their numbers
    return _fill(texts, parts), tuple(targets), written_out


def _numbers_of(
    rows: Sequence[tuple[Numbers, list[Numbers]]], output: int, letters: dict[int, str], *, is_shared: bool
) -> list[str] | None:
    """Return what stands for each number in the new name of an output, or None where no pattern says it.

    ``letters`` names the captures of the input by their position; new ones are added.
    """
    filled: list[str] = []
    used: set[int] = set()
    for at in range(len(rows[0][1][output])):
        wanted = [outputs[output][at] for _, outputs in rows]
        is_constant = len(set(wanted)) == 1
        if is_constant and is_shared:
            filled.append(wanted[0])
            continue
        found = next(_captures(rows, wanted, at, used), None)
        if found is None:
            if not is_constant:
                return None
            filled.append(wanted[0])
            continue
        position, shift = found
        used.add(position)
        letter = letters.setdefault(position, next(one for one in _LETTERS[at:] if one not in letters.values()))
        filled.append(f"{{{letter}{shift:+d}}}" if shift else f"{{{letter}}}")
    return filled


def _captures(
    rows: Sequence[tuple[Numbers, list[Numbers]]], wanted: Sequence[str], at: int, used: set[int]
) -> Iterator[tuple[int, int]]:
    """Yield the positions in the input whose number is in the output, and the number to add; the likeliest first."""
    positions = [position for position in range(len(rows[0][0])) if position not in used]
    positions.sort(key=lambda position: position != at)
    for position in positions:
        if all(numbers[position] == number for (numbers, _), number in zip(rows, wanted, strict=True)):
            yield position, 0
    for position in positions:
        numbers_there = [int(numbers[position]) for numbers, _ in rows]
        shifts = {int(number) - there for number, there in zip(wanted, numbers_there, strict=True)}
        if len(shifts) == 1 and len(set(numbers_there)) > 1:
            yield position, shifts.pop()


def _rule(draft: _Draft, where: str) -> Rule:
    patterns = tuple(map(parse_pattern, draft.sources))
    templates = tuple(tuple(parse_template(target, pattern) for target in draft.targets) for pattern in patterns)
    return Rule(patterns, templates, draft.operations, on_collision=_policy(draft.must_equal), where=where)


def _literal_rule(step: Step, where: str) -> Rule:
    """Return the rule for one step, with its names as they are."""
    needs_regex = any(map(_SPECIAL.search, step.outputs))
    patterns = tuple(parse_pattern(f"re:{re.escape(name)}" if needs_regex else literal(name)) for name in step.inputs)
    templates = tuple(
        tuple(
            parse_template(name.replace("\\", "\\\\") if pattern.is_regex else name, pattern) for name in step.outputs
        )
        for pattern in patterns
    )
    return Rule(patterns, templates, step.operations, on_collision=_policy(step.must_equal), where=where)


def _policy(must_equal: bool) -> OnCollision:
    return "equal" if must_equal else "error"
