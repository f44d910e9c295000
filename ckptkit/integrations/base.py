"""The check that the callbacks share: validate the param groups, then raise, warn, or continue the training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ckptkit.core.arguments import require_choice
from ckptkit.core.findings import Finding, Report
from ckptkit.core.findings.ignoring import IgnoreLike, parse_ignore
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.param_groups import codes
from ckptkit.param_groups.lock import LockLike, as_lock
from ckptkit.param_groups.parse import SpecLike, parse_spec
from ckptkit.param_groups.validate import validate_param_groups

__all__ = ["OnFault", "ParamGroupsCheck"]

OnFault = Literal["raise", "warn"]
# The codes of warnings about optimizer state.
_STATE_CODES = frozenset(
    code.name
    for code in (
        codes.STATE_DTYPE,
        codes.STATE_DEVICE,
        codes.STATE_INCOMPLETE,
        codes.STATE_STRAY,
        codes.STATE_STEPS,
        codes.STATE_EMPTY,
    )
)


@dataclass(frozen=True, slots=True)
class ParamGroupsCheck:
    """The settings of a callback, and its check.

    Errors stop the training, and with ``strict``, warnings stop it too. With ``on_fault="warn"``, nothing stops the
    training. ``spec`` and ``lock`` are compared with the optimizers, and ``ignore`` leaves expected findings out, as in
    ``validate_param_groups``. The file of a spec or of a lock is read here, once.
    """

    strict: bool = False
    on_fault: OnFault = "raise"
    spec: SpecLike | None = None
    lock: LockLike | None = None
    ignore: IgnoreLike = ()

    def __post_init__(self) -> None:
        """Raise ``GroupsError`` for an unknown ``on_fault``, which would let every fault pass.

        Raise ``RuleError`` for an entry of ``ignore`` that is not valid.
        """
        require_choice(self.on_fault, get_args(OnFault), "on_fault")
        parse_ignore(self.ignore)
        if isinstance(self.spec, str | os.PathLike):  # read once: the check runs in each epoch
            object.__setattr__(self, "spec", parse_spec(self.spec))
        if self.lock is not None:
            object.__setattr__(self, "lock", as_lock(self.lock))

    def run(
        self, model: Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Any], *, has_stepped: bool = False
    ) -> Report:
        """Return the report on ``optimizers``, which share ``model``; warn of findings that do not stop the training.

        With ``has_stepped``, after the first step, warnings about optimizer state are left out. Training itself causes
        these warnings, such as different step counts in a mixture of experts. Raises ``GroupsError`` as
        ``assert_param_groups`` does, unless ``on_fault`` is ``"warn"``.
        """
        groups = optimizers[0] if len(optimizers) == 1 else list(optimizers)
        report = validate_param_groups(
            model, groups, schedulers=schedulers, spec=self.spec, lock=self.lock, ignore=self.ignore
        )
        if has_stepped:
            findings = tuple(finding for finding in report.findings if not _is_state_warning(finding))
            report = replace(report, findings=findings)
        if self.on_fault == "raise":
            report.raise_for_errors(warnings=self.strict)
        if report.summary["errors"] or report.summary["warnings"]:
            warnings.warn(f"param groups: {report}", stacklevel=3)
        return report


def _is_state_warning(finding: Finding) -> bool:
    return finding.severity == "warning" and finding.code in _STATE_CODES
