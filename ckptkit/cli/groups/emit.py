"""``$ ckpt groups emit``."""

from __future__ import annotations

import textwrap

import click

from ckptkit.cli.groups.source import Source, model_or_checkpoint, source_options
from ckptkit.cli.options import about, quiet_option
from ckptkit.cli.streams import put
from ckptkit.errors import GroupsError
from ckptkit.param_groups import plan_param_groups
from ckptkit.param_groups.presets import preset_summary
from ckptkit.param_groups.writing import dump_spec, write_python

__all__ = ["emit"]


@click.command()
@source_options
@click.option("--model", metavar="PATH", help="py:MODULE:CALLABLE, or a checkpoint, where names and shapes are enough.")
@click.option("--as", "form", type=click.Choice(["toml", "json", "python"]), default="toml", show_default=True,
              help="python spells out names, and needs the model.")  # fmt: skip
@quiet_option
def emit(source: Source, *, model: str | None, form: str, quiet: bool) -> None:
    """Write a spec out: a preset to keep and change, a YAML file as TOML, or the groups as Python to paste.

    \b
    ckpt groups emit --preset timm-layer-decay --set layer_decay=0.65 --model py:mynet:build
    ckpt groups emit groups.toml --model py:mynet:build --as python
    """  # noqa: D301 - \b is click's mark
    if model is None:
        if form == "python":
            raise GroupsError("Python spells out the names of a model, and there is none", hint="give it: --model PATH")
        _put(source, None, form, quiet=quiet)
        return
    with model_or_checkpoint(model, quiet=quiet) as found:
        _put(source, found, form, quiet=quiet)


def _put(source: Source, model: object, form: str, *, quiet: bool) -> None:
    spec = source.over(model, quiet=quiet)
    with about(source.path):
        text = write_python(plan_param_groups(model, spec), source.label) if form == "python" else dump_spec(spec, form)
    if form == "toml" and source.preset is not None:
        for line in textwrap.wrap(f"Preset {source.preset}. {preset_summary(source.preset)}", 116):
            put(f"# {line}")
        put("")
    put(text)
