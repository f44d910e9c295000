"""Compare the values of two optimizer states, slot by slot, with the one comparer of values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ckptkit.comparison.values import ValueDifference, compare_named
from ckptkit.core.checkpoint import Access, Checkpoint, Description
from ckptkit.core.progress import Progress
from ckptkit.optimizer_state.model import LazyTensor, OptimizerState, SlotValue, same_value, tensors_in
from ckptkit.rules.model import KeyMap

__all__ = ["SlotValues", "StateValues", "compare_states"]


@dataclass(slots=True)
class SlotValues:
    """How one slot differs: the parameters with other values, the largest relative change, and what is not compared.

    ``worst`` is the tensor that differs most, of the parameter ``worst_name``; None where no tensor differs. ``saved``
    and ``live`` are the parameters with state on both sides whose slot only this side has. ``skipped`` has the reason
    why the tensor of a parameter was not compared.
    """

    changed: dict[str, None] = field(default_factory=dict)
    worst: ValueDifference | None = None
    worst_name: str = ""
    saved: list[str] = field(default_factory=list)
    live: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StateValues:
    """The slots that differ, in their order, and the number of tensors that were compared.

    ``more`` has the names of the values of no parameter that differ.
    """

    slots: Mapping[str, SlotValues]
    compared: int
    more: tuple[str, ...] = ()


def compare_states(saved: OptimizerState, live: OptimizerState, progress: Progress | None = None) -> StateValues:
    """Return how the values of ``saved`` differ from those of ``live``, for parameters with state on both sides.

    Raises what ``compare_values`` does.
    """
    slots: dict[str, SlotValues] = {}
    pairs: list[tuple[str, str, LazyTensor, LazyTensor]] = []
    for name, before in live.state.items():
        after = saved.state.get(name, {})
        for slot in dict.fromkeys((*before, *after)) if before and after else ():
            values = slots.setdefault(slot, SlotValues())
            if slot not in before or slot not in after:
                (values.live if slot in before else values.saved).append(name)
                continue
            tensors = [list(tensors_in(side[slot])) for side in (before, after)]
            if tensors[0] and len(tensors[0]) == len(tensors[1]):
                pairs += [(name, slot, now, then) for now, then in zip(*tensors, strict=True)]
            elif not same_value(before[slot], after[slot]):
                values.changed[name] = None
    keys = [str(number) for number in range(len(pairs))]
    found = dict(zip(keys, (pair[3] for pair in pairs), strict=True))
    expected = dict(zip(keys, (pair[2] for pair in pairs), strict=True))
    names = dict(zip(keys, keys, strict=True))
    result = compare_named(_checkpoint(expected), _checkpoint(found), KeyMap(names), names, progress=progress)
    for source in {id(one.source): one.source for side in (expected, found) for one in side.values()}.values():
        source.check_unchanged()
    for difference in result.different:  # the worst is the first
        for key in difference.names:
            name, slot, *_ = pairs[int(key)]
            values = slots[slot]
            if values.worst is None:
                values.worst, values.worst_name = difference, name
            values.changed[name] = None
    for skipped in result.skipped:
        name, slot, *_ = pairs[int(skipped.key)]
        slots[slot].skipped[name] = skipped.reason
    for values in slots.values():
        values.changed = dict.fromkeys(name for name in live.state if name in values.changed)
    return StateValues(slots, len(result.keys), tuple(_changed_more(saved, live)))


def _changed_more(saved: OptimizerState, live: OptimizerState) -> Iterator[str]:
    sides: list[dict[str, SlotValue]] = [{**state.more.keys, **state.more.state} for state in (live, saved)]
    for key in dict.fromkeys((*sides[0], *sides[1])):
        if key not in sides[0] or key not in sides[1] or not same_value(sides[0][key], sides[1][key]):
            yield key


def _checkpoint(tensors: Mapping[str, LazyTensor]) -> Checkpoint:
    """Return a checkpoint of these tensors, whose bytes stay where they are."""
    # Views are left out: the numbers of storages are those of one source, and a live state has several.
    infos = {key: replace(one.info, key=key, view=None) for key, one in tensors.items()}
    access = Access(lambda info: tensors[info.key].payload(), lambda info: tensors[info.key].span())
    return Checkpoint(infos, access, Description("", "state_dict"))
