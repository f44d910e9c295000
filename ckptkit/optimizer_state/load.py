"""Loading the state of an optimizer into a live one by the names of its parameters, and proving that it arrived."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import listed, plural, quoted
from ckptkit.core.torch_bridge import same_values
from ckptkit.core.torch_optim import OptimizerSchema, initial_lr, options_of_kind, schema_of
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.errors import GroupsError, PlanError
from ckptkit.optimizer_state.compatibility import StateMatch, match_state, refuse_other_class, unknown_decay_findings
from ckptkit.optimizer_state.forms import FoundState, read_state, to_dict
from ckptkit.optimizer_state.groups import Hyper, resplit
from ckptkit.optimizer_state.model import LazyTensor, NamedGroup, OptimizerState, SlotValue
from ckptkit.optimizer_state.naming import to_named
from ckptkit.optimizer_state.remap import remap
from ckptkit.param_groups.live import single_optimizer
from ckptkit.param_groups.parameters import Inventory, take_inventory
from ckptkit.param_groups.spec import is_tensor
from ckptkit.rules.model import Rules

__all__ = ["OptimizerLoadReport", "load_optimizer_state"]

# How a step is computed, and not what: what a file from a GPU says of it may not run here.
_KERNELS = options_of_kind("speed")
_MOVED = frozenset({"copy", "dropped", "new", "reset"})
StateLike = OptimizerState | FoundState | Checkpoint | Mapping[Any, Any]


@dataclass(frozen=True)
class OptimizerLoadReport(Report):
    """What was loaded, by FQN of the live model.

    ``missing`` have no state in the file, ``dropped`` one that does not fit: both keep what the optimizer had for
    them, which is nothing before its first step. ``unused`` are in the file and not in the optimizer, and
    ``reshaped`` were made of others by rules, as split or joined.
    """

    loaded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say in one line what happened."""
        counts = [f"{len(getattr(self, word))} {word}" for word in ("reshaped", "dropped", "missing", "unused")]
        return f"loaded the state of {plural(len(self.loaded), 'parameter')}: {', '.join(counts)}"

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>{super()._repr_html_()}"


def load_optimizer_state(
    optimizer: Optimizer,
    model: Module,
    state: StateLike,
    rules: Rules | list[str] | None = None,
    *,
    names: Any = None,
    hyper: Hyper = "saved",
    on_missing: Literal["keep", "error"] = "keep",
    on_unexpected: Literal["skip", "error"] = "skip",
    on_mismatch: Literal["error", "skip"] = "error",
) -> OptimizerLoadReport:
    """Load a state into ``optimizer`` by the names of its parameters, and prove by value that it is there.

    ``state`` is an ``OptimizerState``, an open Checkpoint of a state, or what ``state_dict()`` gave, in any of torch's
    forms; ``rules`` rename and move it as they do the weights. ``names`` say what a state without names counts: a
    list, or a model; without them the order and shapes of ``model`` have to leave one reading alone. Groups may be
    others than in the file, in number, order and members.

    ``hyper`` says whose options count: the ``saved`` ones, as in torch, the ``live`` ones, or neither where they differ
    (``error``). Options that the file does not have stay, and so does how a step is computed (``foreach``, ``fused``,
    ``capturable``, ``differentiable``). ``on_missing`` and ``on_mismatch`` speak of trainable parameters without state,
    and with one of another shape; ``on_unexpected`` of state that the optimizer has no parameter for.

    torch's ``load_state_dict`` does the loading, so its hooks run, and it casts to the parameters' dtype and device;
    only single numbers keep their dtype. No step is made, gradients play no part, and no memory is shared with
    ``state``. Everything is checked before the optimizer is changed, and it is put back where loading fails.

    Raises ``PlanError`` where a policy says so, where an optimizer of another class was saved, or where nothing would
    be loaded, ``GroupsError`` where the optimizer is not that of ``model`` or does not have the values afterwards.
    """
    _check_policies(hyper, on_missing, on_unexpected, on_mismatch)
    inner = single_optimizer(optimizer)
    inventory = take_inventory(model)
    live = _live_groups(inner, inventory)
    saved, strays = _named(state, names, model, on_unexpected, rules=rules)
    schema = schema_of(type(inner))
    refuse_other_class(saved, inner, schema)
    if rules is not None:
        saved = remap(saved, rules)
    saved, unused = _of_the_model(saved, inventory, live)
    unused += strays
    if unused and on_unexpected == "error":
        raise PlanError(
            f"the optimizer has no {listed(unused)}, which the state has",
            hint='rename it with rules, or leave it out: on_unexpected="skip"',
        )
    _refuse_moves(saved, schema)
    groups = _options(saved, live, hyper)
    fit = match_state(saved, groups, inventory, schema)
    _refuse(fit, saved, on_missing, on_mismatch)
    findings = [*_findings(fit, unused), *_rates(live, groups), *unknown_decay_findings(saved, schema)]
    _load(inner, replace(saved, state=fit.state, groups=groups), fit, inventory, schema)
    return OptimizerLoadReport(
        tuple(findings),
        PlanError,
        loaded=tuple(fit.state),
        dropped=tuple(fit.dropped),
        missing=fit.missing,
        unused=tuple(unused),
        reshaped=tuple(change.name for change in saved.changes if change.operation not in _MOVED),
    )


