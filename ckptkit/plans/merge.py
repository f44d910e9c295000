"""Plans of a base and its donors: the keys of the base, with the donors' values where key and shape agree."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ckptkit.comparison import Hint, KeyPair, StateDictDiff, diff_checkpoints, joined_hint
from ckptkit.comparison.library import library_hint
from ckptkit.comparison.parts import align_command, find_parted
from ckptkit.core.arguments import require_flags
from ckptkit.core.checkpoint import Checkpoint, Entry, TensorInfo, under_key
from ckptkit.core.config_files import default_error_path
from ckptkit.core.coverage import measure_coverage
from ckptkit.core.coverage.requirements import Requirements, find_unmet, parse_requirements
from ckptkit.core.patterns import drop_options, parse_pattern, pattern_for
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.core.ties import tied_keys
from ckptkit.errors import ModelError, PlanError
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.plans.metadata import follow_metadata
from ckptkit.plans.plan import Dropped, Plan, Step
from ckptkit.plans.policies import (
    MISMATCH_ACTIONS,
    MISSING_ACTIONS,
    UNEXPECTED_ACTIONS,
    MismatchAction,
    MissingAction,
    OnMismatch,
    OnMissing,
    OnUnexpected,
    Policy,
    UnexpectedAction,
    parse_policy,
)
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
from ckptkit.rules.model import Derivation, Rules, RulesLike
from ckptkit.tensor_ops.mismatch import MISMATCH_NAMES

__all__ = ["OtherNames", "OwnLoading", "follow_ties", "plan_loading", "plan_merge"]

_SKIP: MismatchAction = "skip"
_MOST_RESIZES = 3  # operations that a hint names for one tensor
_MOST_OPTIONS = 4  # of one hint
_OTHER_SHAPES = "take the values from a checkpoint that has these shapes"
_MOST_DROPPED = 6  # keys that a hint names
# Writes the action of a policy for a pattern: as an option, or as an argument.
_Spelling: TypeAlias = Callable[[str, str, str], str]
_MAPPINGS = ("dict", "OrderedDict", "defaultdict")


def plan_merge(
    base: CheckpointLike,
    donors: CheckpointLike | Sequence[CheckpointLike],
    rules: RulesLike | None = None,
    *,
    on_missing: OnMissing | None = None,
    on_unexpected: OnUnexpected = "skip",
    on_mismatch: OnMismatch = "error",
    skip_unread: bool = False,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
) -> Plan:
    """Return the plan of an overlay: the keys of ``base``, with the donors' values where key and shape agree.

    ``base`` and each donor are a path, a Checkpoint, a Module, or a mapping of tensors or of ``TensorInfo``. What is
    opened here is closed at the end; give the same paths to ``execute``. ``rules`` are a list of renames, the path of a
    rule file, its parsed content, or ``Rules``; they rename and filter the keys of the donors first. Of several
    donors, the last that has a key wins. Values of another dtype are cast to the dtype of the base.

    ``on_missing`` says what happens to a key of the base that no donor has: ``keep`` keeps the base's value. It is the
    default, which refuses one thing that ``keep`` in writing accepts: a key whose values a donor has in another form.
    Such forms are the parts of a stack or of a fused projection, and the whole of such parts.
    ``on_unexpected`` is for a key of a donor that the base does not have: ``skip`` leaves it out, ``add`` adds it.
    ``on_mismatch`` is for a key with two shapes: ``skip`` keeps the base's value. The name of a tensor operation, such
    as ``pad``, converts the donor's value. Every policy raises with ``error``.

    Each of the three is one action for every key, or a mapping of patterns to actions. The first pattern that matches
    a key decides. The action of ``"*"`` is for all other keys, wherever it stands; without it, they are an error.
    The patterns match the keys of the base, and those of ``on_unexpected`` match the keys in the donor's file. A
    pattern that decides about no key is an error, as an unused rule is, unless ``rules`` allow unused rules.
    ``Step.rule`` names the rules and the policy that decided about a tensor.

    A tensor that is listed without its values, such as a sparse tensor, cannot be copied. ``skip_unread`` leaves all
    such tensors out, and ``dropped`` of the plan names each.

    ``require`` is a pattern or a list of patterns: every matching key of the base must get its values from a donor.
    ``min_coverage`` is the least share of the base's elements that must get them, between 0 and 1. ``coverage`` of the
    plan is that share, and ``from_base`` names the keys that keep the values of the base.

    Raises:
        ArgumentError: An action is not one of those above, or ``min_coverage`` is not a share.
        RuleError: A rule or a pattern is not valid, or it decides about no key.
        PlanError: A policy is ``error``, ``require`` or ``min_coverage`` is not met, an operation cannot make the
            shapes equal, or nothing matches at all. A donor has the values of a missing key in parts. A tensor cannot
            be copied, or a file refers to code that looks malicious. Or a quantised weight would replace a plain
            weight, or the reverse.

    Example:
        A new head on a body that must fit:

        >>> import torch
        >>> from ckptkit import plan_merge
        >>> def net(classes):
        ...     return torch.nn.ModuleDict({"body": torch.nn.Linear(4, 3), "fc": torch.nn.Linear(3, classes)})
        >>> plan = plan_merge(net(2), net(10), on_mismatch={"fc.*": "skip"})
        >>> {step.out.key: step.sources[0].role for step in plan.steps}
        {'body.weight': 'donor', 'body.bias': 'donor', 'fc.weight': 'base', 'fc.bias': 'base'}
        >>> plan.steps[-1].rule
        "--on-mismatch 'fc.*=skip'"
    """
    require_flags(skip_unread=skip_unread)
    policies = _policies(on_missing, on_unexpected, on_mismatch, _Sides())
    requirements = parse_requirements(require, min_coverage)
    given = list(donors) if isinstance(donors, Sequence) and not isinstance(donors, str) else [donors]
    if not given:
        raise PlanError("there is no donor to take values from")
    roles = ["donor"] if len(given) == 1 else [f"donor{number}" for number in range(1, len(given) + 1)]
    with contextlib.ExitStack() as stack:
        opened_base = stack.enter_context(opened(base, "base"))
        sources = {role: stack.enter_context(opened(donor, role)) for role, donor in zip(roles, given, strict=True)}
        rules = rules_for(rules, sources[roles[0]], opened_base)
        plan, _ = _plan(opened_base, sources, rules, policies, requirements, skip_unread=skip_unread)
        return plan


def plan_loading(
    model: Checkpoint,
    checkpoint: Checkpoint,
    rules: RulesLike | None,
    *,
    on_missing: OnMissing | None,
    on_unexpected: OnUnexpected,
    on_mismatch: OnMismatch,
    skip_unread: bool,
    requirements: Requirements,
) -> tuple[Plan, OwnLoading]:
    """Return the plan that ``plan_merge`` makes of two checkpoints; errors speak of the model and the checkpoint.

    The second value says what the model's own code does with the checkpoint.
    """
    policies = _policies(on_missing, on_unexpected, on_mismatch, _Sides("model", "checkpoint"))
    sources = {"donor": checkpoint}
    return _plan(model, sources, rules_for(rules, checkpoint, model), policies, requirements, skip_unread=skip_unread)


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


def _plan(
    base: Checkpoint,
    sources: dict[str, Checkpoint],
    rules: Rules,
    policies: _Policies,
    requirements: Requirements,
    *,
    skip_unread: bool,
) -> tuple[Plan, OwnLoading]:
    refuse_suspicious(base, "base")
    refuse_ambiguous(base, base)
    notes = policies.unused(base, sources, allow_unused=rules.allow_unused)
    skipped: list[Dropped] = []
    for role, donor in sources.items() if skip_unread else ():
        sources[role], unread = without_unread(donor, role)
        skipped += unread
    quantized = QuantizedInputs({"base": base, **sources}, base, "base")
    overlays = [_make_overlay(quantized, donor, role, rules, policies) for role, donor in sources.items()]
    from_donor = {key: step for overlay in overlays for key, step in overlay.from_donor.items()}
    added = {key: step for overlay in overlays for key, step in overlay.added.items()}
    from_donor, tie_notes = follow_ties(base, from_donor)
    notes += tie_notes
    mismatched = {key for overlay in overlays for key in overlay.mismatched}
    own = overlays[-1].own if policies.sides.is_loading else OwnLoading()
    missing = [key for key in base if key not in from_donor and key not in mismatched and key not in own.computed]
    _refuse_missing([key for key in missing if policies.on_missing.action(key) == "error"], policies.sides)
    if not policies.keeps_parted:
        for role, overlay in zip(sources, overlays, strict=True):
            _refuse_parted(base, missing, sources[role], overlay, policies.sides)
    if requirements:
        _refuse_unmet(requirements, base, from_donor.keys() | own.computed.keys(), overlays, policies.sides)
    if skip_unread:
        base, unread = without_unread(base, "base", from_donor)
        skipped += unread
    refuse_unread((key for key in base if key not in from_donor), base)
    steps = [
        from_donor.get(key)
        or _base_step(info, base, (policies.on_mismatch if key in mismatched else policies.on_missing).rule(key))
        for key, info in base.items()
    ]
    dropped = [*dropped_entries(base, "base"), *(drop for overlay in overlays for drop in overlay.dropped)]
    dropped += skipped
    dropped += _replaced_by_later_donors(overlays, from_donor | added)
    notes += [
        f"{overlay.role}: {note}" if len(overlays) > 1 else note for overlay in overlays for note in overlay.notes
    ]
    all_steps = (*steps, *added.values())
    plan = Plan(
        all_steps,
        tuple(dropped),
        {},
        tuple(notes),
        base.versions,
        role_to_edit(base, "base"),
        command="merge",
        # A step has the shape that a lazy module gets.
        covered=measure_coverage({step.out.key: step.out for step in steps}, from_donor.keys() | own.computed.keys()),
    )
    return check_quantized(follow_metadata(plan, {"base": base, **sources}), quantized), own


def _refuse_unmet(
    requirements: Requirements, base: Checkpoint, filled: Collection[str], overlays: Sequence[_Overlay], sides: _Sides
) -> None:
    """Raise the error of the first requirement that the plan does not meet."""
    reasons = {drop.wanted: drop.reason for overlay in overlays for drop in overlay.dropped if drop.wanted}
    source = f"the {sides.donor}" if sides.donor else "the donor" if len(overlays) == 1 else "the donors"
    unmet = find_unmet(requirements, base, set(filled), reasons, of=f"the {sides.base}", source=source)
    if not unmet:
        return
    rename = next((joined_hint(overlay.hints) for overlay in overlays if overlay.hints), None)
    if all(key in reasons for key in unmet[0].keys):
        pairs = {key: pair for overlay in overlays for key, pair in overlay.mismatched.items()}
        empty = [pairs[key] for key in unmet[0].keys if key in pairs]
        hint, call = (
            f"require less, or {_mismatch_hint(empty, spell, sides, skips=False) or _OTHER_SHAPES}"
            for spell in (_on_command_line, _in_python)
        )
    elif rename is not None:
        hint, call = rename, None
    else:
        hint = "require less, or rename the keys of DONOR: ckpt align BASE DONOR -o rules.toml finds rules for --rules"
        call = "require less, or rename the keys with the rules that suggest_rules finds"
    error = ModelError if sides.is_loading else PlanError
    raise error(unmet[0].message, hint=hint, call=call)


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


class OtherNames(str):
    """A note that names what gives more tensors of the donor the names of the base."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Sides:
    """What errors call the base and the donor; a donor without a name is called by its role."""

    base: str = "base"
    donor: str = ""

    @property
    def is_loading(self) -> bool:
        """Whether the base is a live model, which cannot get further keys."""
        return self.base == "model"


