"""The commands ``ckpt optim``: each imports the modules that only it runs, so that the others start fast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import click

from ckptkit.cli.common.commands import CommandGroup
from ckptkit.cli.common.inputs import open_with_warnings
from ckptkit.cli.common.options import (
    PATH_TYPE,
    CommandFunction,
    add_options,
    expand_option,
    path_argument,
    quiet_option,
    report_options,
)
from ckptkit.cli.common.options.rules import rule_options
from ckptkit.cli.common.outputs import OutputOptions, output_options
from ckptkit.cli.common.printing import ReportFormat, echo_result, exit_code, print_message, progress_bar
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.config_files import default_error_path, read_table_file
from ckptkit.core.files.live_prefix import LIVE_PREFIX, is_live_path
from ckptkit.core.findings import Severity
from ckptkit.core.text import plural, printable
from ckptkit.core.torch_types import Module
from ckptkit.errors import CkptkitError, PlanError, RuleError
from ckptkit.formats import open_checkpoint, open_optimizer
from ckptkit.optimizer_state import codes
from ckptkit.optimizer_state.forms import FoundState, read_state
from ckptkit.optimizer_state.given_names import read_names_file
from ckptkit.optimizer_state.model import FORMS, OptimizerState, parameter_shape
from ckptkit.optimizer_state.naming import name_by_position, structure_findings, to_named
from ckptkit.rules.model import Rules

if TYPE_CHECKING:
    from ckptkit.param_groups.lock import ParamGroupsLock
    from ckptkit.param_groups.plan import ParamGroupsPlan

__all__ = ["optim"]


@click.group(cls=CommandGroup)
def optim() -> None:
    """Show the state of an optimizer by parameter name, and edit it as the weights were edited.

    PATH is a checkpoint that holds the result of optimizer.state_dict(). PATH::a.b selects one state if the file has
    several. If the state numbers its parameters, the names come from --model, or from the weights in the same file.
    Shapes and order must leave only one assignment.
    """


@dataclass(frozen=True, slots=True)
class NameSource:
    """Where the names of the parameters come from: a model, a file with names, or neither."""

    model: str | None
    names_file: str | None

    @property
    def is_empty(self) -> bool:
        """Whether the user gave neither --model nor --names."""
        return self.model is None and self.names_file is None

    def named(self, found: FoundState, stack: contextlib.ExitStack, *, drop_strays: bool = False) -> OptimizerState:
        """Return the state by name; a list of names must fit the model, if the user gave both."""
        model = None if self.model is None else _open_model(stack, self.model)
        if self.names_file is None:
            return to_named(found, model, drop_strays=drop_strays)
        return to_named(found, read_names_file(self.names_file), model=model, drop_strays=drop_strays)


_model_option = click.option(
    "--model", type=PATH_TYPE, metavar="PATH|py:…", help="The model that the optimizer trained, or its weights."
)
_names_option = click.option(
    "--names", "names_file", type=PATH_TYPE, metavar="FILE",
    help="A file with the names of all parameters, one per line, in the order of the groups. They must fit --model.",
)  # fmt: skip
_form_option = click.option(
    "--form", type=click.Choice(FORMS),
    help="indexed: by position, for load_state_dict. param-names: with names. named, flattened: for "
    "torch.distributed.checkpoint. Default: the form of the file.",
)  # fmt: skip


def _name_options(command: CommandFunction) -> CommandFunction:
    """Add --model and --names, and pass them to the command as ``name_source``."""

    @functools.wraps(command)
    def with_name_source(*args: object, model: str | None, names_file: str | None, **others: object) -> object:
        return command(*args, name_source=NameSource(model, names_file), **others)

    return add_options(with_name_source, _model_option, _names_option)


def _edit_options(command: CommandFunction) -> CommandFunction:
    """Add the options of every command that writes a state: about the output, its form, and the names."""
    return add_options(command, output_options, _form_option, _name_options)


@optim.command()
@path_argument("path")
@_name_options
@expand_option
@report_options
@quiet_option
@click.pass_context
def show(
    context: click.Context,
    path: str,
    *,
    name_source: NameSource,
    expand: bool,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Show each parameter with its slots, step count and group.

    Also shows the options of the groups, and what is unusual. Exit code 0 if nothing was found, else 1.

    \b
    ckpt optim show run.ckpt
    ckpt optim show optimizer.pt --model py:mynet:build
    """  # noqa: D301 - \b is click's mark
    from ckptkit.optimizer_state.compare import state_report

    with contextlib.ExitStack() as stack:
        _, found = _open_state(stack, path, quiet=quiet)
        try:
            state = name_source.named(found, stack)
        except RuleError:  # a file of names that is not valid
            raise
        except CkptkitError as error:
            if error.path and error.path in (name_source.model, name_source.names_file):
                raise  # their source cannot be read
            severity: Severity = "note" if name_source.is_empty else "error"
            no_names = codes.NO_NAMES.finding("", error.reason, error.hint or "", severity=severity)
            state = replace(name_by_position(found), findings=tuple(structure_findings(found)) or (no_names,))
        report = state_report(state)  # raises where a step count cannot be read
        echo_result(report_format, state, expand=expand)
    context.exit(exit_code(report))


