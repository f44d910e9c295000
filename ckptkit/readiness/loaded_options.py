"""Find the options that load_state_dict leaves in each group, by a load into an optimizer without parameters."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.torch_types import Optimizer

__all__ = ["options_after_load"]

_PLAIN_TYPES = (bool, int, float, complex, str, type(None))


def options_after_load(optimizer: object, saved: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return the options that each group of ``optimizer`` would have after it loaded groups with the options ``saved``.

    torch replaces a live group by the saved group. The class then restores some of the options that an older file does
    not have. torch's load is made into a copy without parameters, state and hooks, so ``optimizer`` does not change. If
    the load fails, or ``optimizer`` wraps another, the result is ``saved``.

    >>> options_after_load(torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), [{"lr": 0.1}])[0]["nesterov"]
    False
    """
    import torch

    # A wrapper has the groups of another optimizer, which a load into a copy of the wrapper would change.
    if not isinstance(optimizer, torch.optim.Optimizer) or not {"param_groups", "state"} <= vars(optimizer).keys():
        return list(saved)
    groups = [
        {**{key: value if _is_plain(value) else _StandIn(value) for key, value in options.items()}, "params": []}
        for options in saved
    ]
    try:
        copied = _copy_without_parameters(optimizer)
        torch.optim.Optimizer.load_state_dict(copied, {"state": {}, "param_groups": groups})
    except Exception:  # noqa: BLE001 - __setstate__ of a class of the user may raise anything
        return list(saved)
    return [
        {key: value.value if isinstance(value, _StandIn) else value for key, value in group.items() if key != "params"}
        for group in copied.param_groups
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _StandIn:
    """A value that is not read and not copied, such as a tensor of a file."""

    value: object

    def __deepcopy__(self, memo: dict[int, Any]) -> _StandIn:
        return self


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, _PLAIN_TYPES)


def _copy_without_parameters(optimizer: Any) -> Optimizer:
    copied: Any = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        is_container = isinstance(value, dict | list | set)  # __setstate__ adds to the defaults
        vars(copied)[name] = OrderedDict() if name.endswith("_hooks") else copy.copy(value) if is_container else value
    copied.state = defaultdict(dict)
    copied.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    made: Optimizer = copied
    return made
