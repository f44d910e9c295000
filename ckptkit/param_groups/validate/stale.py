"""Tensors in a group that are not parameters of the model: whether they once were, and what became of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import quoted
from ckptkit.core.torch_types import Tensor
from ckptkit.param_groups.live import Member
from ckptkit.param_groups.parameters import Inventory, LiveParameter, address, bare_name, flat_names
from ckptkit.wrappers.table import PARAMETRIZATIONS, WRAPPERS

__all__ = [
    "REBIND_HINT",
    "REBUILD_HINT",
    "Disappeared",
    "ModelContext",
    "Rename",
    "UnknownTensor",
    "describe_replacement",
    "find_disappeared",
    "find_rename",
    "match_to_model",
    "shape_of",
    "unknown_tensor_finding",
]


@dataclass(frozen=True, slots=True, eq=False)
class Rename:
    """What became of a recorded name: the first parameter that stands in its place, and who put it there."""

    live: LiveParameter
    names: tuple[str, ...]  # of all parameters that came of it
    event: str  # what happened, as a clause


def find_rename(inventory: Inventory, recorded: str) -> Rename | None:
    """Return what ``recorded`` is called since its module was parametrized, pruned or adapted, or plain again.

    None where the model has the name itself, or nothing that can have come of it.
    """
    recorded = bare_name(recorded)
    if recorded in inventory.by_bare_name:
        return None
    module, dot, leaf = recorded.rpartition(".")
    for event, names in _longer(f"{module}{dot}", leaf):
        found = [inventory.by_bare_name[name] for name in names if name in inventory.by_bare_name]
        if found and all(name in inventory.by_bare_name or name in inventory.bare_buffers for name in names):
            return Rename(found[0], tuple(live.name for live in found), event)
    for event, name in _shorter(recorded):
        live = inventory.by_bare_name.get(name)
        if live is not None:
            return Rename(live, (live.name,), event)
    return None


def _longer(prefix: str, leaf: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for row in PARAMETRIZATIONS:
        yield f"{row.origin} was applied", tuple(f"{prefix}{row.parent}{leaf}{ending}" for ending in row.endings)
    for wrapper in WRAPPERS:
        if wrapper.after:
            yield f"its module was wrapped, as in {wrapper.origin}", (f"{prefix}{wrapper.mark}.{leaf}",)


def _shorter(recorded: str) -> Iterator[tuple[str, str]]:
    for row in PARAMETRIZATIONS:
        for ending in row.endings:
            module, dot, leaf = recorded.removesuffix(ending).rpartition(".")
            before = f"{module}{dot}"
            if recorded.endswith(ending) and before.endswith(row.parent):
                yield f"{row.origin} was removed", f"{before.removesuffix(row.parent)}{leaf}"
    for wrapper in WRAPPERS:
        before, mark, leaf = recorded.rpartition(f"{wrapper.mark}.")
        if wrapper.after and mark and (not before or before.endswith(".")):
            yield f"its module is no longer in {wrapper.origin}", f"{before}{leaf}"


REBUILD_HINT = "build the groups and the optimizer again, after the last change to the model"
REBIND_HINT = f"{REBUILD_HINT}, or rebind(optimizer, model)"


@dataclass(frozen=True, eq=False)
class ModelContext:
    """The model beside all that the groups hold: ids that are live, and names whose objects are older ones."""

    inventory: Inventory
    held: Collection[int]
    older: Collection[str] = ()

    @cached_property
    def nothing_held(self) -> bool:
        """Whether no parameter of the model is in a group, so that all of them are new."""
        return not any(key in self.inventory.parameters for key in self.held)


def describe_replacement(tensor: Tensor, live: LiveParameter, recorded: str | None, scene: ModelContext) -> str:
    """Return what made the model have another object than ``tensor`` where ``live`` stands."""
    rename = find_rename(scene.inventory, recorded) if recorded else None
    if recorded and rename is not None and live.name in rename.names:
        now = " and ".join(map(quoted, rename.names))
        return f"{quoted(recorded)} became {now} when {rename.event}, after the groups were built"
    if recorded and id(live.tensor) in scene.held and bare_name(recorded) in map(bare_name, live.aliases):
        return f"{quoted(recorded)} was tied to {quoted(live.name)} after the groups were built"
    shape = shape_of(tensor)
    if live.lazy or shape != live.shape:
        now = "one without a shape yet" if live.lazy else f"a new one of shape {live.shape}"
        return f"the model has {now}, as after a head was replaced"
    if tensor.is_meta and not live.tensor.is_meta:
        return "it stayed on the meta device when the model got its memory (to_empty() or load_state_dict(assign=True))"
    if live.tensor.is_meta and not tensor.is_meta:
        return "the model has a new one on the meta device, as after to('meta')"
    if _is_sharded(live.tensor) and not _is_sharded(tensor):
        return "the model has a DTensor in its place since fully_shard(), which was called after the groups were built"
    if tensor.device != live.tensor.device or tensor.dtype != live.tensor.dtype:
        return f"the model has a new one ({live.tensor.dtype}, {live.tensor.device}), as after a conversion by copy"
    return f"the model has a new object, as {_new_object(live, scene)}"


def _new_object(live: LiveParameter, scene: ModelContext) -> str:
    if type(scene.inventory.model).__name__ == "AveragedModel":
        return "an AveragedModel is a copy: validate the model that trains"
    if scene.nothing_held:
        return "after load_state_dict(assign=True), a deep copy or a model that was loaded whole"
    siblings = scene.inventory.by_module[live.module]
    if live.module and len(siblings) > 1 and all(one.name in scene.older for one in siblings):
        return f"after the module {quoted(live.module)} was replaced, or load_state_dict(assign=True) on it"
    return "after its module was replaced, or an assignment of a new nn.Parameter"


@dataclass(frozen=True, slots=True, eq=False)
class Disappeared:
    """What became of a parameter that the model has no name for any more, and whether it was one for certain."""

    reason: str
    stale: bool = True
    hint: str = REBUILD_HINT


def find_disappeared(recorded: str, scene: ModelContext) -> Disappeared | None:
    """Return what became of the parameter that was recorded under a name which the model does not have, or None."""
    name = bare_name(recorded)
    module, _, leaf = name.rpartition(".")
    found = scene.inventory.modules.get(module)
    if found is None:
        return None
    kind = type(found)
    where = f"{quoted(module)} is" if module else "the model is"
    if "quantized" in kind.__module__:
        reason = f"{where} a quantised {kind.__name__} now, which does not train"
        return Disappeared(reason, hint="train the model before it is quantised")
    if kind.__name__ == "Identity":
        return Disappeared(f"{where} an Identity now, as after fuse_modules() folded it into another layer")
    return Disappeared(f"{where} a {kind.__name__} without a parameter {quoted(leaf)}", stale=False)


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of ``tensor``, or ``()`` while it has none."""
    try:
        return tuple(tensor.shape)
    except RuntimeError:  # uninitialised
        return ()


