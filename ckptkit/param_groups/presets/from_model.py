"""What presets ask of the model: its own lists, its layers, the widths that it grew by."""

from __future__ import annotations

import fnmatch
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.patterns import literal
from ckptkit.core.text import kind_of, listed, plural, quoted
from ckptkit.errors import GroupsError
from ckptkit.param_groups.emit import patterns_of
from ckptkit.param_groups.properties import ParameterInfo, ParameterTable, parameter_table

__all__ = ["FROM_MODEL", "Asked", "convnext_layers", "mup_modifiers", "plain_layers", "timm_layers"]


_WITH_PREVIOUS = 99999  # what timm ends a place with that belongs to the layer before it
_BLOCKS_A_LAYER = 3
_LONG_STAGE = 2
_NUMBER = re.compile(r"(?P<list>(?:[^.]+\.)*?[^.0-9][^.]*)\.(?P<number>[0-9]+)\.")


def _as_patterns(names: Sequence[str], layer: Mapping[str, Any]) -> list[list[str]]:
    """Return the layers in the order of their keys, each as patterns that fit its names and no others."""
    return [patterns_of([name for name in names if layer[name] == key], names) for key in sorted(set(layer.values()))]


def timm_layers(names: Sequence[str], matcher: Any) -> list[list[str]]:
    """Return the layers that a ``group_matcher()`` of timm makes: what it does not match is the last of them.

    It is a function of a name, or a mapping of kinds to a regex or to pairs of a regex and what its place ends with.
    The place of a name is its kind's number, then the numbers that the regex captures.
    """
    places = {name: _place(name, matcher) for name in names}
    order: dict[tuple[float, ...], int] = {}
    for place in sorted(set(places.values())):
        joined = place[-1] == _WITH_PREVIOUS and order
        order[place] = (max(order.values()) if order else -1) + (0 if joined else 1)
    return _as_patterns(names, {name: order[place] for name, place in places.items()})


def _place(name: str, matcher: Any) -> tuple[float, ...]:
    if callable(matcher):
        place = matcher(name)
        return tuple(place) if isinstance(place, list | tuple) else (place,)
    for number, kind in enumerate(matcher.values()):
        for regex, ending in [(kind, None)] if isinstance(kind, str) else kind or ():
            found = re.match(regex, name)
            if found:
                captured = [float(group) for group in found.groups() if group is not None]
                return (float(number), *captured, *(map(float, ending or ())))
    return (math.inf,)


