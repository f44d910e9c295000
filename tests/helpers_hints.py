"""Read the commands and options in hints, and check them against the commands of ``ckpt``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache

import click

from ckptkit.cli.common.program import ckpt
from ckptkit.errors import COMMAND, OPTION

__all__ = ["FOREIGN", "OF_GIT", "all_options", "commands", "commands_in", "options_in", "problems_of_hint"]

FOREIGN = frozenset(  # of other programs, and of all
    {"--dist-ckpt-format", "--dequantize", "--repo-type", "--revision", "--help", "--help-all"}
)
OF_GIT = frozenset(  # that the commands of ckpt git give to git
    {
        "--end-of-options", "--full-name", "--get", "--git-common-dir", "--literal-pathspecs",
        "--local", "--replace-all", "--show-toplevel", "--stage", "--stdin", "--type", "--unset-all",
    }
)  # fmt: skip
_LONG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


@cache
def commands() -> dict[str, click.Command]:
    """Return every command by its words, such as ``optim prune``."""
    return dict(_walk(ckpt, ""))


def _walk(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _walk(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _options_of(command: click.Command) -> set[str]:
    return {name for param in command.params for name in param.opts if name.startswith("--")}


@cache
def all_options() -> frozenset[str]:
    """Return the long names of the options of all commands."""
    return frozenset[str]().union(*map(_options_of, commands().values()), {"--version"})


def commands_in(hint: str) -> list[list[str]]:
    """Return the words of each whole command in a hint, without ``ckpt``."""
    return [shlex.split(match[0])[1:] for match in COMMAND.finditer(hint) if match["words"]]


def options_in(hint: str) -> list[list[str]]:
    """Return the words of each option outside of commands; those that stand side by side are given together."""
    text, end = COMMAND.sub("", hint), -2
    rows: list[list[str]] = []
    for match in OPTION.finditer(text):
        words = shlex.split(match[0])
        if match.start() == end + 1 and text[end] == " ":
            rows[-1] += words
        else:
            rows.append(words)
        end = match.end()
    return rows


def problems_of_hint(arguments: Sequence[str], hint: str) -> list[str]:
    """Return what is wrong with a hint that ``ckpt`` printed when it ran with ``arguments``."""
    problems = []
    for words in commands_in(hint):
        if "--help" in words:
            continue
        name = next(name for name in (" ".join(words[:2]), words[0]) if name in commands())
        command, rest = commands()[name], words[len(name.split()) :]
        try:
            given, _, _ = command.make_parser(click.Context(command)).parse_args(list(rest))
        except click.UsageError as error:
            problems.append(f"ckpt {' '.join(words)}: {error.format_message()}")
            continue
        missing = [param.name for param in command.params if param.required and not given.get(str(param.name))]
        if missing:
            problems.append(f"ckpt {' '.join(words)} lacks {missing}")
    ran = commands().get(" ".join(arguments[:2])) or commands().get(arguments[0] if arguments else "")
    allowed = FOREIGN | (_options_of(ran) if ran is not None else all_options())
    named = _LONG.findall(COMMAND.sub("", hint))
    problems += [f"{name} is not an option of ckpt {' '.join(arguments[:2])}" for name in named if name not in allowed]
    return problems
