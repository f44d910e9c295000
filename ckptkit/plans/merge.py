"""Plans of a base and its donors: the keys of the base, with the donors' values where key and shape agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from ckptkit.comparison import KeyPair, StateDictDiff, diff_checkpoints
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import listed, quoted
from ckptkit.core.ties import tied_keys
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.errors import PlanError
from ckptkit.plans.plan import Dropped, Plan, Step
from ckptkit.plans.quantized import QuantizedInputs, check_quantized
from ckptkit.plans.steps import (
    dropped_entries,
    dropped_sources,
    make_step,
    refuse_ambiguous,
    refuse_suspicious,
    refuse_unread,
    role_to_edit,
    without_unread,
)
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Derivation, RulesLike
from ckptkit.rules.parse import as_rules
from ckptkit.tensor_ops.mismatch import MISMATCH_NAMES, MismatchName

__all__ = [
    "ON_MISMATCH",
    "ON_MISSING",
    "ON_UNEXPECTED",
    "OnMismatch",
    "OnMissing",
    "OnUnexpected",
    "follow_ties",
    "plan_merge",
]

OnMissing: TypeAlias = Literal["keep", "error"]
OnUnexpected: TypeAlias = Literal["skip", "add", "error"]
OnMismatch: TypeAlias = Literal["error", "skip"] | MismatchName
ON_MISSING: tuple[str, ...] = get_args(OnMissing)
ON_UNEXPECTED: tuple[str, ...] = get_args(OnUnexpected)
ON_MISMATCH: tuple[str, ...] = ("error", "skip", *MISMATCH_NAMES)


def plan_merge(
    base: StateDictLike,
    donors: StateDictLike | Sequence[StateDictLike],
    rules: RulesLike | None = None,
    *,
    on_missing: OnMissing = "keep",
    on_unexpected: OnUnexpected = "skip",
    on_mismatch: OnMismatch = "error",
    skip_unread: bool = False,
) -> Plan:
    """Return the plan of an overlay: the keys of ``base``, with the donors' values where key and shape agree.

    ``rules`` rename and filter the keys of the donors first. Of several donors, the last that has a key wins. Values
    of another dtype are cast to the dtype of the base.

    ``on_missing`` says what happens to a key of the base that no donor has: ``keep`` keeps the base's value.
    ``on_unexpected`` is for a key of a donor that the base does not have: ``skip`` leaves it out, ``add`` adds it.
    ``on_mismatch`` is for a key with two shapes: ``skip`` keeps the base's value. The name of a tensor operation, such
    as ``pad``, converts the donor's value. Every policy raises with ``error``.

    A tensor that is listed without its values, such as a sparse tensor, cannot be copied. ``skip_unread`` leaves all
    such tensors out, and ``dropped`` of the plan names each.

    Raises ``RuleError`` for wrong rules. Raises ``PlanError`` where a policy is ``error``, where the operation cannot
    make the shapes equal, and where nothing matches at all. It is also raised where a tensor cannot be copied, where
    a quantised weight would replace a plain weight or the reverse, and where a file refers to code that looks
    malicious.
    """
    _check_policy("on_missing", on_missing, ON_MISSING)
    _check_policy("on_unexpected", on_unexpected, ON_UNEXPECTED)
    _check_policy("on_mismatch", on_mismatch, ON_MISMATCH)
    policy = _Policy(on_unexpected, on_mismatch)
    base = as_checkpoint(base, "base")
    refuse_suspicious(base, "base")
    refuse_ambiguous(base, base)
    given = list(donors) if isinstance(donors, Sequence) else [donors]
    if not given:
        raise PlanError("there is no donor to take values from")
    roles = ["donor"] if len(given) == 1 else [f"donor{number}" for number in range(1, len(given) + 1)]
    sources = {role: as_checkpoint(donor, role) for role, donor in zip(roles, given, strict=True)}
    skipped: list[Dropped] = []
    for role, donor in sources.items() if skip_unread else ():
        sources[role], unread = without_unread(donor, role)
        skipped += unread
    quantized = QuantizedInputs({"base": base, **sources}, base, "base")
    overlays = [_make_overlay(quantized, donor, role, rules, policy) for role, donor in sources.items()]
    from_donor = {key: step for overlay in overlays for key, step in overlay.from_donor.items()}
    added = {key: step for overlay in overlays for key, step in overlay.added.items()}
    from_donor, notes = follow_ties(base, from_donor)
    present = from_donor.keys() | {key for overlay in overlays for key in overlay.mismatched}
    missing = [key for key in base if key not in present]
    if missing and on_missing == "error":
        raise PlanError(
            f"no donor has {listed(missing, 1)}",
            hint="--on-missing keep keeps the base's own values",
        )
    if skip_unread:
        base, unread = without_unread(base, "base", from_donor)
        skipped += unread
    refuse_unread((key for key in base if key not in from_donor), base)
    steps = [from_donor.get(key) or _base_step(info, base) for key, info in base.items()]
    dropped = [*dropped_entries(base, "base"), *(drop for overlay in overlays for drop in overlay.dropped)]
    dropped += skipped
    dropped += _replaced_by_later_donors(overlays, from_donor | added)
    notes += [
        f"{overlay.role}: {note}" if len(overlays) > 1 else note for overlay in overlays for note in overlay.notes
    ]
    all_steps = (*steps, *added.values())
    plan = Plan(all_steps, tuple(dropped), base.metadata, tuple(notes), base.versions, role_to_edit(base, "base"))
    return check_quantized(plan, quantized)


def follow_ties(base: Checkpoint, changed: Mapping[str, Step]) -> tuple[dict[str, Step], list[str]]:
    """Return the steps of the changed keys and of every key that the base ties to one of them, and notes.

    A model that loads the output writes tied keys into the same memory, so they must have the same values. A note
    names two tied keys that get the values of different tensors.
    """
    steps, notes = dict(changed), []
    for keys in tied_keys(base.values()):
        leader = next((key for key in keys if key in changed), None)
        if leader is None:
            continue
        for key in keys:
            if key not in changed:
                out = replace(changed[leader].out, key=key)
                steps[key] = replace(changed[leader], out=out, rule=f"tied to {quoted(leader)}", tied_to=leader)
            elif key != leader and (steps[key].out.view is None or steps[key].out.view != steps[leader].out.view):
                notes.append(
                    f"{quoted(leader)} and {quoted(key)} are tied in the base, but get the values of two tensors"
                )
    return steps, notes


@dataclass(frozen=True, slots=True)
class _Policy:
    on_unexpected: OnUnexpected
    on_mismatch: OnMismatch


@dataclass(frozen=True, slots=True)
class _Overlay:
    """The steps that take a tensor from one donor, by output key, and the tensors of the donor that are left out."""

    role: str
    from_donor: Mapping[str, Step]
    added: Mapping[str, Step]
    mismatched: Sequence[str]
    dropped: Sequence[Dropped]
    notes: Sequence[str]


def _make_overlay(
    quantized: QuantizedInputs, donor: Checkpoint, role: str, rules: RulesLike | None, policy: _Policy
) -> _Overlay:
    base = quantized.sources["base"]
    refuse_suspicious(donor, role)
    key_map = apply_rules(as_rules(rules), donor)
    quantized.refuse_operations(role, key_map.outputs())
    quantized.refuse_overlay(role, key_map.outputs())
    refuse_unread((old for new, d in key_map.outputs().items() if new in base for old in d.sources), donor)
    result = diff_checkpoints(base, donor, key_map)
    if result.shape_mismatched and policy.on_mismatch == "error":
        raise _mismatch_error(result, role)
    outputs = key_map.outputs()
    resized = {}
    if policy.on_mismatch in MISMATCH_NAMES:
        resized = {
            pair.key: _resized(pair, outputs[pair.key], role, donor, policy.on_mismatch)
            for pair in result.shape_mismatched
        }
    if not result.matched and not resized and base and not (result.unexpected and policy.on_unexpected == "add"):
        raise _no_match_error(result, role)
    if result.unexpected and policy.on_unexpected == "error":
        raise PlanError(
            f"the base has no {listed([info.key for info in result.unexpected], 1)}",
            hint="--on-unexpected skip leaves such keys out, --on-unexpected add adds such keys",
        )
    matched = {pair.key: make_step(pair.expected, outputs[pair.key], role, donor) for pair in result.matched}
    added: dict[str, Step] = {}
    dropped = [Dropped(role, key, reason) for key, reason in key_map.dropped.items()]
    for pair in result.shape_mismatched:
        if pair.key not in resized:
            why = f"its shape is {list(pair.found.shape)}, not {list(pair.expected.shape)}"
            dropped += dropped_sources(role, pair.key, outputs[pair.key], why, pair.key)
    unexpected = {info.key for info in result.unexpected}
    for new, derivation in outputs.items() if unexpected else ():
        info = derivation.describe(new, donor)
        if new in base or info.key not in unexpected:
            continue
        if policy.on_unexpected == "skip":
            dropped += dropped_sources(role, new, derivation, "the base does not have it")
        else:
            added[new] = make_step(replace(info, key=new), derivation, role, donor)
    dropped += dropped_entries(donor, role)
    mismatched = [pair.key for pair in result.shape_mismatched]
    return _Overlay(role, matched | resized, added, mismatched, dropped, key_map.notes)


def _resized(pair: KeyPair, derivation: Derivation, role: str, donor: Checkpoint, name: str) -> Step:
    """Return the step that gives a tensor of the donor the shape of the base, by the operation called ``name``."""
    from ckptkit.tensor_ops.recipes import compose
    from ckptkit.tensor_ops.suggestions import suggest

    wanted, given = pair.expected.shape, pair.found.shape
    operation = suggest(name, given, wanted, pair.key)
    if operation is None:
        raise PlanError(
            f"{quoted(pair.key)} is {list(wanted)} in the base and {list(given)} in the {role}, "
            f"and {name} does not change one into the other",
            hint=_mismatch_hint(pair),
        )
    (recipe,) = compose([derivation.recipe], [len(derivation.sources)], (operation,))
    rule = f"{derivation.rule}, --on-mismatch {name}" if derivation.rule else f"--on-mismatch {name}"
    return make_step(pair.expected, replace(derivation, recipe=recipe, rule=rule), role, donor)


def _mismatch_hint(pair: KeyPair) -> str:
    from ckptkit.tensor_ops.suggestions import suggestions

    ways = [
        f"--on-mismatch {name}: {why}" for name, why in suggestions(pair.found.shape, pair.expected.shape, pair.key)
    ]
    return "; ".join([*ways[:3], "--on-mismatch skip keeps the base's values there"])


def _replaced_by_later_donors(overlays: Sequence[_Overlay], final: Mapping[str, Step]) -> list[Dropped]:
    """Return the tensors of each donor that a later donor replaces."""
    steps = [step for overlay in overlays for step in (*overlay.from_donor.values(), *overlay.added.values())]
    dropped = []
    for step in steps:
        role, last = step.sources[0].role, final[step.out.key].sources[0].role
        if last != role:
            derivation = Derivation(tuple(source.key for source in step.sources), step.recipe)
            dropped += dropped_sources(role, step.out.key, derivation, f"{last} is a later donor and has the key too")
    return dropped


def _base_step(info: TensorInfo, base: Checkpoint) -> Step:
    return make_step(info, Derivation((info.key,)), "base", base)


def _check_policy(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise PlanError(f"{name} is {value!r}", hint=f"it must be one of {', '.join(known)}")


def _mismatch_error(result: StateDictDiff, role: str) -> PlanError:
    first, others = result.shape_mismatched[0], len(result.shape_mismatched) - 1
    wanted, given = list(first.expected.shape), list(first.found.shape)
    more = f", and {others} more differ in shape" if others else ""
    return PlanError(
        f"{quoted(first.key)} is {wanted} in the base and {given} in the {role}{more}",
        hint=_mismatch_hint(first),
    )


def _no_match_error(result: StateDictDiff, role: str) -> PlanError:
    hint = result.hints[0].message if result.hints else f"compare the names: ckpt diff BASE {role.upper()}"
    return PlanError(
        f"the {role} has no tensor with a key and shape of the base, so there is nothing to merge", hint=hint
    )
