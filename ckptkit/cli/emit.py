"""``$ ckpt groups emit``."""

from __future__ import annotations

import textwrap

import click

from ckptkit.cli.group_options import Source, model_or_checkpoint, source_options
from ckptkit.cli.options import Form, about, echo_report, form_options, quiet_option
from ckptkit.errors import GroupsError
from ckptkit.param_groups import ParamGroupSpec, plan_param_groups
from ckptkit.param_groups.emit import dump_spec, spec_table, write_python
from ckptkit.param_groups.plain import plain_option
from ckptkit.param_groups.presets import preset_summary
from ckptkit.render.page import Listing

__all__ = ["emit"]


@click.command()
@source_options
@click.option("--model", metavar="PATH", help="py:MODULE:CALLABLE, or a checkpoint, where names and shapes are enough.")
@click.option("--as", "language", type=click.Choice(["toml", "json", "python"]), default="toml", show_default=True,
              help="python spells out names, and needs the model.")  # fmt: skip
@form_options
@quiet_option
def emit(source: Source, *, model: str | None, language: str, form: Form, quiet: bool) -> None:
    """Write a spec out: a preset to keep and change, a YAML file as TOML, or the groups as Python to paste.

    \b
    ckpt groups emit --preset timm-layer-decay --set layer_decay=0.65 --model py:mynet:build
    ckpt groups emit groups.toml --model py:mynet:build --as python
    """  # noqa: D301 - \b is click's mark
    if model is None:
        if language == "python":
            raise GroupsError("Python spells out the names of a model, and there is none", hint="give it: --model PATH")
        spec, text = _written(source, None, language, quiet=quiet)
    else:
        with model_or_checkpoint(model, quiet=quiet) as found:
            spec, text = _written(source, found, language, quiet=quiet)
    document = {"schema": "ckptkit.groups.emit/1", "as": language, "spec": plain_option(spec_table(spec)), "text": text}
    echo_report(form, lambda: [Listing(tuple(text.split("\n")))], lambda: document)


def _written(source: Source, model: object, language: str, *, quiet: bool) -> tuple[ParamGroupSpec, str]:
    spec = source.over(model, quiet=quiet)
    with about(source.path):
        if language == "python":
            return spec, write_python(plan_param_groups(model, spec), source.label)
        text = dump_spec(spec, language)
    if language == "toml" and source.preset is not None:
        said = textwrap.wrap(f"Preset {source.preset}. {preset_summary(source.preset)}", 116)
        text = "\n".join([*(f"# {line}" for line in said), "", text])
    return spec, text
