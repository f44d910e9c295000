"""Copy modules onto the meta device: their structure and attributes, without the values of their tensors."""

from __future__ import annotations

import builtins
import copy
import copyreg
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ckptkit.comparison.own_code import class_before_sharding, every_module, is_of_fsdp
from ckptkit.core.torch_bridge import is_dtensor
from ckptkit.core.torch_types import Module, Tensor

__all__ = ["Copies", "copy_on_meta"]

_SHARED = frozenset(
    (type(None), bool, int, float, complex, str, bytes, type, types.BuiltinFunctionType, types.ModuleType)
)
_CONTAINERS = (list, dict, set, deque)


class Copies(NamedTuple):
    """Copies of modules; ``kept`` keeps alive what they refer to weakly.

    ``has_whole`` says whether a copy has whole tensors in place of shards.
    """

    modules: list[Module]
    kept: object
    has_whole: bool


def copy_on_meta(modules: Iterable[Module]) -> Copies:
    """Return a deep copy of each module, whose tensors are on the meta device.

    A DTensor is copied as a plain tensor of the whole shape, and a module of ``fully_shard`` as one of its own class.
    What two of the modules share, their copies share. A function that is a hook gets copies of the models, tensors and
    containers that it uses from outside. So it changes no value of its closure, and no container of its file.

    Raises any exception where a module cannot be copied.
    """
    wanted = list(modules)
    copying = _Copying()
    copying.note(wanted)
    return Copies([copying.copy(module) for module in wanted], copying, copying.has_whole)


