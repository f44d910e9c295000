"""Gates on values: which tensors must be unchanged, which must have changed, and by how much a tensor may change."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from ckptkit.comparison.values import ValueDiff, ValueDifference
from ckptkit.core.arguments import require_number, require_strings
from ckptkit.core.coverage.requirements import Unmet
from ckptkit.core.patterns import Pattern, parse_pattern, suggest_pattern
from ckptkit.core.text import listed, plural, quoted, shell_word, short_number
from ckptkit.errors import RuleError
from ckptkit.values.float_formats import FLOAT_FORMATS

__all__ = ["Gate", "Gates", "Subject", "judge", "parse_gates", "refuse_unmatched"]

_SHOWN = 3
_DIGITS = (3, 6, 9, 17)
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_PATTERNS = 'a pattern or a list of patterns, such as "encoder.*"'
_LIMIT = "the largest relative change that is allowed, such as 0.01"


@dataclass(frozen=True, slots=True)
class Gates:
    """Patterns of keys whose values must be equal or different, and the largest relative L2 change, or None."""

    expect_frozen: tuple[Pattern, ...] = ()
    expect_changed: tuple[Pattern, ...] = ()
    max_rel_l2: float | None = None

    def __bool__(self) -> bool:
        """Whether there is a gate."""
        return bool(self.expect_frozen or self.expect_changed) or self.max_rel_l2 is not None


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate, and how many tensors it is about; ``broken`` says why it does not hold, or is None.

    ``name`` is ``"expect_frozen"``, ``"expect_changed"`` or ``"max_rel_l2"``, and ``value`` the pattern or the limit.
    ``hint`` says what may explain a broken gate, with the options of ``ckpt``. ``left_out`` is the number of tensors
    that the pattern matches, but that ``keep`` or ``drop`` of the rules leave out.
    """

    name: str
    value: str | float
    tensors: int
    broken: Unmet | None = None
    hint: str = ""
    left_out: int = 0

    @property
    def option(self) -> str:
        """The option of ``ckpt diff`` that asks for the gate."""
        value = shell_word(self.value) if isinstance(self.value, str) else short_number(self.value, 15)
        return f"--{self.name.replace('_', '-')} {value}"


def parse_gates(
    expect_frozen: str | Sequence[str], expect_changed: str | Sequence[str], max_rel_l2: float | None
) -> Gates:
    """Return the gates in these arguments.

    Raises ``ArgumentError`` for a wrong type or a number below 0, ``RuleError`` for a wrong pattern.
    """
    frozen = require_strings(expect_frozen, "expect_frozen", _PATTERNS)
    changed = require_strings(expect_changed, "expect_changed", _PATTERNS)
    if max_rel_l2 is not None:
        require_number(max_rel_l2, "max_rel_l2", _LIMIT, at_least=0)
        max_rel_l2 = float(max_rel_l2)
    return Gates(tuple(map(parse_pattern, frozen)), tuple(map(parse_pattern, changed)), max_rel_l2)


@dataclass(frozen=True, slots=True)
class Subject:
    """What gates are about.

    Attributes:
        keys: The names of all tensors of both sides, after the rules.
        left_out: Those that ``keep`` or ``drop`` of the rules leave out: the gates are not about them.
        reasons: Why the values of a key were not compared: such a key breaks the gates whose pattern matches it.
        ties: Keys that are one tensor with a key that was compared, each with this key.
        rename_hint: Returns what may explain that these keys are missing on one side.
    """

    keys: Collection[str]
    left_out: AbstractSet[str]
    reasons: Mapping[str, str]
    ties: Mapping[str, str]
    rename_hint: Callable[[Collection[str]], str]


def refuse_unmatched(gates: Gates, keys: Collection[str], left_out: AbstractSet[str]) -> None:
    """Raise ``RuleError`` for a pattern that matches none of the ``keys``, or none that the rules do not leave out."""
    for option, patterns in (("--expect-frozen", gates.expect_frozen), ("--expect-changed", gates.expect_changed)):
        for pattern in patterns:
            wanted = {key for key in keys if pattern.match(key)}
            name = f"{option} {shell_word(pattern.text)}"
            if not wanted:
                raise RuleError(
                    f"{name} matches none of {plural(len(keys), 'key')} of both sides",
                    hint=suggest_pattern(pattern, keys, "EXPECTED"),
                )
            if wanted <= left_out:
                raise RuleError(
                    f"{name} matches only keys that --keep or --drop leaves out, {listed(sorted(wanted), 3)}"
                )


def judge(gates: Gates, values: ValueDiff, subject: Subject) -> list[Gate]:
    """Return each gate with its judgement; ``refuse_unmatched`` has accepted the patterns."""
    differing = {key: one for one in values.different for key in one.names}
    differing |= {key: differing[other] for key, other in subject.ties.items() if other in differing}
    equal = "equal within the tolerances" if values.rtol is not None else "its values are equal"
    judged = []
    for pattern in gates.expect_frozen:
        gate, wanted = _gate("expect_frozen", pattern, subject)
        faults = {key: _how_changed(differing[key]) for key in wanted if key in differing}
        judged.append(_with_faults(gate, wanted, faults, "not frozen", subject))
        if judged[-1].broken and not judged[-1].hint:
            judged[-1] = replace(judged[-1], hint=_why_changed([differing[key] for key in wanted if key in differing]))
    for pattern in gates.expect_changed:
        gate, wanted = _gate("expect_changed", pattern, subject)
        faults = {key: equal for key in wanted if key not in differing and key not in subject.reasons}
        judged.append(_with_faults(gate, wanted, faults, "not changed", subject))
    if gates.max_rel_l2 is not None:
        judged.append(_judge_size(gates.max_rel_l2, values))
    return judged


