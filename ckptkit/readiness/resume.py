"""Check whether a run can be resumed: compare its weights with the model, and its optimizer state with the groups."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.comparison import StateDictDiff
from ckptkit.core.findings import Finding, Severity
from ckptkit.core.text import listed, printable, quoted, shell_word
from ckptkit.core.torch_bridge import get_or_none, named_of
from ckptkit.core.torch_optim import OPTIONS, OptimizerSchema, options_of_kind, scheduled_options
from ckptkit.core.torch_types import Module
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.compare import mode_findings
from ckptkit.optimizer_state.compatibility import refuse_other_class
from ckptkit.optimizer_state.forms import FoundState
from ckptkit.optimizer_state.groups import equal_values
from ckptkit.optimizer_state.model import OptimizerState, SlotValue, number_of, parameter_shape
from ckptkit.optimizer_state.naming import (
    name_by_position,
    naming_findings,
    structure_findings,
    to_named,
    to_named_for,
)
from ckptkit.param_groups.compare.groups import GroupDifference, GroupDifferences, GroupView, compare_groups
from ckptkit.param_groups.parameters import bare_name
from ckptkit.readiness import codes
from ckptkit.readiness.init import undecided_finding
from ckptkit.readiness.loaded_options import options_after_load
from ckptkit.readiness.model import Resume
from ckptkit.readiness.training import Training

__all__ = ["check_resume"]

_SHOWN = 3
_BY_NAME = "use load_optimizer_state, which loads by name"
_SET_AGAIN = "set the option again after load_state_dict, or keep the value of the run"
_KEEP_SCHEDULE = (
    "if a scheduler of the run set it, keep it: the schedule continues from it; else set it again after load_state_dict"
)
_NEW_SCHEDULE = (
    "for the schedule of the run, build its scheduler and load its state too; a new schedule needs its own initial_lr"
)
_KNOWN_OPTIONS = frozenset(OPTIONS)
_NO_EFFECT = options_of_kind("speed", "name")
# Schedulers of torch and of training scripts move these options.
_SCHEDULED = frozenset({"lr", "momentum", "betas", "weight_decay"})
# With another value of these options, a step does something else, so the finding is an error.
_OTHER_STEP = {
    "decoupled_weight_decay": "Adam and AdamW read the same state, but apply weight decay in two ways",
    "maximize": "each step goes in the opposite direction: set maximize again after load_state_dict",
}


def check_resume(
    model: Module,
    training: Training,
    result: StateDictDiff,
    found: FoundState | None,
    schedulers: Any = None,
) -> tuple[Resume, list[Finding]]:
    """Return how far the weights and the optimizer state of a run fit, and the findings about both.

    ``result`` compares the model with the weights of the run. ``found`` is the optimizer state of the run, or None.
    ``schedulers`` belong to the live optimizer.
    """
    findings = list(_weight_findings(result))
    matched = len(result.matched) + len(result.computed) - len(result.uncopyable)
    if found is None:
        return Resume(matched, len(result.expected)), findings
    faults = list(structure_findings(found))
    findings += faults
    findings += mode_findings((group.options for group in found.groups), severity="note")
    if any(finding.severity == "error" for finding in faults):
        return Resume(matched, len(result.expected), None, len(found.state), found.form), findings
    if not training.groups:
        findings += _model_findings(model, found)
    elif found.form in ("named", "flattened"):
        findings += _name_findings(training, found)
    else:
        findings += _position_findings(model, training, found, has_scheduler=bool(schedulers))
    count = sum(len(group.params) for group in found.groups) if training.groups else None
    return Resume(matched, len(result.expected), count, len(found.state), found.form), findings


def _weight_findings(result: StateDictDiff) -> Iterator[Finding]:
    path = result.found_checkpoint.argument or "RUN"
    first = result.hints[0] if result.hints else None
    hint = first.message if first else f"ckpt diff MODEL {path} shows all of them"
    if first and first.rename:  # a rule would make this check pass, but torch would still refuse the run
        how_many = first.message.partition("--rename")[0]
        renames = [shell_word(one.rename) for one in result.hints if one.rename]
        hint = how_many + ", or after ".join(f"ckpt remap {path} -o OUT --rename {one}" for one in renames)
        hint += ": these fit equally" if len(renames) > 1 else ""
    kinds = (
        (
            "missing from the run",
            [info.key for info in result.missing if info.key not in result.filled | result.excused],
        ),
        ("of another shape in the run", [pair.key for pair in result.shape_mismatched if not pair.loads]),
        ("not in the model", [info.key for info in result.unexpected if info.key not in result.unseen]),
        ("of a kind that torch does not copy", [pair.key for pair in result.uncopyable]),
        ("missing from the run" if result.undecided else "reported by the model's own code", result.reported),
    )
    for refusal in result.refusals:
        message = f"load_state_dict refuses the weights of the run: {printable(refusal)}"
        yield codes.RESUME_WEIGHTS.finding("", message, "the model's own code for loading says so")
    refuses = "load_state_dict refuses the weights of the run"
    if result.undecided:
        refuses = "by their names and shapes, the weights of the run do not fit"
        yield undecided_finding(result)
    for kind, keys in kinds:
        if keys:
            verb = "is" if len(keys) == 1 else "are"
            message = f"{refuses}: {listed(keys, _SHOWN)} {verb} {kind}"
            severity: Severity = "warning" if result.undecided else "error"
            yield codes.RESUME_WEIGHTS.finding(keys[0], message, hint, severity=severity, keys=keys)


def _model_findings(model: Module, found: FoundState) -> Iterator[Finding]:
    """Yield a finding where the model alone does not identify the parameters of the state."""
    try:
        yield from naming_findings(to_named(found, model))
    except PlanError as error:
        message = f"the parameters of the optimizer state of the run cannot be identified: {error.reason}"
        yield codes.RESUME_UNCLEAR.finding("", message, "give groups or an optimizer to compare with")


def _name_findings(training: Training, found: FoundState) -> Iterator[Finding]:
    """Compare groups with a state that has its parameters by name."""
    live = [
        GroupView(group.name, tuple(map(bare_name, group.names)), group.options, group.optimizer)
        for group in training.groups
    ]
    saved = [
        GroupView(str(number), tuple(bare_name(str(param)) for param in group.params), group.options)
        for number, group in enumerate(found.groups)
    ]
    differences = _compare(live, saved)
    for kind, names in (
        ("has no entry for", differences.missing),
        ("has entries for the unknown", differences.unexpected),
    ):
        if names:
            first, *_ = ordered = sorted(set(names))
            message = f"the optimizer state of the run {kind} {listed(ordered, _SHOWN)}"
            hint = "load_optimizer_state accepts the rules that renamed the weights"
            yield codes.RESUME_NAMES.finding(first, message, hint, keys=ordered)
    yield from _changed_findings(training, differences)


def _read_by_name(model: Module, training: Training, found: FoundState) -> OptimizerState | PlanError:
    """Return the state as ``load_optimizer_state`` reads it, or the error that it raises."""
    try:
        if found.form != "indexed":
            return to_named(found)
        return to_named_for(found, model, [group.names for group in training.groups])
    except PlanError as error:
        return error


def _describe_reading(reading: OptimizerState | PlanError) -> str:
    if isinstance(reading, PlanError):
        return f"load_optimizer_state refuses the state too: {reading.reason}"
    return f"load_optimizer_state reads the state {reading.evidence or 'by its names'}"


@dataclass(frozen=True)
class _Position:
    """One position of the optimizer: the live name, the key of the state in the file, and the name in the file."""

    name: str
    param: object
    saved_name: str


def _position_findings(
    model: Module, training: Training, found: FoundState, *, has_scheduler: bool
) -> Iterator[Finding]:
    """Compare groups with a state that has its parameters by position, as torch's load_state_dict does."""
    if len(training.optimizers) > 1:
        message = "the optimizer state of the run was not compared: there are several optimizers, but only one state"
        yield codes.RESUME_UNCLEAR.finding("", message, severity="note")
        return
    reading = _read_by_name(model, training, found)
    live_sizes = [len(group.names) for group in training.groups]
    saved_sizes = [len(group.params) for group in found.groups]
    if live_sizes != saved_sizes:
        live_text, saved_text = (" + ".join(map(str, sizes)) for sizes in (live_sizes, saved_sizes))
        yield codes.RESUME_GROUPS.finding(
            "",
            f"load_state_dict refuses the optimizer state of the run: the saved groups have {saved_text} parameters, "
            f"and the live groups have {live_text}",
            f"make the groups that the run had; {_describe_reading(reading)}",
        )
        return
    schema = training.optimizers[0].schema if training.optimizers else None
    positions = [
        [
            _Position(name, param, str(saved_name))
            for name, param, saved_name in zip(
                live.names, saved.params, saved.param_names or ("",) * len(saved.params), strict=True
            )
        ]
        for live, saved in zip(training.groups, found.groups, strict=True)
    ]
    every = [position for group in positions for position in group]
    shapes = {name: tuple(tensor.shape) for name, tensor in named_of(model, "parameters")}
    views = _position_views(training, found, positions, shapes)
    differences = _compare(*views, has_scheduler=has_scheduler, counters=_counters(training))
    yield from _order_findings(every)
    if differences.shapes:
        yield from _shape_findings(every, differences, reading)
    elif isinstance(reading, OptimizerState):
        yield from naming_findings(reading)
    yield from _coverage_findings([one for one in every if one.name not in training.frozen], found, schema)
    if schema is not None and not schema.has_shared_state:
        yield from _class_findings(training, found, positions, schema, shapes)
    yield from _changed_findings(training, differences)
    yield from _lost_findings(training, differences)


