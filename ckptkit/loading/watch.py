"""What the tensors of a model are before a load, to compare with afterwards without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.ties import overlapping_tensors
from ckptkit.core.torch_bridge import TensorPayload, describe_state_dict, named_of, shape_or_none
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.digests.hashing import hash_payloads
from ckptkit.loading.regions import held_memory

__all__ = ["Digests", "Watch", "named_tensors"]


def named_tensors(model: Module) -> dict[str, Tensor]:
    """Return every parameter and buffer under each of its names, also the buffers that are not persistent."""
    return dict(named_of(model, "parameters")) | dict(named_of(model, "buffers"))


class Watch:
    """The parameters and buffers of a model by name, with the memory and the number of changes that each has.

    torch counts the changes of a tensor. The count does not see changes that go around it, as those of ``tensor.data``
    do. So it proves something only where no code but ckptkit's has run.

    ``infos`` describes the tensors by name. ``not_compared`` names the tensors that cannot be compared.
    """

    def __init__(self, model: Module) -> None:
        """Take note of all tensors of ``model``; nothing is read."""
        self._model = model
        self.tensors = named_tensors(model)
        self.infos: Checkpoint = describe_state_dict(self.tensors, "model")
        self._before = {name: _memory_and_changes(tensor) for name, tensor in self.tensors.items()}

    @property
    def not_compared(self) -> tuple[str, ...]:
        """Names of the tensors that ``is_unchanged`` cannot compare."""
        return ()

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters, which optimizers hold."""
        from torch.nn import Parameter

        return frozenset(name for name, tensor in self.tensors.items() if isinstance(tensor, Parameter))

    @property
    def ties(self) -> set[frozenset[str]]:
        """Sets of names of tensors that share memory."""
        return _ties(self.infos)

    def ties_now(self) -> set[frozenset[str]]:
        """Return the sets of names of tensors that share memory now; only names known from before count."""
        now = named_tensors(self._model)
        return _ties(describe_state_dict({name: now[name] for name in self.tensors if name in now}, "model"))

    def replaced(self) -> Iterator[str]:
        """Yield the names that no longer have the same tensor object."""
        now = named_tensors(self._model)
        return (name for name, tensor in self.tensors.items() if now.get(name) is not tensor)

    def is_unchanged(self, name: str) -> bool:
        """Return whether a tensor has the same memory, and torch counted no change of it."""
        memory, changes = self._before[name]
        now, changes_now = _memory_and_changes(self.tensors[name])
        same_memory = now is memory or (now is not None and memory is not None and now.is_set_to(memory))
        return same_memory and changes_now == changes


class Digests(Watch):
    """A watch that compares SHA-256 digests of the bits, for models whose own code runs while loading.

    Tensors without plain bytes (sparse, quantized, subclasses, on the meta device) are not compared.
    """

    def __init__(self, model: Module, names: Iterable[str]) -> None:
        """Read and digest the tensors at ``names``."""
        super().__init__(model)
        self._digests = {name: digest for name in names if (digest := self._digest(name)) is not None}

    @property
    def not_compared(self) -> tuple[str, ...]:
        """Names of the tensors without plain bytes."""
        return tuple(name for name, tensor in self.tensors.items() if held_memory(tensor) is None)

    def is_unchanged(self, name: str) -> bool:
        """Return whether a tensor has the bits of before; true for a tensor that cannot be compared."""
        before = self._digests.get(name)
        return before is None or before == self._digest(name)

    def _digest(self, name: str) -> tuple[object, ...] | None:
        tensor = held_memory(self.tensors[name])
        if tensor is None:
            return None
        payload = TensorPayload(tensor, tensor.numel() * tensor.element_size())
        return tensor.dtype, tensor.shape, hash_payloads([payload])


def _ties(infos: Checkpoint) -> set[frozenset[str]]:
    return {frozenset(info.key for info in group) for group in overlapping_tensors(infos.values())}


def _memory_and_changes(tensor: Tensor) -> tuple[Tensor | None, int | None]:
    """Return a second view of the memory of a tensor, and the number of changes that torch counted."""
    if shape_or_none(tensor) is None:  # of a lazy module; torch lets nothing be asked of it
        return None, None
    held = held_memory(tensor)
    counted = tensor if held is None else held
    # An inference tensor has no count. The count has no public name.
    changes = None if counted.is_inference() else counted._version  # noqa: SLF001
    return None if held is None else held.detach(), changes
