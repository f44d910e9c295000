"""Find which parameters of a model replaced the tensors of an optimizer that are no longer in the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.core.text import listed, quoted
from ckptkit.core.torch_optim import source_of_names
from ckptkit.errors import GroupsError
from ckptkit.param_groups.live import Member
from ckptkit.param_groups.parameters import LiveModel, LiveParameter, bare_name
from ckptkit.param_groups.validate.stale import UnknownTensor, find_rename, match_to_model

__all__ = ["Replacement", "find_replacements"]

# Weight norm splits one tensor into two with other meanings.
_WEIGHT_NORM_ENDINGS = (".original0", ".original1", "_g", "_v")


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """The parameters that replace one old tensor: none, one or several.

    ``keeps_state`` is True where exactly one parameter replaces the tensor and can use its optimizer state.
    """

    live: tuple[LiveParameter, ...] = ()
    keeps_state: bool = False
    reason: str = ""


def find_replacements(
    live_model: LiveModel, members: Sequence[Member], *, guess: bool, beside: Collection[int]
) -> dict[int, Replacement]:
    """Return the replacement of each tensor in ``members`` that is not in the model, by the ``id`` of the tensor.

    ``beside`` has the ids of tensors that are neither replaced nor replacements. Raises ``GroupsError`` where only
    shape or position identifies a replacement, unless ``guess``, and where two tensors would have the same replacement.
    """
    members_by_id: dict[int, list[Member]] = {}
    for member in members:
        members_by_id.setdefault(id(member.tensor), []).append(member)
    unknown = [
        UnknownTensor(same_tensor[0].tensor, tuple(same_tensor))
        for key, same_tensor in members_by_id.items()
        if key not in live_model.parameters and key not in beside
    ]
    missing = [
        live
        for key, live in live_model.parameters.items()
        if key not in members_by_id and live.trainable and key not in beside
    ]
    by_ending = _by_name_ending(missing)
    matched = [_match_by_ending(tensor, by_ending) for tensor in match_to_model(live_model, unknown, missing)]
    _refuse_guesses(matched, guess=guess)
    claimed: dict[int, UnknownTensor] = {}
    return {id(tensor.tensor): _replacement(live_model, tensor, members_by_id, claimed) for tensor in matched}


def _by_name_ending(missing: Sequence[LiveParameter]) -> dict[str, list[LiveParameter]]:
    """Return the parameters by each ending of their names: ``fc.weight`` and ``weight`` for ``net.fc.weight``."""
    found: dict[str, list[LiveParameter]] = {}
    for live in missing:
        segments = bare_name(live.name).split(".")
        for start in range(1, len(segments)):
            found.setdefault(".".join(segments[start:]), []).append(live)
    return found


def _match_by_ending(tensor: UnknownTensor, by_ending: Mapping[str, Sequence[LiveParameter]]) -> UnknownTensor:
    """Return ``tensor`` with a guess where its name was recorded in a submodule, as for a net in a LightningModule."""
    found = by_ending.get(bare_name(tensor.name or ""), ())
    if tensor.live is not None or not found:
        return tensor
    if len(found) == 1:
        return UnknownTensor(tensor.tensor, tensor.members, found[0], is_guess=True)
    return UnknownTensor(tensor.tensor, tensor.members, candidates=tuple(live.name for live in found[:3]))


def _refuse_guesses(matched: Sequence[UnknownTensor], *, guess: bool) -> None:
    unclear = [
        tensor
        for tensor in matched
        if (tensor.is_guess and not guess if tensor.live is not None else tensor.candidates)
    ]
    if not unclear:
        return
    first, more = unclear[0], f" (and {len(unclear) - 1} more)" if unclear[1:] else ""
    where, shape = first.members[0].where, tuple(first.tensor.shape)
    if first.live is not None:
        raise GroupsError(
            f"{where} {shape} is not in the model, and only its shape or position suggests that it was "
            f"{quoted(first.live.name)}{more}",
            hint=f"guess=True accepts this; an optimizer built from {source_of_names()} records the names",
        )
    raise GroupsError(
        f"{where} {shape} is not in the model, and may have been any of {listed(first.candidates)}{more}",
        hint=f"only an optimizer built from {source_of_names()} records the names",
    )


def _replacement(
    live_model: LiveModel, tensor: UnknownTensor, held: Collection[int], claimed: dict[int, UnknownTensor]
) -> Replacement:
    """Return the replacement of ``tensor``.

    ``held`` has the ids of the tensors that are in a group. ``claimed`` maps the id of
    each replacement to the tensor that it replaces, and is extended here.
    """
    live, name = tensor.live, tensor.name
    rename = find_rename(live_model, name) if name else None
    if name and rename is not None and (live is None or live.name in rename.names):
        found = [parameter for parameter in map(live_model.named, rename.names) if parameter is not None]
        is_weight_norm = len(found) > 1 or name.endswith(_WEIGHT_NORM_ENDINGS)
        free = [
            parameter for parameter in found if id(parameter.tensor) not in held and id(parameter.tensor) not in claimed
        ]
        claimed.update({id(parameter.tensor): tensor for parameter in free})
        return Replacement(tuple(free), keeps_state=bool(free) and not is_weight_norm, reason=rename.event)
    if live is None:
        return Replacement(reason="the model no longer has this parameter")
    if id(live.tensor) in held:
        return Replacement(reason=f"the model now has {quoted(live.name)} instead, which is in a group already")
    if type(live.tensor).__name__ == "FlatParameter":
        raise GroupsError(
            f"FullyShardedDataParallel flattened {tensor.members[0].where} and others into {quoted(live.name)}",
            hint="build the optimizer after the model is wrapped, or wrap with use_orig_params=True",
        )
    first = claimed.setdefault(id(live.tensor), tensor)
    if first is tensor:
        return Replacement((live,), keeps_state=True)
    if live.aliases:
        return Replacement(reason=f"{quoted(live.name)} is tied now and replaces both parameters")
    raise GroupsError(
        f"{first.members[0].where} and {tensor.members[0].where} would both become {quoted(live.name)}",
        hint=f"the recorded names are wrong: build the optimizer again from {source_of_names()}",
    )
