"""The command ``ckpt align``."""

from __future__ import annotations

import click

from ckptkit.align import suggest_rules
from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import PATH_TYPE, expand_option, path_argument, quiet_option, report_options
from ckptkit.cli.common.options.rules import rule_options
from ckptkit.cli.common.printing import ReportFormat, echo_result, print_message, progress_bar
from ckptkit.core.config_files import default_error_path
from ckptkit.core.text import plural, printable
from ckptkit.formats.writing.outputs import write_small_file
from ckptkit.formats.writing.targets import prepare_side_file
from ckptkit.rules.model import Rules

__all__ = ["align"]


@click.command(cls=Command, first=("--output", "--digests"))
@path_argument("expected")
@path_argument("found")
@rule_options(beside="found", or_beside="expected")
@click.option("-o", "--output", type=PATH_TYPE, metavar="FILE", help="Write the rules to a file for --rules.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--digests", is_flag=True, help="Read all tensors, and match equal bytes before names.")
@expand_option
@report_options
@quiet_option
@click.pass_context
def align(
    context: click.Context,
    expected: str,
    found: str,
    *,
    rules: Rules,
    output: str | None,
    force: bool,
    digests: bool,
    expand: bool,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Find rules that rename the tensors of FOUND to the names in EXPECTED, with evidence for each rule.

    Compares names, shapes and order to find prefixes, renamed segments, shifted indices, and transposed, fused, split
    or stacked tensors. Knows the names of PEFT, and what GGUF changes. Tensors that these cannot tell apart are listed
    as ambiguous, without a rule. --keep, --drop and --rename change the keys of FOUND first, and are in the file too.

    Reads no tensor without --digests. With it, equal bytes decide before names, and bytes that several tensors have
    decide nothing. Exit code 0 if every expected tensor is explained, and none is known to have other values; else 1.

    \b
    ckpt align py:mynet:build pretrained.pth -o rules.toml
    ckpt remap pretrained.pth -o mine.safetensors --rules rules.toml
    """  # noqa: D301 - \b is click's mark
    with open_checkpoints(expected, found, quiet=quiet) as (left, right):
        target = None if output is None else prepare_side_file(output, [*left.files, *right.files], force=force)
        size = sum(info.nbytes for side in (left, right) for info in side.values())
        with progress_bar(size, "reading", hidden=quiet or not digests) as progress, default_error_path(found):
            result = suggest_rules(left, right, rules, digests=digests, progress=progress)
        if target is not None:
            write_small_file(target, result.toml().encode())
            if not quiet:
                print_message(f"wrote {printable(str(output))}: {plural(len(result.suggestions), 'rule')}")
        echo_result(report_format, result, expand=expand)
        if not quiet and any(one.candidates for one in result.ambiguous):
            start = "-o rules.toml writes" if output is None else f"{printable(output)} has"
            print_message(f"hint: {start} the possible rules as comments; uncomment those that are right")
    context.exit(0 if result.complete else 1)
