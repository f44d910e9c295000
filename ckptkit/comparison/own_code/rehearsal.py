"""Try the model's own code for loading on a copy of its modules on the meta device; the model does not change."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckptkit.comparison.own_code import every_module, methods_of
from ckptkit.comparison.own_code.model_copy import Copies, copy_on_meta
from ckptkit.comparison.own_code.plain_subtrees import PlainSubtrees
from ckptkit.comparison.own_code.record import Filled, make_record
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.dtypes import torch_shape
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.random_state import restored_random_state
from ckptkit.core.text import first_line, quoted
from ckptkit.core.torch_bridge import named_of, torch_dtype
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.errors import PlanError

__all__ = ["Given", "Outside", "Rehearsal", "Untried", "rehearse"]

_MISMATCH = re.compile(r"size mismatch for (.+?): copying a param", re.DOTALL)
_NO_TENSOR = re.compile(r'While copying the parameter named "(.+?)", expected torch.Tensor', re.DOTALL)
_COPYING = re.compile(r'While (?:copying|swapping) the parameter named "(.+?)", whose dimensions', re.DOTALL)
# An error with these words can come from the meta device, whose tensors have no values.
_OF_META = re.compile(r"\bmeta\b|\bdevices?\b|\bstorage\b|no data|\bFakeTensor", re.IGNORECASE)
_OF_STRICT = ("Missing key(s) in state_dict", "Unexpected key(s) in state_dict")
_STUB = "\0others"  # no key of a state_dict begins with this name


@dataclass(frozen=True, slots=True)
class Given:
    """What ``load_state_dict`` would get: tensors by key, keys of other values, and the versions of modules."""

    tensors: Mapping[str, TensorInfo]
    others: Collection[str] = ()
    versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outside:
    """What torch reports about the modules without own code: hooks of the other modules can see it, and remove it."""

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What ``load_state_dict`` did with the copies.

    Attributes:
        filled: The tensors of the model that were written, by name.
        missing: The missing keys that torch reports with ``strict=True``.
        unexpected: The unexpected keys that torch reports with ``strict=True``.
        mismatched: The tensors of the model that torch refused for their shape, each with the given key.
        blocked: The tensors of the model for which the given value was not a tensor.
        refusals: Sentences of the model's own code, with which ``load_state_dict`` raises even with ``strict=False``.
        raised: Whether the code raised an exception of its own, before all was loaded.
        refused: Whether a ``load_state_dict`` that the model overrides raises with ``strict=True``.
        names: The names of all tensors of the copies.
        replaced: Names of tensors that are other objects afterwards.
        shapes: The shapes of the tensors afterwards: lazy modules give them, and other code can change them.
    """

    filled: Mapping[str, Filled]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, str]
    blocked: tuple[str, ...]
    refusals: tuple[str, ...]
    raised: bool
    refused: bool
    names: frozenset[str]
    replaced: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Untried:
    """Why the model's own code could not be tried."""

    reason: str


def rehearse(
    model: Module,
    paths: Sequence[str],
    given: Given,
    outside: Outside = Outside(),
) -> Rehearsal | Untried:
    """Load tensors without values into copies of the modules at ``paths``, and return what happened.

    The modules are those with own code for loading, as ``modules_with_own_code`` finds them. All other modules load
    with torch's code alone, so nothing of them is copied. ``given`` has all that would be given to these modules.

    The model does not change: no tensor, no counter, no state of a random number generator. What its code prints is
    not shown. What that code changes outside of the model stays changed.
    """
    modules = [model.get_submodule(path) if path else model for path in paths]
    for module in modules:
        reason = _outside_values(module)
        if reason:
            return Untried(reason)
    import torch

    try:
        with pause_gc():
            try:
                return _load(model, paths, given, outside)
            except _NeedsValues:
                with torch.device("meta"):  # where the code makes tensors, they are beside those without values
                    return _load(model, paths, given, outside)
    except _Uncertain as error:
        return Untried(str(error))


