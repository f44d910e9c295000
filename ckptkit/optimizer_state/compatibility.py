"""Whether a saved state is one that a live optimizer can go on with: its class, its slots, their shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.torch_optim import OPTIONS, OptimizerSchema
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.model import LazyTensor, NamedGroup, OptimizerState, SlotValue, parameter_shape
from ckptkit.param_groups.parameters import Inventory, LiveParameter
from ckptkit.param_groups.validate.options import torch_options

__all__ = ["StateMatch", "match_state", "refuse_other_class", "unknown_decay_findings"]

# Came to torch.optim after its first classes did: an older file of the same class does not have them.
_NEWER = frozenset(option.name for option in OPTIONS.values() if option.is_recent)
_SAME = "build the class that was saved, or start without its state"


@dataclass(frozen=True)
class StateMatch:
    """What of a state fits: the slots to load, why others do not, and which trainable parameters it has none for."""

    state: Mapping[str, Mapping[str, SlotValue]]
    dropped: Mapping[str, str]
    missing: tuple[str, ...]


def refuse_other_class(saved: OptimizerState, optimizer: Any, schema: OptimizerSchema | None) -> None:
    """Raise ``PlanError`` where the options or slots of a state are those of another class than the optimizer's.

    torch would load it, fail later, or go on as a mixture of both. Of classes outside of torch.optim nothing is known.
    """
    if schema is None:
        return
    live = type(optimizer).__name__
    defaults: Mapping[str, Any] = optimizer.defaults
    strangers = {*torch_options()} - _NEWER
    for group in saved.groups:
        if not group.options:
            continue
        decoupled = group.options.get("decoupled_weight_decay")
        wanted = defaults.get("decoupled_weight_decay")
        if isinstance(decoupled, bool) and isinstance(wanted, bool) and decoupled != wanted:
            raise PlanError(
                f"the state says decoupled_weight_decay={decoupled}, and this {live} was built with {wanted}: weight "
                "decay would change its meaning",
                hint=f"build {'AdamW' if decoupled else 'Adam'}, which was saved",
            )
        other = sorted(key for key in group.options if key not in defaults and key in strangers)
        lacking = sorted(key for key in defaults if key not in group.options and key not in _NEWER)
        if other or lacking:
            what = f"has {', '.join(other)}" if other else f"has no {', '.join(lacking)}"
            raise PlanError(f"the state is of another class than {live}: a group of it {what}", hint=_SAME)
    strange = sorted({slot for slots in saved.state.values() for slot in slots if schema.slot(slot) is None})
    if strange:
        raise PlanError(
            f"the state is of another class than {live}: it has {', '.join(strange)}, and {live} keeps "
            f"{', '.join(slot.name for slot in schema.slots)}",
            hint=_SAME,
        )


def unknown_decay_findings(saved: OptimizerState, schema: OptimizerSchema | None) -> Iterator[Finding]:
    """Yield a note where a file is of Adam or of AdamW, and too old to say of which: its decay may mean the other."""
    if schema is not None and schema.name in {"Adam", "AdamW"}:
        groups = [group.options for group in saved.groups if group.options]
        if any(options.get("weight_decay") and "decoupled_weight_decay" not in options for options in groups):
            yield Finding(
                "optim.decay-untold",
                "note",
                "",
                "the file does not say whether its weight decay was decoupled: what older versions of torch wrote of "
                "Adam and of AdamW is alike",
                f"see that it was {schema.name} that was saved",
            )


def match_state(
    saved: OptimizerState, groups: Sequence[NamedGroup], inventory: Inventory, schema: OptimizerSchema | None
) -> StateMatch:
    """Return what of ``saved`` fits the parameters of ``groups``, whose options are those to train with.

    Raises ``PlanError`` where an optimizer with one state for all parameters would get that of others.
    """
    if schema is not None and schema.has_shared_state:
        return _shared(saved, groups, schema)
    state: dict[str, Mapping[str, SlotValue]] = {}
    dropped: dict[str, str] = {}
    missing: list[str] = []
    for group in groups:
        for name in group.names:
            parameter = inventory.by_name[name]
            slots = saved.state.get(name)
            if not slots:
                keeps = schema is None or schema.slots_for(group.options, parameter.shape)
                if parameter.trainable and keeps:
                    missing.append(name)
            elif (why := _misfit(slots, parameter, group, schema)) is not None:
                dropped[name] = why
            else:
                state[name] = slots
    return StateMatch(state, dropped, tuple(missing))


def _shared(saved: OptimizerState, groups: Sequence[NamedGroup], schema: OptimizerSchema) -> StateMatch:
    names = tuple(name for group in groups for name in group.names)
    if names != saved.names:
        raise PlanError(
            f"{schema.name} keeps one state for all its parameters in their order, and the file has others, or another",
            hint="build it with the same parameters in the same order",
        )
    return StateMatch(saved.state, {}, () if saved.state else names)


def _misfit(
    slots: Mapping[str, SlotValue], parameter: LiveParameter, group: NamedGroup, schema: OptimizerSchema | None
) -> str | None:
    """Return what is wrong with the slots for this parameter, as the end of a sentence; or None."""
    if parameter.lazy:
        return "cannot be held against a parameter that has no shape before the first forward pass"
    if schema is None:
        shape = parameter_shape(slots)
        return None if shape in {None, parameter.shape} else f"is of {shape}, and the parameter {parameter.shape}"
    for slot in schema.slots_for(group.options, parameter.shape):
        if slots.get(slot.name) is None and not slot.is_optional:
            asked = f" with {slot.enabled_by}={group.options.get(slot.enabled_by)}" if slot.enabled_by else ""
            return f"has no {slot.name}, which {schema.name}{asked} reads in its step"
    for slot_name, value in slots.items():
        known = schema.slot(slot_name)
        expected = None if known is None else known.shape(parameter.shape)
        if known is None or expected is None or value is None:
            continue
        if not isinstance(value, LazyTensor):
            if known.layout != "scalar" or not isinstance(value, int | float):
                return f"has {slot_name} that is a {type(value).__name__}, where {schema.name} keeps a tensor"
        elif value.shape != expected:
            return f"has {slot_name} of {value.shape}, where {expected} belongs to a parameter of {parameter.shape}"
    return None
