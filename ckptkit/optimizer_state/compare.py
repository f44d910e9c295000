"""Compare a saved optimizer state with a live state, and find unusual values in a single state."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from ckptkit.core.arguments import require_flags, require_progress
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import Finding, Report, Severity
from ckptkit.core.patterns import drop_options
from ckptkit.core.progress import Progress
from ckptkit.core.text import listed, plural, printable, quoted, short_number
from ckptkit.core.torch_optim import OPTIONS, SCHEMAS, scheduled_options, torch_options
from ckptkit.core.torch_optim.step_counts import have_one_count_in_each_part
from ckptkit.errors import PlanError
from ckptkit.inputs import opened_optimizer
from ckptkit.optimizer_state import codes
from ckptkit.optimizer_state.forms import FoundState
from ckptkit.optimizer_state.groups import describe_values, equal_values
from ckptkit.optimizer_state.model import OptimizerState, SlotValue, number_of, parameter_shape
from ckptkit.optimizer_state.naming import NamesLike, to_named
from ckptkit.param_groups.compare.groups import GroupDifferences, GroupView, OptionDifference, compare_groups

if TYPE_CHECKING:
    from ckptkit.optimizer_state.values import StateValues

__all__ = ["mode_findings", "optimizer_state_diff", "state_findings", "state_report"]

_SHOWN = 4
_RECENT = frozenset(option.name for option in OPTIONS.values() if option.is_recent)


StateLike: TypeAlias = OptimizerState | FoundState | Checkpoint | Mapping[str, object] | str | os.PathLike[str]


def optimizer_state_diff(
    saved: StateLike,
    live: StateLike,
    names: NamesLike | None = None,
    *,
    values: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Return what would change if the optimizer with the state ``live`` loaded the state ``saved``.

    Each is an ``OptimizerState``, the path of a state, an open Checkpoint of one, or a ``state_dict()`` in any form of
    torch. A path is opened as by ``open_optimizer``, and closed at the end. ``names`` is for states without names, as
    in ``to_named``. ``progress`` is called with the number of bytes of each step while values are compared.

    - ``optim.groups``: torch refuses, because the number or the sizes of the groups differ.
    - ``optim.parameters``: only one side has a parameter.
    - ``optim.membership`` and ``optim.order``: torch loads by position, so a parameter would get the state of another.
    - ``optim.class``: the state was saved by another class, so its options are not compared one by one.
    - ``optim.options``: loading changes an option. ``optim.options-lost``: loading deletes an option.
    - ``optim.shape``: the state has another shape, and the next step fails.
    - ``optim.coverage``: a parameter would start without state.
    - ``optim.values``: with ``values``, loading changes the values of a slot, such as ``exp_avg``. Only bits that are
      equal count as equal. Parameters without state on one side are not compared.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> one, other = (torch.optim.SGD(model.parameters(), lr=lr).state_dict() for lr in (0.1, 0.2))
        >>> [finding.message for finding in ckptkit.optimizer_state_diff(one, other, names=["weight", "bias"]).findings]
        ["lr of 'weight', 'bias' is 0.2, and loading makes it 0.1"]
    """
    require_flags(values=values)
    require_progress(progress)
    with opened_optimizer(saved) as saved_side, opened_optimizer(live) as live_side:
        saved_state, live_state = _named(saved_side, names), _named(live_side, names)
        findings = list(_differences(saved_state, live_state))
        agree = f"groups, options{_but_scheduled(saved_state, live_state)} and shapes agree"
        proved = f"{agree}; values were not compared"
        if values:
            from ckptkit.optimizer_state.values import compare_states

            result = compare_states(saved_state, live_state, progress)
            findings += _value_findings(result)
            proved = f"{agree}, and so do the values of {plural(result.compared, 'tensor')}"
            if not result.compared:
                proved = f"{agree}; no tensor has values on both sides"
        return Report(tuple(findings), PlanError, proved=proved)


