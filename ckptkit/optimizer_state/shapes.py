"""The parameters of a model in its order: of the live model, or of its checkpoint as far as that tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.param_groups.properties import subject_of

__all__ = ["Parameters", "parameters_of"]


@dataclass(frozen=True, slots=True)
class Parameters:
    """The names and shapes of parameters in the order of the model; ``frozen`` are those that do not train.

    ``certain`` says that they are the parameters, and not perhaps buffers among them; ``said`` is what they are taken
    from, for a sentence; ``aliases`` has the other names of tied ones, each with the first.
    """

    shapes: Mapping[str, tuple[int, ...]]
    frozen: frozenset[str] = frozenset()
    certain: bool = True
    said: str = "the model"
    aliases: Mapping[str, str] = field(default_factory=dict)


def parameters_of(model: Any) -> Parameters:
    """Return the parameters of a Module, or the tensors of a Checkpoint or mapping that can be parameters.

    Of tied ones the first name counts, as in ``named_parameters``; one that is uninitialised has no dims. ``model`` can
    be a mapping of names to shapes too. Raises ``ModelError`` for anything else.
    """
    if isinstance(model, Parameters):
        return model
    if isinstance(model, Mapping) and not isinstance(model, Checkpoint) and all(map(_is_shape, model.values())):
        return Parameters({str(name): tuple(shape) for name, shape in model.items()})
    parameters = subject_of(model).parameters
    live = hasattr(model, "named_parameters")
    return Parameters(
        {one.name: one.shape or () for one in parameters},
        frozenset(facts.name for one in parameters if not one.trainable for facts in one.named()),
        certain=live,
        said="the model" if live else "the model's checkpoint",
        aliases={alias.name: one.name for one in parameters for alias in one.aliases},
    )


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(size) is int for size in value)
