"""Parse and check a spec, given as a TOML, JSON or YAML table or as Python objects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ckptkit.core.config_files import default_error_path, read_table_file
from ckptkit.core.findings.ignoring import parse_ignore
from ckptkit.core.patterns import Pattern, parse_pattern
from ckptkit.core.text import kind_of, quoted
from ckptkit.errors import GroupsError, PathError, RuleError
from ckptkit.param_groups.conditions import Layers, parse_condition
from ckptkit.param_groups.spec import POLICIES, GroupRule, Modifier, ParamGroupSpec, number_fault

__all__ = ["SpecLike", "is_spec", "parse_spec"]

# The path of a TOML, JSON or YAML file, its content, a list of groups, or a spec.
SpecLike: TypeAlias = (
    ParamGroupSpec | str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any] | GroupRule]
)

_GROUP_KEYS = ("name", "params", "match", "rest", "optional", "optimizer", "freeze")
_MODIFIER_KEYS = ("name", "params", "match", "optional", "layers", "layer_decay", "min_scale")
_SPEC_KEYS = ("defaults", "group", "modifier", "optimizer", "optimizers", "lr_scale", "ignore", *POLICIES)
_RESERVED = {
    "params": "a group selects its parameters by patterns",
    "param_names": "torch writes it from the names of the parameters",
    "name": "it names one group",
    "match": "it belongs in one group or modifier",
    "rest": "it belongs in one group",
    "optional": "it belongs in one group or modifier",
    "freeze": "it belongs in one group",
    "optimizer": "it belongs at the top of the spec, or in one group",
    "layers": "it belongs in one [[modifier]]",
    "layer_decay": "it belongs in one [[modifier]], together with layers",
    "min_scale": "it belongs in one [[modifier]], together with layers",
}
_LAYER_KEYS = ("layers", "layer_decay", "min_scale")
_NUMBERS = ("lr", "weight_decay")  # options that every torch.optim class uses as one number, 0 or more
_MULTIPLE = "_mult"  # lr_mult = 10 multiplies lr
_EXAMPLE = 'for example [[group]] with params = "head.*" and lr = 0.01, then one with rest = true'
_LAYERS = 'layers = [["embed.*"], "blocks.{i:int}.*", ["norm.*", "head.*"]]'


def parse_spec(spec: SpecLike) -> ParamGroupSpec:
    """Return the checked spec of a TOML, JSON or YAML file, of its content, a list of groups, or a ``ParamGroupSpec``.

    A file is given by its path. Raises ``GroupsError``, which names the group, for an unknown key, a wrong pattern or a
    wrong option. Raises ``PathError`` where the file cannot be read, and ``RuleError`` where it is not a valid table.
    """
    if isinstance(spec, str | os.PathLike):
        return _parse_file(os.fsdecode(spec))
    if isinstance(spec, ParamGroupSpec):
        return _checked(spec)
    table: Mapping[Any, Any] = spec if isinstance(spec, Mapping) else {"group": spec}
    unknown = sorted(str(key) for key in table if key not in _SPEC_KEYS)
    if unknown:
        raise GroupsError(
            f"the spec has the unknown key {quoted(unknown[0])}",
            hint="a spec has [defaults], [[group]] and [[modifier]] tables; options go into one of them",
        )
    groups = _tables(table.get("group", []), "group", _EXAMPLE)
    modifiers = _tables(
        table.get("modifier", []), "modifier", 'for example [[modifier]] with match = { role = "bias" }'
    )
    optimizers = _options_table(table.get("optimizers", {}), "optimizers", "write [optimizers.AdamW] lr = 0.001")
    parsed = ParamGroupSpec(
        tuple(map(_rule, groups, range(1, len(groups) + 1))),
        dict(_options_table(table.get("defaults", {}), "defaults", "write [defaults] lr = 0.001")),
        tuple(map(_modifier, modifiers, range(1, len(modifiers) + 1))),
        _class_name(table, "the spec"),
        {
            name: dict(_options_table(options, f"optimizers.{name}", f"write [optimizers.{name}] lr = 0.001"))
            for name, options in optimizers.items()
        },
        ignore=_ignore(table.get("ignore", ())),
        **{policy: table[policy] for policy in (*POLICIES, "lr_scale") if policy in table},
    )
    return _checked(parsed)


def _parse_file(path: str) -> ParamGroupSpec:
    try:
        with default_error_path(path):
            return parse_spec(read_table_file(path))
    except PathError as error:
        error.hint = error.hint or "a spec is a file, its content, or param_group_preset(name, model)"
        raise


def _ignore(given: Any) -> tuple[str, ...]:
    """Return the texts of an ignore list, checked."""
    try:
        return tuple(entry.text for entry in parse_ignore(given))
    except RuleError as error:
        raise GroupsError(error.reason, hint=error.hint) from None


def is_spec(value: object) -> bool:
    """Return whether ``value`` is a spec or has the tables of one, so that it cannot be the options of a group."""
    tables = ("group", "modifier", "defaults", "optimizers")
    return isinstance(value, ParamGroupSpec) or (isinstance(value, Mapping) and any(key in value for key in tables))


def _tables(tables: object, key: str, example: str) -> Sequence[Any]:
    if isinstance(tables, str | bytes) or not isinstance(tables, Sequence):
        raise GroupsError(f"the {key}s of a spec are {kind_of(tables)}, not a list of tables", hint=f"write {example}")
    return tables


def _options_table(table: object, where: str, example: str) -> Mapping[str, Any]:
    if not isinstance(table, Mapping):
        raise GroupsError(f"{where} is {kind_of(table)}, not a table of options", hint=example)
    return table


def _rule(table: Mapping[str, Any] | GroupRule, number: int) -> GroupRule:
    if isinstance(table, GroupRule):
        return table
    where, name = _where(table, "group", number)
    for key in ("rest", "optional", "freeze"):
        _flag(table, key, where)
    rest = table.get("rest", False)
    if rest and "params" in table:
        raise GroupsError(f"{where} has both params and rest = true", hint="keep one of them")
    if not rest and "params" not in table and "match" not in table:
        raise GroupsError(
            f"{where} has none of params, match and rest = true",
            hint='write params = "head.*", or rest = true for every parameter that no earlier group owns',
        )
    patterns = _patterns(table["params"], where) if "params" in table else ()
    options, multiples = _options(table, _GROUP_KEYS, where)
    return GroupRule(
        name or (patterns[0].text if patterns else "rest" if rest else f"group {number}"),
        patterns,
        options,
        rest,
        table.get("optional", False),
        parse_condition(table["match"], where) if "match" in table else None,
        multiples,
        _class_name(table, where),
        table.get("freeze", False),
    )


def _modifier(table: Mapping[str, Any] | Modifier, number: int) -> Modifier:
    if isinstance(table, Modifier):
        return table
    where, name = _where(table, "modifier", number)
    _flag(table, "optional", where)
    options, multiples = _options(table, _MODIFIER_KEYS, where)
    return Modifier(
        name or f"modifier {number}",
        _patterns(table["params"], where) if "params" in table else (),
        options,
        table.get("optional", False),
        parse_condition(table["match"], where) if "match" in table else None,
        multiples,
        _layers(table, where),
    )


def _where(table: object, kind: str, number: int) -> tuple[str, str | None]:
    where = f"[[{kind}]] {number}"
    if not isinstance(table, Mapping):
        raise GroupsError(f"{where} is {kind_of(table)}, not a table", hint=_EXAMPLE)
    name = table.get("name")
    if name is None:
        return where, None
    if not (isinstance(name, str) and name):
        raise GroupsError(f"{where}: name is {kind_of(name)}, not a name", hint='write name = "head"')
    return f"[[{kind}]] {quoted(name)}", name


def _flag(table: Mapping[str, Any], key: str, where: str) -> None:
    if not isinstance(table.get(key, False), bool):
        raise GroupsError(
            f"{where}: {key} is {kind_of(table[key])}, not true or false", hint=f"write {key} = true, or leave it out"
        )


def _class_name(table: Mapping[str, Any], where: str) -> str | None:
    name = table.get("optimizer")
    if name is not None and not (isinstance(name, str) and name):
        raise GroupsError(
            f"{where}: optimizer is {kind_of(name)}, not the name of a class", hint='write optimizer = "AdamW"'
        )
    return name


def _patterns(given: object, where: str) -> tuple[Pattern, ...]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise GroupsError(
            f"{where}: params is {kind_of(given)}, not a pattern or a list of patterns",
            hint='params takes names, not tensors: params = "head.*"',
        )
    if not texts:
        raise GroupsError(
            f"{where}: params is an empty list", hint='write the names that the group owns: params = "head.*"'
        )
    try:
        return tuple(map(parse_pattern, texts))
    except RuleError as error:
        raise GroupsError(f"{where}: {error.reason}", hint=error.hint) from None


def _options(table: Mapping[str, Any], own: Sequence[str], where: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the options that a table sets, and the factors of its ``_mult`` options."""
    options = {key: value for key, value in table.items() if key not in own}
    multiples = {
        key.removesuffix(_MULTIPLE): options.pop(key)
        for key in list(options)
        if str(key).endswith(_MULTIPLE) and key != _MULTIPLE
    }
    for key, factor in multiples.items():
        fault = number_fault(factor)
        if fault is not None:
            raise GroupsError(
                f"{where}: {key}{_MULTIPLE} {fault}", hint=f"write a finite number, 0 or more: {key}{_MULTIPLE} = 10"
            )
        if key in options:
            raise GroupsError(f"{where} has both {key} and {key}{_MULTIPLE}", hint="keep one of them")
    return options, multiples