def _gate(name: str, pattern: Pattern, subject: Subject) -> tuple[Gate, list[str]]:
    """Return a gate without its judgement, and the keys that it is about."""
    matched = [key for key in subject.keys if pattern.match(key)]
    wanted = [key for key in matched if key not in subject.left_out]
    return Gate(name, pattern.text, len(wanted), left_out=len(matched) - len(wanted)), wanted


def _how_changed(one: ValueDifference) -> str:
    if one.nonfinite or not one.rel_l2:
        return (
            "its bytes differ" if one.changed_elements is None else f"{plural(one.changed_elements, 'element')} differ"
        )
    return f"relative L2 {short_number(one.rel_l2, 3)}"


def _with_faults(gate: Gate, wanted: Sequence[str], faults: Mapping[str, str], what: str, subject: Subject) -> Gate:
    """Return the gate, broken by ``faults`` of keys that were compared, and by each key that was not."""
    uncompared = {key: subject.reasons[key] for key in wanted if key in subject.reasons}
    if not faults and not uncompared:
        return gate
    total = f" of {plural(len(wanted), 'tensor')}"
    parts = []
    if faults:
        parts.append(f"{len(faults):,}{total} {'is' if len(faults) == 1 else 'are'} {what}, {_explained(faults)}")
    if uncompared:
        parts.append(f"{len(uncompared):,}{'' if faults else total} cannot be compared, {_explained(uncompared)}")
    broken = tuple(key for key in wanted if key in faults or key in uncompared)
    message = f"{gate.option}: {'; '.join(parts)}"
    hint = subject.rename_hint(uncompared) if uncompared else ""
    return replace(gate, broken=Unmet(gate.name, message, broken), hint=hint)


def _why_changed(changed: Sequence[ValueDifference]) -> str:
    """Return what may explain that tensors are not frozen: buffers of BatchNorm, or a dtype with fewer bits."""
    buffers = [name for one in changed if (name := one.key.rpartition(".")[2]) in _BUFFERS]
    count = f"of {plural(len(changed), 'changed tensor')}"
    if buffers:
        return (
            f"{len(buffers):,} {count} can be buffers of BatchNorm, which change in training mode without a gradient: "
            f"call .eval() on the frozen modules, or leave them out with --drop '*.running_*' "
            "--drop '*.num_batches_tracked'"
        )
    rounded = [one for one in changed if one.rel_l2 is not None and one.rel_l2 <= _rounding(one)]
    if not rounded:
        return ""
    dtype, tolerance = rounded[0].found.dtype, _rounding(rounded[0])
    digits = math.ceil(-math.log10(tolerance))
    return (
        f"rounding to {dtype} can explain {len(rounded):,} {count}: compare with --rtol "
        f"{short_number(math.ceil(tolerance * 10**digits) / 10**digits)}, or give the side in {dtype} first"
    )


def _rounding(one: ValueDifference) -> float:
    """Return the largest relative error of rounding to the dtype of found, or -1 if it has no fewer bits."""
    expected, found = (FLOAT_FORMATS.get(info.dtype) for info in (one.expected, one.found))
    if expected is None or found is None or found.mantissa >= expected.mantissa:
        return -1.0
    return float(2.0 ** -(found.mantissa + 1))


def _explained(faults: Mapping[str, str]) -> str:
    return listed([f"{quoted(key)} ({fault})" for key, fault in faults.items()], _SHOWN, show=str)


def _judge_size(limit: float, values: ValueDiff) -> Gate:
    """Return the judgement of ``max_rel_l2``: about all tensors to compare, whatever is tolerated."""
    changed = (*values.different, *values.within)
    faults = {key: fault for one in changed if (fault := _excess(one, limit)) for key in one.names}
    faults |= {one.key: f"not compared: {one.reason}" for one in values.skipped}
    gate = Gate("max_rel_l2", limit, values.compared + len(values.skipped))
    broken = tuple(faults)
    if broken:
        verb = "is" if len(broken) == 1 else "are"
        message = f"{gate.option}: {plural(len(broken), 'tensor')} {verb} not within it, {_explained(faults)}"
    elif not gate.tensors:
        message = f"{gate.option}: no tensor could be compared"
    else:
        return gate
    return replace(gate, broken=Unmet(gate.name, message, broken))


def _excess(one: ValueDifference, limit: float) -> str:
    if one.nonfinite:
        return f"{plural(one.nonfinite, 'element')} with NaN or Inf differ"
    if one.rel_l2 is None:  # no number is finite on both sides, or the dtype has no numbers
        return "its bytes differ"
    if one.rel_l2 <= limit:
        return ""
    shown = (short_number(one.rel_l2, digits) for digits in _DIGITS)
    return f"relative L2 {next((text for text in shown if float(text) > limit), one.rel_l2)}"
