"""``$ ckpt groups table``."""

from __future__ import annotations

import click

from ckptkit.cli.groups.model import live_model, model_option
from ckptkit.cli.options import Form, about, echo_report, form_options, quiet_option, read_toml
from ckptkit.param_groups import plan_param_groups
from ckptkit.report.groups import groups_document, groups_page

__all__ = ["table"]


@click.command()
@model_option
@click.argument("spec", type=click.Path())
@form_options
@quiet_option
def table(model: str, spec: str, *, form: Form, quiet: bool) -> None:  # noqa: ARG001 - accepted everywhere
    """Show each group with its parameters, elements and options.

    \b
    ckpt groups table --model py:mynet:build groups.toml
    """  # noqa: D301 - quiet is accepted everywhere; \b is click's mark
    live = live_model(model)
    with about(spec):
        plan = plan_param_groups(live, read_toml(spec))
    echo_report(form, lambda: groups_page(plan), lambda: groups_document(plan))
