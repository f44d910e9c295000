"""The parameters and buffers of a live model by identity, with every name of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckptkit.core.arguments import argument_text
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import named_of, shape_or_none
from ckptkit.core.torch_types import Module, Parameter, Tensor
from ckptkit.errors import GroupsError
from ckptkit.wrappers.table import SEGMENTS

__all__ = ["LiveModel", "LiveParameter", "check_methods", "read_live_model"]


@dataclass(frozen=True, slots=True, eq=False)
class LiveParameter:
    """One parameter object of a live model: its first registered name, and ``aliases`` where it is tied."""

    name: str
    aliases: tuple[str, ...]
    tensor: Parameter  # a strong reference, so that its id is not reused while ids are compared
    lazy: bool  # uninitialised: it has no shape before the first forward pass

    @property
    def trainable(self) -> bool:
        """Whether the parameter gets a gradient."""
        return self.tensor.requires_grad

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, or ``()`` while uninitialised; under DeepSpeed ZeRO-3, the shape of the whole parameter."""
        return () if self.lazy else true_shape(self.tensor) or ()

    @property
    def elements(self) -> int:
        """Number of elements, or 0 while the parameter has no shape."""
        return 0 if self.lazy else math.prod(self.shape)

    @property
    def module(self) -> str:
        """The name of the module that registered the parameter first."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class LiveModel:
    """A live model: ``parameters`` by ``id()``, in the order of registration, and its buffers and modules."""

    model: Module
    parameters: Mapping[int, LiveParameter]

    @cached_property
    def buffers(self) -> Mapping[int, tuple[str, Tensor]]:
        """Every buffer with its first registered name."""
        found: dict[int, tuple[str, Tensor]] = {}
        for name, buffer in named_of(self.model, "buffers"):
            found.setdefault(id(buffer), (name, buffer))
        return found

    @cached_property
    def bare_buffers(self) -> frozenset[str]:
        """The names of the buffers, without the segments that wrappers add."""
        return frozenset(bare_name(name) for name, _ in named_of(self.model, "buffers"))

    @cached_property
    def by_name(self) -> Mapping[str, LiveParameter]:
        """Every parameter under each of its names."""
        return {name: live for live in self.parameters.values() for name in (live.name, *live.aliases)}

    @cached_property
    def by_bare_name(self) -> Mapping[str, LiveParameter]:
        """Every parameter under each name that it had before the model was wrapped."""
        bare: dict[str, LiveParameter] = {}
        for name, live in self.by_name.items():
            bare.setdefault(bare_name(name), live)
        return bare

    @cached_property
    def by_address(self) -> Mapping[int, LiveParameter]:
        """The parameters by the address of their memory, without those that have no memory."""
        found: dict[int, LiveParameter] = {}
        for live in self.parameters.values():
            if start := address(live.tensor):
                found.setdefault(start, live)
        return found

    @cached_property
    def by_module(self) -> Mapping[str, Sequence[LiveParameter]]:
        """The parameters by the module that registered them first."""
        found: dict[str, list[LiveParameter]] = {}
        for live in self.parameters.values():
            found.setdefault(live.module, []).append(live)
        return found

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """Every module under each of its names, without the segments that wrappers add."""
        found: dict[str, Module] = {}
        for name, module in named_of(self.model, "modules"):
            found.setdefault(bare_name(name), module)
        return found

    @cached_property
    def flattened(self) -> Mapping[str, LiveParameter]:
        """The FlatParameter of each bare name that FullyShardedDataParallel flattened."""
        found: dict[str, LiveParameter] = {}
        for live in self.parameters.values():
            prefix = bare_name(live.name).rpartition("_flat_param")[0]
            found |= {f"{prefix}{bare_name(name)}": live for name in flat_names(live.tensor)}
        return found

    def named(self, name: str) -> LiveParameter | None:
        """Return the parameter with this name before or after wrapping, or None."""
        return self.by_name.get(name) or self.by_bare_name.get(bare_name(name))

    def trainable(self) -> Iterator[LiveParameter]:
        """Yield the parameters with ``requires_grad=True``."""
        return (live for live in self.parameters.values() if live.trainable)


def read_live_model(model: Module) -> LiveModel:
    """Return the parameters of ``model``, each tied parameter once.

    Raises ``GroupsError`` where ``model`` is not a ``torch.nn.Module``, and ``ModelError`` where it cannot list its
    parameters.
    """
    from torch.nn import Module, Parameter
    from torch.nn.parameter import is_lazy

    if not isinstance(model, Module):
        raise GroupsError(
            f"the model is {argument_text(model)}, not a torch.nn.Module",
            hint="give the live module that will train: parameters are compared by identity",
        )
    check_methods(model)
    # Two flat dicts, not one list for each parameter: the garbage collector would have to visit every list.
    first: dict[int, tuple[str, Parameter]] = {}
    others: dict[int, list[str]] = {}
    for pair in named_of(model, "parameters"):
        key = id(pair[1])
        if key in first:
            others.setdefault(key, []).append(pair[0])
        else:
            first[key] = pair
    return LiveModel(
        model,
        {
            key: LiveParameter(
                name, tuple(others.get(key, ())), tensor, type(tensor) is not Parameter and is_lazy(tensor)
            )
            for key, (name, tensor) in first.items()
        },
    )


def true_shape(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the shape of a parameter, under DeepSpeed ZeRO-3 of the whole one; None where it has no shape."""
    whole = getattr(tensor, "ds_shape", None)
    return shape_or_none(tensor) if whole is None else tuple(whole)


_READ = frozenset(
    f"{prefix}{kind}" for kind in ("parameters", "modules", "children", "buffers") for prefix in ("", "named_")
) | {"state_dict"}


def check_methods(model: Module) -> None:
    """Raise ``GroupsError`` if a value was assigned over a method that lists the parts of a module of ``model``."""
    stack = [("", model)]
    seen: set[int] = set()
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        attributes = vars(module)
        for name in attributes.keys() & _READ:
            if not callable(attributes[name]):
                raise GroupsError(
                    f"{quoted(path) if path else 'the model'} has a {type(attributes[name]).__name__} in place of the "
                    f"method {name}(): the assignment hides the method",
                    hint=f"delete the attribute: del module.{name}",
                )
        children = attributes.get("_modules", {})
        stack += [
            (f"{path}.{key}" if path else key, child) for key, child in children.items() if hasattr(child, "_modules")
        ]


def bare_name(name: str) -> str:
    """Return ``name`` without the segments of torch's wrappers: ``module`` at the start, ``_orig_mod`` anywhere."""
    segments = [segment for segment in name.split(".") if segment not in SEGMENTS]
    while len(segments) > 1 and segments[0] == "module":
        del segments[0]
    return ".".join(segments)


def flat_names(tensor: Tensor) -> tuple[str, ...]:
    """Return the names, relative to their FSDP unit, of the parameters in a FlatParameter; else ``()``."""
    return tuple(getattr(tensor, "_fqns", ()))


def address(tensor: Tensor) -> int:
    """Return the address of the memory of ``tensor``, or 0 where it has none (meta, empty, uninitialised)."""
    try:
        return tensor.data_ptr() if tensor.numel() else 0
    except (RuntimeError, ValueError):  # lazy and fake tensors raise
        return 0
