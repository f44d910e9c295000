"""Check that the options of live groups are in range and that the optimizer reads them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from ckptkit.core.findings import Finding
from ckptkit.core.text import nearest, quoted, short_number
from ckptkit.core.torch_bridge import get_or_none
from ckptkit.core.torch_optim import OPTIONS, OptimizerSchema, is_set, options_of_kind, schema_of, torch_options
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import LiveGroup
from ckptkit.param_groups.spec.fields import number_fault

__all__ = [
    "BOOKKEEPING",
    "OptionFault",
    "check_options",
    "find_option_fault",
    "intended_option",
    "is_read_by",
    "read_number",
]


class OptionFault(NamedTuple):
    """The fault of an option, as the end of a sentence, and a hint with the values that the option accepts."""

    problem: str
    hint: str


_ZERO_OR_MORE = "it must be a finite number, 0 or more"
_BETAS = "they must be numbers from 0 to 1, without 1: (0.9, 0.999)"
# Numbers of 0 or more: the first for every optimizer, the second for classes of torch.optim only.
_NUMBERS_OF_ALL = ("lr", "weight_decay")
_FLAGS = frozenset(
    {
        *("amsgrad", "capturable", "centered", "decoupled_weight_decay", "differentiable", "foreach", "fused"),
        *("maximize", "nesterov"),
    }
)
_NUMBERS_OF_TORCH = ("momentum", "lr_decay", "initial_accumulator_value", "momentum_decay")


def find_option_fault(key: str, options: Mapping[str, object], kind: type | None) -> OptionFault | None:
    """Return the fault of the option ``key`` of a group, or None; ``kind`` is the class of the optimizer.

    Without a class, only the options that have the same meaning in all of torch.optim are checked.
    """
    value = options[key]
    schema = None if kind is None else schema_of(kind)
    if key in _FLAGS and not _has_truth(value):
        return OptionFault(f"is a {type(value).__name__} that is neither true nor false", "it must be True or False")
    if key in _NUMBERS_OF_ALL:
        return _fault(number_fault(value), _ZERO_OR_MORE)
    if kind is not None and schema is None:
        return None
    if key == "betas":
        return _fault(_betas_fault(value, None if schema is None else 2), _BETAS)
    if key in _NUMBERS_OF_TORCH or (key == "alpha" and schema is not None and schema.name == "RMSprop"):
        return _fault(number_fault(value), _ZERO_OR_MORE)
    if key == "eps":
        return _eps_fault(value, schema)
    return None if schema is None else _class_fault(key, options, schema)


def _has_truth(value: object) -> bool:
    try:
        bool(value)
    except Exception:  # noqa: BLE001 - the value may be of any class
        return False
    return True


def _fault(problem: str | None, hint: str) -> OptionFault | None:
    return None if problem is None else OptionFault(problem, hint)


def _eps_fault(value: object, schema: OptimizerSchema | None) -> OptionFault | None:
    if schema is not None and schema.name == "Adafactor":
        return _fault(_two_eps_fault(value), "it must be a pair of numbers, 0 or more; the first can be None")
    if schema is None and isinstance(value, Sequence | None):
        return None
    return _fault(number_fault(value), _ZERO_OR_MORE)


def _class_fault(key: str, options: Mapping[str, object], schema: OptimizerSchema) -> OptionFault | None:
    """Return the fault of an option that only one class of torch.optim has, or None."""
    value = options[key]
    if key == "rho":
        return _fault(_range_fault(value, 0, 1), "it must be a number from 0 to 1")
    if key == "etas":
        return _fault(_etas_fault(value), "they must be one number below 1 and one above: (0.5, 1.2)")
    if schema.name == "Adafactor" and key == "beta2_decay":
        return _fault(_range_fault(value, -math.inf, 0), "it must be a number of 0 or less")
    if schema.name == "Adafactor" and key == "d":
        return _fault(_range_fault(value, 1, math.inf), "it must be a number of 1 or more")
    needs_momentum = not is_set(options, "momentum") or is_set(options, "dampening")
    if schema.name == "SGD" and key == "nesterov" and value and needs_momentum:
        return OptionFault("needs momentum, and no dampening", "set momentum = 0.9 and dampening = 0")
    return None


def _range_fault(value: Any, low: float, high: float) -> str | None:
    if (fault := number_fault(value, signed=True)) is not None:
        return fault
    return None if low <= float(value) <= high else f"is {short_number(float(value))}"


def _betas_fault(value: object, count: int | None) -> str | None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return f"is a {type(value).__name__}, not a pair of numbers"
    if count is not None and len(value) != count:
        return f"has {len(value)} numbers, not {count}"
    for index, beta in enumerate(value):
        if (fault := number_fault(beta)) is not None:
            return f"[{index}] {fault}"
        if float(beta) >= 1:
            return f"[{index}] is {short_number(float(beta))}"
    return None


def _two_eps_fault(value: object) -> str | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        return f"is a {type(value).__name__}, not a pair"
    faults = (number_fault(eps) for eps in value if eps is not None)
    return next(filter(None, faults), None) or ("[1] is None" if value[1] is None else None)


def _etas_fault(value: object) -> str | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        return f"is a {type(value).__name__}, not a pair"
    low, high = map(read_number, value)
    return None if low is not None and high is not None and 0 < low < 1 < high else f"is {tuple(value)}"


def read_number(value: Any) -> float | None:
    """Return ``value`` as a float if it is a finite number of 0 or more, or None."""
    if value is None or number_fault(value) is not None or getattr(value, "is_meta", False):
        return None
    return float(value)


# No optimizer reads these, and this is right: torch, its schedulers and common recipes store them in groups.
BOOKKEEPING = options_of_kind("members", "name", "recipe", "schedule")
_IN_DEFAULTS_ONLY = frozenset(option.name for option in OPTIONS.values() if option.is_in_defaults_only)
_INTENDED = {
    "learning_rate": "lr",
    "learningrate": "lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "l2": "weight_decay",
    "epsilon": "eps",
    "beta": "betas",
}


def check_options(groups: Iterable[LiveGroup]) -> Iterator[Finding]:
    """Yield a finding for each option that is out of range, that nothing reads, or that is missing."""
    for group in groups:
        found = get_or_none(group.optimizer, "defaults")
        defaults: Mapping[str, object] | None = found if isinstance(found, Mapping) else None
        for key in group.options:
            if defaults is not None and defaults.get(key, 0) is None and key not in _FLAGS:
                continue
            fault = find_option_fault(key, group.options, None if group.optimizer is None else type(group.optimizer))
            if fault is not None:
                yield codes.OPTION_VALUE.finding("", f"{group.where}: {key} {fault.problem}", fault.hint)
        yield from _unread_options(group, defaults)
        for key in defaults or ():
            if key not in group.options and key not in _IN_DEFAULTS_ONLY:
                yield codes.OPTION_MISSING.finding(
                    "",
                    f"{group.where} has no {quoted(key)}, which {_class_name(group)} reads in its step",
                    "set it in the group, or load a state_dict of the same optimizer class",
                )


def _unread_options(group: LiveGroup, defaults: Mapping[str, object] | None) -> Iterator[Finding]:
    # A group without an optimizer may go to any class. An option that no class of torch reads is reported all the
    # same, because nothing else will report it.
    read_options = defaults if defaults is not None else torch_options() if group.optimizer is None else None
    is_torch = group.optimizer is None or type(group.optimizer).__module__.startswith("torch.optim")
    for key in group.options:
        if key in BOOKKEEPING or (read_options is not None and key in read_options):
            continue
        if key == "use_muon" and group.optimizer is None:
            continue
        intended = intended_option(key, read_options)
        # Optimizers from other packages keep counters of their own in a group, so only a likely typo is reported.
        if is_torch or (intended is not None and str(key) not in _strings_in_methods(group.optimizer)):
            reader = "torch.optim" if defaults is None else _class_name(group)
            yield codes.OPTION_UNREAD.finding(
                "",
                f"{group.where}: {quoted(str(key))} is not read by {reader}",
                f"did you mean {quoted(intended)}?" if intended is not None else "remove it, or correct its name",
            )


def _strings_in_methods(optimizer: object) -> frozenset[str]:
    """Return the strings in the methods of a class and of its bases outside torch: among them the options they use."""
    kind = type(optimizer)
    found: set[str] = set()
    pending: list[object] = [
        inspect.unwrap(getattr(method, "__func__", method))
        for base in kind.__mro__
        if base is not object and not base.__module__.startswith("torch.")
        for method in vars(base).values()
        if callable(method) or hasattr(method, "__func__")
    ]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            found.add(item)
        elif isinstance(item, tuple | frozenset):
            pending += item
        else:
            code = getattr(item, "__code__", item)
            pending += getattr(code, "co_consts", ())
    return frozenset(found)


def _class_name(group: LiveGroup) -> str:
    return type(group.optimizer).__name__


def intended_option(key: object, read_options: Collection[str] | None) -> str | None:
    """Return the option that was probably wanted where ``key`` was written, or None; ``read_options`` exist."""
    lower = str(key).lower()
    intended = _INTENDED.get(lower, lower if read_options is not None and lower in read_options else None)
    if read_options is None or (intended is not None and intended in read_options):
        return intended
    return nearest(str(key), read_options, cutoff=0.7)


def is_read_by(kind: type, key: str) -> bool:
    """Return whether the optimizer class ``kind``, a scheduler or a common recipe may read ``key`` in a group.

    The steps of torch read the options of its constructors only. Another class may read any key that is a string in its
    own code, or in a function that it calls. A class without Python code may read any key.
    """
    if key in BOOKKEEPING or key == "lr":  # schedulers read and write the lr of every class
        return True
    owners = [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.optim")]
    functions = [function for base in owners for value in vars(base).values() if (function := _function(value))]
    has_own_step = any("step" in vars(base) for base in owners)
    return (has_own_step and not functions) or key in _strings_of_functions(functions)


def _function(value: object) -> FunctionType | None:
    inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    inner = inspect.unwrap(inner) if isinstance(inner, FunctionType) else None
    return inner if isinstance(inner, FunctionType) else None


def _strings_of_functions(functions: Sequence[FunctionType]) -> set[str]:
    """Return the strings in the code of functions, and of the functions of their modules that they name."""
    found: set[str] = set()
    waiting, seen = list(functions), {id(function.__code__) for function in functions}
    while waiting:
        function = waiting.pop()
        for code in _codes_in(function.__code__):
            for constant in code.co_consts:
                values = constant if isinstance(constant, tuple) else (constant,)
                found.update(value for value in values if isinstance(value, str))
            for name in code.co_names:
                named = _function(function.__globals__.get(name))
                is_of_torch = named is None or named.__module__.partition(".")[0] == "torch"
                if named is not None and not is_of_torch and id(named.__code__) not in seen:
                    seen.add(id(named.__code__))
                    waiting.append(named)
    return found


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object, and the code objects of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)
