"""A callback for transformers that checks param groups: ``Trainer(..., callbacks=[ParamGroupsCallback()])``."""

from __future__ import annotations

from typing import Any

from ckptkit.core.findings.ignoring import IgnoreLike
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.integrations.base import OnFault, ParamGroupsCheck
from ckptkit.param_groups.lock import LockLike
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
    """Stops ``Trainer.train()`` before the first step where the optimizer does not train the parameters of the model.

    The check runs when training begins, after a resumed checkpoint was loaded. It runs again at the start of each later
    epoch, because a parameter that was unfrozen needs a group. The two groups that the Trainer makes pass the check.

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

    def on_train_begin(
        self,
        args: object,
        state: object,
        control: object,
        *,
        model: Module,
        optimizer: Optimizer,
        lr_scheduler: object = None,
        **others: object,
    ) -> None:
        """Check before the first step."""
        self._run(model, optimizer, lr_scheduler)

    def on_epoch_begin(
        self,
        args: object,
        state: Any,
        control: object,
        *,
        model: Module,
        optimizer: Optimizer,
        lr_scheduler: object = None,
        **others: object,
    ) -> None:
        """Check at the start of each epoch but the first."""
        if state.epoch:
            self._run(model, optimizer, lr_scheduler, has_stepped=True)

    def _run(self, model: Module, optimizer: Optimizer, scheduler: object, *, has_stepped: bool = False) -> None:
        schedulers = [] if scheduler is None else [scheduler]
        self._check.run(model, [optimizer], schedulers, has_stepped=has_stepped)
