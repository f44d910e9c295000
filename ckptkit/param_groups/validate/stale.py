"""Tensors in a group that are not parameters of the model: whether they once were, and what became of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptkit.core.findings import Finding
from ckptkit.core.text import quoted
from ckptkit.param_groups.live import Member
from ckptkit.param_groups.parameters import Inventory, LiveParameter, address, bare_name, flat_names
from ckptkit.param_groups.validate.reasons import AGAIN, REBIND, Scene, shape_of, why_gone, why_other
from ckptkit.param_groups.validate.renames import find_rename

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Stranger", "explain", "identify"]

_FROM_MODEL = "take the parameters from model.named_parameters(), never from state_dict() or .data"


@dataclass(frozen=True, slots=True, eq=False)
class Stranger:
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


def identify(inventory: Inventory, unknown: Sequence[Stranger], missing: Sequence[LiveParameter]) -> list[Stranger]:
    """Return the strangers with their live counterparts, where these can be told.

    By recorded name, then by memory; else by what the groups lack: first by shape, then in order where
    numbers and dimensions agree.
    """
    told: dict[int, Stranger] = {}
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
            told[id(stranger.tensor)] = Stranger(stranger.tensor, stranger.places, live)
    claimed = {stranger.live.name for stranger in told.values() if stranger.live}
    lost = [live for live in missing if live.name not in claimed]
    for stranger in _guess([one for one in unknown if id(one.tensor) not in told], lost):
        told[id(stranger.tensor)] = stranger
    return [told[id(stranger.tensor)] for stranger in unknown]


def _endings(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition(".")[2]


def _guess(unknown: Sequence[Stranger], lost: Sequence[LiveParameter]) -> Iterator[Stranger]:
    by_shape: dict[tuple[int, ...], list[LiveParameter]] = defaultdict(list)
    for live in lost:
        by_shape[live.shape].append(live)
    alike: dict[tuple[int, ...], list[Stranger]] = defaultdict(list)
    for stranger in unknown:
        alike[shape_of(stranger.tensor)].append(stranger)
    left: list[Stranger] = []
    taken: set[str] = set()
    for shape, strangers in alike.items():
        found = by_shape.get(shape, [])
        if len(found) == len(strangers):
            for stranger, live in zip(strangers, found, strict=True):
                taken.add(live.name)
                yield Stranger(stranger.tensor, stranger.places, live, guessed=True)
        elif found:
            names = tuple(live.name for live in found[:3])
            taken.update(live.name for live in found)
            yield from (Stranger(one.tensor, one.places, candidates=names) for one in strangers)
        else:
            left.extend(strangers)
    still = [live for live in lost if live.name not in taken]
    flat = [live for live in still if flat_names(live.tensor)]
    if flat and flat == still:  # many went into each, and nothing tells which into which
        names = tuple(live.name for live in flat[:3])
        yield from (Stranger(one.tensor, one.places, flat[0], guessed=True, candidates=names) for one in left)
        return
    paired = [one.tensor.ndim for one in left] == [len(live.shape) for live in still]
    for index, stranger in enumerate(left):
        yield Stranger(stranger.tensor, stranger.places, still[index] if paired else None, guessed=paired)


def explain(stranger: Stranger, scene: Scene) -> Finding:
    """Return the finding for one tensor that is not in the model."""
    tensor, live = stranger.tensor, stranger.live
    where = f"{' and '.join(place.where for place in stranger.places[:3])} {shape_of(tensor)}"
    if live is None and stranger.candidates:
        names = ", ".join(map(quoted, stranger.candidates))
        return _stale("", f"{where} is not in the model; it may have been {names}, which is another object now", AGAIN)
    if live is None:
        return _gone(stranger, where, scene)
    if flat_names(live.tensor):
        into = f"went into {' or '.join(map(quoted, stranger.candidates or (live.name,)))}"
        how = "FullyShardedDataParallel flattened it after the groups were built"
        return _stale(live.name, f"{where} {into}: {how}", f"{AGAIN}, or wrap with use_orig_params=True")
    if not tensor.is_meta and address(tensor) == address(live.tensor) != 0:
        how = "it gets no gradient and never moves" if not tensor.requires_grad else "the model's gradients pass it by"
        what = f"{where} shares the memory of {quoted(live.name)} but is another object, as in state_dict() or .data"
        return _stale(live.name, f"{what}: {how}", _FROM_MODEL)
    maybe = "probably an older " if stranger.guessed else "an older "
    reason = why_other(tensor, live, stranger.name, scene)
    return _stale(live.name, f"{where} is {maybe}{quoted(live.name)}: {reason}", REBIND)


def _gone(stranger: Stranger, where: str, scene: Scene) -> Finding:
    name = stranger.name or ""
    gone = why_gone(name, scene) if name else None
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