def _load(model: Module, paths: Sequence[str], given: Given, outside: Outside) -> Rehearsal:
    attempt = _prepare(model, paths, given, outside)
    attempt.run()
    refused = attempt.raised and attempt.is_overridden
    if refused:  # its code may be less strict with strict=False
        attempt = _prepare(model, paths, given, outside)
        attempt.run(strict=False)
    result = attempt.result()
    if attempt.has_whole and result.refusals:
        raise _Uncertain(f"it fails on whole tensors in place of shards: {result.refusals[0]}")
    return replace(result, refused=True) if refused else result


def _prepare(model: Module, paths: Sequence[str], given: Given, outside: Outside) -> _Attempt:
    """Return a load into new copies. Raises ``_Uncertain`` where they cannot be made."""
    modules = [model.get_submodule(path) if path else model for path in paths]
    try:
        with _quiet():
            values = _values(given)
            copies = copy_on_meta(modules)
            twins = copies.modules
    except Exception as error:  # a model may hold what cannot be copied: locks, files, process groups
        raise _Uncertain(f"a copy on the meta device failed with {first_line(error)}") from error
    before: dict[str, Tensor] = {}
    for path, twin in zip(paths, twins, strict=True):
        for name, tensor in _named_tensors(twin).items():
            full_name = f"{path}.{name}" if path else name
            if not tensor.is_meta:
                raise _Uncertain(f"{quoted(full_name)} cannot be copied to the meta device")
            before[full_name] = tensor
    root = twins[0] if list(paths) == [""] else _skeleton(model, paths, twins, outside)
    return _Attempt(root, values, before, copies)


class _Uncertain(Exception):  # noqa: N818 - not an error: the outcome with values is not known
    """The code failed in a way that can come from the meta device."""


class _NeedsValues(_Uncertain):
    """The code failed on a tensor of the meta device, or on one of another device beside it."""


