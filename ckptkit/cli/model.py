"""The model that a command about param groups is held against."""

from __future__ import annotations

from typing import Any

import click

from ckptkit.cli.options import about
from ckptkit.errors import ModelError
from ckptkit.formats import LIVE_PREFIX
from ckptkit.formats.live import build_model, build_shapes

__all__ = ["live_model", "model_option"]

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
