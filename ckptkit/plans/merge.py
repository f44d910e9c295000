"""Plans of a base and its donors: the base's keys, the donors' values where they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.comparison import KeyPair, StateDictDiff, diff_checkpoints
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import quoted
from ckptkit.core.ties import tied_keys
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.errors import PlanError
from ckptkit.plans.plan import Dropped, Plan, Step
from ckptkit.plans.steps import (
    dropped_entries,
    dropped_sources,
    make_step,
    refuse_ambiguous,
    refuse_suspicious,
    role_to_edit,
)
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Derivation, Rules
from ckptkit.rules.parse import as_rules
from ckptkit.tensor_ops.recipes import compose
from ckptkit.tensor_ops.suggestions import MISMATCH_NAMES, suggest, suggestions

__all__ = ["ON_MISMATCH", "ON_MISSING", "ON_UNEXPECTED", "TIED", "follow_ties", "plan_merge"]

TIED = "tied to "  # begins the rule of a step that follows a tie of the base
ON_MISSING = ("keep", "error")
ON_UNEXPECTED = ("skip", "add", "error")
ON_MISMATCH = ("error", "skip", *MISMATCH_NAMES)


def plan_merge(
    base: StateDictLike,
    donors: StateDictLike | Sequence[StateDictLike],
    rules: Rules | list[str] | None = None,
    *,
    on_missing: str = "keep",
    on_unexpected: str = "skip",
    on_mismatch: str = "error",
) -> Plan:
    """Return the plan of an overlay: the keys of ``base``, with the donors' values where key and shape agree.

    ``rules`` rename and filter the donors' keys first; of several donors the last that has a key wins.
    Values of another dtype are cast to the base's. ``on_missing`` (``keep``, ``error``): a base key that no
    donor has. ``on_unexpected`` (``skip``, ``add``, ``error``): a donor key that the base does not have.
    ``on_mismatch`` (``error``, ``skip``, or the name of a tensor operation, such as ``pad``): another shape. Raises
    ``PlanError`` where a policy says so, the operation does not make the shapes fit, or nothing matches at all.
    """
    policy = _Policy(on_unexpected, on_mismatch)
    _check_choice("on_missing", on_missing, ON_MISSING)
    _check_choice("on_unexpected", on_unexpected, ON_UNEXPECTED)
    _check_choice("on_mismatch", on_mismatch, ON_MISMATCH)
    base = as_checkpoint(base, "base")
    refuse_suspicious(base, "base")
    refuse_ambiguous(base, base)
    given = list(donors) if isinstance(donors, Sequence) else [donors]
    if not given:
        raise PlanError("there is no donor to take values from")
    overlays = []
    for number, thing in enumerate(given, start=1):
        role = "donor" if len(given) == 1 else f"donor{number}"
        overlays.append(_overlay(base, as_checkpoint(thing, role), role, as_rules(rules), policy))
    taken = {key: step for overlay in overlays for key, step in overlay.taken.items()}
    added = {key: step for overlay in overlays for key, step in overlay.added.items()}
    taken, notes = follow_ties(base, taken)
    present = taken.keys() | {key for overlay in overlays for key in overlay.mismatched}
    missing = [key for key in base if key not in present]
    if missing and on_missing == "error":
        raise PlanError(
            f"no donor has {quoted(missing[0])}{_and_more(len(missing) - 1)}",
            hint="--on-missing keep keeps the base's own values",
        )
    steps = [taken.get(key) or _kept(info, base) for key, info in base.items()]
    dropped = [*dropped_entries(base, "base"), *(drop for overlay in overlays for drop in overlay.dropped)]
    dropped += _replaced(overlays, taken | added)
    notes += [
        f"{overlay.role}: {note}" if len(overlays) > 1 else note for overlay in overlays for note in overlay.notes
    ]
    outs, edited_role = (*steps, *added.values()), role_to_edit(base, "base")
    return Plan(outs, tuple(dropped), base.metadata, tuple(notes), base.versions, edited_role)


def follow_ties(base: Checkpoint, taken: Mapping[str, Step]) -> tuple[dict[str, Step], list[str]]:
    """Return the steps with every key that the base ties to a taken one taken with it, and what remains in doubt.

    A model that loads the output writes both names into one memory, the last one over the others.
    """
    made, notes = dict(taken), []
    for keys in tied_keys(base.values()):
        leader = next((key for key in keys if key in taken), None)
        if leader is None:
            continue
        for key in keys:
            if key not in taken:
                out = replace(taken[leader].out, key=key)
                made[key] = replace(taken[leader], out=out, rule=f"{TIED}{quoted(leader)}")
            elif key != leader and (made[key].out.view is None or made[key].out.view != made[leader].out.view):
                notes.append(
                    f"{quoted(leader)} and {quoted(key)} are one tensor in the base, and two where they come from"
                )
    return made, notes


@dataclass(frozen=True, slots=True)
class _Policy:
    on_unexpected: str
    on_mismatch: str


@dataclass(frozen=True, slots=True)
class _Overlay:
    """What one donor brings."""

    role: str
    taken: Mapping[str, Step]
    added: Mapping[str, Step]
    mismatched: Sequence[str]
    dropped: Sequence[Dropped]
    notes: Sequence[str]


def _overlay(base: Checkpoint, donor: Checkpoint, role: str, rules: Rules, policy: _Policy) -> _Overlay:
    refuse_suspicious(donor, role)
    key_map = apply_rules(rules, donor)
    result = diff_checkpoints(base, donor, key_map)
    if result.shape_mismatched and policy.on_mismatch == "error":
        raise _mismatch_error(result, role)
    outputs = key_map.outputs()
    mended = {}
    if policy.on_mismatch in MISMATCH_NAMES:
        mended = {pair.key: _mended(pair, outputs[pair.key], role, donor, policy) for pair in result.shape_mismatched}
    if not result.matched and not mended and base and not (result.unexpected and policy.on_unexpected == "add"):
        raise _no_match_error(result, role)
    if result.unexpected and policy.on_unexpected == "error":
        raise PlanError(
            f"the base has no {quoted(result.unexpected[0].key)}{_and_more(len(result.unexpected) - 1)}",
            hint="--on-unexpected skip leaves them out, add takes them over",
        )
    taken = {pair.key: make_step(pair.expected, outputs[pair.key], role, donor) for pair in result.matched} | mended
    added: dict[str, Step] = {}
    dropped = [Dropped(role, key, reason) for key, reason in key_map.dropped.items()]
    for pair in result.shape_mismatched:
        if pair.key not in mended:
            why = f"shape {list(pair.found.shape)} does not fit {list(pair.expected.shape)}"
            dropped += dropped_sources(role, pair.key, outputs[pair.key], why, pair.key)
    unexpected = {info.key for info in result.unexpected}
    for new, how in outputs.items() if unexpected else ():
        info = how.describe(new, donor)
        if new in base or info.key not in unexpected:
            continue
        if policy.on_unexpected == "skip":
            dropped += dropped_sources(role, new, how, "the base does not have it")
        else:
            added[new] = make_step(replace(info, key=new), how, role, donor)
    dropped += dropped_entries(donor, role)
    return _Overlay(role, taken, added, [pair.key for pair in result.shape_mismatched], dropped, key_map.notes)


def _mended(pair: KeyPair, how: Derivation, role: str, donor: Checkpoint, policy: _Policy) -> Step:
    """Return the step that makes a donor's tensor fit, by the operation that was asked for."""
    name, wanted, given = policy.on_mismatch, pair.expected.shape, pair.found.shape
    operation = suggest(name, given, wanted, pair.key)
    if operation is None:
        raise PlanError(
            f"{quoted(pair.key)} is {list(wanted)} in the base and {list(given)} in the {role}, "
            f"which {name} does not change into each other",
            hint=_ways_out(pair),
        )
    (recipe,) = compose([how.recipe], [len(how.sources)], (operation,))
    rule = f"{how.rule}, --on-mismatch {name}" if how.rule else f"--on-mismatch {name}"
    return make_step(pair.expected, replace(how, recipe=recipe, rule=rule), role, donor)


