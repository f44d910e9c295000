"""Options about an output, and the steps that every command takes to write one."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import click

from ckptkit.cli.common.options import (
    PATH_TYPE,
    CommandFunction,
    add_options,
    expand_option,
    output_report_options,
    quiet_option,
)
from ckptkit.cli.common.options.engines import Engine, engine_options
from ckptkit.cli.common.printing import ReportFormat, echo_result, fitted_to, print_message, progress_bar
from ckptkit.core.config_files import json_bytes
from ckptkit.core.text import quoted
from ckptkit.formats.writing.outputs import small_file
from ckptkit.formats.writing.reflink import REFLINKS, Reflink
from ckptkit.formats.writing.targets import prepare_side_file, present_state
from ckptkit.plans.adapters.adapter_formats import adapter_path
from ckptkit.plans.output import FORMATS, Output, choose_output
from ckptkit.plans.quantized.as_codes import QUANTIZE

if TYPE_CHECKING:
    from ckptkit.core.checkpoint import Checkpoint
    from ckptkit.plans.plan import Plan
    from ckptkit.plans.writing.shard_tasks import Elsewhere

__all__ = [
    "OutputOptions",
    "applied_output_options",
    "output_options",
    "plan_output_options",
    "quantize_option",
    "run_plan",
]


_ALONE = Engine()


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """The options of a command that writes a checkpoint: where and how to write, and what to print."""

    output: Output
    dry_run: bool
    report_format: ReportFormat
    quiet: bool
    expand: bool
    plan_file: str | None = None
    verify: bool = False
    allow_overflow: bool = False
    carry: bool = False
    resume: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    drop_metadata: tuple[str, ...] = ()
    engine: Engine = _ALONE


def output_options(command: CommandFunction) -> CommandFunction:
    """Add the options that every writing command has, and pass them to the command as ``options``."""
    return add_options(
        _with_output_options(command), _output_option, _force_option, _only_tensors_option, _keep_unknown_option,
        _dry_run_option, expand_option, output_report_options, quiet_option,
    )  # fmt: skip


def plan_output_options(command: CommandFunction, *, is_required: bool = True) -> CommandFunction:
    """Add the options of a command that writes what a plan says, and pass them to the command as ``options``.

    Unless ``--output`` ``is_required``, something around the command sees to it that it has one.
    """
    output = _output_option if is_required else _sometimes_output_option
    return add_options(
        _with_output_options(command), output, _format_option, _max_shard_size_option, _force_option,
        _only_tensors_option, _keep_unknown_option, _metadata_option, _drop_metadata_option, _carry_option,
        _continue_option, engine_options, _reflink_option, _allow_overflow_option, _dry_run_option, _plan_option,
        _verify_option, expand_option, output_report_options, quiet_option,
    )  # fmt: skip


def applied_output_options(command: CommandFunction) -> CommandFunction:
    """Add the options of a command whose output is known bit by bit, and pass them to the command as ``options``."""
    return add_options(
        _with_output_options(command), _output_option, _format_option, _max_shard_size_option, _force_option,
        _continue_option, engine_options, _dry_run_option, _verify_option, expand_option, output_report_options,
        quiet_option,
    )  # fmt: skip


def _with_output_options(command: CommandFunction) -> CommandFunction:
    @functools.wraps(command)
    def with_options(
        *args: object,
        output: str,
        force: bool,
        dry_run: bool,
        report_format: ReportFormat,
        quiet: bool,
        expand: bool,
        only_tensors: bool = False,
        keep_unknown: bool = False,
        output_format: str | None = None,
        max_shard_size: str | None = None,
        plan_file: str | None = None,
        verify: bool = False,
        allow_overflow: bool = False,
        carry: bool = False,
        resume: bool = False,
        reflink: Reflink = "auto",
        metadata: Mapping[str, str] = MappingProxyType({}),
        drop_metadata: tuple[str, ...] = (),
        engine: Engine = _ALONE,
        **others: object,
    ) -> object:
        chosen = choose_output(
            adapter_path(output, "peft") if others.get("adapter") == "peft" else output,
            format=output_format,
            max_shard_size=max_shard_size,
            force=force,
            only_tensors=only_tensors,
            keep_unknown=keep_unknown,
            reflink=reflink,
        )
        chosen = replace(chosen, before=present_state(chosen.path, is_folder=chosen.is_directory))
        if metadata or drop_metadata:
            from ckptkit.plans.metadata.edits import refuse_without_metadata

            refuse_without_metadata(chosen, metadata, drop_metadata)
        if engine:
            from ckptkit.plans.writing.shard_tasks import refuse_elsewhere

            refuse_elsewhere(chosen)
        options = OutputOptions(
            chosen,
            dry_run,
            report_format,
            quiet,
            expand,
            plan_file,
            verify,
            allow_overflow,
            carry,
            resume,
            metadata,
            drop_metadata,
            engine,
        )
        return command(*args, options=options, **others)

    return with_options


_sometimes_output_option = click.option("-o", "--output", type=PATH_TYPE, help="The file or directory to write.")
_output_option = click.option("-o", "--output", required=True, type=PATH_TYPE, help="The file or directory to write.")
_format_option = click.option(
    "--format", "output_format", type=click.Choice(FORMATS),
    help="Format of the output. dcp: a directory for torch.distributed.checkpoint. Default: by the suffix of its name.",
)  # fmt: skip
_max_shard_size_option = click.option(
    "--max-shard-size", metavar="SIZE",
    help="Write a directory of safetensors shards of at most SIZE (2GB, 500MiB). A larger tensor gets its own shard.",
)  # fmt: skip
_force_option = click.option(
    "--force", is_flag=True, help="Replace an existing output. On a disk this is done completely or not at all."
)
_only_tensors_option = click.option(
    "--only-tensors", is_flag=True, help="Leave out everything else in a torch file, such as the epoch."
)
_keep_unknown_option = click.option(
    "--keep-unknown", is_flag=True,
    help="Copy code references that torch.load(weights_only=True) refuses. They are never run.",
)  # fmt: skip


def _parse_metadata(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """Return the items that are written as ``NAME=TEXT``."""
    items: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise click.BadParameter(f"{quoted(text)} is not of the form NAME=TEXT.", context, option)
        if name in items:
            raise click.BadParameter(f"{quoted(name)} is given twice.", context, option)
        items[name] = value
    return items


_metadata_option = click.option(
    "--metadata", multiple=True, metavar="NAME=TEXT", callback=_parse_metadata,
    help="Write this item into the metadata of a safetensors output. Repeatable.",
)  # fmt: skip
_drop_metadata_option = click.option(
    "--drop-metadata", multiple=True, metavar="PATTERN",
    help="Leave out the items of the input's metadata whose names match. Repeatable.",
)  # fmt: skip
_carry_option = click.option(
    "--carry", is_flag=True,
    help="Take config, generation config, tokenizer and processor files along from the directory of the input (merge: "
    "of BASE). The dtype in config.json becomes that of the output.",
)  # fmt: skip
_continue_option = click.option(
    "--continue", "resume", is_flag=True,
    help="Go on where a killed run onto this directory of shards ended. Its finished shards are kept if the plan and "
    "the inputs are the same. After an error or Ctrl-C, finished shards stay for the next --continue.",
)  # fmt: skip
_reflink_option = click.option(
    "--reflink", type=click.Choice(REFLINKS), default="auto",
    help="Share unchanged blocks of the disk with the input, as cp does. auto (the default): where the file "
    "system can. always: refuse an output that cannot share them. never: copy.",
)  # fmt: skip
_allow_overflow_option = click.option(
    "--allow-overflow", is_flag=True,
    help="Write values that are too large for their new dtype as the cast makes them (usually inf), and report them.",
)  # fmt: skip
_dry_run_option = click.option("-n", "--dry-run", is_flag=True, help="Print the plan; write nothing.")
_plan_option = click.option(
    "--plan", "plan_file", type=PATH_TYPE, metavar="FILE",
    help="Write the plan to FILE as JSON, for --apply and --invert.",
)  # fmt: skip
_verify_option = click.option(
    "--verify", is_flag=True,
    help="Let safetensors or torch read the output, and compare every tensor with the plan.",
)  # fmt: skip
quantize_option = click.option(
    "--quantize", type=click.Choice(QUANTIZE),
    help="Write codes and scales of the linear weights in numbered layers. Embeddings, norms and routers stay plain.",
)  # fmt: skip


def run_plan(plan: Plan, sources: Mapping[str, Checkpoint], paths: Mapping[str, str], options: OutputOptions) -> None:
    """Print the plan for a dry run, or execute it and print what was written.

    ``paths`` says by role what ``sources`` were opened by.
    """
    from ckptkit.plans.execute import execute_prepared, prepare_output
    from ckptkit.render.page import as_text
    from ckptkit.render.results import page_of

    if options.metadata or options.drop_metadata:
        from ckptkit.plans.metadata.edits import edit_metadata

        plan = edit_metadata(plan, options.metadata, options.drop_metadata)
    prepared = prepare_output(plan, options.output, sources, carry=options.carry, resume=options.resume)
    plan = prepared.plan
    for note in () if options.quiet else prepared.leftovers or ():
        print_message(note)
    written = None
    with _plan_file(plan, sources, options):
        if not options.dry_run:
            with (
                _elsewhere(paths, options.engine) as elsewhere,
                progress_bar(plan.nbytes, "writing", hidden=options.quiet) as progress,
            ):
                written = execute_prepared(
                    prepared,
                    sources,
                    options.output,
                    verify=options.verify,
                    allow_overflow=options.allow_overflow,
                    carry=options.carry,
                    resume=options.resume,
                    progress=progress,
                    elsewhere=elsewhere,
                )
    if written is None:
        echo_result(options.report_format, plan, expand=options.expand, with_notes=False)
    elif options.report_format is not ReportFormat.TABLE:
        echo_result(options.report_format, written, tensors=True, expand=options.expand)
    if options.quiet:
        return
    messages: Iterable[str] = plan.notes
    if written is not None:
        page = page_of(written)
        is_fitted = options.report_format is ReportFormat.TABLE
        messages = as_text(fitted_to(sys.stderr, page) if is_fitted else page)
    for message in messages:
        print_message(message)


@contextlib.contextmanager
def _elsewhere(paths: Mapping[str, str], engine: Engine) -> Iterator[Elsewhere | None]:
    if not engine:
        yield None
        return
    from ckptkit.plans.writing.shard_tasks import Elsewhere

    with engine.executor() as executor:
        yield None if executor is None else Elsewhere(executor, paths)


@contextlib.contextmanager
def _plan_file(plan: Plan, sources: Mapping[str, Checkpoint], options: OutputOptions) -> Iterator[None]:
    """Write the plan to the file that the user named, if the block that writes the output succeeds."""
    if options.plan_file is None:
        yield
        return
    from ckptkit.plans.saved import plan_to_json

    inputs = [file for checkpoint in sources.values() for file in checkpoint.files]
    target = prepare_side_file(options.plan_file, inputs, options.output.path, force=options.output.force)
    with small_file(target, json_bytes(plan_to_json(plan, sources))):
        yield
