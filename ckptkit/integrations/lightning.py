"""A callback for Lightning that checks param groups: ``Trainer(callbacks=[ParamGroupsCallback()])``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from ckptkit.core.findings.ignoring import IgnoreLike
from ckptkit.core.torch_types import Module
from ckptkit.integrations.base import OnFault, ParamGroupsCheck
from ckptkit.param_groups.lock import LockLike
from ckptkit.param_groups.parse import SpecLike

__all__ = ["ParamGroupsCallback"]


def _lightning_callback() -> Any:
    """Return the ``Callback`` class of the Lightning package that the script imported, or of the installed one."""
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


_Callback: Any = _lightning_callback()


class ParamGroupsCallback(_Callback):
    """Stops ``Trainer.fit()`` before the first step where the optimizers do not train the parameters of the module.

    The check runs before the first batch of each epoch. By then, ``configure_optimizers`` was called, a resumed
    checkpoint was loaded, and other callbacks have unfrozen parameters. Several optimizers are checked together.

    - ``strict``: warnings raise ``GroupsError`` too, not only errors.
    - ``on_fault="warn"``: errors and warnings are reported by ``warnings.warn``, and nothing is raised.
    - ``spec``, ``lock``: the groups must agree with them, as for ``validate_param_groups``; paths are read at once.
    - ``ignore``: expected findings to leave out, such as ``["groups.state-steps", "groups.decay:*.norm.*"]``.
    """

    def __init__(
        self,
        *,
        strict: bool = False,
        on_fault: OnFault = "raise",
        spec: SpecLike | None = None,
        lock: LockLike | None = None,
        ignore: IgnoreLike = (),
    ) -> None:
        """Store the settings.

        Raises ``GroupsError`` for an unknown ``on_fault``, and ``RuleError`` for an unknown code in ``ignore``.
        """
        self._check = ParamGroupsCheck(strict, on_fault, spec, lock, ignore)
        self._checked_epoch: int | None = None

    def on_train_start(self, trainer: object, pl_module: object) -> None:
        """Forget the last run: one callback can serve several runs."""
        self._checked_epoch = None

    def on_train_batch_start(self, trainer: Any, pl_module: Module, batch: object, batch_idx: int) -> None:
        """Check once in each epoch: the first batch can have any index after a resume."""
        if self._checked_epoch != trainer.current_epoch:
            has_stepped, self._checked_epoch = self._checked_epoch is not None, trainer.current_epoch
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._check.run(pl_module, trainer.optimizers, schedulers, has_stepped=has_stepped)
