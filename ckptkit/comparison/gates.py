"""Gates on values: which tensors must be unchanged, which must have changed, and by how much a tensor may change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.comparison.values import ValueDiff, ValueDifference
from ckptkit.core.arguments import require_number, require_strings
from ckptkit.core.coverage.requirements import Unmet
from ckptkit.core.patterns import Pattern, parse_pattern, suggest_pattern
from ckptkit.core.text import listed, plural, quoted, shell_word, short_number
from ckptkit.errors import RuleError

__all__ = ["Gate", "Gates", "judge", "parse_gates"]

_SHOWN = 3
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
    """

    name: str
    value: str | float
    tensors: int
    broken: Unmet | None = None

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


def judge(
    gates: Gates,
    values: ValueDiff,
    keys: Collection[str],
    reasons: Mapping[str, str],
    ties: Mapping[str, str],
) -> list[Gate]:
    """Return each gate with its judgement.

    ``keys`` are the names of all tensors of both sides, after the rules. ``reasons`` say why the values of a key were
    not compared: such a key breaks the gates whose pattern matches it. ``ties`` has keys that are one tensor with a key
    that was compared. Raises ``RuleError`` for a pattern that matches
    no key.
    """
    differing = {key: one for one in values.different for key in one.names}
    differing |= {key: differing[other] for key, other in ties.items() if other in differing}
    judged = []
    for pattern in gates.expect_frozen:
        wanted = _matched(pattern, "--expect-frozen", keys)
        faults = {key: reasons.get(key) or _how_changed(differing, key) for key in wanted}
        judged.append(_gate("expect_frozen", pattern.text, wanted, faults, "not frozen"))
    for pattern in gates.expect_changed:
        wanted = _matched(pattern, "--expect-changed", keys)
        equal = "equal within the tolerances" if values.rtol is not None else "its values are equal"
        faults = {key: reasons.get(key) or ("" if key in differing else equal) for key in wanted}
        judged.append(_gate("expect_changed", pattern.text, wanted, faults, "not changed"))
    if gates.max_rel_l2 is not None:
        judged.append(_judge_size(gates.max_rel_l2, values))
    return judged


def _matched(pattern: Pattern, option: str, keys: Collection[str]) -> list[str]:
    wanted = [key for key in keys if pattern.match(key)]
    if not wanted:
        raise RuleError(
            f"{option} {shell_word(pattern.text)} matches none of {plural(len(keys), 'key')} of both sides",
            hint=suggest_pattern(pattern, keys, "EXPECTED"),
        )
    return wanted


def _how_changed(differing: Mapping[str, ValueDifference], key: str) -> str:
    one = differing.get(key)
    if one is None:
        return ""
    if one.nonfinite or not one.rel_l2:
        return (
            "its bytes differ" if one.changed_elements is None else f"{plural(one.changed_elements, 'element')} differ"
        )
    return f"relative L2 {short_number(one.rel_l2, 3)}"


def _gate(name: str, pattern: str, wanted: Sequence[str], faults: Mapping[str, str], what: str) -> Gate:
    gate = Gate(name, pattern, len(wanted))
    broken = tuple(key for key, fault in faults.items() if fault)
    if not broken:
        return gate
    verb = "is" if len(broken) == 1 else "are"
    message = f"{gate.option}: {len(broken):,} of {plural(len(wanted), 'tensor')} {verb} {what}, "
    return replace(gate, broken=Unmet(name, message + _explained(broken, faults), broken))


def _explained(keys: Sequence[str], faults: Mapping[str, str]) -> str:
    return listed([f"{quoted(key)} ({faults[key]})" for key in keys], _SHOWN, show=str)


def _judge_size(limit: float, values: ValueDiff) -> Gate:
    """Return the judgement of ``max_rel_l2``: about all tensors to compare, whatever is tolerated."""
    changed = (*values.different, *values.within)
    faults = {key: fault for one in changed if (fault := _excess(one, limit)) for key in one.names}
    faults |= {one.key: f"not compared: {one.reason}" for one in values.skipped}
    gate = Gate("max_rel_l2", limit, values.compared + len(values.skipped))
    broken = tuple(faults)
    if broken:
        verb = "is" if len(broken) == 1 else "are"
        message = f"{gate.option}: {plural(len(broken), 'tensor')} {verb} not within it, {_explained(broken, faults)}"
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
    return f"relative L2 {short_number(one.rel_l2, 3)}" if one.rel_l2 > limit else ""
