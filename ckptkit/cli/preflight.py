"""``$ ckpt preflight``."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from ckptkit.cli.group_options import live_model, model_option
from ckptkit.cli.options import Form, about, echo_report, exit_code, form_options, opened, quiet_option, read_toml, tell
from ckptkit.cli.rules import rule_options
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.text import printable
from ckptkit.errors import CkptkitError, ModelError
from ckptkit.formats import LIVE_PREFIX, open_optimizer
from ckptkit.render.preflight import preflight_document, preflight_page
from ckptkit.rules.model import Rules

__all__ = ["preflight"]


@click.command()
@model_option
@click.option("--init", type=click.Path(), metavar="PATH", help="The checkpoint that training begins with.")
@click.option("--fresh", multiple=True, metavar="PATTERN", help="Keys that are meant to stay at init. Repeatable.")
@click.option("--groups", type=click.Path(), metavar="FILE", help="The param-group spec: TOML, JSON or YAML.")
@click.option("--optimizer", metavar="CLASS", help="The class of torch.optim, such as AdamW.")
@click.option("--resume", type=click.Path(), metavar="PATH", help="The run that shall go on: weights and optimizer.")
@click.option(
    "--resume-optimizer", type=click.Path(), metavar="PATH", help="Its optimizer state, where that is elsewhere."
)
@click.option(
    "--dry-step",
    metavar="py:MODULE:CALLABLE",
    help="One step on a copy: it takes the model and returns the loss of one batch.",
)
@click.option("--shapes-only", is_flag=True, help="Build the model on the meta device, and judge no values.")
@rule_options(beside="init")
@form_options
@quiet_option
@click.pass_context
def preflight(
    context: click.Context,
    model: str,
    *,
    init: str | None,
    fresh: tuple[str, ...],
    groups: str | None,
    optimizer: str | None,
    resume: str | None,
    resume_optimizer: str | None,
    dry_step: str | None,
    shapes_only: bool,
    rules: Rules,
    form: Form,
    quiet: bool,
) -> None:
    """One page before training: what loads, what stays at init, who trains at which rate, and one verdict.

    The model is built for real and, unless it is --shapes-only, loaded with --init in memory. What is not given is not
    judged, and said. The rules are for the keys of --init. Exit code 0: ready, 1: ready with warnings, or not
    ready (the last line, and "verdict" in the JSON, say which), 2: trouble.

    \b
    ckpt preflight --model py:mynet:build --init init.safetensors --groups groups.toml --optimizer AdamW
    ckpt preflight --model py:mynet:build --resume run.ckpt --groups groups.toml --optimizer AdamW
    """  # noqa: D301 - \b is click's mark
    from ckptkit.readiness import preflight as judge

    if shapes_only and dry_step is not None:
        raise click.UsageError("--dry-step needs values, and --shapes-only makes none")
    if resume is None and resume_optimizer is not None:
        raise click.UsageError("--resume-optimizer goes with --resume, and there is none")
    if init is None and (fresh or rules.stages):
        raise click.UsageError("--fresh and rules are for the keys of --init, and there is none")
    live = live_model(model, real=not shapes_only)
    spec = None if groups is None else read_toml(groups)
    loss = None if dry_step is None else _loss(dry_step)
    with contextlib.ExitStack() as stack:
        paths = [path for path in (init, resume) if path is not None]
        checkpoints = dict(zip(paths, stack.enter_context(opened(*paths, quiet=quiet)), strict=True))
        if init is not None and not shapes_only:
            with about(init):
                _load(live, checkpoints[init], rules)
        state = None
        if resume_optimizer is not None:
            state = stack.enter_context(open_optimizer(resume_optimizer))
        elif resume is not None:
            state = _optimizer(resume, stack, quiet=quiet)
        with contextlib.redirect_stdout(sys.stderr):  # the model and the loss are the user's code
            report = judge(
                live,
                init=checkpoints.get(init or ""),
                rules=rules,
                fresh=fresh,
                groups=spec,
                optimizer=optimizer,
                resume=checkpoints.get(resume or ""),
                resume_optimizer=state,
                dry_step=loss,
            )
    echo_report(form, lambda: preflight_page(report), lambda: preflight_document(report))
    context.exit(exit_code(report))


def _load(live: Any, init: Checkpoint, rules: Rules) -> None:
    """Load what fits, where anything does: that nothing does is for the report to say."""
    from ckptkit.comparison import diff
    from ckptkit.loading import load_into

    result = diff(live, init, rules)
    if result.matched and not result.uncopyable:
        load_into(live, init, rules, on_mismatch="skip")


def _optimizer(path: str, stack: contextlib.ExitStack, *, quiet: bool) -> Checkpoint | None:
    try:
        return stack.enter_context(open_optimizer(path))
    except CkptkitError as error:  # there is none, or several: weights alone can be gone on with too
        if not quiet:
            tell(f"ckpt: {printable(path)}: warning: the optimizer state of the run was not judged: {error.reason}")
        return None


def _loss(target: str) -> Any:
    from ckptkit.formats.live import import_target

    if not target.startswith(LIVE_PREFIX):
        raise ModelError("is no callable", hint="write py:package.module:callable", path=target)
    with about(target):
        found = import_target(target.removeprefix(LIVE_PREFIX))
        if not callable(found):
            raise ModelError(
                f"is a {type(found).__name__}", hint="it takes the model and returns the loss of one batch"
            )
        return found
