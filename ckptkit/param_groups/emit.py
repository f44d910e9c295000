"""A spec written down: as the table that is read as the same spec, as TOML or JSON, and as Python to paste."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ckptkit.core.config_files import toml_key, toml_value
from ckptkit.core.patterns import Pattern, literal, parse_pattern
from ckptkit.core.text import plural
from ckptkit.errors import GroupsError, RuleError
from ckptkit.param_groups.conditions import condition_table
from ckptkit.param_groups.plan import ParamGroupsPlan, PlannedGroup
from ckptkit.param_groups.spec import POLICIES, GroupRule, Modifier, ParamGroupSpec

__all__ = ["dump_spec", "patterns_of", "spec_table", "write_python"]


_PLAIN = ParamGroupSpec(())


def spec_table(spec: ParamGroupSpec) -> dict[str, Any]:
    """Return the table that ``parse_spec`` reads as ``spec``; what is at its default is left out."""
    table: dict[str, Any] = {} if spec.optimizer is None else {"optimizer": spec.optimizer}
    for policy in (*POLICIES, "lr_scale"):
        if getattr(spec, policy) != getattr(_PLAIN, policy):
            table[policy] = getattr(spec, policy)
    for key, options in (("defaults", spec.defaults), ("optimizers", spec.optimizers)):
        if options:
            table[key] = {name: dict(one) if isinstance(one, Mapping) else one for name, one in options.items()}
    table["group"] = list(map(_group, spec.rules))
    if spec.modifiers:
        table["modifier"] = list(map(_modifier, spec.modifiers))
    return table


def dump_spec(spec: ParamGroupSpec, form: str) -> str:
    """Return the text of a spec, ``"toml"`` or ``"json"``, which is read as the same spec.

    Raises ``GroupsError`` for an option that this form has no word for: a tensor, or null in TOML.
    """
    table = spec_table(spec)
    try:
        if form == "json":
            return json.dumps(table, indent=2, allow_nan=False)
        return "\n".join(_toml_lines(table))
    except (RuleError, TypeError, ValueError) as error:
        reason = error.reason if isinstance(error, RuleError) else str(error)
        raise GroupsError(f"the spec cannot be written: {reason}", hint="give plain numbers and words") from None


def write_python(plan: ParamGroupsPlan, whose: str) -> str:
    """Return Python that makes the groups of a plan from nothing but the model: a function for each optimizer class.

    The names are spelled out, and a model that has others, or trains what is in no group, is refused when it runs.
    """
    parts = []
    for optimizer in plan.optimizers:
        groups = [group for group in plan.groups if group.optimizer == optimizer]
        several = len(plan.optimizers) > 1
        name = "param_groups" + (f"_{re.sub(r'[^0-9a-z]+', '_', str(optimizer).lower())}" if several else "")
        parts.append("\n".join(_function(name, optimizer, groups, plan, whose=whose, alone=not several)))
    return "\n\n\n".join(parts)


def _group(rule: GroupRule) -> dict[str, Any]:
    table = _common(rule)
    if rule.rest:
        table["rest"] = True
    if rule.optimizer is not None:
        table["optimizer"] = rule.optimizer
    if rule.freeze:
        table["freeze"] = True
    return _with_options(table, rule)


def _modifier(modifier: Modifier) -> dict[str, Any]:
    table = _common(modifier)
    if modifier.layers is not None:
        table["layers"] = [_texts(level) for level in modifier.layers.levels]
        table["layer_decay"] = modifier.layers.decay
        if modifier.layers.min_scale:
            table["min_scale"] = modifier.layers.min_scale
    return _with_options(table, modifier)


def _common(one: GroupRule | Modifier) -> dict[str, Any]:
    table: dict[str, Any] = {"name": one.name}
    if one.patterns:
        table["params"] = _texts(one.patterns)
    if one.condition is not None:
        table["match"] = condition_table(one.condition)
    if one.optional:
        table["optional"] = True
    return table


def _texts(patterns: tuple[Pattern, ...]) -> Any:
    texts = [pattern.text for pattern in patterns]
    return texts[0] if len(texts) == 1 else texts


def _with_options(table: dict[str, Any], one: GroupRule | Modifier) -> dict[str, Any]:
    return {**table, **one.options, **{f"{key}_mult": factor for key, factor in one.multiples.items()}}


def _toml_lines(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        if not isinstance(value, dict) and key not in ("group", "modifier"):
            yield f"{key} = {toml_value(value)}"
    if "defaults" in table:
        yield from ("", "[defaults]", *_pairs(table["defaults"]))
    for name, options in table.get("optimizers", {}).items():
        yield from ("", f"[optimizers.{toml_key(name)}]", *_pairs(options))
    for kind in ("group", "modifier"):
        for one in table.get(kind, ()):
            yield from ("", f"[[{kind}]]", *_pairs(one))


def _pairs(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        if key == "layers":
            yield from ("layers = [", *(f"  {toml_value(level)}," for level in value), "]")
        else:
            yield f"{toml_key(key)} = {toml_value(value)}"


def _function(
    name: str, optimizer: str | None, groups: list[PlannedGroup], plan: ParamGroupsPlan, *, whose: str, alone: bool
) -> Iterator[str]:
    count = sum(len(group.parameters) for group in groups)
    what = f"{plural(count, 'parameter')} in {plural(len(groups), 'group')}"
    yield f"def {name}(model):"
    yield f"    # {' '.join(whose.split())}: {what}{f', for {optimizer}' if optimizer else ''}"
    yield "    groups = ["
    for group in groups:
        options = {"name": group.name, **group.options}
        said = ", ".join(f"{_word(key)}: {_word(value)}" for key, value in options.items())
        yield f'        {{{said}, "params": ['
        yield from (f"            {_word(parameter.name)}," for parameter in group.parameters)
        yield "        ]},"
    yield "    ]"
    yield "    named = dict(model.named_parameters())"
    if plan.freeze:
        yield f"    for name in {_word([parameter.name for parameter in plan.freeze])}:"
        yield "        named[name].requires_grad_(False)"
    yield '    listed = {name for group in groups for name in group["params"]}'
    yield "    unknown = sorted(listed - named.keys())"
    if alone:
        yield "    unknown += [name for name, one in named.items() if one.requires_grad and name not in listed]"
    yield "    if unknown:"
    yield '        raise ValueError(f"these groups were made for another model: {unknown}")'
    yield '    return [{**group, "params": [(name, named[name]) for name in group["params"]]} for group in groups]'


def _word(value: Any) -> str:
    """Return a value as Python writes it."""
    if isinstance(value, str):
        return json.dumps(value) if value.isascii() else repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_word, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_word(key)}: {_word(one)}' for key, one in value.items())}}}"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    raise GroupsError(f"an option is a {type(value).__name__}, which Python text cannot hold", hint="give a number")


_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
_LETTERS = "ijklmnop"


def patterns_of(chosen: Sequence[str], names: Collection[str]) -> list[str]:
    """Return patterns that fit all of ``chosen`` and no other of ``names``, in the order of ``chosen``.

    A module whose parameters are all chosen becomes ``module.*``, and modules that differ in numbers alone one pattern,
    where it fits no other name.
    """
    wanted = set(chosen)
    others = [name for name in names if name not in wanted]
    torn = {prefix for name in others for prefix in _prefixes(name)}
    found = dict.fromkeys(_whole(name, torn) for name in chosen)
    alike = Counter(map(_joined, found))
    joins = {
        joined for joined, count in alike.items() if count > 1 and not any(map(parse_pattern(joined).match, others))
    }
    return list(dict.fromkeys(joined if (joined := _joined(pattern)) in joins else pattern for pattern in found))


def _whole(name: str, torn: Collection[str]) -> str:
    for prefix in _prefixes(name):
        if prefix not in torn and literal(prefix) == prefix:
            return f"{prefix}.*"
    return literal(name)


def _prefixes(name: str) -> Iterator[str]:
    end = name.find(".")
    while end != -1:
        yield name[:end]
        end = name.find(".", end + 1)


def _joined(pattern: str) -> str:
    """Return the pattern with a capture in the place of each number, where it is not a regex."""
    count = len(_NUMBER.findall(pattern))
    if pattern.startswith("re:") or not 0 < count <= len(_LETTERS):
        return pattern
    letters = iter(_LETTERS)
    return _NUMBER.sub(lambda _: f"{{{next(letters)}}}", pattern)
