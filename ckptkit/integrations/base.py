"""What every callback does at its moment: prove the groups, then raise, warn or let the training go on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ckptkit.core.findings import Report
from ckptkit.core.text import quoted
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.errors import GroupsError
from ckptkit.param_groups.lock import ParamGroupsLock
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.validate import validate_param_groups

__all__ = ["OnFault", "ParamGroupsCheck"]

OnFault = Literal["raise", "warn"]
_STATE = "groups.state-"


@dataclass(frozen=True, slots=True)
class ParamGroupsCheck:
    """What stops the training: errors, with ``strict`` warnings too, or with ``on_fault="warn"`` nothing.

    ``spec`` and ``lock`` are held against the optimizers, as by ``validate_param_groups``.
    """

    strict: bool = False
    on_fault: OnFault = "raise"
    spec: SpecLike | None = None
    lock: ParamGroupsLock | None = None

    def __post_init__(self) -> None:
        """Refuse a choice that is none: it would wave everything through."""
        if self.on_fault not in {"raise", "warn"}:
            raise GroupsError(
                f"on_fault is {quoted(str(self.on_fault))}, which is no choice", hint='on_fault is "raise" or "warn"'
            )

    def check(
        self, model: Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Any], *, running: bool = False
    ) -> Report:
        """Return the report on ``optimizers``, which share ``model``; what does not stop the training is a warning.

        Where it is ``running``, what is only a warning of the state is left out: steps that differ, as of experts, come
        of the training itself.
        Raises ``GroupsError`` as ``assert_param_groups`` does, unless the choice is to warn.
        """
        groups = optimizers[0] if len(optimizers) == 1 else list(optimizers)
        report = validate_param_groups(model, groups, schedulers=schedulers, spec=self.spec, lock=self.lock)
        if running:
            told = (one for one in report.findings if one.severity != "warning" or not one.code.startswith(_STATE))
            report = replace(report, findings=tuple(told))
        if self.on_fault == "raise":
            report.raise_for_errors(warnings=self.strict)
        if report.summary["errors"] or report.summary["warnings"]:
            warnings.warn(f"param groups: {report}", stacklevel=3)
        return report
