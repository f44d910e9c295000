"""Read rule files, and make rules of whatever a function of the Python API accepts as rules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from ckptkit.core.arguments import require_path, require_strings, require_type
from ckptkit.core.files.places import clean_path, is_url, kind_at
from ckptkit.core.text import kind_of, quoted
from ckptkit.errors import PathError, RuleError
from ckptkit.rules.gguf import GGUF_PREFIX, gguf_rules
from ckptkit.rules.model import Rules, RulesLike
from ckptkit.rules.parse import FILE_KEYS, are_strings, parse_rules, rule_lines
from ckptkit.rules.transformers import LIBRARY_PREFIX, library_rules

__all__ = ["PRESET_PREFIX", "as_rules", "load_rules", "preset_rules"]

PRESET_PREFIX = "preset:"
_FORMS = (
    'rules is the path of a rule file, "preset:NAME", "transformers:auto", "gguf:auto", or a list of renames "OLD=NEW"'
)
_CONFIG = "config.json"


def load_rules(
    path: str | os.PathLike[str],
    *,
    variables: Mapping[str, int | str] | None = None,
    config: object = None,
) -> Rules:
    """Return the rules in a rule file, for ``diff``, ``load_into``, ``plan_remap`` and any other ``rules``.

    Args:
        path: A TOML, JSON or YAML file, or ``preset:NAME`` for a preset. ``transformers:MODEL_TYPE`` stands for what
            ``from_pretrained`` does to the names and tensors of a file, ``transformers:auto`` for that of the model
            type in ``config.json``. ``:reverse`` after either stands for what ``save_pretrained`` does. ``gguf:auto``
            makes a GGUF file into a file of transformers.
        variables: Values that replace those in ``[vars]`` of the file: integers, or arithmetic as text.
        config: The configuration of the model, from which ``"config:NAME"`` in ``[vars]`` takes integers: the path of
            ``config.json`` or of its directory, its content, or an object with ``to_dict()``. A file is read only
            where a variable needs it.

    Raises:
        PathError: A file cannot be read.
        RuleError: A rule or a variable is not valid, or the value of a variable is not known.

    Example:
        >>> rules = load_rules("preset:llama-meta-to-hf", variables={"heads": 32, "kv_heads": 8})
        >>> len(rules.stages)
        1
    """
    require_path(path, "path")
    require_type(variables, Mapping | None, "variables", 'a mapping, such as {"heads": 32}')
    require_strings(variables or (), "variables", 'a mapping, such as {"heads": 32}')
    from ckptkit.core.config_files import default_error_path, format_of, read_settings, read_table_file
    from ckptkit.rules.variables import Settings

    name = clean_path(os.fsdecode(path))
    if name.startswith((LIBRARY_PREFIX, GGUF_PREFIX)):
        is_gguf = name.startswith(GGUF_PREFIX)
        if variables:
            place = "the metadata of the file" if is_gguf else "config.json"
            raise RuleError(f"{quoted(name)} has no variables", hint=f"its numbers are in {place}")
        return gguf_rules(name) if is_gguf else library_rules(name, config)
    given = {variable: str(value) for variable, value in (variables or {}).items()}
    settings = Settings(given, None if config is None else lambda: read_settings(config, _CONFIG))
    with default_error_path(name):
        text = _text_of(name)
        lines = rule_lines(text) if format_of(name) == "toml" else ()
        return parse_rules(file=read_table_file(name, text), lines=lines, settings=settings)


def preset_rules(name: str, variables: Mapping[str, int] | None = None, *, config: object = None) -> Rules:
    """Return the rules of a preset, for ``plan_remap``, ``diff`` and ``load_into``.

    ``config`` is the configuration of the model, as in ``load_rules``, with numbers that shapes do not tell, such as
    the number of heads. ``variables``, such as ``{"heads": 32}``, replace values of the configuration. Raises
    ``RuleError`` for an unknown preset or variable, and where a value is neither in ``variables`` nor in ``config``.

    Example:
        >>> rules = ckptkit.preset_rules("llama-meta-to-hf", {"heads": 32, "kv_heads": 8})
        >>> len(rules.stages[0].rules)
        13
    """
    require_type(name, str, "name", "a str")
    return load_rules(f"{PRESET_PREFIX}{name}", variables=variables, config=config)


def as_rules(rules: RulesLike | None, *, config: object = None) -> Rules:
    """Return the rules that an argument of the Python API describes.

    The argument is the path of a rule file or ``preset:NAME``. It may also be a list of renames ``"OLD=NEW"``, the
    content of a rule file, ``Rules``, or None. ``config`` is the configuration that a file may refer to, as in
    ``load_rules``. Raises ``RuleError`` for any other value and for a rule that is not valid, and ``PathError`` for a
    file that cannot be read.
    """
    if isinstance(rules, Rules):
        return rules
    if rules is None:
        return Rules()
    if isinstance(rules, Mapping):
        _refuse_renames(rules)
        return parse_rules(file=rules)
    if isinstance(rules, str | os.PathLike):
        return _rules_at(clean_path(os.fsdecode(rules)), config)
    given: object = rules  # the caller may have passed anything
    renames: list[object] = list(given) if isinstance(given, Iterable) else [given]
    if not are_strings(renames):
        wrong = next(item for item in renames if not isinstance(item, str))
        raise RuleError(f"a rule is {kind_of(wrong)}", hint='pass a list of renames: rules=["OLD=NEW"]')
    return parse_rules(rename=renames)


def _refuse_renames(rules: Mapping[str, object]) -> None:
    """Raise ``RuleError`` for a mapping of old names to new names, which is not the content of a rule file."""
    old = next((old for old, new in rules.items() if isinstance(new, str) and old not in FILE_KEYS), None)
    if old is not None:
        raise RuleError(
            f"rules is a mapping with the key {quoted(str(old))}, which no rule file has",
            hint=f"pass renames as a list: rules=[{f'{old}={rules[old]}'!r}]",
        )


def _rules_at(path: str, config: object) -> Rules:
    """Return the rules in the file ``path``; a text that is a rename, and not a file, raises an error that says so."""
    if "\n" in path and not kind_at(path):
        raise RuleError("rules is a text, not the path of a file", hint="parse it first: tomllib.loads(text)")
    if "=" in path and not is_url(path) and not kind_at(path):
        raise RuleError(
            f"rules is the string {quoted(path)}, which names no file", hint=f"pass a list: rules=[{path!r}]"
        )
    try:
        return load_rules(path, config=config)
    except PathError as error:
        error.hint = error.hint or _FORMS
        raise


def _text_of(path: str) -> str:
    if path.startswith(PRESET_PREFIX):
        from ckptkit.rules.presets import preset_text

        return preset_text(path.removeprefix(PRESET_PREFIX))
    from ckptkit.core.config_files import format_of, read_text_file

    return read_text_file(path, format_of(path))
