"""What every callback does at its moment: prove the groups, then raise, warn or let the training go on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ckptkit.errors import GroupsError
from ckptkit.findings import Report
from ckptkit.param_groups import validate_param_groups
from ckptkit.text import quoted

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

__all__ = ["Gate", "OnFault"]

OnFault = Literal["raise", "warn"]


@dataclass(frozen=True, slots=True)
class Gate:
    """What stops the training: errors, with ``strict`` warnings too, or with ``on_fault="warn"`` nothing."""

    strict: bool = False
    on_fault: OnFault = "raise"

    def __post_init__(self) -> None:
        """Refuse a choice that is none: it would wave everything through."""
        if self.on_fault not in {"raise", "warn"}:
            raise GroupsError(
                f"on_fault is {quoted(str(self.on_fault))}, which is no choice", hint='on_fault is "raise" or "warn"'
            )

    def check(self, model: Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> Report:
        """Return the report on ``optimizers``, which share ``model``; what does not stop the training is a warning.

        Raises ``GroupsError`` as ``assert_param_groups`` does, unless the choice is to warn.
        """
        groups = optimizers[0] if len(optimizers) == 1 else list(optimizers)
        report = validate_param_groups(model, groups, schedulers=schedulers)
        if self.on_fault == "raise":
            report.raise_for_errors(warnings=self.strict)
        if report.summary["errors"] or report.summary["warnings"]:
            warnings.warn(f"param groups: {report}", stacklevel=3)
        return report
