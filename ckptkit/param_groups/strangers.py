"""Tensors in a group that are not parameters of the model: whether they once were, and what became of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.findings import Finding
from ckptkit.param_groups.inventory import Inventory, LiveParameter, address
from ckptkit.param_groups.members import Member
from ckptkit.text import quoted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Stranger", "explain", "identify"]

_AGAIN = "build the groups and the optimizer again, after the last change to the model"
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
    for stranger in unknown:
        live = None
        if stranger.name:
            live = inventory.named(stranger.name) or _reparametrised(inventory, stranger.name)
        live = live or inventory.by_address.get(address(stranger.tensor))
        if live is not None or stranger.name:
            told[id(stranger.tensor)] = Stranger(stranger.tensor, stranger.places, live)
    claimed = {stranger.live.name for stranger in told.values() if stranger.live}
    lost = [live for live in missing if live.name not in claimed]
    for stranger in _guess([one for one in unknown if id(one.tensor) not in told], lost):
        told[id(stranger.tensor)] = stranger
    return [told[id(stranger.tensor)] for stranger in unknown]


def _reparametrised(inventory: Inventory, name: str) -> LiveParameter | None:
    """Find what weight norm and its like made of a parameter: new objects under longer names."""
    module, _, leaf = name.rpartition(".")
    dot = "." if module else ""
    longer = (f"{module}{dot}parametrizations.{leaf}.original0", f"{module}{dot}{leaf}_g")
    return next((live for live in map(inventory.named, longer) if live is not None), None)


def _guess(unknown: Sequence[Stranger], lost: Sequence[LiveParameter]) -> Iterator[Stranger]:
    by_shape: dict[tuple[int, ...], list[LiveParameter]] = defaultdict(list)
    for live in lost:
        by_shape[live.shape].append(live)
    alike: dict[tuple[int, ...], list[Stranger]] = defaultdict(list)
    for stranger in unknown:
        alike[_shape(stranger.tensor)].append(stranger)
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
    paired = [one.tensor.ndim for one in left] == [len(live.shape) for live in still]
    for index, stranger in enumerate(left):
        yield Stranger(stranger.tensor, stranger.places, still[index] if paired else None, guessed=paired)


def explain(stranger: Stranger) -> Finding:
    """Return the finding for one tensor that is not in the model."""
    tensor, live = stranger.tensor, stranger.live
    where = " and ".join(place.where for place in stranger.places[:3])
    shape = _shape(tensor)
    if live is None and stranger.candidates:
        names = ", ".join(map(quoted, stranger.candidates))
        message = f"{where} {shape} is not in the model; it may have been {names}, which is another object now"
        return _stale("", message, _AGAIN)
    if live is None:
        called = f", recorded as {quoted(stranger.name)}," if stranger.name else ""
        reason = "no parameter of that name" if stranger.name else "no parameter in its place"
        return Finding(
            "groups.foreign",
            "error",
            stranger.name or "",
            f"{where}{called} {shape} is not a parameter of the model, which has {reason}",
            "remove it, or register its module: parts in a plain list or dict need nn.ModuleList or nn.ModuleDict",
        )
    if not tensor.is_meta and address(tensor) == address(live.tensor) != 0:
        how = "it gets no gradient and never moves" if not tensor.requires_grad else "the model's gradients pass it by"
        what = f"{where} shares the memory of {quoted(live.name)} but is another object, as in state_dict() or .data"
        return _stale(live.name, f"{what}: {how}", _FROM_MODEL)
    maybe = "probably an older " if stranger.guessed else "an older "
    message = f"{where} {shape} is {maybe}{quoted(live.name)}: {_why(tensor, shape, live, stranger.name)}"
    return _stale(live.name, message, _AGAIN)


def _why(tensor: Any, shape: tuple[int, ...], live: LiveParameter, recorded: str | None) -> str:
    if recorded and live.name.rpartition(".")[2] in {"original0", f"{recorded.rpartition('.')[2]}_g"}:
        return f"{quoted(recorded)} was reparametrised after the groups were built"
    if live.lazy or shape != live.shape:
        now = "one without a shape yet" if live.lazy else f"a new one of shape {live.shape}"
        return f"the model has {now}, as after a head was replaced"
    if tensor.is_meta and not live.tensor.is_meta:
        return "it stayed on the meta device when the model got its memory (to_empty() or load_state_dict(assign=True))"
    if tensor.device != live.tensor.device or tensor.dtype != live.tensor.dtype:
        return f"the model has a new one ({live.tensor.dtype}, {live.tensor.device}), as after a conversion by copy"
    return "the model has a new object, as after load_state_dict(assign=True), a deep copy or a replaced module"


def _stale(key: str, message: str, hint: str) -> Finding:
    return Finding("groups.stale", "error", key, message, hint)


def _shape(tensor: Any) -> tuple[int, ...]:
    try:
        return tuple(tensor.shape)
    except RuntimeError:  # uninitialised
        return ()