def _value_findings(result: StateValues) -> Iterator[Finding]:
    for slot, values in result.slots.items():
        hint = ""
        if values.worst is not None and (change := values.worst.rel_l2) is not None:
            hint = f"the largest change is that of {quoted(values.worst_name)}, {_relative(change)}"
        if values.changed:
            message = f"loading changes {printable(slot)} of {listed(values.changed, _SHOWN)}"
            yield codes.VALUES.finding(next(iter(values.changed)), message, hint, keys=values.changed)
        for names, side in ((values.saved, "saved"), (values.live, "live")):
            if names:
                message = f"only the {side} state has {printable(slot)} of {listed(names, _SHOWN)}"
                yield codes.VALUES.finding(names[0], message, keys=names)
        for name, reason in values.skipped.items():
            message = f"{printable(slot)} of {quoted(name)} was not compared: {reason}"
            yield codes.VALUES.finding(name, message, severity="note")
    if result.more:
        yield codes.VALUES.finding("", f"loading changes {listed(result.more)}, which is of no parameter")


def _relative(change: float) -> str:
    return "which is all 0 now" if change == math.inf else f"{short_number(change, 3)} relative to its norm"


def _named(state: object, names: NamesLike | None) -> OptimizerState:
    if isinstance(state, OptimizerState):
        return state
    return to_named(cast("FoundState | Checkpoint | Mapping[str, object]", state), names)


def _differences(saved: OptimizerState, live: OptimizerState) -> Iterator[Finding]:
    differences = compare_groups(_views(live), _views(saved), match="position", ignored=_scheduled, equal=equal_values)
    saved_sizes, live_sizes = ([len(group.names) for group in state.groups] for state in (saved, live))
    if saved_sizes != live_sizes:
        message = f"groups of {listed(saved_sizes)} parameters were saved, and now they have {listed(live_sizes)}"
        hint = "ckpt optim resplit SAVED -o OUT --groups FILE assigns them to the new groups by name"
        yield codes.GROUPS.finding("", message, hint)
    if differences.missing:
        message = f"{listed(differences.missing)} has no saved state"
        yield codes.PARAMETERS.finding(
            differences.missing[0], message, "a parameter that is added starts without state"
        )
    if differences.unexpected:
        message = f"{listed(differences.unexpected)} was saved but is not in the live groups"
        hint = (
            "rename it: ckpt optim remap SAVED -o OUT --rename OLD=NEW; or drop it: ckpt optim prune SAVED -o OUT "
            f"{drop_options(differences.unexpected)}"
        )
        yield codes.PARAMETERS.finding(differences.unexpected[0], message, hint)
    moved: dict[tuple[int, int], list[str]] = {}  # by the group now and the one before
    for group in differences.groups:
        for name, number in group.moved:
            moved.setdefault((group.expected, number), []).append(name)
    for (now, before), names in moved.items():
        message = f"{listed(names)}: saved in group {before}, now in group {now}"
        hint = "ckpt optim resplit SAVED -o OUT --as LIVE moves it with its options"
        yield codes.MEMBERSHIP.finding(names[0], message, hint)
    if not moved and saved_sizes == live_sizes and not differences.missing and not differences.unexpected:
        for order in differences.order:
            message = f"position {order.position} held {quoted(order.found)} and now holds {quoted(order.expected)}"
            hint = "torch loads by position, so each parameter would get the state of another"
            yield codes.ORDER.finding(order.expected, message, hint)
    if other := _other_class(saved, live):
        hint = (
            "torch loads it, and a later step fails or mixes both classes: build the class that was saved, or start "
            "without this state"
        )
        yield codes.CLASS.finding("", other, hint)
    else:
        yield from _option_findings(live, differences)
    for shape in differences.shapes:
        yield codes.SHAPE.finding(
            shape.name,
            f"the state of {quoted(shape.name)} was saved with shape {list(shape.found)} and now has "
            f"{list(shape.expected)}",
            "ckpt optim prune SAVED -o OUT --like MODEL drops it; ckpt optim remap SAVED -o OUT --rules FILE pads or "
            "cuts it",
        )
    saved_names = set(saved.names)
    without = [name for name in live.names if name in saved_names and name not in saved.state]
    if without and saved.state:
        message = f"{listed(without)} saved without state"
        yield codes.COVERAGE.finding(without[0], message, "the parameter was frozen or never stepped")


