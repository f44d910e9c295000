"""How parameters are written in a rule file: a type, and the reader that turns what is written into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from ckptkit.core.text import printable, quoted
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.expressions import evaluate
from ckptkit.tensor_ops.operation import Operation

__all__ = ["Flag", "Int", "Ints", "Number", "NumberOrText", "Text", "read_parameters"]

Variables = Mapping[str, int]
_Op = TypeVar("_Op", bound=Operation)


def _int(value: object, variables: Variables) -> int:
    if isinstance(value, str):
        return evaluate(value, variables)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RuleError(f"{_shown(value)} is not an integer")
    if not -(2**63) <= value < 2**63:
        raise RuleError("an integer of more than 64 bits is no size")
    return value


def _ints(value: object, variables: Variables) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise RuleError(f"{_shown(value)} is not a list of integers")
    return tuple(_int(item, variables) for item in value)


def _number(value: object, _: Variables) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RuleError(f"{_shown(value)} is not a number")
    if isinstance(value, int) and value.bit_length() > 1000:
        raise RuleError("an integer of that many bits is no number to compute with")
    if not math.isfinite(value):
        raise RuleError(f"{value} is not a finite number")
    return value


def _text(value: object, _: Variables) -> str:
    if not isinstance(value, str):
        raise RuleError(f"{_shown(value)} is not a text")
    return value


def _number_or_text(value: object, variables: Variables) -> float | str:
    return value if isinstance(value, str) else _number(value, variables)


def _flag(value: object, _: Variables) -> bool:
    if not isinstance(value, bool):
        raise RuleError(f"{_shown(value)} is not true or false")
    return value


Int = Annotated[int, _int]
Ints = Annotated[tuple[int, ...], _ints]
Number = Annotated[float, _number]
Text = Annotated[str, _text]
NumberOrText = Annotated[float | str, _number_or_text]
Flag = Annotated[bool, _flag]


def _shown(value: object) -> str:
    return quoted(value) if isinstance(value, str) else printable(repr(value))


def read_parameters(kind: type[_Op], table: Mapping[str, object], variables: Variables) -> _Op:
    """Return the operation with these parameters; raises ``RuleError`` naming the one that is wrong or missing."""
    readers = _readers(kind)
    names = ", ".join(readers) if readers else "none"
    for name in table:
        if name not in readers:
            raise RuleError(f"{kind.name} has no parameter {quoted(str(name))}", hint=f"its parameters: {names}")
    values = {}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in table:
            try:
                values[item.name] = readers[item.name](table[item.name], variables)
            except RuleError as error:
                raise RuleError(f"{kind.name}: {item.name}: {error.reason}", hint=error.hint) from None
        elif item.default is MISSING:
            raise RuleError(f"{kind.name} needs {item.name}", hint=f"its parameters: {names}")
    return kind(**values)


def _readers(kind: type[Operation]) -> dict[str, Callable[[object, Variables], Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return {item.name: _reader(hints[item.name]) for item in fields(kind)}  # type: ignore[arg-type]


def _reader(hint: Any) -> Callable[[object, Variables], Any]:
    if hasattr(hint, "__metadata__"):
        reader: Callable[[object, Variables], Any] = hint.__metadata__[0]
        return reader
    return next(_reader(arm) for arm in get_args(hint) if arm is not type(None))
