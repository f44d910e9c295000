"""The settings that presets compute from a model: its own lists, its layers, and the growth of its widths."""

from __future__ import annotations

import fnmatch
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import format_of, read_table_file
from ckptkit.core.files.places import clean_path
from ckptkit.core.patterns import literal
from ckptkit.core.text import first_line, kind_of, listed, plural, quoted, short_number
from ckptkit.core.torch_types import Module
from ckptkit.errors import GroupsError, ModelError
from ckptkit.inputs import CheckpointLike
from ckptkit.param_groups.presets.name_patterns import patterns_of
from ckptkit.param_groups.properties import ParameterInfo, ParameterTable, parameter_table

__all__ = ["COMPUTED_SETTINGS", "PresetContext", "convnext_layers", "mup_modifiers", "plain_layers", "timm_layers"]


_Position = tuple[float, ...]  # where a layer is, sorted from input to output
_SAME_LAYER = 99999  # timm ends a position with this where it belongs to the layer before
_BLOCKS_A_LAYER = 3
_LONG_STAGE = 2
_MATRIX = 2  # dimensions of a matrix
_CONV = 3  # dimensions of the weight of a Conv1d
_SHAPES = "a mapping of names to shapes, with null for a dimension that does not grow"
_NUMBER = re.compile(r"(?P<list>(?:[^.]+\.)*?[^.0-9][^.]*)\.(?P<number>[0-9]+)\.")


def _layer_patterns(names: Sequence[str], layer: Mapping[str, _Position]) -> list[list[str]]:
    """Return the layers in order, each as patterns that match the names of the layer and no others."""
    return [patterns_of([name for name in names if layer[name] == key], names) for key in sorted(set(layer.values()))]


def timm_layers(names: Sequence[str], matcher: Any) -> list[list[str]]:
    """Return the layers of a timm ``group_matcher()``; names that it does not match are the last layer.

    ``matcher`` is a function of a name, or a mapping of kinds. The value of a kind is a regex, or pairs of a regex and
    a suffix. The position of a name is the number of its kind, then the captured numbers, then the suffix.
    """
    positions = {name: _timm_position(name, matcher) for name in names}
    layers: dict[_Position, int] = {}
    for position in sorted(set(positions.values())):
        is_same_layer = position[-1] == _SAME_LAYER and bool(layers)
        layers[position] = (max(layers.values()) if layers else -1) + (0 if is_same_layer else 1)
    return _layer_patterns(names, {name: (layers[position],) for name, position in positions.items()})


def _timm_position(name: str, matcher: Any) -> _Position:
    if callable(matcher):
        position = matcher(name)
        return tuple(position) if isinstance(position, list | tuple) else (position,)
    for number, kind in enumerate(matcher.values()):
        for regex, suffix in [(kind, None)] if isinstance(kind, str) else kind or ():
            found = re.match(regex, name)
            if found:
                captured = [float(group) for group in found.groups() if group is not None]
                return (float(number), *captured, *(map(float, suffix or ())))
    return (math.inf,)


