"""What a command prints: results to stdout, messages to stderr, each exactly one harmless line."""

from __future__ import annotations

import sys

import click

from ckptkit.errors import one_line

__all__ = ["put", "tell"]


def put(line: str, *, colour: str | None = None) -> None:
    """Print a line of a result, in a colour where the terminal has any and the user wants it."""
    # Named, since click gives a stream of ASCII an encoding of its own, whose bytes such a terminal may obey.
    click.echo(click.style(line, fg=colour) if colour else line, file=sys.stdout)


def tell(message: str) -> None:
    """Print a message, on one line whatever is in it."""
    click.echo(one_line(message), file=sys.stderr)