def convnext_layers(names: Sequence[str]) -> list[list[str]]:
    """Return the layers of a ConvNeXt under the names of its own code, whatever the depth of its third stage."""
    places: dict[str, tuple[int, int]] = {}
    for name in names:
        part, *numbers = name.split(".")
        if part == "downsample_layers":
            stage = int(numbers[0])
            places[name] = (stage + (stage > 0), 0)
        elif part == "stages":
            stage, block = int(numbers[0]), int(numbers[1])
            places[name] = (stage + 1, block // _BLOCKS_A_LAYER if stage == _LONG_STAGE else 0)
    if not any(name.startswith("stages.") for name in names):
        raise GroupsError(
            "the model has no stages.0, as ConvNeXt's own code calls them",
            hint="for models of timm there is the preset timm-layer-decay",
        )
    return _as_patterns(names, {name: places.get(name, (math.inf, 0)) for name in names})


def plain_layers(names: Sequence[str], heads: Collection[str]) -> list[list[str]]:
    """Return the layers of any model: before its long list of blocks, each block, and what comes after it.

    Without one list that holds half of all parameters each child of the model is a layer, in order.
    """
    lists = Counter(found["list"] for name in names if (found := _NUMBER.match(name)))
    main, most = max(lists.items(), key=lambda item: item[1], default=("", 0))
    layer: dict[str, Hashable] = {}
    if 2 * most >= len(names):
        seen = False
        for name in names:
            found = _NUMBER.match(name)
            inside = found is not None and found["list"] == main
            seen = seen or inside
            layer[name] = (1, int(found["number"])) if found and inside else (2, 0) if seen else (0, 0)
    else:
        children = {child: index for index, child in enumerate(dict.fromkeys(name.split(".")[0] for name in names))}
        layer = {name: (1, children[name.split(".")[0]]) for name in names}
    last = max(layer.values(), default=(0, 0))  # type: ignore[type-var]
    layer.update(dict.fromkeys(heads, last))
    return _as_patterns(names, layer)


_MATRIX = 2
_SHAPES = "a mapping of names to shapes, null where a dimension does not grow"


def mup_modifiers(table: ParameterTable, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one modifier for each multiple that the growth of parameters over ``base_shapes`` asks for.

    Raises ``GroupsError`` for names or dimensions that differ from the base, and for more than two that grew.
    """
    rule = settings["rule"]
    if rule not in ("adam", "sgd"):
        raise GroupsError(f"rule is {kind_of(rule)}", hint="rule = 'adam' for MuAdam and MuAdamW, 'sgd' for MuSGD")
    names = [parameter.name for parameter in table.parameters]
    multiples: dict[float, list[str]] = {}
    for parameter, growth in _growths(table, settings["base_shapes"]):
        multiple = _adam(growth) if rule == "adam" else _sgd(growth)
        if multiple != 1:
            multiples.setdefault(multiple, []).append(parameter.name)
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


def _growths(table: ParameterTable, base_shapes: Any) -> Iterator[tuple[ParameterInfo, list[float | None]]]:
    """Yield each parameter with the factor by which each dimension grew, None where it is no width."""
    bases, explicit = _bases(base_shapes)
    missing = [parameter.name for parameter in table.parameters if parameter.name not in bases]
    extra = [name for name in bases if name not in table.by_name]
    if missing or extra:
        which = f"lacks {listed(missing)}" if missing else f"has {listed(extra)}, which the model has not"
        raise GroupsError(f"base_shapes {which}", hint="make it from the same model with another width")
    for parameter in table.parameters:
        base = bases[parameter.name]
        if parameter.shape is None or len(base) != len(parameter.shape):
            raise GroupsError(f"base_shapes has {len(base)} dimensions for {quoted(parameter.name)}, the model others")
        growth = [
            None if width is None or (width == size and not explicit) else size / width
            for width, size in zip(base, parameter.shape, strict=True)
        ]
        if sum(factor is not None for factor in growth) > _MATRIX:
            raise GroupsError(
                f"{quoted(parameter.name)} grows in more than two dimensions, for which muP has no rule",
                hint="write null for those that are no width",
            )
        yield parameter, growth


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
    shapes = {parameter.name: parameter.shape or () for parameter in parameter_table(given).parameters}
    if any(math.prod(shape) == 0 for shape in shapes.values()):
        raise GroupsError("base_shapes has a parameter without elements", hint=f"give {_SHAPES}")
    return shapes, False


_CONV = 3  # dimensions of the smallest convolution


@dataclass(frozen=True, slots=True)
class Asked:
    """A model, what is known of its parameters, and the settings so far."""

    model: Any
    table: ParameterTable
    settings: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """The FQN of each parameter, in model order."""
        return [parameter.name for parameter in self.table.parameters]


def _no_weight_decay(asked: Asked) -> list[str]:
    """Return patterns for what the model's own list names, which may hold wildcards of fnmatch."""
    own = getattr(asked.model, "no_weight_decay", None)
    if not callable(own):
        if not hasattr(asked.model, "named_parameters"):
            warnings.warn(
                "what no_weight_decay() lists is known to the live model alone: here it is empty", stacklevel=4
            )
        return []
    return [_as_pattern(str(name)) for name in sorted(own())]


def _as_pattern(name: str) -> str:
    if not any(mark in name for mark in "*?["):
        return literal(name)
    return f"re:{fnmatch.translate(name)}"


def _timm_layers(asked: Asked) -> list[list[str]]:
    matcher = getattr(asked.model, "group_matcher", None)
    if not callable(matcher):
        raise GroupsError(
            "the model has no group_matcher(), by which timm counts layers",
            hint="list them from input to output: layers = [['embed.*'], ['blocks.{i:int}.*'], ['head.*']]",
        )
    return timm_layers(asked.names, matcher(coarse=False))


def _first_conv(asked: Asked) -> list[str]:
    convs = (
        parameter
        for parameter in asked.table.parameters
        if parameter.shape is not None and len(parameter.shape) >= _CONV
    )
    return [literal(parameter.name) for parameter in convs if "embedding" not in parameter.roles][:1]


def _saved_vectors(asked: Asked) -> list[str]:
    saved = [
        parameter for parameter in asked.table.trainable() if parameter.shape is not None and len(parameter.shape) == 1
    ]
    found = [parameter.name for parameter in saved if not parameter.roles & {"lora_a", "lora_b"}]
    multiple, ratio = asked.settings["vectors_lr_mult"], asked.settings["lr_ratio"]
    if found and multiple != ratio:
        warnings.warn(
            f"{plural(len(found), 'parameter')} of one dimension outside of LoRA get {multiple} x the base rate, where "
            f"LoRA+ of peft gives {ratio} x: {listed(found)}; vectors_lr_mult sets it",
            stacklevel=4,
        )
    return patterns_of(found, asked.names)


def _body_and_head(asked: Asked) -> list[list[str]]:
    heads = [parameter.name for parameter in asked.table.parameters if _is_head(parameter)]
    body = [name for name in asked.names if name not in set(heads)]
    return [patterns_of(part, asked.names) for part in (body, heads) if part]


def _is_head(parameter: ParameterInfo) -> bool:
    return any("head" in one.roles for one in parameter.named())


def _plain_layers(asked: Asked) -> list[list[str]]:
    heads = {parameter.name for parameter in asked.table.parameters if _is_head(parameter)}
    return plain_layers(asked.names, heads)


def _listed_layers(asked: Asked) -> list[Any]:
    layers = asked.settings["layers"]
    if not isinstance(layers, list | tuple) or not layers:
        raise GroupsError(
            f"layers is {kind_of(layers)}, not a list of patterns", hint="layers = [['body.*'], ['head.*']]"
        )
    return list(layers)


def _slice_groups(asked: Asked) -> list[dict[str, Any]]:
    layers, lo, hi = _listed_layers(asked), asked.settings["lo"], asked.settings["hi"]
    for key, value in (("lo", lo), ("hi", hi)):
        if (value != "" or key == "hi") and (
            isinstance(value, bool) or not isinstance(value, float | int) or value <= 0
        ):
            raise GroupsError(f"{key} is {kind_of(value)}, not a rate above 0", hint=f"{key} = 1e-3")
    count = len(layers)
    if lo == "":
        rates = [hi / 10] * (count - 1) + [hi]
    else:
        step = (hi / lo) ** (1 / max(1, count - 1))
        rates = [lo * step**index for index in range(count)] if count > 1 else [hi]
    return [
        {"name": f"slice {index}", "params": patterns, "lr": rate}
        for index, (patterns, rate) in enumerate(zip(layers, rates, strict=True))
    ]


def _unfrozen_groups(asked: Asked) -> list[dict[str, Any]]:
    layers, phase = _listed_layers(asked), asked.settings["phase"]
    if isinstance(phase, bool) or not isinstance(phase, int) or not 0 <= phase < len(layers):
        raise GroupsError(f"there is no phase {phase!r}", hint=f"the model has the phases 0 to {len(layers) - 1}")
    still = [pattern for level in layers[: len(layers) - 1 - phase] for pattern in _level(level)]
    frozen = [{"name": "frozen", "params": still, "freeze": True}] if still else []
    return [*frozen, {"name": "trained", "rest": True}]


def _level(level: str | Sequence[str]) -> Sequence[str]:
    return [level] if isinstance(level, str) else level


FROM_MODEL: Mapping[str, Callable[[Asked], Any]] = {
    "no_weight_decay": _no_weight_decay,
    "timm_layers": _timm_layers,
    "convnext_layers": lambda asked: convnext_layers(asked.names),
    "first_conv": _first_conv,
    "saved_vectors": _saved_vectors,
    "body_and_head": _body_and_head,
    "plain_layers": _plain_layers,
    "slice_groups": _slice_groups,
    "unfrozen_groups": _unfrozen_groups,
    "mup_modifiers": lambda asked: mup_modifiers(asked.table, asked.settings),
}
