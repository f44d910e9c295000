"""``$ ckpt optim``."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ckptkit.cli.options import (
    Form,
    about,
    echo_report,
    exit_code,
    expand_option,
    form_options,
    path_argument,
    quiet_option,
    read_text,
    read_toml,
    tell,
)
from ckptkit.cli.rules import rule_options
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import plural, printable
from ckptkit.errors import CkptkitError, PlanError
from ckptkit.formats import LIVE_PREFIX, open_checkpoint, open_optimizer, split_path
from ckptkit.optimizer_state.compare import optimizer_state_diff, state_findings
from ckptkit.optimizer_state.forms import FoundState, read_state
from ckptkit.optimizer_state.groups import order_like, resplit
from ckptkit.optimizer_state.model import FORMS, OptimizerState, parameter_shape
from ckptkit.optimizer_state.naming import name_by_position, structure_findings, to_named
from ckptkit.optimizer_state.prune import prune
from ckptkit.optimizer_state.remap import remap
from ckptkit.optimizer_state.write import write_optimizer_state
from ckptkit.param_groups.lock import is_lock, parse_lock
from ckptkit.param_groups.plan import plan_param_groups
from ckptkit.plans.execute import Written
from ckptkit.plans.output import Output, choose_output
from ckptkit.render.findings import findings_document, findings_page
from ckptkit.render.optim import changes_page, state_document, state_page, written_line
from ckptkit.render.page import Code, as_text, code
from ckptkit.rules.model import Rules

__all__ = ["optim"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group()
def optim() -> None:
    """Show the state of an optimizer by the names of parameters, and edit it as the weights were edited.

    PATH is a checkpoint that holds what optimizer.state_dict() gives; PATH::a.b says which where it has several.
    Where it counts parameters instead of naming them, names come from the weights in the same file, or --model, as far
    as shapes and order leave one way alone.
    """


@dataclass(frozen=True, slots=True)
class _Job:
    """How the output of a command is asked for."""

    output: Output
    layout: str | None
    dry_run: bool
    form: Form
    quiet: bool
    expand: bool


def _names_options(command: _Command) -> _Command:
    """Add --model and --names, and pass them on as one function that opens a path."""

    @functools.wraps(command)
    def with_names(*args: Any, model: str | None, names_file: str | None, **others: Any) -> Any:
        if model and names_file:
            raise click.UsageError("--model and --names exclude each other")
        return command(*args, given=_Given(model, names_file), **others)

    names = click.option("--names", "names_file", type=click.Path(), metavar="FILE",
                         help="The names of all parameters in the order of the groups, one a line.")  # fmt: skip
    model = click.option("--model", type=click.Path(), metavar="PATH|py:…",
                         help="The model that it was trained with, or its weights.")  # fmt: skip
    return model(names(with_names))  # type: ignore[return-value]


def _output_options(command: _Command) -> _Command:
    """Add every option about an output, and pass them on as one ``job`` argument."""

    @functools.wraps(command)
    def with_job(
        *args: Any, output: str, layout: str | None, force: bool, only_tensors: bool, keep_unknown: bool,
        dry_run: bool, form: Form, quiet: bool, expand: bool, **others: Any,
    ) -> Any:  # fmt: skip
        chosen = choose_output(output, force=force, only_tensors=only_tensors, keep_unknown=keep_unknown)
        return command(*args, job=_Job(chosen, layout, dry_run, form, quiet, expand), **others)

    decorators = (
        click.option("-o", "--output", required=True, type=click.Path(), help="Where to write: a torch file."),
        click.option("--form", "layout", type=click.Choice(FORMS),
                     help="By position (for load_state_dict), with param_names, by name, or flattened (both for "
                     "torch.distributed.checkpoint); else as it was found."),
        click.option("--force", is_flag=True, help="Replace an existing output, whole or not at all."),
        click.option("--only-tensors", is_flag=True,
                     help="Write the state of the optimizer alone, without what else is in the file (weights, epoch)."),
        click.option("--keep-unknown", is_flag=True,
                     help="Keep code references that torch.load(weights_only=True) refuses; they are not run."),
        click.option("-n", "--dry-run", is_flag=True, help="Print what would be done, and write nothing."),
        expand_option,
        form_options,
        quiet_option,
    )  # fmt: skip
    for decorator in reversed(decorators):
        with_job = decorator(with_job)
    return with_job  # type: ignore[return-value]


@optim.command()
@path_argument("path")
@_names_options
@expand_option
@form_options
@quiet_option
@click.pass_context
def show(context: click.Context, path: str, *, given: _Given, expand: bool, form: Form, quiet: bool) -> None:
    """Show each parameter with its slots, step count and group, the options of the groups, and what is odd.

    Exit code 0 where nothing was found, 1 otherwise.

    \b
    ckpt optim show run.ckpt
    ckpt optim show optimizer.pt --model py:mynet:build
    """  # noqa: D301 - \b is click's mark
    with contextlib.ExitStack() as stack:
        checkpoint, found = _opened(stack, path, quiet=quiet)
        findings = list(structure_findings(found))
        try:
            state = to_named(found, given.names(stack, checkpoint, found))
        except CkptkitError as error:
            state = name_by_position(found)
            if not findings:
                severity: Any = "note" if given.nothing else "error"
                findings.append(Finding("optim.no-names", severity, "", error.reason, error.hint or ""))
        report = Report((*findings, *state_findings(state)))
        at = (" at ", Code(f"::{printable(checkpoint.envelope)}")) if checkpoint.envelope else ()
        title = (code(checkpoint.path), *at, f": optimizer state, {found.form}")
        echo_report(
            form,
            lambda: state_page(title, state, report, expand=expand),
            lambda: state_document(checkpoint.path, checkpoint.envelope, state, report=report),
        )
    context.exit(exit_code(report))


@optim.command("remap")
@path_argument("path")
@_output_options
@_names_options
@rule_options(beside="path")
@click.option("--like", type=click.Path(), metavar="PATH|py:…",
              help="The model that will load it, or its weights: positions are in its order.")  # fmt: skip
@click.option("--elementwise", multiple=True, metavar="SLOT",
              help="A slot that has a number for each element, beside those known. Repeatable.")  # fmt: skip
def remap_command(
    path: str, *, job: _Job, given: _Given, rules: Rules, like: str | None, elementwise: tuple[str, ...]
) -> None:
    """Let the state follow the rules by which the weights were renamed, split, joined, padded or turned.

    The rules are those of ckpt remap. All else in the file (weights, epoch) stays as it is.

    \b
    ckpt optim remap run.ckpt -o new.ckpt --rules rules.toml --like py:newnet:build
    """  # noqa: D301 - \b is click's mark
    with contextlib.ExitStack() as stack:
        checkpoint, state = _named(stack, path, given, job)
        with about(path):
            made = remap(state, rules, elementwise=elementwise)
            if like is not None:
                made = order_like(made, _model(stack, like))
        note = "positions follow the file: load it where parameters are in this order, or give --like the new model"
        counted = (job.layout or made.form) == "indexed" and like is None
        beside = "the weights in the file stay as they are: ckpt remap takes the same rules"
        within = bool(checkpoint.envelope) and not job.output.only_tensors
        _finish(made, checkpoint, job, [note] * counted + [beside] * within)


@optim.command("resplit")
@path_argument("path")
@_output_options
@_names_options
@click.option(
    "--groups",
    "spec",
    type=click.Path(),
    metavar="FILE",
    help="A spec of groups as ckpt groups takes it, or a lock that it wrote.",
)
@click.option("--as", "other", type=click.Path(), metavar="PATH", help="Another optimizer state, whose groups count.")
@click.option("--hyper", type=click.Choice(("live", "saved", "error")), default="live", show_default=True,
              help="Whose options count where the groups and PATH differ: theirs, PATH's, or nobody's.")  # fmt: skip
def resplit_command(path: str, *, job: _Job, given: _Given, spec: str | None, other: str | None, hyper: Any) -> None:
    """Deal the parameters to other groups: more, fewer, or in another order; each keeps its state and its options.

    \b
    ckpt optim resplit run.ckpt -o new.ckpt --groups groups.toml
    """  # noqa: D301 - \b is click's mark
    if (spec is None) == (other is None):
        raise click.UsageError("give either --groups or --as")
    with contextlib.ExitStack() as stack:
        checkpoint, state = _named(stack, path, given, job)
        groups: Any = None
        if other is not None:
            second, found = _opened(stack, other, quiet=job.quiet)
            with about(other):
                groups = to_named(found, given.names(stack, second, found))
        else:
            assert spec is not None  # noqa: S101 - one of both is given
            table = read_toml(spec)
            with about(spec):
                if is_lock(table):
                    groups = parse_lock(table)
                else:
                    subject = _shapes(state) if given.model is None else _model(stack, given.model)
                    groups = plan_param_groups(subject, table)
        with about(path):
            made = resplit(state, groups, hyper)
        _finish(made, checkpoint, job, [])


@optim.command("prune")
@path_argument("path")
@_output_options
@_names_options
@click.option("--like", type=click.Path(), metavar="PATH|py:…", help="The model that will load it, or its weights.")
@click.option("--drop", multiple=True, metavar="PATTERN", help="Leave out parameters that fit. Repeatable.")
@click.option("--reset", multiple=True, metavar="PATTERN",
              help="Drop the state of parameters that fit, so that they start anew. Repeatable.")  # fmt: skip
def prune_command(
    path: str, *, job: _Job, given: _Given, like: str | None, drop: tuple[str, ...], reset: tuple[str, ...]
) -> None:
    """Leave out what no longer fits: parameters that are gone or frozen, state of other shapes, state of no group.

    \b
    ckpt optim prune run.ckpt -o new.ckpt --like py:newnet:build
    ckpt optim prune run.ckpt -o new.ckpt --reset 'head.*'
    """  # noqa: D301 - \b is click's mark
    with contextlib.ExitStack() as stack:
        checkpoint, state = _named(stack, path, given, job, drop_strays=True)
        with about(path):
            made = prune(state, None if like is None else _model(stack, like), drop=drop, reset=reset)
        _finish(made, checkpoint, job, [])


@optim.command()
@path_argument("saved")
@path_argument("live")
@_names_options
@form_options
@quiet_option
@click.pass_context
def diff(context: click.Context, saved: str, live: str, *, given: _Given, form: Form, quiet: bool) -> None:
    """Say what loading the state SAVED would do to the optimizer that LIVE is a state of, by the names of parameters.

    Exit code 0 where nothing was found, 1 otherwise.

    \b
    ckpt optim diff run.ckpt now.ckpt
    """  # noqa: D301 - \b is click's mark
    with contextlib.ExitStack() as stack:
        states = []
        for path in (saved, live):
            checkpoint, found = _opened(stack, path, quiet=quiet)
            with about(path):
                states.append(to_named(found, given.names(stack, checkpoint, found)))
        report = optimizer_state_diff(*states)
        echo_report(form, lambda: findings_page(report), lambda: findings_document(report))
    context.exit(exit_code(report))


@dataclass(frozen=True, slots=True)
class _Given:
    """What was said of the names: a model, a file of names, or nothing."""

    model: str | None
    names_file: str | None

    @property
    def nothing(self) -> bool:
        return self.model is None and self.names_file is None

    def names(self, stack: contextlib.ExitStack, checkpoint: Checkpoint, found: FoundState) -> Any:
        """Return the names, the model, or for a state without names the weights that lie in the same file, if any."""
        if self.names_file is not None:
            text = read_text(self.names_file)
            with about(self.names_file):
                return json.loads(text) if text.lstrip().startswith("[") else text.split()
        if self.model is not None:
            return _model(stack, self.model)
        if not checkpoint.envelope or found.form != "indexed":
            return None
        try:
            weights = stack.enter_context(open_checkpoint(split_path(checkpoint.path)[0]))
        except CkptkitError:
            return None
        return weights if weights.envelope != checkpoint.envelope and len(weights) else None


def _opened(stack: contextlib.ExitStack, path: str, *, quiet: bool) -> tuple[Checkpoint, FoundState]:
    checkpoint = stack.enter_context(open_optimizer(path))
    if not quiet:
        for warning in checkpoint.warnings:
            tell(f"ckpt: {printable(checkpoint.path)}: warning: {warning}")
    with about(path):
        return checkpoint, read_state(checkpoint)


def _named(
    stack: contextlib.ExitStack, path: str, given: _Given, job: _Job, *, drop_strays: bool = False
) -> tuple[Checkpoint, OptimizerState]:
    checkpoint, found = _opened(stack, path, quiet=job.quiet)
    with about(path):
        return checkpoint, to_named(found, given.names(stack, checkpoint, found), drop_strays=drop_strays)


def _model(stack: contextlib.ExitStack, path: str) -> Any:
    """Return the live model, for its parameters and their order, or a checkpoint of weights."""
    if path.startswith(LIVE_PREFIX):
        from ckptkit.formats.live import build_shapes

        with about(path):
            return build_shapes(path.removeprefix(LIVE_PREFIX))
    return stack.enter_context(open_checkpoint(path))


def _shapes(state: OptimizerState) -> dict[str, TensorInfo]:
    """Return the parameters as far as their state describes them; raises ``PlanError`` where it does not."""
    shapes = {name: parameter_shape(state.state.get(name, {})) for name in state.names}
    unknown = [name for name, shape in shapes.items() if shape is None]
    if unknown:
        raise PlanError(
            f"the state tells no shape of {plural(len(unknown), 'parameter')}, such as {printable(unknown[0])}",
            hint="give the model: --model py:package.module:callable",
        )
    return {name: TensorInfo(name, "F32", shape or ()) for name, shape in shapes.items()}


def _finish(state: OptimizerState, source: Checkpoint, job: _Job, notes: Sequence[str]) -> None:
    """Write the state, or say what would be written."""
    written = _write(state, source, job)
    if job.dry_run or job.form is not Form.TEXT:
        echo_report(
            job.form,
            lambda: [*changes_page(state, expand=job.expand), written_line(state, written)],
            lambda: state_document(source.path, source.envelope, state, written=written),
        )
    if not job.quiet:
        evidence = [f"names: {state.evidence}"] if state.evidence else []
        for note in (*evidence, *state.remarks, *notes):
            tell(note)
        if written is not None:
            for line in as_text([written_line(state, written)]):
                tell(line)


def _write(state: OptimizerState, source: Checkpoint, job: _Job) -> Written | None:
    settings: dict[str, Any] = {"form": job.layout, "dry_run": job.dry_run}
    if job.quiet or job.dry_run or not sys.stderr.isatty():
        return write_optimizer_state(state, job.output, source, **settings)
    with click.progressbar(length=state.nbytes, label="writing", file=sys.stderr) as bar:
        return write_optimizer_state(state, job.output, source, progress=bar.update, **settings)
