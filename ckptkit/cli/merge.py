"""``$ ckpt merge``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from ckptkit.cli.options import about, file_beside, opened, path_argument, read_toml
from ckptkit.cli.outputs import Job, carry_out, output_options, write_json
from ckptkit.cli.rules import rule_options
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.errors import PlanError
from ckptkit.formats.atomic import prepare_target
from ckptkit.plans.merge import ON_MISMATCH, ON_MISSING, ON_UNEXPECTED, plan_merge
from ckptkit.plans.plan import Plan
from ckptkit.rules.model import Rules

__all__ = ["merge"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_METHODS: Mapping[str, Sequence[str]] = {  # method -> the options that are its own
    "overlay": ("on_missing", "on_unexpected", "on_mismatch"),
    "lora": ("scale",),
    "extract-lora": ("rank",),
}


@click.command()
@path_argument("base")
@path_argument("donors", nargs=-1, required=True)
@output_options
@rule_options(beside="donors")
@click.option("--method", type=click.Choice(list(_METHODS)), default="overlay", show_default=True,
              help="How: lay the values of each DONOR over BASE; fold a LoRA adapter of PEFT into it; or find the "
              "adapter that is nearest to what a tuned DONOR changed.")  # fmt: skip
@click.option("--on-missing", type=click.Choice(ON_MISSING), default="keep", show_default=True,
              help="A key of BASE that no DONOR has.")  # fmt: skip
@click.option("--on-unexpected", type=click.Choice(ON_UNEXPECTED), default="skip", show_default=True,
              help="A key of a DONOR that BASE does not have.")  # fmt: skip
@click.option("--on-mismatch", type=click.Choice(ON_MISMATCH), default="error", show_default=True,
              help="A key whose shapes differ: refuse, keep BASE's, or an operation that makes it fit.")  # fmt: skip
@click.option("--scale", type=float, default=1.0, show_default=True,
              help="With lora: multiply what the adapter's own configuration says.")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True,
              help="With extract-lora: the rank of the adapter.")  # fmt: skip
def merge(
    base: str,
    donors: tuple[str, ...],
    *,
    job: Job,
    rules: Rules,
    method: str,
    **options: Any,
) -> None:
    """Lay the values of each DONOR over BASE, where key and shape agree.

    The output has the keys, shapes and dtypes of BASE. The rules rename and filter the keys of the donors
    first; of several donors the last that has a key wins. Refuses where nothing matches. With --method
    lora, DONOR is an adapter with its adapter_config.json, and each of its tensors has to have its place.

    \b
    ckpt merge py:mynet:build pretrained.pth -o init.safetensors --on-mismatch skip
    ckpt merge base.safetensors ddp.pt -o out.safetensors --strip auto --dry-run
    ckpt merge base.safetensors adapter/ -o merged.safetensors --method lora
    ckpt merge base.safetensors tuned.safetensors -o adapter/adapter_model.safetensors --method extract-lora
    """  # noqa: D301 - \b is click's mark
    _check_options(method, options)
    if method != "overlay" and len(donors) > 1:
        raise click.UsageError(f"--method {method} takes one DONOR")
    config = _config_target(job) if method == "extract-lora" else None
    with opened(base, *donors, quiet=job.quiet) as (first, *others):
        with about(donors[0] if len(donors) == 1 else None):  # of several, nobody knows here which one it is
            if method == "lora":
                plan = _lora(first, others[0], donors[0], rules, options["scale"])
            elif method == "extract-lora":
                from ckptkit.plans.lora import plan_extract_lora

                plan = plan_extract_lora(first, others[0], options["rank"], rules)
            else:
                plan = plan_merge(first, others, rules, **{name: options[name] for name in _METHODS[method]})
        roles = ["donor"] if len(others) == 1 else [f"donor{number}" for number in range(1, len(others) + 1)]
        carry_out("merge", plan, {"base": first, **dict(zip(roles, others, strict=True))}, job)
        if config is not None and not job.dry_run:
            from ckptkit.plans.lora import adapter_config

            write_json(config, adapter_config(plan), force=job.output.force)


def _config_target(job: Job) -> str:
    """Return where the configuration of an adapter goes; raises what the output itself would raise there."""
    directory, name = os.path.split(job.output.path)
    if name != _WEIGHTS:
        raise click.UsageError(f"PEFT looks for {_WEIGHTS}: give -o DIRECTORY/{_WEIGHTS}")
    path = os.path.join(directory, _CONFIG)
    prepare_target(path, force=job.output.force)
    return path


def _check_options(method: str, names: Iterable[str]) -> None:
    context = click.get_current_context()
    for name in names:
        given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if given and name not in _METHODS[method]:
            raise click.UsageError(f"--{name.replace('_', '-')} has no meaning with --method {method}")


def _lora(base: Checkpoint, adapter: Checkpoint, path: str, rules: Rules, scale: float) -> Plan:
    from ckptkit.plans.lora import plan_lora

    config = file_beside(path, _CONFIG)
    if config is None:
        raise PlanError(f"has no {_CONFIG} beside it, and only that tells the scale of an adapter", path=path)
    return plan_lora(base, adapter, read_toml(config, as_json=True), rules, scale=scale)
