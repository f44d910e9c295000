"""Why a group holds an object that is no longer in the model: what was done to the model after the groups were made."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckptkit.core.text import quoted
from ckptkit.param_groups.parameters import Inventory, LiveParameter, bare_name
from ckptkit.param_groups.validate.renames import find_rename

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AGAIN", "REBIND", "Gone", "Scene", "shape_of", "why_gone", "why_other"]

AGAIN = "build the groups and the optimizer again, after the last change to the model"
REBIND = f"{AGAIN}, or rebind(optimizer, model)"


@dataclass(frozen=True, eq=False)
class Scene:
    """The model beside all that the groups hold: ids that are live, and names whose objects are older ones."""

    inventory: Inventory
    held: Collection[int]
    older: Collection[str] = ()

    @cached_property
    def nothing_held(self) -> bool:
        """Whether no parameter of the model is in a group, so that all of them are new."""
        return not any(key in self.inventory.parameters for key in self.held)


def why_other(tensor: Tensor, live: LiveParameter, recorded: str | None, scene: Scene) -> str:
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


def _new_object(live: LiveParameter, scene: Scene) -> str:
    if type(scene.inventory.model).__name__ == "AveragedModel":
        return "an AveragedModel is a copy: validate the model that trains"
    if scene.nothing_held:
        return "after load_state_dict(assign=True), a deep copy or a model that was loaded whole"
    siblings = scene.inventory.by_module[live.module]
    if live.module and len(siblings) > 1 and all(one.name in scene.older for one in siblings):
        return f"after the module {quoted(live.module)} was replaced, or load_state_dict(assign=True) on it"
    return "after its module was replaced, or an assignment of a new nn.Parameter"


@dataclass(frozen=True, slots=True, eq=False)
class Gone:
    """What became of a parameter that the model has no name for any more, and whether it was one for certain."""

    reason: str
    stale: bool = True
    hint: str = AGAIN


def why_gone(recorded: str, scene: Scene) -> Gone | None:
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
        return Gone(reason, hint="train the model before it is quantised")
    if kind.__name__ == "Identity":
        return Gone(f"{where} an Identity now, as after fuse_modules() folded it into another layer")
    return Gone(f"{where} a {kind.__name__} without a parameter {quoted(leaf)}", stale=False)


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of ``tensor``, or ``()`` while it has none."""
    try:
        return tuple(tensor.shape)
    except RuntimeError:  # uninitialised
        return ()
