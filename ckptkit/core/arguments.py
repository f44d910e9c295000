"""Checks of the arguments of public functions, made at their entry: a wrong one is refused in one sentence.

A checkpoint, rules and a spec have their own way in, which also says what they hold.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from types import UnionType
from typing import Any, NoReturn, ParamSpec, TypeVar

from ckptkit.core.text import kind_of
from ckptkit.errors import RULE_OPTIONS, ArgumentError

__all__ = [
    "argument_text",
    "has_no_argument",
    "one_of",
    "refuse",
    "require_choice",
    "require_flags",
    "require_number",
    "require_path",
    "require_progress",
    "require_strings",
    "require_type",
    "takes_rules",
]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def has_no_argument(
    **hints: str,
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Return a decorator: the function raises ``ArgumentError`` with these hints for arguments that others have."""

    def decorate(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        @functools.wraps(function)
        def called(*args: _Parameters.args, **named: _Parameters.kwargs) -> _Result:
            for name in hints.keys() & named.keys() if named else ():
                raise ArgumentError(f"{function.__name__}() has no argument {name}", hint=hints[name])
            return function(*args, **named)

        return called

    return decorate


def takes_rules(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Return a function with the argument ``rules`` that says so where it is called with ``strip`` or ``rename``."""
    return has_no_argument(**{name: f"give rules=parse_rules({name}=...)" for name in RULE_OPTIONS})(function)


def refuse(value: object, name: str, takes: str) -> NoReturn:
    """Raise ``ArgumentError``: the argument ``name`` got ``value``, and takes what the words ``takes`` say."""
    raise ArgumentError(f"{name} is {argument_text(value)}", hint=f"{name} must be {takes}")


def require_type(value: object, kinds: type | UnionType, name: str, takes: str) -> None:
    """Raise ``ArgumentError`` unless ``value`` is an instance of ``kinds``."""
    if not isinstance(value, kinds):
        refuse(value, name, takes)


def require_number(value: object, name: str, takes: str, *, at_least: float = -math.inf, whole: bool = False) -> None:
    """Raise ``ArgumentError`` unless ``value`` is a number of ``at_least`` this size; a ``whole`` one is an int."""
    is_number = isinstance(value, int if whole else Real) and not isinstance(value, bool)
    number: Any = value if is_number else math.nan
    if not number >= at_least:
        refuse(value, name, takes)


def require_flags(**flags: object) -> None:
    """Raise ``ArgumentError`` unless each argument, given by its name, is True or False, of Python or of numpy."""
    for name, value in flags.items():
        kind = type(value)
        if kind is not bool and (kind.__module__, kind.__name__.rstrip("_")) != ("numpy", "bool"):
            refuse(value, name, "True or False")


def require_path(value: object, name: str) -> None:
    """Raise ``ArgumentError`` unless ``value`` is a path."""
    require_type(value, str | os.PathLike, name, "a str or an os.PathLike")


def require_progress(value: object) -> None:
    """Raise ``ArgumentError`` unless the argument ``progress`` is None, or a function to call."""
    if value is not None and (not callable(value) or isinstance(value, type)):
        refuse(value, "progress", "a function that takes a number of bytes")


def require_choice(value: object, choices: Iterable[str], name: str) -> None:
    """Raise ``ArgumentError`` unless ``value`` is one of the strings ``choices``."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        refuse(value, name, one_of(known))


def one_of(choices: Sequence[str]) -> str:
    """Return the words for a choice: ``"keep" or "error"``."""
    return " or ".join(f'"{choice}"' for choice in choices)


def require_strings(value: object, name: str, takes: str) -> tuple[str, ...]:
    """Return the strings of a str, or of several str; raise ``ArgumentError`` for any other value."""
    if isinstance(value, str):
        return (value,)
    items = tuple(value) if isinstance(value, Iterable) and not isinstance(value, bytes) else (None,)
    if not all(isinstance(item, str) for item in items):
        refuse(value, name, takes)
    return items


def argument_text(value: object) -> str:
    """Return a description of an argument for an error message: ``None``, ``2.5``, ``the class Net``, ``a list``."""
    if value is None or (isinstance(value, int | float) and -1e15 < value < 1e15):
        return repr(value)
    # A dtype of torch or numpy: "a dtype" would not say which.
    return repr(value) if type(value).__name__ == "dtype" else kind_of(value)
