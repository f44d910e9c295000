"""What a param-group spec says: ordered rules, and the options that all groups share."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from ckptkit.errors import GroupsError, RuleError
from ckptkit.keys import Pattern, parse_pattern
from ckptkit.text import quoted

__all__ = ["GroupRule", "ParamGroupSpec", "SpecLike", "is_tensor", "number_fault", "parse_spec"]

_OWN_KEYS = ("name", "params", "rest", "optional")
_RESERVED = {
    "params": "the parameters of a group come from its patterns",
    "param_names": "torch writes it from the names of the parameters",
    "name": "it is the name of one group",
    "rest": "it belongs to one group",
    "optional": "it belongs to one group",
}
_NUMBERS = ("lr", "weight_decay")  # the two that every torch.optim class uses as one number, zero or more
_EXAMPLE = 'for example [[group]] with params = "head.*" and lr = 0.01, then one with rest = true'


@dataclass(frozen=True, slots=True)
class GroupRule:
    """One rule: it owns the parameters whose FQN fits one of ``patterns``.

    With ``rest`` it has no patterns and owns every trainable parameter that no rule before it does;
    with ``optional`` it may own none. ``options`` go to the optimizer as they are.
    """

    name: str
    patterns: tuple[Pattern, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    rest: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ParamGroupSpec:
    """Ordered rules, of which the first that fits a parameter owns it, over ``defaults`` that all share."""

    rules: tuple[GroupRule, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def options(self, rule: GroupRule) -> dict[str, Any]:
        """Return what the optimizer gets for the group of ``rule``: its options over the defaults."""
        return {**self.defaults, **rule.options}


SpecLike = ParamGroupSpec | Mapping[str, Any] | Sequence[Mapping[str, Any] | GroupRule]


def parse_spec(spec: SpecLike) -> ParamGroupSpec:
    """Return the checked spec that a parsed TOML or JSON file, a list of its groups, or a ``ParamGroupSpec`` describes.

    Raises ``GroupsError``, naming the group, for a key, a pattern or an option that cannot be meant.
    """
    defaults: Any = {}
    tables: Any = spec
    if isinstance(spec, ParamGroupSpec):
        defaults, tables = spec.defaults, spec.rules
    elif isinstance(spec, Mapping):
        unknown = sorted(str(key) for key in spec if key not in {"defaults", "group"})
        if unknown:
            raise GroupsError(
                f"the spec has the unknown key {quoted(unknown[0])}",
                hint="it holds [defaults] and one [[group]] after the other; options go into one of them",
            )
        defaults, tables = spec.get("defaults", {}), spec.get("group", [])
    if isinstance(tables, str | bytes) or not isinstance(tables, Sequence):
        raise GroupsError(f"the groups of a spec are {_kind(tables)}, not a list of tables", hint=f"write {_EXAMPLE}")
    if not isinstance(defaults, Mapping):
        raise GroupsError(f"defaults is {_kind(defaults)}, not a table of options", hint="write [defaults] lr = 0.001")
    if not tables:
        raise GroupsError("the spec has no group", hint=_EXAMPLE)
    _check_options(defaults, "[defaults]")
    return _checked(ParamGroupSpec(tuple(map(_rule, tables, range(1, len(tables) + 1))), dict(defaults)))


def _rule(table: Mapping[str, Any] | GroupRule, number: int) -> GroupRule:
    if isinstance(table, GroupRule):
        return table
    where = f"[[group]] {number}"
    if not isinstance(table, Mapping):
        raise GroupsError(f"{where} is {_kind(table)}, not a table", hint=_EXAMPLE)
    name = table.get("name")
    if name is not None and not (isinstance(name, str) and name):
        raise GroupsError(f"{where}: name is {_kind(name)}", hint='give it a word: name = "head"')
    if name is not None:
        where = f"[[group]] {quoted(name)}"
    for key in ("rest", "optional"):
        if not isinstance(table.get(key, False), bool):
            raise GroupsError(f"{where}: {key} is {_kind(table[key])}", hint=f"write {key} = true, or leave it out")
    rest = table.get("rest", False)
    if rest and "params" in table:
        raise GroupsError(f"{where} has both params and rest = true", hint="keep one of them")
    if not rest and "params" not in table:
        raise GroupsError(
            f"{where} says neither which params it owns nor rest = true",
            hint='write params = "head.*", or rest = true for all that no group before it owns',
        )
    patterns = () if rest else _patterns(table["params"], where)
    options = {key: value for key, value in table.items() if key not in _OWN_KEYS}
    return GroupRule(
        name or (patterns[0].text if patterns else "rest"), patterns, options, rest, table.get("optional", False)
    )


def _patterns(given: Any, where: str) -> tuple[Pattern, ...]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise GroupsError(
            f"{where}: params is {_kind(given)}, not a pattern or a list of patterns",
            hint='it takes names, not tensors: params = "head.*"',
        )
    if not texts:
        raise GroupsError(f"{where}: params is an empty list", hint='name what it owns: params = "head.*"')
    try:
        return tuple(map(parse_pattern, texts))
    except RuleError as error:
        raise GroupsError(f"{where}: {error.reason}", hint=error.hint) from None


def _checked(spec: ParamGroupSpec) -> ParamGroupSpec:
    """Hold a spec that was made in Python to the same rules as one from a file."""
    seen: set[str] = set()
    for number, rule in enumerate(spec.rules, start=1):
        where = f"[[group]] {quoted(rule.name)}"
        if rule.name in seen:
            raise GroupsError(f"two groups are called {quoted(rule.name)}", hint='tell them apart: name = "..."')
        seen.add(rule.name)
        if rule.rest == bool(rule.patterns):
            raise GroupsError(f"{where} needs either patterns or rest, and not both", hint="keep one of them")
        if rule.rest and number < len(spec.rules):
            raise GroupsError(
                f"{where} has rest = true but is not the last group, so the groups after it could own nothing",
                hint="move it to the end; a spec has at most one",
            )
        _check_options(rule.options, where)
    return spec


def _check_options(options: Mapping[Any, Any], where: str) -> None:
    for key, value in options.items():
        if not isinstance(key, str) or not key:
            raise GroupsError(f"{where}: the option {key!r} has no name", hint="an option is called as in torch.optim")
        if key in _RESERVED:
            raise GroupsError(f"{where}: {key} is not an option, {_RESERVED[key]}", hint="leave it out")
        fault = number_fault(value) if key in _NUMBERS else None
        if fault is not None:
            raise GroupsError(f"{where}: {key} {fault}", hint=f"write a finite number, 0 or more: {key} = 0.01")


def number_fault(value: Any) -> str | None:
    """Return why ``value`` cannot be a learning rate or a weight decay, or None where it can.

    A torch tensor with one element is a number, as it is for ``torch.optim``.
    """
    if is_tensor(value):
        if value.numel() != 1:
            return f"is a tensor of shape {tuple(value.shape)}"
        if value.is_meta:
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return f"is {_kind(value)}"
    try:
        number = float(value)
    except OverflowError:
        return "is too large for a float"
    if not math.isfinite(number):
        return f"is {number}"
    return f"is negative ({value})" if number < 0 else None


def is_tensor(value: object) -> bool:
    """Return whether ``value`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")  # no tensor can exist before somebody imported it
    return torch is not None and isinstance(value, torch.Tensor)


def _kind(value: object) -> str:
    if isinstance(value, str):
        return f"the string {quoted(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    article = "an" if type(value).__name__[:1].lower() in "aeiou" else "a"
    return f"{article} {type(value).__name__}"