def _other_class(saved: OptimizerState, live: OptimizerState) -> str:
    """Return how the two states show that different classes keep them, or an empty string.

    Slots tell it where no class of torch keeps those of both sides. Options tell it where each side has some that the
    other lacks; users add options of their own, so classes of torch must have some, or the slots must differ too.
    """
    sides = (saved, live)
    slots = [dict.fromkeys(str(slot) for one in state.state.values() for slot in one) for state in sides]
    classes = [{name for name, schema in SCHEMAS.items() if all(map(schema.slot, names))} for names in slots]
    if all(slots) and all(classes) and not classes[0] & classes[1]:
        texts = [", ".join(map(printable, names)) for names in slots]
        return f"another class of optimizer was saved: the saved state has {texts[0]}, and the live state {texts[1]}"
    options = [dict.fromkeys(key for group in state.groups for key in group.options if _is_own(key)) for state in sides]
    only = [[key for key in mine if key not in theirs] for mine, theirs in (options, options[::-1])]
    have_other_slots = all(slots) and slots[0].keys() != slots[1].keys()
    if all(only) and (have_other_slots or not any(map({*torch_options()}.isdisjoint, only))):
        texts = [", ".join(map(printable, keys)) for keys in only]
        return (
            f"another class of optimizer was saved: only its groups have {texts[0]}, and only the live ones {texts[1]}"
        )
    return ""


def _is_own(key: str) -> bool:
    """Return whether an option can belong to one class only: not one that torch gave to all, or that scripts keep."""
    return key not in OPTIONS


def _but_scheduled(saved: OptimizerState, live: OptimizerState) -> str:
    """Return the part of a sentence that names the options which differ only by what a scheduler of the run set."""
    differ: dict[str, None] = {}
    for mine, theirs in zip(_views(live), _views(saved), strict=False):
        for key in sorted(_scheduled(mine, theirs) & mine.options.keys() & theirs.options.keys()):
            if not equal_values(mine.options[key], theirs.options[key]):
                differ[key] = None
    return f" (but {listed(differ, show=str)}, which a scheduler set)" if differ else ""


def _scheduled(live: GroupView, saved: GroupView) -> frozenset[str]:
    return scheduled_options(live.options, saved.options, equal_values)


def _views(state: OptimizerState) -> list[GroupView]:
    shapes = {name: parameter_shape(slots) for name, slots in state.state.items()}
    return [
        GroupView(
            str(number),
            group.names,
            group.options,
            shapes={name: shape for name in group.names if (shape := shapes.get(name)) is not None},
        )
        for number, group in enumerate(state.groups)
    ]


def _option_findings(live: OptimizerState, differences: GroupDifferences) -> Iterator[Finding]:
    """Yield one finding for all parameters that have the same difference."""
    changed: dict[tuple[str, str, str], list[str]] = {}
    lost: dict[str, list[str]] = {}
    for option in (option for group in differences.groups for option in group.options):
        if option.is_absent and not _is_restored(option):
            lost.setdefault(option.key, []).extend(option.names)
        elif not option.is_absent:
            values = describe_values(option.expected, option.found)
            changed.setdefault((option.key, *values), []).extend(option.names)
    position = {name: number for number, name in enumerate(live.names)}
    for (key, now, before), names in changed.items():
        names.sort(key=position.__getitem__)
        message = f"{key} of {listed(names)} is {now}, and loading makes it {before}"
        hint = "torch uses the saved options: keep what a scheduler of the run set, or set them again after the load"
        yield codes.OPTIONS.finding(names[0], message, hint)
    for key, names in lost.items():
        names.sort(key=position.__getitem__)
        effect = "turns it off" if key in _RECENT else "deletes it"
        message = f"{key} of {listed(names)} was not saved, and loading {effect}"
        yield codes.OPTIONS_LOST.finding(names[0], message, "ckpt optim resplit SAVED -o OUT --as LIVE keeps it")


