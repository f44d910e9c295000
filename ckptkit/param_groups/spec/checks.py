"""The checks of a spec, however it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ckptkit.core.text import kind_of, quoted
from ckptkit.errors import GroupsError
from ckptkit.param_groups.spec.fields import POLICIES, SpecFields, number_fault
from ckptkit.param_groups.spec.tables import EXAMPLE, LAYER_KEYS, LAYERS, ignore_list

__all__ = ["checked"]

_RESERVED = {
    "params": "a group selects its parameters by patterns",
    "param_names": "torch writes it from the names of the parameters",
    "name": "it names one group",
    "match": "it belongs in one group or modifier",
    "rest": "it belongs in one group",
    "optional": "it belongs in one group or modifier",
    "freeze": "it belongs in one group",
    "override": "it belongs in one group",
    "optimizer": "it belongs at the top of the spec, or in one group",
    "layers": "it belongs in one [[modifier]]",
    "layer_decay": "it belongs in one [[modifier]], together with layers",
    "min_scale": "it belongs in one [[modifier]], together with layers",
}
_NUMBERS = ("lr", "weight_decay")  # options that every torch.optim class uses as one number, 0 or more
_Spec = TypeVar("_Spec", bound=SpecFields)


def checked(spec: _Spec) -> _Spec:
    """Return ``spec`` after the checks that apply to tables and to specs made in Python."""
    if not spec.rules:
        raise GroupsError("the spec has no group", hint=EXAMPLE)
    _check_options(spec.defaults, "[defaults]")
    for name, options in spec.optimizers.items():
        _check_options(options, f"[optimizers.{name}]")
    seen: set[str] = set()
    for number, rule in enumerate(spec.rules, start=1):
        where = f"[[group]] {quoted(rule.name)}"
        if rule.name in seen:
            raise GroupsError(f"two groups have the name {quoted(rule.name)}", hint='give each its own: name = "..."')
        seen.add(rule.name)
        if rule.rest and rule.condition is not None:
            raise GroupsError(f"{where} has both match and rest = true", hint="keep one of them")
        if rule.rest == bool(rule.patterns or rule.condition):
            raise GroupsError(
                f"{where} must have either patterns (or a condition) or rest = true, not both", hint="keep one of them"
            )
        if rule.rest and number < len(spec.rules):
            raise GroupsError(
                f"{where} has rest = true but is not the last group: the groups after it would get no parameter",
                hint="move it to the end; a spec has at most one such group",
            )
        _check_options(rule.options, where)
        if not rule.freeze:
            _check_multiples(rule.multiples, {**spec.defaults_for(rule), **rule.options}, where)
    _check_modifiers(spec)
    _check_policies(spec)
    ignore_list(spec.ignore)
    return spec


def _check_modifiers(spec: SpecFields) -> None:
    seen: set[str] = set()
    trained = [rule for rule in spec.rules if not rule.freeze]
    for modifier in spec.modifiers:
        where = f"[[modifier]] {quoted(modifier.name)}"
        if modifier.name in seen:
            raise GroupsError(
                f"two modifiers have the name {quoted(modifier.name)}", hint='give each its own: name = "..."'
            )
        seen.add(modifier.name)
        _check_options(modifier.options, where)
        if not (modifier.options or modifier.multiples or modifier.layers):
            raise GroupsError(
                f"{where} changes no option", hint="add an option to the modifier, such as weight_decay = 0.0"
            )
        scaled = {**modifier.multiples, **({"lr": 1.0} if modifier.layers else {})}
        for rule in trained:
            _check_multiples(scaled, {**spec.defaults_for(rule), **rule.options, **modifier.options}, where)


def _check_multiples(multiples: Mapping[str, float], known: Mapping[str, Any], where: str) -> None:
    for key in multiples:
        if key not in known:
            raise GroupsError(
                f"{where} multiplies {quoted(key)}, for which the spec has no value",
                hint=f"write a value into [defaults]: {key} = ...",
            )
        if number_fault(known[key]) is not None:
            raise GroupsError(
                f"{where} multiplies {quoted(key)}, which is {kind_of(known[key])}", hint=f"set {key} instead"
            )


def _check_policies(spec: SpecFields) -> None:
    for policy, words in POLICIES.items():
        value = getattr(spec, policy)
        rules = [rule.name for rule in spec.rules] if policy == "unmatched" else []
        if value not in (*words, *rules):
            choices = " or ".join(map(quoted, words)) + (", or the name of a group" if policy == "unmatched" else "")
            raise GroupsError(f"{policy} is {kind_of(value)}", hint=f"{policy} must be {choices}")
    if spec.unmatched != "error" and spec.rules[-1].rest:
        raise GroupsError(
            f"unmatched is {quoted(spec.unmatched)}, but group {quoted(spec.rules[-1].name)} has rest = true",
            hint="keep one of them",
        )
    named = [rule for rule in spec.rules if spec.optimizer_of(rule)]
    unnamed = [rule for rule in spec.rules if not rule.freeze and not spec.optimizer_of(rule)]
    if named and unnamed:
        raise GroupsError(
            f"[[group]] {quoted(named[0].name)} names its optimizer, but {quoted(unnamed[0].name)} does not",
            hint='name the class of the other groups at the top of the spec: optimizer = "AdamW"',
        )
    if not isinstance(spec.lr_scale, bool):
        raise GroupsError(
            f"lr_scale is {kind_of(spec.lr_scale)}, not true or false", hint="write lr_scale = true, or leave it out"
        )


def _check_options(options: Mapping[Any, Any], where: str) -> None:
    for key, value in options.items():
        if not isinstance(key, str) or not key:
            raise GroupsError(
                f"{where}: {key!r} is not the name of an option", hint="use the names of torch.optim, such as lr"
            )
        if key in _RESERVED:
            hint = f"[[modifier]] {LAYERS}, layer_decay = 0.75" if key in LAYER_KEYS else f"leave {key} out"
            raise GroupsError(f"{where}: {key} is not an option: {_RESERVED[key]}", hint=hint)
        fault = number_fault(value) if key in _NUMBERS else None
        if fault is not None:
            raise GroupsError(f"{where}: {key} {fault}", hint=f"write a finite number, 0 or more: {key} = 0.01")
