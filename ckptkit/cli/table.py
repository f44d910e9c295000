"""``$ ckpt groups table``."""

from __future__ import annotations

import click

from ckptkit.cli.group_options import Source, model_or_checkpoint, source_options
from ckptkit.cli.options import Form, about, echo_report, form_options, quiet_option
from ckptkit.cli.streams import tell
from ckptkit.errors import one_line
from ckptkit.param_groups import check_spec, plan_param_groups
from ckptkit.render.groups import groups_document, groups_page

__all__ = ["table"]


@click.command()
@click.option("--model", required=True, metavar="PATH",
              help="py:MODULE:CALLABLE, or a checkpoint, of which names and shapes are used.")  # fmt: skip
@source_options
@form_options
@quiet_option
def table(source: Source, *, model: str, form: Form, quiet: bool) -> None:
    """Show each group with its parameters, elements, options and layers, and the rate of each layer.

    \b
    ckpt groups table --model py:mynet:build groups.toml
    ckpt groups table --model model.safetensors --preset no-decay --set lr=3e-4
    """  # noqa: D301 - \b is click's mark
    with model_or_checkpoint(model, quiet=quiet) as found:
        spec = source.over(found, quiet=quiet)
        with about(source.path):
            report = check_spec(found, spec)
            report.raise_for_errors()
            plan = plan_param_groups(found, spec)
    echo_report(form, lambda: groups_page(plan), lambda: groups_document(plan))
    for finding in () if quiet else report.findings:
        tell(one_line(f"ckpt: {finding.severity}: {finding.message}"))