def _is_restored(option: OptionDifference) -> bool:
    """Return whether the class sets this value where an older file lacks the option, as most classes do."""
    return option.key in _RECENT and (not option.expected or option.key == "decoupled_weight_decay")


def mode_findings(options: Iterable[Mapping[str, SlotValue]], severity: Severity = "warning") -> Iterator[Finding]:
    """Yield a finding if the options of a group say that a schedule-free optimizer was saved in train mode."""
    if any(group.get("train_mode") is True for group in options):
        yield codes.TRAIN_MODE.finding(
            "",
            "the schedule-free optimizer was saved in train mode, so weights that were saved with it are the points "
            "where gradients are taken, not the averaged weights",
            "call optimizer.eval() before you save weights that will be evaluated",
            severity=severity,
        )


def state_report(state: OptimizerState) -> Report:
    """Return what is unusual in a state: in its keys as they were found, and in its values."""
    return Report((*state.findings, *state_findings(state)), PlanError)


def state_findings(state: OptimizerState) -> Iterator[Finding]:
    """Yield findings about parameters without state, missing slots, different step counts, and the train mode."""
    yield from mode_findings(group.options for group in state.groups)
    without = [name for name in state.names if not state.state.get(name)]
    if without and len(without) < len(state.names):
        message = f"{len(without):,} of {plural(len(state.names), 'parameter')} have no state: {listed(without)}"
        hint = "they were frozen or never stepped, and start without state"
        yield codes.NO_STATE.finding(without[0], message, hint)
    for group in state.groups:
        for is_matrix in (True, False):
            names = [name for name in group.names if _is_matrix(state, name) == is_matrix]
            yield from _missing_slots(state, names)
    steps: dict[float, list[str]] = {}
    for name, slots in state.state.items():
        step = number_of(slots.get("step"))
        if step is not None:
            steps.setdefault(step, []).append(name)
    if len(steps) > 1:
        counts = sorted(steps.items(), key=lambda pair: -len(pair[1]))
        shown = "; ".join(
            f"{short_number(step)} of {plural(len(names), 'parameter')} ({names[0]})" for step, names in counts[:_SHOWN]
        )
        hint = "some parameters were unfrozen later, or the file was edited: their bias correction differs"
        is_usual = have_one_count_in_each_part(
            {name: step for step, names in steps.items() for name in names}, [group.names for group in state.groups]
        )
        severity: Severity = "note" if is_usual else "warning"
        yield codes.STEPS_DIFFER.finding(counts[-1][1][0], f"step counts differ: {shown}", hint, severity=severity)


def _is_matrix(state: OptimizerState, name: str) -> bool:
    shapes = (getattr(value, "shape", ()) for value in state.state.get(name, {}).values())
    return max(map(len, shapes), default=0) > 1


def _missing_slots(state: OptimizerState, names: Sequence[str]) -> Iterator[Finding]:
    with_state = [name for name in names if state.state.get(name)]
    counts = Counter(slot for name in with_state for slot in state.state[name])
    for slot, count in counts.items():
        if len(with_state) > count > len(with_state) / 2:
            lacking = [name for name in with_state if slot not in state.state[name]]
            verb = "has" if len(lacking) == 1 else "have"
            message = f"{listed(lacking)} {verb} no {slot}, but other parameters of the group do"
            hint = "a step raises KeyError; ckpt optim prune SAVED -o OUT --reset PATTERN drops the incomplete state"
            yield codes.SLOT_MISSING.finding(lacking[0], message, hint)
