"""``$ ckpt align``."""

from __future__ import annotations

import sys

import click

from ckptkit.align import Alignment, suggest_rules
from ckptkit.cli.options import (
    Form,
    echo_report,
    expand_option,
    form_options,
    opened,
    path_argument,
    quiet_option,
    tell,
)
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.text import plural, printable
from ckptkit.formats.atomic import AtomicFile, prepare_target
from ckptkit.render.align import align_document, align_page

__all__ = ["align"]


@click.command()
@path_argument("expected")
@path_argument("found")
@click.option(
    "-o", "--output", type=click.Path(), metavar="RULES", help="Write the rules to a file that --rules reads."
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--digests", is_flag=True, help="Read both, and let equal bytes decide before names do.")
@expand_option
@form_options
@quiet_option
@click.pass_context
def align(
    context: click.Context,
    expected: str,
    found: str,
    *,
    output: str | None,
    force: bool,
    digests: bool,
    expand: bool,
    form: Form,
    quiet: bool,
) -> None:
    """Find the rules that give the tensors of FOUND the names that EXPECTED has, with evidence for each.

    Prefixes, segments, shifted indices, transposed, fused and split tensors are told by names, shapes and order.
    What those do not decide is listed as ambiguous, and is no rule. Exit code 0 where every tensor expected
    is explained, 1 where something is open. Without --digests no tensor is read.

    \b
    ckpt align py:mynet:build pretrained.pth -o rules.toml
    ckpt remap pretrained.pth -o mine.safetensors --rules rules.toml
    """  # noqa: D301 - \b is click's mark
    with opened(expected, found, quiet=quiet) as (left, right):
        target = None if output is None else prepare_target(output, force=force)
        result = _search(left, right, digests=digests, quiet=quiet)
        if target is not None:
            data = result.toml().encode()
            with AtomicFile(target, len(data)) as file:
                file.write(data, 0)
            if not quiet:
                tell(f"wrote {printable(str(output))}: {plural(len(result.suggestions), 'rule')}")
        echo_report(form, lambda: align_page(result, expand=expand), lambda: align_document(result))
    context.exit(0 if result.complete else 1)


def _search(left: Checkpoint, right: Checkpoint, *, digests: bool, quiet: bool) -> Alignment:
    if not digests or quiet or not sys.stderr.isatty():
        return suggest_rules(left, right, digests=digests)
    size = sum(info.nbytes for side in (left, right) for info in side.values())
    with click.progressbar(length=size, label="reading", file=sys.stderr) as bar:
        return suggest_rules(left, right, digests=True, progress=bar.update)
