"""``$ ckpt groups``."""

from __future__ import annotations

from typing import Any

import click

from ckptkit.cli.options import Form, about, echo_report, exit_code, form_options, quiet_option, read_toml
from ckptkit.cli.streams import put
from ckptkit.errors import ModelError
from ckptkit.formats import LIVE_PREFIX
from ckptkit.formats.live import build_shapes
from ckptkit.param_groups import build_param_groups, check_spec, plan_param_groups, validate_param_groups
from ckptkit.report.findings import findings_document, findings_page
from ckptkit.report.groups import groups_document, groups_page
from ckptkit.text import plural

__all__ = ["groups"]

_model_option = click.option("--model", required=True, metavar="py:MODULE:CALLABLE", help="The live model.")


@click.group()
def groups() -> None:
    """Check which parameter trains with which options, against the live model."""


@groups.command()
@_model_option
@click.argument("spec", type=click.Path())
@form_options
@quiet_option
@click.pass_context
def validate(context: click.Context, model: str, spec: str, *, form: Form, quiet: bool) -> None:
    """Prove that a spec owns every trainable parameter of the model exactly once.

    SPEC is a TOML or JSON file of ordered groups. Exit code 0 where nothing was found, 1 otherwise.

    \b
    ckpt groups validate --model py:mynet:build groups.toml
    """  # noqa: D301 - \b is click's mark
    live = _module(model)
    given = read_toml(spec)
    with about(spec):
        report = check_spec(live, given)
        if report.ok:
            report = validate_param_groups(live, build_param_groups(live, given))
    if form is Form.JSON or report.findings:
        echo_report(form, lambda: findings_page(report), lambda: findings_document(report))
    elif not quiet:
        plan = plan_param_groups(live, given)
        count = plural(sum(len(group.parameters) for group in plan.groups), "trainable parameter")
        put(f"{count}, each in exactly one of {plural(len(plan.groups), 'group')}")
    context.exit(exit_code(report))


@groups.command()
@_model_option
@click.argument("spec", type=click.Path())
@form_options
@quiet_option
def table(model: str, spec: str, *, form: Form, quiet: bool) -> None:  # noqa: ARG001 - accepted everywhere
    """Show each group with its parameters, elements and options.

    \b
    ckpt groups table --model py:mynet:build groups.toml
    """  # noqa: D301 - quiet is accepted everywhere; \b is click's mark
    live = _module(model)
    with about(spec):
        plan = plan_param_groups(live, read_toml(spec))
    echo_report(form, lambda: groups_page(plan), lambda: groups_document(plan))


def _module(target: str) -> Any:
    from torch.nn import Module

    if not target.startswith(LIVE_PREFIX):
        raise ModelError("is no live model", hint="write py:package.module:callable", path=target)
    with about(target):
        made = build_shapes(target.removeprefix(LIVE_PREFIX))
        if not isinstance(made, Module):
            raise ModelError(f"gives a {type(made).__name__}, and param groups need a Module")
        return made