def _position_views(
    training: Training,
    found: FoundState,
    positions: Sequence[Sequence[_Position]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[list[GroupView], list[GroupView]]:
    """Return the live groups, and the groups after the load, with the position of each parameter as its name."""
    live_views, saved_views = [], []
    start = 0
    loaded: Sequence[Mapping[str, object]] = [group.options for group in found.groups]
    if training.optimizers:
        loaded = options_after_load(training.optimizers[0].instance, loaded)
    for live, options, group in zip(training.groups, loaded, positions, strict=True):
        numbers = tuple(map(str, range(start, start + len(group))))
        start += len(group)
        live_shapes = {
            number: shapes[position.name]
            for number, position in zip(numbers, group, strict=True)
            if position.name in shapes
        }
        saved_shapes = {
            number: shape
            for number, position in zip(numbers, group, strict=True)
            if (shape := parameter_shape(found.state.get(position.param, {}))) is not None
        }
        live_views.append(GroupView(live.name, numbers, live.options, live.optimizer, live_shapes))
        saved_views.append(GroupView(live.name, numbers, options, shapes=saved_shapes))
    return live_views, saved_views


def _counters(training: Training) -> frozenset[str]:
    """Return the defaults of the optimizer that its class sets itself, as the step count of schedule-free classes."""
    if not training.optimizers:
        return frozenset()
    optimizer = training.optimizers[0].instance
    defaults = get_or_none(optimizer, "defaults")
    try:
        arguments = inspect.signature(type(optimizer).__init__).parameters
    except (TypeError, ValueError):  # a class that is not written in Python
        return frozenset()
    if not isinstance(defaults, Mapping) or any(each.kind is each.VAR_KEYWORD for each in arguments.values()):
        return frozenset()
    return frozenset(defaults) - _KNOWN_OPTIONS - arguments.keys()


def _compare(
    live: Sequence[GroupView],
    saved: Sequence[GroupView],
    *,
    has_scheduler: bool = False,
    counters: frozenset[str] = frozenset(),
) -> GroupDifferences:
    def ignored(live: GroupView, saved: GroupView) -> frozenset[str]:
        return counters | _ignored_options(live.options, saved.options, has_scheduler=has_scheduler)

    return compare_groups(live, saved, match="position", ignored=ignored, equal=_equal_options)


def _ignored_options(
    live: Mapping[str, SlotValue], saved: Mapping[str, SlotValue], *, has_scheduler: bool
) -> frozenset[str]:
    """Return the options that are not compared: they change no result, or a scheduler moved them."""
    ignored = _NO_EFFECT | scheduled_options(live, saved, _equal_options)
    if "initial_lr" in live and "initial_lr" in saved:
        return ignored | {"lr"}  # initial_lr is compared
    # Some schedulers leave no mark in the groups, such as ReduceLROnPlateau.
    is_unmarked = has_scheduler and "initial_lr" not in live and "initial_lr" not in saved
    return ignored | {"initial_lr"} | ({"lr"} if is_unmarked else set())


def _order_findings(positions: Sequence[_Position]) -> Iterator[Finding]:
    swapped = [
        position
        for position in positions
        if position.saved_name and position.name and bare_name(position.saved_name) != bare_name(position.name)
    ]
    if swapped:
        first = swapped[0]
        more = f", and {len(swapped) - 1:,} more would get the state of others" if len(swapped) > 1 else ""
        yield codes.RESUME_ORDER.finding(
            first.name,
            f"load_state_dict loads by position and would give {quoted(first.name)} the optimizer state of "
            f"{quoted(first.saved_name)}{more}",
            _BY_NAME,
            keys=(position.name for position in swapped),
        )


def _shape_findings(
    positions: Sequence[_Position], differences: GroupDifferences, reading: OptimizerState | PlanError
) -> Iterator[Finding]:
    hint = _describe_reading(reading)
    if isinstance(reading, OptimizerState) and reading.names == tuple(position.name for position in positions):
        hint = 'load_optimizer_state with on_mismatch="skip" drops state of another shape'
    for difference in differences.shapes:
        position = positions[int(difference.name)]
        yield codes.RESUME_SHAPE.finding(
            position.name,
            f"position {position.param} of the optimizer state has shape {list(difference.found)}, but "
            f"{quoted(position.name)} at this position has {list(difference.expected)}: load_state_dict loads it, "
            "and the next step fails",
            hint,
        )


def _coverage_findings(
    positions: Sequence[_Position], found: FoundState, schema: OptimizerSchema | None
) -> Iterator[Finding]:
    without = [position.name for position in positions if not found.state.get(position.param)]
    always_has_state = schema is None or any(slot.enabled_by is None for slot in schema.slots)
    if without and always_has_state:
        message = f"the run has no optimizer state for {listed(without, _SHOWN)}, so training starts without it"
        severity: Severity = "warning" if len(without) < len(positions) else "note"
        hint = "" if found.state else "load_optimizer_state refuses a state without values: start without it"
        yield codes.RESUME_NEW.finding(without[0], message, hint, severity=severity, keys=without)


def _class_findings(
    training: Training,
    found: FoundState,
    positions: Sequence[Sequence[_Position]],
    schema: OptimizerSchema,
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[Finding]:
    """Yield a finding if the options are of another class, or else for the first parameter that has such a state."""
    kind = training.optimizers[0].class_name
    try:
        refuse_other_class(name_by_position(found), training.optimizers[0].instance, schema)
    except PlanError as error:
        yield codes.RESUME_CLASS.finding("", error.reason, error.hint or "")
        return
    for group, members in zip(training.groups, positions, strict=True):
        for position in members:
            slots = found.state.get(position.param)
            if not slots or position.name not in shapes:
                continue
            expected = schema.slots_for(group.options, shapes[position.name])
            lacking = [slot.name for slot in expected if slot.name not in slots and not slot.is_optional]
            if lacking:
                yield codes.RESUME_CLASS.finding(
                    position.name,
                    f"the optimizer state of the run is not from {kind}: the state of {quoted(position.name)} lacks "
                    f"{', '.join(lacking)}",
                    "resume with the optimizer that the run had",
                )
                return


def _changed_findings(training: Training, differences: GroupDifferences) -> Iterator[Finding]:
    for difference in differences.groups:
        for option in difference.options:
            if not option.is_absent:
                severity: Severity = "error" if option.key in _OTHER_STEP else "warning"
                values = f"{option.key} = {_plain(option.expected)} becomes {_plain(option.found)}"
                message = f"{_label(training, difference)}: {values} with the optimizer state of the run"
                hint = _OTHER_STEP.get(option.key, _hint_of_option(option.key))
                yield codes.RESUME_OPTIONS.finding("", message, hint, severity=severity)


def _lost_findings(training: Training, differences: GroupDifferences) -> Iterator[Finding]:
    if not training.optimizers:
        return
    defaults = training.optimizers[0].defaults
    for difference in differences.groups:
        lost = sorted(option.key for option in difference.options if option.is_absent)
        if lost:
            severity: Severity = "error" if defaults.keys() & set(lost) else "warning"
            names = ", ".join(map(quoted, lost))
            message = f"{_label(training, difference)} loses {names} with the optimizer state of the run"
            yield codes.RESUME_LOST.finding(
                "", message, "set the options again after load_state_dict", severity=severity
            )


def _hint_of_option(key: str) -> str:
    if key in options_of_kind("schedule"):
        return _NEW_SCHEDULE
    return _KEEP_SCHEDULE if key in _SCHEDULED else _SET_AGAIN


def _label(training: Training, difference: GroupDifference) -> str:
    return f"group {difference.expected} ({quoted(training.groups[difference.expected].name)})"


def _equal_options(live: SlotValue, saved: SlotValue) -> bool:
    """Return whether two options are equal; values that cannot be read count as equal."""
    return not _is_readable(live) or not _is_readable(saved) or equal_values(live, saved)


def _is_readable(value: SlotValue) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_readable, value))
    return value is None or isinstance(value, str) or number_of(value) is not None


def _plain(value: SlotValue) -> object:
    """Return a readable option as a number, text, None or a tuple."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    number = number_of(value)
    return value if number is None else number
