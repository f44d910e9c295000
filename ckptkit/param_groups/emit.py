"""Write a spec as a table, TOML or JSON, and its groups as Python source that needs no ckptkit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckptkit.core.config_files import toml_key, toml_value
from ckptkit.core.patterns import Pattern
from ckptkit.core.text import plural
from ckptkit.errors import GroupsError, RuleError
from ckptkit.param_groups.conditions import condition_table
from ckptkit.param_groups.plan import ParamGroupsPlan, PlannedGroup
from ckptkit.param_groups.spec import POLICIES, GroupRule, Modifier, ParamGroupSpec

__all__ = ["dump_spec", "spec_table", "write_python"]


_DEFAULTS = ParamGroupSpec(())


def spec_table(spec: ParamGroupSpec) -> dict[str, Any]:
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


def dump_spec(spec: ParamGroupSpec, form: str) -> str:
    """Return a spec as ``"toml"`` or ``"json"`` text, which ``parse_spec`` parses as the same spec.

    Raises ``GroupsError`` for an option that the form cannot express: a tensor, or null in TOML.
    """
    table = spec_table(spec)
    try:
        if form == "json":
            return json.dumps(table, indent=2, allow_nan=False)
        return "\n".join(_toml_lines(table))
    except (RuleError, TypeError, ValueError) as error:
        reason = error.reason if isinstance(error, RuleError) else str(error)
        raise GroupsError(
            f"the spec cannot be written as {form}: {reason}", hint="use plain numbers and strings"
        ) from None


def write_python(plan: ParamGroupsPlan, title: str) -> str:
    """Return Python source that builds the groups of a plan: one function of the model for each optimizer class.

    The source lists every FQN and needs no ckptkit. It raises ``ValueError`` for a model without one of the names, and
    for a trainable parameter in no group. ``title`` goes into a comment.
    """
    parts = []
    for optimizer in plan.optimizers:
        groups = [group for group in plan.groups if group.optimizer == optimizer]
        several = len(plan.optimizers) > 1
        name = "param_groups" + (f"_{re.sub(r'[^0-9a-z]+', '_', str(optimizer).lower())}" if several else "")
        parts.append("\n".join(_function(name, optimizer, groups, plan, title=title, alone=not several)))
    return "\n\n\n".join(parts)


def _group_table(rule: GroupRule) -> dict[str, Any]:
    table = _common(rule)
    if rule.rest:
        table["rest"] = True
    if rule.optimizer is not None:
        table["optimizer"] = rule.optimizer
    if rule.freeze:
        table["freeze"] = True
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


def _function(
    name: str, optimizer: str | None, groups: list[PlannedGroup], plan: ParamGroupsPlan, *, title: str, alone: bool
) -> Iterator[str]:
    """Yield the lines of one function; ``alone`` says that its groups must hold every trainable parameter."""
    count = sum(len(group.parameters) for group in groups)
    size = f"{plural(count, 'parameter')} in {plural(len(groups), 'group')}"
    yield f"def {name}(model):"
    yield f"    # {' '.join(title.split())}: {size}{f', for {optimizer}' if optimizer else ''}"
    yield "    groups = ["
    for group in groups:
        options = {"name": group.name, **group.options}
        items = ", ".join(f"{_literal(key)}: {_literal(value)}" for key, value in options.items())
        yield f'        {{{items}, "params": ['
        yield from (f"            {_literal(parameter.name)}," for parameter in group.parameters)
        yield "        ]},"
    yield "    ]"
    yield "    named = dict(model.named_parameters())"
    if plan.freeze:
        yield f"    for name in {_literal([parameter.name for parameter in plan.freeze])}:"
        yield "        named[name].requires_grad_(False)"
    yield '    listed = {name for group in groups for name in group["params"]}'
    yield "    unknown = sorted(listed - named.keys())"
    if alone:
        yield "    unknown += [name for name, tensor in named.items() if tensor.requires_grad and name not in listed]"
    yield "    if unknown:"
    yield '        raise ValueError(f"these groups were written for another model: {unknown}")'
    yield "    for group in groups:"
    yield '        group["param_names"] = group["params"]'
    yield '        group["params"] = [named[name] for name in group["params"]]'
    yield "    return groups"


def _literal(value: object) -> str:
    """Return ``value`` as a Python literal."""
    if isinstance(value, str):
        return json.dumps(value) if value.isascii() else repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(inner)}' for key, inner in value.items())}}}"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    raise GroupsError(
        f"an option is a {type(value).__name__}, which has no Python literal", hint="use plain numbers and strings"
    )
