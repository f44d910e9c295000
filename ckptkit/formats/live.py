"""Open live models as checkpoints. ``py:package.module:callable`` imports and runs the user's code.

``py:package.module:callable(name=value)`` passes keyword arguments, whose values are Python literals.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, TensorInfo
from ckptkit.core.config_files import default_error_path
from ckptkit.core.files.live_prefix import LIVE_PREFIX, is_live_path
from ckptkit.core.text import first_line, kind_of, listed, nearest, quoted, shell_word
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.core.torch_types import Module
from ckptkit.errors import CkptkitError, ModelError
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["build_model", "build_module", "build_shapes", "hint_for_source", "import_target", "open_live"]

_LITERALS = {"true": "True", "false": "False", "none": "None", "null": "None"}
_MOST_NAMES = 8  # of the arguments of a callable, in a hint
# Errors of urllib, requests, httpx and huggingface_hub, which are not imported here.
_OF_THE_NETWORK = frozenset({"URLError", "ConnectionError", "ConnectError", "LocalEntryNotFoundError", "gaierror"})
_NO_OP = r"for .*: copying from a non-meta parameter in the checkpoint to a meta parameter in the current model"
_DEEPEST_RESULT = 4  # a cache refers to its table, the table to entries, an entry to a result, a result to its items
_OF_ANOTHER_BUILD = lazy_pattern(
    r"operator (\w+)::\w+ does not exist|Could not load this library: .*-packages/(\w+)/"  # of torch.ops
)


def import_target(target: str) -> Any:
    """Return the object at ``package.module:name``; for ``name(key=value)``, the callable with these arguments set.

    Modules of the current directory can be imported. Output of the code goes to stderr. Raises ``ModelError`` where the
    object cannot be imported, and where the arguments are not keyword arguments with Python literals.
    """
    path, arguments = _split_arguments(target)
    found = _import(path)
    if arguments is None:
        return found
    if _is_model(found) or not callable(found):
        kind = "a model" if _is_model(found) else kind_of(found)
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
        raise ModelError(f"{quoted(target)} does not name a callable", hint=_hint_for_colon(target))
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found: Any = importlib.import_module(module_name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            hint = _hint_for_import(module_name, name, error)
            raise ModelError(f"importing {quoted(module_name)} failed: {_with_cause(error)}", hint=hint) from error
        for part in name.split("."):
            with _code_of_the_user(f"looking up {quoted(name)}"):
                if not hasattr(found, part):
                    near = nearest(part, [one for one in dir(found) if not one.startswith("_")])
                    hint = f"did you mean {quoted(near)}?" if near else None
                    if "::" in target:
                        hint = ":: selects a part of a file; for a part of a model, write a function that returns it"
                    raise ModelError(f"{quoted(module_name)} has no {quoted(name)}", hint=hint)
                found = getattr(found, part)
    return found


def _hint_for_colon(target: str) -> str:
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


def _hint_for_import(module_name: str, name: str, error: BaseException) -> str | None:
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


@contextlib.contextmanager
def _code_of_the_user(doing: str, function: object = None, target: str = "") -> Iterator[None]:
    """Raise ``ModelError`` for whatever the code in the block raises, except an interrupt by the user.

    Where the block calls ``function`` with wrong arguments, the hint says which to give.
    """
    try:
        yield
    except (KeyboardInterrupt, CkptkitError):
        raise
    except BaseException as error:
        hint = _hint_for_call(function, target, error) if callable(function) else None
        raise ModelError(f"{doing} failed: {_with_cause(error)}", hint=hint) from error


def _with_cause(error: BaseException) -> str:
    """Return the first line of an error, and that of the error which it was raised from."""
    first, seen = error, {id(error)}
    while first.__cause__ is not None and id(first.__cause__) not in seen:  # an error can be raised from itself
        first = first.__cause__
        seen.add(id(first))
    is_said = first is error or str(first) in str(error)
    return first_line(error) if is_said else f"{first_line(error)}, because of {first_line(first)}"


def _hint_for_call(function: Callable[..., object], target: str, error: BaseException) -> str | None:
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


def build_model(target: str, *, device: str | None = None) -> Any:
    """Return the model or state_dict that ``target`` names. A callable is called with ``device`` as default.

    Raises what ``import_target`` raises, and ``ModelError`` where the callable fails or returns something else.
    """
    found = import_target(target)
    name = target.partition(":")[2]
    with contextlib.redirect_stdout(sys.stderr), _code_of_the_user(f"calling {quoted(name)}", found, target):
        if _is_model(found) or isinstance(found, Mapping):
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
    if not _is_model(model) and not isinstance(model, Mapping):
        kind = "None" if model is None else kind_of(model)  # a function without return is the usual cause
        raise ModelError(f"{quoted(name)} returned {kind}, not a model or a state_dict")
    return model


def _is_model(value: object) -> bool:
    return not isinstance(value, type) and callable(getattr(value, "state_dict", None))


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
        tensors = [*built.parameters(), *built.buffers()] if hasattr(built, "named_parameters") else []
        if not any(tensor.is_meta for tensor in tensors) or not _forget_meta_tensors():
            return built
    except ModelError:
        if not _forget_meta_tensors():
            raise
    return build_model(target)


def _forget_meta_tensors() -> bool:
    """Empty each ``functools`` cache that holds a tensor of the meta device, and return whether there was one."""
    kind: type = type(functools.lru_cache(len))
    caches: list[Any] = [one for one in gc.get_objects() if type(one) is kind]
    stale = [cache for cache in caches if cache.cache_info().currsize and _holds_meta_tensors(cache)]
    for cache in stale:
        cache.cache_clear()
    return bool(stale)


def _holds_meta_tensors(cache: object) -> bool:
    """Return whether a tensor of the meta device is among the results of a cache, or in a container among them."""
    import torch

    level: list[object] = [cache]
    for _ in range(_DEEPEST_RESULT):
        held = gc.get_referents(*level)
        if any(isinstance(one, torch.Tensor) and one.is_meta for one in held):
            return True
        level = [one for one in held if isinstance(one, dict | tuple | list) or type(one).__name__ == "_lru_list_elem"]
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
    with contextlib.redirect_stdout(sys.stderr), _code_of_the_user("state_dict()"):
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
