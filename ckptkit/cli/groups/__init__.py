"""``$ ckpt groups``: one file a subcommand."""

from __future__ import annotations

import click

from ckptkit.cli.groups.table import table
from ckptkit.cli.groups.validate import validate

__all__ = ["groups"]


@click.group()
def groups() -> None:
    """Check which parameter trains with which options, against the live model."""


for _command in (table, validate):
    groups.add_command(_command)
