"""An optimizer made to hold the model as it is after surgery: the same object, with the state that still fits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from ckptkit.core.findings import Finding, Report, Severity
from ckptkit.core.text import human_bytes, kind_of, listed, plural, quoted
from ckptkit.core.torch_optim import OptimizerSchema, schema_of
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.errors import GroupsError
from ckptkit.param_groups.live import Member, read_groups, single_optimizer
from ckptkit.param_groups.parameters import Inventory, LiveParameter, bare_name, take_inventory
from ckptkit.param_groups.rebind.replaced import Replacement, find_replacements
from ckptkit.param_groups.rebind.schedulers import SchedulerExtension, plan_extension
from ckptkit.param_groups.rebind.state import ConvertedState, OnShape, convert_state
from ckptkit.param_groups.spec import is_tensor
from ckptkit.param_groups.validate.options import find_option_fault
from ckptkit.param_groups.validate.schedulers import read_schedulers

__all__ = ["rebind"]

Place = tuple[Any, str | None]  # a parameter, and the name that is recorded with it


def rebind(
    optimizer: Optimizer,
    model: Module,
    *,
    schedulers: Any = None,
    add_missing: str | int | Mapping[str, Any] | None = None,
    on_shape: OnShape = "drop",
    guess: bool = False,
    beside: Module | Optimizer | Iterable[Module | Optimizer] = (),
) -> Report:
    """Make ``optimizer`` hold the parameters of ``model`` as they are now, and return what was done, a note each.

    For after a new head, resized embeddings, ``load_state_dict(assign=True)``, ``to_empty``, weight norm: each
    parameter that was replaced gives its place to the one of its name (or memory), with the state that still fits;
    what the model has no more is taken out, with its state. Optimizer, group dicts and their order stay the
    same objects, so that schedulers, scalers and wrappers go on. Everything is decided before anything is changed.

    ``add_missing`` adds trainable parameters that no group has: to the group of that name or index, or, of a
    mapping, to a new group with these options, for which ``schedulers`` (one, or all that there are) are extended:
    its ``lr`` is what it would have had at their start. Without it they are warned of. ``on_shape`` says what
    becomes of state of another shape: ``drop``, ``pad`` with zeros where rows were added, or ``error``. ``guess``
    lets shape and place decide where names are not recorded. ``beside`` are modules that it trains too, and
    other optimizers that share the model: theirs is left alone. Codes: ``rebind.repointed``, ``removed``,
    ``added``, ``renamed``, ``state-dropped``, ``state-converted``, ``missing``. Raises ``GroupsError`` where anything
    cannot be decided; nothing is changed then.
    """
    if on_shape not in ("drop", "pad", "error"):
        raise GroupsError(f"on_shape is {on_shape!r}", hint='on_shape is "drop", "pad" or "error"')
    work = _Work(single_optimizer(optimizer), take_inventory(model), on_shape)
    work.read(guess=guess, beside=_tensors_beside(beside))
    work.move_state()
    work.place_missing(add_missing, schedulers)
    work.move_shared()
    return work.carry_out()


@dataclass(eq=False)
class _Work:
    """What will be done to one optimizer, while it is decided."""

    optimizer: Any
    inventory: Inventory
    on_shape: OnShape
    findings: list[Finding] = field(default_factory=list)
    members: Sequence[Member] = ()
    beside: Collection[int] = ()
    replacements: Mapping[int, Replacement] = field(default_factory=dict)
    places: list[list[Place]] = field(default_factory=list)  # of each group, as it will be
    state: list[tuple[Any, Any, Mapping[str, Any]]] = field(default_factory=list)  # from, to, slots
    new_group: dict[str, Any] | None = None
    joining: SchedulerExtension | None = None

    def say(self, code: str, name: str, message: str, hint: str = "", severity: Severity = "note") -> None:
        self.findings.append(Finding(f"rebind.{code}", severity, name, message, hint))

    def read(self, *, guess: bool, beside: set[int]) -> None:
        """Decide who stands where."""
        live = read_groups(self.optimizer)
        read, self.members = live.groups, live.members
        self.beside = beside
        self.replacements = find_replacements(self.inventory, self.members, guess=guess, beside=beside)
        gone = not any(replacement.live for replacement in self.replacements.values())
        if gone and self.replacements and len(self.replacements) == len({id(one.tensor) for one in self.members}):
            raise GroupsError(
                f"none of the {plural(len(self.replacements), 'parameter')} of the optimizer is in the model, "
                "by identity or by name",
                hint="pass the model that this optimizer trains",
            )
        by_group: dict[int, list[Place]] = {id(group): [] for group in read}
        for member in self.members:
            by_group[id(member.group)].extend(self._successors(member))
        self.places = list(by_group.values())

    def _successors(self, member: Member) -> list[Place]:
        live = self.inventory.parameters.get(id(member.tensor))
        replacement = self.replacements.get(id(member.tensor))
        if live is not None:
            return [(live.tensor, self._name(member, live))]
        if replacement is None:
            return [(member.tensor, member.name)]
        if not replacement.live:
            called = f"{quoted(member.name)} in {member.where}" if member.name else member.where
            self.say("removed", member.name or "", f"{called} was taken out: {replacement.reason}")
        for heir in replacement.live:
            why = f": {replacement.reason}" if replacement.reason else ""
            self.say("repointed", heir.name, f"{member.where} is {quoted(heir.name)} {heir.shape} as it is now{why}")
        return [(heir.tensor, self._name(member, heir, said=True)) for heir in replacement.live]

    def _name(self, member: Member, live: LiveParameter, *, said: bool = False) -> str | None:
        """Return the name to record: the one there is where it is true, and none where none is recorded."""
        if member.name is None:
            return None
        bare = bare_name(member.name)
        true = [bare_name(name) for name in (live.name, *live.aliases)]
        if bare in true or (
            self.inventory.named(member.name) is None and any(one.endswith(f".{bare}") for one in true)
        ):
            return member.name
        if not said:
            self.say("renamed", live.name, f"{member.where} was recorded as {quoted(member.name)}")
        return live.name

    def move_state(self) -> None:
        """Decide what becomes of the state of each tensor that has one."""
        schema = schema_of(type(self.optimizer))
        if schema is not None and schema.has_shared_state:
            return
        first = {id(member.tensor): member for member in reversed(self.members)}
        for tensor, slots in list(self.optimizer.state.items()):
            member = first.get(id(tensor))
            if not is_tensor(tensor):
                # Others keep things of their own under text; numbers are what is left of a file.
                if schema is not None or isinstance(tensor, int):
                    self.say("state-dropped", "", f"the state under {tensor!r} was of no parameter")
                    self.state.append((tensor, None, {}))
            elif not isinstance(slots, Mapping):
                self.say("state-dropped", "", f"the state of {tuple(tensor.shape)} was {kind_of(slots)}, without slots")
                self.state.append((tensor, None, {}))
            elif member is None:
                size = human_bytes(sum(value.nbytes for value in slots.values() if is_tensor(value)))
                shape = tuple(tensor.shape)
                self.say("state-dropped", "", f"{size} of state were of a tensor {shape} that no group has")
                self.state.append((tensor, None, {}))
            elif slots:
                self._move(member, slots, schema)

    def _move(self, member: Member, slots: Mapping[str, Any], schema: OptimizerSchema | None) -> None:
        tensor = member.tensor
        live, replacement = self.inventory.parameters.get(id(tensor)), self.replacements.get(id(tensor))
        if live is None and replacement is None:
            return
        target = (
            live if live is not None else replacement.live[0] if replacement is not None and replacement.same else None
        )
        if target is None:
            reason = replacement.reason if replacement is not None else ""
            fitted = ConvertedState({}, {}, tuple(slots), reason)
        else:
            older = None if live is not None else tensor
            options = member.group.options
            fitted = convert_state(slots, target, older=older, schema=schema, options=options, on_shape=self.on_shape)
        name = target.name if target is not None else member.name or ""
        called = quoted(name) if name else member.where
        if fitted.dropped:
            slots_said = ", ".join(fitted.dropped)
            self.say("state-dropped", name, f"the state of {called} ({slots_said}) was dropped: {fitted.reason}")
        for slot, how in fitted.converted.items():
            self.say("state-converted", name, f"{slot} of {called} was {how}")
        if live is None or fitted.dropped or fitted.converted:
            self.state.append((tensor, target.tensor if target is not None and fitted.slots else None, fitted.slots))

    def move_shared(self) -> None:
        """Keep the one state of LBFGS only where it has the same elements in the same order."""
        schema = schema_of(type(self.optimizer))
        if schema is None or not schema.has_shared_state:
            return
        before = [tuple(member.tensor.shape) for member in self.members]
        after = [tuple(tensor.shape) for places in self.places for tensor, _ in places]
        slots = next((slots for slots in self.optimizer.state.values() if slots), None)
        if slots is None:
            return
        kept = before == after and after != [] and all(one.same for one in self.replacements.values())
        kept = kept and _lies_along(slots, [tensor for places in self.places for tensor, _ in places])
        if kept and not self.replacements:
            return
        if not kept:
            self.say("state-dropped", "", "the state was dropped: it is one for all parameters, and these have changed")
        for tensor in list(self.optimizer.state):
            self.state.append((tensor, None, {}))
        if kept:
            self.state.append((None, self.places[0][0][0], slots))

    def place_missing(self, add_missing: str | int | Mapping[str, Any] | None, schedulers: Any) -> None:
        """Decide where the parameters go that no group has."""
        held = {id(tensor) for places in self.places for tensor, _ in places} | set(self.beside)
        missing = [live for live in self.inventory.trainable() if id(live.tensor) not in held]
        target = None if isinstance(add_missing, Mapping) or add_missing is None else self._group(add_missing)
        if not missing:
            return
        names = [live.name for live in missing]
        if add_missing is None:
            verb = "is" if len(names) == 1 else "are"
            self.say(
                "missing",
                names[0],
                f"{listed(names)} {verb} trainable and in no group of this optimizer",
                "add_missing= the name or index of a group, or the options of a new one; or freeze them",
                "warning",
            )
            return
        named = any("param_names" in group for group in self.optimizer.param_groups)
        added: list[Place] = [(live.tensor, live.name if named else None) for live in missing]
        if target is not None:
            self.places[target].extend(added)
            where = f"group {target}"
        else:
            where = self._new_group(dict(add_missing), added, schedulers)  # type: ignore[arg-type]
        for name in names:
            self.say("added", name, f"{quoted(name)} was added to {where}")

    def _group(self, wanted: Any) -> int:
        groups = self.optimizer.param_groups
        if isinstance(wanted, str):
            names = [group.get("name", group.get("group_name")) for group in groups]
            if names.count(wanted) != 1:
                known = listed([name for name in names if isinstance(name, str)]) or "none has a name"
                raise GroupsError(f"add_missing: no one group is called {quoted(wanted)}", hint=f"the groups: {known}")
            return names.index(wanted)
        if not isinstance(wanted, int) or isinstance(wanted, bool):
            raise GroupsError(
                f"add_missing is {kind_of(wanted)}", hint="the name or index of a group, or the options of a new one"
            )
        if not 0 <= wanted < len(groups):
            raise GroupsError(f"add_missing: there is no group {wanted}", hint=f"0 to {len(groups) - 1}")
        return wanted

    def _new_group(self, options: dict[str, Any], added: Sequence[Place], schedulers: Any) -> str:
        groups = self.optimizer.param_groups
        schema = schema_of(type(self.optimizer))
        if schema is not None and schema.has_shared_state:
            raise GroupsError(f"{schema.name} takes one group only", hint="add_missing=0 adds to it")
        if "params" in options:
            raise GroupsError(
                "add_missing: the parameters of the new group are those that are missing", hint="leave out params"
            )
        if schedulers is None and any("initial_lr" in group for group in groups):
            raise GroupsError(
                "a new group needs the schedulers that drive this optimizer (its groups have an initial_lr), and none "
                "was given",
                hint="schedulers= all of them, or () where none is in use any more",
            )
        for key in options:
            if not isinstance(key, str):
                raise GroupsError(f"add_missing: the option {key!r} has no name", hint="options are called as in torch")
            if fault := find_option_fault(key, {**self.optimizer.defaults, **options}, type(self.optimizer)):
                raise GroupsError(f"add_missing: {key} {fault[0]}", hint=fault[1])
        # Copied: a rate that is a tensor would be changed in all groups that share it.
        options = copy.deepcopy({**self.optimizer.defaults, **options})
        if driving := read_schedulers(schedulers):
            self.joining = plan_extension(driving, self.optimizer, options)
            options = dict(self.joining.options)
        params = [tensor if name is None else (name, tensor) for tensor, name in added]
        self.new_group = {"params": params, **options}
        called = options.get("name")
        return f"a new group {len(groups)}" + (f" ({quoted(called)})" if isinstance(called, str) else "")

    def carry_out(self) -> Report:
        """Do it all. Only the first step can fail, and it is torch's, which checks before it changes."""
        groups = list(self.optimizer.param_groups)
        if self.new_group is not None:
            _or_refuse(lambda: self.optimizer.add_param_group(self.new_group), type(self.optimizer).__name__)
        if self.joining is not None:
            self.joining.carry_out()
        for group, places in zip(groups, self.places, strict=True):
            # In place: LBFGS and others keep the list itself.
            group["params"][:] = [tensor for tensor, _ in places]
            if "param_names" in group:
                group["param_names"] = [name for _, name in places]
        state = self.optimizer.state
        for old, _, _ in self.state:
            if old is not None:
                state.pop(old)
        for _, new, slots in self.state:
            if new is not None:
                state[new] = dict(slots)
        if "_numel_cache" in vars(self.optimizer):  # of LBFGS
            vars(self.optimizer)["_numel_cache"] = None
        return Report(tuple(self.findings), GroupsError)


