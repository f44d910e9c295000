"""What became of each parameter that an optimizer holds: it lives, another took its place, or nobody did."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.core.text import listed, quoted
from ckptkit.errors import GroupsError
from ckptkit.param_groups.live import Member
from ckptkit.param_groups.parameters import Inventory, LiveParameter, bare_name
from ckptkit.param_groups.validate.stale import UnknownTensor, find_rename, match_to_model

__all__ = ["Replacement", "find_replacements"]

# What weight norm makes of one tensor: two, whose numbers mean something else.
_PARTS = (".original0", ".original1", "_g", "_v")


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """Who stands in the place of one tensor from now on; ``same`` says that its state can be theirs."""

    live: tuple[LiveParameter, ...] = ()
    same: bool = False
    reason: str = ""


def find_replacements(
    inventory: Inventory, members: Sequence[Member], *, guess: bool, beside: Collection[int]
) -> dict[int, Replacement]:
    """Return the heirs of each tensor among ``members`` that is not in the model, by its ``id``.

    ``beside`` are the ids of what belongs elsewhere: it neither has heirs nor is one.

    Raises ``GroupsError`` where only its shape or place says which one it was, unless ``guess``, and where two
    tensors have one heir.
    """
    places: dict[int, list[Member]] = {}
    for member in members:
        places.setdefault(id(member.tensor), []).append(member)
    strangers = [
        UnknownTensor(stand[0].tensor, tuple(stand))
        for key, stand in places.items()
        if key not in inventory.parameters and key not in beside
    ]
    missing = [
        live for key, live in inventory.parameters.items() if key not in places and live.trainable and key not in beside
    ]
    ends = _ends(missing)
    identified = [_by_its_end(one, ends) for one in match_to_model(inventory, strangers, missing)]
    _refuse_guesses(identified, guess=guess)
    replacement: dict[int, Replacement] = {}
    taken: dict[int, UnknownTensor] = {}
    for stranger in identified:
        replacement[id(stranger.tensor)] = _heirs_of(inventory, stranger, places, taken)
    return replacement


def _ends(missing: Sequence[LiveParameter]) -> dict[str, list[LiveParameter]]:
    """Return the parameters by each end of their names, as of the network inside a LightningModule."""
    found: dict[str, list[LiveParameter]] = {}
    for live in missing:
        segments = bare_name(live.name).split(".")
        for start in range(1, len(segments)):
            found.setdefault(".".join(segments[start:]), []).append(live)
    return found


def _by_its_end(stranger: UnknownTensor, ends: Mapping[str, Sequence[LiveParameter]]) -> UnknownTensor:
    found = ends.get(bare_name(stranger.name or ""), ())
    if stranger.live is not None or not found:
        return stranger
    if len(found) == 1:
        return UnknownTensor(stranger.tensor, stranger.members, found[0], is_guess=True)
    return UnknownTensor(stranger.tensor, stranger.members, candidates=tuple(live.name for live in found[:3]))


def _refuse_guesses(identified: Sequence[UnknownTensor], *, guess: bool) -> None:
    unclear = [one for one in identified if (one.is_guess and not guess if one.live is not None else one.candidates)]
    if not unclear:
        return
    first, more = unclear[0], f" (and {len(unclear) - 1} more)" if unclear[1:] else ""
    where, shape = first.members[0].where, tuple(first.tensor.shape)
    if first.live is not None:
        raise GroupsError(
            f"{where} {shape} is not in the model, and only its shape or place says that it was "
            f"{quoted(first.live.name)}{more}",
            hint="guess=True takes it for that; an optimizer that was built from model.named_parameters() knows",
        )
    raise GroupsError(
        f"{where} {shape} is not in the model, and may have been any of {listed(first.candidates)}{more}",
        hint="only an optimizer that was built from model.named_parameters() knows which",
    )


def _heirs_of(
    inventory: Inventory, stranger: UnknownTensor, places: Collection[int], taken: dict[int, UnknownTensor]
) -> Replacement:
    live, name = stranger.live, stranger.name
    rename = find_rename(inventory, name) if name else None
    if name and rename is not None and (live is None or live.name in rename.names):
        found = [one for one in map(inventory.named, rename.names) if one is not None]
        several = len(found) > 1 or name.endswith(_PARTS)
        free = [one for one in found if id(one.tensor) not in places and id(one.tensor) not in taken]
        taken.update({id(one.tensor): stranger for one in free})
        return Replacement(tuple(free), same=not several, reason=rename.event)
    if live is None:
        return Replacement(reason="the model has no such parameter any more")
    if id(live.tensor) in places:
        return Replacement(reason=f"it is {quoted(live.name)} now, which has a place of its own")
    if type(live.tensor).__name__ == "FlatParameter":
        raise GroupsError(
            f"{stranger.members[0].where} is now part of {quoted(live.name)}, which "
            "FullyShardedDataParallel made of several parameters",
            hint="build the optimizer after the model is wrapped, or wrap with use_orig_params=True",
        )
    other = taken.setdefault(id(live.tensor), stranger)
    if other is stranger:
        return Replacement((live,), same=True)
    if live.aliases:
        return Replacement(reason=f"it is tied now: {quoted(live.name)} stands for both")
    raise GroupsError(
        f"{other.members[0].where} and {stranger.members[0].where} would both become {quoted(live.name)}",
        hint="the names that the optimizer recorded are not true: build it again from model.named_parameters()",
    )
