"""Find optimizers whose groups all have one lr, although a spec or a lock gives them different ones."""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.core.findings import Finding
from ckptkit.core.text import short_number
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import LiveGroups
from ckptkit.param_groups.lock import ParamGroupsLock
from ckptkit.param_groups.parameters import LiveModel, bare_name
from ckptkit.param_groups.validate.rates import flat_lr

__all__ = ["check_flat_rates"]


def check_flat_rates(
    expected: ParamGroupsLock, live_model: LiveModel, live: LiveGroups, source: str, *, has_schedulers: bool
) -> Iterator[Finding]:
    """Yield a finding for each optimizer with one lr in all groups, where ``expected`` has different lrs for them.

    ``source`` says in messages where ``expected`` is from. Groups without a parameter of ``expected`` are left out.
    With ``has_schedulers``, groups with an ``initial_lr`` are left out, because the check of schedulers uses it.
    """
    lrs = {parameter.name: group.options.get("lr") for group in expected.groups for parameter in group.parameters}
    for optimizer in live.optimizers:
        if has_schedulers and all("initial_lr" in group.options for group in optimizer.groups):
            continue
        groups, own = [], []
        for group in optimizer.groups:
            found = [live_model.parameters.get(id(member.tensor)) for member in optimizer.members_of(group)]
            names = [bare_name(parameter.name) for parameter in found if parameter is not None]
            if (name := next(filter(lrs.__contains__, names), None)) is not None:
                groups.append(group.options)
                own.append(lrs[name])
        flat = flat_lr(groups, own)
        if flat is not None:
            yield codes.SCHEDULER_FLAT.finding(
                "",
                f"all {len(groups)} groups of {optimizer.label} have lr={short_number(flat.lr)}, and {source} has lrs "
                f"from {short_number(flat.lowest)} to {short_number(flat.highest)}: their own lr is lost",
                "a script that sets the lr must multiply the base lr of each group",
            )
