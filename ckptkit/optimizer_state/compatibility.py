"""Check that a live optimizer can continue with a saved state: same class, same slots, same shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.core.findings import Finding
from ckptkit.core.torch_bridge import get_or_none
from ckptkit.core.torch_optim import OPTIONS, OptimizerSchema, adam_tells_its_decay, torch_options
from ckptkit.core.torch_types import Optimizer
from ckptkit.errors import PlanError
from ckptkit.optimizer_state import codes
from ckptkit.optimizer_state.model import (
    LazyTensor,
    NamedGroup,
    OptimizerState,
    SlotValue,
    is_less,
    keeps_less,
    parameter_shape,
)
from ckptkit.param_groups.parameters import LiveModel, LiveParameter

__all__ = ["StateMatch", "match_state", "refuse_other_class", "unknown_decay_findings"]

# torch.optim added these options later, so an older file of the same class does not have them.
_NEWER_OPTIONS = frozenset(option.name for option in OPTIONS.values() if option.is_recent)
_BUILD_SAVED_CLASS = "build the optimizer class that was saved, or start without its state"


@dataclass(frozen=True)
class StateMatch:
    """The saved slots that fit the live parameters.

    ``dropped`` tells why the state of a parameter does not fit, as the end of a sentence.
    ``missing`` are the trainable parameters without saved state.
    """

    state: Mapping[str, Mapping[str, SlotValue]]
    dropped: Mapping[str, str]
    missing: tuple[str, ...]


def refuse_other_class(saved: OptimizerState, optimizer: Optimizer, schema: OptimizerSchema | None) -> None:
    """Raise ``PlanError`` if the options or the slots of a state belong to another class than the optimizer's.

    torch loads such a state. It then fails in a later step, or continues with a mixture of both classes. Nothing is
    known about classes outside of torch.optim.
    """
    defaults = get_or_none(optimizer, "defaults")
    if schema is None or not isinstance(defaults, Mapping):
        return
    live = type(optimizer).__name__
    known_options = {*torch_options()} - _NEWER_OPTIONS
    for group in saved.groups:
        if not group.options:
            continue
        decoupled = group.options.get("decoupled_weight_decay")
        expected = defaults.get("decoupled_weight_decay")
        if isinstance(decoupled, bool) and isinstance(expected, bool) and decoupled != expected:
            raise PlanError(
                f"the state has decoupled_weight_decay={decoupled}, but this {live} was built with {expected}: weight "
                "decay would get another meaning",
                hint=f"build {'AdamW' if decoupled else 'Adam'}, the class that was saved",
            )
        unknown = sorted(key for key in group.options if key not in defaults and key in known_options)
        lacking = sorted(key for key in defaults if key not in group.options and key not in _NEWER_OPTIONS)
        if unknown or lacking:
            difference = f"has {', '.join(unknown)}" if unknown else f"has no {', '.join(lacking)}"
            raise PlanError(
                f"the state was saved from another class than {live}: one of its groups {difference}",
                hint=_BUILD_SAVED_CLASS,
            )
    unknown = sorted({str(slot) for slots in saved.state.values() for slot in slots if schema.slot(slot) is None})
    if unknown:
        raise PlanError(
            f"the state was saved from another class than {live}: it has {', '.join(unknown)}, but {live} keeps "
            f"{', '.join(slot.name for slot in schema.slots)}",
            hint=_BUILD_SAVED_CLASS,
        )


def unknown_decay_findings(saved: OptimizerState, schema: OptimizerSchema | None) -> Iterator[Finding]:
    """Yield a note if an old file does not say whether it was saved from Adam or from AdamW.

    The same weight decay has another meaning in each of these classes. A torch that has no such option never says it:
    its own files get no note.
    """
    if schema is not None and schema.name in {"Adam", "AdamW"} and adam_tells_its_decay():
        groups = [group.options for group in saved.groups if group.options]
        if any(options.get("weight_decay") and "decoupled_weight_decay" not in options for options in groups):
            yield codes.DECAY_UNTOLD.finding(
                "",
                "the file does not say whether its weight decay was decoupled, because older versions of torch wrote "
                "the same for Adam and for AdamW",
                f"make sure that {schema.name} was the class that was saved",
            )


def _stateless_names(saved: OptimizerState, live_model: LiveModel) -> set[str]:
    """Return the parameters for which an unknown class seems to keep no state.

    In the file, no parameter of the group with as many dims has state.
    """
    names: set[str] = set()
    for group in saved.groups:
        dims = {name: len(live_model.by_name[name].shape) for name in group.names}
        with_state = {dims[name] for name in group.names if name in saved.state}
        names.update(name for name in group.names if dims[name] not in with_state)
    return names


def match_state(
    saved: OptimizerState,
    groups: Sequence[NamedGroup],
    live_model: LiveModel,
    schema: OptimizerSchema | None,
    *,
    with_state: Collection[str] = (),
) -> StateMatch:
    """Return the part of ``saved`` that fits the parameters of ``groups``, which have the options to train with.

    ``with_state`` has the parameters that the live optimizer keeps state for.


    Raises ``PlanError`` if the optimizer keeps one state for all its parameters and the file has other parameters.
    """
    if schema is not None and schema.has_shared_state:
        return _match_shared_state(saved, groups, schema)
    state: dict[str, Mapping[str, SlotValue]] = {}
    dropped: dict[str, str] = {}
    missing: list[str] = []
    allows_less = keeps_less({name: live_model.by_name[name].shape for name in saved.state}, saved.state)
    stateless = _stateless_names(saved, live_model).difference(with_state)
    for group in groups:
        for name in group.names:
            parameter = live_model.by_name[name]
            slots = saved.state.get(name)
            if schema is None:
                needs_state = slots is None and name not in stateless
            else:
                needs_state = not slots and bool(schema.slots_for(group.options, parameter.shape))
            if needs_state:
                if parameter.trainable:
                    missing.append(name)
            elif slots is None:
                continue
            elif (reason := _find_mismatch(slots, parameter, group, schema, allows_less=allows_less)) is not None:
                dropped[name] = reason
            else:
                state[name] = slots
    return StateMatch(state, dropped, tuple(missing))


def _match_shared_state(saved: OptimizerState, groups: Sequence[NamedGroup], schema: OptimizerSchema) -> StateMatch:
    names = tuple(name for group in groups for name in group.names)
    if names != saved.names:
        raise PlanError(
            f"{schema.name} keeps one state for all its parameters in their order, but the file has other parameters "
            "or another order",
            hint="build the optimizer with the same parameters in the same order",
        )
    return StateMatch(saved.state, {}, () if saved.state else names)


def _find_mismatch(
    slots: Mapping[str, SlotValue],
    parameter: LiveParameter,
    group: NamedGroup,
    schema: OptimizerSchema | None,
    *,
    allows_less: bool,
) -> str | None:
    """Return why the slots do not fit this parameter, as the end of a sentence, or None if they fit.

    ``allows_less`` accepts the state of an unknown class that does not have one number for each element.
    """
    if parameter.lazy:
        return "cannot be compared with a parameter that has no shape before the first forward pass"
    if schema is None:
        shape = parameter_shape(slots)
        if shape in {None, parameter.shape} or (allows_less and is_less(shape, parameter.shape)):
            return None
        return f"has shape {shape}, but the parameter has shape {parameter.shape}"
    for slot in schema.slots_for(group.options, parameter.shape):
        if slots.get(slot.name) is None and not slot.is_optional:
            option = f" with {slot.enabled_by}={group.options.get(slot.enabled_by)}" if slot.enabled_by else ""
            return f"has no {slot.name}, which {schema.name}{option} reads in its step"
    for name, value in slots.items():
        known = schema.slot(name)
        shape = value.shape if isinstance(value, LazyTensor) else None
        if known is not None and (wrong := known.mismatch(value, shape, parameter.shape)) is not None:
            if shape is None:
                return f"has {wrong} as its {name}, but {schema.name} keeps a tensor there"
            return (
                f"has {name} of shape {wrong}, but a parameter of shape {parameter.shape} needs "
                f"{known.shape(parameter.shape)}"
            )
    return None