def _check_policies(hyper: str, on_missing: str, on_unexpected: str, on_mismatch: str) -> None:
    known = {
        "hyper": (hyper, ("live", "saved", "error")),
        "on_missing": (on_missing, ("keep", "error")),
        "on_unexpected": (on_unexpected, ("skip", "error")),
        "on_mismatch": (on_mismatch, ("error", "skip")),
    }
    for name, (given, choices) in known.items():
        if given not in choices:
            raise PlanError(f"{name} is {quoted(str(given))}", hint=f"it is {' or '.join(choices)}")


def _live_groups(optimizer: Any, inventory: Inventory) -> tuple[NamedGroup, ...]:
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        names = []
        for index, tensor in enumerate(group["params"]):
            parameter = inventory.parameters.get(id(tensor))
            if parameter is None:
                raise GroupsError(
                    f"group {number}[{index}] {tuple(tensor.shape)} is no parameter of the model",
                    hint="validate_param_groups(model, optimizer) says what it was; build the optimizer again",
                )
            names.append(parameter.name)
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append(NamedGroup(tuple(names), options))
    return tuple(groups)


def _named(
    state: StateLike, names: Any, model: Any, on_unexpected: str, *, rules: Any
) -> tuple[OptimizerState, list[str]]:
    """Return the state by name, and the keys of what is in no group of its own."""
    if isinstance(state, OptimizerState):
        return state, []
    found = state if isinstance(state, FoundState) else read_state(state)
    counted = {param for group in found.groups for param in group.params}
    strays = [str(key) for key in found.state if key not in counted]
    drop = on_unexpected == "skip"
    if names is not None:
        return to_named(found, names, drop_strays=drop), strays
    try:
        return to_named(found, drop_strays=drop), strays
    except PlanError:
        if rules is not None:  # they speak of names that the live model does not have
            raise
    return to_named(found, model, drop_strays=drop), strays


def _of_the_model(
    saved: OptimizerState, inventory: Inventory, live: Sequence[NamedGroup]
) -> tuple[OptimizerState, list[str]]:
    """Return the state by the names of the live model, without what the optimizer lacks, and the names of that."""
    held = {name for group in live for name in group.names}
    found: dict[str, str] = {}
    taken: set[str] = set()
    unused: list[str] = []
    for name in saved.names:
        parameter = inventory.named(name)
        if parameter is None or parameter.name not in held:
            unused.append(name)
        elif parameter.name in taken:
            raise PlanError(
                f"the state has {quoted(parameter.name)} twice, once as {quoted(name)}",
                hint='leave one of them out with a rule: {"from": NAME, "drop": true}',
            )
        else:
            found[name] = parameter.name
            taken.add(parameter.name)
    groups = tuple(
        replace(group, names=tuple(found[name] for name in group.names if name in found)) for group in saved.groups
    )
    state = {found[name]: slots for name, slots in saved.state.items() if name in found}
    changes = tuple(replace(one, name=found.get(one.name, one.name)) for one in saved.changes)
    return replace(saved, state=state, groups=groups, changes=changes), unused