@optim.command("remap")
@path_argument("path")
@_edit_options
@rule_options(beside="path")
@click.option("--like", type=PATH_TYPE, metavar="PATH|py:…",
              help="The model that will load the state, or its weights. Positions follow its order.")  # fmt: skip
@click.option("--elementwise", multiple=True, metavar="SLOT",
              help="Another slot that holds one number per element. Repeatable.")  # fmt: skip
def remap_command(
    path: str,
    *,
    options: OutputOptions,
    form: str | None,
    name_source: NameSource,
    rules: Rules,
    like: str | None,
    elementwise: tuple[str, ...],
) -> None:
    """Edit the state by the rules that changed the weights.

    The rules work as in ckpt remap: they rename, split, join, pad or transpose. Everything else in the file (weights,
    epoch) stays unchanged.

    \b
    ckpt optim remap run.ckpt -o new.ckpt --rules rules.toml --like py:newnet:build
    """  # noqa: D301 - \b is click's mark
    from ckptkit.optimizer_state.groups import order_like
    from ckptkit.optimizer_state.remapping import remap

    with contextlib.ExitStack() as stack:
        checkpoint, state = _open_named_state(stack, path, name_source, quiet=options.quiet)
        with default_error_path(path):
            state = remap(state, rules, elementwise=elementwise)
            if like is not None:
                state = order_like(state, _open_model(stack, like))
        notes = []
        if (form or state.form) == "indexed" and like is None:
            notes.append("positions follow the file: for a model with another order of parameters, give --like MODEL")
        if checkpoint.envelope and not options.output.only_tensors:
            notes.append("the weights in the file are unchanged: ckpt remap takes the same rules")
        _write(state, checkpoint, options, form, notes)


@optim.command("resplit")
@path_argument("path")
@_edit_options
@click.option("--groups", "spec", type=PATH_TYPE, metavar="FILE",
              help="The new groups: a spec as for ckpt groups, or a lock.")  # fmt: skip
@click.option("--as", "other", type=PATH_TYPE, metavar="PATH",
              help="Another optimizer state, which has the new groups.")  # fmt: skip
@click.option("--hyper", type=click.Choice(("live", "saved", "error")), default="live", show_default=True,
              help="Which options to use where they differ: of the new groups, of PATH, or refuse.")  # fmt: skip
def resplit_command(
    path: str,
    *,
    options: OutputOptions,
    form: str | None,
    name_source: NameSource,
    spec: str | None,
    other: str | None,
    hyper: Literal["live", "saved", "error"],
) -> None:
    """Move the parameters to other groups.

    There may be more or fewer groups, or another order. Each parameter keeps its state and its options.

    \b
    ckpt optim resplit run.ckpt -o new.ckpt --groups groups.toml
    """  # noqa: D301 - \b is click's mark
    from ckptkit.optimizer_state.groups import resplit

    if (spec is None) == (other is None):
        raise click.UsageError("give either --groups or --as")
    with contextlib.ExitStack() as stack:
        checkpoint, state = _open_named_state(stack, path, name_source, quiet=options.quiet)
        groups: OptimizerState | ParamGroupsPlan | ParamGroupsLock
        if spec is not None:
            groups = _read_groups(spec, state, name_source, stack)
        else:
            _, groups = _open_named_state(stack, other or "", name_source, quiet=options.quiet)
        with default_error_path(path):
            state = resplit(state, groups, hyper)
        _write(state, checkpoint, options, form, [])


def _read_groups(
    spec: str, state: OptimizerState, name_source: NameSource, stack: contextlib.ExitStack
) -> ParamGroupsPlan | ParamGroupsLock:
    """Return the groups in a file: those of a lock, or those of a spec for the model or for the shapes in the state."""
    from ckptkit.param_groups.lock import is_lock, parse_lock
    from ckptkit.param_groups.plan import plan_param_groups

    table = read_table_file(spec)
    with default_error_path(spec):
        if is_lock(table):
            return parse_lock(table)
        model = _shapes_in(state) if name_source.model is None else _open_model(stack, name_source.model)
        return plan_param_groups(model, table)


def _shapes_in(state: OptimizerState) -> dict[str, TensorInfo]:
    """Return the shape of each parameter as its state has it; raises ``PlanError`` if a state has no shape."""
    shapes = {name: parameter_shape(state.state.get(name, {})) for name in state.names}
    unknown = [name for name, shape in shapes.items() if shape is None]
    if unknown:
        raise PlanError(
            f"the state has no shape of {plural(len(unknown), 'parameter')}, such as {printable(unknown[0])}",
            hint="give the model: --model py:package.module:callable",
        )
    return {name: TensorInfo(name, "F32", shape or ()) for name, shape in shapes.items()}


@optim.command("prune")
@path_argument("path")
@_edit_options
@click.option("--like", type=PATH_TYPE, metavar="PATH|py:…",
              help="The model that will load the state, or its weights.")  # fmt: skip
