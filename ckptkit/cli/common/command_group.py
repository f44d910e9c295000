"""A group of commands that prints its whole help on stderr where no command is given, with every version of click."""

from __future__ import annotations

import click

__all__ = ["CommandGroup", "NoCommandError"]


class NoCommandError(click.UsageError):
    """No command was given; the message is the help of the group."""


class CommandGroup(click.Group):
    """A group that raises ``NoCommandError`` where no command is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return the arguments of the command."""
        if not args and not ctx.resilient_parsing:
            raise NoCommandError(ctx.get_help(), ctx=ctx)
        return super().parse_args(ctx, args)
