"""``$ ckpt groups validate``."""

from __future__ import annotations

import click

from ckptkit.cli.group_options import Source, source_options
from ckptkit.cli.model import live_model, model_option
from ckptkit.cli.options import Form, about, echo_report, exit_code, form_options, quiet_option
from ckptkit.cli.streams import put
from ckptkit.core.findings import Report
from ckptkit.core.text import plural
from ckptkit.errors import GroupsError
from ckptkit.param_groups import build_param_groups, check_spec, plan_param_groups, validate_param_groups
from ckptkit.render.findings import findings_document, findings_page

__all__ = ["validate"]


@click.command()
@model_option
@source_options
@form_options
@quiet_option
@click.pass_context
def validate(context: click.Context, source: Source, *, model: str, form: Form, quiet: bool) -> None:
    """Prove that a spec owns every trainable parameter of the model exactly once.

    SPEC is a TOML, JSON or YAML file of ordered groups; --preset takes its place. Exit code 0 where nothing was
    found, 1 otherwise.

    \b
    ckpt groups validate --model py:mynet:build groups.toml
    """  # noqa: D301 - \b is click's mark
    live = live_model(model)
    given = source.over(live, quiet=quiet)
    with about(source.path):
        report = check_spec(live, given)
        plan = plan_param_groups(live, given) if report.ok else None
        if plan is not None:
            built = [group for name in plan.optimizers for group in build_param_groups(live, given, optimizer=name)]
            report = Report((*report.findings, *validate_param_groups(live, built).findings), GroupsError)
    if form is Form.JSON or report.findings:
        echo_report(form, lambda: findings_page(report), lambda: findings_document(report))
    elif not quiet and plan is not None:
        count = plural(sum(len(group.parameters) for group in plan.groups), "trainable parameter")
        put(f"{count}, each in exactly one of {plural(len(plan.groups), 'group')}")
    context.exit(exit_code(report))
