"""What is odd about the state of an optimizer by itself: step counts that differ, slots that are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural
from ckptkit.optimizer_state.model import OptimizerState
from ckptkit.optimizer_state.slots import number_of

__all__ = ["state_findings"]

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