def _refuse_moves(saved: OptimizerState, schema: OptimizerSchema | None) -> None:
    moved = [change for change in saved.changes if change.operation not in _MOVED]
    if schema is not None and not schema.is_elementwise and moved:
        raise PlanError(
            f"{quoted(moved[0].name)} was made by {moved[0].operation}: {schema.name} computes each update from the "
            "whole parameter, so that with the same state it would train otherwise",
            hint="drop its state, so that it starts anew",
        )


def _options(saved: OptimizerState, live: Sequence[NamedGroup], hyper: Hyper) -> tuple[NamedGroup, ...]:
    """Return the live groups with the options that count: their own, or those of the file for the same parameters."""
    if hyper == "live":
        return tuple(live)
    groups = [
        replace(group, options={key: value for key, value in group.options.items() if key not in _KERNELS})
        for group in saved.groups
        if group.names
    ]
    there = {name for group in groups for name in group.names}
    known = [group for group in live if there.intersection(group.names)]
    made = iter(resplit(replace(saved, groups=tuple(groups)), known, hyper).groups)
    return tuple(next(made) if there.intersection(group.names) else group for group in live)


def _refuse(fit: StateMatch, saved: OptimizerState, on_missing: str, on_mismatch: str) -> None:
    if fit.missing and on_missing == "error":
        raise PlanError(
            f"the file has no state for {listed(fit.missing)}",
            hint='rename with rules what is called otherwise, or let them start anew: on_missing="keep"',
        )
    if fit.dropped and on_mismatch == "error":
        name, why = next(iter(fit.dropped.items()))
        more = f", and {len(fit.dropped) - 1:,} more do not fit" if len(fit.dropped) > 1 else ""
        raise PlanError(
            f"the state of {quoted(name)} {why}{more}",
            hint='let them start anew: on_mismatch="skip", or move it with rules as the weights were',
        )
    if not fit.state and fit.missing and not saved.state and saved.names:
        raise PlanError(
            "nothing would be loaded: the file has groups, and no state",
            hint="it was saved before the first step: start without it",
        )
    if not fit.state and (fit.missing or fit.dropped):
        raise PlanError(
            "nothing would be loaded: the file has state for none of the optimizer's parameters that fits",
            hint="its names are those of another model: rename them with rules",
        )


def _load(
    optimizer: Any, state: OptimizerState, fit: StateMatch, inventory: Inventory, schema: OptimizerSchema | None
) -> None:
    given = to_dict(state, "indexed")
    for group, live in zip(given["param_groups"], optimizer.param_groups, strict=True):
        if "param_names" in live:
            group["param_names"] = list(live["param_names"])
        group.update({key: _as_live(value, live.get(key)) for key, value in group.items() if key != "params"})
    own = dict(optimizer.state)
    put_back = _remember(optimizer)
    try:
        try:
            optimizer.load_state_dict(given)
        except Exception as error:  # hooks, and classes of other people, may raise anything
            raise GroupsError(f"load_state_dict refused: {' '.join(str(error).split())}") from error
        # Not given to torch, which would cast it, and drops what is kept under other keys than parameters.
        kept = [inventory.by_name[name].tensor for name in (*fit.missing, *fit.dropped)]
        for key in (*kept, *(key for key in own if not is_tensor(key) and key not in optimizer.state)):
            if key in own:
                optimizer.state[key] = own[key]
        if schema is not None:
            _keep_scalars(optimizer, fit, inventory, schema)
        _prove(optimizer, fit, inventory)
    except BaseException:
        put_back()
        raise


def _keep_scalars(optimizer: Any, fit: StateMatch, inventory: Inventory, schema: OptimizerSchema) -> None:
    """Undo the cast of single numbers: NAdam keeps a product in 32 bits whatever the dtype of the parameter."""
    scalars = {slot.name for slot in schema.slots if slot.layout == "scalar"} - {"step"}  # which torch leaves alone
    for name, slots in fit.state.items():
        there = optimizer.state.get(inventory.by_name[name].tensor, {})
        for slot in scalars & slots.keys() & there.keys():
            saved = slots[slot]
            value = saved.read() if isinstance(saved, LazyTensor) else None
            if value is not None and is_tensor(there[slot]) and there[slot].dtype != value.dtype:
                there[slot] = value.to(there[slot].device)


