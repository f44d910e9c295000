"""The commands ``ckpt git``: checkpoints in ``git diff``, and gates on what a commit changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptkit.cli.common.commands import CommandGroup
from ckptkit.cli.common.options import quiet_option, report_options
from ckptkit.cli.common.printing import ReportFormat, echo_report, echo_result, exit_code, print_message

if TYPE_CHECKING:
    from ckptkit.cli.git.installing import Changes

__all__ = ["git"]


@click.group(cls=CommandGroup)
def git() -> None:
    """Show in git diff which tensors changed, and gate what a commit changes."""


_where_option = click.option(
    "--global/--local", "everywhere", default=False,
    help="For all repositories of this user, or for this one, which is the default.",
)  # fmt: skip
_dry_run_option = click.option("-n", "--dry-run", is_flag=True, help="Say what would change; change nothing.")


def _parse_patterns(context: click.Context, argument: click.Parameter, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return patterns that git takes in a line of attributes."""
    for pattern in patterns:
        if not pattern.strip() or not pattern.isprintable() or pattern.startswith("!"):
            raise click.BadParameter(f"{pattern!r} is not a pattern of file names, such as '*.th'.", context, argument)
    return patterns


@git.command()
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...", callback=_parse_patterns)
@_where_option
@_dry_run_option
@report_options
@quiet_option
def install(
    patterns: tuple[str, ...], *, everywhere: bool, dry_run: bool, report_format: ReportFormat, quiet: bool
) -> None:
    """Make git diff, git log -p and git show compare checkpoints tensor by tensor.

    Adds lines to .gitattributes, to commit, and two settings to the config of git, which each clone needs: run it in
    each. Without PATTERN: *.safetensors, *.pt, *.pth, *.bin, *.ckpt and *.gguf. git keeps each text that it has made;
    install makes it forget them.

    \b
    ckpt git install
    ckpt git install '*.th'
    """  # noqa: D301 - \b is click's mark
    from ckptkit.cli.git.installing import PATTERNS, notes_about_files, plan_install

    chosen = patterns or PATTERNS
    changes = plan_install(chosen, everywhere=everywhere)
    _carry_out(changes, dry_run=dry_run, report_format=report_format)
    for note in () if quiet or dry_run else notes_about_files(chosen):
        print_message(f"ckpt: note: {note}")


@git.command()
@_where_option
@_dry_run_option
@report_options
@quiet_option
def uninstall(*, everywhere: bool, dry_run: bool, report_format: ReportFormat, quiet: bool) -> None:
    """Undo ckpt git install.

    \b
    ckpt git uninstall --dry-run
    """  # noqa: D301 - \b is click's mark
    from ckptkit.cli.git.installing import plan_uninstall

    changes = plan_uninstall(everywhere=everywhere)
    _carry_out(changes, dry_run=dry_run, report_format=report_format)
    for note in () if quiet else changes.notes:
        print_message(f"ckpt: note: {note}")


def _carry_out(changes: Changes, *, dry_run: bool, report_format: ReportFormat) -> None:
    from ckptkit.cli.git.installing import apply_changes
    from ckptkit.render.page import Line, Listing

    if not dry_run:
        apply_changes(changes)
    lines = changes.said or ("nothing to change",)
    title = [Line(("dry run: nothing was changed",))] if dry_run and changes.said else []
    echo_report(
        report_format,
        lambda: [*title, Listing(lines)],
        lambda: {"schema": "ckptkit.git-install/1", "changes": list(changes.said), "dry_run": dry_run},
    )


@git.command()
@click.argument("file", type=click.Path(readable=False))
def textconv(file: str) -> None:
    """Print the text of a file that git diff compares.

    It has a line for each tensor: key, dtype, shape and the start of its digest, as ckpt digest computes it. Every byte
    is read. A pointer of Git LFS stands for its object. A file that cannot be read has its size, its digest and the
    reason, and the exit code is 0 all the same.

    \b
    ckpt git textconv model.safetensors
    """  # noqa: D301 - \b is click's mark
    from ckptkit.cli.git.texts import text_of_file

    # As bytes, because the text must not depend on the encoding of a terminal.
    click.echo("".join(f"{line}\n" for line in text_of_file(file)).encode(), nl=False)


@git.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(readable=False), metavar="FILE...")
@click.option(
    "--expect-frozen", multiple=True, required=True, metavar="PATTERN",
    help="The values of these keys are equal. Repeatable.",
)  # fmt: skip
@click.option("--base", metavar="REV[:PATH]", help="What to compare with. Default: HEAD, or what pre-commit names.")
@click.option("--drop", multiple=True, metavar="PATTERN", help="Leave these keys out. Repeatable.")
@click.option("--allow-unused", is_flag=True, help="Allow patterns that match no key of any file.")
@report_options
@quiet_option
@click.pass_context
def frozen(
    context: click.Context,
    files: tuple[str, ...],
    *,
    expect_frozen: tuple[str, ...],
    base: str | None,
    drop: tuple[str, ...],
    allow_unused: bool,
    report_format: ReportFormat,
    quiet: bool,  # noqa: ARG001 - every command takes -q
) -> None:
    """Check that a commit does not change tensors that must be frozen.

    Compares what is staged of each FILE with its version in HEAD; FILE::KEY is a mapping in it. A matching tensor must
    have the same key, shape and values. Where pre-commit compares two revisions, the second is compared with the first.
    Exit code 0 if all are equal, 1 if not, 2 if a file cannot be read.

    \b
    ckpt git frozen model.safetensors --expect-frozen 'backbone.*'
    ckpt git frozen tuned.safetensors --expect-frozen 'backbone.*' --base v1.0:base.safetensors
    """  # noqa: D301 - \b is click's mark
    from ckptkit.checks.report import merge_reports
    from ckptkit.cli.git.frozen import compare_staged, default_base

    compared = compare_staged(files, base or default_base(), expect_frozen, drop, allow_unused=allow_unused)
    report = merge_reports(compared.reports)
    echo_result(report_format, report)
    context.exit(2 if compared.unread else exit_code(report))