@click.option("--drop", multiple=True, metavar="PATTERN", help="Leave out matching parameters. Repeatable.")
@click.option("--reset", multiple=True, metavar="PATTERN",
              help="Drop the state of matching parameters, so that it starts from zero. Repeatable.")  # fmt: skip
def prune_command(
    path: str,
    *,
    options: OutputOptions,
    form: str | None,
    name_source: NameSource,
    like: str | None,
    drop: tuple[str, ...],
    reset: tuple[str, ...],
) -> None:
    """Leave out parameters and state that no longer fit.

    Leaves out parameters that are deleted or frozen, and state that has another shape or belongs to no group.

    \b
    ckpt optim prune run.ckpt -o new.ckpt --like py:newnet:build
    ckpt optim prune run.ckpt -o new.ckpt --reset 'head.*'
    """  # noqa: D301 - \b is click's mark
    from ckptkit.optimizer_state.pruning import prune

    with contextlib.ExitStack() as stack:
        checkpoint, found = _open_state(stack, path, quiet=options.quiet)
        with default_error_path(path):
            state = name_source.named(found, stack, drop_strays=True)
            state = prune(state, None if like is None else _open_model(stack, like), drop=drop, reset=reset)
        is_whole = len(state.names) == len(state.changes) and len(state.state) == len(found.state)
        _write(state, checkpoint, options, form, [_nothing_pruned(like)] if is_whole else [])


def _nothing_pruned(like: str | None) -> str:
    if like is None:
        return (
            "nothing was pruned: --like MODEL leaves out what does not fit a model, --drop PATTERN what matches, and "
            "--reset PATTERN only drops the state"
        )
    return f"nothing was pruned: every parameter and its state fit {printable(like)}"


@optim.command()
@path_argument("saved")
@path_argument("live")
@_name_options
@click.option("--values", is_flag=True, help="Compare the values of all slots too: read both states once.")
@report_options
@quiet_option
@click.pass_context
def diff(
    context: click.Context,
    saved: str,
    live: str,
    *,
    name_source: NameSource,
    values: bool,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Show what loading the state SAVED would change.

    LIVE is the current state of the optimizer that would load it. Differences are listed by parameter name. No tensor
    is compared without --values. Exit code 0 if nothing was found, else 1.

    \b
    ckpt optim diff run.ckpt now.ckpt
    ckpt optim diff run.ckpt now.ckpt --values
    """  # noqa: D301 - \b is click's mark
    from ckptkit.optimizer_state.compare import optimizer_state_diff

    with contextlib.ExitStack() as stack:
        states = [_open_named_state(stack, path, name_source, quiet=quiet)[1] for path in (saved, live)]
        for path, state in zip((saved, live), states, strict=True):
            if state.evidence and not quiet:
                print_message(f"names of {printable(path)}: {state.evidence}")
        size = sum(state.nbytes for state in states)
        with progress_bar(size, "comparing", hidden=quiet or not values) as progress:
            report = optimizer_state_diff(states[0], states[1], values=values, progress=progress)
        echo_result(report_format, report)
        if not values and not quiet:
            said = "values were not compared: " if report.findings else ""  # where nothing was found, the page says it
            print_message(f"{said}--values compares them")
    context.exit(exit_code(report))


def _open_state(stack: contextlib.ExitStack, path: str, *, quiet: bool) -> tuple[Checkpoint, FoundState]:
    checkpoint = stack.enter_context(open_with_warnings(path, open_optimizer, quiet=quiet))
    with default_error_path(path):
        return checkpoint, read_state(checkpoint)


def _open_named_state(
    stack: contextlib.ExitStack, path: str, name_source: NameSource, *, quiet: bool
) -> tuple[Checkpoint, OptimizerState]:
    checkpoint, found = _open_state(stack, path, quiet=quiet)
    with default_error_path(path):
        return checkpoint, name_source.named(found, stack)


def _open_model(stack: contextlib.ExitStack, path: str) -> Module | Checkpoint:
    """Return the live model, which has its parameters in order, or a checkpoint of its weights."""
    if is_live_path(path):
        from ckptkit.formats.live import build_shapes

        with default_error_path(path):
            model: Module = build_shapes(path.removeprefix(LIVE_PREFIX))
            return model
    return stack.enter_context(open_checkpoint(path))


def _write(
    state: OptimizerState, source: Checkpoint, options: OutputOptions, form: str | None, notes: Sequence[str]
) -> None:
    """Write the state and print what was written, or print what would be written for a dry run."""
    from ckptkit.optimizer_state.write import write_optimizer_state

    with progress_bar(state.nbytes, "writing", hidden=options.quiet or options.dry_run) as progress:
        written = write_optimizer_state(
            state, options.output, source, form=form, dry_run=options.dry_run, progress=progress
        )
    if written is None:
        echo_result(options.report_format, state, chosen={"changes": True}, expand=options.expand)
    elif options.report_format is not ReportFormat.TABLE:
        echo_result(options.report_format, written, changes=True, expand=options.expand)
    if options.quiet:
        return
    for message in (*notes, *([] if written is None else str(written).split("\n"))):
        print_message(message)