@dataclass(frozen=True, slots=True)
class _Policies:
    on_missing: Policy[MissingAction]
    on_unexpected: Policy[UnexpectedAction]
    on_mismatch: Policy[MismatchAction]
    sides: _Sides
    keeps_parted: bool  # keep a missing key also where a donor has its values in parts, as the user wrote

    def unused(self, base: Checkpoint, donors: Mapping[str, Checkpoint], *, allow_unused: bool) -> list[str]:
        """Return a note for each pattern that decides about no key; raise ``RuleError`` unless ``allow_unused``."""
        found = list(dict.fromkeys(key for donor in donors.values() for key in donor))
        owner = " and ".join(f"the {self.sides.donor or role}" for role in donors)
        with default_error_path(base.path):
            notes = [
                *self.on_missing.unused(base, f"the {self.sides.base}", allow_unused=allow_unused),
                *self.on_mismatch.unused(base, f"the {self.sides.base}", allow_unused=allow_unused),
            ]
        return [*notes, *self.on_unexpected.unused(found, owner, allow_unused=allow_unused)]


def _policies(
    on_missing: OnMissing | None, on_unexpected: OnUnexpected, on_mismatch: OnMismatch, sides: _Sides
) -> _Policies:
    return _Policies(
        parse_policy("on_missing", "keep" if on_missing is None else on_missing, MISSING_ACTIONS),
        parse_policy("on_unexpected", on_unexpected, UNEXPECTED_ACTIONS),
        parse_policy("on_mismatch", on_mismatch, MISMATCH_ACTIONS),
        sides,
        on_missing is not None,
    )


