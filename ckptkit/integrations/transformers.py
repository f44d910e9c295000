"""The gate in transformers: ``Trainer(..., callbacks=[ParamGroupsCallback()])``."""

from __future__ import annotations

from typing import Any

from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.integrations.base import OnFault, ParamGroupsCheck
from ckptkit.param_groups.lock import ParamGroupsLock
from ckptkit.param_groups.parse import SpecLike

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        f"{__name__} needs transformers, which is not installed (pip install transformers)", name=error.name
    ) from None

__all__ = ["ParamGroupsCallback"]


class ParamGroupsCallback(TrainerCallback):
    """Lets ``Trainer.train()`` take its first step only where its optimizer trains what the model has.

    Looks when training begins, after a checkpoint was resumed, and again at the start of each epoch, since
    what was unfrozen meanwhile needs a group. Errors raise ``GroupsError``, with ``strict`` warnings too; with
    ``on_fault="warn"`` everything is only warned of. The Trainer's own decay groups pass.
    """

    def __init__(
        self,
        *,
        strict: bool = False,
        on_fault: OnFault = "raise",
        spec: SpecLike | None = None,
        lock: ParamGroupsLock | None = None,
    ) -> None:
        """Take the choices of the gate."""
        self._groups_check = ParamGroupsCheck(strict, on_fault, spec, lock)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: Module,
        optimizer: Optimizer,
        lr_scheduler: Any = None,
        **others: Any,
    ) -> None:
        """Check before the first step."""
        self._check(model, optimizer, lr_scheduler)

    def on_epoch_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: Module,
        optimizer: Optimizer,
        lr_scheduler: Any = None,
        **others: Any,
    ) -> None:
        """Check each later epoch."""
        if state.epoch:
            self._check(model, optimizer, lr_scheduler, running=True)

    def _check(self, model: Module, optimizer: Optimizer, scheduler: Any, *, running: bool = False) -> None:
        self._groups_check.check(model, [optimizer], [] if scheduler is None else [scheduler], running=running)
