"""``$ ckpt groups``: one file a subcommand."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import click

from ckptkit.cli.group_options import SpecSource, live_model, model_option, model_or_checkpoint, source_options
from ckptkit.cli.options import Form, about, echo_report, exit_code, form_options, put, quiet_option, read_toml, tell
from ckptkit.cli.outputs import write_json
from ckptkit.core.findings import Report
from ckptkit.core.text import plural, printable
from ckptkit.errors import GroupsError, RuleError, one_line
from ckptkit.param_groups.build import build_planned_groups
from ckptkit.param_groups.compare import diff_locks
from ckptkit.param_groups.emit import dump_spec, spec_table, write_python
from ckptkit.param_groups.explain import explain_param_group
from ckptkit.param_groups.lock import (
    ParamGroupsLock,
    is_lock,
    lock_document,
    lock_model,
    lock_param_groups,
    parse_lock,
    plain_option,
)
from ckptkit.param_groups.plan import assign, plan_param_groups
from ckptkit.param_groups.presets import preset_summary
from ckptkit.param_groups.properties import parameter_table
from ckptkit.param_groups.spec import ParamGroupSpec
from ckptkit.param_groups.validate import validate_param_groups
from ckptkit.render.findings import findings_document, findings_page
from ckptkit.render.groups import explain_document, explain_page, groups_document, groups_page, lock_page
from ckptkit.render.page import Listing

__all__ = ["diff", "emit", "explain", "groups", "lock", "table", "validate"]


@click.command()
@source_options
@click.option("--model", metavar="PATH", help="py:MODULE:CALLABLE, or a checkpoint, where names and shapes are enough.")
@click.option("--as", "language", type=click.Choice(["toml", "json", "python"]), default="toml", show_default=True,
              help="python spells out names, and needs the model.")  # fmt: skip
@form_options
@quiet_option
def emit(source: SpecSource, *, model: str | None, language: str, form: Form, quiet: bool) -> None:
    """Write a spec out: a preset to keep and change, a YAML file as TOML, or the groups as Python to paste.

    \b
    ckpt groups emit --preset timm-layer-decay --set layer_decay=0.65 --model py:mynet:build
    ckpt groups emit groups.toml --model py:mynet:build --as python
    """  # noqa: D301 - \b is click's mark
    if model is None:
        if language == "python":
            raise GroupsError("Python spells out the names of a model, and there is none", hint="give it: --model PATH")
        spec, text = _written(source, None, language, quiet=quiet)
    else:
        with model_or_checkpoint(model, quiet=quiet) as found:
            spec, text = _written(source, found, language, quiet=quiet)
    document = {"schema": "ckptkit.groups.emit/1", "as": language, "spec": plain_option(spec_table(spec)), "text": text}
    echo_report(form, lambda: [Listing(tuple(text.split("\n")))], lambda: document)


def _written(source: SpecSource, model: object, language: str, *, quiet: bool) -> tuple[ParamGroupSpec, str]:
    spec = source.over(model, quiet=quiet)
    with about(source.path):
        if language == "python":
            return spec, write_python(plan_param_groups(model, spec), source.label)
        text = dump_spec(spec, language)
    if language == "toml" and source.preset is not None:
        said = textwrap.wrap(f"Preset {source.preset}. {preset_summary(source.preset)}", 116)
        text = "\n".join([*(f"# {line}" for line in said), "", text])
    return spec, text


@click.command()
@click.option("--model", required=True, metavar="PATH",
              help="py:MODULE:CALLABLE, or a checkpoint, of which names and shapes are used.")  # fmt: skip
@source_options
@form_options
@quiet_option
def table(source: SpecSource, *, model: str, form: Form, quiet: bool) -> None:
    """Show each group with its parameters, elements, options and layers, and the rate of each layer.

    \b
    ckpt groups table --model py:mynet:build groups.toml
    ckpt groups table --model model.safetensors --preset no-decay --set lr=3e-4
    """  # noqa: D301 - \b is click's mark
    with model_or_checkpoint(model, quiet=quiet) as found:
        spec = source.over(found, quiet=quiet)
        with about(source.path):
            assignment = assign(parameter_table(found), spec)
            assignment.report.raise_for_errors()
    plan = assignment.plan
    echo_report(form, lambda: groups_page(plan), lambda: groups_document(plan))
    for finding in () if quiet else assignment.report.findings:
        tell(one_line(f"ckpt: {finding.severity}: {finding.message}"))


@click.command()
@model_option
@source_options
@form_options
@quiet_option
@click.pass_context
def validate(context: click.Context, source: SpecSource, *, model: str, form: Form, quiet: bool) -> None:
    """Prove that a spec owns every trainable parameter of the model exactly once.

    SPEC is a TOML, JSON or YAML file of ordered groups; --preset takes its place. Exit code 0 where nothing was
    found, 1 otherwise.

    \b
    ckpt groups validate --model py:mynet:build groups.toml
    """  # noqa: D301 - \b is click's mark
    live = live_model(model)
    given = source.over(live, quiet=quiet)
    with about(source.path):
        assignment = assign(parameter_table(live), given)
        report, plan = assignment.report, assignment.plan
        if report.ok:
            built = [group for name in plan.optimizers for group in build_planned_groups(live, plan, optimizer=name)]
            report = Report((*report.findings, *validate_param_groups(live, built).findings), GroupsError)
    if form is Form.JSON or report.findings:
        echo_report(form, lambda: findings_page(report), lambda: findings_document(report))
    elif not quiet:
        count = plural(sum(len(group.parameters) for group in plan.groups), "trainable parameter")
        put(f"{count}, each in exactly one of {plural(len(plan.groups), 'group')}")
    context.exit(exit_code(report))


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


@click.command()
@model_option
@source_options
@click.option("-o", "--output", type=click.Path(), metavar="LOCK", required=True, help="Where the lock is written.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@form_options
@quiet_option
def lock(source: SpecSource, *, model: str, output: str, force: bool, form: Form, quiet: bool) -> None:
    """Write down what trains with what: names, shapes, places in the optimizer's state, ties and options.

    A lock is a JSON file to keep beside a run; ckpt groups diff holds a model, a spec or another lock against it.

    \b
    ckpt groups lock --model py:mynet:build groups.toml -o groups.lock.json
    """  # noqa: D301 - \b is click's mark
    live = live_model(model)
    spec = source.over(live, quiet=quiet)
    with about(source.path):
        locked = lock_param_groups(live, spec)
    write_json(output, lock_document(locked), force=force)
    if form is not Form.TEXT:
        echo_report(form, lambda: lock_page(locked), lambda: lock_document(locked))
    if not quiet:
        count = sum(len(group.parameters) for group in locked.groups)
        tell(f"wrote {printable(output)}: {plural(count, 'parameter')} in {plural(len(locked.groups), 'group')}")


@click.command()
@click.argument("lock", type=click.Path())
@click.argument("other", type=click.Path(), required=False)
@click.option("--model", metavar="py:MODULE:CALLABLE", help="The live model; with a spec as OTHER, its groups over it.")
@form_options
@quiet_option
@click.pass_context
def diff(context: click.Context, lock: str, other: str | None, *, model: str | None, form: Form, quiet: bool) -> None:
    """Show what changed since LOCK was written, in another lock, in a model, or in a spec over a model.

    Parameters gone, new, renamed, of another shape, dtype or tie; in another group or place of the optimizer's state;
    other options. Exit code 0 where nothing changed, 1 otherwise.

    \b
    ckpt groups diff groups.lock.json --model py:mynet:build groups.toml
    """  # noqa: D301 - \b is click's mark
    try:
        with about(lock):
            expected = parse_lock(read_toml(lock, as_json=True))
    except RuleError as error:
        error.hint = error.hint or "LOCK comes first, and a spec after it; ckpt groups lock writes a lock of a spec"
        raise
    report = diff_locks(expected, _found(other, model))
    if form is Form.JSON or report.findings or not quiet:
        echo_report(form, lambda: findings_page(report), lambda: findings_document(report))
    context.exit(exit_code(report))


def _found(other: str | None, model: str | None) -> ParamGroupsLock:
    if other is None:
        if model is None:
            raise GroupsError("there is nothing to hold the lock against", hint="give another lock, or --model")
        return lock_model(parameter_table(live_model(model)))
    with about(other):
        given: Mapping[str, Any] = read_toml(other)
        if is_lock(given):
            return parse_lock(given)
        if model is None:
            raise GroupsError("is a spec, which has no parameters of its own", hint="lay it over one: --model py:...")
    live = live_model(model)
    with about(other):
        return lock_param_groups(live, given)


@click.group()
def groups() -> None:
    """Check which parameter trains with which options, against the live model."""


for _command in (table, validate, emit, explain, lock, diff):
    groups.add_command(_command)
