"""Combine two specs: the groups and modifiers of both, where no parameter has an owner in both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptkit.core.text import quoted
from ckptkit.errors import GroupsError
from ckptkit.inputs import CheckpointLike
from ckptkit.param_groups.properties import ParameterInfo, parameter_table
from ckptkit.param_groups.spec.fields import POLICIES, GroupRule, Modifier, SpecFields

__all__ = ["combined_fields"]

_SINGLE = ("optimizer", *POLICIES, "lr_scale")  # fields with one value; the default value says nothing
_NO_GROUP = SpecFields(())


def combined_fields(first: SpecFields, second: SpecFields, model: CheckpointLike | None) -> dict[str, Any]:
    """Return the fields of a spec that does what two checked specs do.

    Raises ``GroupsError``, which names both sides, where they contradict each other, and where ``model`` is needed to
    tell whether they do.
    """
    fields: dict[str, Any] = {name: _single(name, first, second) for name in _SINGLE}
    classes = dict.fromkeys((*first.optimizers, *second.optimizers))
    return fields | {
        "rules": _rules(first, second, model),
        "defaults": _options("[defaults]", "with_defaults", first.defaults, second.defaults),
        "modifiers": _modifiers(first.modifiers, second.modifiers),
        "optimizers": {
            name: _options(f"[optimizers.{name}]", "", first.optimizers.get(name, {}), second.optimizers.get(name, {}))
            for name in classes
        },
        "ignore": tuple(dict.fromkeys((*first.ignore, *second.ignore))),
    }


def _single(name: str, first: SpecFields, second: SpecFields) -> Any:
    mine, theirs, unset = (getattr(spec, name) for spec in (first, second, _NO_GROUP))
    if unset not in (mine, theirs) and mine != theirs:
        raise GroupsError(
            f"{name} is {quoted(str(mine))} in one spec and {quoted(str(theirs))} in the other",
            hint=f"choose one: dataclasses.replace(spec, {name}={mine!r})",
        )
    return theirs if mine == unset else mine


def _options(where: str, method: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    for key in first.keys() & second.keys():
        if not _is_same(first[key], second[key]):
            raise GroupsError(
                f"{where} of one spec has {key} = {first[key]}, and of the other {key} = {second[key]}",
                hint=f"choose one before: spec.{method}({key}={first[key]})" if method else "give both the same value",
            )
    return {**first, **second}


def _is_same(one: object, other: object) -> bool:
    """Return whether two values are equal; a tensor or an array of several elements equals only itself."""
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):
        return False


def _rules(first: SpecFields, second: SpecFields, model: CheckpointLike | None) -> tuple[GroupRule, ...]:
    mine = _owning(first)
    theirs = [rule for rule in _owning(second) if not any(_is_same(rule, other) for other in first.rules)]
    for rule in second.rules:
        same = next((other for other in first.rules if other.name == rule.name and not _is_same(other, rule)), None)
        if same is not None and not (_is_plain_rest(rule) and _is_plain_rest(same)):
            raise GroupsError(
                f"both specs have a group {quoted(rule.name)}, and they differ", hint="give one another name"
            )
    differing = list(zip(mine, theirs, strict=False))[:1] or _in_another_order(mine, _owning(second))
    if differing:
        _refuse_two_owners(first, second, differing[0], model)
    groups = [rule for rule in (*mine, *theirs) if not rule.rest]
    return (*groups, *_rest(first, second))


def _in_another_order(mine: Sequence[GroupRule], theirs: Sequence[GroupRule]) -> list[tuple[GroupRule, GroupRule]]:
    """Return pairs of rules that both specs have, in another order: the first that matches a parameter owns it."""
    names = [{rule.name for rule in rules} for rules in (mine, theirs)]
    shared = [[rule for rule in rules if rule.name in names[0] & names[1]] for rules in (mine, theirs)]
    return [(one, other) for one, other in zip(*shared, strict=True) if one.name != other.name]


def _is_plain_rest(rule: GroupRule) -> bool:
    """Return whether a rule owns all remaining parameters and leaves their options as they are."""
    return rule.rest and not (rule.options or rule.multiples or rule.optimizer or rule.freeze)


def _owning(spec: SpecFields) -> list[GroupRule]:
    return [rule for rule in spec.rules if not _is_plain_rest(rule)]


def _rest(first: SpecFields, second: SpecFields) -> Iterator[GroupRule]:
    """Yield the rule for all remaining parameters, if there is one."""
    rests = [spec.rules[-1] for spec in (first, second) if spec.rules[-1].rest]
    setting = [rule for rule in rests if not _is_plain_rest(rule)]
    if setting:
        yield setting[0]
    elif len(rests) == 2:
        yield replace(rests[0], optional=rests[0].optional or rests[1].optional)
    elif rests and all(spec.unmatched == "error" for spec in (first, second)):
        yield replace(rests[0], optional=True)  # the groups of the other spec may own every parameter


def _refuse_two_owners(
    first: SpecFields,
    second: SpecFields,
    differing: tuple[GroupRule, GroupRule],
    model: CheckpointLike | None,
) -> None:
    """Raise ``GroupsError`` for a parameter of ``model`` that a group of each spec owns."""
    mine, theirs = differing
    if model is None:
        raise GroupsError(
            f"groups {quoted(mine.name)} and {quoted(theirs.name)} could own the same parameters",
            hint="give the model, with which this is decided: spec.combined_with(other, model)",
        )
    for parameter in parameter_table(model).parameters:
        one, other = _owner(first, parameter), _owner(second, parameter)
        if one is not None and other is not None and one.name != other.name:
            raise GroupsError(
                f"{quoted(parameter.name)} would be owned by group {quoted(one.name)} of one spec and by group "
                f"{quoted(other.name)} of the other",
                hint="narrow one of them, or change the options by a modifier: spec.with_modifier(...)",
            )


def _owner(spec: SpecFields, parameter: ParameterInfo) -> GroupRule | None:
    """Return the rule of ``spec`` that decides the options of ``parameter``."""
    return next((rule for rule in _owning(spec) if rule.rest or rule.matches(parameter)), None)


def _modifiers(first: Sequence[Modifier], second: Sequence[Modifier]) -> tuple[Modifier, ...]:
    combined = list(first)
    for modifier in second:
        if any(_is_same(modifier, other) for other in combined):
            continue
        layered = next((other for other in first if other.layers and modifier.layers), None)
        if layered is not None:
            raise GroupsError(
                f"modifiers {quoted(layered.name)} and {quoted(modifier.name)} both scale the learning rate by layers",
                hint="combine specs of which only one has layers",
            )
        combined.append(replace(modifier, name=_free_name(modifier.name, {other.name for other in combined})))
    return tuple(combined)


def _free_name(name: str, taken: set[str]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name} {number}", number + 1
    return free
