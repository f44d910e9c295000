"""Two states by name: what loading one where the other is would change, and what torch would not say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.groups import describe_value, equal_values
from ckptkit.optimizer_state.model import OptimizerState, number_of, parameter_shape

__all__ = ["optimizer_state_diff", "state_findings"]


def optimizer_state_diff(saved: OptimizerState, live: OptimizerState) -> Report:
    """Return what is found where ``saved`` would be loaded by the optimizer that ``live`` is the state of.

    ``optim.groups``: torch refuses, by number or size of groups. ``optim.parameters``: one is on one side alone.
    ``optim.membership`` and ``optim.order``: torch counts positions, and would give a parameter the state of another.
    ``optim.options``: a value that loading changes; ``optim.options-lost``: one that only the live side has, which
    loading deletes. ``optim.shape``: state of another shape, found by torch at the next step. ``optim.coverage``: what
    would start anew.
    """
    return Report(tuple(_findings(saved, live)), PlanError)


def _findings(saved: OptimizerState, live: OptimizerState) -> Iterator[Finding]:
    here, there = set(live.names), set(saved.names)
    sizes = [[len(group.names) for group in state.groups] for state in (saved, live)]
    if sizes[0] != sizes[1]:
        said = f"groups of {_counts(sizes[0])} parameters were saved, and there are groups of {_counts(sizes[1])}"
        yield Finding("optim.groups", "error", "", said, "ckpt optim resplit deals them to the new groups by name")
    for names, only, hint in (
        ([name for name in live.names if name not in there], "has no saved state", "it starts anew, once it is added"),
        (
            [name for name in saved.names if name not in here],
            "was saved, and is not there",
            "ckpt optim remap or prune",
        ),
    ):
        if names:
            yield Finding("optim.parameters", "error", names[0], f"{listed(names)} {only}", hint)
    homes = [{name: at for at, group in enumerate(state.groups) for name in group.names} for state in (saved, live)]
    moved = [name for name in live.names if name in there and homes[0][name] != homes[1][name]]
    if moved:
        first = moved[0]
        said = f"{listed(moved)}: saved in group {homes[0][first]}, now in group {homes[1][first]}"
        yield Finding("optim.membership", "error", first, said, "ckpt optim resplit moves it, with its options")
    elif sizes[0] == sizes[1] and here == there and saved.names != live.names:
        pairs = zip(saved.names, live.names, strict=True)
        at, (old, new) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
        said = f"position {at} was {quoted(old)}, and is {quoted(new)}"
        yield Finding("optim.order", "error", new, said, "loaded by position, each would get the state of another")
    yield from _options(saved, live)
    for name in live.names:
        shapes = [parameter_shape(state.state.get(name, {})) for state in (saved, live)]
        if None not in shapes and shapes[0] != shapes[1]:
            said = f"the state of {quoted(name)} was saved as {list(shapes[0] or ())}, and is {list(shapes[1] or ())}"
            yield Finding("optim.shape", "error", name, said, "ckpt optim prune --like drops it, remap pads or cuts it")
    bare = [name for name in live.names if name in there and name not in saved.state]
    if bare and saved.state:
        yield Finding(
            "optim.coverage", "note", bare[0], f"{listed(bare)} saved without state", "frozen or never stepped"
        )


def _options(saved: OptimizerState, live: OptimizerState) -> Iterator[Finding]:
    before = {name: group.options for group in saved.groups for name in group.names}
    changed: dict[tuple[str, str, str], list[str]] = {}
    lost: dict[str, list[str]] = {}
    for group in live.groups:
        for name in group.names:
            for key, value in group.options.items() if name in before else ():
                if key not in before[name]:
                    lost.setdefault(key, []).append(name)
                elif not equal_values(before[name][key], value):
                    changed.setdefault((key, describe_value(value), describe_value(before[name][key])), []).append(name)
    for (key, now, then), names in changed.items():
        said = f"{key} of {listed(names)} is {now}, and loading makes it {then}"
        yield Finding(
            "optim.options", "warning", names[0], said, "torch takes the saved options: set them again afterwards"
        )
    for key, names in lost.items():
        said = f"{key} of {listed(names)} was not saved, and loading deletes it"
        yield Finding("optim.options-lost", "warning", names[0], said, "ckpt optim resplit --as keeps it")


def _counts(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:8])) + (f" and {len(sizes) - 8} more" if len(sizes) > 8 else "")


_SHOWN = 4


def state_findings(state: OptimizerState) -> Iterator[Finding]:
    """Yield what is odd: parameters without state, without a slot that the others have, and step counts that differ."""
    without = [name for name in state.names if not state.state.get(name)]
    if without and len(without) < len(state.names):
        said = f"{len(without):,} of {plural(len(state.names), 'parameter')} have no state: {listed(without)}"
        yield Finding("optim.no-state", "note", without[0], said, "frozen, or never stepped: they start anew")
    for group in state.groups:
        for matrices in (True, False):
            yield from _lacking(state, [name for name in group.names if _is_matrix(state, name) == matrices])
    steps: dict[float, list[str]] = {}
    for name, slots in state.state.items():
        step = number_of(slots.get("step"))
        if step is not None:
            steps.setdefault(step, []).append(name)
    if len(steps) > 1:
        counts = sorted(steps.items(), key=lambda pair: -len(pair[1]))
        told = "; ".join(
            f"{step:g} of {plural(len(names), 'parameter')} ({names[0]})" for step, names in counts[:_SHOWN]
        )
        hint = "unfrozen later, or edited: bias correction differs between them"
        yield Finding("optim.steps-differ", "warning", counts[-1][1][0], f"step counts differ: {told}", hint)


def _is_matrix(state: OptimizerState, name: str) -> bool:
    shapes = (getattr(value, "shape", ()) for value in state.state.get(name, {}).values())
    return max(map(len, shapes), default=0) > 1


def _lacking(state: OptimizerState, names: Sequence[str]) -> Iterator[Finding]:
    there = [name for name in names if state.state.get(name)]
    counted = Counter(slot for name in there for slot in state.state[name])
    for slot, count in counted.items():
        if len(there) > count > len(there) / 2:
            lacking = [name for name in there if slot not in state.state[name]]
            said = (
                f"{listed(lacking)} {'has' if len(lacking) == 1 else 'have'} no {slot}, as the others of the group do"
            )
            yield Finding(
                "optim.slot-missing", "error", lacking[0], said, "a step raises KeyError: ckpt optim prune --reset"
            )