@dataclass(frozen=True, slots=True)
class _Overlay:
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


def _make_overlay(
    quantized: QuantizedInputs, donor: Checkpoint, role: str, rules: Rules, policies: _Policies
) -> _Overlay:
    base = quantized.sources["base"]
    refuse_suspicious(donor, role)
    key_map = apply_rules(rules, donor, base)
    outputs = key_map.outputs()
    quantized.refuse_operations(role, outputs)
    quantized.refuse_overlay(role, outputs)
    refuse_unread((old for new, d in outputs.items() if new in base for old in d.sources), donor)
    result = diff_checkpoints(base, donor, key_map)
    if policies.sides.is_loading and result.refusals:
        raise _refusal_error(result)
    on_mismatch = policies.on_mismatch
    refused = [pair for pair in result.shape_mismatched if _mismatch_action(pair, on_mismatch) == "error"]
    if refused:
        raise _mismatch_error(refused, role, policies.sides)
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
        raise _no_match_error(result, donor, role, policies.sides)
    _refuse_unexpected(
        [outputs[new].sources[0] for new, action in actions.items() if action == "error"], policies.sides
    )
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
    return _Overlay(role, matched | resized, added, unexpected, mismatched, dropped, notes, hints, own)


def _in_words_of(sides: _Sides, role: str, hint: str) -> str:
    """Return a hint of a diff with what this call takes in place of EXPECTED and FOUND."""
    return re.sub(r"\bEXPECTED\b", sides.base.upper(), re.sub(r"\bFOUND\b", (sides.donor or role).upper(), hint))


