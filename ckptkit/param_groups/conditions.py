"""How a spec selects parameters: the conditions of ``match``, and the layers of a modifier."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptkit.core.dtypes import DTYPES
from ckptkit.core.patterns import Pattern, matches_any, parse_pattern
from ckptkit.core.text import kind_of, quoted
from ckptkit.errors import GroupsError, RuleError
from ckptkit.param_groups.properties import ROLES, ParameterInfo

__all__ = ["Condition", "LayerNumbers", "Layers", "condition_table", "parse_condition"]


_MAX_DEPTH = 32
_EXAMPLE = 'for example match = { any = [{ ndim = [0, 1] }, { role = "bias" }] }'


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition on a parameter, or a combination of conditions.

    - One condition: ``kind`` is ``params``, ``module``, ``role``, ``dtype``, ``ndim``, ``shape`` or ``min_elements``.
      The condition holds where one of ``values`` matches the parameter.
    - A combination: ``kind`` is ``any``, ``all`` or ``not``, and ``inner`` has the conditions.
    """

    kind: str
    values: tuple[Any, ...] = ()
    inner: tuple[Condition, ...] = ()

    def holds(self, parameter: ParameterInfo) -> bool | None:
        """Return whether the condition holds for ``parameter``, or None where only the live model could tell."""
        if not self.inner:
            return _CHECKS[self.kind](parameter, self.values)
        results = [condition.holds(parameter) for condition in self.inner]
        if self.kind == "not":
            return None if results[0] is None else not results[0]
        decisive = self.kind == "any"
        if decisive in results:
            return decisive
        return None if None in results else not decisive


def parse_condition(table: object, where: str, depth: int = 0) -> Condition:
    """Return the condition that a ``match`` table describes.

    Every key of the table must hold. A key with a list of values holds where one of them matches.
    Raises ``GroupsError``, which begins with ``where``, for an unknown key or a wrong value.
    """
    if not isinstance(table, Mapping):
        is_pattern = isinstance(table, str) and table and depth == 0
        hint = f"params = {json.dumps(table)} takes a pattern of names" if is_pattern else _EXAMPLE
        raise GroupsError(f"{where}: match is {kind_of(table)}, not a table", hint=hint)
    if not table:
        raise GroupsError(f"{where}: match is an empty table", hint=_EXAMPLE)
    if depth > _MAX_DEPTH:
        raise GroupsError(f"{where}: match is nested more than {_MAX_DEPTH} levels deep", hint=_EXAMPLE)
    conditions = [_parse_key(str(key), value, where, depth) for key, value in table.items()]
    return conditions[0] if len(conditions) == 1 else Condition("all", inner=tuple(conditions))


def condition_table(condition: Condition) -> dict[str, Any]:
    """Return the table that ``parse_condition`` parses as this condition."""
    if condition.kind == "not":
        return {"not": condition_table(condition.inner[0])}
    if condition.inner:
        return {condition.kind: [condition_table(inner) for inner in condition.inner]}
    values = [_plain(value) for value in condition.values]
    return {condition.kind: values[0] if len(values) == 1 else values}


def _plain(value: object) -> object:
    return value.text if isinstance(value, Pattern) else list(value) if isinstance(value, tuple) else value


def _parse_key(kind: str, value: object, where: str, depth: int) -> Condition:
    if kind in ("any", "all"):
        if not isinstance(value, list | tuple) or not value:
            raise GroupsError(f"{where}: {kind} is {kind_of(value)}, not a list of conditions", hint=_EXAMPLE)
        return Condition(kind, inner=tuple(parse_condition(inner, where, depth + 1) for inner in value))
    if kind == "not":
        return Condition(kind, inner=(parse_condition(value, where, depth + 1),))
    if kind not in _PARSERS:
        raise GroupsError(
            f"{where}: match has the unknown key {quoted(kind)}",
            hint=f"the keys are {', '.join(_PARSERS)}, any, all, not",
        )
    if kind == "shape":
        return Condition(kind, (_parse_shape(value, where),))
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise GroupsError(f"{where}: {kind} is an empty list, which matches nothing", hint=_EXAMPLE)
    return Condition(kind, tuple(_PARSERS[kind](inner, where) for inner in values))


def _parse_pattern(value: object, where: str) -> Pattern:
    try:
        return parse_pattern(_parse_text("params", value, where))
    except RuleError as error:
        raise GroupsError(f"{where}: {error.reason}", hint=error.hint) from None


