"""From a spec to the dicts that a torch optimizer takes."""

from __future__ import annotations

import copy
from typing import Any

from ckptkit.core.gc_pause import without_collection
from ckptkit.core.text import quoted
from ckptkit.core.torch_types import Module
from ckptkit.errors import GroupsError
from ckptkit.param_groups.parameters import take_inventory
from ckptkit.param_groups.parse import SpecLike, parse_spec
from ckptkit.param_groups.plan import lay_over
from ckptkit.param_groups.properties import subject_of_model

__all__ = ["build_param_groups"]


def build_param_groups(
    model: Module, spec: SpecLike, *, optimizer: str | None = None, bare: bool = False
) -> list[dict[str, Any]]:
    """Return fresh param groups for any ``torch.optim`` class: every trainable parameter of ``model`` exactly once.

    Each dict holds ``params`` as ``(FQN, parameter)`` pairs in model order (torch keeps the names as
    ``param_names``), the group's ``name``, and the options of its rule and modifiers over the defaults, copied.
    Frozen parameters are left out unless the spec includes them, a tied one goes by its first registered name.
    Nothing is shared between two calls. ``LBFGS`` takes one group only.

    Where the spec names several optimizer classes, ``optimizer`` says whose groups are wanted. ``bare`` gives plain
    parameters and no ``name``, for optimizers that refuse what they do not know. What the spec freezes gets
    ``requires_grad=False`` here. Raises ``GroupsError`` as ``parse_spec`` and ``plan_param_groups`` do.
    """
    with without_collection():
        inventory = take_inventory(model)
        plan, report = lay_over(subject_of_model(inventory), parse_spec(spec))
    report.raise_for_errors()
    known = [name for name in plan.optimizers if name is not None]
    if optimizer is not None and optimizer not in known:
        raise GroupsError(
            f"no group of the spec trains with {quoted(str(optimizer))}",
            hint=f"the spec names {', '.join(known)}" if known else f"write optimizer = {optimizer!r} into the spec",
        )
    if optimizer is None and len(plan.optimizers) > 1:
        raise GroupsError(
            f"the groups train with several optimizers: {', '.join(known)}",
            hint=f"ask for the groups of one at a time: optimizer={known[0]!r}",
        )
    live = inventory.by_name
    for parameter in plan.freeze:
        live[parameter.name].tensor.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    for group in plan.groups:
        if optimizer is not None and group.optimizer != optimizer:
            continue
        pairs = [(parameter.name, live[parameter.name].tensor) for parameter in group.parameters]
        # Copied one group at a time: a tensor lr shared by two groups would be changed in both.
        options = copy.deepcopy(dict(group.options))
        if bare:
            groups.append({"params": [tensor for _, tensor in pairs], **options})
        else:
            groups.append({"params": pairs, "name": group.name, **options})
    return groups
