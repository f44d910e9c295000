"""muP: by how much the width of each parameter grew over a base model, and what its rate is multiplied by for that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptkit.core.text import kind_of, listed, quoted
from ckptkit.errors import GroupsError
from ckptkit.param_groups.naming import patterns_of
from ckptkit.param_groups.properties import ParameterFacts, Subject, subject_of

__all__ = ["mup_modifiers"]

_MATRIX = 2
_SHAPES = "a mapping of names to shapes, null where a dimension does not grow"


def mup_modifiers(subject: Subject, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one modifier for each multiple that the growth of parameters over ``base_shapes`` asks for.

    Raises ``GroupsError`` for names or dimensions that differ from the base, and for more than two that grew.
    """
    rule = settings["rule"]
    if rule not in ("adam", "sgd"):
        raise GroupsError(f"rule is {kind_of(rule)}", hint="rule = 'adam' for MuAdam and MuAdamW, 'sgd' for MuSGD")
    names = [facts.name for facts in subject.parameters]
    multiples: dict[float, list[str]] = {}
    for facts, growth in _growths(subject, settings["base_shapes"]):
        multiple = _adam(growth) if rule == "adam" else _sgd(growth)
        if multiple != 1:
            multiples.setdefault(multiple, []).append(facts.name)
    return [
        {
            "name": f"width x{multiple:g}",
            "params": patterns_of(found, names),
            "lr_mult": 1 / multiple,
            "weight_decay_mult": multiple,
        }
        for multiple, found in multiples.items()
    ]


def _adam(growth: Sequence[float | None]) -> float:
    """Return the width multiple of what is like a matrix, that of its last growing dimension, else 1."""
    grown = [factor for factor in growth if factor is not None]
    return grown[-1] if len(grown) == _MATRIX else 1.0


def _sgd(growth: Sequence[float | None]) -> float:
    grown = [factor for factor in growth if factor is not None]
    if len(grown) == 1:
        return 1 / grown[0]
    return (growth[1] or 1.0) / (growth[0] or 1.0) if grown else 1.0


def _growths(subject: Subject, base_shapes: Any) -> Iterator[tuple[ParameterFacts, list[float | None]]]:
    """Yield each parameter with the factor by which each dimension grew, None where it is no width."""
    bases, explicit = _bases(base_shapes)
    missing = [facts.name for facts in subject.parameters if facts.name not in bases]
    extra = [name for name in bases if name not in subject.by_name]
    if missing or extra:
        which = f"lacks {listed(missing)}" if missing else f"has {listed(extra)}, which the model has not"
        raise GroupsError(f"base_shapes {which}", hint="make it from the same model with another width")
    for facts in subject.parameters:
        base = bases[facts.name]
        if facts.shape is None or len(base) != len(facts.shape):
            raise GroupsError(f"base_shapes has {len(base)} dimensions for {quoted(facts.name)}, the model others")
        growth = [
            None if width is None or (width == size and not explicit) else size / width
            for width, size in zip(base, facts.shape, strict=True)
        ]
        if sum(factor is not None for factor in growth) > _MATRIX:
            raise GroupsError(
                f"{quoted(facts.name)} grows in more than two dimensions, for which muP has no rule",
                hint="write null for those that are no width",
            )
        yield facts, growth


def _bases(given: Any) -> tuple[Mapping[str, Sequence[int | None]], bool]:
    """Return the base shape of each name, and whether it says itself which dimensions grow.

    A base-shape file does, by null for the others; in plain shapes those that are equal do not.
    """
    if isinstance(given, Mapping) and given and all(isinstance(shape, list | tuple) for shape in given.values()):
        for name, shape in given.items():
            if not all(size is None or (type(size) is int and size > 0) for size in shape):
                raise GroupsError(f"base_shapes of {quoted(str(name))} is {list(shape)!r}", hint=f"give {_SHAPES}")
        return given, any(size is None for shape in given.values() for size in shape)
    if not isinstance(given, Mapping) and not hasattr(given, "named_parameters"):
        raise GroupsError(f"base_shapes is {kind_of(given)}", hint=f"give {_SHAPES}")
    shapes = {facts.name: facts.shape or () for facts in subject_of(given).parameters}
    if any(math.prod(shape) == 0 for shape in shapes.values()):
        raise GroupsError("base_shapes has a parameter without elements", hint=f"give {_SHAPES}")
    return shapes, False
