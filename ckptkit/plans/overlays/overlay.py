"""What one donor gives to a base: the steps that take a tensor from it, and what is left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from ckptkit.comparison import KeyPair, StateDictDiff, diff_checkpoints
from ckptkit.comparison.hints import Hint, joined_hint
from ckptkit.core.checkpoint import Checkpoint, TensorInfo, under_key
from ckptkit.core.text import quoted
from ckptkit.errors import PlanError
from ckptkit.plans.overlays.choices import Policies, Sides, in_words_of
from ckptkit.plans.overlays.mismatch_hints import in_python, mismatch_hint, on_command_line
from ckptkit.plans.overlays.refusals import mismatch_error, no_match_error, refusal_error, refuse_unexpected
from ckptkit.plans.plan import Dropped, Step
from ckptkit.plans.policies import (
    MismatchAction,
    Policy,
    UnexpectedAction,
)
from ckptkit.plans.quantized import QuantizedInputs
from ckptkit.plans.steps import (
    dropped_entries,
    dropped_sources,
    make_step,
    refuse_suspicious,
    refuse_unread,
)
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Derivation, Rules
from ckptkit.tensor_ops.mismatch import MISMATCH_NAMES

__all__ = ["OtherNames", "Overlay", "OwnLoading", "make_overlay"]


@dataclass(frozen=True, slots=True)
class OwnLoading:
    """What the own code of a live model does with the tensors of a checkpoint.

    Attributes:
        moved: The keys of the model that are loaded from a tensor of another name, each with that name.
        computed: The keys that the code makes of other tensors, each with their names; no plan has their values.
        filled: The keys that are missing in the checkpoint, and that the code may fill in.
        others: Steps that read the tensors which the model does not have, for the code to see them.
        undecided: Why the code could not be tried, so that nothing of this is known; or an empty string.
    """

    moved: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    filled: AbstractSet[str] = frozenset()
    others: tuple[Step, ...] = ()
    undecided: str = ""


class OtherNames(str):
    """A note that names what gives more tensors of the donor the names of the base."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Overlay:
    """The steps that take a tensor from one donor, by output key, and the tensors of the donor that are left out."""

    role: str
    from_donor: Mapping[str, Step]
    added: Mapping[str, Step]
    unexpected: Mapping[str, TensorInfo]
    mismatched: Mapping[str, KeyPair]
    dropped: Sequence[Dropped]
    notes: Sequence[str]
    hints: Sequence[Hint]  # renames that would make more keys match
    own: OwnLoading


def make_overlay(quantized: QuantizedInputs, donor: Checkpoint, role: str, rules: Rules, policies: Policies) -> Overlay:
    """Return what a donor gives to the base. Raises the errors of the policies, and of a donor that does not fit."""
    base = quantized.sources["base"]
    refuse_suspicious(donor, role)
    quantized.refuse_quantizing(role, rules)
    key_map = apply_rules(rules, donor, base)
    outputs = key_map.outputs()
    quantized.refuse_operations(role, outputs)
    quantized.refuse_overlay(role, outputs)
    refuse_unread((old for new, d in outputs.items() if new in base for old in d.sources), donor)
    result = diff_checkpoints(base, donor, key_map)
    if policies.sides.is_loading and result.refusals:
        raise refusal_error(result)
    on_mismatch = policies.on_mismatch
    refused = [pair for pair in result.shape_mismatched if _mismatch_action(pair, on_mismatch) == "error"]
    if refused:
        raise mismatch_error(refused, role, policies.sides)
    resized = {
        pair.key: _resized(pair, outputs[result.moved.get(pair.key, pair.key)], role, donor, policies)
        for pair in result.shape_mismatched
        if _mismatch_action(pair, on_mismatch) in MISMATCH_NAMES
    }
    unexpected = _unexpected(result, outputs, base, donor)
    # The key in the donor's file; that of the first source where an operation makes the tensor.
    actions = {new: policies.on_unexpected.action(outputs[new].sources[0]) for new in unexpected}
    is_empty = not result.matched and not resized and not result.computed
    if is_empty and base and "add" not in actions.values():
        raise no_match_error(result, donor, role, policies.sides)
    refuse_unexpected([outputs[new].sources[0] for new, action in actions.items() if action == "error"], policies.sides)
    matched = {
        pair.key: make_step(pair.expected, _derivation(pair.key, result, outputs), role, donor)
        for pair in result.matched
    }
    added: dict[str, Step] = {}
    dropped = [Dropped(role, key, reason) for key, reason in key_map.dropped.items()]
    for pair in result.shape_mismatched:
        if pair.key not in resized:
            why = f"its shape is {list(pair.found.shape)}, not {list(pair.expected.shape)}"
            dropped += dropped_sources(role, pair.key, _derivation(pair.key, result, outputs), why, pair.key)
    for new, info in unexpected.items():
        if actions[new] == "skip":
            dropped += dropped_sources(role, new, outputs[new], _why_unexpected(info, result, policies.sides))
        else:
            derivation = _decided(outputs[new], policies.on_unexpected.rule(outputs[new].sources[0]))
            added[new] = make_step(under_key(info, new), derivation, role, donor)
    if not policies.sides.is_loading:
        for key, names in result.computed.items():
            why = f"the model's own code makes {quoted(key)} of it while it loads, and load_into runs that code"
            left = [name for name in names if name not in matched and name not in result.moved.values()]
            dropped += [drop for name in left for drop in dropped_sources(role, name, outputs[name], why)]
    dropped += dropped_entries(donor, role)
    mismatched = {pair.key: pair for pair in result.shape_mismatched}
    hints = [hint for hint in result.hints if hint.rename]
    own = _own_loading(result, outputs, role, donor) if policies.sides.is_loading else OwnLoading()
    notes = [*key_map.notes, *_other_names(result, actions.values(), policies.sides, role)]
    return Overlay(role, matched | resized, added, unexpected, mismatched, dropped, notes, hints, own)


