"""The options that name a live model and a spec of param groups, and how a command reads both."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from ckptkit.cli.common.completing import complete_param_group_presets
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import PATH_TYPE, CommandFunction, add_options
from ckptkit.cli.common.printing import print_line, print_message
from ckptkit.core.files.live_prefix import is_live_path
from ckptkit.core.torch_types import Module
from ckptkit.errors import RuleError

if TYPE_CHECKING:
    from ckptkit.core.checkpoint import Checkpoint
    from ckptkit.param_groups.spec import ParamGroupSpec

__all__ = ["SpecSource", "model_option", "model_or_checkpoint", "spec_options"]

_SHAPES = "base_shapes"  # the only setting of a preset that names a file
_SENTENCE_END = re.compile(r"(?<!et al)\. ")

model_option = click.option("--model", required=True, metavar="py:MODULE:CALLABLE", help="The live model.")


@contextlib.contextmanager
def model_or_checkpoint(target: str, *, quiet: bool) -> Iterator[Module | Checkpoint]:
    """Yield the module that ``py:MODULE:CALLABLE`` builds, or the open checkpoint at any other path."""
    if is_live_path(target):
        from ckptkit.formats.live import build_module

        yield build_module(target)
        return
    with open_checkpoints(target, quiet=quiet) as (checkpoint,):
        yield checkpoint


@dataclass(frozen=True, slots=True)
class SpecSource:
    """Where a command finds its spec: in the file at ``path``, or in a preset with settings."""

    path: str | None
    preset: str | None
    settings: Mapping[str, str]

    @property
    def label(self) -> str:
        """The name of the source in messages."""
        return self.path or f"preset {self.preset}"

    def read(self, model: Module | Checkpoint | None, *, quiet: bool) -> ParamGroupSpec:
        """Return the spec for ``model``, and print the warnings of a preset on stderr unless ``quiet``."""
        if self.path is not None:
            from ckptkit.param_groups.parse import parse_spec

            return parse_spec(self.path)
        from ckptkit.param_groups.presets import param_group_preset

        values = {key: _setting_value(key, text) for key, text in self.settings.items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            spec = param_group_preset(self.preset or "", model, **values)
        for warning in () if quiet else caught:
            print_message(f"ckpt: {self.label}: warning: {warning.message}")
        return spec


def _setting_value(key: str, text: str) -> object:
    """Return the value of a setting: a TOML value, a text that is not valid TOML, or the path of the base shapes."""
    if key == _SHAPES:
        return text
    from ckptkit.core.config_files import parse_table

    with contextlib.suppress(RuleError, ValueError):
        return float(text) if text.startswith((".", "-.")) else parse_table(f"value = {text}", "toml")["value"]
    return text


def spec_options(command: CommandFunction) -> CommandFunction:
    """Add SPEC, --preset and --set, and pass them to the command as ``source``."""

    @functools.wraps(command)
    def with_source(
        *args: object, spec: str | None, preset: str | None, settings: tuple[str, ...], **others: object
    ) -> object:
        if (spec is None) == (preset is None):
            raise click.UsageError("give a SPEC file, or --preset NAME (--preset '?' lists them), and not both")
        if settings and preset is None:
            raise click.UsageError("--set sets a setting of a preset, so it needs --preset")
        return command(*args, source=SpecSource(spec, preset, _parse_settings(settings)), **others)

    return add_options(with_source, _spec_argument, _preset_option, _set_option)


def _parse_settings(settings: tuple[str, ...]) -> dict[str, str]:
    if not settings:
        return {}
    from ckptkit.rules.variables import parse_setting

    return dict(map(parse_setting, settings))


def _list_presets(context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Print the name and the first sentence of every preset, and exit, if the value is ``?``."""
    if value == "?" and not context.resilient_parsing:
        from ckptkit.param_groups.presets import param_group_preset_names, preset_summary

        for name in param_group_preset_names():
            print_line(f"{name}: {_SENTENCE_END.split(preset_summary(name))[0]}")
        context.exit()
    return value


_spec_argument = click.argument("spec", type=PATH_TYPE, required=False)
_preset_option = click.option(
    "--preset", metavar="NAME", callback=_list_presets, is_eager=True,
    shell_complete=complete_param_group_presets, help="Use a built-in spec instead of a file; '?' lists all.",
)  # fmt: skip
_set_option = click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change a setting of the preset. Repeatable."
)
