"""The commands ``ckpt groups``: each imports the modules that only it runs, so that the others start fast."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import click

from ckptkit.cli.common.commands import CommandGroup
from ckptkit.cli.common.options import PATH_TYPE, ignore_option, quiet_option, report_options
from ckptkit.cli.common.options.html_report import html_option, printed_in_any_case, write_html
from ckptkit.cli.common.options.specs import (
    SpecSource,
    model_option,
    model_or_checkpoint,
    spec_options,
)
from ckptkit.cli.common.printing import ReportFormat, echo_result, exit_code, print_message
from ckptkit.core.config_files import default_error_path, read_table_file
from ckptkit.core.text import plural, printable
from ckptkit.core.torch_types import Module
from ckptkit.errors import GroupsError, RuleError
from ckptkit.formats.live import build_module
from ckptkit.formats.writing.state import Target

if TYPE_CHECKING:
    from ckptkit.core.checkpoint import Checkpoint
    from ckptkit.param_groups.lock import ParamGroupsLock
    from ckptkit.param_groups.spec import ParamGroupSpec

__all__ = ["groups"]


@click.group(cls=CommandGroup)
def groups() -> None:
    """Check which parameter trains with which options, against the live model."""


@groups.command()
@click.option("--model", required=True, metavar="PATH",
              help="py:MODULE:CALLABLE, or a checkpoint that gives names and shapes.")  # fmt: skip
@spec_options
@html_option
@report_options
@quiet_option
def table(source: SpecSource, *, model: str, html: Target | None, report_format: ReportFormat, quiet: bool) -> None:
    """Show each group with its parameters and options.

    The table has the elements and layers of each group too, and the learning rate of each layer.

    \b
    ckpt groups table --model py:mynet:build groups.toml
    ckpt groups table --model model.safetensors --preset no-decay --set lr=3e-4
    """  # noqa: D301 - \b is click's mark
    from ckptkit.param_groups.plan import assign
    from ckptkit.param_groups.properties import parameter_table

    with model_or_checkpoint(model, quiet=quiet) as found:
        spec = source.read(found, quiet=quiet)
        with default_error_path(source.path):
            assignment = assign(parameter_table(found), spec)
            assignment.report.raise_for_errors()
    plan = assignment.plan
    with printed_in_any_case(partial(echo_result, report_format, plan)):
        write_html(html, plan, quiet=quiet, about={"model": model, "groups": source.label})
    for finding in () if quiet else assignment.report.findings:
        print_message(f"ckpt: {finding.severity}: {finding.message}")


@groups.command()
@model_option
@spec_options
@ignore_option
@report_options
@quiet_option
@click.pass_context
def validate(
    context: click.Context,
    source: SpecSource,
    *,
    model: str,
    ignore: tuple[str, ...],
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Check that a spec puts every parameter into one group.

    Every trainable parameter of the model must be in exactly one group. SPEC is a TOML, JSON or YAML file of ordered
    groups; --preset replaces it. Exit code 0 if nothing was found, else 1. --ignore, and ignore = [...] at the top of
    the spec, leave expected findings out.

    \b
    ckpt groups validate --model py:mynet:build groups.toml
    ckpt groups validate --model py:mynet:build groups.toml --ignore 'groups.decay:*.norm.*'
    """  # noqa: D301 - \b is click's mark
    from ckptkit.core.findings.ignoring import ignore_findings, parse_ignore
    from ckptkit.param_groups.build import build_planned_groups
    from ckptkit.param_groups.plan import assign
    from ckptkit.param_groups.properties import parameter_table
    from ckptkit.param_groups.validate import check_param_groups

    entries = parse_ignore(ignore)
    live = build_module(model)
    spec = source.read(live, quiet=quiet)
    entries += parse_ignore(spec.ignore)
    with default_error_path(source.path):
        assignment = assign(parameter_table(live), spec)
        report, plan = assignment.report, assignment.plan
        if ignore_findings(report, entries).ok:
            built = [group for name in plan.optimizers for group in build_planned_groups(live, plan, optimizer=name)]
            checked = check_param_groups(live, built)
            report = replace(checked, findings=(*report.findings, *checked.findings))
        report = ignore_findings(report, entries)
    if report_format is ReportFormat.JSON or report.findings or report.ignored or not quiet:
        echo_result(report_format, report)
    context.exit(exit_code(report))


@groups.command()
@spec_options
@click.option("--model", metavar="PATH", help="py:MODULE:CALLABLE, or a checkpoint if names and shapes are enough.")
@click.option("--as", "language", type=click.Choice(["toml", "json", "python"]), default="toml", show_default=True,
              help="The language to write. python lists the names, so it needs --model.")  # fmt: skip
@report_options
@quiet_option
def emit(source: SpecSource, *, model: str | None, language: str, report_format: ReportFormat, quiet: bool) -> None:
    """Print a spec as TOML, JSON or Python.

    Use this to keep and change a preset, to convert a YAML file to TOML, or to paste the groups into Python code.

    \b
    ckpt groups emit --preset timm-layer-decay --set layer_decay=0.65 --model py:mynet:build
    ckpt groups emit groups.toml --model py:mynet:build --as python
    """  # noqa: D301 - \b is click's mark
    if model is None:
        if language == "python":
            raise GroupsError("Python code lists the names of a model, and no model is given", hint="add --model PATH")
        spec, text = _emitted(source, None, language, quiet=quiet)
    else:
        with model_or_checkpoint(model, quiet=quiet) as found:
            spec, text = _emitted(source, found, language, quiet=quiet)
    echo_result(report_format, spec, chosen={"language": language, "text": text})


