"""Whether the options of live groups are numbers to train with, and are read by anybody."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import quoted
from ckptkit.param_groups.live import Group
from ckptkit.param_groups.validate.ranges import range_fault

__all__ = ["check_options", "torch_options"]

# Not read by an optimizer, and no slip either: bookkeeping of torch, of its schedulers, and of common recipes.
_TORCHS = frozenset(
    {"params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"}
)
_KNOWN = _TORCHS | {"name", "group_name", "base_lr", "lr_scale", "lr_mult", "decay_mult", "layer_id"}
# Added to the defaults, but not to the groups, when torch loads a state_dict.
_LATE = frozenset({"differentiable"})
_MEANT = {
    "learning_rate": "lr",
    "learningrate": "lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "l2": "weight_decay",
    "epsilon": "eps",
    "beta": "betas",
}


def check_options(groups: Iterable[Group]) -> Iterator[Finding]:
    """Yield a finding for each option beyond its range, unknown to the optimizer, or lost to it."""
    for group in groups:
        defaults: Mapping[str, Any] | None = getattr(group.optimizer, "defaults", None)
        for key in group.options:
            if defaults is not None and defaults.get(key, 0) is None:
                continue
            fault = range_fault(key, group.options, None if group.optimizer is None else type(group.optimizer))
            if fault is not None:
                yield Finding("groups.option-value", "error", "", f"{group.where}: {key} {fault[0]}", fault[1])
        yield from _unread(group, defaults)
        for key in defaults or ():
            if key not in group.options and key not in _LATE:
                yield Finding(
                    "groups.option-missing",
                    "error",
                    "",
                    f"{group.where} has no {quoted(key)}, which {_class(group)} reads in its step",
                    "set it in the group, or load a state_dict of the same optimizer class",
                )


def _unread(group: Group, defaults: Mapping[str, Any] | None) -> Iterator[Finding]:
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


def _class(group: Group) -> str:
    return type(group.optimizer).__name__
