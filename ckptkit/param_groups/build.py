"""Build the group dicts that a torch optimizer takes from a spec."""

from __future__ import annotations

import copy
from typing import Any

from ckptkit.core.arguments import has_no_argument, require_flags
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.text import quoted
from ckptkit.core.torch_types import Module
from ckptkit.errors import GroupsError
from ckptkit.param_groups.parameters import LiveModel, read_live_model
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.plan import ParamGroupsPlan, assign
from ckptkit.param_groups.properties import live_parameter_table

__all__ = ["build_param_groups", "build_planned_groups"]

_IN_THE_SPEC = "options of groups are in the spec, such as param_group_preset('no-decay', lr=1e-3)"


@has_no_argument(lr=_IN_THE_SPEC, weight_decay=_IN_THE_SPEC)
def build_param_groups(
    model: Module, spec: SpecLike, *, optimizer: str | None = None, bare: bool = False
) -> list[dict[str, Any]]:
    """Return new param groups for a ``torch.optim`` class, with each trainable parameter of ``model`` exactly once.

    ``spec`` is the path of a TOML, JSON or YAML file, its parsed content, a list of groups, or a ``ParamGroupSpec``.

    Each dict holds ``params`` in the order of the model, their FQNs as ``param_names``, the ``name`` of the group, and
    its options. torch saves the FQNs with the state of the optimizer. A tied parameter has its first registered name.
    Frozen parameters are left out unless the spec includes them. Two calls never share an option value, such as
    an lr tensor. ``LBFGS`` accepts one group only.

    Where the spec names several optimizer classes, ``optimizer`` selects one of them. With ``bare``, the dicts hold
    neither ``param_names`` nor ``name``, for optimizers that refuse unknown keys. Parameters that the spec freezes get
    ``requires_grad=False`` here.

    Raises ``GroupsError`` as ``plan_param_groups`` does, where the spec cannot be parsed, and where ``optimizer`` is
    missing or is not in the spec.

    Example:
        >>> import torch
        >>> from fixtures.lenet import build
        >>> groups = build_param_groups(build(), "fixtures/groups.toml")
        >>> optimizer = torch.optim.SGD(groups)
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('head', 0.01), ('base', 0.001)]
    """
    require_flags(bare=bare)
    with pause_gc():
        live_model = read_live_model(model)
        assignment = assign(live_parameter_table(live_model), spec)
    assignment.report.raise_for_errors()
    return _build(live_model, assignment.plan, optimizer, bare=bare)


def build_planned_groups(model: Module, plan: ParamGroupsPlan, *, optimizer: str | None = None) -> list[dict[str, Any]]:
    """Return the groups of a plan as ``build_param_groups`` does, for the planned model or a copy of it."""
    return _build(read_live_model(model), plan, optimizer)


def _build(
    live_model: LiveModel, plan: ParamGroupsPlan, optimizer: str | None, *, bare: bool = False
) -> list[dict[str, Any]]:
    live = live_model.by_name
    known = [name for name in plan.optimizers if name is not None]
    if optimizer is not None and optimizer not in known:
        raise GroupsError(
            f"no group of the spec trains with {quoted(str(optimizer))}",
            hint=f"the spec names {', '.join(known)}" if known else f"write optimizer = {optimizer!r} into the spec",
        )
    if optimizer is None and len(plan.optimizers) > 1:
        raise GroupsError(
            f"the spec names several optimizer classes: {', '.join(known)}",
            hint=f"build the groups of one class at a time: optimizer={known[0]!r}",
        )
    for parameter in plan.freeze:
        live[parameter.name].tensor.requires_grad = False
    groups: list[dict[str, Any]] = []
    for group in plan.groups:
        if optimizer is not None and group.optimizer != optimizer:
            continue
        names = [parameter.name for parameter in group.parameters]
        tensors = [live[name].tensor for name in names]
        # Copied for each group: a scheduler would change a shared lr tensor in two groups at once.
        options = copy.deepcopy(dict(group.options))
        labels = {} if bare else {"param_names": names, "name": group.name}  # torch before 2.6 takes no pairs
        groups.append({"params": tensors, **labels, **options})
    return groups
