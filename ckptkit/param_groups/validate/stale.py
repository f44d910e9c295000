"""Explain tensors in the groups that are not parameters of the model: what they were, and what replaced them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ckptkit.core.findings import Finding
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import is_dtensor, shape_or_none
from ckptkit.core.torch_types import Tensor
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import Member
from ckptkit.param_groups.parameters import LiveModel, LiveParameter, address, bare_name, flat_names
from ckptkit.wrappers.table import PARAMETRIZATIONS, WRAPPERS

__all__ = [
    "REBIND_HINT",
    "REBUILD_HINT",
    "ModelContext",
    "Rename",
    "UnknownTensor",
    "find_rename",
    "match_to_model",
    "shape_text",
    "unknown_tensor_finding",
]


@dataclass(frozen=True, slots=True, eq=False)
class Rename:
    """The parameters that replaced the parameter with a recorded name.

    ``live`` is the first of them, and ``names`` has the names of all. ``event`` is a clause that says what happened.
    """

    live: LiveParameter
    names: tuple[str, ...]
    event: str


def find_rename(live_model: LiveModel, recorded: str) -> Rename | None:
    """Return the new name of ``recorded`` after its module was parametrized, pruned, adapted, or restored.

    Return None if the model still has the name, or has no parameter that can have replaced ``recorded``.
    """
    recorded = bare_name(recorded)
    if recorded in live_model.by_bare_name:
        return None
    module, dot, leaf = recorded.rpartition(".")
    for event, names in _names_after_adding(f"{module}{dot}", leaf):
        found = [live_model.by_bare_name[name] for name in names if name in live_model.by_bare_name]
        if found and all(name in live_model.by_bare_name or name in live_model.bare_buffers for name in names):
            return Rename(found[0], tuple(live.name for live in found), event)
    for event, name in _names_after_removing(recorded):
        live = live_model.by_bare_name.get(name)
        if live is not None:
            return Rename(live, (live.name,), event)
    return None


def _names_after_adding(prefix: str, leaf: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for row in PARAMETRIZATIONS:
        yield f"{row.origin} was applied", tuple(f"{prefix}{row.parent}{leaf}{ending}" for ending in row.endings)
    for wrapper in WRAPPERS:
        if wrapper.after:
            yield f"its module was wrapped, as in {wrapper.origin}", (f"{prefix}{wrapper.mark}.{leaf}",)


def _names_after_removing(recorded: str) -> Iterator[tuple[str, str]]:
    for row in PARAMETRIZATIONS:
        for ending in row.endings:
            module, dot, leaf = recorded.removesuffix(ending).rpartition(".")
            prefix = f"{module}{dot}"
            if recorded.endswith(ending) and prefix.endswith(row.parent):
                yield f"{row.origin} was removed", f"{prefix.removesuffix(row.parent)}{leaf}"
    for wrapper in WRAPPERS:
        prefix, mark, leaf = recorded.rpartition(f"{wrapper.mark}.")
        if wrapper.after and mark and (not prefix or prefix.endswith(".")):
            yield f"its module is no longer in {wrapper.origin}", f"{prefix}{leaf}"


REBUILD_HINT = "build the groups and the optimizer again, after the last change to the model"
REBIND_HINT = f"{REBUILD_HINT}, or rebind(optimizer, model)"


@dataclass(frozen=True, eq=False)
class ModelContext:
    """The model, the ids of all tensors in the groups, and the names of parameters with an older object in a group."""

    live_model: LiveModel
    held_ids: Collection[int]
    replaced_names: Collection[str] = ()

    @cached_property
    def is_all_new(self) -> bool:
        """Whether the groups hold no parameter of the model."""
        return not any(key in self.live_model.parameters for key in self.held_ids)


def _replacement_reason(tensor: Tensor, live: LiveParameter, recorded: str | None, context: ModelContext) -> str:
    """Return a clause that says why the model now has ``live`` instead of ``tensor``."""
    rename = find_rename(context.live_model, recorded) if recorded else None
    if recorded and rename is not None and live.name in rename.names:
        names = " and ".join(map(quoted, rename.names))
        return f"{quoted(recorded)} became {names} when {rename.event}, after the groups were built"
    if recorded and id(live.tensor) in context.held_ids and bare_name(recorded) in map(bare_name, live.aliases):
        return f"{quoted(recorded)} was tied to {quoted(live.name)} after the groups were built"
    if live.lazy:
        return "the model has a new parameter without a shape yet, as after replacing a head"
    if shape_or_none(tensor) != live.shape:
        return f"the model has a new parameter of shape {live.shape}, as after replacing a head"
    if tensor.is_meta and not live.tensor.is_meta:
        return "it stayed on the meta device when the model got memory (to_empty() or load_state_dict(assign=True))"
    if live.tensor.is_meta and not tensor.is_meta:
        return "the model has a new parameter on the meta device, as after to('meta')"
    if is_dtensor(live.tensor) and not is_dtensor(tensor):
        return "fully_shard() replaced it by a DTensor after the groups were built"
    if tensor.device != live.tensor.device or tensor.dtype != live.tensor.dtype:
        kind = f"{live.tensor.dtype}, {live.tensor.device}"
        return f"the model has a new parameter ({kind}), as after a conversion that copies"
    if type(context.live_model.model).__name__ == "AveragedModel":
        return "an AveragedModel is a copy, so validate the model that trains"
    return f"the model has a new object, as after {_replacing_call(live, context)}"


def _replacing_call(live: LiveParameter, context: ModelContext) -> str:
    if context.is_all_new:
        return "load_state_dict(assign=True), a deep copy, or loading a whole model"
    siblings = context.live_model.by_module[live.module]
    if live.module and len(siblings) > 1 and all(sibling.name in context.replaced_names for sibling in siblings):
        return f"replacing the module {quoted(live.module)}, or load_state_dict(assign=True) on it"
    return "replacing its module, or assigning a new nn.Parameter"


@dataclass(frozen=True, slots=True, eq=False)
class Disappeared:
    """Why the model no longer has a parameter; ``is_stale`` tells whether it certainly had it before."""

    reason: str
    is_stale: bool = True
    hint: str = REBUILD_HINT


def _find_disappeared(recorded: str, context: ModelContext) -> Disappeared | None:
    """Return why the model has no parameter ``recorded``, or None if it has no module of that name either."""
    module, _, leaf = bare_name(recorded).rpartition(".")
    found = context.live_model.modules.get(module)
    if found is None:
        return None
    kind = type(found)
    where = f"{quoted(module)} is" if module else "the model is"
    if "quantized" in kind.__module__:
        reason = f"{where} now a quantised {kind.__name__}, which does not train"
        return Disappeared(reason, hint="train the model before you quantise it")
    if kind.__name__ == "Identity":
        return Disappeared(f"{where} now an Identity, as after fuse_modules() folded it into another layer")
    return Disappeared(f"{where} a {kind.__name__} without a parameter {quoted(leaf)}", is_stale=False)


def shape_text(tensor: Tensor) -> str:
    """Return the shape of ``tensor`` as text, ``()`` for an uninitialised one."""
    return f"{shape_or_none(tensor) or ()}"


_USE_NAMED_PARAMETERS = "take the parameters from model.named_parameters(), never from state_dict() or .data"


@dataclass(frozen=True, slots=True, eq=False)
class UnknownTensor:
    """A tensor in the groups that is not in the model, and the parameter ``live`` that replaced it, if known.

    ``is_guess`` is True if ``live`` was found by shape or order, not by name or memory. ``candidates`` has the names of
    the parameters that may have replaced it, if there are several.
    """

    tensor: Tensor
    members: tuple[Member, ...]
    live: LiveParameter | None = None
    is_guess: bool = False
    candidates: tuple[str, ...] = ()

    @property
    def name(self) -> str | None:
        """The name that was recorded with the tensor, or None."""
        return next((member.name for member in self.members if member.name), None)


def match_to_model(
    live_model: LiveModel, unknown: Sequence[UnknownTensor], missing: Sequence[LiveParameter]
) -> list[UnknownTensor]:
    """Return the unknown tensors, each with the parameter of the model that replaced it, if one can be found.

    A tensor is matched by its recorded name, then by its memory. The others are matched with the missing parameters:
    by shape, then in order if the numbers of tensors and their dimensions agree.
    """
    matched: dict[int, UnknownTensor] = {}
    # A name that was recorded from a part of the model lacks the first segments, and can fit several parameters.
    endings = {ending for live in missing if unknown for ending in _name_endings(bare_name(live.name))}
    for entry in unknown:
        live = None
        if entry.name:
            rename = find_rename(live_model, entry.name)
            live = live_model.named(entry.name) or (rename.live if rename else None)
            live = live or live_model.flattened.get(bare_name(entry.name))
        live = live or live_model.by_address.get(address(entry.tensor))
        if live is not None or (entry.name and bare_name(entry.name) not in endings):
            matched[id(entry.tensor)] = replace(entry, live=live)
    found_names = {entry.live.name for entry in matched.values() if entry.live}
    unmatched_parameters = [live for live in missing if live.name not in found_names]
    for entry in _guess([entry for entry in unknown if id(entry.tensor) not in matched], unmatched_parameters):
        matched[id(entry.tensor)] = entry
    return [matched[id(entry.tensor)] for entry in unknown]


def _name_endings(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition(".")[2]


def _guess(unknown: Sequence[UnknownTensor], parameters: Sequence[LiveParameter]) -> Iterator[UnknownTensor]:
    by_shape: dict[tuple[int, ...], list[LiveParameter]] = defaultdict(list)
    for live in parameters:
        by_shape[live.shape].append(live)
    unknown_by_shape: dict[tuple[int, ...], list[UnknownTensor]] = defaultdict(list)
    for entry in unknown:
        unknown_by_shape[shape_or_none(entry.tensor) or ()].append(entry)
    left: list[UnknownTensor] = []
    used: set[str] = set()
    for shape, alike in unknown_by_shape.items():
        found = by_shape.get(shape, [])
        if len(found) == len(alike):
            for entry, live in zip(alike, found, strict=True):
                used.add(live.name)
                yield replace(entry, live=live, is_guess=True)
        elif found:
            names = tuple(live.name for live in found[:3])
            used.update(live.name for live in found)
            yield from (replace(entry, candidates=names) for entry in alike)
        else:
            left.extend(alike)
    left_parameters = [live for live in parameters if live.name not in used]
    flat = [live for live in left_parameters if flat_names(live.tensor)]
    if flat and flat == left_parameters:  # each holds many parameters, so no pairing can be found
        names = tuple(live.name for live in flat[:3])
        yield from (replace(entry, live=flat[0], is_guess=True, candidates=names) for entry in left)
        return
    is_paired = [entry.tensor.ndim for entry in left] == [len(live.shape) for live in left_parameters]
    for index, entry in enumerate(left):
        yield replace(entry, live=left_parameters[index] if is_paired else None, is_guess=is_paired)


def unknown_tensor_finding(unknown: UnknownTensor, context: ModelContext) -> Finding:
    """Return the finding for a tensor that is not in the model: stale if it once was a parameter, or foreign."""
    tensor, live = unknown.tensor, unknown.live
    where = f"{' and '.join(member.where for member in unknown.members[:3])} {shape_text(tensor)}"
    if live is None and unknown.candidates:
        names = " or ".join(map(quoted, unknown.candidates))
        return codes.STALE.finding(
            "", f"{where} is not in the model; it may be an older {names}, which was replaced", REBUILD_HINT
        )
    if live is None:
        return _disappeared_finding(unknown, where, context)
    if flat_names(live.tensor):
        flat = " or ".join(map(quoted, unknown.candidates or (live.name,)))
        return codes.STALE.finding(
            live.name,
            f"{where} is now part of {flat}: FullyShardedDataParallel flattened it after the groups were built",
            f"{REBUILD_HINT}, or wrap with use_orig_params=True",
        )
    if not tensor.is_meta and address(tensor) == address(live.tensor) != 0:
        effect = "the gradients of the model do not reach it" if tensor.requires_grad else "it gets no gradient"
        return codes.STALE.finding(
            live.name,
            f"{where} shares the memory of {quoted(live.name)} but is another object, as in state_dict() or .data: "
            f"{effect}, so no step moves the parameter",
            _USE_NAMED_PARAMETERS,
        )
    guess = "probably " if unknown.is_guess else ""
    reason = _replacement_reason(tensor, live, unknown.name, context)
    return codes.STALE.finding(live.name, f"{where} is {guess}an older {quoted(live.name)}: {reason}", REBIND_HINT)


def _disappeared_finding(unknown: UnknownTensor, where: str, context: ModelContext) -> Finding:
    name = unknown.name or ""
    disappeared = _find_disappeared(name, context) if name else None
    if disappeared is not None and disappeared.is_stale:
        return codes.STALE.finding(name, f"{where} was {quoted(name)}: {disappeared.reason}", disappeared.hint)
    recorded = f", recorded as {quoted(name)}," if name else ""
    if disappeared is not None:
        reason = disappeared.reason
    elif name:
        reason = "the model has no parameter of that name"
    else:
        reason = "the model has no parameter that it could have been"
    return codes.FOREIGN.finding(
        name,
        f"{where}{recorded} is not a parameter of the model: {reason}",
        "remove the tensor from the group, or register its module in the model",
    )