class _Attempt:
    """One load of values into copies, with a record of what was written where."""

    def __init__(
        self, root: Module, values: OrderedDict[str, Any], before: Mapping[str, Tensor], copies: Copies
    ) -> None:
        self._root = root
        self._copies = copies  # keeps alive what they refer to weakly
        self._values = values
        self._before = before
        self._lists: tuple[list[str], list[str], list[str]] | None = None
        self._mismatched: dict[str, str] = {}
        self._uncopied: dict[str, Filled] = {}
        self._record = make_record(before, values)
        self._refusal = ""
        self._watched_modules: set[int] = set()
        self._plain: PlainSubtrees | None = None
        self.raised = False

    @property
    def has_whole(self) -> bool:
        """Whether the copies have whole tensors in place of shards."""
        return self._copies.has_whole

    @property
    def is_overridden(self) -> bool:
        """Whether the model has a ``load_state_dict`` of its own."""
        import torch

        method = self._root.load_state_dict
        return getattr(method, "__func__", method) is not torch.nn.Module.load_state_dict

    def run(self, *, strict: bool = True) -> None:
        """Load. Raises ``_Uncertain`` where the outcome with values would not be known."""
        if self.is_overridden:  # it may call load_state_dict of any module inside
            for module in every_module(self._root):
                self._watch(module)
        else:
            self._plain = PlainSubtrees(self._root, self._values, self._record.write, self._watch)
        # torch's own code calls each module in the same way if strict or not, and its lists tell both outcomes.
        options = {} if self.is_overridden and strict else {"strict": False}
        try:
            with _quiet(), self._record:
                self._root.load_state_dict(self._values, **options)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # hooks of the model can raise anything, also SystemExit
            self.raised = True
            if not str(error).startswith("Error(s) in loading state_dict for"):  # the lists have what torch raises
                if isinstance(error, NotImplementedError) or _OF_META.search(str(error)):
                    raise _NeedsValues(f"it fails on tensors without values: {first_line(error)}") from error
                self._refusal = f"there is no key {error}" if isinstance(error, KeyError) else _text(error)

    def _watch(self, module: Module) -> None:
        if id(module) not in self._watched_modules:
            self._watched_modules.add(id(module))
            load = module._load_from_state_dict  # noqa: SLF001 - each module's part of load_state_dict
            module.__dict__["_load_from_state_dict"] = functools.partial(self._watched, module, load)
            module.__dict__["set_extra_state"] = _ignore  # the values of extra states are not known here

    def _watched(
        self, module: Module, load: Callable[..., None], state: dict[str, Any], prefix: str, metadata: Any, *rest: Any
    ) -> None:
        _, missing, unexpected, errors = rest
        if self._lists is None:
            self._lists = (missing, unexpected, errors)
        known = len(errors)
        load(state, prefix, metadata, *rest)
        if self._plain is not None:
            self._plain.follow(module, state, prefix, missing)
        for message in errors[known:]:
            mismatch, copying = _MISMATCH.match(message), _COPYING.match(message)
            if mismatch:
                sources = self._record.sources(state.get(mismatch[1]))
                self._mismatched[mismatch[1]] = sources[0] if len(sources) == 1 else ""
            elif copying:  # what torch can copy is decided by kinds and dtypes, which stand-ins may not have
                self._uncopied[copying[1]] = Filled(self._record.sources(state.get(copying[1])), is_same=True)

    def result(self) -> Rehearsal:
        """Return what happened."""
        missing, unexpected, errors = self._lists or ([], [], [])
        if self.is_overridden:  # the lists can be of a module inside, whose names are shorter
            missing, unexpected = [], []
        after = _named_tensors(self._root)
        refusals = [self._refusal] if self._refusal else []
        blocked = []
        mismatched: dict[str, str] = {}
        for message in errors:
            mismatch, no_tensor = _MISMATCH.match(message), _NO_TENSOR.match(message)
            if mismatch:
                mismatched[mismatch[1]] = self._mismatched.get(mismatch[1], "")
            elif no_tensor:
                blocked.append(no_tensor[1])
            elif not _COPYING.match(message) and not message.startswith(_OF_STRICT):
                refusals.append(" ".join(message.split()))
        filled = self._uncopied | self._record.filled()
        for name, tensor in after.items():
            if name in self._before and tensor is not self._before[name] and name not in filled:
                sources = self._record.sources(tensor)
                filled[name] = Filled(sources)
        return Rehearsal(
            filled,
            tuple(missing),
            tuple(unexpected),
            mismatched,
            tuple(blocked),
            tuple(refusals),
            bool(self._refusal),
            self.is_overridden and bool(self.raised or errors),
            frozenset(self._before),
            tuple(name for name, tensor in self._before.items() if after.get(name) is not tensor),
            _shapes(after),
        )


def _ignore(state: object) -> None:
    """Take an extra state, and do nothing with it."""


class _NotATensor:
    """Stands for a value of a file that is not a tensor, and that is not read."""


