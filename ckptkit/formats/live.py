"""Live models as checkpoints: ``py:package.module:callable`` runs the user's own code, and only then."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, TensorInfo
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import as_checkpoint, first_line
from ckptkit.errors import CkptkitError, ModelError

__all__ = ["build_model", "build_shapes", "import_target", "open_live"]


def import_target(target: str) -> Any:
    """Return what is at ``package.module:name``, as it stands there.

    The current directory can be imported from. What the code prints goes to stderr. Raises ``ModelError`` where it
    cannot be imported.
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
            looked = "looked in the current directory and on sys.path" if isinstance(error, ImportError) else None
            raise ModelError(f"importing {quoted(module_name)} failed: {first_line(error)}", hint=looked) from error
        for part in name.split("."):
            if not hasattr(made, part):
                raise ModelError(f"{quoted(module_name)} has no {quoted(name)}")
            made = getattr(made, part)
    return made


def build_model(target: str, *, device: str | None = None) -> Any:
    """Return what the callable (or the model itself) at ``package.module:name`` gives, built on ``device``.

    Imports as ``import_target`` does, and raises ``ModelError`` where the callable fails too.
    """
    made = import_target(target)
    name = target.partition(":")[2]
    with contextlib.redirect_stdout(sys.stderr):
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
        wants = isinstance(error, TypeError) and "missing" in str(error) and "required" in str(error)
        hint = "it is called without arguments" if wants else None
        raise ModelError(f"calling {quoted(name)} failed: {first_line(error)}", hint=hint) from error
    if not _is_model(made) and not isinstance(made, Mapping):
        raise ModelError(f"{quoted(name)} returned a {type(made).__name__}, not a model or a state_dict")
    return made


def _is_model(thing: Any) -> bool:
    return not isinstance(thing, type) and callable(getattr(thing, "state_dict", None))


def build_shapes(target: str) -> Any:
    """Return the model built on the meta device, or for real where it cannot be; raises ``ModelError``."""
    try:
        return build_model(target, device="meta")
    except ModelError:
        return build_model(target)


def _describe(target: str, path: str, device: str | None = None) -> Checkpoint:
    made = build_model(target, device=device)
    with contextlib.redirect_stdout(sys.stderr):  # state_dict() is the user's code too
        return as_checkpoint(made, path)


def _place(info: TensorInfo) -> tuple[int, list[int]] | None:
    """Return where a view begins and how it steps, as far as either decides which elements it has."""
    if info.view is None or not info.elements:
        return None
    return info.view.offset, [step for size, step in zip(info.shape, info.view.stride, strict=True) if size != 1]


def _shared_otherwise(shapes: Checkpoint, built: Checkpoint) -> frozenset[str]:
    """Return the keys whose storage holds other keys in one build than in the other."""
    groups = [_storages(side, shapes.keys() & built.keys()) for side in (shapes, built)]
    return frozenset().union(*(groups[0] ^ groups[1]))


def _storages(side: Checkpoint, keys: AbstractSet[str]) -> set[frozenset[str]]:
    storages: dict[int, list[str]] = {}
    for key in keys:
        info = side[key]
        if info.view is not None and info.elements:
            storages.setdefault(info.view.storage, []).append(key)
    return {frozenset(group) for group in storages.values()}


def open_live(target: str, path: str) -> Checkpoint:
    """Return the Checkpoint of a live model, built on the meta device where it can be.

    Values are wanted rarely; where they are, the model is built a second time, for real.
    """
    try:
        shapes = _describe(target, path, "meta")
    except CkptkitError as meta_error:
        try:
            return _describe(target, path)
        except CkptkitError as error:
            raise error from meta_error
    real: list[tuple[Checkpoint, frozenset[str]]] = []

    def values(info: TensorInfo) -> Checkpoint:
        if not real:
            made = _describe(target, path)
            real.append((made, _shared_otherwise(shapes, made)))
        built, moved = real[0]
        other = built.get(info.key)
        if other is None or (other.shape, other.dtype, other.kind) != (info.shape, info.dtype, info.kind):
            raise ModelError(f"{quoted(info.key)} is not the same when the model is built again", path=path)
        if info.key in moved or _place(other) != _place(info):
            raise ModelError(
                f"{quoted(info.key)} is laid out differently when the model is built again",
                hint="save its state_dict() with torch.save and give that file",
                path=path,
            )
        return built

    def payload(info: TensorInfo) -> Payload:
        return values(info).payload(info.key)

    def span(info: TensorInfo) -> Payload | None:
        return values(info).span(info.key)

    return Checkpoint(
        shapes,
        Access(payload, span),
        Description(path, "live model", entries=shapes.entries, warnings=shapes.warnings, versions=shapes.versions),
    )
