"""Make an optimizer hold the current parameters of a model that has changed, and keep the state that still fits."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, get_args

from ckptkit.core.arguments import require_choice, require_flags
from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import human_bytes, kind_of, listed, plural, quoted
from ckptkit.core.torch_optim import OptimizerSchema, constructed_state, schema_of
from ckptkit.core.torch_types import Module, Optimizer, Tensor
from ckptkit.errors import GroupsError
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import Member, read_groups, single_optimizer
from ckptkit.param_groups.parameters import LiveModel, LiveParameter, bare_name, read_live_model
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.rebind.placement import Place, place_by_spec, place_together
from ckptkit.param_groups.rebind.replaced import Replacement, find_replacements
from ckptkit.param_groups.rebind.schedulers import SchedulerExtension, plan_extension
from ckptkit.param_groups.rebind.state import ConvertedState, OnShape, convert_state
from ckptkit.param_groups.spec.fields import is_tensor
from ckptkit.param_groups.validate.schedulers import read_schedulers

__all__ = ["rebind"]


def rebind(
    optimizer: Optimizer,
    model: Module,
    *,
    schedulers: Any = None,
    spec: SpecLike | None = None,
    add_missing: str | int | Mapping[str, Any] | None = None,
    on_shape: OnShape = "drop",
    guess: bool = False,
    beside: Module | Optimizer | Iterable[Module | Optimizer] = (),
) -> Report:
    """Make ``optimizer`` hold the current parameters of ``model``, and return a note for each change.

    Use it after a new head, resized embeddings, ``load_state_dict(assign=True)``, ``to_empty`` or weight norm. Each
    old parameter is replaced by the current parameter with the same name, or with the same memory. State that still
    fits is kept. Tensors that are no longer in the model are removed with their state. The optimizer, its group dicts
    and their order stay the same, so schedulers, gradient scalers and wrappers continue to work. Nothing is changed
    before everything is decided.

    - ``spec``, or the path of its file, decides the group of each trainable parameter that is in no group. This is the
      group of the same name, or a new group with the options of the spec. New groups come last, in the order of the
      spec. Parameters that are in a group stay there.
    - ``add_missing`` instead puts all these parameters into one group: the name or index of a group, or the options
      of a new group. Without both, the parameters are only reported.
    - ``schedulers``: one scheduler, or all of them. They are extended for new groups. ``lr`` of a new group, in a
      spec as in ``add_missing``, is its rate at the start of the schedulers.
    - ``on_shape`` decides about state with a shape that no longer fits: ``"drop"``, ``"error"``, or ``"pad"``, which
      adds rows with initial values.
    - ``guess`` allows shape and position to identify a parameter, for an optimizer without recorded names.
    - ``beside``: modules that the optimizer trains too, and other optimizers of the model. Their parameters are left
      alone.

    ::

        spec = {
            "defaults": {"lr": 0.1},
            "group": [{"name": "body", "params": "0.*", "lr": 0.01}, {"name": "head", "rest": True}],
        }
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        model[0].requires_grad_(False)
        head = list(model[1].parameters())
        group = {"params": head, "param_names": ["1.weight", "1.bias"], "name": "head"}
        optimizer = torch.optim.SGD([group], lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        model[0].requires_grad_(True)
        rebind(optimizer, model, spec=spec, schedulers=scheduler)  # adds the group "body", with lr=0.01

    Codes: ``rebind.repointed``, ``removed``, ``added``, ``renamed``, ``state-dropped``, ``state-converted``,
    ``missing``. Raises ``GroupsError`` for an option that no step of the optimizer reads, and where something cannot be
    decided. Nothing is changed then.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model.bias = torch.nn.Parameter(torch.zeros(2))
        >>> [finding.code for finding in ckptkit.rebind(optimizer, model, guess=True).findings]
        ['rebind.repointed']
        >>> optimizer.param_groups[0]["params"][1] is model.bias
        True
    """
    require_flags(guess=guess)
    require_choice(on_shape, get_args(OnShape), "on_shape")
    if spec is not None and add_missing is not None:
        raise GroupsError("spec and add_missing both decide the groups of new parameters", hint="pass only one of them")
    work = _Rebind(single_optimizer(optimizer), read_live_model(model), on_shape)
    work.replace_parameters(guess=guess, beside=_tensor_ids(beside))
    work.plan_state()
    work.plan_missing(add_missing, spec, schedulers)
    work.plan_shared_state()
    work.plan_constructed_state()
    return work.apply()


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """One entry of the ``params`` of a group: the parameter, and the name that is recorded with it."""

    tensor: Tensor
    name: str | None


@dataclass(frozen=True, slots=True, eq=False)
class _StateMove:
    """A change of ``optimizer.state``: the entry of ``old`` is removed, and ``new`` gets ``slots``."""

    old: Any = None  # a tensor, or any other key of the state
    new: Tensor | None = None
    slots: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Rebind:
    """The planned changes to one optimizer."""

    optimizer: Optimizer
    live_model: LiveModel
    on_shape: OnShape
    findings: list[Finding] = field(default_factory=list)
    members: Sequence[Member] = ()
    beside: Collection[int] = ()  # ids of tensors that are left alone
    replacements: Mapping[int, Replacement] = field(default_factory=dict)
    params: list[list[_Slot]] = field(default_factory=list)  # the new params of each group
    moves: list[_StateMove] = field(default_factory=list)
    new_groups: list[dict[str, Any]] = field(default_factory=list)
    extension: SchedulerExtension | None = None

    def replace_parameters(self, *, guess: bool, beside: set[int]) -> None:
        """Plan the new params of each group."""
        held = read_groups(self.optimizer)
        self.members = held.members
        self.beside = beside
        self.replacements = find_replacements(self.live_model, self.members, guess=guess, beside=beside)
        all_unknown = len(self.replacements) == len({id(member.tensor) for member in self.members}) > 0
        if all_unknown and not any(replacement.live for replacement in self.replacements.values()):
            raise GroupsError(
                f"none of the {plural(len(self.replacements), 'parameter')} of the optimizer is in the model, "
                "by identity or by name",
                hint="pass the model that this optimizer trains",
            )
        by_group: dict[int, list[_Slot]] = {id(group): [] for group in held.groups}
        for member in self.members:
            by_group[id(member.group)].extend(self._new_slots(member))
        self.params = list(by_group.values())

    def _new_slots(self, member: Member) -> list[_Slot]:
        live = self.live_model.parameters.get(id(member.tensor))
        replacement = self.replacements.get(id(member.tensor))
        if live is not None:
            return [_Slot(live.tensor, self._recorded_name(member, live, report=True))]
        if replacement is None:
            return [_Slot(member.tensor, member.name)]
        if not replacement.live:
            text = f"{quoted(member.name)} in {member.where}" if member.name else member.where
            self.findings.append(codes.REMOVED.finding(member.name or "", f"{text} was removed: {replacement.reason}"))
        for live in replacement.live:
            why = f": {replacement.reason}" if replacement.reason else ""
            self.findings.append(
                codes.REPOINTED.finding(live.name, f"{member.where} now holds {quoted(live.name)} {live.shape}{why}")
            )
        return [_Slot(live.tensor, self._recorded_name(member, live, report=False)) for live in replacement.live]

    def _recorded_name(self, member: Member, live: LiveParameter, *, report: bool) -> str | None:
        """Return the name to record for ``live``, or None where no name was recorded."""
        if member.name is None:
            return None
        bare = bare_name(member.name)
        names = [bare_name(name) for name in (live.name, *live.aliases)]
        if bare in names or (
            self.live_model.named(member.name) is None and any(name.endswith(f".{bare}") for name in names)
        ):
            return member.name
        if report:
            self.findings.append(
                codes.RENAMED.finding(
                    live.name, f"{member.where} is {quoted(live.name)}; its recorded name was {quoted(member.name)}"
                )
            )
        return live.name

    def plan_state(self) -> None:
        """Plan the new state of each parameter."""
        schema = schema_of(type(self.optimizer))
        if schema is not None and schema.has_shared_state:
            return
        first_member = {id(member.tensor): member for member in reversed(self.members)}
        for key, slots in list(self.optimizer.state.items()):
            member = first_member.get(id(key))
            if not is_tensor(key):
                # Optimizers outside torch keep values of their own under strings; an int is left over from a file.
                if schema is not None or isinstance(key, int):
                    self._drop(key, f"the state under {key!r} was dropped: it belongs to no parameter")
            elif not isinstance(slots, Mapping):
                self._drop(
                    key,
                    f"the state of a tensor {tuple(key.shape)} was dropped: the state is {kind_of(slots)}, not a dict",
                )
            elif member is None:
                size = human_bytes(sum(value.nbytes for value in slots.values() if is_tensor(value)))
                self._drop(key, f"{size} of state was dropped: it belongs to a tensor {tuple(key.shape)} in no group")
            elif slots:
                self._plan_state_of(member, slots, schema)

    def _drop(self, key: object, message: str) -> None:
        self.findings.append(codes.STATE_DROPPED.finding("", message))
        self.moves.append(_StateMove(key))

    def _plan_state_of(self, member: Member, slots: Mapping[str, Any], schema: OptimizerSchema | None) -> None:
        tensor = member.tensor
        live, replacement = self.live_model.parameters.get(id(tensor)), self.replacements.get(id(tensor))
        if live is not None:
            target: LiveParameter | None = live
        elif replacement is not None:
            target = replacement.live[0] if replacement.keeps_state else None
        else:
            return
        if target is None:
            converted = ConvertedState({}, {}, tuple(slots), "" if replacement is None else replacement.reason)
        else:
            converted = convert_state(
                slots,
                target,
                older=None if live is not None else tensor,
                schema=schema,
                options=member.group.options,
                on_shape=self.on_shape,
            )
        name = target.name if target is not None else member.name or ""
        text = quoted(name) if name else member.where
        if converted.dropped:
            slot_names = ", ".join(converted.dropped)
            self.findings.append(
                codes.STATE_DROPPED.finding(name, f"the state of {text} ({slot_names}) was dropped: {converted.reason}")
            )
        for slot, change in converted.changes.items():
            self.findings.append(codes.STATE_CONVERTED.finding(name, f"{slot} of {text} was {change}"))
        if live is None or converted.dropped or converted.changes:
            new = target.tensor if target is not None and converted.slots else None
            self.moves.append(_StateMove(tensor, new, converted.slots))

    def plan_shared_state(self) -> None:
        """Plan the state of LBFGS, which fits only the same elements in the same order."""
        schema = schema_of(type(self.optimizer))
        if schema is None or not schema.has_shared_state:
            return
        tensors = [slot.tensor for params in self.params for slot in params]
        slots = next((slots for slots in self.optimizer.state.values() if slots), None)
        if slots is None:
            return
        is_kept = (
            bool(tensors)
            and [member.tensor.shape for member in self.members] == [tensor.shape for tensor in tensors]
            and all(replacement.keeps_state for replacement in self.replacements.values())
            and _covers(slots, tensors)
        )
        if is_kept and not self.replacements:
            return
        if not is_kept:
            self.findings.append(
                codes.STATE_DROPPED.finding(
                    "", f"the state was dropped: {schema.name} has one state for all parameters, and these have changed"
                )
            )
        self.moves.extend(map(_StateMove, self.optimizer.state))
        if is_kept:
            self.moves.append(_StateMove(new=tensors[0], slots=slots))

    def plan_constructed_state(self) -> None:
        """Plan the state that the constructor of the class makes, for each parameter that will have no state."""
        schema = schema_of(type(self.optimizer))
        if schema is None:
            return
        kept = set(map(id, self.optimizer.state)) - {id(move.old) for move in self.moves}
        kept |= {id(move.new) for move in self.moves}
        groups = [
            (group, [slot.tensor for slot in params])
            for group, params in zip(self.optimizer.param_groups, self.params, strict=True)
        ]
        for group, tensors in [*groups, *((group, group["params"]) for group in self.new_groups)]:
            for tensor in tensors:
                if id(tensor) not in kept and (slots := constructed_state(schema, group, tensor)):
                    self.moves.append(_StateMove(new=tensor, slots=slots))

    def plan_missing(
        self, add_missing: str | int | Mapping[str, Any] | None, spec: SpecLike | None, schedulers: Any
    ) -> None:
        """Plan the group of each trainable parameter that is in no group."""
        given_schedulers = read_schedulers(schedulers)
        held = {id(slot.tensor) for params in self.params for slot in params} | set(self.beside)
        missing = [live for live in self.live_model.trainable() if id(live.tensor) not in held]
        if spec is None:
            placement = place_together(self.optimizer, missing, add_missing)
        else:
            names = [[self._live_name(slot) for slot in params] for params in self.params]
            placement = place_by_spec(self.optimizer, self.live_model, names, missing, spec)
        for left, reason, hint in placement.left:
            names_left = [live.name for live in left]
            verb = "is" if len(names_left) == 1 else "are"
            message = f"{listed(names_left)} {verb} trainable, but {reason}"
            self.findings.append(codes.STILL_MISSING.finding(names_left[0], message, hint))
        new = [place for place in placement.places if place.index is None]
        if new:
            self._plan_new_groups(new, schedulers, given_schedulers)
        for place in placement.places:
            if place.index is None:
                number = len(self.params) + new.index(place)
                name = place.options.get("name")
                where = f"a new group {number}" + (f" ({quoted(name)})" if isinstance(name, str) else "")
            else:
                where = f"group {place.index}"
                self._join(place, place.index)
            for live in place.parameters:
                self.findings.append(codes.ADDED.finding(live.name, f"{quoted(live.name)} was added to {where}"))

    def _live_name(self, slot: _Slot) -> str:
        live = self.live_model.parameters.get(id(slot.tensor))
        return "" if live is None else live.name

    def _new_slot(self, live: LiveParameter) -> _Slot:
        has_names = any("param_names" in group for group in self.optimizer.param_groups)
        return _Slot(live.tensor, live.name if has_names else None)

    def _join(self, place: Place, index: int) -> None:
        """Put the parameters into a group: each before the first one that follows it in the order, else at the end."""
        ranks = {name: rank for rank, name in enumerate(place.order)}
        params = self.params[index]
        for live in place.parameters:
            rank = ranks.get(live.name, len(ranks))
            later = (position for position, slot in enumerate(params) if ranks.get(self._live_name(slot), -1) > rank)
            params.insert(next(later, len(params)), self._new_slot(live))

    def _plan_new_groups(self, places: Sequence[Place], schedulers: Any, given_schedulers: Sequence[Any]) -> None:
        """Plan a group with its options for each of ``places``."""
        schema = schema_of(type(self.optimizer))
        if schema is not None and schema.has_shared_state:
            raise GroupsError(f"{schema.name} takes one group only", hint="add_missing=0 adds to that group")
        if schedulers is None and any("initial_lr" in group for group in self.optimizer.param_groups):
            raise GroupsError(
                "a new group needs the schedulers of this optimizer: its groups have an initial_lr, but "
                "schedulers is None",
                hint="pass every scheduler as schedulers=, or schedulers=() if the optimizer has none any more",
            )
        # Copied: a scheduler would change a shared lr tensor in every group that has it.
        options: Sequence[Mapping[str, Any]] = [
            copy.deepcopy({**self.optimizer.defaults, **place.options}) for place in places
        ]
        if given_schedulers:
            self.extension = plan_extension(given_schedulers, self.optimizer, options)
            options = self.extension.options
        for place, group in zip(places, options, strict=True):
            slots = [self._new_slot(live) for live in place.parameters]
            names = [slot.name for slot in slots if slot.name is not None]
            named = {"param_names": names} if names else {}
            self.new_groups.append({"params": [slot.tensor for slot in slots], **named, **group})

    def apply(self) -> Report:
        """Apply every planned change. Only ``add_param_group`` can fail, and it comes first."""
        groups = list(self.optimizer.param_groups)
        for new_group in self.new_groups:
            try:
                self.optimizer.add_param_group(new_group)
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                del self.optimizer.param_groups[len(groups) :]
                raise GroupsError(
                    f"{type(self.optimizer).__name__} refuses a new group: {error}",
                    hint="pass add_missing= the name or index of an existing group",
                ) from error
        if self.extension is not None:
            self.extension.apply()
        for group, params in zip(groups, self.params, strict=True):
            # In place: LBFGS and others keep a reference to the list.
            group["params"][:] = [slot.tensor for slot in params]
            if "param_names" in group:
                group["param_names"] = [slot.name for slot in params]
        state = self.optimizer.state
        for move in self.moves:
            if move.old is not None:
                state.pop(move.old)
        for move in self.moves:
            if move.new is not None:
                state[move.new] = dict(move.slots)
        if "_numel_cache" in vars(self.optimizer):  # of LBFGS
            vars(self.optimizer)["_numel_cache"] = None
        return Report(tuple(self.findings), GroupsError)


def _covers(slots: Mapping[str, Any], tensors: Sequence[Tensor]) -> bool:
    """Return whether each vector of a shared state has the elements of all ``tensors``, in their dtype and device."""
    import torch

    views = [
        torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in map(torch.Tensor.detach, tensors)
    ]
    expected = (
        sum(view.numel() for view in views),
        reduce(torch.promote_types, (view.dtype for view in views)),
        views[0].device,
    )
    vectors = [value for value in slots.values() if is_tensor(value) and value.ndim]
    return all((value.numel(), value.dtype, value.device) == expected for value in vectors)


def _tensor_ids(beside: Any) -> set[int]:
    """Return the ids of the parameters of modules and optimizers: of one, or of several."""
    is_single = hasattr(beside, "param_groups") or hasattr(beside, "named_parameters")
    ids: set[int] = set()
    for owner in (beside,) if is_single or not isinstance(beside, Iterable) else beside:
        if hasattr(owner, "param_groups"):
            ids.update(id(tensor) for group in owner.param_groups for tensor in group["params"])
        elif hasattr(owner, "named_parameters") and not isinstance(owner, type):
            ids.update(map(id, owner.parameters()))
        else:
            raise GroupsError(f"beside has {kind_of(owner)}", hint="beside takes modules and other optimizers")
    return ids