def convnext_layers(names: Sequence[str]) -> list[list[str]]:
    """Return the layers of a ConvNeXt with the names of its own code, for any depth of its third stage.

    Raises ``GroupsError`` for a model with other names.
    """
    positions: dict[str, tuple[int, int]] = {}
    for name in names:
        part, *numbers = name.split(".")
        if part == "downsample_layers":
            stage = int(numbers[0])
            positions[name] = (stage + (stage > 0), 0)
        elif part == "stages":
            stage, block = int(numbers[0]), int(numbers[1])
            positions[name] = (stage + 1, block // _BLOCKS_A_LAYER if stage == _LONG_STAGE else 0)
    if not any(name.startswith("stages.") for name in names):
        raise GroupsError(
            "the model has no parameters named stages.0, as ConvNeXt's own code has",
            hint="for a model of timm, use the preset timm-layer-decay",
        )
    return _layer_patterns(names, {name: positions.get(name, (math.inf, 0)) for name in names})


def plain_layers(names: Sequence[str], heads: Collection[str]) -> list[list[str]]:
    """Return the layers of any model: everything before its list of blocks, each block, and everything after.

    The list of blocks must hold half of all parameters. Without such a list, each child module is a layer, in order.
    ``heads`` are the names of the output layer, which is always in the last layer.
    """
    lists = Counter(found["list"] for name in names if (found := _NUMBER.match(name)))
    main, most = max(lists.items(), key=lambda item: item[1], default=("", 0))
    layer: dict[str, _Position] = {}
    if 2 * most >= len(names):
        is_after = False
        for name in names:
            found = _NUMBER.match(name)
            inside = found is not None and found["list"] == main
            is_after = is_after or inside
            layer[name] = (1, int(found["number"])) if found and inside else (2, 0) if is_after else (0, 0)
    else:
        children = {child: index for index, child in enumerate(dict.fromkeys(name.split(".")[0] for name in names))}
        layer = {name: (1, children[name.split(".")[0]]) for name in names}
    last = max(layer.values(), default=(0, 0))
    layer.update(dict.fromkeys(heads, last))
    return _layer_patterns(names, layer)


def mup_modifiers(table: ParameterTable, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one modifier for each width multiple of the parameters, relative to ``settings["base_shapes"]``.

    Raises ``GroupsError`` where names or numbers of dimensions differ from the base, and where more than two
    dimensions of a parameter grew.
    """
    rule = settings["rule"]
    if rule not in ("adam", "sgd"):
        raise GroupsError(f"rule is {kind_of(rule)}", hint="rule must be 'adam' (MuAdam and MuAdamW) or 'sgd' (MuSGD)")
    names = [parameter.name for parameter in table.parameters]
    multiples: dict[float, list[str]] = {}
    for parameter, growth in _growths(table, settings["base_shapes"]):
        multiple = _adam(growth) if rule == "adam" else _sgd(growth)
        if multiple != 1:
            multiples.setdefault(multiple, []).append(parameter.name)
    return [
        {
            "name": f"width x{short_number(multiple)}",
            "params": patterns_of(found, names),
            "lr_mult": 1 / multiple,
            "weight_decay_mult": multiple,
        }
        for multiple, found in multiples.items()
    ]


def _adam(growth: Sequence[float | None]) -> float:
    """Return the factor of the last growing dimension where two dimensions grow, else 1."""
    grown = [factor for factor in growth if factor is not None]
    return grown[-1] if len(grown) == _MATRIX else 1.0


def _sgd(growth: Sequence[float | None]) -> float:
    grown = [factor for factor in growth if factor is not None]
    if len(grown) == 1:
        return 1 / grown[0]
    return (growth[1] or 1.0) / (growth[0] or 1.0) if grown else 1.0


def _growths(table: ParameterTable, base_shapes: object) -> Iterator[tuple[ParameterInfo, list[float | None]]]:
    """Yield each parameter with the growth factor of each dimension, or None for a dimension that is not a width."""
    bases, explicit = _bases(base_shapes)
    missing = [parameter.name for parameter in table.parameters if parameter.name not in bases]
    extra = [name for name in bases if name not in table.by_name]
    if missing or extra:
        why = f"has no {listed(missing)}" if missing else f"has {listed(extra)}, which the model does not have"
        raise GroupsError(f"base_shapes {why}", hint="make it from the same model with another width")
    for parameter in table.parameters:
        base = bases[parameter.name]
        if parameter.shape is None or len(base) != len(parameter.shape):
            found = "no shape yet" if parameter.shape is None else plural(len(parameter.shape), "dimension")
            raise GroupsError(
                f"base_shapes has {plural(len(base), 'dimension')} for {quoted(parameter.name)}, "
                f"and the model has {found}"
            )
        growth = [
            None if width is None or (width == size and not explicit) else size / width
            for width, size in zip(base, parameter.shape, strict=True)
        ]
        if sum(factor is not None for factor in growth) > _MATRIX:
            raise GroupsError(
                f"{quoted(parameter.name)} grows in more than two dimensions: muP has no rule for this",
                hint="write null for the dimensions that are not widths",
            )
        yield parameter, growth


def _bases(given: object) -> tuple[Mapping[str, Sequence[int | None]], bool]:
    """Return the base shape of each name, and whether null marks the dimensions that do not grow.

    A base-shape file has null for those dimensions. Between plain shapes, a dimension of equal size does not grow.
    """
    if isinstance(given, str | os.PathLike):
        path = clean_path(os.fsdecode(given))
        given = path if format_of(path) == "toml" else read_table_file(path)  # any other suffix is of a checkpoint
    if isinstance(given, Mapping) and given and all(isinstance(shape, list | tuple) for shape in given.values()):
        for name, shape in given.items():
            if not all(size is None or (type(size) is int and size > 0) for size in shape):
                raise GroupsError(f"base_shapes of {quoted(str(name))} is {list(shape)!r}", hint=f"give {_SHAPES}")
        return given, any(size is None for shape in given.values() for size in shape)
    if not isinstance(given, str | Mapping) and not hasattr(given, "named_parameters"):
        raise GroupsError(f"base_shapes is {kind_of(given)}", hint=f"give {_SHAPES}")
    shapes = {
        parameter.name: parameter.shape or () for parameter in parameter_table(cast("CheckpointLike", given)).parameters
    }
    if any(math.prod(shape) == 0 for shape in shapes.values()):
        raise GroupsError("base_shapes has a parameter with no elements", hint=f"give {_SHAPES}")
    return shapes, False


@dataclass(frozen=True, slots=True)
class PresetContext:
    """The model, its parameters, and the settings so far, for a setting that is computed from them."""

    model: Module | Checkpoint | None
    table: ParameterTable
    settings: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """The FQN of each parameter, in the order of the model."""
        return [parameter.name for parameter in self.table.parameters]


def _no_weight_decay(context: PresetContext) -> list[str]:
    """Return patterns for ``model.no_weight_decay()``. Its names may have the wildcards of fnmatch."""
    own = getattr(context.model, "no_weight_decay", None)
    if not callable(own):
        if not hasattr(context.model, "named_parameters"):
            warnings.warn(
                "only a live model has no_weight_decay(): for this checkpoint the list is empty", stacklevel=4
            )
        return []
    try:
        names = sorted(map(str, own()))
    except Exception as error:  # the method is code of the model
        raise ModelError(f"no_weight_decay() of the model returned no list of names: {first_line(error)}") from error
    return [_fnmatch_pattern(name) for name in names]


def _fnmatch_pattern(name: str) -> str:
    if not any(mark in name for mark in "*?["):
        return literal(name)
    return f"re:{fnmatch.translate(name)}"


def _timm_layers(context: PresetContext) -> list[list[str]]:
    matcher = getattr(context.model, "group_matcher", None)
    if not callable(matcher):
        raise GroupsError(
            "the model has no group_matcher(), which timm uses to number layers",
            hint="list the layers from input to output: layers = [['embed.*'], ['blocks.{i:int}.*'], ['head.*']]",
        )
    return timm_layers(context.names, matcher(coarse=False))


def _first_conv(context: PresetContext) -> list[str]:
    convs = (
        parameter
        for parameter in context.table.parameters
        if parameter.shape is not None and len(parameter.shape) >= _CONV
    )
    return [literal(parameter.name) for parameter in convs if "embedding" not in parameter.roles][:1]


def _saved_vectors(context: PresetContext) -> list[str]:
    saved = [
        parameter
        for parameter in context.table.trainable()
        if parameter.shape is not None and len(parameter.shape) == 1
    ]
    found = [parameter.name for parameter in saved if not parameter.roles & {"lora_a", "lora_b"}]
    multiple, ratio = context.settings["vectors_lr_mult"], context.settings["lr_ratio"]
    if found and multiple != ratio:
        warnings.warn(
            f"{plural(len(found), 'parameter')} with one dimension outside LoRA: lr is {multiple} times the base lr, "
            f"and LoRA+ of peft uses {ratio} times; vectors_lr_mult sets the factor: {listed(found)}",
            stacklevel=4,
        )
    return patterns_of(found, context.names)


def _body_and_head(context: PresetContext) -> list[list[str]]:
    heads = [parameter.name for parameter in context.table.parameters if _is_head(parameter)]
    body = [name for name in context.names if name not in set(heads)]
    return [patterns_of(part, context.names) for part in (body, heads) if part]


def _is_head(parameter: ParameterInfo) -> bool:
    return any("head" in alias.roles for alias in parameter.named())


def _plain_layers(context: PresetContext) -> list[list[str]]:
    heads = {parameter.name for parameter in context.table.parameters if _is_head(parameter)}
    return plain_layers(context.names, heads)


def _listed_layers(context: PresetContext) -> list[Any]:
    layers = context.settings["layers"]
    if not isinstance(layers, list | tuple) or not layers:
        raise GroupsError(
            f"layers is {kind_of(layers)}, not a list of patterns", hint="layers = [['body.*'], ['head.*']]"
        )
    return list(layers)


def _slice_groups(context: PresetContext) -> list[dict[str, Any]]:
    layers, lo, hi = _listed_layers(context), context.settings["lo"], context.settings["hi"]
    for key, value in (("lo", lo), ("hi", hi)):
        if (value != "" or key == "hi") and (
            isinstance(value, bool) or not isinstance(value, float | int) or value <= 0
        ):
            raise GroupsError(f"{key} is {kind_of(value)}, not a learning rate above 0", hint=f"{key} = 1e-3")
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


def _unfrozen_groups(context: PresetContext) -> list[dict[str, Any]]:
    layers, phase = _listed_layers(context), context.settings["phase"]
    if isinstance(phase, bool) or not isinstance(phase, int) or not 0 <= phase < len(layers):
        raise GroupsError(f"there is no phase {phase!r}", hint=f"the phases of this model are 0 to {len(layers) - 1}")
    patterns = [pattern for level in layers[: len(layers) - 1 - phase] for pattern in _level(level)]
    frozen = [{"name": "frozen", "params": patterns, "freeze": True}] if patterns else []
    return [*frozen, {"name": "trained", "rest": True}]


def _level(level: str | Sequence[str]) -> Sequence[str]:
    return [level] if isinstance(level, str) else level


COMPUTED_SETTINGS: Mapping[str, Callable[[PresetContext], Any]] = {
    "no_weight_decay": _no_weight_decay,
    "timm_layers": _timm_layers,
    "convnext_layers": lambda context: convnext_layers(context.names),
    "first_conv": _first_conv,
    "saved_vectors": _saved_vectors,
    "body_and_head": _body_and_head,
    "plain_layers": _plain_layers,
    "slice_groups": _slice_groups,
    "unfrozen_groups": _unfrozen_groups,
    "mup_modifiers": lambda context: mup_modifiers(context.table, context.settings),
}