def _emitted(
    source: SpecSource, model: Module | Checkpoint | None, language: str, *, quiet: bool
) -> tuple[ParamGroupSpec, str]:
    """Return the spec for ``model``, and its text in ``language``."""
    from ckptkit.param_groups.emit import write_python
    from ckptkit.param_groups.spec.writing import dump_spec

    spec = source.read(model, quiet=quiet)
    with default_error_path(source.path):
        if language == "python":
            from ckptkit.param_groups.plan import plan_param_groups

            return spec, write_python(plan_param_groups(cast("Module | Checkpoint", model), spec), source.label)
        text = dump_spec(spec, language)
    if language == "toml" and source.preset is not None:
        from ckptkit.param_groups.presets import preset_summary

        comment = textwrap.wrap(f"Preset {source.preset}. {preset_summary(source.preset)}", 116)
        text = "\n".join([*(f"# {line}" for line in comment), "", text])
    return spec, text


@groups.command()
@model_option
@click.argument("spec", type=PATH_TYPE)
@click.argument("name")
@report_options
@quiet_option
def explain(model: str, spec: str, name: str, *, report_format: ReportFormat, quiet: bool) -> None:  # noqa: ARG001 - every command takes -q
    """Show how the parameter NAME gets its options.

    Lists the rules of SPEC that match the parameter, and each step to the value of each option.

    \b
    ckpt groups explain --model py:mynet:build groups.toml head.bias
    """  # noqa: D301 - \b is click's mark
    from ckptkit.param_groups.explain import explain_param_group

    live = build_module(model)
    with default_error_path(spec):
        explanation = explain_param_group(live, spec, name)
    echo_result(report_format, explanation)


@groups.command()
@model_option
@spec_options
@click.option("-o", "--output", type=PATH_TYPE, metavar="LOCK", required=True, help="The lock file to write.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@report_options
@quiet_option
def lock(source: SpecSource, *, model: str, output: str, force: bool, report_format: ReportFormat, quiet: bool) -> None:
    """Write the groups of a model to a lock file.

    A lock is a JSON file to keep with a run. It has the names, shapes, ties, options and optimizer-state positions of
    all parameters. ckpt groups diff compares it with a model, a spec or another lock.

    \b
    ckpt groups lock --model py:mynet:build groups.toml -o groups.lock.json
    """  # noqa: D301 - \b is click's mark
    from ckptkit.core.config_files import json_bytes
    from ckptkit.formats.writing.outputs import write_small_file
    from ckptkit.formats.writing.targets import prepare_side_file
    from ckptkit.param_groups.lock import lock_document, lock_param_groups

    target = prepare_side_file(output, [] if source.path is None else [source.path], force=force)
    live = build_module(model)
    spec = source.read(live, quiet=quiet)
    with default_error_path(source.path):
        locked = lock_param_groups(live, spec)
    write_small_file(target, json_bytes(lock_document(locked)))
    if report_format is not ReportFormat.TABLE:
        echo_result(report_format, locked)
    if not quiet:
        count = sum(len(group.parameters) for group in locked.groups)
        print_message(
            f"wrote {printable(output)}: {plural(count, 'parameter')} in {plural(len(locked.groups), 'group')}"
        )


@groups.command()
@click.argument("lock", type=PATH_TYPE)
@click.argument("other", type=PATH_TYPE, required=False)
@click.option("--model", metavar="py:MODULE:CALLABLE", help="The live model. If OTHER is a spec, its groups are built.")
@report_options
@quiet_option
@click.pass_context
def diff(
    context: click.Context,
    lock: str,
    other: str | None,
    *,
    model: str | None,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Show what changed since LOCK was written.

    OTHER is another lock, or a spec for --model; without OTHER, LOCK is compared with the model alone. Reports
    parameters that are missing, new or renamed, or have another shape, dtype, tie, group, option or position in the
    optimizer state. Exit code 0 if nothing changed, else 1.

    \b
    ckpt groups diff groups.lock.json --model py:mynet:build groups.toml
    """  # noqa: D301 - \b is click's mark
    from ckptkit.param_groups.compare.locks import diff_locks
    from ckptkit.param_groups.lock import parse_lock

    try:
        expected = parse_lock(lock)
    except RuleError as error:
        error.hint = error.hint or "LOCK comes first, then a spec; ckpt groups lock writes a lock of a spec"
        raise
    report = diff_locks(expected, _other_lock(other, model))
    if report_format is ReportFormat.JSON or report.findings or not quiet:
        echo_result(report_format, report)
    context.exit(exit_code(report))


def _other_lock(other: str | None, model: str | None) -> ParamGroupsLock:
    """Return the lock in the file ``other``, or the lock of a model, with the groups of a spec if that is given."""
    from ckptkit.param_groups.lock import is_lock, lock_model, lock_param_groups, parse_lock

    if other is None:
        if model is None:
            raise GroupsError("there is nothing to compare the lock with", hint="give another lock, or --model")
        from ckptkit.param_groups.properties import parameter_table

        return lock_model(parameter_table(build_module(model)))
    with default_error_path(other):
        content = read_table_file(other)
        if is_lock(content):
            return parse_lock(content)
        if model is None:
            raise GroupsError("is a spec, which has no parameters of its own", hint="give the model: --model py:...")
    live = build_module(model)
    with default_error_path(other):
        return lock_param_groups(live, content)
