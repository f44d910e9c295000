"""The command ``ckpt preflight``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import partial

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.completing import complete_keys, complete_optimizers
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import (
    PATH_TYPE,
    expand_option,
    ignore_option,
    quiet_option,
    report_options,
    requirement_options,
)
from ckptkit.cli.common.options.html_report import html_option, printed_in_any_case, write_html
from ckptkit.cli.common.options.rules import rule_options
from ckptkit.cli.common.options.specs import model_option
from ckptkit.cli.common.printing import ReportFormat, echo_result, exit_code, print_message
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import default_error_path
from ckptkit.core.files.live_prefix import LIVE_PREFIX
from ckptkit.core.findings.ignoring import parse_ignore
from ckptkit.core.text import kind_of, printable, quoted
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.errors import CkptkitError, FormatError, ModelError
from ckptkit.formats import open_optimizer, split_path
from ckptkit.formats.live import build_module
from ckptkit.formats.writing.state import Target
from ckptkit.rules.model import Rules

__all__ = ["preflight"]


@click.command(cls=Command, first=("--model", "--init", "--groups"))
@model_option
@click.option("--init", type=PATH_TYPE, metavar="PATH", help="The checkpoint that training starts from.")
@click.option("--fresh", multiple=True, metavar="PATTERN", shell_complete=complete_keys,
              help="Keys that are meant to stay at init. Repeatable.")  # fmt: skip
@requirement_options
@click.option("--groups", type=PATH_TYPE, metavar="FILE", help="The spec of param groups: TOML, JSON or YAML.")
@click.option("--optimizer", metavar="CLASS", shell_complete=complete_optimizers,
              help="A class of torch.optim, such as AdamW.")  # fmt: skip
@click.option("--resume", type=PATH_TYPE, metavar="PATH", help="The run to resume: weights and optimizer state.")
@click.option(
    "--resume-optimizer", type=PATH_TYPE, metavar="PATH", help="Its optimizer state, if that is in another file."
)
@click.option(
    "--dry-step",
    metavar="py:MODULE:CALLABLE",
    help="Train one step on a copy. CALLABLE takes the model and returns the loss of one batch.",
)
@click.option("--shapes-only", is_flag=True, help="Build the model on the meta device, and check no values.")
@rule_options(beside="init", or_beside="resume")
@ignore_option
@expand_option
@html_option
@report_options
@quiet_option
@click.pass_context
def preflight(
    context: click.Context,
    model: str,
    *,
    init: str | None,
    fresh: tuple[str, ...],
    require: tuple[str, ...],
    min_coverage: float,
    groups: str | None,
    optimizer: str | None,
    resume: str | None,
    resume_optimizer: str | None,
    dry_step: str | None,
    shapes_only: bool,
    rules: Rules,
    ignore: tuple[str, ...],
    expand: bool,
    html: Target | None,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Check a run before training: what loads, what stays at init, what trains at which rate, and one verdict.

    Builds the model with values and loads --init into it in memory, unless --shapes-only. What you do not give is not
    checked, and the report says so. The rules rename the keys of --init, or those of --resume without --init. Exit code
    0 if ready, 1 if ready with warnings or not ready, 2 for trouble. The last line, and "verdict" in the JSON document,
    say which.

    \b
    ckpt preflight --model py:mynet:build --init init.safetensors --groups groups.toml --optimizer AdamW
    ckpt preflight --model py:mynet:build --resume run.ckpt --groups groups.toml --optimizer AdamW
    """  # noqa: D301 - \b is click's mark
    from ckptkit.core.random_state import NEW_MODEL_SEED, restored_random_state
    from ckptkit.param_groups.parse import parse_spec
    from ckptkit.readiness import preflight as check_run
    from ckptkit.statistics.state_dict_stats import stats

    if shapes_only and dry_step is not None:
        raise click.UsageError("--dry-step needs values, and --shapes-only builds none")
    if resume is None and resume_optimizer is not None:
        raise click.UsageError("--resume-optimizer needs --resume")
    if init is None and fresh:
        raise click.UsageError("--fresh is for the keys of --init, which is not given")
    if init is None and (require or min_coverage):
        raise click.UsageError("--require and --min-coverage are about what --init fills, which is not given")
    if init is None and resume is None and rules.stages:
        raise click.UsageError("rules are for the keys of --init or --resume, and neither is given")
    parse_ignore(ignore)
    with restored_random_state(seed=NEW_MODEL_SEED):  # the model has the same values in every run
        live = build_module(model, with_values=not shapes_only)
    spec = None if groups is None else parse_spec(groups)
    loss = None if dry_step is None else _import_loss(dry_step)
    initial = None
    with contextlib.ExitStack() as stack:
        paths = [path for path in (init, resume) if path is not None]
        checkpoints = dict(zip(paths, stack.enter_context(open_checkpoints(*paths, quiet=quiet)), strict=True))
        if init is not None and not shapes_only:
            with default_error_path(init):
                initial = stats(live)
                _load(live, checkpoints[init], rules)
        state = None
        if resume_optimizer is not None:
            state = stack.enter_context(open_optimizer(resume_optimizer))
        elif resume is not None:
            state = _optimizer_in(resume, stack, quiet=quiet)
        with contextlib.redirect_stdout(sys.stderr):  # the code of the model and of the loss may print
            report = check_run(
                live,
                init=checkpoints.get(init or ""),
                rules=rules,
                fresh=fresh,
                require=require,
                min_coverage=min_coverage,
                initial=initial,
                groups=spec,
                optimizer=optimizer,
                resume=checkpoints.get(resume or ""),
                resume_optimizer=state,
                dry_step=loss,
                ignore=ignore,
            )
    about = {
        "model": model, "init": init, "groups": groups, "optimizer": optimizer, "resume": resume, "dry step": dry_step,
    }  # fmt: skip
    with printed_in_any_case(partial(echo_result, report_format, report, expand=expand)):
        write_html(html, report, quiet=quiet, about=about)
    context.exit(exit_code(report))


