"""Parse and check a spec, given as a TOML, JSON or YAML table or as Python objects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ckptkit.core.config_files import default_error_path, read_table_file
from ckptkit.core.files.places import clean_path, kind_at
from ckptkit.core.text import kind_of, quoted
from ckptkit.errors import GroupsError, PathError
from ckptkit.param_groups.spec import ParamGroupSpec
from ckptkit.param_groups.spec.checks import checked
from ckptkit.param_groups.spec.fields import POLICIES, GroupRule
from ckptkit.param_groups.spec.tables import EXAMPLE, class_name, ignore_list, parse_group, parse_modifier

__all__ = ["SpecLike", "is_spec", "parse_spec"]

# The path of a TOML, JSON or YAML file, its parsed content, a list of groups, or a spec.
SpecLike: TypeAlias = (
    ParamGroupSpec | str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any] | GroupRule]
)

_SPEC_KEYS = ("defaults", "group", "modifier", "optimizer", "optimizers", "lr_scale", "ignore", *POLICIES)


def parse_spec(spec: SpecLike) -> ParamGroupSpec:
    """Return the checked spec of a TOML, JSON or YAML file, of its parsed content, of a list of groups, or a spec.

    A file is given by its path. Raises ``GroupsError``, which names the group, for an unknown key, a wrong pattern or a
    wrong option. Raises ``PathError`` where the file cannot be read, and ``RuleError`` where it is not a valid table.
    """
    if isinstance(spec, str | os.PathLike):
        return _parse_file(clean_path(os.fsdecode(spec)))
    if isinstance(spec, ParamGroupSpec):
        return checked(spec)
    table: Mapping[Any, Any] = spec if isinstance(spec, Mapping) else {"group": spec}
    unknown = sorted(str(key) for key in table if key not in _SPEC_KEYS)
    if unknown:
        raise GroupsError(
            f"the spec has the unknown key {quoted(unknown[0])}",
            hint="a spec has [defaults], [[group]] and [[modifier]] tables; options go into one of them",
        )
    groups = _tables(table.get("group", []), "group", EXAMPLE)
    modifiers = _tables(
        table.get("modifier", []), "modifier", 'for example [[modifier]] with match = { role = "bias" }'
    )
    optimizers = _options_table(table.get("optimizers", {}), "optimizers", "write [optimizers.AdamW] lr = 0.001")
    parsed = ParamGroupSpec(
        tuple(map(parse_group, groups, range(1, len(groups) + 1))),
        dict(_options_table(table.get("defaults", {}), "defaults", "write [defaults] lr = 0.001")),
        tuple(map(parse_modifier, modifiers, range(1, len(modifiers) + 1))),
        class_name(table, "the spec"),
        {
            name: dict(_options_table(options, f"optimizers.{name}", f"write [optimizers.{name}] lr = 0.001"))
            for name, options in optimizers.items()
        },
        ignore=ignore_list(table.get("ignore", ())),
        **{policy: table[policy] for policy in (*POLICIES, "lr_scale") if policy in table},
    )
    return checked(parsed)


def _parse_file(path: str) -> ParamGroupSpec:
    if "\n" in path and not kind_at(path):
        raise GroupsError("the spec is a text, not the path of a file", hint="parse it first: tomllib.loads(text)")
    try:
        with default_error_path(path):
            return parse_spec(read_table_file(path))
    except PathError as error:
        if error.hint is None:
            error.hint = "a spec is a file of TOML, JSON or YAML"
            error.call = "a spec is a file, its parsed content, or param_group_preset(name, model)"
        raise


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
