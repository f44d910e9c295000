"""The errors for a donor that does not fit on the base."""

from __future__ import annotations

from collections.abc import Sequence

from ckptkit.comparison import KeyPair, StateDictDiff
from ckptkit.comparison.hints import joined_hint
from ckptkit.core.checkpoint import Checkpoint, Entry
from ckptkit.core.patterns import drop_options, pattern_for
from ckptkit.core.text import listed, quoted
from ckptkit.errors import ModelError, PlanError
from ckptkit.plans.overlays.choices import Sides, in_words_of
from ckptkit.plans.overlays.mismatch_hints import Spelling, for_others, in_python, mismatch_hint, on_command_line

__all__ = ["mismatch_error", "no_match_error", "refusal_error", "refuse_unexpected"]

_MOST_DROPPED = 6  # keys that a hint names
_MAPPINGS = ("dict", "OrderedDict", "defaultdict")


def refuse_unexpected(keys: Sequence[str], sides: Sides) -> None:
    """Raise ``PlanError`` for keys that the base does not have, if there are any."""

    def hint(spell: Spelling) -> str:
        skip, add = (spell("on_unexpected", pattern_for(keys[0], keys), action) for action in ("skip", "add"))
        added = "" if sides.is_loading else f", {add} adds it"
        return f"{skip} leaves it out{added}{for_others(keys, spell)}"

    if keys:
        raise PlanError(f"the {sides.base} has no {listed(keys, 1)}", hint=hint(on_command_line), call=hint(in_python))


def mismatch_error(pairs: Sequence[KeyPair], role: str, sides: Sides) -> PlanError:
    """Return the error for tensors that differ in shape."""
    first, others = pairs[0], len(pairs) - 1
    wanted, given = list(first.expected.shape), list(first.found.shape)
    more = f", and {others} more differ in shape" if others else ""
    return PlanError(
        f"{quoted(first.key)} is {wanted} in the {sides.base} and {given} in the {sides.donor or role}{more}",
        hint=mismatch_hint(pairs, on_command_line, sides),
        call=mismatch_hint(pairs, in_python, sides),
    )


def refusal_error(result: StateDictDiff) -> ModelError:
    """Return the error where the model's own code refuses what torch would give it."""
    keys = [info.key for info in result.unexpected[:_MOST_DROPPED]]
    return ModelError(
        f"load_state_dict failed: {result.refusals[0]}",
        hint=f"if these tensors are not needed, leave them out: {drop_options(keys)}" if keys else None,
    )


def no_match_error(result: StateDictDiff, donor: Checkpoint, role: str, sides: Sides) -> PlanError:
    """Return the error for a donor that has no tensor of the base."""
    role = sides.donor or role
    if not donor:
        return _no_tensor_error(donor.entries, role)
    expected = result.expected_checkpoint.argument or sides.base.upper()
    found = result.found_checkpoint.argument or role.upper()
    hint = joined_hint(result.hints) or f"compare the shapes: ckpt diff {expected} {found}"
    hint = in_words_of(sides, role, hint)
    return PlanError(
        f"the {role} has no tensor with a key and shape of the {sides.base}, so there is nothing to "
        f"{'load' if sides.is_loading else 'merge'}",
        hint=hint,
    )


def _no_tensor_error(entries: Sequence[Entry], role: str) -> PlanError:
    """Return the error for a donor without tensors: often a loaded file that has its state_dict one level deeper."""
    mapping = next((entry for entry in entries if entry.type in _MAPPINGS), None)
    if mapping is not None:
        found = f": its {quoted(mapping.path)} is a mapping"
        hint = f"give the mapping of tensors inside it, such as checkpoint[{quoted(mapping.path)}]"
    else:
        found = f": its {quoted(entries[0].path)} has the type {entries[0].type}" if entries else ""
        hint = "give a mapping of keys to tensors of torch"
    return PlanError(f"the {role} has no tensor{found}", hint=hint)
