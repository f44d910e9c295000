"""The spec that a command about param groups takes: a file, or a preset with its settings."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ckptkit.cli.options import about, opened, put, read_toml, tell
from ckptkit.core.config_files import form_of, parse_table
from ckptkit.errors import ModelError, RuleError
from ckptkit.formats import LIVE_PREFIX
from ckptkit.formats.live import build_model, build_shapes
from ckptkit.param_groups.parse import parse_spec
from ckptkit.param_groups.presets import param_group_preset, param_group_preset_names, preset_summary
from ckptkit.param_groups.spec import ParamGroupSpec
from ckptkit.rules.variables import parse_setting

__all__ = ["SpecSource", "live_model", "model_option", "model_or_checkpoint", "source_options"]


model_option = click.option("--model", required=True, metavar="py:MODULE:CALLABLE", help="The live model.")


def live_model(target: str, *, real: bool = False) -> Any:
    """Return the module that ``py:MODULE:CALLABLE`` makes: on the meta device where it can be, unless ``real``.

    Raises ``ModelError`` for anything else.
    """
    from torch.nn import Module

    if not target.startswith(LIVE_PREFIX):
        raise ModelError("is no live model", hint="write py:package.module:callable", path=target)
    with about(target):
        made = (build_model if real else build_shapes)(target.removeprefix(LIVE_PREFIX))
        if not isinstance(made, Module):
            raise ModelError(f"gives a {type(made).__name__}, and param groups need a Module")
        return made


_Command = TypeVar("_Command", bound=Callable[..., Any])
_SHAPES = "base_shapes"  # the one setting that is a file
_SENTENCE_END = re.compile(r"(?<!et al)\. ")


@dataclass(frozen=True, slots=True)
class SpecSource:
    """Where a spec comes from: the file at ``path``, or a preset."""

    path: str | None
    preset: str | None
    settings: Mapping[str, str]

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.path or f"preset {self.preset}"

    def over(self, model: Any, *, quiet: bool) -> ParamGroupSpec:
        """Return the spec for ``model``; what a preset warns of goes to stderr."""
        if self.path is not None:
            with about(self.path):
                return parse_spec(read_toml(self.path))
        with contextlib.ExitStack() as stack:
            values = {key: _value(key, text, stack, quiet=quiet) for key, text in self.settings.items()}
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                spec = param_group_preset(self.preset or "", model, **values)
        for one in () if quiet else said:
            tell(f"ckpt: {self.label}: warning: {one.message}")
        return spec


def source_options(command: _Command) -> _Command:
    """Add SPEC, --preset and --set, and pass them on as one ``source``."""

    @functools.wraps(command)
    def with_source(*args: Any, spec: str | None, preset: str | None, settings: tuple[str, ...], **others: Any) -> Any:
        if (spec is None) == (preset is None):
            raise click.UsageError("give a SPEC file, or --preset NAME (--preset '?' lists them), and not both")
        if settings and preset is None:
            raise click.UsageError("--set gives a setting of a preset, and there is no --preset")
        return command(*args, source=SpecSource(spec, preset, dict(map(parse_setting, settings))), **others)

    decorated: Any = with_source
    for option in (
        click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of it. Repeatable."),
        click.option(
            "--preset", metavar="NAME", callback=_list, is_eager=True, help="A well-known spec; '?' lists all."
        ),
        click.argument("spec", type=click.Path(), required=False),
    ):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


@contextlib.contextmanager
def model_or_checkpoint(target: str, *, quiet: bool) -> Iterator[Any]:
    """Yield the live model that ``py:MODULE:CALLABLE`` makes, or the names and shapes of a checkpoint."""
    if target.startswith(LIVE_PREFIX):
        yield live_model(target)
        return
    with opened(target, quiet=quiet) as (checkpoint,):
        yield checkpoint


def _list(context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value == "?" and not context.resilient_parsing:
        for name in param_group_preset_names():
            put(f"{name}: {_SENTENCE_END.split(preset_summary(name))[0]}")
        context.exit()
    return value


def _value(key: str, text: str, stack: contextlib.ExitStack, *, quiet: bool) -> Any:
    if key == _SHAPES:
        if form_of(text) == "toml":
            (checkpoint,) = stack.enter_context(opened(text, quiet=quiet))
            return checkpoint
        return read_toml(text)
    with contextlib.suppress(RuleError, ValueError):
        return float(text) if text.startswith((".", "-.")) else parse_table(f"value = {text}", "toml")["value"]
    return text