_FROM_MODEL = "take the parameters from model.named_parameters(), never from state_dict() or .data"


@dataclass(frozen=True, slots=True, eq=False)
class UnknownTensor:
    """A tensor that is not in the model, the places where it stands, and the live parameter that it once was."""

    tensor: Tensor
    places: tuple[Member, ...]
    live: LiveParameter | None = None
    guessed: bool = False  # the counterpart was told by its shape or place, not by name or memory
    candidates: tuple[str, ...] = ()

    @property
    def name(self) -> str | None:
        """The name that was recorded with it, if any."""
        return next((place.name for place in self.places if place.name), None)


def match_to_model(
    inventory: Inventory, unknown: Sequence[UnknownTensor], missing: Sequence[LiveParameter]
) -> list[UnknownTensor]:
    """Return the strangers with their live counterparts, where these can be told.

    By recorded name, then by memory; else by what the groups lack: first by shape, then in order where
    numbers and dimensions agree.
    """
    told: dict[int, UnknownTensor] = {}
    # A name that was recorded from a part of the model lacks the beginning, and may be that of several.
    endings = {ending for live in missing if unknown for ending in _endings(bare_name(live.name))}
    for stranger in unknown:
        live = None
        if stranger.name:
            rename = find_rename(inventory, stranger.name)
            live = inventory.named(stranger.name) or (rename.live if rename else None)
            live = live or inventory.flattened.get(bare_name(stranger.name))
        live = live or inventory.by_address.get(address(stranger.tensor))
        if live is not None or (stranger.name and bare_name(stranger.name) not in endings):
            told[id(stranger.tensor)] = UnknownTensor(stranger.tensor, stranger.places, live)
    claimed = {stranger.live.name for stranger in told.values() if stranger.live}
    lost = [live for live in missing if live.name not in claimed]
    for stranger in _guess([one for one in unknown if id(one.tensor) not in told], lost):
        told[id(stranger.tensor)] = stranger
    return [told[id(stranger.tensor)] for stranger in unknown]


