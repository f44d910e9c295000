"""Import what ``py:package.module:callable(name=value)`` names, which runs the user's code."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

from ckptkit.core.files.live_prefix import LIVE_PREFIX
from ckptkit.core.text import first_line, kind_of, nearest, quoted, shell_word
from ckptkit.errors import CkptkitError, ModelError
from ckptkit.formats.live.hints import hint_for_call, hint_for_colon, hint_for_import

__all__ = ["code_of_the_user", "import_target", "is_model"]

_LITERALS = {"true": "True", "false": "False", "none": "None", "null": "None"}


def import_target(target: str) -> Any:
    """Return the object at ``package.module:name``; for ``name(key=value)``, the callable with these arguments set.

    Modules of the current directory can be imported. Output of the code goes to stderr. Raises ``ModelError`` where the
    object cannot be imported, and where the arguments are not keyword arguments with Python literals.
    """
    path, arguments = _split_arguments(target)
    found = _import(path)
    if arguments is None:
        return found
    if is_model(found) or not callable(found):
        kind = "a model" if is_model(found) else kind_of(found)
        name = path.partition(":")[2]
        raise ModelError(f"{quoted(name)} is {kind}, not a callable that takes arguments", hint=f"write py:{path}")
    return functools.partial(found, **arguments)


def _split_arguments(target: str) -> tuple[str, dict[str, object] | None]:
    """Return ``package.module:name`` and the keyword arguments in parentheses, or None where there are none."""
    path, opening, text = target.partition("(")
    if not opening:
        return target, None
    form = "write py:package.module:callable(name=value), with Python literals as values"
    try:
        call = ast.parse(f"f({text}", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        call = None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ModelError(f"{quoted(opening + text)} is not a valid list of arguments", hint=form)
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ModelError(f"{quoted(opening + text)} has arguments without a name", hint=_with_names(path, call) or form)
    arguments: dict[str, object] = {}
    for keyword in call.keywords:
        name = str(keyword.arg)
        if name in arguments:
            raise ModelError(f"{quoted(opening + text)} has {quoted(name)} twice", hint=form)
        try:
            arguments[name] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            word = keyword.value.id if isinstance(keyword.value, ast.Name) else ""
            hint = f"did you mean {name}={_LITERALS.get(word, repr(word))}?" if word else form
            raise ModelError(f"the value of {quoted(name)} is not a Python literal", hint=hint) from None
    return path, arguments


def _with_names(path: str, call: ast.Call) -> str | None:
    """Return how to write a call with the names of its arguments, or None where the callable does not tell them."""
    with contextlib.suppress(CkptkitError, TypeError, ValueError):
        parameters = inspect.signature(_import(path)).parameters.values()
        names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        given = [one.arg for one in call.keywords]
        has_stars = any(isinstance(value, ast.Starred) for value in call.args) or None in given
        is_twice = not set(names[: len(call.args)]).isdisjoint(given)
        if len(call.args) <= len(names) and not has_stars and not is_twice:
            named = [f"{name}={ast.unparse(value)}" for name, value in zip(names, call.args, strict=False)]
            written = ", ".join([*named, *map(ast.unparse, call.keywords)])
            return f"did you mean {shell_word(f'{LIVE_PREFIX}{path}({written})')}?"
    return None


def _import(target: str) -> Any:
    module_name, _, name = target.partition(":")
    with contextlib.suppress(OSError):  # the current directory may have been removed
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
    if not module_name or not name:
        raise ModelError(f"{quoted(target)} does not name a callable", hint=hint_for_colon(target))
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found: Any = importlib.import_module(module_name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            hint = hint_for_import(module_name, name, error)
            raise ModelError(f"importing {quoted(module_name)} failed: {_with_cause(error)}", hint=hint) from error
        for part in name.split("."):
            with code_of_the_user(f"looking up {quoted(name)}"):
                if not hasattr(found, part):
                    near = nearest(part, [one for one in dir(found) if not one.startswith("_")])
                    hint = f"did you mean {quoted(near)}?" if near else None
                    if "::" in target:
                        hint = ":: selects a part of a file; for a part of a model, write a function that returns it"
                    raise ModelError(f"{quoted(module_name)} has no {quoted(name)}", hint=hint)
                found = getattr(found, part)
    return found


@contextlib.contextmanager
def code_of_the_user(doing: str, function: object = None, target: str = "") -> Iterator[None]:
    """Raise ``ModelError`` for whatever the code in the block raises, except an interrupt by the user.

    Where the block calls ``function`` with wrong arguments, the hint says which to give.
    """
    try:
        yield
    except (KeyboardInterrupt, CkptkitError):
        raise
    except BaseException as error:
        hint = hint_for_call(function, target, error) if callable(function) else None
        raise ModelError(f"{doing} failed: {_with_cause(error)}", hint=hint) from error


def _with_cause(error: BaseException) -> str:
    """Return the first line of an error, and that of the error which it was raised from."""
    first, seen = error, {id(error)}
    while first.__cause__ is not None and id(first.__cause__) not in seen:  # an error can be raised from itself
        first = first.__cause__
        seen.add(id(first))
    is_said = first is error or str(first) in str(error)
    return first_line(error) if is_said else f"{first_line(error)}, because of {first_line(first)}"


def is_model(value: object) -> bool:
    return not isinstance(value, type) and callable(getattr(value, "state_dict", None))
