"""What the writing commands share: where the output goes, and what is said of it."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ckptkit.cli.options import Form, about, echo_report, expand_option, form_options, quiet_option, read_toml, tell
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.text import plural, quoted
from ckptkit.formats.atomic import AtomicFile, prepare_target
from ckptkit.plans.execute import Written, check_output, execute, verify
from ckptkit.plans.output import FORMATS, Output, choose_output
from ckptkit.plans.plan import Plan, ties_broken
from ckptkit.render.plan import plan_document, plan_page, written_text

__all__ = ["Job", "carry_out", "output_options", "planned", "write_json"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?B?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, slots=True)
class Job:
    """How the output of a command is asked for."""

    output: Output
    dry_run: bool
    form: Form
    quiet: bool
    expand: bool
    plan_file: str | None = None
    verify: bool = False


def output_options(command: _Command) -> _Command:
    """Add every option about an output, and pass them on as one ``job`` argument."""

    @functools.wraps(command)
    def with_job(
        *args: Any,
        output: str,
        output_format: str | None,
        max_shard_size: int | None,
        force: bool,
        only_tensors: bool,
        keep_unknown: bool,
        dry_run: bool,
        form: Form,
        quiet: bool,
        expand: bool,
        plan_file: str | None,
        verify: bool,
        **others: Any,
    ) -> Any:
        chosen = choose_output(
            output,
            format=output_format,
            max_shard_size=max_shard_size,
            force=force,
            only_tensors=only_tensors,
            keep_unknown=keep_unknown,
        )
        return command(*args, job=Job(chosen, dry_run, form, quiet, expand, plan_file, verify), **others)

    decorators = (
        click.option("-o", "--output", required=True, type=click.Path(), help="Where to write; its suffix says how."),
        click.option("--format", "output_format", type=click.Choice(FORMATS), help="The format, whatever the suffix."),
        click.option("--max-shard-size", callback=_parse_size, metavar="SIZE",
                     help="Write a directory of safetensors shards of at most SIZE (2GB, 500MiB); "
                     "a larger tensor gets a shard of its own."),
        click.option("--force", is_flag=True, help="Replace an existing output, whole or not at all."),
        click.option("--only-tensors", is_flag=True,
                     help="Write the tensors alone, without what else is in a torch file (epoch, optimizer)."),
        click.option("--keep-unknown", is_flag=True,
                     help="Keep code references that torch.load(weights_only=True) refuses; they are not run."),
        click.option("-n", "--dry-run", is_flag=True, help="Print the plan; read headers only and write nothing."),
        click.option("--plan", "plan_file", type=click.Path(), metavar="FILE",
                     help="Write the plan to FILE, as JSON that --apply and --invert read."),
        click.option("--verify", is_flag=True, help="Read the output back and prove every tensor against the plan."),
        expand_option,
        form_options,
        quiet_option,
    )  # fmt: skip
    for decorator in reversed(decorators):
        with_job = decorator(with_job)
    return with_job  # type: ignore[return-value]


def _parse_size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise click.BadParameter(f"{quoted(value)} is no size; write 2GB or 500MiB")
    size = float(match[1]) * _UNITS[match[2].lower().removesuffix("b")]
    if not math.isfinite(size):
        raise click.BadParameter(f"{quoted(value)} is no size that a file can have; write 2GB or 500MiB")
    return int(size)


def carry_out(command: str, plan: Plan, sources: Mapping[str, Checkpoint], job: Job) -> None:
    """Print the plan, or execute it and say what was written."""
    plan = check_output(plan, job.output, sources)
    if job.plan_file is not None:
        from ckptkit.plans.saved import plan_to_json

        write_json(job.plan_file, plan_to_json(plan, sources), force=job.output.force)
    written = None if job.dry_run else _execute(plan, sources, job)
    if job.dry_run or job.form is not Form.TEXT:
        echo_report(
            job.form,
            lambda: plan_page(plan, written, expand=job.expand),
            lambda: plan_document(command, plan, written),
        )
    proved = None
    if written is not None and job.verify:
        proved = verify(plan, sources, written.path, written.envelope)
    if not job.quiet:
        shared = ties_broken(plan) if job.output.format == "safetensors" else []
        said = [] if written is None else written_text(plan, written, shared)
        for note in (*plan.notes, *said):
            tell(note)
        if proved is not None:
            tell(f"verified: each of {plural(proved, 'tensor')} is what the plan makes, bit by bit")


def planned(sources: Mapping[str, Checkpoint], *, apply_file: str | None, invert_file: str | None = None) -> Plan:
    """Return the plan of a file for these inputs, by role: as it is, or turned round."""
    from ckptkit.plans.saved import apply_plan, invert_plan, plan_from_json

    path = apply_file or invert_file
    assert path is not None  # noqa: S101 - the commands ask for one of them
    with about(path):
        saved = plan_from_json(read_toml(path, as_json=True))
        return apply_plan(invert_plan(saved) if invert_file else saved, sources)


def write_json(path: str, document: Mapping[str, Any], *, force: bool) -> None:
    """Write a document beside an output, whole or not at all; raises ``OutputError`` as an output does."""
    data = json.dumps(document, indent=1).encode() + b"\n"
    with AtomicFile(prepare_target(path, force=force), len(data)) as file:
        file.write(data, 0)


def _execute(plan: Plan, sources: Mapping[str, Checkpoint], job: Job) -> Written:
    if job.quiet or not sys.stderr.isatty():
        return execute(plan, sources, job.output)
    with click.progressbar(length=plan.nbytes, label="writing", file=sys.stderr) as bar:
        return execute(plan, sources, job.output, progress=bar.update)
