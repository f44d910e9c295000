"""The options that make rules, for every command that renames."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, TypeVar

import click

from ckptkit.cli.options import about, file_beside, filter_options, put, read_text, read_toml
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import parse_rules, rule_lines
from ckptkit.rules.presets import PRESET_PREFIX, preset_names, preset_text
from ckptkit.rules.variables import Settings, parse_setting

__all__ = ["rule_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_CONFIG = "config.json"


def rule_options(beside: str) -> Callable[[_Command], _Command]:
    """Add every option that makes rules, and pass them on as one ``rules`` argument.

    However they are mixed on the command line, keeping comes first, then dropping, then stripping, then renaming.
    ``beside`` names the argument of the command by whose checkpoint the ``config.json`` lies that rule files may
    refer to.
    """

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def with_rules(
            *args: Any,
            rename: tuple[str, ...],
            keep: tuple[str, ...],
            drop: tuple[str, ...],
            strip: tuple[str, ...],
            rules_file: str | None,
            settings: tuple[str, ...],
            allow_unused: bool,
            **others: Any,
        ) -> Any:
            if settings and rules_file is None:
                raise click.UsageError("--set gives a variable of a rule file, and there is no --rules")
            path = others[beside] if isinstance(others[beside], str) else next(iter(others[beside] or ()), "")
            given = Settings(dict(map(parse_setting, settings)), _config_of(path))
            rules = _read(
                rules_file, rename=rename, keep=keep, drop=drop, strip=strip, allow_unused=allow_unused, settings=given
            )
            return command(*args, rules=rules, **others)

        decorated: Any = with_rules
        for option in reversed(_OPTIONS):
            decorated = option(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate


def _list_presets(context: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """Print what the presets are, as their files say it, and end, where that is asked for in place of one."""
    if value == f"{PRESET_PREFIX}?":
        for name in preset_names():
            put(name)
            for line in takewhile(lambda line: line.startswith("#"), preset_text(name).splitlines()):
                put(f"  {line.removeprefix('#').strip()}".rstrip())
        context.exit()
    return value


_OPTIONS = (
    click.option("--rename", multiple=True, metavar="OLD=NEW", help="Rename keys, as in 'module.*=*'. Repeatable."),
    filter_options,
    click.option("--strip", multiple=True, metavar="auto|PREFIX",
                 help="Take a prefix off every key; auto undoes DataParallel, torch.compile, FSDP and other known "
                 "wrappers, and says which. Repeatable."),
    click.option("--rules", "rules_file", type=click.Path(), metavar="FILE", is_eager=True, callback=_list_presets,
                 help="Read rules from a TOML file, or those of preset:NAME (preset:? lists them)."),
    click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
                 help="Set a variable of the rule file, such as heads=32. Repeatable."),
    click.option("--allow-unused", is_flag=True, help="A rule that matches nothing is no error."),
)  # fmt: skip


def _read(path: str | None, **options: Any) -> Rules:
    if path is None:
        return parse_rules(**options)
    with about(path):
        preset = path.startswith(PRESET_PREFIX)
        text = preset_text(path.removeprefix(PRESET_PREFIX)) if preset else read_text(path)
        file = read_toml(path, text)
        return parse_rules(file=file, lines=rule_lines(text), **options)


def _config_of(path: str) -> Callable[[], Mapping[str, Any]] | None:
    """Return how to read the configuration beside a checkpoint, or None where there is none."""
    config = file_beside(path, _CONFIG)
    return None if config is None else functools.partial(read_toml, config)
