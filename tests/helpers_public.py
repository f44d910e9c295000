"""The public functions, classes and methods, for tests that hold for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import ckptkit
from ckptkit import optimizer_state, testing

MODULES = (ckptkit, optimizer_state, testing)


def public_names() -> dict[str, object]:
    """Return every public function and class; a type alias is neither, though it can be called in some Pythons."""
    values = {name: getattr(module, name) for module in MODULES for name in module.__all__}
    return {name: value for name, value in values.items() if isinstance(value, type) or inspect.isfunction(value)}


def public_functions() -> dict[str, Callable[..., object]]:
    """Return every public function."""
    return {name: value for name, value in public_names().items() if inspect.isfunction(value)}


def public_methods() -> dict[str, Callable[..., object]]:
    """Return each method with arguments of a public class as ``Class.method``, under the public class that defines it.

    Methods that another library defines, such as ``Mapping.get`` and ``Executor.submit``, are left out.
    """
    classes = {value for value in public_names().values() if isinstance(value, type)}
    methods: dict[str, Callable[..., object]] = {}
    for cls in classes:
        for name, function in inspect.getmembers(cls, inspect.isfunction):
            owner = next(base for base in cls.__mro__ if name in vars(base))
            others = [base for base in cls.__mro__ if not base.__module__.startswith("ckptkit.") and base is not object]
            is_own = (owner is cls or owner not in classes) and not any(name in vars(base) for base in others)
            if name.startswith("_") or not function.__module__.startswith("ckptkit.") or not is_own:
                continue
            if len(inspect.signature(function).parameters) > 1:
                methods[f"{cls.__name__}.{name}"] = function
    return methods
