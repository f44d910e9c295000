"""``$ ckpt groups explain``."""

from __future__ import annotations

import click

from ckptkit.cli.model import live_model, model_option
from ckptkit.cli.options import Form, about, echo_report, form_options, quiet_option, read_toml
from ckptkit.param_groups.explain import explain_param_group
from ckptkit.render.explain import explain_document, explain_page

__all__ = ["explain"]


@click.command()
@model_option
@click.argument("spec", type=click.Path())
@click.argument("name")
@form_options
@quiet_option
def explain(model: str, spec: str, name: str, *, form: Form, quiet: bool) -> None:  # noqa: ARG001 - accepted everywhere
    """Say which rules of SPEC speak for the parameter NAME, and each step to what it trains with.

    \b
    ckpt groups explain --model py:mynet:build groups.toml head.bias
    """  # noqa: D301 - \b is click's mark
    live = live_model(model)
    with about(spec):
        told = explain_param_group(live, read_toml(spec), name)
    echo_report(form, lambda: explain_page(told), lambda: explain_document(told))