def _remember(optimizer: Any) -> Callable[[], None]:
    """Return what puts groups and state back; torch makes both anew, but a hook may have written into these."""
    groups, state = optimizer.param_groups, optimizer.state
    tables = [(table, dict(table)) for table in (*groups, *state.values()) if isinstance(table, dict)]
    listed, keyed = list(groups), dict(state)

    def put_back() -> None:
        for table, was in tables:
            table.clear()
            table.update(was)
        groups[:] = listed
        state.clear()
        state.update(keyed)
        optimizer.param_groups, optimizer.state = groups, state

    return put_back


def _prove(optimizer: Any, fit: StateMatch, inventory: Inventory) -> None:
    """Hold what is there against the state once more: what was given may be the very tensors that are there."""
    for name, slots in fit.state.items():
        there = optimizer.state.get(inventory.by_name[name].tensor, {})
        for slot, value in slots.items():
            if not _same(there.get(slot), value):
                raise GroupsError(
                    f"{slot} of {quoted(name)} does not have the value of the state after loading",
                    hint="a hook of the optimizer changed it, or load_state_dict of torch, which keeps no text",
                )


def _same(there: Any, value: SlotValue) -> bool:
    """Return whether a slot is the saved one, as torch casts it to the dtype of the parameter, or its number."""
    if isinstance(value, LazyTensor):
        if not is_tensor(there) or tuple(there.shape) != value.shape:
            return False
        return same_values(there.detach().to("cpu").resolve_conj().resolve_neg(), value.read_shared())
    if isinstance(value, list | tuple):
        return isinstance(there, list | tuple) and len(there) == len(value) and all(map(_same, there, value))
    if isinstance(value, Mapping):
        return isinstance(there, Mapping) and all(_same(there.get(key), inner) for key, inner in value.items())
    if isinstance(value, float) and math.isnan(value):
        return isinstance(there, float) and math.isnan(there)
    return bool(there == value)  # also a tensor, which torch makes of the plain step of an old file


def _as_live(value: Any, live: Any) -> Any:
    """Return an option as the optimizer has it: a captured step reads no number, and others may take no tensor."""
    import torch

    if isinstance(live, torch.Tensor) and (isinstance(value, int | float | torch.Tensor)):
        return torch.as_tensor(value, dtype=live.dtype, device=live.device).detach().clone()
    if isinstance(live, int | float) and isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(live, list | tuple) and isinstance(value, list | tuple) and len(live) == len(value):
        made = list(map(_as_live, value, live))
        return tuple(made) if isinstance(live, tuple) else made
    return value


def _findings(fit: StateMatch, unused: Sequence[str]) -> Iterator[Finding]:
    for name in fit.missing:
        yield Finding(
            "optim.missing",
            "warning",
            name,
            f"there is no state for {quoted(name)}, which starts anew",
            "rename with rules what is called otherwise in the file",
        )
    for name, why in fit.dropped.items():
        yield Finding(
            "optim.dropped",
            "warning",
            name,
            f"the state of {quoted(name)} was not loaded: it {why}",
            "move it with rules as the weights were, if it is to go on",
        )
    for name in unused:
        yield Finding(
            "optim.unused",
            "note",
            name,
            f"the state of {quoted(name)} was not loaded: the optimizer has no such parameter",
            "rename it with rules, if it is called otherwise in the model",
        )


def _rates(live: Sequence[NamedGroup], groups: Sequence[NamedGroup]) -> Iterator[Finding]:
    for number, (before, after) in enumerate(zip(live, groups, strict=True)):
        rate, initial = initial_lr(before.options), after.options.get("initial_lr")
        if isinstance(rate, int | float) and isinstance(initial, int | float) and rate != initial:
            yield Finding(
                "optim.initial-lr",
                "warning",
                "",
                f"group {number} was built with lr={rate:g} and now has the initial_lr={initial:g} of the file: a "
                "scheduler that is built from here on counts from that",
                'load with hyper="live" to keep the groups, or build the scheduler first and load its state too',
            )
