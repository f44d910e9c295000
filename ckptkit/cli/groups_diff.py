"""``$ ckpt groups diff``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ckptkit.cli.model import live_model
from ckptkit.cli.options import Form, about, echo_report, exit_code, form_options, quiet_option, read_toml
from ckptkit.errors import GroupsError, RuleError
from ckptkit.param_groups.compare import diff_locks
from ckptkit.param_groups.lock import ParamGroupsLock, is_lock, lock_model, lock_param_groups, parse_lock
from ckptkit.param_groups.properties import subject_of
from ckptkit.render.findings import findings_document, findings_page

__all__ = ["diff"]


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
        return lock_model(subject_of(live_model(model)))
    with about(other):
        given: Mapping[str, Any] = read_toml(other)
        if is_lock(given):
            return parse_lock(given)
        if model is None:
            raise GroupsError("is a spec, which has no parameters of its own", hint="lay it over one: --model py:...")
    live = live_model(model)
    with about(other):
        return lock_param_groups(live, given)