def _ways_out(pair: KeyPair) -> str:
    ways = [
        f"--on-mismatch {name}: {why}" for name, why in suggestions(pair.found.shape, pair.expected.shape, pair.key)
    ]
    return "; ".join([*ways[:3], "--on-mismatch skip keeps the base's values there"])


def _replaced(overlays: Sequence[_Overlay], final: Mapping[str, Step]) -> list[Dropped]:
    """Return what an earlier donor has and a later one has too."""
    steps = [step for overlay in overlays for step in (*overlay.taken.values(), *overlay.added.values())]
    dropped = []
    for step in steps:
        role, last = step.sources[0].role, final[step.out.key].sources[0].role
        if last != role:
            how = Derivation(tuple(source.key for source in step.sources), step.recipe)
            dropped += dropped_sources(role, step.out.key, how, f"{last} has it too, and comes later")
    return dropped


def _and_more(count: int) -> str:
    return f" and {count} more" if count else ""


def _mismatch_error(result: StateDictDiff, role: str) -> PlanError:
    first, others = result.shape_mismatched[0], len(result.shape_mismatched) - 1
    wanted, given = list(first.expected.shape), list(first.found.shape)
    more = f", and {others} more differ in shape" if others else ""
    return PlanError(
        f"{quoted(first.key)} is {wanted} in the base and {given} in the {role}{more}",
        hint=_ways_out(first),
    )


def _kept(info: TensorInfo, base: Checkpoint) -> Step:
    return make_step(info, Derivation((info.key,)), "base", base)


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise PlanError(f"{name} is {value!r}", hint=f"it is one of {', '.join(known)}")


def _no_match_error(result: StateDictDiff, role: str) -> PlanError:
    hint = result.hints[0].message if result.hints else f"compare the names: ckpt diff BASE {role.upper()}"
    return PlanError(f"no key and shape of the base is in the {role}, so there is nothing to merge", hint=hint)
