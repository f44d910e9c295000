"""From a spec to the dicts that a torch optimizer takes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ckptkit.param_groups.inventory import take_inventory
from ckptkit.param_groups.plan import lay_over
from ckptkit.param_groups.spec import SpecLike, parse_spec

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["build_param_groups"]


def build_param_groups(model: Module, spec: SpecLike) -> list[dict[str, Any]]:
    """Return fresh param groups for any ``torch.optim`` class: every trainable parameter of ``model`` exactly once.

    Each dict holds ``params`` as ``(FQN, parameter)`` pairs in model order (torch keeps the names as
    ``param_names``), the group's ``name``, and the options of its rule over the defaults, copied. Frozen
    parameters are left out, a tied one goes by its first registered name. Nothing is shared between two
    calls. ``LBFGS`` takes one group only. Raises ``GroupsError`` as ``parse_spec`` and
    ``plan_param_groups`` do.
    """
    inventory = take_inventory(model)
    plan, report = lay_over(inventory, parse_spec(spec))
    report.raise_for_errors()
    live = inventory.by_name
    return [
        {
            "params": [(parameter.name, live[parameter.name].tensor) for parameter in group.parameters],
            "name": group.name,
            # Copied one group at a time: a tensor lr shared by two groups would be changed in both.
            **copy.deepcopy(dict(group.options)),
        }
        for group in plan.groups
    ]