def _other_names(
    result: StateDictDiff, actions: Iterable[UnexpectedAction], sides: _Sides, role: str
) -> Iterator[OtherNames]:
    """Yield a note where tensors stay out whose values the donor evidently has under other names."""
    if result.hints and result.matched and not result.quantized and "skip" in actions:
        yield OtherNames(
            f"tensors of the donor have other names; {_in_words_of(sides, role, joined_hint(result.hints))}"
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


def _resized(pair: KeyPair, derivation: Derivation, role: str, donor: Checkpoint, policies: _Policies) -> Step:
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
            hint=_mismatch_hint([pair], _on_command_line, sides),
            call=_mismatch_hint([pair], _in_python, sides),
        )
    (recipe,) = compose([derivation.recipe], [len(derivation.sources)], (operation,))
    rule = policy.rule(pair.key) if name == policy.action(pair.key) else "a scalar of torch before 0.4"
    return make_step(pair.expected, _decided(replace(derivation, recipe=recipe), rule), role, donor)


def _mismatch_action(pair: KeyPair, policy: Policy[MismatchAction]) -> MismatchAction:
    action = policy.action(pair.key)
    return "reshape" if action == "error" and pair.is_old_scalar else action


def _on_command_line(policy: str, pattern: str, action: str) -> str:
    return f"--{policy.replace('_', '-')} {shell_word(f'{pattern}={action}')}"


