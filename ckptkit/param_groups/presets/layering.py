"""Which parameter lies in which layer, read off the names of a model; each layer comes out as patterns that fit it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from ckptkit.errors import GroupsError
from ckptkit.param_groups.naming import patterns_of

__all__ = ["convnext_layers", "plain_layers", "timm_layers"]

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
