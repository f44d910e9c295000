"""Whether a run can go on: its weights against the model, its optimizer's state against the live groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.comparison import StateDictDiff
from ckptkit.core.findings import Finding, Severity
from ckptkit.core.text import listed, quoted
from ckptkit.core.torch_optim import OPTIONS, OptimizerSchema, options_of_kind, schema_of
from ckptkit.core.torch_types import Module
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.forms import FoundState
from ckptkit.optimizer_state.model import number_of, parameter_shape
from ckptkit.optimizer_state.naming import structure_findings, to_named
from ckptkit.param_groups.parameters import bare_name
from ckptkit.readiness.model import Resume, TrainingGroup
from ckptkit.readiness.training import Training

__all__ = ["check_resume"]

_SHOWN = 3
_BY_NAME = "load_optimizer_state goes by name"
_NOT_COMPARED = options_of_kind("speed", "name") | {"initial_lr"}
# A change of these options turns a step into another one, so it is an error; the others are warnings.
_OTHER_DIRECTION = {
    "decoupled_weight_decay": "Adam and AdamW read the same state, and decay weights otherwise",
    "maximize": "each step goes in the opposite direction: set maximize again after load_state_dict",
}


def check_resume(
    model: Module, training: Training, result: StateDictDiff, found: FoundState | None
) -> tuple[Resume, list[Finding]]:
    """Return how the weights and the optimizer state of a run fit, and what is wrong with either."""
    findings = list(_weights(result))
    matched = len(result.matched) - len(result.uncopyable)
    if found is None:
        return Resume(matched, len(result.expected)), findings
    faults = list(structure_findings(found))
    findings += faults
    if any(finding.severity == "error" for finding in faults):
        return Resume(matched, len(result.expected), None, len(found.state), found.form), findings
    if not training.groups:
        findings += _alone(model, found)
    elif found.form in ("named", "flattened"):
        findings += _by_name(training, found)
    else:
        findings += _Positions(model, training, found).check()
    count = sum(len(group.params) for group in found.groups) if training.groups else None
    return Resume(matched, len(result.expected), count, len(found.state), found.form), findings


def _weights(result: StateDictDiff) -> Iterator[Finding]:
    hint = result.hints[0].message if result.hints else "ckpt diff MODEL RUN shows all of them"
    kinds = (
        ("missing from the run", [info.key for info in result.missing if info.key not in result.filled]),
        ("of another shape in the run", [pair.key for pair in result.shape_mismatched if not pair.loads]),
        ("not in the model", [info.key for info in result.unexpected if info.key not in result.unseen]),
        ("of a kind that torch does not copy", [pair.key for pair in result.uncopyable]),
    )
    for told, keys in kinds:
        if keys:
            message = f"load_state_dict refuses the weights of the run: {listed(keys, _SHOWN)} {_be(keys)} {told}"
            yield Finding("preflight.resume-weights", "error", keys[0], message, hint)


def _alone(model: Module, found: FoundState) -> Iterator[Finding]:
    try:
        to_named(found, model)
    except PlanError as error:
        message = f"the optimizer state of the run does not tell whose it is: {error.reason}"
        yield Finding("preflight.resume-unclear", "warning", "", message, "give groups or an optimizer to compare with")


def _by_name(training: Training, found: FoundState) -> Iterator[Finding]:
    live = [name for group in training.groups for name in group.names]
    theirs = {bare_name(str(param)) for group in found.groups for param in group.params}
    mine = {bare_name(name) for name in live}
    for told, names in (("has none of", sorted(mine - theirs)), ("also has that of", sorted(theirs - mine))):
        if names:
            yield Finding(
                "preflight.resume-names",
                "error",
                names[0],
                f"the optimizer state of the run, by name, {told} {listed(names, _SHOWN)}",
                "load_optimizer_state takes the rules that renamed the weights",
            )


@dataclass(frozen=True)
class _Positions:
    """State that is counted, against live groups: torch gives each position what stands there, whoever that is."""

    model: Module
    training: Training
    found: FoundState

    def check(self) -> Iterator[Finding]:
        groups = self.training.groups
        if len(self.training.optimizers) > 1:
            yield Finding(
                "preflight.resume-unclear",
                "note",
                "",
                "the optimizer state of the run was not compared: there are several optimizers, and one state",
            )
            return
        sizes = [len(group.names) for group in groups], [len(group.params) for group in self.found.groups]
        if sizes[0] != sizes[1]:
            told = [" + ".join(map(str, some)) for some in sizes]
            yield Finding(
                "preflight.resume-groups",
                "error",
                "",
                f"load_state_dict refuses the optimizer state of the run: it has groups of {told[1]} parameters, and "
                f"the live ones have {told[0]}",
                "make the groups that the run had; load_optimizer_state deals its state to these by name",
            )
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.named_parameters(remove_duplicate=False)}
        yield from self._members(shapes)
        yield from self._slots(shapes)
        for number, (live, saved) in enumerate(zip(groups, self.found.groups, strict=True)):
            yield from self._options(number, live, saved.options)

    def _pairs(self) -> Iterator[tuple[str, object, str]]:
        """Yield each live name with the position in the file that torch gives it, and the name recorded there."""
        for live, saved in zip(self.training.groups, self.found.groups, strict=True):
            recorded = saved.param_names or ("",) * len(saved.params)
            for name, param, other in zip(live.names, saved.params, recorded, strict=True):
                yield name, param, str(other)

    def _members(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
        torn = [
            (name, other) for name, _, other in self._pairs() if other and name and bare_name(other) != bare_name(name)
        ]
        if torn:
            name, other = torn[0]
            more = f", and {len(torn) - 1:,} more are torn so" if len(torn) > 1 else ""
            yield Finding(
                "preflight.resume-order",
                "error",
                name,
                f"load_state_dict would give {quoted(name)} the optimizer state of {quoted(other)}: it goes by "
                f"position{more}",
                _BY_NAME,
            )
        for name, param, _ in self._pairs():
            shape = parameter_shape(self.found.state.get(param, {}))
            if shape is not None and name in shapes and shape != shapes[name]:
                yield Finding(
                    "preflight.resume-shape",
                    "error",
                    name,
                    f"position {param} of the optimizer state is of a parameter {list(shape)}, and {quoted(name)} "
                    f"there is {list(shapes[name])}: load_state_dict takes it, and the next step fails",
                    "load_optimizer_state drops the state of what has another shape",
                )
        known = [name for name, param, _ in self._pairs() if self.found.state.get(param)]
        without = [name for name, param, _ in self._pairs() if not self.found.state.get(param)]
        schema = self._schema()
        keeps = schema is None or any(slot.enabled_by is None for slot in schema.slots)
        if without and keeps:
            severity: Severity = "warning" if known else "note"
            message = f"there is no optimizer state for {listed(without, _SHOWN)} in the run, which begins anew"
            yield Finding("preflight.resume-new", severity, without[0], message)

    def _schema(self) -> OptimizerSchema | None:
        return schema_of(type(self.training.optimizers[0])) if self.training.optimizers else None

    def _slots(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
        schema = self._schema()
        if schema is None or schema.has_shared_state:
            return
        kind = type(self.training.optimizers[0]).__name__
        options = {name: group.options for group in self.training.groups for name in group.names}
        for name, param, _ in self._pairs():
            slots = self.found.state.get(param)
            if not slots or name not in shapes:
                continue
            lacking = [
                slot.name
                for slot in schema.slots_for(options[name], shapes[name])
                if slot.name not in slots and not slot.is_optional
            ]
            strange = [slot for slot in slots if schema.slot(slot) is None]
            if lacking or strange:
                told = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(strange)}"
                yield Finding(
                    "preflight.resume-class",
                    "error",
                    name,
                    f"the optimizer state of the run is not one of {kind}: that of {quoted(name)} {told}",
                    "resume with the optimizer that the run had",
                )
                return

    def _options(self, number: int, live: TrainingGroup, saved: Mapping[str, Any]) -> Iterator[Finding]:
        where = f"group {number} ({quoted(live.name)})"
        for key, value in live.options.items():
            if key in _NOT_COMPARED or key not in saved:
                continue
            mine, theirs = _plain(value), _plain(saved[key])
            if _Unknown not in (mine, theirs) and mine != theirs:
                yield Finding(
                    "preflight.resume-options",
                    "error" if key in _OTHER_DIRECTION else "warning",
                    "",
                    f"{where}: {key} = {mine} becomes {theirs} with the optimizer state of the run",
                    _OTHER_DIRECTION.get(key, "set it again after load_state_dict, or begin with what the run had"),
                )
        if self.training.optimizers:
            lost = sorted(key for key, value in live.options.items() if key not in saved and _is_lost(key, value))
            if lost:
                yield Finding(
                    "preflight.resume-lost",
                    "error" if set(lost) & self.training.optimizers[0].defaults.keys() else "warning",
                    "",
                    f"{where} loses {', '.join(map(quoted, lost))} with the optimizer state of the run",
                    "set it again after load_state_dict",
                )


def _is_lost(key: str, value: object) -> bool:
    """Return whether a load changes an option of a live group that the file does not have."""
    if key in _NOT_COMPARED:
        return False
    option = OPTIONS.get(key)
    return option is None or option.value_without is None or value != option.value_without


class _Unknown:
    """Stands for a value that cannot be compared."""


def _plain(value: Any) -> Any:
    number = number_of(value)
    if number is not None:
        return number
    if isinstance(value, list | tuple):
        return tuple(value)
    return value if value is None or isinstance(value, bool | int | float | str) else _Unknown


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