def _in_python(policy: str, pattern: str, action: str) -> str:
    return f"{policy}={{{pattern!r}: {action!r}}}"


def _mismatch_hint(pairs: Sequence[KeyPair], spell: _Spelling, sides: _Sides, *, skips: bool = True) -> str:
    """Return the actions that fit, each with its pattern: all for one module, or the best for each of several.

    Unless it ``skips``, it is about the pairs that an action can resize, and empty if there are none.
    """
    from ckptkit.tensor_ops.suggestions import suggest

    ways = {pair.key: _ways(pair, sides, skips=skips) for pair in pairs}
    by_key = {pair.key: pair for pair in pairs if ways[pair.key]}

    def pattern(key: str, action: str) -> str:
        def fits(other: str) -> bool:
            found, expected = by_key[other].found.shape, by_key[other].expected.shape
            return action == _SKIP or suggest(action, found, expected, other) is not None

        return pattern_for(key, by_key, fits)

    def option(key: str, action: str, effect: str) -> str:
        return f"{spell('on_mismatch', pattern(key, action), action)}{effect}"

    left, best = list(by_key), []
    while left:
        first = left[0]
        action, effect = ways[first][0]
        covered = parse_pattern(pattern(first, action))
        left = [key for key in left if not covered.match(key)]
        best.append(option(first, action, effect))
    if len(best) == 1:
        first = next(iter(by_key))
        best = [option(first, *way) for way in ways[first]]
    more = f"; {plural(len(best) - _MOST_OPTIONS, 'more pattern')} to give" if len(best) > _MOST_OPTIONS else ""
    return f"{'; '.join(best[:_MOST_OPTIONS])}{more}{_for_others(by_key, spell) if skips else ''}"


def _ways(pair: KeyPair, sides: _Sides, *, skips: bool) -> list[tuple[str, str]]:
    """Return the actions that would fit a pair, best first, each with its effect; only if it ``skips``, also that."""
    from ckptkit.tensor_ops.suggestions import suggestions

    found, expected = pair.found.shape, pair.expected.shape
    resizes = [(name, f": {why}") for name, why in suggestions(found, expected, pair.key)][:_MOST_RESIZES]
    if not skips:
        return resizes
    skip = (_SKIP, f" keeps the {sides.base}'s values there")
    # Fewer rows are mostly a head of fewer classes, of which the first have no meaning.
    shrinks = [name for name, _ in resizes[:1]] == ["slice"] and found[0] > expected[0]
    return [skip, *resizes] if shrinks else [*resizes, skip]


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


def _base_step(info: TensorInfo, base: Checkpoint, policy: str) -> Step:
    return make_step(info, Derivation((info.key,), rule=policy), "base", base)


def _refuse_missing(keys: Sequence[str], sides: _Sides) -> None:
    def hint(spell: _Spelling) -> str:
        keep = spell("on_missing", pattern_for(keys[0], keys), "keep")
        return f"{keep} keeps the {sides.base}'s own values{_for_others(keys, spell)}"

    if keys:
        nothing = f"the {sides.donor} has no" if sides.donor else "no donor has"
        raise PlanError(f"{nothing} {listed(keys, 1)}", hint=hint(_on_command_line), call=hint(_in_python))


