"""Whether the options of live groups are numbers to train with, and are read by anybody."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import quoted
from ckptkit.core.torch_optim import OPTIONS, options_of_kind, schema_of
from ckptkit.param_groups.live import LiveGroup
from ckptkit.param_groups.spec import number_fault

__all__ = ["check_options", "find_option_fault", "torch_options"]


_POSITIVE = "a finite number, 0 or more"
_BETAS = "numbers from 0 to 1, without 1: (0.9, 0.999)"
# Zero or more: for every optimizer, and for those of torch alone, where others may mean something else.
_EVERYWHERE = ("lr", "weight_decay")
_ZERO_OR_MORE = ("momentum", "lr_decay", "initial_accumulator_value", "momentum_decay")


def find_option_fault(key: str, options: Mapping[str, Any], kind: type | None) -> tuple[str, str] | None:
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


# Not read by an optimizer, and no slip either: bookkeeping of torch, of its schedulers, and of common recipes.
_KNOWN = options_of_kind("members", "name", "recipe", "schedule")
_IN_DEFAULTS_ONLY = frozenset(option.name for option in OPTIONS.values() if option.is_in_defaults_only)
_MEANT = {
    "learning_rate": "lr",
    "learningrate": "lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "l2": "weight_decay",
    "epsilon": "eps",
    "beta": "betas",
}


def check_options(groups: Iterable[LiveGroup]) -> Iterator[Finding]:
    """Yield a finding for each option beyond its range, unknown to the optimizer, or lost to it."""
    for group in groups:
        defaults: Mapping[str, Any] | None = getattr(group.optimizer, "defaults", None)
        for key in group.options:
            if defaults is not None and defaults.get(key, 0) is None:
                continue
            fault = find_option_fault(key, group.options, None if group.optimizer is None else type(group.optimizer))
            if fault is not None:
                yield Finding("groups.option-value", "error", "", f"{group.where}: {key} {fault[0]}", fault[1])
        yield from _unread(group, defaults)
        for key in defaults or ():
            if key not in group.options and key not in _IN_DEFAULTS_ONLY:
                yield Finding(
                    "groups.option-missing",
                    "error",
                    "",
                    f"{group.where} has no {quoted(key)}, which {_class(group)} reads in its step",
                    "set it in the group, or load a state_dict of the same optimizer class",
                )


def _unread(group: LiveGroup, defaults: Mapping[str, Any] | None) -> Iterator[Finding]:
    # Without an optimizer any may follow; what none of torch's reads is worth a word, as nobody else will say it.
    read = defaults if defaults is not None else torch_options() if group.optimizer is None else None
    told = group.optimizer is None or type(group.optimizer).__module__.startswith("torch.optim")
    for key in group.options:
        if key in _KNOWN or (read is not None and key in read) or (key == "use_muon" and group.optimizer is None):
            continue
        meant = _MEANT.get(str(key).lower())
        near: str | None = meant
        if read is not None and meant not in read:
            near = next(iter(difflib.get_close_matches(str(key), read, n=1, cutoff=0.7)), None)
        # Other people's optimizers keep counters of their own in a group; only a near miss is worth a word there.
        if near is not None or told:
            reader = "torch.optim" if defaults is None else _class(group)
            yield Finding(
                "groups.option-unread",
                "warning",
                "",
                f"{group.where}: {quoted(str(key))} is not read by {reader}",
                f"did you mean {quoted(near)}?" if near is not None else "remove it, or correct its name",
            )


@functools.cache
def torch_options() -> tuple[str, ...]:
    """Return every option that a class of torch.optim takes."""
    import torch

    classes = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    options = [key for kind in classes if issubclass(kind, torch.optim.Optimizer) for key in _parameters(kind)]
    return tuple(sorted(set(options) - {"self", "params", "defaults"}))


def _parameters(kind: type) -> Iterable[str]:
    return inspect.signature(kind.__init__).parameters  # type: ignore[misc]


def _class(group: LiveGroup) -> str:
    return type(group.optimizer).__name__