def _lies_along(slots: Mapping[str, Any], tensors: Sequence[Any]) -> bool:
    """Return whether the vectors of a state have the elements of all these together, in their dtype and place."""
    import torch

    views = [
        torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in map(torch.Tensor.detach, tensors)
    ]
    like = (
        sum(view.numel() for view in views),
        reduce(torch.promote_types, (view.dtype for view in views)),
        views[0].device,
    )
    vectors = [value for value in slots.values() if is_tensor(value) and value.ndim]
    return all((value.numel(), value.dtype, value.device) == like for value in vectors)


def _tensors_beside(beside: Any) -> set[int]:
    """Return the ids of all that modules and other optimizers hold; one alone will do."""
    alone = hasattr(beside, "param_groups") or hasattr(beside, "named_parameters")
    ids: set[int] = set()
    for owner in (beside,) if alone or not isinstance(beside, Iterable) else beside:
        if hasattr(owner, "param_groups"):
            ids.update(id(tensor) for group in owner.param_groups for tensor in group["params"])
        elif hasattr(owner, "named_parameters") and not isinstance(owner, type):
            ids.update(map(id, owner.parameters()))
        else:
            raise GroupsError(f"beside has {kind_of(owner)}", hint="it is a list of modules and other optimizers")
    return ids


def _or_refuse(add: Callable[[], object], called: str) -> None:
    try:
        add()
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise GroupsError(
            f"{called} refuses a new group: {error}", hint="add_missing= the name or index of a group that there is"
        ) from error