def _other_names(
    result: StateDictDiff, actions: Iterable[UnexpectedAction], sides: Sides, role: str
) -> Iterator[OtherNames]:
    """Yield a note where tensors stay out whose values the donor evidently has under other names."""
    if result.hints and result.matched and not result.quantized and "skip" in actions:
        yield OtherNames(
            f"tensors of the donor have other names; {in_words_of(sides, role, joined_hint(result.hints))}"
        )


def _derivation(key: str, result: StateDictDiff, outputs: Mapping[str, Derivation]) -> Derivation:
    """Return how the value of a key of the base is made, which the model's own code can load from another name."""
    if key not in result.moved:
        return outputs[key]
    return _decided(outputs[result.moved[key]], "the model's own code")


def _own_loading(result: StateDictDiff, outputs: Mapping[str, Derivation], role: str, donor: Checkpoint) -> OwnLoading:
    if not result.moved and not result.computed:
        return OwnLoading(filled=result.filled, undecided=result.undecided)
    used = {result.moved.get(pair.key, pair.key) for pair in (*result.matched, *result.shape_mismatched)}
    given = {name for names in result.computed.values() for name in names}
    unexpected = {info.key for info in result.unexpected}
    others = []
    for name, derivation in outputs.items():
        info = derivation.describe(name, donor)
        if (name in given or info.key in unexpected) and name not in used and info.kind == "dense":
            others.append(make_step(under_key(info, name), derivation, role, donor))
    return OwnLoading(result.moved, result.computed, result.filled, tuple(others))


def _unexpected(
    result: StateDictDiff, outputs: Mapping[str, Derivation], base: Checkpoint, donor: Checkpoint
) -> dict[str, TensorInfo]:
    """Return the tensors of the donor that the base does not have, by their key in the output."""
    keys = {info.key for info in result.unexpected}
    described = {new: d.describe(new, donor) for new, d in outputs.items() if new not in base} if keys else {}
    return {new: info for new, info in described.items() if info.key in keys}


def _decided(derivation: Derivation, policy: str) -> Derivation:
    """Return the derivation with ``policy`` after its rules."""
    return replace(derivation, rule=f"{derivation.rule}, {policy}" if derivation.rule else policy)


def _resized(pair: KeyPair, derivation: Derivation, role: str, donor: Checkpoint, policies: Policies) -> Step:
    """Return the step that gives a tensor of the donor the shape of the base, by the operation of its policy."""
    from ckptkit.tensor_ops.recipes import compose
    from ckptkit.tensor_ops.suggestions import suggest

    wanted, given = pair.expected.shape, pair.found.shape
    policy, sides = policies.on_mismatch, policies.sides
    name = _mismatch_action(pair, policy)
    operation = suggest(name, given, wanted, pair.key)
    if operation is None:
        raise PlanError(
            f"{quoted(pair.key)} is {list(wanted)} in the {sides.base} and {list(given)} in the {sides.donor or role}, "
            f"and {name} does not change one into the other",
            hint=mismatch_hint([pair], on_command_line, sides),
            call=mismatch_hint([pair], in_python, sides),
        )
    (recipe,) = compose([derivation.recipe], [len(derivation.sources)], (operation,))
    rule = policy.rule(pair.key) if name == policy.action(pair.key) else "a scalar of torch before 0.4"
    return make_step(pair.expected, _decided(replace(derivation, recipe=recipe), rule), role, donor)


def _mismatch_action(pair: KeyPair, policy: Policy[MismatchAction]) -> MismatchAction:
    action = policy.action(pair.key)
    return "reshape" if action == "error" and pair.is_old_scalar else action


def _why_unexpected(info: TensorInfo, result: StateDictDiff, sides: Sides) -> str:
    if result.has_own_code and info.key in result.unseen:
        return f"state_dict() of the {sides.base} leaves it out, or the model's own code removes it"
    return f"the {sides.base} does not have it"
