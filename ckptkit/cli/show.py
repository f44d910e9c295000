"""``$ ckpt show``."""

from __future__ import annotations

import click

from ckptkit.cli.options import (
    Form,
    about,
    echo_report,
    expand_option,
    filter_options,
    form_options,
    opened,
    path_argument,
    quiet_option,
)
from ckptkit.render.show import show_document, show_page, show_tree
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.parse import parse_rules

__all__ = ["show"]


@click.command()
@path_argument("path")
@filter_options
@click.option("--tree", is_flag=True, help="Show modules as a tree, with what is below each.")
@expand_option
@form_options
@quiet_option
def show(
    path: str, *, keep: tuple[str, ...], drop: tuple[str, ...], tree: bool, expand: bool, form: Form, quiet: bool
) -> None:
    """Show what is in a checkpoint: tensors, other entries, metadata, warnings.

    Reads headers only, imports nothing that the file names, and runs none of it.

    \b
    ckpt show model.safetensors
    ckpt show run.ckpt --tree --keep 'encoder.*'
    ckpt show run.ckpt::optimizer --json
    """  # noqa: D301 - \b is click's mark
    with opened(path, quiet=quiet) as (checkpoint,), about(path):
        chosen = apply_rules(parse_rules(keep=keep, drop=drop), checkpoint).renamed
        infos = {key: checkpoint[key] for key in chosen}
        echo_report(
            form,
            lambda: show_tree(checkpoint, infos) if tree else show_page(checkpoint, infos, expand=expand),
            lambda: show_document(checkpoint, infos),
        )
