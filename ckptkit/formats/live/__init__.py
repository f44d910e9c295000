"""Open live models as checkpoints. ``py:package.module:callable`` imports and runs the user's code.

``py:package.module:callable(name=value)`` passes keyword arguments, whose values are Python literals.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, TensorInfo
from ckptkit.core.config_files import default_error_path
from ckptkit.core.files.live_prefix import LIVE_PREFIX, is_live_path
from ckptkit.core.text import kind_of, quoted
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.core.torch_types import Module
from ckptkit.errors import CkptkitError, ModelError
from ckptkit.formats.live.caches import forget_meta_tensors
from ckptkit.formats.live.targets import code_of_the_user, import_target, is_model

__all__ = ["build_model", "build_module", "build_shapes", "open_live"]

_NO_OP = r"for .*: copying from a non-meta parameter in the checkpoint to a meta parameter in the current model"


def build_model(target: str, *, device: str | None = None) -> Any:
    """Return the model or state_dict that ``target`` names. A callable is called with ``device`` as default.

    Raises what ``import_target`` raises, and ``ModelError`` where the callable fails or returns something else.
    """
    found = import_target(target)
    name = target.partition(":")[2]
    with contextlib.redirect_stdout(sys.stderr), code_of_the_user(f"calling {quoted(name)}", found, target):
        if is_model(found) or isinstance(found, Mapping):
            return found
        if not callable(found):
            raise ModelError(f"{quoted(name)} is {kind_of(found)}, not a callable or a model")
        return _call(found, name, device)


def _call(function: Callable[[], Any], name: str, device: str | None) -> Any:
    import torch

    with torch.device(device) if device else contextlib.nullcontext(), warnings.catch_warnings():
        if device == "meta":  # torch warns of each tensor that a function which loads weights copies
            warnings.filterwarnings("ignore", message=_NO_OP, category=UserWarning)
        model: Any = function()
    if not is_model(model) and not isinstance(model, Mapping):
        kind = "None" if model is None else kind_of(model)  # a function without return is the usual cause
        raise ModelError(f"{quoted(name)} returned {kind}, not a model or a state_dict")
    return model


def build_shapes(target: str) -> Any:
    """Return the model built on the meta device, or on its own device if building on the meta device fails.

    Raises ``ModelError`` if both fail.
    """
    import_target(target)  # a second import of code that failed hides what went wrong in the first
    try:
        return build_model(target, device="meta")
    except ModelError:
        return _build_after_meta(target)


def _build_after_meta(target: str) -> Any:
    """Return what ``build_model`` returns, where the model may have been built on the meta device before.

    Code can keep results in a ``functools`` cache, as e3nn keeps its constants. A second build may then fail, or have
    tensors of the first. In this case the caches that hold such tensors are emptied, and the model is built once more.
    """
    try:
        built = build_model(target)
        if not _is_on_meta(built) or not forget_meta_tensors():
            return built
    except ModelError:
        if not forget_meta_tensors():
            raise
    return build_model(target)


def _is_on_meta(built: Any) -> bool:
    """Return whether a tensor of a model has no values; other objects, and methods of the user that fail, say no."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Exception):
        return any(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))
    return False


def build_module(path: str, *, with_values: bool = False) -> Module:
    """Return the module that ``py:package.module:callable`` builds, on the meta device if possible.

    Builds the module with values if ``with_values``. Raises ``ModelError`` if ``path`` does not build a module.
    """
    if not is_live_path(path):
        if path.startswith(LIVE_PREFIX):
            raise ModelError("is a file, so it is not taken for a live model", hint="rename the file", path=path)
        raise ModelError("not a live model", hint="write py:package.module:callable", path=path)
    from torch import nn

    with default_error_path(path):
        built = (_build_after_meta if with_values else build_shapes)(path.removeprefix(LIVE_PREFIX))
        if not isinstance(built, nn.Module):
            raise ModelError(f"returns {kind_of(built)}, but param groups need an nn.Module")
        return built


def _describe(target: str, path: str, device: str | None = None) -> Checkpoint:
    model = build_model(target, device=device) if device else _build_after_meta(target)
    with contextlib.redirect_stdout(sys.stderr), code_of_the_user("state_dict()"):
        return as_checkpoint(model, path)


def _offset_and_strides(info: TensorInfo) -> tuple[int, list[int]] | None:
    """Return the offset and the strides of a view, without the strides of dimensions of size 1."""
    if info.view is None or not info.elements:
        return None
    return info.view.offset, [step for size, step in zip(info.shape, info.view.stride, strict=True) if size != 1]


def _keys_shared_differently(shapes: Checkpoint, built: Checkpoint) -> frozenset[str]:
    """Return the keys that share a storage with different keys in the second build."""
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
    """Return the Checkpoint of a live model, built on the meta device where possible.

    Reading a value builds the model a second time, on its own device. Raises ``ModelError`` where the model cannot be
    built, or the second build differs from the first.
    """
    import_target(target)  # a second import of code that failed hides what went wrong in the first
    try:
        shapes = _describe(target, path, "meta")
    except CkptkitError as meta_error:
        try:
            return _describe(target, path)
        except CkptkitError as error:
            raise error from meta_error
    builds: list[tuple[Checkpoint, frozenset[str]]] = []  # the second build, once it exists

    def values(info: TensorInfo) -> Checkpoint:
        if not builds:
            build = _describe(target, path)
            builds.append((build, _keys_shared_differently(shapes, build)))
        built, moved = builds[0]
        other = built.get(info.key)
        if other is None or (other.shape, other.dtype, other.kind) != (info.shape, info.dtype, info.kind):
            raise ModelError(f"{quoted(info.key)} differs when the model is built again", path=path)
        if info.key in moved or _offset_and_strides(other) != _offset_and_strides(info):
            raise ModelError(
                f"{quoted(info.key)} has other strides or ties when the model is built again",
                hint="save the state_dict() of the model with torch.save, and give that file",
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
        Description(
            path,
            "live model",
            entries=shapes.entries,
            warnings=shapes.warnings,
            versions=shapes.versions,
            configuration=shapes.configuration,
            layers=shapes.layers,
        ),
        model=shapes.model,
    )