def _parse_text(kind: str, value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise GroupsError(f"{where}: {kind} is {kind_of(value)}, not a name", hint=_EXAMPLE)
    return value


def _parse_count(kind: str, value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise GroupsError(f"{where}: {kind} is {kind_of(value)}, not a count", hint=f"write {kind} = 1")
    return value


def _parse_role(value: object, where: str) -> str:
    if not isinstance(value, str) or value not in ROLES:
        known = ", ".join(sorted(ROLES))
        raise GroupsError(f"{where}: role is {kind_of(value)}, not a known role", hint=f"the roles are {known}")
    return value


def _parse_dtype(value: object, where: str) -> str:
    text = _parse_text("dtype", value, where)
    code = next((dtype.code for dtype in DTYPES.values() if text in (dtype.code, dtype.torch_name)), None)
    if code is None:
        raise GroupsError(
            f"{where}: dtype is {quoted(text)}, not a known dtype", hint='write "F32" or "float32", for example'
        )
    return code


def _parse_shape(value: object, where: str) -> tuple[int | str, ...]:
    sizes = value if isinstance(value, list | tuple) else None
    if sizes is None or not all(size == "*" or (type(size) is int and size >= 0) for size in sizes):
        raise GroupsError(
            f"{where}: shape is {kind_of(value)}, not a list of sizes",
            hint='write shape = [768, "*"]: a star matches any size',
        )
    return tuple(sizes)


_PARSERS: dict[str, Callable[[object, str], Any]] = {
    "params": _parse_pattern,
    "module": lambda value, where: _parse_text("module", value, where),
    "role": _parse_role,
    "ndim": lambda value, where: _parse_count("ndim", value, where),
    "shape": _parse_shape,
    "min_elements": lambda value, where: _parse_count("min_elements", value, where),
    "dtype": _parse_dtype,
}


def _is_of_class(parameter: ParameterInfo, values: Iterable[str]) -> bool | None:
    if parameter.classes is None:
        return None
    return any(value.removeprefix("torch.nn.") in parameter.classes or value in parameter.classes for value in values)


def _has_shape(parameter: ParameterInfo, values: tuple[tuple[int | str, ...], ...]) -> bool | None:
    if parameter.shape is None:
        return None
    (expected,) = values
    return len(expected) == len(parameter.shape) and all(
        size in ("*", found) for size, found in zip(expected, parameter.shape, strict=True)
    )


_CHECKS: dict[str, Callable[[ParameterInfo, tuple[Any, ...]], bool | None]] = {
    "params": lambda parameter, values: matches_any(values, parameter.name),
    "module": _is_of_class,
    "role": lambda parameter, values: any(value in parameter.roles for value in values),
    "ndim": lambda parameter, values: None if parameter.shape is None else len(parameter.shape) in values,
    "shape": _has_shape,
    "min_elements": lambda parameter, values: None if parameter.shape is None else parameter.elements >= min(values),
    "dtype": lambda parameter, values: parameter.dtype in values,
}


@dataclass(frozen=True, slots=True)
class LayerNumbers:
    """The layer number of each parameter that is in a layer, counted from 0 at the input.

    ``gaps`` has the numbers that are missing in the names: ``3`` where the model has ``blocks.2`` and ``blocks.4``.
    """

    layer: Mapping[str, int]
    count: int
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layers:
    """The ``layers`` of a modifier: levels from the input to the output, each with one or more patterns.

    A pattern with ``{name:int}`` makes one layer for each number that it captures, in order. Any other pattern puts
    all parameters that it matches into one layer. The learning rate is multiplied by ``decay`` once for each layer
    above, but by no less than ``min_scale``.
    """

    levels: tuple[tuple[Pattern, ...], ...]
    decay: float
    min_scale: float = 0.0

    def layer_numbers(self, names: Iterable[str]) -> LayerNumbers:
        """Return the layer number of each name in ``names``.

        ``names`` must have the frozen parameters too: without them, freezing a layer would renumber the others.
        """
        positions: dict[str, tuple[int, ...]] = {}
        for name in names:
            position = self._position(name)
            if position is not None:
                positions[name] = position
        layers = {position: layer for layer, position in enumerate(sorted(set(positions.values())))}
        return LayerNumbers(
            {name: layers[position] for name, position in positions.items()}, len(layers), tuple(_gaps(layers))
        )

    def scale(self, layer: int, count: int) -> float:
        """Return the factor for the learning rate of ``layer`` among ``count`` layers; it is 1 for the last."""
        try:
            return max(self.min_scale, self.decay ** (count - 1 - layer))
        except OverflowError:
            return math.inf

    def _position(self, name: str) -> tuple[int, ...] | None:
        """Return the level of ``name``, then the numbers that its pattern captures, or None."""
        for level, patterns in enumerate(self.levels):
            for pattern in patterns:
                match = pattern.match(name)
                if match is not None:
                    return (level, *(int(match[key]) for key, is_int in pattern.captures.items() if is_int))
        return None


def _gaps(positions: Iterable[tuple[int, ...]]) -> Iterator[str]:
    numbers_by_start: dict[tuple[int, ...], list[int]] = {}
    for position in positions:
        if len(position) > 1:
            numbers_by_start.setdefault(position[:-1], []).append(position[-1])
    for start, numbers in numbers_by_start.items():
        for number in sorted(set(range(min(numbers), max(numbers))) - set(numbers))[:8]:
            yield ".".join(map(str, (*start[1:], number)))
