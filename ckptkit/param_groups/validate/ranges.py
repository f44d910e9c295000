"""In which range each option of torch.optim lies: torch asks that of the defaults, and never of a group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ckptkit.core.torch_optim import schema_of
from ckptkit.param_groups.spec import number_fault

__all__ = ["range_fault"]

_POSITIVE = "a finite number, 0 or more"
_BETAS = "numbers from 0 to 1, without 1: (0.9, 0.999)"
# Zero or more: for every optimizer, and for those of torch alone, where others may mean something else.
_EVERYWHERE = ("lr", "weight_decay")
_ZERO_OR_MORE = ("momentum", "lr_decay", "initial_accumulator_value", "momentum_decay")


def range_fault(key: str, options: Mapping[str, Any], kind: type | None) -> tuple[str, str] | None:
    """Return what is wrong with the option ``key`` of a group of a ``kind`` of optimizer, and what it takes; or None.

    Without a kind only what means the same to all of torch.optim is looked at.
    """
    value = options[key]
    schema = None if kind is None else schema_of(kind)
    if key in _EVERYWHERE:
        return _with(number_fault(value), _POSITIVE)
    if kind is not None and schema is None:
        return None
    if key == "betas":
        return _with(_betas(value, None if schema is None else 2), _BETAS)
    if key in _ZERO_OR_MORE or (key == "alpha" and schema is not None and schema.name == "RMSprop"):
        return _with(number_fault(value), _POSITIVE)
    if key == "eps":
        if schema is not None and schema.name == "Adafactor":
            return _with(_two_eps(value), "None or 0 or more, and 0 or more: (None, 1e-3)")
        return None if schema is None and isinstance(value, Sequence | None) else _with(number_fault(value), _POSITIVE)
    if schema is None:
        return None
    if key == "rho":
        return _with(_between(value, 0, 1), "a number from 0 to 1")
    if key == "etas":
        return _with(_etas(value), "one number below 1 and one above: (0.5, 1.2)")
    if schema.name == "Adafactor" and key in {"beta2_decay", "d"}:
        low, high = (-math.inf, 0) if key == "beta2_decay" else (1, math.inf)
        return _with(_between(value, low, high), "0 or less" if key == "beta2_decay" else "1 or more")
    if key == "nesterov" and schema.name == "SGD" and value:
        lacks = not options.get("momentum") or options.get("dampening")
        return ("needs momentum, and no dampening", "set momentum = 0.9 and dampening = 0") if lacks else None
    return None


def _with(fault: str | None, range_: str) -> tuple[str, str] | None:
    return None if fault is None else (fault, range_)


def _number(value: Any) -> float | None:
    """Return the number, below zero or not, or None where it is none that is finite."""
    fault = number_fault(value)
    return float(value) if fault is None or fault.startswith("is negative") else None


def _between(value: Any, low: float, high: float) -> str | None:
    number = _number(value)
    if number is None:
        return number_fault(value)
    return None if low <= number <= high else f"is {number:g}"


def _betas(value: Any, count: int | None) -> str | None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return f"is a {type(value).__name__}, not a pair of numbers"
    if count is not None and len(value) != count:
        return f"has {len(value)} numbers, not {count}"
    for index, one in enumerate(value):
        if (fault := number_fault(one)) is not None:
            return f"[{index}] {fault}"
        if float(one) >= 1:
            return f"[{index}] is {float(one):g}"
    return None


def _two_eps(value: Any) -> str | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        return f"is a {type(value).__name__}, not a pair"
    return next((fault for one in value if one is not None and (fault := number_fault(one))), None) or (
        "[1] is None" if value[1] is None else None
    )


def _etas(value: Any) -> str | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        return f"is a {type(value).__name__}, not a pair"
    low, high = map(_number, value)
    return None if low is not None and high is not None and 0 < low < 1 < high else f"is {tuple(value)}"
