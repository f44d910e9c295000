"""Live models as checkpoints: ``py:package.module:callable`` runs the user's own code, and only then."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from ckptkit.errors import CkptkitError, ModelError
from ckptkit.tensors import Checkpoint, Payload, TensorInfo
from ckptkit.text import quoted
from ckptkit.torch_bridge import as_checkpoint

__all__ = ["build_model", "build_shapes", "open_live"]


def build_model(target: str, *, device: str | None = None) -> Any:
    """Return what the callable (or the model itself) at ``package.module:name`` gives, built on ``device``.

    The current directory can be imported from. What the code prints goes to stderr. Raises
    ``ModelError`` where it cannot be imported or fails.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ModelError(f"{quoted(target)} names no callable", hint="write py:package.module:callable")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with contextlib.redirect_stdout(sys.stderr):
        try:
            made: Any = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            raise ModelError(f"importing {quoted(module_name)} failed: {_first_line(error)}") from error
        for part in name.split("."):
            if not hasattr(made, part):
                raise ModelError(f"{quoted(module_name)} has no {quoted(name)}")
            made = getattr(made, part)
        if _is_model(made) or isinstance(made, Mapping):
            return made
        if not callable(made):
            raise ModelError(f"{quoted(name)} is a {type(made).__name__}, not a callable or a model")
        return _call(made, name, device)


def _call(function: Any, name: str, device: str | None) -> Any:
    import torch

    try:
        with torch.device(device) if device else contextlib.nullcontext():
            made = function()
    except (Exception, SystemExit) as error:
        raise ModelError(f"calling {quoted(name)} failed: {_first_line(error)}") from error
    if not _is_model(made) and not isinstance(made, Mapping):
        raise ModelError(f"{quoted(name)} returned a {type(made).__name__}, not a model or a state_dict")
    return made


def _is_model(thing: Any) -> bool:
    return not isinstance(thing, type) and callable(getattr(thing, "state_dict", None))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def build_shapes(target: str) -> Any:
    """Return the model built on the meta device, or for real where it cannot be; raises ``ModelError``."""
    try:
        return build_model(target, device="meta")
    except ModelError:
        return build_model(target)


def open_live(target: str, path: str) -> Checkpoint:
    """Return the Checkpoint of a live model, built on the meta device where it can be.

    Values are wanted rarely; where they are, the model is built a second time, for real.
    """
    try:
        shapes = as_checkpoint(build_model(target, device="meta"), path)
    except CkptkitError as meta_error:
        try:
            return as_checkpoint(build_model(target), path)
        except CkptkitError as error:
            raise error from meta_error
    real: list[Checkpoint] = []

    def values() -> Checkpoint:
        if not real:
            real.append(as_checkpoint(build_model(target), path))
        return real[0]

    def payload(info: TensorInfo) -> Payload:
        built = values()
        if info.key not in built or built[info.key].shape != info.shape or built[info.key].dtype != info.dtype:
            raise ModelError(f"{quoted(info.key)} is not the same when the model is built again", path=path)
        return built.payload(info.key)

    def span(info: TensorInfo) -> Payload | None:
        payload(info)
        return values().span(info.key)

    return Checkpoint(
        shapes,
        payload,
        path=path,
        format="live model",
        entries=shapes.entries,
        warnings=shapes.warnings,
        versions=shapes.versions,
        span=span,
    )