class _Copying:
    """One copy of some modules; ``memo`` has the copies by the ``id()`` of the originals, as for ``deepcopy``."""

    def __init__(self) -> None:
        import torch
        from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

        self._memo: dict[int, Any] = {}
        self._plain: list[tuple[Module, Module]] = []
        self._made: list[object] = []  # what was made to be copied, kept alive so that no other object gets its id()
        self.has_whole = False
        self._lazy: tuple[type, ...] = (UninitializedParameter, UninitializedBuffer)
        self._tensors: tuple[type, ...] = (torch.nn.Parameter, torch.Tensor, *self._lazy)

    def note(self, modules: Iterable[Module]) -> None:
        """Make an empty copy of each module inside that needs no code of its own to be copied."""
        plain: dict[type, type | None] = {}  # by the class of a module, the class of its copy
        for root in modules:
            for module in every_module(root):
                cls = type(module)
                if cls not in plain:
                    own = class_before_sharding(cls)
                    plain[cls] = own if _is_plain(own) else None
                made = plain[cls]
                if id(module) not in self._memo and made is not None:
                    twin: Any = object.__new__(made)
                    self._memo[id(module)] = twin
                    self._plain.append((module, twin))

    def copy(self, value: Any) -> Any:
        """Return the copy of a value, after all modules that were noted are filled."""
        import torch

        attribute = self._attribute
        # What every module has and is mostly empty, so that no two modules share it.
        empty = {name: type(one) for name, one in torch.nn.Module().__dict__.items() if type(one) not in _SHARED}
        while self._plain:
            module, twin = self._plain.pop()
            held = twin.__dict__
            # Modules below one of fully_shard keep their class, and get hooks after the load.
            may_be_sharded = type(module) is not type(twin) or module._load_state_dict_post_hooks  # noqa: SLF001
            attributes = _without_sharding(module) if may_be_sharded else module.__dict__
            self._made.append(attributes)
            held.update(attributes)
            for name, one in attributes.items():
                kind = type(one)
                if kind not in _SHARED:
                    held[name] = attribute(one) if one or empty.get(name) is not kind else kind()
            for name in copyreg._slotnames(type(twin)):  # type: ignore[attr-defined]  # noqa: SLF001 - as copy itself asks
                if hasattr(module, name):
                    object.__setattr__(twin, name, self._attribute(getattr(module, name)))
        return self._attribute(value)

    def _attribute(self, value: Any) -> Any:
        kind = type(value)
        if kind in _SHARED:
            return value
        known = self._memo.get(id(value))
        if known is not None:
            return known
        if kind in self._tensors and (copied := self._tensor(value)) is not None:
            return copied
        if kind is dict or kind is OrderedDict:
            made = self._memo[id(value)] = kind()
            for key, one in value.items():
                made[key] = self._attribute(one)
            return made
        if kind is tuple and all(type(one) in _SHARED for one in value):
            return value
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self._attribute(value.__self__))
        if kind is functools.partial:
            keywords = {name: self._attribute(one) for name, one in value.keywords.items()}
            return functools.partial(self._attribute(value.func), *map(self._attribute, value.args), **keywords)
        if kind.__module__ == "torch.nn.modules.module" and hasattr(value, "hook"):  # torch's wrapper of a hook
            return kind(self._attribute(value.hook), self._attribute(value.module()) if value.with_module else None)
        if isinstance(value, weakref.ReferenceType):
            target = value()
            return value if target is None else weakref.ref(self._attribute(target))
        if kind is set and all(type(one) in _SHARED for one in value):
            return self._memo.setdefault(id(value), set(value))
        return self._whole(value) if is_dtensor(value) else self._with_own_method(value)

    def _whole(self, value: Any) -> Tensor:
        import torch

        made = torch.empty(value.shape, dtype=value.dtype, device="meta")
        if isinstance(value, torch.nn.Parameter):
            made = torch.nn.Parameter(made, value.requires_grad)
        self._memo[id(value)] = made
        self.has_whole = True
        return made

    def _with_own_method(self, value: Any) -> Any:
        """Return the copy that the class of a value makes, whose tensors are on the meta device too."""
        import torch
        from torch.overrides import TorchFunctionMode

        class Copying(TorchFunctionMode):
            """Copies a tensor as a tensor on the meta device."""

            def __torch_function__(
                self,
                func: Callable[..., Any],
                types: Any,
                args: tuple[Any, ...] = (),
                kwargs: dict[str, Any] | None = None,
            ) -> Any:
                if func is torch.Tensor.clone:  # the copy of a parameter calls it
                    return torch.empty_like(args[0], device="meta")
                if func is torch.Tensor.__deepcopy__:
                    tensor, memo = args
                    if id(tensor) not in memo:
                        memo[id(tensor)] = torch.empty_like(tensor.detach(), device="meta")
                    return memo[id(tensor)]
                return func(*args, **(kwargs or {}))

        with Copying():
            return copy.deepcopy(value, self._memo)

    def _tensor(self, value: Any) -> Tensor | None:
        """Return the copy of a tensor of torch's own classes; None where only its class can copy it."""
        import torch

        kind = type(value)
        made: Any
        if kind in self._lazy:
            made = kind(value.requires_grad, device="meta", dtype=value.dtype)
        elif value.layout is not torch.strided or value.is_quantized or value.is_nested:
            return None
        else:
            made = torch.empty_like(value, device="meta")  # without grad
            if kind is torch.nn.Parameter:
                made = torch.nn.Parameter(made, value.requires_grad)
            elif value.requires_grad:
                made.requires_grad_()
        self._memo[id(value)] = made
        for name, one in value.__dict__.items():
            setattr(made, name, self._attribute(one))
        copied: Tensor = made
        return copied

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Return the function with copies of what it uses from outside and could change."""
        cells = function.__closure__ or ()
        used = {
            name: value
            for name in function.__code__.co_names
            if (value := function.__globals__.get(name, builtins)) is not builtins and _is_changeable(value)
        }
        inside = [cell.cell_contents for cell in cells if cell != types.CellType()]
        if not used and not inside and not function.__defaults__ and not function.__kwdefaults__:
            return function
        made = self._memo[id(function)] = types.FunctionType(
            function.__code__,
            {**function.__globals__, **{name: self._attribute(value) for name, value in used.items()}}
            if used
            else function.__globals__,
            function.__name__,
            None,
            tuple(types.CellType() for _ in cells),
        )
        made.__dict__.update(function.__dict__)
        for cell, copied in zip(cells, made.__closure__ or (), strict=True):
            if cell != types.CellType():
                copied.cell_contents = self._attribute(cell.cell_contents)
        made.__defaults__ = tuple(map(self._attribute, function.__defaults__ or ())) or None
        made.__kwdefaults__ = {name: self._attribute(one) for name, one in (function.__kwdefaults__ or {}).items()}
        return made


def _is_plain(cls: type) -> bool:
    """Return whether an object of this class is copied by its attributes alone."""
    names = ("__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__")
    return all(_is_usual(getattr(cls, name, None)) for name in names)


def _without_sharding(module: Module) -> dict[str, Any]:
    """Return the attributes of a module without the state and the hooks that ``fully_shard`` gave it."""
    return {
        name: {number: hook for number, hook in one.items() if not is_of_fsdp(getattr(hook, "hook", hook))}
        if isinstance(one, dict) and "_hooks" in name
        else one
        for name, one in module.__dict__.items()
        if not name.startswith("__composable_api_state_key")
    }


def _is_usual(method: object) -> bool:
    """Return whether a method of copying is that of every object, or one of torch that copies the attributes."""
    return method is None or getattr(method, "__module__", None) in (
        None,
        "torch.nn.modules.module",
        "torch.nn.utils.parametrize",
    )


def _is_changeable(value: object) -> bool:
    import torch

    return isinstance(value, (torch.nn.Module, torch.Tensor, *_CONTAINERS))
