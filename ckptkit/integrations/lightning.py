"""The gate in Lightning: ``Trainer(callbacks=[ParamGroupsCallback()])``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from ckptkit.integrations.base import OnFault, ParamGroupsCheck
from ckptkit.param_groups.lock import ParamGroupsLock
from ckptkit.param_groups.parse import SpecLike

__all__ = ["ParamGroupsCallback"]


def _base() -> Any:
    """Return Lightning's ``Callback`` under the name that the script imported, or else the one that is installed."""
    names = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    for name in names:
        try:
            return import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in {name, name.partition(".")[0]}:
                raise
    raise ModuleNotFoundError(
        f"{__name__} needs lightning or pytorch_lightning, and neither is installed (pip install lightning)",
        name="lightning",
    )


_Callback: Any = _base()


class ParamGroupsCallback(_Callback):
    """Lets ``Trainer.fit()`` take its first step only where the optimizers train what the module has.

    Looks before the first batch of each epoch: all of ``configure_optimizers`` and of a resumed checkpoint is there by
    then, and so is what other callbacks unfroze. Errors raise ``GroupsError``, with ``strict`` warnings too; with
    ``on_fault="warn"`` everything is only warned of. Several optimizers are taken together.
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
        self._checked: int | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew: a callback may serve several runs."""
        self._checked = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check once an epoch, whichever batch it begins with."""
        if self._checked != trainer.current_epoch:
            running, self._checked = self._checked is not None, trainer.current_epoch
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._groups_check.check(pl_module, trainer.optimizers, schedulers, running=running)