def _refuse_parted(
    base: Checkpoint, missing: Sequence[str], donor: Checkpoint, overlay: _Overlay, sides: _Sides
) -> None:
    parted = find_parted({key: base[key] for key in missing}, overlay.unexpected) if overlay.unexpected else ()
    if not parted:
        return
    keys = [key for one in parted for key in one.expected]
    others = len(keys) - len(parted[0].expected)
    more = f"; so it is with {plural(others, 'more key')}" if others else ""
    sentence = parted[0].sentence(f"the {sides.base}", f"the {sides.donor or overlay.role}")
    summary = CheckpointSummary.of(base)
    by_library = library_hint(summary.library_names, "{}").partition("{}")[0]
    command = align_command(summary, CheckpointSummary.of(donor))
    call = f"{{}} looks for the rules; {{}} keeps the {sides.base}'s values"
    if by_library:
        call = f"{by_library}{{}}; {{}} keeps the {sides.base}'s values"
    raise PlanError(
        f"{sentence}{more}",
        hint=call.format("--rules transformers:auto" if by_library else command, "--on-missing keep"),
        call=call.format(
            "rules='transformers:auto'"
            if by_library
            else f"suggest_rules({sides.base}, {sides.donor or overlay.role})",
            "on_missing='keep'",
        ),
    )


def _refuse_unexpected(keys: Sequence[str], sides: _Sides) -> None:
    def hint(spell: _Spelling) -> str:
        skip, add = (spell("on_unexpected", pattern_for(keys[0], keys), action) for action in ("skip", "add"))
        added = "" if sides.is_loading else f", {add} adds it"
        return f"{skip} leaves it out{added}{_for_others(keys, spell)}"

    if keys:
        raise PlanError(
            f"the {sides.base} has no {listed(keys, 1)}", hint=hint(_on_command_line), call=hint(_in_python)
        )


def _for_others(keys: Collection[str], spell: _Spelling) -> str:
    pattern = "with the pattern '*'" if spell is _in_python else "without a pattern"
    return f"; {pattern}, the action is for all other keys" if len(keys) > 1 else ""


def _mismatch_error(pairs: Sequence[KeyPair], role: str, sides: _Sides) -> PlanError:
    first, others = pairs[0], len(pairs) - 1
    wanted, given = list(first.expected.shape), list(first.found.shape)
    more = f", and {others} more differ in shape" if others else ""
    return PlanError(
        f"{quoted(first.key)} is {wanted} in the {sides.base} and {given} in the {sides.donor or role}{more}",
        hint=_mismatch_hint(pairs, _on_command_line, sides),
        call=_mismatch_hint(pairs, _in_python, sides),
    )


def _why_unexpected(info: TensorInfo, result: StateDictDiff, sides: _Sides) -> str:
    if result.has_own_code and info.key in result.unseen:
        return f"state_dict() of the {sides.base} leaves it out, or the model's own code removes it"
    return f"the {sides.base} does not have it"


def _refusal_error(result: StateDictDiff) -> ModelError:
    """Return the error where the model's own code refuses what torch would give it."""
    keys = [info.key for info in result.unexpected[:_MOST_DROPPED]]
    return ModelError(
        f"load_state_dict failed: {result.refusals[0]}",
        hint=f"if these tensors are not needed, leave them out: {drop_options(keys)}" if keys else None,
    )


def _no_match_error(result: StateDictDiff, donor: Checkpoint, role: str, sides: _Sides) -> PlanError:
    role = sides.donor or role
    if not donor:
        return _no_tensor_error(donor.entries, role)
    expected = result.expected_checkpoint.argument or sides.base.upper()
    found = result.found_checkpoint.argument or role.upper()
    hint = joined_hint(result.hints) or f"compare the shapes: ckpt diff {expected} {found}"
    hint = _in_words_of(sides, role, hint)
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
