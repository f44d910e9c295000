"""Find the modules that load their tensors with code of their own: hooks, and overridden methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ckptkit.core.torch_types import Module

__all__ = [
    "class_before_sharding",
    "every_module",
    "hooks_of",
    "is_below",
    "is_of_fsdp",
    "methods_of",
    "modules_with_own_code",
    "own_code_test",
]

_DISTRIBUTED = "torch.distributed."
# The hooks of fully_shard bring the parameters into their sharded state, in which state_dict() has left them already.
_FSDP = ("torch.distributed.fsdp._fully_shard.", "torch.distributed._composable.fsdp.")

_METHODS = ("_load_from_state_dict", "_save_to_state_dict", "state_dict")
# There is no public way to list them.
_HOOKS_OF_LOADING = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_HOOKS = (*_HOOKS_OF_LOADING, "_state_dict_hooks", "_state_dict_pre_hooks")


def own_code_test(*, saving: bool = False) -> Callable[[Module], bool]:
    """Return a function that tells whether a module has own code, and that asks each class once.

    BatchNorm overrides a method only for files without its counter, for which nothing is to be done where a missing key
    keeps its value. With ``saving``, modules also count whose own code decides what ``state_dict()`` returns.
    """
    import torch

    usual = (torch.nn.Module._load_from_state_dict, torch.nn.modules.batchnorm._NormBase._load_from_state_dict)  # noqa: SLF001
    hooks = _HOOKS if saving else _HOOKS_OF_LOADING
    classes: dict[type, bool] = {}

    def has_own_code(module: Module) -> bool:
        cls, held = type(module), module.__dict__
        if cls not in classes:
            classes[cls] = cls._load_from_state_dict not in usual or (saving and _saves_with_own_method(cls))
        if classes[cls] or any(map(held.__contains__, _METHODS)):
            return True
        return any(map(held.get, hooks)) and any(not is_of_fsdp(hook) for hook in hooks_of(module, saving=saving))

    return has_own_code


def modules_with_own_code(model: Module, *, saving: bool = False) -> tuple[str, ...]:
    """Return the paths of the topmost modules that have a hook for loading, or override a method that loads.

    The code of such a module can also see and change the tensors of the modules below it. ``saving`` is as in
    ``own_code_test``.
    """
    import torch

    if _function(model, "load_state_dict") is not torch.nn.Module.load_state_dict:
        return ("",)
    return tuple(_topmost(model, own_code_test(saving=saving)))


def _topmost(model: Module, is_wanted: Callable[[Module], bool]) -> Iterator[str]:
    """Yield the paths of the topmost modules that are wanted, in the order in which ``load_state_dict`` walks."""
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if is_wanted(module):
            yield path
            continue
        children = module._modules  # noqa: SLF001 - named_modules() of the user may list others than torch loads
        if children:
            start = f"{path}." if path else ""
            waiting += [(start + name, child) for name, child in reversed(children.items()) if child is not None]


def every_module(root: Module) -> list[Module]:
    """Return each module once, a module before those below it: faster than ``modules()``, which a class can replace."""
    found = [root]
    seen = {id(root)}
    for module in found:  # grows
        for child in module._modules.values():  # noqa: SLF001
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def _saves_with_own_method(cls: type[Module]) -> bool:
    import torch

    usual = torch.nn.Module
    return (
        cls.state_dict is not usual.state_dict or cls._save_to_state_dict is not usual._save_to_state_dict  # noqa: SLF001
    )


def is_below(name: str, modules: Iterable[str]) -> bool:
    """Return whether the dotted ``name`` is that of one of the modules, or of something inside one of them."""
    return any(not module or name == module or name.startswith(f"{module}.") for module in modules)


def hooks_of(module: Any, *, saving: bool = False) -> list[Any]:
    """Return the hooks of a module that load_state_dict calls, and those that state_dict calls if ``saving``."""
    held = module.__dict__
    return [
        getattr(hook, "hook", hook)
        for name in (_HOOKS if saving else _HOOKS_OF_LOADING)
        for hook in held.get(name, {}).values()
    ]


def methods_of(module: Module) -> Iterator[object]:
    """Yield the functions of a module's class that load_state_dict calls and that are not those of every module."""
    import torch

    for name in ("load_state_dict", "_load_from_state_dict"):
        function = _function(module, name)
        if function is not getattr(torch.nn.Module, name):
            yield function


def _function(module: Module, name: str) -> object:
    method = getattr(module, name)
    return getattr(method, "__func__", method)


def class_before_sharding(cls: type) -> type:
    """Return the class that a module had before ``fully_shard`` gave it a class of its own."""
    bases = cls.__bases__
    is_sharded = len(bases) == 2 and bases[0].__name__ == "FSDPModule" and bases[0].__module__.startswith(_DISTRIBUTED)
    return bases[1] if is_sharded else cls


def is_of_fsdp(hook: object) -> bool:
    """Return whether a hook is one of ``fully_shard``."""
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)
