"""The parameters of a model in its order: of the live model, or of its checkpoint as far as that tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptkit.sharing import tied
from ckptkit.tensors import Checkpoint
from ckptkit.torch_bridge import as_checkpoint

__all__ = ["Parameters", "parameters_of"]

# What torch's own modules register as buffers under one name everywhere; a checkpoint does not say which is which.
_BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


@dataclass(frozen=True, slots=True)
class Parameters:
    """The names and shapes of parameters in the order of the model; ``frozen`` are those that do not train.

    ``certain`` says that they are the parameters, and not perhaps buffers among them; ``said`` is what they are taken
    from, for a sentence.
    """

    shapes: Mapping[str, tuple[int, ...]]
    frozen: frozenset[str] = frozenset()
    certain: bool = True
    said: str = "the model"
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of tied parameters -> the first


def parameters_of(model: Any) -> Parameters:
    """Return the parameters of a Module, or the tensors of a Checkpoint or mapping that can be parameters.

    Of tied ones the first name counts, as in ``named_parameters``.
    """
    if callable(getattr(model, "named_parameters", None)):
        named = list(model.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        for name, tensor in named:
            first.setdefault(id(tensor), name)
        shapes = {name: tuple(tensor.shape) for name, tensor in named if first[id(tensor)] == name}
        frozen = frozenset(name for name, tensor in named if not tensor.requires_grad)
        return Parameters(shapes, frozen, aliases={name: first[id(tensor)] for name, tensor in named})
    if isinstance(model, Parameters):
        return model
    if isinstance(model, Mapping) and not isinstance(model, Checkpoint) and all(map(_is_shape, model.values())):
        return Parameters({str(name): tuple(shape) for name, shape in model.items()})
    checkpoint = as_checkpoint(model, "the model")
    aliases = {other: names[0] for names in tied(checkpoint.values()) for other in names[1:]}
    shapes = {
        info.key: info.shape
        for info in checkpoint.values()
        if info.key not in aliases
        and info.key.rpartition(".")[2] not in _BUFFERS
        and info.dtype.startswith(("F", "BF", "C"))
    }
    said = "the live model" if checkpoint.format == "live model" else "the model's checkpoint"
    return Parameters(shapes, certain=False, said=said, aliases=aliases)


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(size) is int for size in value)
