"""The classes of commands and groups of commands: the order of options in ``--help``, and ``--help-all``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Final

import click

from ckptkit.cli.common.hints import NoSuchCommandError, hint_for_command
from ckptkit.cli.common.traffic import reported_traffic
from ckptkit.errors import CkptkitError

__all__ = ["MOST_OPTIONS", "Command", "CommandGroup", "NoCommandError"]

_IS_VERBOSE: Final = "ckptkit.verbose"  # in the meta of a context of click
MOST_OPTIONS: Final = 12  # that --help lists, beside the options for help

# The sections of a help page after the options that only this command has, and their options in order.
_SECTIONS: Final = {
    "Rules for keys": ("--rename", "--keep", "--drop", "--strip", "--rules", "--set", "--allow-unused"),
    "Output": (
        "--output", "--format", "--max-shard-size", "--force", "--continue", "--jobs", "--engine", "--carry",
        "--only-tensors", "--keep-unknown", "--metadata", "--drop-metadata", "--reflink", "--allow-overflow",
        "--verify", "--dry-run", "--plan", "--expand", "--report", "--html", "--json", "--markdown", "--wide",
        "--quiet", "--verbose",
    ),
}  # fmt: skip

# The options that --help leaves out first where a command has too many.
_RARE: Final = (
    "--verbose", "--engine", "--jobs", "--keep-unknown", "--drop-metadata", "--metadata", "--reflink",
    "--only-tensors", "--continue",
    "--allow-overflow", "--quantize", "--skip-unread", "--elementwise",
    "--allow-unused", "--markdown", "--report", "--wide", "--expand", "--set",
    "--plan", "--quiet", "--scale", "--rank", "--invert", "--apply", "--names", "--form", "--on-missing",
    "--on-unexpected", "--format", "--verify", "--max-shard-size", "--resume-optimizer", "--shapes-only",
    "--ignore",
    "--carry", "--strip", "--weight", "--min-coverage", "--require", "--all", "--as-layer", "--depth", "--dtype",
    "--no-recipe", "--print", "--from-mergekit", "--again", "--density", "--param", "--only", "--base",
    "--atol", "--keep", "--html",
)  # fmt: skip

_HELP: Final = ("--help-methods", "--help-all", "--help")  # which have a section of their own


class Command(click.Command):
    """A command that lists the options that matter first in ``--help``, and the rare ones only in ``--help-all``.

    ``first`` names the options that its help page begins with, such as ``("--like", "--rename")``. ``usage`` has the
    words of the usual form of a command whose arguments are not always required.
    """

    def __init__(self, *args: Any, first: Sequence[str] = (), usage: Sequence[str] = (), **settings: Any) -> None:
        """Add ``--verbose``, and ``--help-all``, which ``--help`` lists only if it leaves options out."""
        super().__init__(*args, **settings)
        self.first = tuple(first)
        self.usage = tuple(usage)
        self._shows_all = False
        self.params.append(_verbose_option())
        self.params.append(_help_all_option(hidden=len(self._options()) <= MOST_OPTIONS))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return the arguments; every error names the command, also that of an option without its value."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; the hint of an error names only what this command takes."""
        try:
            with reported_traffic() if ctx.meta.get(_IS_VERBOSE) else nullcontext():
                return super().invoke(ctx)
        except CkptkitError as error:
            if error.hint:
                known = {*_RARE, "--dequantize", *(name for names in _SECTIONS.values() for name in names)}
                error.hint = hint_for_command(error.hint, self._options(), known) or None
            raise

    def _options(self) -> dict[str, click.Option]:
        """Return the options by their long name, in the order of the help page."""
        options = {_long_name(param): param for param in self.params if isinstance(param, click.Option)}
        for name in _HELP:
            options.pop(name, None)
        shared = [name for names in _SECTIONS.values() for name in names]
        own = [name for name in options if name not in shared]
        return {name: options[name] for name in dict.fromkeys((*self.first, *own, *shared)) if name in options}

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return the words of the usage line, with the required options after the arguments."""
        if self.usage:
            return [str(self.options_metavar), *self.usage]
        required = [option for option in self._options().values() if option.required]
        metavars = [f"{option.opts[0]} {option.metavar or str(option.name).upper()}" for option in required]
        return [*super().collect_usage_pieces(ctx), *metavars]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections: the options of this command, those for rules, those for outputs."""
        options = self._options()
        left_out = () if self._shows_all else _rarest(options)
        for title, names in self.sections():
            records = [options[name].get_help_record(ctx) for name in names if name not in left_out]
            if rows := [record for record in records if record is not None]:
                with formatter.section(title):
                    formatter.write_dl(rows)
        helps = [param for param in self.get_params(ctx) if _long_name(param) in _HELP]
        if rows := [record for param in helps if (record := param.get_help_record(ctx)) is not None]:
            with formatter.section("Help"):
                formatter.write_dl(rows)

    def sections(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the title of each section of the help page, and the long names of its options in order."""
        options = self._options()
        shared = [name for names in _SECTIONS.values() for name in names if name not in self.first]
        yield "Options", [name for name in options if name not in shared]
        for title, names in _SECTIONS.items():
            yield title, [name for name in names if name in options and name not in self.first]

    def help_with_all_options(self, ctx: click.Context) -> str:
        """Return the help page with every option."""
        self._shows_all = True
        try:
            return self.get_help(ctx)
        finally:
            self._shows_all = False


def _long_name(param: click.Parameter) -> str:
    return max(param.opts, key=len)


def _rarest(options: dict[str, click.Option]) -> frozenset[str]:
    """Return the options that a short help page leaves out; required options always stay."""
    rare = [name for name in _RARE if name in options and not options[name].required]
    return frozenset(rare[: max(len(options) - MOST_OPTIONS, 0)])


def _verbose_option() -> click.Option:
    def remember(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        context.meta[_IS_VERBOSE] = value

    return click.Option(
        ["-v", "--verbose"], is_flag=True, expose_value=False, callback=remember,
        help="Say on stderr how much was read from and written to each store that a URL names.",
    )  # fmt: skip


def _help_all_option(*, hidden: bool) -> click.Option:
    def show(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing and isinstance(context.command, Command):
            click.echo(context.command.help_with_all_options(context))
            context.exit()

    return click.Option(
        ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=show,
        hidden=hidden, help="Show every option and exit.",
    )  # fmt: skip


class NoCommandError(click.UsageError):
    """No command was given; the message is the help of the group."""


class CommandGroup(click.Group):
    """A group that raises ``NoCommandError`` where no command is given, with every version of click."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return the arguments of the command."""
        if not args and not ctx.resilient_parsing:
            raise NoCommandError(ctx.get_help(), ctx=ctx)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names; the error is the same with every version of click."""
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            raise NoSuchCommandError(name, self.list_commands(ctx), ctx)
        return super().resolve_command(ctx, args)
