"""Find the modules that load their tensors with code of their own: hooks, and overridden methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ckptkit.core.torch_bridge import named_of
from ckptkit.core.torch_types import Module

__all__ = ["hooks_of", "is_below", "methods_of", "modules_with_own_code"]

# The hooks of fully_shard bring the parameters into their sharded state, in which state_dict() has left them already.
_HARMLESS = ("torch.distributed.fsdp._fully_shard.", "torch.distributed._composable.fsdp.")

_METHODS = frozenset({"_load_from_state_dict", "_save_to_state_dict", "state_dict"})


def modules_with_own_code(model: Module, *, saving: bool = False) -> tuple[str, ...]:
    """Return the paths of the topmost modules that have a hook for loading, or override a method that loads.

    The code of such a module can also see and change the tensors of the modules below it. BatchNorm overrides a method
    only for files without its counter, for which nothing is to be done where a missing key keeps its value. With
    ``saving``, modules also count whose own code decides what ``state_dict()`` returns.
    """
    import torch

    module_class, norm = torch.nn.Module, torch.nn.modules.batchnorm._NormBase  # noqa: SLF001 - its method is compared
    usual = (module_class._load_from_state_dict, norm._load_from_state_dict)  # noqa: SLF001
    if _function(model, "load_state_dict") is not module_class.load_state_dict:
        return ("",)
    found: list[str] = []
    classes: dict[type, bool] = {}
    for path, module in named_of(model, "modules"):
        if is_below(path, found[-1:]):  # a module comes before the modules below it
            continue
        cls = type(module)
        if cls not in classes:
            classes[cls] = cls._load_from_state_dict not in usual or (saving and _saves_with_own_method(cls))
        own = classes[cls] or not _METHODS.isdisjoint(module.__dict__)
        if own or any(not _is_harmless(hook) for hook in hooks_of(module, saving=saving)):
            found.append(path)
    return tuple(found)


def _saves_with_own_method(cls: type[Module]) -> bool:
    import torch

    usual = torch.nn.Module
    return (
        cls.state_dict is not usual.state_dict or cls._save_to_state_dict is not usual._save_to_state_dict  # noqa: SLF001
    )


def is_below(name: str, modules: Iterable[str]) -> bool:
    """Return whether the dotted ``name`` is that of one of the modules, or of something inside one of them."""
    return any(not module or name == module or name.startswith(f"{module}.") for module in modules)


def hooks_of(module: Any, *, saving: bool = False) -> Iterator[Any]:
    """Yield the hooks of a module that load_state_dict calls, and those that state_dict calls if ``saving``."""
    # There is no public way to list them.
    kinds = [module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks]  # noqa: SLF001
    if saving:
        kinds += [module._state_dict_hooks, module._state_dict_pre_hooks]  # noqa: SLF001
    for hooks in filter(None, kinds):
        for hook in hooks.values():
            yield getattr(hook, "hook", hook)


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


def _is_harmless(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_HARMLESS)
