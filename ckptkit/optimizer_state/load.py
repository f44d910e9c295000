"""Load the state of an optimizer into a live one by parameter names, and prove that it was loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast, get_args

from ckptkit.core.arguments import require_choice, require_flags
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import Finding, Report
from ckptkit.core.patterns import literal, pattern_for
from ckptkit.core.text import listed, plural, quoted
from ckptkit.core.torch_bridge import (
    has_same_layout,
    in_layout_of,
    is_composite,
    is_plain,
    same_composites,
    same_values,
)
from ckptkit.core.torch_optim import OptimizerSchema, initial_lr, options_of_kind, scheduled_options, schema_of
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.errors import GroupsError, PlanError
from ckptkit.inputs import opened_optimizer, rules_for
from ckptkit.optimizer_state import codes
from ckptkit.optimizer_state.casts import cast_findings
from ckptkit.optimizer_state.compatibility import StateMatch, match_state, refuse_other_class, unknown_decay_findings
from ckptkit.optimizer_state.forms import FoundState, read_state, to_dict
from ckptkit.optimizer_state.groups import Hyper, equal_values, resplit
from ckptkit.optimizer_state.model import LazyTensor, MoreValues, NamedGroup, OptimizerState, SlotValue, tensors_in
from ckptkit.optimizer_state.names_file import read_names_file
from ckptkit.optimizer_state.naming import NamesLike, naming_findings, to_named, to_named_for
from ckptkit.optimizer_state.remapping import remap
from ckptkit.param_groups.live import read_groups, single_optimizer
from ckptkit.param_groups.parameters import LiveModel, read_live_model
from ckptkit.param_groups.spec.fields import is_tensor
from ckptkit.plans.policies import MISSING_ACTIONS, MissingAction, OnMissing, Policy, parse_policy
from ckptkit.rules.load import as_rules
from ckptkit.rules.model import RulesLike

__all__ = ["OptimizerLoadReport", "load_optimizer_state"]

StateLike = OptimizerState | FoundState | Checkpoint | Mapping[str, object]
SkipAction: TypeAlias = Literal["skip", "error"]
SKIP_ACTIONS: tuple[SkipAction, ...] = get_args(SkipAction)
# One action for every parameter, or an action for each pattern of names.
OnSkip: TypeAlias = SkipAction | Mapping[str, SkipAction]
# These options tell how a step is computed, not its result. What a file from a GPU has may not work on this machine.
_SPEED_OPTIONS = options_of_kind("speed")
_MEMBER_OPTIONS = options_of_kind("members")
_DROP_STATE = "drop its state first: ckpt optim prune PATH -o OUT --reset PATTERN"


@dataclass(frozen=True, repr=False)
class OptimizerLoadReport(Report):
    """The result of a load, by FQN of the live model.

    - ``loaded``: the state was loaded.
    - ``missing``: the file has no state for the parameter.
    - ``dropped``: the state in the file does not fit.
    - ``unused``: the file has state, but the optimizer has no such parameter.
    - ``reshaped``: rules made the state from the state of other parameters, for example by a split.

    A parameter in ``missing`` or ``dropped`` keeps the state that the optimizer had for it, if any.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> old, new = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(2))
        >>> model(torch.ones(2)).sum().backward()
        >>> old.step()
        >>> report = ckptkit.load_optimizer_state(new, model, old.state_dict())
        >>> report.loaded, report.missing
        (('weight', 'bias'), ())
    """

    loaded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        counts = [f"{len(getattr(self, word))} {word}" for word in ("reshaped", "dropped", "missing", "unused")]
        return f"loaded the state of {plural(len(self.loaded), 'parameter')}: {', '.join(counts)}"


def load_optimizer_state(
    optimizer: Optimizer,
    model: Module,
    state: StateLike | str | os.PathLike[str],
    rules: RulesLike | None = None,
    *,
    names: NamesLike | str | os.PathLike[str] | None = None,
    hyper: Hyper = "saved",
    on_missing: OnMissing = "keep",
    on_unexpected: OnSkip = "skip",
    on_mismatch: OnSkip = "error",
    allow_overflow: bool = False,
) -> OptimizerLoadReport:
    """Load a state into ``optimizer`` by the names of its parameters, and compare the values afterwards.

    ``state`` is an ``OptimizerState``, the path of a state, an open Checkpoint of one, or a ``state_dict()`` in any
    form of torch. A path is opened as by ``open_optimizer``, and closed at the end. ``rules``, as for the weights,
    rename and move the state as they do the weights. The groups of the optimizer can differ from those of the file in
    number, order and members.

    A state without names is read by position, as torch reads it, if the sizes of the groups and all shapes agree with
    the optimizer. If they do not, the order and the shapes of ``model`` must allow exactly one assignment; else those
    of the weights in the same file. With ``rules``, which start from the names in the file, only these weights count.
    A note says how the state was read. ``names`` reads it otherwise: ``"model"`` takes the order of ``model``, another
    model gives its own order, and a list, or the path of a text file, has the names in the order of the state.

    - ``hyper`` chooses the options: from the file (``saved``), from the optimizer (``live``), or an error if they
      differ (``error``). The optimizer keeps every option that the file does not have. It always keeps its
      options for speed (``foreach``, ``fused``, ``capturable``, ``differentiable``).
    - ``on_missing`` is for trainable parameters without state in the file: ``keep`` or ``error``.
    - ``on_unexpected`` is for state of parameters that the optimizer does not have: ``skip`` or ``error``.
    - ``on_mismatch`` is for state that does not fit its parameter: ``error`` or ``skip``.
    - Each of these three is one action, or a mapping of patterns of names to actions as in ``plan_merge``. The patterns
      match the names of parameters, and those of ``on_unexpected`` match the names in the state after the rules.
    - ``allow_overflow`` loads values that the cast to the dtype of the parameter makes inf; a finding has their count.

    The ``load_state_dict()`` of torch loads the state, so its hooks run, and it casts the state to the dtype and the
    device of the parameter. Single numbers keep their dtype. No step is made, gradients are not used, and no memory is
    shared with ``state``. Everything is checked before the optimizer is changed, and it is restored if loading fails.

    Raises ``ArgumentError`` for an unknown action. Raises ``RuleError`` for a wrong rule, and for a pattern that
    decides about no name, unless ``rules`` allow unused rules.
    Raises ``PlanError`` if a policy demands it, if another optimizer class was saved, or if nothing would be loaded.
    It is also raised if a cast would make inf of finite values.
    Raises ``GroupsError`` if the optimizer does not belong to ``model``, or has other values after the load.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> old, new = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(2))
        >>> model(torch.ones(2)).sum().backward()
        >>> old.step()
        >>> ckptkit.load_optimizer_state(new, model, old.state_dict()).loaded
        ('weight', 'bias')
    """
    require_flags(allow_overflow=allow_overflow)
    require_choice(hyper, get_args(Hyper), "hyper")
    policies = _Policies(
        parse_policy("on_missing", on_missing, MISSING_ACTIONS),
        parse_policy("on_unexpected", on_unexpected, SKIP_ACTIONS),
        parse_policy("on_mismatch", on_mismatch, SKIP_ACTIONS),
    )
    with opened_optimizer(state) as found:
        return _load_state(
            optimizer,
            model,
            cast("StateLike", found),
            rules_for(rules, found) if rules is not None and isinstance(found, Checkpoint) else rules,
            names=names,
            hyper=hyper,
            policies=policies,
            allow_overflow=allow_overflow,
        )


@dataclass(frozen=True, slots=True)
class _Policies:
    on_missing: Policy[MissingAction]
    on_unexpected: Policy[SkipAction]
    on_mismatch: Policy[SkipAction]

    def refuse_unused(self, saved: Collection[str], live: Collection[str], *, allow_unused: bool) -> None:
        """Raise ``RuleError`` for a pattern that decides about no name, unless ``allow_unused``."""
        self.on_missing.unused(live, "the optimizer", allow_unused=allow_unused)
        self.on_mismatch.unused(live, "the optimizer", allow_unused=allow_unused)
        self.on_unexpected.unused(saved, "the state", allow_unused=allow_unused)


def _load_state(
    optimizer: Optimizer,
    model: Module,
    state: StateLike,
    rules: RulesLike | None,
    *,
    names: NamesLike | str | os.PathLike[str] | None,
    hyper: Hyper,
    policies: _Policies,
    allow_overflow: bool,
) -> OptimizerLoadReport:
    inner = single_optimizer(optimizer)
    _refuse_state_of_wrapper(optimizer, inner)
    live_model = read_live_model(model)
    live_groups = _live_groups(inner, live_model)
    drop_strays = "skip" in policies.on_unexpected.actions
    saved, strays = _named(state, names, model, live_groups, drop_strays=drop_strays, has_rules=rules is not None)
    if optimizer is not inner and saved.more.state:  # the wrapper wrote these values into the state of the optimizer
        raise _wrapper_error(optimizer, inner)
    schema = schema_of(type(inner))
    refuse_other_class(saved, inner, schema)
    parsed = as_rules(rules)
    if rules is not None:
        saved = remap(saved, parsed)
    live_names = [name for group in live_groups for name in group.names]
    policies.refuse_unused([*saved.names, *strays, *saved.more.names], live_names, allow_unused=parsed.allow_unused)
    saved, unused = _with_live_names(saved, live_model, live_groups)
    unused += strays
    _refuse_unexpected([name for name in unused if policies.on_unexpected.action(name) == "error"])
    _refuse_moved_elements(saved, schema)
    _refuse_hidden_parameters(saved, live_groups)
    groups = _chosen_options(saved, live_groups, hyper)
    with_state = [name for name, live in live_model.by_name.items() if inner.state.get(live.tensor)]
    match = match_state(saved, groups, live_model, schema, with_state=with_state)
    _refuse_by_policy(match, saved, policies)
    findings = [
        *naming_findings(saved),
        *_match_findings(match, unused),
        *_initial_lr_findings(live_groups, groups),
        *unknown_decay_findings(saved, schema),
        *cast_findings(match.state, live_model, schema, allow_overflow=allow_overflow),
    ]
    if not saved.state and saved.names:
        findings.append(codes.OPTIONS_ONLY.finding("", "the file has no state, so only the options were loaded"))
    chosen = replace(saved, state=match.state, groups=groups)
    unread = _load(inner, chosen, match, live_model, schema, on_unexpected=policies.on_unexpected)
    findings += unread
    return OptimizerLoadReport(
        tuple(findings),
        PlanError,
        loaded=tuple(match.state),
        dropped=tuple(match.dropped),
        missing=match.missing,
        unused=tuple(unused),
        reshaped=tuple(change.name for change in saved.changes if change.moves_elements),
    )


def _refuse_state_of_wrapper(optimizer: Optimizer, inner: Optimizer) -> None:
    """Raise ``PlanError`` if a wrapper saves more than the optimizer inside, as slow weights."""
    if optimizer is inner:
        return
    try:
        keys = [_keys_of(each.state_dict()) for each in (optimizer, inner)]
    except Exception:  # noqa: BLE001 - accelerate and others have conditions of their own
        return
    if keys[0] != keys[1]:
        raise _wrapper_error(optimizer, inner)


def _wrapper_error(optimizer: Optimizer, inner: Optimizer) -> PlanError:
    outer = type(optimizer).__name__
    return PlanError(
        f"{outer} keeps state of its own around {type(inner).__name__}, which cannot be loaded by name",
        hint=f"load it with the load_state_dict() of {outer}",
    )


def _keys_of(saved: Mapping[str, Any]) -> object:
    """Return the keys of a state, and the slots of each of its entries."""
    entries = saved.get("state", {})
    return set(saved), {key: set(slots) if isinstance(slots, Mapping) else None for key, slots in entries.items()}


def _live_groups(optimizer: Optimizer, live_model: LiveModel) -> tuple[NamedGroup, ...]:
    groups = []
    pairs = [(live, group) for live in read_groups(optimizer).optimizers for group in live.groups]
    for live, group in pairs:
        names = []
        for member in live.members_of(group):
            parameter = live_model.parameters.get(id(member.tensor))
            if parameter is None:
                raise GroupsError(
                    f"{member.where} {member.shape} is not a parameter of the model",
                    hint="validate_param_groups(model, optimizer) tells what it was; build the optimizer again",
                )
            names.append(parameter.name)
        options = {key: value for key, value in group.options.items() if key not in _MEMBER_OPTIONS}
        groups.append(NamedGroup(tuple(names), options))
    return tuple(groups)


def _named(
    state: StateLike,
    names: NamesLike | str | os.PathLike[str] | None,
    model: Module,
    live_groups: Sequence[NamedGroup],
    *,
    drop_strays: bool,
    has_rules: bool,
) -> tuple[OptimizerState, list[str]]:
    """Return the state by name, and the keys of its parameters that are in no group."""
    if isinstance(state, OptimizerState):
        return state, []
    found = state if isinstance(state, FoundState) else read_state(state)
    params = {param for group in found.groups for param in group.params}
    strays = [str(key) for key in found.state if key not in params]
    if isinstance(names, str | os.PathLike):
        names = model if names == "model" else read_names_file(os.fspath(names))
    if names is not None:
        return to_named(found, names, drop_strays=drop_strays), strays
    # The rules rename names that the live model does not have, so the model cannot name the state.
    if found.form != "indexed" or has_rules:
        return to_named(found, drop_strays=drop_strays), strays
    return to_named_for(found, model, [group.names for group in live_groups], drop_strays=drop_strays), strays


def _with_live_names(
    saved: OptimizerState, live_model: LiveModel, live_groups: Sequence[NamedGroup]
) -> tuple[OptimizerState, list[str]]:
    """Return the state by the names of the live model, and the saved names that the optimizer does not have."""
    in_optimizer = {name for group in live_groups for name in group.names}
    live_names: dict[str, str] = {}
    used: set[str] = set()
    unused: list[str] = []
    for name in saved.names:
        parameter = live_model.named(name)
        if parameter is None or parameter.name not in in_optimizer:
            unused.append(name)
        elif parameter.name in used:
            raise PlanError(
                f"the state has {quoted(parameter.name)} twice, once as {quoted(name)}",
                hint='drop one of them with a rule: {"from": NAME, "drop": true}',
            )
        else:
            live_names[name] = parameter.name
            used.add(parameter.name)
    groups = tuple(
        replace(group, names=tuple(live_names[name] for name in group.names if name in live_names))
        for group in saved.groups
    )
    state = {live_names[name]: slots for name, slots in saved.state.items() if name in live_names}
    changes = tuple(replace(change, name=live_names.get(change.name, change.name)) for change in saved.changes)
    return replace(saved, state=state, groups=groups, changes=changes), unused


def _refuse_moved_elements(saved: OptimizerState, schema: OptimizerSchema | None) -> None:
    moved = [change for change in saved.changes if change.moves_elements]
    if schema is not None and not schema.is_elementwise and moved:
        raise PlanError(
            f"the rules made {quoted(moved[0].name)} by {moved[0].operation}, but {schema.name} computes each update "
            "from the whole parameter, so the moved state would train otherwise",
            hint=_DROP_STATE,
        )


def _refuse_hidden_parameters(saved: OptimizerState, live_groups: Sequence[NamedGroup]) -> None:
    """Raise ``PlanError`` if values of no parameter seem to be of parameters after all: by tensor, or by position.

    By position, they are loaded only into an optimizer of the same parameters in the same order.
    """
    live = [name for group in live_groups for name in group.names]
    values = {**saved.more.keys, **saved.more.state}
    by_tensor = [key for key, value in values.items() if isinstance(value, Mapping) and any(map(is_tensor, value))]
    if by_tensor:
        raise PlanError(
            f"the state has tensors as the keys of {quoted(by_tensor[0])}, which are not those of the optimizer",
            hint="load it with the load_state_dict() of the optimizer",
        )
    with_tensors = [key for key, value in values.items() if next(tensors_in(value), None) is not None]
    if with_tensors and (live != list(saved.names) or any(change.moves_elements for change in saved.changes)):
        raise PlanError(
            f"the state has tensors in {quoted(with_tensors[0])}, which can be by position, and the optimizer has "
            "other parameters or another order",
            hint="build the optimizer with the same parameters in the same order, or remove the key from the state",
        )


def _chosen_options(saved: OptimizerState, live_groups: Sequence[NamedGroup], hyper: Hyper) -> tuple[NamedGroup, ...]:
    """Return the live groups with the options that ``hyper`` chooses for their parameters."""
    if hyper == "live":
        return tuple(live_groups)
    groups = [
        replace(group, options={key: value for key, value in group.options.items() if key not in _SPEED_OPTIONS})
        for group in saved.groups
        if group.names
    ]
    in_file = {name for group in groups for name in group.names}
    to_resplit = [group for group in live_groups if in_file.intersection(group.names)]
    resplit_groups = iter(resplit(replace(saved, groups=tuple(groups)), to_resplit, hyper).groups)
    chosen = [next(resplit_groups) if in_file.intersection(group.names) else group for group in live_groups]
    if [group.names for group in saved.groups] == [group.names for group in live_groups]:
        pairs = zip(chosen, saved.groups, strict=True)  # a group without parameters has only its number
        chosen = [
            group if group.names else replace(group, options={**group.options, **same.options}) for group, same in pairs
        ]
    return tuple(chosen)


def _refuse_unexpected(names: Sequence[str]) -> None:
    if names:
        skip = f'on_unexpected={{"{pattern_for(names[0], names)}": "skip"}}'
        raise PlanError(
            f"the state has {listed(names)}, which the optimizer does not have",
            hint=f"rename it with rules, or leave it out: {skip}",
        )


def _refuse_by_policy(match: StateMatch, saved: OptimizerState, policies: _Policies) -> None:
    missing = [name for name in match.missing if policies.on_missing.action(name) == "error"]
    if missing:
        keep = f'on_missing={{"{pattern_for(missing[0], missing)}": "keep"}}'
        raise PlanError(
            f"the file has no state for {listed(missing)}",
            hint=f"rename with rules what has another name in the file, or start without state: {keep}",
        )
    refused = [name for name in match.dropped if policies.on_mismatch.action(name) == "error"]
    if refused:
        more = f" (and {len(refused) - 1:,} more do not fit)" if len(refused) > 1 else ""
        skip = f'on_mismatch={{"{pattern_for(refused[0], refused)}": "skip"}}'
        raise PlanError(
            f"the state of {quoted(refused[0])} {match.dropped[refused[0]]}{more}",
            hint=f"move it with the rules that moved the weights, or start without this state: {skip}",
        )
    if not match.state and match.missing and not saved.state and saved.names:
        raise PlanError(
            "nothing would be loaded: the file has groups but no state",
            hint="it was saved before the first step, so start without it",
        )
    if not match.state and (match.missing or match.dropped):
        raise PlanError(
            "nothing would be loaded: the file has no state that fits a parameter of the optimizer",
            hint="the file has the names of another model: rename them with rules",
        )


def _load(
    optimizer: Optimizer,
    state: OptimizerState,
    match: StateMatch,
    live_model: LiveModel,
    schema: OptimizerSchema | None,
    *,
    on_unexpected: Policy[SkipAction],
) -> list[Finding]:
    """Load the state, and return findings about the values of no parameter that the optimizer did not take."""
    given = to_dict(state, "indexed")
    _follow_live_layouts(given, state, live_model, schema)
    for group, live in zip(given["param_groups"], optimizer.param_groups, strict=True):
        if "param_names" in live:
            group["param_names"] = list(live["param_names"])
        if schema is not None:  # another class decides by itself when a number becomes a tensor
            group.update({key: _like_live(value, live.get(key)) for key, value in group.items() if key != "params"})
    before = dict(optimizer.state)
    restore = _snapshot(optimizer)
    try:
        try:
            optimizer.load_state_dict(given)
        except Exception as error:  # hooks, and optimizers from other packages, can raise anything
            raise GroupsError(f"load_state_dict failed: {' '.join(str(error).split())}") from error
        # torch would cast this state, and drops state under keys that are not parameters, so it was not given to torch.
        kept = [live_model.by_name[name].tensor for name in (*match.missing, *match.dropped)]
        for key in (*kept, *(key for key in before if not is_tensor(key) and key not in optimizer.state)):
            if key in before:
                optimizer.state[key] = before[key]
        if schema is not None:
            _restore_scalar_dtypes(optimizer, match, live_model, schema)
        _compare_values(optimizer, match, live_model)
        _compare_layouts(optimizer, given, state, live_model)
        return _unread_values(optimizer, state.more, on_unexpected)
    except BaseException:
        restore()
        raise


def _unread_values(optimizer: Optimizer, more: MoreValues, on_unexpected: Policy[SkipAction]) -> list[Finding]:
    """Return a finding for each value of no parameter that the loaded optimizer would not save again."""
    if not more:
        return []
    try:
        now: object = optimizer.state_dict()
    except Exception:  # noqa: BLE001 - hooks of the user, and optimizers that gather their state from other processes
        return []
    found = now if isinstance(now, Mapping) else {}
    in_state = found.get("state")
    pairs = [(key, value, found) for key, value in more.keys.items()]
    pairs += [(key, value, in_state) for key, value in more.state.items() if isinstance(in_state, Mapping)]
    findings = []
    for key, value, saved_again in pairs:
        if key in saved_again and _is_same(saved_again[key], value):
            continue
        if key not in saved_again and on_unexpected.action(key) == "error":
            raise PlanError(
                f"the state has {quoted(key)}, which the optimizer does not have",
                hint=f'leave it out: on_unexpected={{"{literal(key)}": "skip"}}',
            )
        if key in saved_again or not _has_own_load(optimizer):
            reason = "is not that of the file after loading" if key in saved_again else "was not loaded"
            hint = "torch reads it only in a hook: optimizer.register_load_state_dict_pre_hook()"
            findings.append(codes.KEY_UNREAD.finding(key, f"{quoted(key)} of the optimizer {reason}", hint))
        else:
            message = f"the optimizer was given {quoted(key)} of the file, and its state_dict() has no such key"
            findings.append(codes.KEY_UNREAD.finding(key, message, severity="note"))
    return findings


def _has_own_load(optimizer: Optimizer) -> bool:
    """Return whether code outside of torch sees the state before it is loaded: a hook, or a method of the class."""
    return _loads_by_itself(optimizer) or bool(getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None))


def _loads_by_itself(optimizer: Optimizer) -> bool:
    """Return whether the class has a ``load_state_dict()`` of its own, which decides how it keeps its state."""
    import torch

    return type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict


def _follow_live_layouts(
    given: Mapping[str, Any], state: OptimizerState, live_model: LiveModel, schema: OptimizerSchema | None
) -> None:
    """Lay each elementwise slot out as its parameter, because a fused step reads both in the order of memory.

    Nothing is known about the slots of other optimizers, so these keep the layout of the file, as in torch.
    """
    elementwise = {slot.name for slot in (schema.slots if schema else ()) if slot.layout == "elementwise"}
    for place, name in enumerate(state.names):
        parameter, slots = live_model.by_name[name].tensor, given["state"].get(place, {})
        if is_plain(parameter):
            for slot in elementwise & slots.keys():
                if is_plain(slots[slot]) and slots[slot].shape == parameter.shape:
                    slots[slot] = in_layout_of(slots[slot], parameter)


def _compare_layouts(
    optimizer: Optimizer, given: Mapping[str, Any], state: OptimizerState, live_model: LiveModel
) -> None:
    """Raise ``GroupsError`` if a slot has another memory layout than torch was given."""
    if _loads_by_itself(optimizer):
        return
    for place, name in enumerate(state.names):
        loaded = optimizer.state.get(live_model.by_name[name].tensor, {})
        for slot, value in given["state"].get(place, {}).items():
            found = loaded.get(slot)
            if is_plain(value) and is_plain(found) and not has_same_layout(found, value):
                raise GroupsError(
                    f"{slot} of {quoted(name)} has the strides {tuple(found.stride())} after loading, not the saved "
                    f"{tuple(value.stride())}",
                    hint="a hook of the optimizer changed its memory layout",
                )


def _restore_scalar_dtypes(
    optimizer: Optimizer, match: StateMatch, live_model: LiveModel, schema: OptimizerSchema
) -> None:
    """Undo the cast of single numbers, because NAdam keeps a product in 32 bits for a parameter of any dtype."""
    scalars = {slot.name for slot in schema.slots if slot.layout == "scalar"} - {"step"}  # torch does not cast step
    for name, slots in match.state.items():
        loaded = optimizer.state.get(live_model.by_name[name].tensor, {})
        for slot in scalars & slots.keys() & loaded.keys():
            saved = slots[slot]
            value = saved.read() if isinstance(saved, LazyTensor) else None
            if value is not None and is_tensor(loaded[slot]) and loaded[slot].dtype != value.dtype:
                loaded[slot] = value.to(loaded[slot].device)


def _snapshot(optimizer: Optimizer) -> Callable[[], None]:
    """Return a function that restores groups and state; torch replaces both, but a hook can change them in place."""
    groups, state = optimizer.param_groups, optimizer.state
    tables = [(table, dict(table)) for table in (*groups, *state.values()) if isinstance(table, dict)]
    group_list, state_items = list(groups), dict(state)

    def restore() -> None:
        for table, content in tables:
            table.clear()
            table.update(content)
        groups[:] = group_list
        state.clear()
        state.update(state_items)
        optimizer.param_groups, optimizer.state = groups, state

    return restore


def _compare_values(optimizer: Optimizer, match: StateMatch, live_model: LiveModel) -> None:
    """Raise ``GroupsError`` if the optimizer does not have the saved values."""
    for name, slots in match.state.items():
        loaded = optimizer.state.get(live_model.by_name[name].tensor, {})
        expected = _unwrapped(slots, loaded) if _loads_by_itself(optimizer) else slots
        for slot, value in expected.items():
            if not _is_same(loaded.get(slot), value):
                raise GroupsError(
                    f"{slot} of {quoted(name)} does not have the saved value after loading",
                    hint="a hook of the optimizer changed it, or load_state_dict() of torch, which keeps no strings",
                )


def _unwrapped(slots: Mapping[str, SlotValue], loaded: Mapping[str, object]) -> dict[str, SlotValue]:
    """Return the slots with the content of each dict that the class put in its place, as bitsandbytes does."""
    unwrapped: dict[str, SlotValue] = {}
    for slot, value in slots.items():
        unwrapped |= value if isinstance(value, Mapping) and slot not in loaded else {slot: value}
    return unwrapped


def _is_same(loaded: object, value: SlotValue) -> bool:
    """Return whether a loaded slot has the saved value, cast to the dtype of the parameter as torch does."""
    if isinstance(value, LazyTensor):
        if not is_tensor(loaded) or tuple(loaded.shape) != value.shape:
            return False
        return same_values(loaded.detach().to("cpu").resolve_conj().resolve_neg(), value.read_shared())
    if is_composite(value):
        return same_composites(loaded, value)
    if isinstance(value, list | tuple):
        return isinstance(loaded, list | tuple) and len(loaded) == len(value) and all(map(_is_same, loaded, value))
    if isinstance(value, Mapping):
        return isinstance(loaded, Mapping) and all(_is_same(loaded.get(key), inner) for key, inner in value.items())
    if isinstance(value, float) and math.isnan(value):
        return isinstance(loaded, float) and math.isnan(loaded)
    return bool(loaded == value)  # works for a tensor too, which torch makes of the plain step of an old file


def _like_live(value: Any, live: Any) -> Any:
    """Return an option as a tensor or a number, whichever the live group has: a captured step needs a tensor."""
    import torch

    if isinstance(live, torch.Tensor) and isinstance(value, int | float | torch.Tensor):
        return torch.as_tensor(value, dtype=live.dtype, device=live.device).detach().clone()
    if isinstance(live, int | float) and isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(live, list | tuple) and isinstance(value, list | tuple) and len(live) == len(value):
        items = list(map(_like_live, value, live))
        return tuple(items) if isinstance(live, tuple) else items
    return value


def _match_findings(match: StateMatch, unused: Sequence[str]) -> Iterator[Finding]:
    for name in match.missing:
        yield codes.MISSING.finding(
            name,
            f"the file has no state for {quoted(name)}, so it keeps the state that the optimizer has, if any",
            "if it has another name in the file, rename it with rules",
        )
    for name, reason in match.dropped.items():
        yield codes.DROPPED.finding(
            name,
            f"the state of {quoted(name)} was not loaded: it {reason}",
            "to keep it, move it with the rules that moved the weights",
        )
    for name in unused:
        yield codes.UNUSED.finding(
            name,
            f"the state of {quoted(name)} was not loaded: the optimizer has no such parameter",
            "if it has another name in the model, rename it with rules",
        )


def _initial_lr_findings(live_groups: Sequence[NamedGroup], groups: Sequence[NamedGroup]) -> Iterator[Finding]:
    for number, (before, after) in enumerate(zip(live_groups, groups, strict=True)):
        lr, loaded = initial_lr(before.options), after.options.get("initial_lr")
        if "initial_lr" in scheduled_options(before.options, after.options, equal_values):
            continue
        if isinstance(lr, int | float) and isinstance(loaded, int | float) and lr != loaded:
            yield codes.INITIAL_LR.finding(
                "",
                f"group {number} was built with lr={lr:g} and now has initial_lr={loaded:g} from the file: a scheduler "
                "that is built from now on starts from that",
                "for the schedule of the run, build its scheduler before the load and load its state too; for a new "
                'schedule, load with hyper="live"',
            )
