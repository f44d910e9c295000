"""Record which given tensors ``load_state_dict`` writes into which tensors of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from ckptkit.core.torch_types import Tensor

__all__ = ["Filled", "Record", "make_record"]

_WRITES = frozenset({"__setitem__", "__set__"})
_MOVES = frozenset({"cpu", "cuda", "to"})
_COPIES = _MOVES | {"clone", "contiguous", "detach", "double", "float", "type_as"}


@dataclass(frozen=True, slots=True)
class Filled:
    """How a tensor of the model got its value: from which given keys, and whether it is one of these tensors itself."""

    sources: tuple[str, ...] = ()
    is_same: bool = False


class Record(Protocol):
    """A context manager that records all writes inside."""

    def __enter__(self) -> Self:
        """Begin to record."""
        ...

    def __exit__(self, kind: object, error: object, traceback: object, /) -> object:
        """End the record."""
        ...

    def write(self, target: Tensor, value: object) -> None:
        """Take note that a tensor of the model got a value."""
        ...

    def sources(self, value: object) -> tuple[str, ...]:
        """Return the given keys that a value came from."""
        ...

    def filled(self) -> dict[str, Filled]:
        """Return what was written into each tensor of the model, by each of its names."""
        ...


def make_record(targets: Mapping[str, Tensor], given: Mapping[str, object]) -> Record:
    """Return a record of the writes into ``targets``, the tensors of a model, of what comes from ``given``."""
    from torch import Size
    from torch import Tensor as TensorClass
    from torch.overrides import TorchFunctionMode

    class Recording(TorchFunctionMode):
        """Sees each call of torch, and keeps for each tensor where it comes from.

        A view of a tensor of the model counts as that tensor. ``_targets`` and ``_sources`` are by ``id()``, and the
        tensors are kept, because an ``id()`` is only valid while its object lives.
        """

        def __init__(self) -> None:
            super().__init__()
            self._kept: list[object] = [*targets.values(), *given.values()]
            self._targets: dict[int, int] = {id(tensor): id(tensor) for tensor in targets.values()}
            self._sources: dict[int, tuple[str, ...]] = {id(value): (key,) for key, value in given.items()}
            self._same = set(self._sources)
            self._written: dict[int, list[Filled]] = {}

        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            name = func.__name__
            try:
                result = func(*args, **(kwargs or {}))
            except NotImplementedError:
                if name not in _MOVES:
                    raise
                result = args[0]  # a tensor without values cannot leave the meta device, and would have them
            if isinstance(result, Size | bool | int):  # most calls ask for a shape
                return result
            if name in _WRITES or (name[-1] == "_" and name[-2:] != "__"):
                self._write(args, kwargs)
            elif isinstance(result, TensorClass):
                self._derive(func, result, args, kwargs)
            elif isinstance(result, tuple | list) and any(isinstance(one, TensorClass) for one in result):
                for one in result:
                    self._derive(func, one, args, kwargs)
            return result

        def _write(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
            target = self._targets.get(id(args[0])) if args else None
            values = list(_tensors([*args[1:], *(kwargs or {}).values()]))
            sources = self._sources_of(values)
            if target is not None:
                is_same = len(values) == 1 and id(values[0]) in self._same
                self._written.setdefault(target, []).append(Filled(sources, is_same))
            elif args and sources:
                self._add(args[0], (*self._sources.get(id(args[0]), ()), *sources))

        def _derive(
            self, func: Callable[..., Any], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None
        ) -> None:
            values = list(_tensors([*args, *(kwargs or {}).values()]))
            sources = self._sources_of(values)
            if sources and id(result) not in self._sources:
                self._add(result, sources)
                is_copy = func.__name__ in _COPIES or func == TensorClass.data.__get__  # type: ignore[attr-defined]
                if is_copy and len(values) == 1 and id(values[0]) in self._same and _is_exact(values[0], result):
                    self._same.add(id(result))
            if len(values) == 1 and id(result) not in self._targets and id(values[0]) in self._targets:
                self._kept.append(result)
                self._targets[id(result)] = self._targets[id(values[0])]

        def _add(self, tensor: object, sources: Iterable[str]) -> None:
            self._kept.append(tensor)
            self._sources[id(tensor)] = tuple(dict.fromkeys(sources))

        def _sources_of(self, values: Iterable[object]) -> tuple[str, ...]:
            found = [self._sources.get(id(value), ()) for value in values]
            return found[0] if len(found) == 1 else tuple(dict.fromkeys(key for keys in found for key in keys))

        def write(self, target: Tensor, value: object) -> None:
            written = Filled(self._sources.get(id(value), ()), id(value) in self._same)
            self._written.setdefault(self._targets[id(target)], []).append(written)

        def sources(self, value: object) -> tuple[str, ...]:
            return self._sources.get(id(value), ())

        def filled(self) -> dict[str, Filled]:
            found = {}
            for name, tensor in targets.items():
                writes = self._written.get(id(tensor))
                if writes and len(writes) == 1:
                    found[name] = writes[0]
                elif writes:  # of a tensor with several names, each name has its own write
                    found[name] = next((one for one in writes if one.sources == (name,)), writes[-1])
            return found

    return Recording()


def _is_exact(value: Any, result: Any) -> bool:
    """Return whether a copy has the same values as a tensor of its shape: it is not of a narrower dtype."""
    import torch

    wider = value.is_floating_point() and result.dtype in (torch.float32, torch.float64)
    return bool(value.shape == result.shape and (value.dtype == result.dtype or wider))


def _tensors(values: Collection[Any]) -> Iterator[object]:
    from torch import Tensor as TensorClass

    for value in values:
        if isinstance(value, TensorClass):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
