"""Try the model's own code for loading on a copy of the model on the meta device, before the model is changed."""

from __future__ import annotations

import copy
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.dtypes import torch_shape
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import named_of, torch_dtype
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.errors import ModelError
from ckptkit.loading.own_code import hooks_of
from ckptkit.loading.watch import named_tensors

__all__ = ["load_state_dict_error", "rehearse"]


def rehearse(model: Module, infos: Mapping[str, TensorInfo], versions: Mapping[str, int]) -> bool:
    """Load tensors without values into a copy of the model; return whether the copy could be made and could load.

    Raises ``ModelError`` where a hook or a loader of the model raises, or replaces a tensor of the model. A model is
    not tried where it cannot be copied or where its hooks refer to the model itself. An exception that can have the
    meta device as its reason does not count.
    """
    if any(_refers_to_a_model(hook) for _, module in named_of(model, "modules") for hook in hooks_of(module)):
        return False
    twin = _twin(model)
    if twin is None:
        return False
    try:
        values = OrderedDict((key, _empty(info)) for key, info in infos.items())
    except (AttributeError, KeyError, RuntimeError, TypeError):  # a dtype that this torch does not have
        return False
    if versions:
        values._metadata = {prefix: {"version": version} for prefix, version in versions.items()}  # type: ignore[attr-defined]  # noqa: SLF001
    before = named_tensors(twin)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real load gives each warning once more
            twin.load_state_dict(values, strict=False)
        after = named_tensors(twin)
    except Exception as error:  # hooks of the model can raise anything
        if _is_certain(error):
            raise load_state_dict_error(error) from error
        return False
    for name, tensor in before.items():
        if after.get(name) is not tensor:
            raise ModelError(
                f"{quoted(name)} would be replaced while loading, and optimizers would hold the old tensor"
            )
        if name in infos and tensor.shape != values[name].shape and tensor.dim():
            return False
    return True


def load_state_dict_error(error: Exception) -> ModelError:
    """Return the error for an exception of ``load_state_dict`` or of a hook in it."""
    message = " ".join(str(error).split())
    if isinstance(error, KeyError):  # its text is the key alone
        message = f"there is no key {message}"
    return ModelError(f"load_state_dict failed: {message}")


def _twin(model: Module) -> Module | None:
    """Return a deep copy of a model whose tensors are on the meta device, or None where the model has none."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Copying(TorchFunctionMode):
        """Copies a tensor as a tensor on the meta device."""

        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is torch.Tensor.clone:  # the copy of a parameter calls it
                return torch.empty_like(args[0], device="meta")
            if func is torch.Tensor.__deepcopy__:
                tensor, memo = args
                if id(tensor) not in memo:
                    memo[id(tensor)] = torch.empty_like(tensor.detach(), device="meta")
                return memo[id(tensor)]
            return func(*args, **(kwargs or {}))

    try:
        with Copying():
            twin: Module = copy.deepcopy(model)
    except Exception:  # noqa: BLE001 - a model may hold what cannot be copied: locks, files, process groups
        return None
    return twin if all(tensor.is_meta for tensor in named_tensors(twin).values()) else None


def _empty(info: TensorInfo) -> Tensor:
    import torch

    shape = torch_shape(info.dtype, info.shape)
    return torch.empty(shape, dtype=torch_dtype(info.dtype), device="meta")


def _is_certain(error: Exception) -> bool:
    """Return whether an exception would also be raised on a device where tensors have values."""
    text = str(error)
    if any(word in text for word in ("meta", "device", "an exception occurred")):
        return False
    return isinstance(error, ValueError | KeyError | AssertionError) or "size mismatch for" in text


def _refers_to_a_model(hook: object) -> bool:
    """Return whether a hook is a function that uses a module or a tensor from outside, which its copy would share."""
    import torch

    if not isinstance(hook, types.FunctionType):
        return False
    cells = [cell.cell_contents for cell in hook.__closure__ or () if cell != types.CellType()]
    outside = [hook.__globals__.get(name) for name in hook.__code__.co_names]
    used = (*cells, *outside, *(hook.__defaults__ or ()))
    return any(isinstance(value, torch.nn.Module | torch.Tensor) for value in used)
