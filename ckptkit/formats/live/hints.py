"""What to write, to install or to give where a live model cannot be imported or built."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable

from ckptkit.core.files.live_prefix import LIVE_PREFIX
from ckptkit.core.text import first_line, listed, nearest, quoted, shell_word
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["hint_for_call", "hint_for_colon", "hint_for_import", "hint_for_source"]

_MOST_NAMES = 8  # of the arguments of a callable
# Errors of urllib, requests, httpx and huggingface_hub, which are not imported here.
_OF_THE_NETWORK = frozenset({"URLError", "ConnectionError", "ConnectError", "LocalEntryNotFoundError", "gaierror"})
_OF_ANOTHER_BUILD = lazy_pattern(
    r"operator (\w+)::\w+ does not exist|Could not load this library: .*-packages/(\w+)/"  # of torch.ops
)


def hint_for_colon(target: str) -> str:
    """Return the target with its colon where the last name cannot be a module, or else the form of a target."""
    module_name, _, name = target.rpartition(".")
    is_callable = name[:1].isupper() or (_is_module(module_name) and not _is_module(target))
    if module_name and is_callable and ":" not in target:
        return f"did you mean {shell_word(f'{LIVE_PREFIX}{module_name}:{name}')}?"
    return "write py:package.module:callable"


def _is_module(name: str) -> bool:
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return importlib.util.find_spec(name) is not None  # the packages above are imported
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001 - a script that is imported can call sys.exit()
            return False


def hint_for_import(module_name: str, name: str, error: BaseException) -> str | None:
    """Return what to write for the path of a file, what is to be installed, or where a module was searched."""
    if module_name.endswith(".py") or "/" in module_name:
        return hint_for_source(module_name, name)
    if found := _OF_ANOTHER_BUILD.search(first_line(error)):
        library = found[1] or found[2]
        return f"{library} was probably built for another torch: install versions of both that belong together"
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    if not f"{module_name}.".startswith(f"{error.name}."):
        top = error.name.partition(".")[0]
        lacking = error.name if top in sys.modules else top  # an older version of a library can lack one module
        missing = f"the code imports {quoted(lacking)}, which {sys.executable} does not have"
        return f"{missing}: install it there, or install ckptkit where the code runs"
    parent, _, last = error.name.rpartition(".")
    near = nearest(last, [one.name for one in pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", []))])
    if near:
        right = f"{LIVE_PREFIX}{parent}.{near}{module_name.removeprefix(error.name)}:{name}"
        return f"did you mean {shell_word(right)}?"
    searched = "searched in the current directory and on sys.path"
    return searched if parent else f"{searched}: go where {quoted(error.name)} is, or set PYTHONPATH"


def hint_for_source(path: str, name: str) -> str:
    """Return how to write the module of the file ``path``, which may lack its suffix."""
    plain = os.path.normpath(path.removesuffix(".py"))
    # The code of a live model is on this machine, never in a store.
    if os.path.isabs(plain) or plain.startswith(".."):
        folder, file = os.path.split(plain)
        return f"write {shell_word(f'{LIVE_PREFIX}{file}:{name}')}, and set PYTHONPATH={shell_word(folder)}"
    dotted = plain.replace(os.sep, ".")
    return f"did you mean {shell_word(f'{LIVE_PREFIX}{dotted}:{name}')}?"


def hint_for_call(function: Callable[..., object], target: str, error: BaseException) -> str | None:
    """Return which arguments of ``function`` to give instead, or None if the error is about something else."""
    if any(one.__name__ in _OF_THE_NETWORK for one in type(error).__mro__):
        return "the code needs the network: an argument such as pretrained=False or weights=None may avoid it"
    reason = first_line(error) if isinstance(error, TypeError) else ""
    called = function.func if isinstance(function, functools.partial) else function
    with contextlib.suppress(TypeError, ValueError):  # code without a signature
        if re.search("missing .* required", reason):
            return _hint_for_missing(function, target)
        if unknown := re.search("unexpected keyword argument '(.*?)'", reason):
            parameters = inspect.signature(called).parameters.values()
            names = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
            if names and unknown[1] not in names and unknown[1] in getattr(function, "keywords", {}):
                longer = [one for one in names if unknown[1] in one.split("_")]
                near = longer[0] if len(longer) == 1 else nearest(unknown[1], names)
                return f"did you mean {quoted(near)}?" if near else f"it takes {listed(names, _MOST_NAMES)}"
    return None


def _hint_for_missing(function: Callable[..., object], target: str) -> str | None:
    """Return the target with each argument that ``function`` needs, or None if it needs no other.

    Raises ``TypeError`` or ``ValueError`` where its arguments are not known.
    """
    parameters = inspect.signature(function).parameters.values()
    given = {name: repr(value) for name, value in getattr(function, "keywords", {}).items()}
    positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    missing = [
        one.name
        for one in parameters
        if one.default is inspect.Parameter.empty and one.kind not in positional and one.name not in given
    ]
    if not missing:
        return None
    values = ", ".join(f"{name}={value}" for name, value in {**given, **dict.fromkeys(missing, "VALUE")}.items())
    path = target.partition("(")[0]
    return f"write {shell_word(f'{LIVE_PREFIX}{path}({values})')}, with a Python literal for each VALUE"
