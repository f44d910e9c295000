"""Live groups held against the spec that they should come from: who is in another group, and what trains otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import quoted
from ckptkit.param_groups.compare import driven_options, find_heirs
from ckptkit.param_groups.live import read_groups
from ckptkit.param_groups.lock import LockedGroup, lock_optimizer, lock_plan
from ckptkit.param_groups.parameters import bare_name
from ckptkit.param_groups.parse import SpecLike, parse_spec
from ckptkit.param_groups.plan import lay_over
from ckptkit.param_groups.properties import subject_of

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["check_agreement"]

_AGAIN = "build the groups from the spec again (build_param_groups), and carry the state over by name"


def check_agreement(model: Module, groups: Any, spec: SpecLike) -> Iterator[Finding]:
    """Yield what is wrong with ``spec``, and where ``groups`` differ from what it makes of ``model``.

    A learning rate is the one before schedulers moved it, where they recorded that.
    """
    plan, report = lay_over(subject_of(model), parse_spec(spec))
    yield from report.findings
    if not report.ok:
        return
    expected, found = lock_plan(plan), lock_optimizer(model, groups)
    where, heirs = find_heirs(expected, found)
    live = [group.options for group in read_groups(groups)[0]]
    for number, group in enumerate(expected.groups):
        heir = heirs.get(number)
        for one in group.parameters:
            now = where.get(one.name)
            if now is not None and now != heir:
                yield Finding(
                    "groups.moved",
                    "error",
                    one.name,
                    f"the live group of {quoted(one.name)} {one.shape} is {_called(found.groups, now)}, and the "
                    f"spec says {quoted(group.name)}",
                    _AGAIN,
                )
        if heir is not None:
            yield from _options(group, found.groups[heir], _called(found.groups, heir), live[heir])
    trainable = {bare_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for one in expected.outside:
        if one.name in where and one.name in trainable:  # of a frozen one it is said without a spec
            yield Finding(
                "groups.moved",
                "error",
                one.name,
                f"{quoted(one.name)} {one.shape} is in {_called(found.groups, where[one.name])}, and the spec "
                "freezes it",
                _AGAIN,
            )


def _options(group: LockedGroup, now: LockedGroup, where: str, live: Mapping[str, Any]) -> Iterator[Finding]:
    driven = driven_options(live)
    wrong = [
        (f"{key}={now.options[key]!r}" if key in now.options else f"no {key}", f"{key}={value!r}")
        for key, value in group.options.items()
        if key not in driven and (key not in now.options or now.options[key] != value)
    ]
    if group.optimizer and now.optimizer and group.optimizer != now.optimizer:
        wrong.insert(0, (now.optimizer, group.optimizer))
    if wrong:
        has, says = (", ".join(side) for side in zip(*wrong, strict=True))
        yield Finding(
            "groups.options",
            "error",
            group.name,
            f"{where} trains with {has}, and the spec says {says}",
            "build the groups from the spec again; load_state_dict() puts the options of the file in their place",
        )


def _called(groups: tuple[LockedGroup, ...], number: int) -> str:
    name = groups[number].name
    return name if name == f"group {number}" else f"group {number} ({quoted(name)})"
