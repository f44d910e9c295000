"""The command ``ckpt digest``."""

from __future__ import annotations

import os

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import note_what_is_beside, open_checkpoints
from ckptkit.cli.common.options import PATH_TYPE, path_argument, report_options, skip_unread_option
from ckptkit.cli.common.options.engines import Engine, engine_options
from ckptkit.cli.common.options.rules import rule_options
from ckptkit.cli.common.printing import ReportFormat, echo_result, print_message, progress_bar
from ckptkit.core.checkpoint.stored import has_stored_bytes
from ckptkit.core.config_files import default_error_path
from ckptkit.core.files.places import kind_at
from ckptkit.core.text import plural, printable, quoted, shell_word
from ckptkit.digests import Digests
from ckptkit.digests import digest as digest_of
from ckptkit.digests.check import DigestCheck, check_digests, is_digest_file, refuse_checkpoint
from ckptkit.digests.hashing import ALGORITHMS
from ckptkit.errors import FormatError
from ckptkit.formats.writing.outputs import write_small_file
from ckptkit.formats.writing.targets import prepare_side_file
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules

__all__ = ["digest"]


@click.command(cls=Command, first=("--check", "--algorithm", "--output", "--force", "--rename", "--keep", "--drop"))
@path_argument("path", required=False)
@click.option("--check", "recorded", type=PATH_TYPE, metavar="FILE",
              help="Compare with the digests in FILE, as sha256sum -c does.")  # fmt: skip
@click.option("--algorithm", type=click.Choice(ALGORITHMS), help="Default: sha256. xxh3 needs the extra [fast].")
@click.option("-o", "--output", type=PATH_TYPE, metavar="FILE", help="Write the digests to a file.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@rule_options(beside="path")
@skip_unread_option
@engine_options
@report_options
@click.option("-q", "--quiet", is_flag=True,
              help="Print no progress, notes or hints, and of a check only what is not OK.")  # fmt: skip
@click.pass_context
def digest(
    context: click.Context,
    path: str | None,
    *,
    recorded: str | None,
    algorithm: str | None,
    output: str | None,
    force: bool,
    rules: Rules,
    skip_unread: bool,
    engine: Engine,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Print a hash of each tensor, of all contents, and of all names and shapes.

    The hash of a tensor covers its dtype, shape and bytes. It is the same in every format, under any name, and in one
    file or many. Only tensors are hashed, and of a training checkpoint only the weights. --check needs no second
    checkpoint: it says which keys have the recorded hash, and which are missing or new; with -q only those that are not
    OK. Without PATH, it checks the path of FILE without its last suffix. Exit code 1 if one key is not OK.

    \b
    ckpt digest model.safetensors -o model.safetensors.digest
    ckpt digest --check model.safetensors.digest -q
    ckpt digest --check model.safetensors.digest converted.pt
    """  # noqa: D301 - \b is click's mark
    if recorded is not None and (algorithm or output):
        raise click.UsageError("--check takes the algorithm from FILE, and writes nothing")
    path = _beside(recorded) if path is None else path
    if is_digest_file(path):
        others = "PATH" if recorded is None or is_digest_file(recorded) else shell_word(recorded)
        hint = f"ckpt digest --check {shell_word(path)} {others} compares a checkpoint with these digests"
        raise FormatError("is a digest file, not a checkpoint", path=path, hint=hint)
    with open_checkpoints(path, quiet=quiet) as (checkpoint,), default_error_path(path):
        target = None if output is None else prepare_side_file(output, checkpoint.files, force=force)
        size = sum(info.nbytes for info in checkpoint.values() if has_stored_bytes(info))
        note_what_is_beside(checkpoint, "hashed", quiet=quiet)
        for note in () if quiet or not rules.stages else apply_rules(rules, checkpoint).notes:
            print_message(note)
        result: Digests | DigestCheck
        with engine.executor() as executor, progress_bar(size, "reading", hidden=quiet) as progress:
            source = engine.input(path, checkpoint)
            if recorded is not None:
                result = check_digests(
                    recorded, source, rules, skip_unread=skip_unread, progress=progress, executor=executor
                )
            else:
                result = digest_of(
                    source,
                    rules,
                    algorithm=algorithm or "sha256",
                    skip_unread=skip_unread,
                    progress=progress,
                    executor=executor,
                )
    if result.skipped and not quiet:
        first = next(iter(result.skipped))
        print_message(f"{plural(len(result.skipped), 'tensor')} left out: {quoted(first)}: {result.skipped[first]}")
    if isinstance(result, DigestCheck):
        echo_result(report_format, result, quiet=quiet)
        context.exit(0 if result.ok else 1)
    if target is None or report_format is not ReportFormat.TABLE:
        echo_result(report_format, result)
    if target is not None:
        write_small_file(target, "".join(f"{line}\n" for line in result.lines).encode())
        if not quiet:
            print_message(f"wrote {printable(str(output))}: {plural(len(result.tensors), 'digest')}")


def _beside(recorded: str | None) -> str:
    """Return the checkpoint that a digest file is named after."""
    if recorded is None:
        raise click.UsageError("Missing argument 'PATH'.")
    path, suffix = os.path.splitext(recorded)  # of a URL too: nothing is asked
    if suffix and kind_at(path):
        return path
    if not kind_at(recorded):
        raise click.UsageError(f"Missing argument 'PATH': {quoted(recorded)} does not exist either.")
    if not is_digest_file(recorded):
        refuse_checkpoint(recorded)
    given = f"ckpt digest --check {shell_word(recorded)} PATH"
    missing = f"{quoted(path)} does not exist" if suffix else f"{quoted(recorded)} has no suffix"
    raise click.UsageError(f"Missing argument 'PATH': {missing}; give the checkpoint: {given}")
