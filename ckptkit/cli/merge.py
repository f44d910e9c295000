"""``$ ckpt merge``."""

from __future__ import annotations

import click

from ckptkit.cli.options import about, opened, path_argument
from ckptkit.cli.outputs import Job, carry_out, output_options
from ckptkit.cli.rules import rule_options
from ckptkit.merging import ON_MISMATCH, ON_MISSING, ON_UNEXPECTED, plan_merge
from ckptkit.rules import Rules

__all__ = ["merge"]


@click.command()
@path_argument("base")
@path_argument("donors", nargs=-1, required=True)
@output_options
@rule_options(beside="donors")
@click.option("--on-missing", type=click.Choice(ON_MISSING), default="keep", show_default=True,
              help="A key of BASE that no DONOR has.")  # fmt: skip
@click.option("--on-unexpected", type=click.Choice(ON_UNEXPECTED), default="skip", show_default=True,
              help="A key of a DONOR that BASE does not have.")  # fmt: skip
@click.option("--on-mismatch", type=click.Choice(ON_MISMATCH), default="error", show_default=True,
              help="A key whose shapes differ: refuse, keep BASE's, or an operation that makes it fit.")  # fmt: skip
def merge(
    base: str,
    donors: tuple[str, ...],
    *,
    job: Job,
    rules: Rules,
    on_missing: str,
    on_unexpected: str,
    on_mismatch: str,
) -> None:
    """Lay the values of each DONOR over BASE, where key and shape agree.

    The output has the keys, shapes and dtypes of BASE. The rules rename and filter the keys of the donors
    first; of several donors the last that has a key wins. Refuses where nothing matches.

    \b
    ckpt merge py:mynet:build pretrained.pth -o init.safetensors --on-mismatch skip
    ckpt merge base.safetensors ddp.pt -o out.safetensors --rename 'module.*=*' --dry-run
    """  # noqa: D301 - \b is click's mark
    with opened(base, *donors, quiet=job.quiet) as (first, *others):
        with about(donors[0] if len(donors) == 1 else None):  # of several, nobody knows here which one it is
            plan = plan_merge(
                first,
                others,
                rules,
                on_missing=on_missing,
                on_unexpected=on_unexpected,
                on_mismatch=on_mismatch,
            )
        roles = ["donor"] if len(others) == 1 else [f"donor{number}" for number in range(1, len(others) + 1)]
        carry_out("merge", plan, {"base": first, **dict(zip(roles, others, strict=True))}, job)
