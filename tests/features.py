"""What only some versions of torch have: tests ask these names, never the version of torch."""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import json
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

from ckptkit.core.dtypes import DTYPES

if TYPE_CHECKING:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
else:

    def _found(name: str, *modules: str) -> Any:
        for module in modules:
            try:
                return getattr(importlib.import_module(f"torch.distributed.{module}"), name)
            except (ImportError, AttributeError):
                continue
        return None

    _PLACES = ("tensor", "_tensor", "tensor.placement_types", "_tensor.placement_types")
    DTensor, Partial, Placement, Replicate, Shard, distribute_tensor, _StridedShard = (
        _found(name, *_PLACES)
        for name in ("DTensor", "Partial", "Placement", "Replicate", "Shard", "distribute_tensor", "_StridedShard")
    )
    fully_shard = _found("fully_shard", "fsdp")

__all__ = [
    "FLOAT4",
    "DTensor",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "_StridedShard",
    "accept_names",
    "distribute_tensor",
    "fully_shard",
    "has_dtype",
    "has_module",
    "needs",
    "needs_dtype",
    "needs_module",
    "needs_optimizer",
    "needs_option",
    "needs_safetensors",
    "only_known",
    "records_beside_tensors",
    "require",
    "require_option",
    "safetensors_has",
    "safetensors_knows",
    "saves",
    "takes_names",
]


# The dtype of float4 where torch has one.
FLOAT4: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name))


def has_dtype(code: str) -> bool:
    """Return whether torch has a dtype for this safetensors code."""
    return bool(DTYPES[code].torch_name) and hasattr(torch, DTYPES[code].torch_name)


@functools.cache
def saves(code: str) -> bool:
    """Return whether torch has a dtype for this safetensors code and saves its tensors."""
    if not has_dtype(code):
        return False
    try:
        torch.save(_bytes_as(code), io.BytesIO())
    except (KeyError, RuntimeError, TypeError):
        return False
    return True


@functools.cache
def safetensors_has(code: str) -> bool:
    """Return whether the installed safetensors library writes and reads tensors of this code."""
    if not has_dtype(code):
        return False
    try:
        safetensors.torch.load(safetensors.torch.save({"x": _bytes_as(code)}))
    except (KeyError, safetensors.SafetensorError):
        return False
    return True


@functools.cache
def safetensors_knows(code: str) -> bool:
    """Return whether the installed safetensors library knows this code, also where torch has no dtype for it."""
    bits = DTYPES[code].bits
    header = json.dumps({"x": {"dtype": code, "shape": [8], "data_offsets": [0, bits]}}).encode()
    try:
        safetensors.deserialize(len(header).to_bytes(8, "little") + header + bytes(bits))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return False
    return True


def needs_safetensors(*codes: str) -> pytest.MarkDecorator:
    """Skip a test where the installed safetensors library does not know these codes."""
    lacking = [code for code in codes if not safetensors_knows(code)]
    return pytest.mark.skipif(bool(lacking), reason=f"this safetensors has no {', '.join(lacking)}")


def _bytes_as(code: str) -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8).view(getattr(torch, DTYPES[code].torch_name))


def has_module(name: str) -> bool:
    """Return whether torch has this module."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def needs(owner: object, *names: str) -> pytest.MarkDecorator:
    """Skip a test where a module or a class of torch lacks one of these attributes."""
    lacking = [name for name in names if not hasattr(owner, name)]
    return pytest.mark.skipif(bool(lacking), reason=f"this torch has no {', '.join(lacking)}")


def require(owner: object, name: str) -> None:
    """Skip the test that runs where a module or a class of torch lacks an attribute."""
    if not hasattr(owner, name):
        pytest.skip(f"this torch has no {name}")


def require_option(optimizer: str, option: str) -> None:
    """Skip the test that runs where a class of torch.optim does not take an option."""
    if not _takes(optimizer, option):
        pytest.skip(f"this {optimizer} takes no {option}")


def _takes(optimizer: str, option: str) -> bool:
    return option in inspect.signature(getattr(torch.optim, optimizer)).parameters


def needs_dtype(code: str) -> pytest.MarkDecorator:
    """Skip a test where torch has no dtype for this safetensors code."""
    return pytest.mark.skipif(not has_dtype(code), reason=f"this torch has no dtype for {code}")


def needs_module(name: str) -> pytest.MarkDecorator:
    """Skip a test where torch lacks a module."""
    return pytest.mark.skipif(not has_module(name), reason=f"this torch has no {name}")


def needs_optimizer(name: str) -> pytest.MarkDecorator:
    """Skip a test where torch has no optimizer of this name."""
    return needs(torch.optim, name)


def needs_option(optimizer: str, option: str) -> pytest.MarkDecorator:
    """Skip a test where a class of torch.optim does not take an option."""
    return pytest.mark.skipif(not _takes(optimizer, option), reason=f"this {optimizer} takes no {option}")


def only_known(owner: object, *names: str) -> list[Any]:
    """Return the attributes with these names that a module of torch has, such as dtypes or optimizers."""
    return [getattr(owner, name) for name in names if hasattr(owner, name)]


@functools.cache
def records_beside_tensors() -> int:
    """Return how many records torch.save writes beside those of tensors."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return len(archive.namelist())


@functools.cache
def takes_names() -> bool:
    """Return whether the optimizers of this torch take ``(name, parameter)`` pairs."""
    try:
        torch.optim.SGD([("weight", torch.nn.Parameter(torch.zeros(1)))], lr=0.1)
    except TypeError:
        return False
    return True


def accept_names() -> None:
    """Let the optimizers of a torch that refuses pairs take them as groups with ``param_names``, which it accepts."""
    if takes_names():
        return
    add: Any = torch.optim.Optimizer.add_param_group

    @functools.wraps(add)
    def add_param_group(self: torch.optim.Optimizer, param_group: Any) -> None:
        params = param_group.get("params") if isinstance(param_group, dict) else None
        if sys._getframe(1).f_globals["__name__"].startswith("ckptkit."):
            params = None  # ckptkit itself must not rely on it
        if params is not None and not isinstance(params, torch.Tensor | set):
            params = param_group["params"] = list(params)
            if params and all(isinstance(item, tuple) and len(item) == 2 for item in params):
                param_group["param_names"] = [name for name, _ in params]
                param_group["params"] = [tensor for _, tensor in params]
        add(self, param_group)

    torch.optim.Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
