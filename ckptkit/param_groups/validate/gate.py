"""The proof as a gate of a training script: past it, the groups train what the model has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ckptkit.core.findings import Report
from ckptkit.param_groups.lock import ParamGroupsLock
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.validate import validate_param_groups

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

__all__ = ["assert_param_groups"]


def assert_param_groups(
    model: Module,
    groups: Optimizer | Iterable[Any],
    *,
    schedulers: Any = None,
    spec: SpecLike | None = None,
    lock: ParamGroupsLock | None = None,
    strict: bool = False,
) -> Report:
    """Return the report of ``validate_param_groups`` where nothing is wrong; raise where something is.

    ``GroupsError`` names the first fault and says how many more there are: errors, and with ``strict`` warnings too.
    """
    report = validate_param_groups(model, groups, schedulers=schedulers, spec=spec, lock=lock)
    report.raise_for_errors(warnings=strict)
    return report
