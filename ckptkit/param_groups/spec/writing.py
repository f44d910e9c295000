"""Write a spec as a table, TOML or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ckptkit.core.config_files import toml_key, toml_value
from ckptkit.core.patterns import Pattern
from ckptkit.errors import GroupsError, RuleError
from ckptkit.param_groups.conditions import condition_table
from ckptkit.param_groups.spec.fields import POLICIES, GroupRule, Modifier, SpecFields

__all__ = ["dump_spec", "spec_table"]

_DEFAULTS = SpecFields(())


def spec_table(spec: SpecFields) -> dict[str, Any]:
    """Return the table that ``parse_spec`` parses as ``spec``, without keys that have their default."""
    table: dict[str, Any] = {} if spec.optimizer is None else {"optimizer": spec.optimizer}
    for policy in (*POLICIES, "lr_scale"):
        if getattr(spec, policy) != getattr(_DEFAULTS, policy):
            table[policy] = getattr(spec, policy)
    if spec.ignore:
        table["ignore"] = list(spec.ignore)
    for key, options in (("defaults", spec.defaults), ("optimizers", spec.optimizers)):
        if options:
            table[key] = {name: dict(value) if isinstance(value, Mapping) else value for name, value in options.items()}
    table["group"] = list(map(_group_table, spec.rules))
    if spec.modifiers:
        table["modifier"] = list(map(_modifier_table, spec.modifiers))
    return table


def dump_spec(spec: SpecFields, form: str) -> str:
    """Return a spec as ``"toml"`` or ``"json"`` text, which ``parse_spec`` parses as the same spec.

    Raises ``GroupsError`` for an option that the form cannot express: a tensor, or null in TOML.
    """
    table = spec_table(spec)
    try:
        if form == "json":
            return json.dumps(table, indent=2, allow_nan=False)
        return "\n".join(_toml_lines(table)).lstrip("\n")
    except (RuleError, TypeError, ValueError) as error:
        reason = error.reason if isinstance(error, RuleError) else str(error)
        raise GroupsError(
            f"the spec cannot be written as {form}: {reason}", hint="use plain numbers and strings"
        ) from None


def _group_table(rule: GroupRule) -> dict[str, Any]:
    table = _common(rule)
    if rule.rest:
        table["rest"] = True
    if rule.optimizer is not None:
        table["optimizer"] = rule.optimizer
    for flag in ("freeze", "override"):
        if getattr(rule, flag):
            table[flag] = True
    return _with_options(table, rule)


def _modifier_table(modifier: Modifier) -> dict[str, Any]:
    table = _common(modifier)
    if modifier.layers is not None:
        table["layers"] = [_texts(level) for level in modifier.layers.levels]
        table["layer_decay"] = modifier.layers.decay
        if modifier.layers.min_scale:
            table["min_scale"] = modifier.layers.min_scale
    return _with_options(table, modifier)


def _common(rule: GroupRule | Modifier) -> dict[str, Any]:
    table: dict[str, Any] = {"name": rule.name}
    if rule.patterns:
        table["params"] = _texts(rule.patterns)
    if rule.condition is not None:
        table["match"] = condition_table(rule.condition)
    if rule.optional:
        table["optional"] = True
    return table


def _texts(patterns: tuple[Pattern, ...]) -> str | list[str]:
    texts = [pattern.text for pattern in patterns]
    return texts[0] if len(texts) == 1 else texts


def _with_options(table: dict[str, Any], rule: GroupRule | Modifier) -> dict[str, Any]:
    return {**table, **rule.options, **{f"{key}_mult": factor for key, factor in rule.multiples.items()}}


def _toml_lines(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        if not isinstance(value, dict) and key not in ("group", "modifier"):
            yield f"{key} = {toml_value(value)}"
    if "defaults" in table:
        yield from ("", "[defaults]", *_pairs(table["defaults"]))
    for name, options in table.get("optimizers", {}).items():
        yield from ("", f"[optimizers.{toml_key(name)}]", *_pairs(options))
    for kind in ("group", "modifier"):
        for inner in table.get(kind, ()):
            yield from ("", f"[[{kind}]]", *_pairs(inner))


def _pairs(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        if key == "layers":
            yield from ("layers = [", *(f"  {toml_value(level)}," for level in value), "]")
        else:
            yield f"{toml_key(key)} = {toml_value(value)}"