def _layers(table: Mapping[str, Any], where: str) -> Layers | None:
    if "layers" not in table:
        for key in _LAYER_KEYS[1:]:
            if key in table:
                raise GroupsError(
                    f"{where} has {key} but no layers", hint=f"list the layers from input to output: {_LAYERS}"
                )
        return None
    levels = table["layers"]
    if isinstance(levels, str) or not isinstance(levels, list | tuple) or not levels:
        raise GroupsError(f"{where}: layers is {kind_of(levels)}, not a list of patterns", hint=f"write {_LAYERS}")
    if "layer_decay" not in table:
        raise GroupsError(f"{where} has layers but no layer_decay", hint="write layer_decay = 0.75")
    for key in _LAYER_KEYS[1:]:
        fault = number_fault(table.get(key, 0))
        if fault is not None:
            raise GroupsError(f"{where}: {key} {fault}", hint=f"write a number, 0 or more: {key} = 0.75")
    return Layers(
        tuple(_patterns(level, f"{where}, layers") for level in levels),
        float(table["layer_decay"]),
        float(table.get("min_scale", 0)),
    )


def _checked(spec: ParamGroupSpec) -> ParamGroupSpec:
    """Return ``spec`` after the checks that apply to tables and to specs made in Python."""
    if not spec.rules:
        raise GroupsError("the spec has no group", hint=_EXAMPLE)
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
    _ignore(spec.ignore)
    return spec


def _check_modifiers(spec: ParamGroupSpec) -> None:
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


def _check_policies(spec: ParamGroupSpec) -> None:
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
            hint = f"[[modifier]] {_LAYERS}, layer_decay = 0.75" if key in _LAYER_KEYS else f"leave {key} out"
            raise GroupsError(f"{where}: {key} is not an option: {_RESERVED[key]}", hint=hint)
        fault = number_fault(value) if key in _NUMBERS else None
        if fault is not None:
            raise GroupsError(f"{where}: {key} {fault}", hint=f"write a finite number, 0 or more: {key} = 0.01")
