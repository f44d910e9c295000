"""``$ ckpt diff``."""

from __future__ import annotations

import click

from ckptkit.cli.options import (
    Form,
    about,
    echo_report,
    expand_option,
    form_options,
    opened,
    path_argument,
    quiet_option,
    tell,
)
from ckptkit.cli.rules import rule_options
from ckptkit.comparison import diff as compare
from ckptkit.render.diff import diff_document, diff_page
from ckptkit.rules.model import Rules

__all__ = ["diff"]

_COLOURS = {"+": "green", "-": "red", "~": "yellow", "≈": "yellow"}


@click.command()
@path_argument("expected")
@path_argument("found")
@rule_options(beside="found")
@click.option("-a", "--all", "everything", is_flag=True, help="List matched keys too.")
@expand_option
@form_options
@quiet_option
@click.pass_context
def diff(
    context: click.Context,
    expected: str,
    found: str,
    *,
    rules: Rules,
    everything: bool,
    expand: bool,
    form: Form,
    quiet: bool,
) -> None:
    """Compare what a model expects with what a checkpoint has.

    EXPECTED is what the model wants, FOUND what is there; the rules rename and filter the keys of FOUND
    first. Exit code 0 where nothing differs, 1 where something does. No tensor is read.

    \b
    ckpt diff py:mynet:build pretrained.pth
    ckpt diff base.safetensors run.ckpt --strip auto
    ckpt diff base.safetensors run.ckpt --rename 'h.*=layers.*'
    """  # noqa: D301 - \b is click's mark
    with opened(expected, found, quiet=quiet) as (left, right):
        with about(found):
            result = compare(left, right, rules)
        echo_report(
            form,
            lambda: diff_page(result, left, right, expand=expand, everything=everything),
            lambda: diff_document(result, left, right),
            _COLOURS,
        )
        for note in () if quiet else result.notes:
            tell(note)
        if form is not Form.JSON and not quiet:
            for hint in result.hints:
                tell(f"hint: {hint.message}")
    context.exit(1 if result.different else 0)
