"""``$ ckpt groups``: one file a subcommand."""

from __future__ import annotations

import click

from ckptkit.cli.emit import emit
from ckptkit.cli.explain import explain
from ckptkit.cli.groups_diff import diff
from ckptkit.cli.lock import lock
from ckptkit.cli.table import table
from ckptkit.cli.validate import validate

__all__ = ["groups"]


@click.group()
def groups() -> None:
    """Check which parameter trains with which options, against the live model."""


for _command in (table, validate, emit, explain, lock, diff):
    groups.add_command(_command)
