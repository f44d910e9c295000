"""What commands share: options, how results are printed, and which path an error is about."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ckptkit.errors import CkptkitError, PathError, RuleError
from ckptkit.execute import FORMATS, Output, Written, choose_output, execute
from ckptkit.formats import open_checkpoint
from ckptkit.plan import Plan, ties_broken
from ckptkit.report.plan import plan_document, plan_text, written_text
from ckptkit.rules import parse_rules
from ckptkit.tensors import Checkpoint
from ckptkit.text import printable

__all__ = [
    "Job",
    "about",
    "carry_out",
    "echo_json",
    "echo_lines",
    "expand_option",
    "filter_options",
    "json_option",
    "opened",
    "output_options",
    "path_argument",
    "quiet_option",
    "read_toml",
    "rule_options",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?B?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_COLOURS = {"+": "green", "-": "red", "~": "yellow", "≈": "yellow"}


def path_argument(name: str, **settings: Any) -> Callable[[_Command], _Command]:
    """Return an argument that is a PATH in the sense of ckptkit; completed as a file name."""
    return click.argument(name, type=click.Path(), **settings)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No messages on stderr but errors.")
expand_option = click.option("--expand", is_flag=True, help="One line a tensor: do not join layers.")


def filter_options(command: _Command) -> _Command:
    """Add --keep and --drop."""
    command = click.option("--drop", multiple=True, metavar="PATTERN", help="Leave out keys that fit. Repeatable.")(
        command
    )
    return click.option("--keep", multiple=True, metavar="PATTERN", help="Take only keys that fit. Repeatable.")(
        command
    )


def rule_options(command: _Command) -> _Command:
    """Add every option that makes rules, and pass them on as one ``rules`` argument.

    However they are mixed on the command line, keeping comes first, then dropping, then renaming.
    """

    @functools.wraps(command)
    def with_rules(
        *args: Any,
        rename: tuple[str, ...],
        keep: tuple[str, ...],
        drop: tuple[str, ...],
        rules_file: str | None,
        allow_unused: bool,
        **others: Any,
    ) -> Any:
        file = None if rules_file is None else read_toml(rules_file)
        with about(rules_file):
            rules = parse_rules(rename=rename, keep=keep, drop=drop, file=file, allow_unused=allow_unused)
        return command(*args, rules=rules, **others)

    decorators = (
        click.option("--rename", multiple=True, metavar="OLD=NEW", help="Rename keys, as in 'module.*=*'. Repeatable."),
        filter_options,
        click.option("--rules", "rules_file", type=click.Path(), metavar="FILE", help="Read rules from a TOML file."),
        click.option("--allow-unused", is_flag=True, help="A rule that matches nothing is no error."),
    )
    for decorator in reversed(decorators):
        with_rules = decorator(with_rules)
    return with_rules  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Job:
    """How the output of a command is asked for."""

    output: Output
    dry_run: bool
    as_json: bool
    quiet: bool
    expand: bool


def output_options(command: _Command) -> _Command:
    """Add every option about an output, and pass them on as one ``job`` argument."""

    @functools.wraps(command)
    def with_job(
        *args: Any,
        output: str,
        output_format: str | None,
        max_shard_size: int | None,
        force: bool,
        dry_run: bool,
        as_json: bool,
        quiet: bool,
        expand: bool,
        **others: Any,
    ) -> Any:
        chosen = choose_output(output, format=output_format, max_shard_size=max_shard_size, force=force)
        return command(*args, job=Job(chosen, dry_run, as_json, quiet, expand), **others)

    decorators = (
        click.option("-o", "--output", required=True, type=click.Path(), help="Where to write; its suffix says how."),
        click.option("--format", "output_format", type=click.Choice(FORMATS), help="The format, whatever the suffix."),
        click.option("--max-shard-size", callback=_parse_size, metavar="SIZE",
                     help="Write a directory of safetensors shards of at most SIZE (2GB, 500MiB)."),
        click.option("--force", is_flag=True, help="Replace an existing output, whole or not at all."),
        click.option("-n", "--dry-run", is_flag=True, help="Print the plan; read headers only and write nothing."),
        expand_option,
        json_option,
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
        raise click.BadParameter(f"{value!r} is no size; write 2GB or 500MiB")
    return int(float(match[1]) * _UNITS[match[2].lower().removesuffix("b")])


def read_toml(path: str) -> Mapping[str, Any]:
    """Return the content of a TOML (or, by its suffix, JSON) file; raises ``RuleError`` where it is neither."""
    try:
        with open(path, "rb") as file:
            return json.load(file) if path.endswith(".json") else tomllib.load(file)
    except OSError as error:
        raise PathError((error.strerror or str(error)).lower(), path=path) from None
    except (ValueError, RecursionError) as error:
        raise RuleError(f"is no {'JSON' if path.endswith('.json') else 'TOML'}: {error}", path=path) from None


@contextlib.contextmanager
def about(path: str | None) -> Iterator[None]:
    """Let errors that name no file be about this one."""
    try:
        yield
    except CkptkitError as error:
        if error.path is None:
            error.path = path
        raise


@contextlib.contextmanager
def opened(*paths: str, quiet: bool) -> Iterator[list[Checkpoint]]:
    """Open checkpoints, say on stderr what is odd about each, and close them at the end."""
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in paths]
        for checkpoint in checkpoints:
            if not quiet:
                for warning in checkpoint.warnings:
                    click.echo(f"ckpt: {printable(checkpoint.path)}: warning: {warning}", err=True)
        yield checkpoints


def carry_out(command: str, plan: Plan, sources: Mapping[str, Checkpoint], job: Job) -> None:
    """Print the plan, or execute it and say what was written."""
    if job.dry_run:
        if job.as_json:
            echo_json(plan_document(command, plan, None))
        else:
            echo_lines(plan_text(plan, expand=job.expand))
        return
    written = _execute(plan, sources, job)
    if job.as_json:
        echo_json(plan_document(command, plan, written))
    if not job.quiet:
        shared = ties_broken(plan) if job.output.format == "safetensors" else []
        for note in (*plan.notes, *written_text(plan, written, shared)):
            click.echo(note, err=True)


def _execute(plan: Plan, sources: Mapping[str, Checkpoint], job: Job) -> Written:
    if job.quiet or not sys.stderr.isatty():
        return execute(plan, sources, job.output)
    with click.progressbar(length=plan.nbytes, label="writing", file=sys.stderr) as bar:
        return execute(plan, sources, job.output, progress=bar.update)


def echo_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document; names are exact, and ASCII whatever the terminal can show."""
    click.echo(json.dumps(document, allow_nan=False))


def echo_lines(lines: Iterable[str]) -> None:
    """Print lines; those marked as in a diff in its colours, where colours are wanted."""
    for line in lines:
        colour = _COLOURS.get(line[:1]) if line[1:2] in (" ", "") else None
        click.echo(click.style(line, fg=colour) if colour else line)
