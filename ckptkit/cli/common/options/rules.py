"""The options that make rename rules, for every command that takes rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import takewhile

import click

from ckptkit.cli.common.completing import complete_renames, complete_rules
from ckptkit.cli.common.options import PATH_TYPE, CommandFunction, add_options, filter_options
from ckptkit.cli.common.printing import print_line
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import parse_rules

__all__ = ["rule_options"]

_CONFIG = "config.json"


def rule_options(beside: str, or_beside: str | None = None) -> Callable[[CommandFunction], CommandFunction]:
    """Add every option that makes rules, and pass the rules to the command as ``rules``.

    The order of the options does not count: keep comes first, then drop, then strip, then rename. ``beside`` is the
    name of the argument with the path of the checkpoint. Rule files may refer to the ``config.json`` in its directory.
    ``or_beside`` names another such argument, for where there is no ``config.json`` beside the first.
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
            rules = parse_rules(rename=rename, keep=keep, drop=drop, strip=strip, allow_unused=allow_unused)
            if rules_file is not None:
                paths = [_first_path(others[name]) for name in (beside, or_beside) if name is not None]
                loaded = _load_rules(rules_file, settings, paths)
                rules = replace(rules, stages=rules.stages + loaded.stages)
            return command(*args, rules=rules, **others)

        filters = functools.partial(filter_options, of="FOUND" if beside == "found" else "")
        return add_options(
            with_rules, _rename_option, filters, _strip_option, _rules_option, _set_option, _allow_unused_option
        )

    return decorate


def _first_path(paths: object) -> str:
    """Return the path that an argument holds, the first of several, or an empty string."""
    if isinstance(paths, tuple):
        paths = paths[0] if paths else ""
    return paths if isinstance(paths, str) else ""


def _load_rules(path: str, settings: tuple[str, ...], checkpoints: Iterable[str]) -> Rules:
    """Return the rules in a file, which may refer to the configuration beside the first checkpoint that has one."""
    from ckptkit.formats.directories.side_files import file_beside
    from ckptkit.rules.load import load_rules
    from ckptkit.rules.variables import parse_setting

    beside = (file_beside(checkpoint, _CONFIG) for checkpoint in checkpoints)
    config = next(filter(None, beside), None)
    return load_rules(path, variables=dict(map(parse_setting, settings)), config=config)


def _list_presets(context: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """Print the name and the description of every preset, and exit, if the value is ``preset:?``."""
    if value is None:
        return None
    from ckptkit.rules.load import PRESET_PREFIX
    from ckptkit.rules.presets import preset_names, preset_text

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
    help="Read rules from a TOML file, or from preset:NAME (preset:? lists the presets). transformers:auto is what "
    "from_pretrained does to the file of a model type, transformers:auto:reverse what save_pretrained does; "
    "transformers:MODEL_TYPE names the model type. gguf:auto gives a GGUF file the names and layout of transformers.",
)  # fmt: skip
_set_option = click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE",
    help="Set a variable of the rule file, such as heads=32. Repeatable.",
)  # fmt: skip
_allow_unused_option = click.option("--allow-unused", is_flag=True, help="Allow rules and patterns that match nothing.")
