"""The options that make rename rules, for every command that takes rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import takewhile

import click

from ckptkit.cli.common.completing import complete_renames, complete_rules
from ckptkit.cli.common.inputs import default_error_path, file_beside, read_table_file
from ckptkit.cli.common.options import PATH_TYPE, CommandFunction, add_options, filter_options
from ckptkit.cli.common.printing import print_line
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import parse_rules, rule_lines

__all__ = ["rule_options"]

_CONFIG = "config.json"


def rule_options(beside: str) -> Callable[[CommandFunction], CommandFunction]:
    """Add every option that makes rules, and pass the rules to the command as ``rules``.

    The order of the options does not count: keep comes first, then drop, then strip, then rename. ``beside`` is the
    name of the argument with the path of the checkpoint. Rule files may refer to the ``config.json`` in its directory.
    """

    def decorate(command: CommandFunction) -> CommandFunction:
        @functools.wraps(command)
        def with_rules(
            *args: object,
            rename: tuple[str, ...],
            keep: tuple[str, ...],
            drop: tuple[str, ...],
            strip: tuple[str, ...],
            rules_file: str | None,
            settings: tuple[str, ...],
            allow_unused: bool,
            **others: object,
        ) -> object:
            if settings and rules_file is None:
                raise click.UsageError("--set sets a variable of a rule file, so it needs --rules")
            parse = functools.partial(
                parse_rules, rename=rename, keep=keep, drop=drop, strip=strip, allow_unused=allow_unused
            )
            if rules_file is None:
                return command(*args, rules=parse(), **others)
            rules = _read_rules(rules_file, parse, settings, _first_path(others[beside]))
            return command(*args, rules=rules, **others)

        return add_options(
            with_rules, _rename_option, filter_options, _strip_option, _rules_option, _set_option, _allow_unused_option
        )

    return decorate


def _first_path(paths: object) -> str:
    """Return the path that an argument holds, the first of several, or an empty string."""
    if isinstance(paths, tuple):
        paths = paths[0] if paths else ""
    return paths if isinstance(paths, str) else ""


def _read_rules(path: str, parse: Callable[..., Rules], settings: tuple[str, ...], checkpoint: str) -> Rules:
    from ckptkit.rules.variables import Settings, parse_setting

    given = Settings(dict(map(parse_setting, settings)), _config_reader(checkpoint))
    with default_error_path(path):
        text = _rules_text(path)
        return parse(file=read_table_file(path, text), lines=rule_lines(text), settings=given)


def _rules_text(path: str) -> str:
    from ckptkit.rules.presets import PRESET_PREFIX, preset_text

    if path.startswith(PRESET_PREFIX):
        return preset_text(path.removeprefix(PRESET_PREFIX))
    from ckptkit.core.config_files import format_of, read_text_file

    return read_text_file(path, format_of(path))


def _config_reader(path: str) -> Callable[[], Mapping[str, object]] | None:
    """Return the function that reads the configuration beside a checkpoint, or None if there is none."""
    config = file_beside(path, _CONFIG)
    return None if config is None else functools.partial(read_table_file, config)


def _list_presets(context: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """Print the name and the description of every preset, and exit, if the value is ``preset:?``."""
    if value is None:
        return None
    from ckptkit.rules.presets import PRESET_PREFIX, preset_names, preset_text

    if value == f"{PRESET_PREFIX}?":
        for name in preset_names():
            print_line(name)
            for line in takewhile(lambda line: line.startswith("#"), preset_text(name).splitlines()):
                print_line(f"  {line.removeprefix('#').strip()}".rstrip())
        context.exit()
    return value


_rename_option = click.option(
    "--rename", multiple=True, metavar="OLD=NEW", shell_complete=complete_renames,
    help="Rename keys, as in 'module.*=*'. Repeatable.",
)  # fmt: skip
_strip_option = click.option(
    "--strip", multiple=True, metavar="auto|PREFIX",
    help="Remove a prefix from every key. auto removes those of DataParallel, torch.compile, FSDP and other wrappers, "
    "and says which. Repeatable.",
)  # fmt: skip
_rules_option = click.option(
    "--rules", "rules_file", type=PATH_TYPE, metavar="FILE", is_eager=True, callback=_list_presets,
    shell_complete=complete_rules,
    help="Read rules from a TOML file, or from preset:NAME (preset:? lists the presets).",
)  # fmt: skip
_set_option = click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE",
    help="Set a variable of the rule file, such as heads=32. Repeatable.",
)  # fmt: skip
_allow_unused_option = click.option("--allow-unused", is_flag=True, help="A rule may match nothing.")