def _load(live: Module, init: Checkpoint, rules: Rules) -> None:
    """Load the tensors that match. If none does, or a weight is quantised, load nothing: the report will say so."""
    from ckptkit.comparison import diff_checkpoints
    from ckptkit.core.torch_bridge import as_checkpoint
    from ckptkit.loading import load_into
    from ckptkit.readiness.init import find_quantized_problems
    from ckptkit.rules.apply import apply_rules

    state = as_checkpoint(live, "model")
    key_map = apply_rules(rules, init, state)
    result = diff_checkpoints(state, init, key_map)
    if (
        (result.matched or result.computed)
        and not result.uncopyable
        and not find_quantized_problems(state, init, key_map, "init")
    ):
        load_into(live, init, rules, on_mismatch="skip")


def _optimizer_in(path: str, stack: contextlib.ExitStack, *, quiet: bool) -> Checkpoint | None:
    """Return the optimizer state in a run, or None with a warning: a run can also resume from weights alone.

    What ``::`` selects in ``path`` are the weights: the state is beside them, and not that of another model in the run.
    """
    file, key = split_path(path)
    try:
        found = stack.enter_context(open_optimizer(file))
        if not (_is_beside(key, found.envelope) or _is_beside(found.envelope, key)):
            raise FormatError(f"{quoted(f'::{found.envelope}')} is not beside {quoted(f'::{key}')}")
    except CkptkitError as error:
        if not quiet:
            print_message(
                f"ckpt: {printable(path)}: warning: the optimizer state of the run was not measured: {error.reason}"
            )
        return None
    return found


def _is_beside(key: str, other: str) -> bool:
    """Return whether the mapping that holds ``key`` holds ``other`` too, or is that."""
    holder = key.rpartition(".")[0]
    return not holder or f"{other}.".startswith(f"{holder}.")


def _import_loss(target: str) -> Callable[[Module], Tensor]:
    from ckptkit.formats.live.targets import import_target

    if not target.startswith(LIVE_PREFIX):
        raise ModelError("not a callable", hint="write py:package.module:callable", path=target)
    with default_error_path(target):
        found: object = import_target(target.removeprefix(LIVE_PREFIX))
        if not callable(found):
            raise ModelError(
                f"is {kind_of(found)}, not a callable",
                hint="give a function that takes the model and returns the loss of one batch",
            )
        return found
