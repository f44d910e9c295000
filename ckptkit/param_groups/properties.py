"""What rules can ask about a parameter: names, shape, kind of module, roles; of a live model or of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint import DTYPES, TensorInfo
from ckptkit.core.ties import tied
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.param_groups.parameters import Inventory, take_inventory
from ckptkit.param_groups.roles import HEADS, class_names, is_buffer_name, model_heads, roles_by_class, roles_by_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ParameterFacts", "Subject", "subject_of", "subject_of_model"]

_CODES = {dtype.torch_name: dtype.code for dtype in DTYPES.values()}
_WHOLE = frozenset({"F16", "BF16", "F32", "F64", "C32", "C64", "C128"})
_INNER = ".parametrizations."


@dataclass(frozen=True, slots=True)
class ParameterFacts:
    """One parameter as a rule sees it; ``aliases`` are the same one under its other names.

    ``shape`` is None while it is uninitialised, ``classes`` (the names of its module's class and of all that it
    derives from) is None where only names and shapes are known; ``roles`` are then read off the names.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str = ""
    trainable: bool = True
    classes: frozenset[str] | None = None
    roles: frozenset[str] = frozenset()
    aliases: tuple[ParameterFacts, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements, or 0 while it has no shape."""
        return 0 if self.shape is None else math.prod(self.shape)

    def named(self) -> Iterator[ParameterFacts]:
        """Yield it under each of its names."""
        yield self
        yield from self.aliases


@dataclass(frozen=True)
class Subject:
    """All parameters that a spec is laid over, in order, and what could only be assumed about them."""

    parameters: tuple[ParameterFacts, ...]
    buffers: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, ParameterFacts]:
        """Every name of every parameter, aliases included."""
        return {facts.name: facts for parameter in self.parameters for facts in parameter.named()}

    def trainable(self) -> Iterator[ParameterFacts]:
        """Yield what an optimizer should hold."""
        return (facts for facts in self.parameters if facts.trainable)


def subject_of(model: Any) -> Subject:
    """Return what is known of a live ``torch.nn.Module``, or of a checkpoint by its names and shapes alone.

    Raises ``ModelError`` where ``model`` is neither.
    """
    if hasattr(model, "named_parameters"):
        return subject_of_model(take_inventory(model))
    infos = as_checkpoint(model, "model")
    kept = {key: info for key, info in infos.items() if not _is_buffer(info)}
    ties = {keys[0]: keys[1:] for keys in tied(kept.values())}
    later = {alias for aliases in ties.values() for alias in aliases}
    facts = {key: _offline(info) for key, info in kept.items()}
    parameters = tuple(
        _tied(facts[key], [facts[alias] for alias in ties.get(key, ())]) for key in kept if key not in later
    )
    return Subject(
        parameters,
        tuple(key for key in infos if key not in kept),
        (
            "every parameter counts as trainable: only the live model can tell",
            "roles (bias, norm, embedding, head) and buffers are told by names and dtypes, not by modules",
        ),
    )


def subject_of_model(inventory: Inventory) -> Subject:
    """Return what the live model tells about its parameters."""
    modules = dict(inventory.model.named_modules(remove_duplicate=False))
    heads = model_heads(inventory.model, modules)
    by_class: dict[type, tuple[frozenset[str], frozenset[str]]] = {}

    def known(name: str, tensor: Tensor, *, trainable: bool, lazy: bool) -> ParameterFacts:
        path = name[: name.index(_INNER)] if _INNER in name else name.rpartition(".")[0]
        module = modules.get(path)
        kind = type(module)
        if kind not in by_class:
            by_class[kind] = (class_names(kind), roles_by_class(kind))
        classes, roles = by_class[kind]
        shape = None if lazy else tuple(getattr(tensor, "ds_shape", tensor.shape))
        extra = roles_by_name(name, shape, module=module, head=path in heads)
        dtype = _CODES.get(str(tensor.dtype).removeprefix("torch."), "")
        return ParameterFacts(name, shape, dtype, trainable, classes, roles | extra)

    return Subject(
        tuple(
            _tied(
                known(live.name, live.tensor, trainable=live.trainable, lazy=live.lazy),
                [known(alias, live.tensor, trainable=live.trainable, lazy=live.lazy) for alias in live.aliases],
            )
            for live in inventory.parameters.values()
        ),
        tuple(name for name, _ in inventory.buffers.values()),
    )


def _offline(info: TensorInfo) -> ParameterFacts:
    head = any(segment in HEADS for segment in info.key.split(".")[:2])
    return ParameterFacts(
        info.key, info.shape, info.dtype, roles=roles_by_name(info.key, info.shape, guess=True, head=head)
    )


def _tied(facts: ParameterFacts, aliases: list[ParameterFacts]) -> ParameterFacts:
    if not aliases:
        return facts
    return ParameterFacts(
        facts.name, facts.shape, facts.dtype, facts.trainable, facts.classes, facts.roles, tuple(aliases)
    )


def _is_buffer(info: TensorInfo) -> bool:
    return is_buffer_name(info.key) or (info.dtype not in _WHOLE and not info.dtype.startswith("F8"))