@contextlib.contextmanager
def _without_swaps() -> Iterator[None]:
    """Let torch copy into tensors, where the user lets it swap them: what is loaded is the same."""
    import torch

    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Run code of the model without its output, warnings and effects on random numbers."""
    with (
        _without_swaps(),
        restored_random_state(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the real load gives each warning
        yield


def _values(given: Given) -> OrderedDict[str, Any]:
    import torch

    like: dict[tuple[str, tuple[int, ...]], Tensor] = {}  # another view of one is made ten times as fast

    def stand_in(info: TensorInfo) -> Tensor:
        kind = info.dtype, info.shape
        if kind not in like:
            try:
                dtype = torch_dtype(info.dtype)
            except (KeyError, PlanError):  # a dtype that torch does not have: what it can copy is decided elsewhere
                dtype = torch.uint8
            like[kind] = torch.empty(torch_shape(*kind), dtype=dtype, device="meta")
        return like[kind].data  # an object of its own

    values: OrderedDict[str, Any] = OrderedDict((key, stand_in(info)) for key, info in given.tensors.items())
    values.update((key, _NotATensor()) for key in given.others if key not in values)
    if given.versions:
        values._metadata = {prefix: {"version": version} for prefix, version in given.versions.items()}  # type: ignore[attr-defined]  # noqa: SLF001
    return values


def _named_tensors(model: Module) -> dict[str, Tensor]:
    """Return every parameter and buffer under each of its names."""
    import torch

    usual, cls = torch.nn.Module, type(model)
    if (cls.named_parameters, cls.named_buffers) != (usual.named_parameters, usual.named_buffers):
        return dict(named_of(model, "parameters")) | dict(named_of(model, "buffers"))
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for prefix, module in _modules_in(model):
        for held, found in ((module._parameters, parameters), (module._buffers, buffers)):  # noqa: SLF001
            for name, tensor in held.items():
                if tensor is not None:
                    found[prefix + name] = tensor
    return parameters | buffers


def _modules_in(model: Module) -> list[tuple[str, Module]]:
    """Return every module under each of its names, each name with a dot at its end: faster than ``named_modules``."""
    found = [("", model)]
    for prefix, module in found:  # grows
        found += [(f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None]  # noqa: SLF001
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that has one; those of lazy modules have none yet."""
    from torch.nn.parameter import is_lazy

    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not is_lazy(tensor)}


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _outside_values(module: Module) -> str:
    """Return why the code of a module would reach a model or a tensor that is not copied with it, or an empty text."""
    import torch

    for inner in every_module(module):
        for function in methods_of(inner):
            names = getattr(getattr(function, "__code__", None), "co_names", ())
            values = getattr(function, "__globals__", {})
            for name in names:
                if isinstance(values.get(name), torch.nn.Module | torch.Tensor):
                    return f"it uses {quoted(name)}, a model or tensor of its file"
    return ""


def _skeleton(model: Module, paths: Sequence[str], twins: Sequence[Module], outside: Outside) -> Module:
    """Return a model that has only the twins at their paths, and stubs that report what is outside of them."""
    import torch

    class Stub(torch.nn.Module):
        """Reports the keys of the modules between two twins."""

        def __init__(self, missing: Sequence[str], unexpected: Sequence[str]) -> None:
            super().__init__()
            self._keys = missing, unexpected

        def _load_from_state_dict(self, *given: Any) -> None:
            for found, keys in zip(given[4:], self._keys, strict=False):
                found.extend(keys)

    places = _places(model, paths, outside.missing)
    root = torch.nn.Module()
    root.add_module(_STUB, Stub((), outside.unexpected))
    for number, (path, twin) in enumerate(zip(paths, twins, strict=True)):
        *parents, name = path.split(".")
        parent = root
        for part in parents:
            if part not in parent._modules:  # noqa: SLF001 - a name may hide a method, which hasattr would find
                parent._modules[part] = torch.nn.Module()  # noqa: SLF001
            parent = parent._modules[part]  # type: ignore[assignment]  # noqa: SLF001
        if places[number]:
            parent._modules[f"{_STUB}{number}"] = Stub(places[number], ())  # noqa: SLF001
        parent._modules[name] = twin  # noqa: SLF001
    if places[-1]:
        root._modules[f"{_STUB}last"] = Stub(places[-1], ())  # noqa: SLF001
    return root


def _places(model: Module, paths: Sequence[str], missing: Sequence[str]) -> list[list[str]]:
    """Return the missing keys that torch would report before each of the modules at ``paths``, and after the last."""
    places: list[list[str]] = [[] for _ in range(len(paths) + 1)]
    if missing:
        order = {path: number for number, (path, _) in enumerate(named_of(model, "modules"))}
        starts = [order[path] for path in paths]
        for key in missing:
            number = order.get(key.rpartition(".")[0], 0)
            places[next((at for at, start in enumerate(starts) if number < start), -1)].append(key)
    return places