def _endings(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition(".")[2]


def _guess(unknown: Sequence[UnknownTensor], lost: Sequence[LiveParameter]) -> Iterator[UnknownTensor]:
    by_shape: dict[tuple[int, ...], list[LiveParameter]] = defaultdict(list)
    for live in lost:
        by_shape[live.shape].append(live)
    alike: dict[tuple[int, ...], list[UnknownTensor]] = defaultdict(list)
    for stranger in unknown:
        alike[shape_of(stranger.tensor)].append(stranger)
    left: list[UnknownTensor] = []
    taken: set[str] = set()
    for shape, strangers in alike.items():
        found = by_shape.get(shape, [])
        if len(found) == len(strangers):
            for stranger, live in zip(strangers, found, strict=True):
                taken.add(live.name)
                yield UnknownTensor(stranger.tensor, stranger.places, live, guessed=True)
        elif found:
            names = tuple(live.name for live in found[:3])
            taken.update(live.name for live in found)
            yield from (UnknownTensor(one.tensor, one.places, candidates=names) for one in strangers)
        else:
            left.extend(strangers)
    still = [live for live in lost if live.name not in taken]
    flat = [live for live in still if flat_names(live.tensor)]
    if flat and flat == still:  # many went into each, and nothing tells which into which
        names = tuple(live.name for live in flat[:3])
        yield from (UnknownTensor(one.tensor, one.places, flat[0], guessed=True, candidates=names) for one in left)
        return
    paired = [one.tensor.ndim for one in left] == [len(live.shape) for live in still]
    for index, stranger in enumerate(left):
        yield UnknownTensor(stranger.tensor, stranger.places, still[index] if paired else None, guessed=paired)


def unknown_tensor_finding(stranger: UnknownTensor, scene: ModelContext) -> Finding:
    """Return the finding for one tensor that is not in the model."""
    tensor, live = stranger.tensor, stranger.live
    where = f"{' and '.join(place.where for place in stranger.places[:3])} {shape_of(tensor)}"
    if live is None and stranger.candidates:
        names = ", ".join(map(quoted, stranger.candidates))
        return _stale(
            "", f"{where} is not in the model; it may have been {names}, which is another object now", REBUILD_HINT
        )
    if live is None:
        return _gone(stranger, where, scene)
    if flat_names(live.tensor):
        into = f"went into {' or '.join(map(quoted, stranger.candidates or (live.name,)))}"
        how = "FullyShardedDataParallel flattened it after the groups were built"
        return _stale(live.name, f"{where} {into}: {how}", f"{REBUILD_HINT}, or wrap with use_orig_params=True")
    if not tensor.is_meta and address(tensor) == address(live.tensor) != 0:
        how = "it gets no gradient and never moves" if not tensor.requires_grad else "the model's gradients pass it by"
        what = f"{where} shares the memory of {quoted(live.name)} but is another object, as in state_dict() or .data"
        return _stale(live.name, f"{what}: {how}", _FROM_MODEL)
    maybe = "probably an older " if stranger.guessed else "an older "
    reason = describe_replacement(tensor, live, stranger.name, scene)
    return _stale(live.name, f"{where} is {maybe}{quoted(live.name)}: {reason}", REBIND_HINT)


def _gone(stranger: UnknownTensor, where: str, scene: ModelContext) -> Finding:
    name = stranger.name or ""
    gone = find_disappeared(name, scene) if name else None
    if gone is not None and gone.stale:
        return _stale(name, f"{where} was {quoted(name)}: {gone.reason}", gone.hint)
    called = f", recorded as {quoted(name)}," if name else ""
    reason = (
        gone.reason if gone is not None else f"the model has no parameter {'of that name' if name else 'in its place'}"
    )
    return Finding(
        "groups.foreign",
        "error",
        name,
        f"{where}{called} is not a parameter of the model: {reason}",
        "remove it, or register its module in the model",
    )


def _stale(key: str, message: str, hint: str) -> Finding:
    return Finding("groups.stale", "error", key, message, hint)
