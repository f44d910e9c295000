"""``diff``: compare the keys, shapes and dtypes of a checkpoint with a model, without reading values."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from ckptkit.comparison.gates import Gate, Gates, judge, parse_gates
from ckptkit.comparison.hints import Hint, find_hints
from ckptkit.comparison.own_code import modules_with_own_code
from ckptkit.comparison.own_code.by_model import Answer, Place, ask_model, is_inside
from ckptkit.comparison.parts import PartedTensor, find_parted
from ckptkit.comparison.quantized import QuantizedKey, find_quantized_keys
from ckptkit.comparison.same_ranges import keys_with_same_range, share_a_file
from ckptkit.comparison.values import ValueDiff, compare_named
from ckptkit.core.arguments import require_flags, require_number, require_progress
from ckptkit.core.checkpoint import UNINITIALISED, Checkpoint, TensorInfo
from ckptkit.core.coverage import measure_coverage
from ckptkit.core.coverage.requirements import Requirements, Unmet, find_unmet, parse_requirements
from ckptkit.core.progress import Progress
from ckptkit.core.result import Result
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.ties import tied_keys
from ckptkit.core.torch_bridge import ABSENT, CASTABLE, copies_dtype
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import KeyMap, RulesLike

__all__ = [
    "KeyPair",
    "StateDictDiff",
    "diff",
    "diff_checkpoints",
    "find_unmet_in",
    "loaded_keys",
]

_EXTRA_STATE = "_extra_state"
_EXTRA_STATE_KEY = re.compile(r"(?:.*?\.)?_extra_state(?=\.|$)", re.DOTALL)
_BATCH_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A key that both sides have; ``found.key`` is the key in the file, before any rename."""

    expected: TensorInfo
    found: TensorInfo

    @property
    def key(self) -> str:
        """The expected key."""
        return self.expected.key

    @property
    def is_old_scalar(self) -> bool:
        """Whether the tensor is a scalar that torch before 0.4 saved with shape (1,), which torch reshapes."""
        return self.expected.shape == () and self.found.shape == (1,)

    @property
    def loads(self) -> bool:
        """Whether ``load_state_dict`` accepts the found shape."""
        # Extra state may have any shape.
        return self.is_old_scalar or self.expected.shape == self.found.shape or _extra_state_key(self.key) is not None


@dataclass(frozen=True, repr=False)
class StateDictDiff(Result):
    """The differences between two state_dicts, in torch's words.

    Attributes:
        expected: The expected tensors, by key.
        found: The found tensors, by the key that they have in their file.
        names: The new name of each found key that no rule drops.
        matched: Keys with the same shape on both sides. ``dtype_mismatched`` and ``uncopyable`` keys are matched too.
        missing: Expected tensors that were not found.
        unexpected: Found tensors that are not expected.
        shape_mismatched: The same key with another shape.
        dtype_mismatched: The same key and shape with another dtype; torch casts it.
        blocked: Expected keys that were found with a value that is not a tensor.
        uncopyable: Keys with a found tensor that torch cannot copy: sparse, quantized, without data, or of a dtype
            without casts.
        foreign: Found keys that are not expected and hold no tensor.
        extra_state: Keys of extra state that only one side has.
        filled: Missing keys that torch fills in for checkpoints from before version 0.4.1, or the model's own code.
        notes: Remarks of the rules.
        unseen: Unexpected keys that torch ignores: those below a submodule that is None, and those that the model's own
            code removes.
        quantized: Weights that only one side has quantised, or in another way. Their codes are not ``matched`` with
            numbers, although ``load_state_dict`` copies the codes where shapes are equal.
        unmet: The requirements of ``require`` and ``min_coverage`` that the checkpoint does not meet.
        moved: Expected keys that the model's own code loads from a tensor of another name, each with that name. It is
            the name after the rules.
        computed: Expected keys that the model's own code makes of found tensors, each with their names after the rules.
        excused: Missing keys that keep their value, and that the model's own code does not report as missing.
        reported: Further keys that the model's own code reports as missing or unexpected. Where this code could not be
            tried, the keys of values that it saves, and that were not found.
        refusals: What the model's own code says where it refuses the found tensors, even with ``strict=False``.
        has_own_code: Whether the expected side is a live model with own code for loading: hooks or methods.
        undecided: Why this code could not be tried, or an empty string. Names alone decide then, also about ``loads``
            and ``loads_strict``, and ``load_state_dict`` can decide otherwise.
        expected_checkpoint: Path, format and size of the expected side.
        found_checkpoint: Path, format and size of the found side.
        same_ranges: Matched keys whose bytes on both sides are known to be one range of one file, so that their values
            are equal: of a file and itself, or of two directories with links to the same shards.
        values: How the values of the matched tensors differ; None where they were not compared.
        gates: The gates on values, each with its judgement; ``unmet`` has the broken ones too.

    Example:
        >>> result = ckptkit.diff("py:fixtures.lenet:build", "fixtures/lenet_10class.pth")
        >>> result
        <StateDictDiff: 8 matched, 0 missing, 0 unexpected, 2 shape-mismatched, 0 dtype-mismatched>
        >>> [(pair.key, pair.expected.shape, pair.found.shape) for pair in result.shape_mismatched]
        [('fc3.weight', (4, 84), (10, 84)), ('fc3.bias', (4,), (10,))]
    """

    _truth: ClassVar[str] = "ask for .different, .loads or .loads_strict"

    expected: Mapping[str, TensorInfo]
    found: Mapping[str, TensorInfo]
    names: Mapping[str, str]
    matched: tuple[KeyPair, ...]
    missing: tuple[TensorInfo, ...]
    unexpected: tuple[TensorInfo, ...]
    shape_mismatched: tuple[KeyPair, ...]
    dtype_mismatched: tuple[KeyPair, ...]
    blocked: tuple[str, ...] = ()
    uncopyable: tuple[KeyPair, ...] = ()
    foreign: tuple[str, ...] = ()
    extra_state: tuple[str, ...] = ()
    filled: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    unseen: frozenset[str] = frozenset()
    quantized: tuple[QuantizedKey, ...] = ()
    unmet: tuple[Unmet, ...] = ()
    moved: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    excused: frozenset[str] = frozenset()
    reported: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    has_own_code: bool = False
    undecided: str = ""
    expected_checkpoint: CheckpointSummary = NO_CHECKPOINT
    found_checkpoint: CheckpointSummary = NO_CHECKPOINT
    same_ranges: frozenset[str] = frozenset()
    values: ValueDiff | None = None
    gates: tuple[Gate, ...] = ()

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        values = f", {self.values.in_short}" if self.values is not None else ""
        return (
            f"{len(self.matched)} matched, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.shape_mismatched)} shape-mismatched, {len(self.dtype_mismatched)} dtype-mismatched{values}"
        )

    @property
    def loads(self) -> bool:
        """Whether ``load_state_dict(strict=False)`` accepts the found tensors."""
        refused = self.blocked or self.uncopyable or self.refusals
        return not refused and all(pair.loads for pair in self.shape_mismatched)

    @property
    def loads_strict(self) -> bool:
        """Whether ``load_state_dict(strict=True)`` accepts the found tensors."""
        missing = any(info.key not in self.filled | self.excused for info in self.missing)
        unexpected = any(info.key not in self.unseen for info in self.unexpected)
        others = self.foreign or self.extra_state or self.reported
        return self.loads and not missing and not unexpected and not others

    @property
    def different(self) -> bool:
        """Whether the two sides differ in any key, shape or dtype, or in a value where values were compared.

        With tolerances, values differ where ``torch.allclose`` would be false.
        """
        return bool(
            self.missing or self.unexpected or self.shape_mismatched or self.dtype_mismatched
            or self.quantized or self.uncopyable or self.blocked or self.foreign or self.extra_state
            or self.reported or self.refusals or (self.values is not None and not self.values.all_equal)
        )  # fmt: skip

    @property
    def coverage(self) -> float:
        """The share of the expected elements that would get a value, between 0 and 1; 1 if nothing is expected."""
        return measure_coverage(self.expected, loaded_keys(self)).share

    @cached_property
    def parted(self) -> tuple[PartedTensor, ...]:
        """Tensors that one side has whole and the other in parts, such as stacked experts and fused projections."""
        if not self.missing or not self.unexpected:
            return ()
        keys = {info.key for info in self.unexpected}
        unexpected = {new: self.found[old] for old, new in self.names.items() if old in keys}
        return find_parted({info.key: info for info in self.missing}, unexpected)

    @cached_property
    def hints(self) -> tuple[Hint, ...]:
        """What explains the differences, and the way out: see ``find_hints``."""
        return find_hints(self)


def diff(
    expected: CheckpointLike,
    found: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
    values: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
    expect_frozen: str | Sequence[str] = (),
    expect_changed: str | Sequence[str] = (),
    max_rel_l2: float | None = None,
    progress: Progress | None = None,
) -> StateDictDiff:
    """Return the differences between two state_dicts that ``load_state_dict`` would report, and those of their values.

    Values are compared with ``values``, and with any of the arguments that need them: ``rtol``, ``atol`` and the gates
    ``expect_frozen``, ``expect_changed`` and ``max_rel_l2``. Without tolerances, equal values have equal bits.

    Args:
        expected: The model: a Module, a path, a Checkpoint, or a mapping of tensors or of ``TensorInfo``. What is
            opened here is closed at the end.
        found: The checkpoint, in any of these forms.
        rules: Renames and filters for the keys of ``found``, such as ``["module.*=*"]``, or the path of a rule file.
        require: A pattern or a list of patterns: every matching key of ``expected`` must get a value. ``unmet`` of the
            result has the patterns of which not all would.
        min_coverage: The least share of the expected elements that must get a value, between 0 and 1, as in ``unmet``.
        values: Whether to read and compare the values of all matched tensors. ``values`` of the result has the
            differences.
        rtol: The tolerance relative to the expected value, as in ``torch.allclose``; 0 where only ``atol`` is given.
        atol: The absolute tolerance, as in ``torch.allclose``; 0 where only ``rtol`` is given.
        expect_frozen: A pattern or a list of patterns: the values of every matching tensor must be equal. A matching
            tensor without a partner of the same shape breaks the gate. ``gates`` of the result has all judgements,
            ``unmet`` the broken gates.
        expect_changed: As ``expect_frozen``, for tensors whose values must differ.
        max_rel_l2: The largest relative L2 change that a tensor of both sides may have.
        progress: Called with the number of bytes of each step while values are compared.

    Raises:
        ArgumentError: ``min_coverage`` is not a share, or a tolerance or ``max_rel_l2`` is negative.
        PathError: A path cannot be read.
        FormatError: A file is not a valid checkpoint.
        ModelError: One side is not a state_dict, or has no values to compare.
        RuleError: A rule or a pattern matches nothing, or a rule gives two keys the same name.

    Example:
        >>> diff("fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt", ["module.*=*"]).missing
        ()
        >>> diff("fixtures/lenet_10class.pth", "fixtures/lenet_10class.safetensors", values=True).values.equal
        10
    """
    requirements = parse_requirements(require, min_coverage)
    gates = parse_gates(expect_frozen, expect_changed, max_rel_l2)
    require_flags(values=values)
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if tolerance is not None:
            require_number(tolerance, name, "a number of at least 0, such as 1e-5", at_least=0)
    require_progress(progress)
    with opened(expected, "expected") as expected_side, opened(found, "found") as found_side:
        key_map = apply_rules(rules_for(rules, found_side, expected_side), found_side, expected_side)
        result = diff_checkpoints(expected_side, found_side, key_map)
        unmet = find_unmet_in(result, requirements, of="the model", source="the checkpoint") if requirements else []
        if share_a_file(expected_side, found_side):  # few pairs do
            sources = _unchanged_sources(result, key_map)
            result = replace(result, same_ranges=keys_with_same_range(expected_side, found_side, sources))
        if unmet:
            result = replace(result, unmet=tuple(unmet))
        if not (values or gates or rtol is not None or atol is not None):
            return result
        names = {pair.key: result.moved.get(pair.key, pair.key) for pair in result.matched}
        compared = compare_named(expected_side, found_side, key_map, names, rtol=rtol, atol=atol, progress=progress)
    return _with_values(result, gates, compared)


def _unchanged_sources(result: StateDictDiff, key_map: KeyMap) -> dict[str, str]:
    """Return each matched key with the key of its tensor in the found file, where the rules compute nothing."""
    computed = key_map.copied_or_computed
    return {pair.key: pair.found.key for pair in result.matched if result.moved.get(pair.key, pair.key) not in computed}


def _with_values(result: StateDictDiff, gates: Gates, values: ValueDiff) -> StateDictDiff:
    """Return the result with the compared values, and with the judgement of each gate."""
    if not gates:
        return replace(result, values=values)
    unexpected = (result.names.get(info.key, info.key) for info in result.unexpected)
    keys = dict.fromkeys((*result.expected, *unexpected))
    why = {
        **dict.fromkeys(result.expected, "missing in FOUND"),
        **dict.fromkeys(result.computed, "made by the model's own code"),
        **_reasons(result),
    }
    skipped = {one.key: f"not compared: {one.reason}" for one in values.skipped}
    compared = {pair.key for pair in result.matched} - skipped.keys()
    ties = _ties_to_compared(result, compared)
    reasons = {key: why.get(key, "missing in EXPECTED") for key in keys if key not in compared and key not in ties}
    reasons |= skipped
    judged = judge(gates, values, keys, reasons, ties)
    broken = (gate.broken for gate in judged if gate.broken)
    return replace(result, values=values, gates=tuple(judged), unmet=(*result.unmet, *broken))


def _ties_to_compared(result: StateDictDiff, compared: AbstractSet[str]) -> dict[str, str]:
    """Return each missing key that is tied to a key whose values were compared, with that key: they are one tensor."""
    missing = {info.key for info in result.missing}
    ties: dict[str, str] = {}
    for keys in tied_keys(result.expected.values()) if missing else ():
        first = next((key for key in keys if key in compared), None)
        if first is not None:
            ties |= dict.fromkeys(missing.intersection(keys), first)
    return ties


def loaded_keys(result: StateDictDiff, refused: AbstractSet[str] = frozenset()) -> frozenset[str]:
    """Return the expected keys that a load fills: the matched ones that torch can copy, and what is tied to them.

    The model's own code fills the computed ones.

    ``refused`` names further keys that cannot be copied.
    """
    refused = {*refused, *(pair.key for pair in result.uncopyable)}
    scalars = (pair.key for pair in result.shape_mismatched if pair.is_old_scalar)
    loaded = {pair.key for pair in result.matched}.union(scalars, result.computed) - refused
    for keys in tied_keys(result.expected.values()):
        if loaded.intersection(keys):
            loaded.update(keys)
    return frozenset(loaded)


def find_unmet_in(
    result: StateDictDiff,
    requirements: Requirements,
    refused: AbstractSet[str] = frozenset(),
    *,
    of: str,
    source: str,
) -> list[Unmet]:
    """Return the requirements that a load of what ``result`` compares would not meet, as ``find_unmet`` does."""
    reasons = _reasons(result)
    return find_unmet(requirements, result.expected, loaded_keys(result, refused), reasons, of=of, source=source)


def _reasons(result: StateDictDiff) -> dict[str, str]:
    """Return why keys are not loaded, although the checkpoint has a value for them."""
    return {
        **dict.fromkeys(result.blocked, "not a tensor"),
        **{pair.key: f"torch does not copy {pair.found}" for pair in result.uncopyable},
        **{
            pair.key: f"its shape is {list(pair.found.shape)}, not {list(pair.expected.shape)}"
            for pair in result.shape_mismatched
        },
        **{part: weight.remark for weight in result.quantized for part in (weight.key, *weight.parts)},
    }


def diff_checkpoints(expected: Checkpoint, found: Checkpoint, key_map: KeyMap) -> StateDictDiff:
    """Return the differences, with the keys of ``found`` renamed and filtered by ``key_map``.

    Where the expected side is a live model with own code for loading, a copy of its modules decides.
    """
    expected_infos, found_infos = dict(expected.items()), dict(found.items())
    by_new_name = key_map.describe(found_infos)
    not_tensors = _keys_without_tensor(found, by_new_name)
    expected_states = _extra_state_keys(expected, expected)
    found_states = _extra_state_keys(found, by_new_name)
    quantized = find_quantized_keys(expected, found, by_new_name, key_map.renamed)
    codes = {part for weight in quantized for part in weight.parts}
    absent_modules = tuple(f"{entry.path}." for entry in expected.entries if entry.type == ABSENT)
    answer = _ask(expected, found, key_map, by_new_name, absent_modules)
    matched: list[KeyPair] = []
    missing: list[TensorInfo] = []
    shape_mismatched: list[KeyPair] = []
    dtype_mismatched: list[KeyPair] = []
    uncopyable: list[KeyPair] = []
    blocked: list[str] = []
    moved: dict[str, str] = {}
    computed: dict[str, tuple[str, ...]] = {}
    without: dict[str, str] = {}  # the keys that no tensor is loaded for, and why
    names_decide = answer.rehearsal is None
    undecided = expected_infos
    if names_decide and not expected_states and not_tensors.keys().isdisjoint(expected_infos):
        # Where all names differ, the steps below would take most of the time.
        missing = [info for key, info in expected_infos.items() if key not in by_new_name]
        without = dict.fromkeys((info.key for info in missing), "missing")
        undecided = {key: info for key, info in expected_infos.items() if key in by_new_name} if missing else undecided
    for key, info in undecided.items():
        given_info = by_new_name.get(key)
        is_direct = given_info is not None and key in answer.direct and given_info.shape == info.shape
        if given_info is None or (not is_direct and answer.decides(key)):
            place = _place(info, answer, by_new_name, not_tensors)
            if place.kind == "computed":
                computed[key] = place.sources
                continue
            if place.kind != "loaded":
                if _extra_state_key(key, expected) not in found_states:
                    missing.append(info)
                    without[key] = place.kind
                    if place.kind == "blocked":
                        blocked.append(key)
                continue
            pair = _pair(info, by_new_name[place.sources[0]], answer)
            expected_infos[key] = pair.expected
            if place.sources != (key,):
                moved[key] = place.sources[0]
        else:
            pair = KeyPair(info, given_info)
        there, given = pair.expected, pair.found
        if there.shape != given.shape:
            shape_mismatched.append(pair)
            continue
        if key in codes and given.kind == "dense":
            continue
        matched.append(pair)
        if there.dtype != given.dtype:
            dtype_mismatched.append(pair)
        same = (there.dtype, there.kind) == (given.dtype, given.kind) and there.dtype != "F4"
        if (not same and not _is_copyable(pair)) or answer.refuses_shape(key):  # code of the model made another shape
            uncopyable.append(pair)
    if names_decide:
        unexpected = {new: info for new, info in by_new_name.items() if new not in expected_infos}
    else:
        unexpected = {new: by_new_name[new] for new in by_new_name if _is_unexpected(new, answer, expected_infos)}
    if expected_states:
        unexpected = {
            new: info
            for new, info in unexpected.items()
            if _EXTRA_STATE not in new or _extra_state_key(new, found) not in expected_states
        }
    own_values = _values_of_own_code(expected, answer)
    foreign = [
        key
        for key in not_tensors
        if _is_unexpected(key, answer, expected_infos)
        and not answer.ignores(key)
        and _extra_state_key(key, found) is None
        and key not in own_values
    ]
    one_sided = expected_states ^ found_states
    listed = {info.key for info in missing} | unexpected.keys() if one_sided else set()
    one_sided_states = [
        key
        for key in sorted(one_sided - listed)
        if not answer.decides(key) or key in answer.missing or key in answer.unexpected
    ]
    by_name = missing if names_decide else [info for info in missing if not answer.decides(info.key)]
    filled = _filled_counters(by_name, expected, _versions_for(found, key_map))
    reported = {*(answer.missing - without.keys() - expected_states), *(answer.unexpected - unexpected.keys())}
    reported |= own_values - by_new_name.keys()
    return StateDictDiff(
        expected_infos,
        found_infos,
        key_map.renamed,
        tuple(matched),
        tuple(missing),
        tuple(unexpected.values()),
        tuple(shape_mismatched),
        tuple(dtype_mismatched),
        blocked=tuple(blocked),
        uncopyable=tuple(uncopyable),
        foreign=tuple(key for key in foreign if not key.startswith(absent_modules)),
        extra_state=tuple(key for key in one_sided_states if not key.startswith(absent_modules)),
        filled=filled.union(key for key, kind in without.items() if kind == "filled"),
        notes=key_map.notes,
        unseen=frozenset(
            info.key
            for new, info in (unexpected.items() if absent_modules or not names_decide else ())
            if new.startswith(absent_modules) or (not names_decide and answer.ignores(new))
        ),
        quantized=quantized,
        moved=moved,
        computed=computed,
        excused=frozenset(key for key, kind in without.items() if kind == "excused" and key not in filled),
        reported=tuple(sorted(reported - not_tensors.keys() - found_states)),
        refusals=answer.refusals,
        has_own_code=bool(answer.paths),
        undecided=answer.reason,
        expected_checkpoint=CheckpointSummary.of(expected),
        found_checkpoint=CheckpointSummary.of(found),
    )


def _ask(
    expected: Checkpoint,
    found: Checkpoint,
    key_map: KeyMap,
    tensors: Mapping[str, TensorInfo],
    absent_modules: tuple[str, ...],
) -> Answer:
    """Ask the model about its modules with own code; the names tell what torch reports about its other modules."""
    paths = () if expected.model is None else modules_with_own_code(expected.model, saving=True)
    if expected.model is None or not paths:
        return Answer()
    from ckptkit.comparison.own_code.rehearsal import Given, Outside

    states = _extra_state_keys(found, tensors)
    # A file lists the parts of a nested extra state, and torch gets the whole state at one key.
    whole = {key: info for key, info in tensors.items() if _extra_state_key(key, found) in (None, key)}
    others = {key for key in _keys_without_tensor(found, tensors) if _extra_state_key(key, found) is None}
    given = whole.keys() | others | states
    lost = [info for key, info in expected.items() if key not in given]
    versions = _versions_for(found, key_map)
    filled = _filled_counters(lost, expected, versions)
    missing = [info.key for info in lost if info.key not in filled]
    wanted = expected.keys() | _extra_state_keys(expected, expected)
    unexpected = [key for key in given if key not in wanted and not key.startswith(absent_modules)]
    outside = Outside(missing, unexpected)
    return ask_model(expected.model, paths, Given(whole, sorted(others | states), versions), outside, expected.keys())


def _place(
    info: TensorInfo, answer: Answer, tensors: Mapping[str, TensorInfo], not_tensors: Mapping[str, None]
) -> Place:
    """Return what happens to an expected key, as the model says, or to one that was not found."""
    key = info.key
    if not answer.decides(key):
        if key in not_tensors:
            return Place("blocked")
        return Place("missing" if answer.rehearsal is None or key in answer.missing else "excused")
    place = answer.place(key)
    known = tuple(source for source in place.sources if source in tensors)
    is_scalar = known == (key,) and KeyPair(info, tensors[key]).is_old_scalar
    if place.kind == "computed":
        return Place("loaded" if is_scalar else "computed", known)
    if place.kind == "loaded" and not known:  # the value of an extra state
        return Place("computed")
    if place.kind == "loaded" and not answer.refuses_shape(key):
        shape = tensors[known[0]].shape
        if shape != info.shape and not answer.makes_shape(key, shape):
            return Place("computed", known)  # torch repeats the values along some dims
    return place


def _values_of_own_code(expected: Checkpoint, answer: Answer) -> set[str]:
    """Return the keys of values without tensors, such as packed weights, that code which was not tried saves."""
    if not answer.reason:
        return set()
    keys = (entry.path for entry in expected.entries if entry.type != ABSENT and not entry.is_outside)
    return {key for key in keys if is_inside(key, answer.paths) and _extra_state_key(key, expected) is None}


def _pair(info: TensorInfo, found: TensorInfo, answer: Answer) -> KeyPair:
    """Return the pair, with the shape that the model's own code gives the tensor while it is loaded."""
    if info.shape != found.shape and answer.makes_shape(info.key, found.shape):
        kind = "dense" if info.kind == UNINITIALISED else info.kind
        info = replace(info, shape=found.shape, view=None, kind=kind)  # the view was that of another shape
    return KeyPair(info, found)


def _is_unexpected(key: str, answer: Answer, expected: Mapping[str, TensorInfo]) -> bool:
    """Return whether a found key has no place in the model."""
    if not answer.decides(key):
        return key not in expected
    if key in expected and answer.place(key) == Place("loaded", (key,)):
        return False
    return key in answer.unexpected or key not in answer.used


def _keys_without_tensor(found: Checkpoint, tensors: Mapping[str, TensorInfo]) -> dict[str, None]:
    """Return the keys of the found state_dict that hold no tensor, in order."""
    paths = [entry.path for entry in found.entries if not entry.is_outside]
    return dict.fromkeys(path for path in paths if path not in tensors and path != "_metadata")


def _extra_state_keys(side: Checkpoint, tensors: Iterable[str]) -> set[str]:
    """Return the keys of extra state on one side."""
    names = [*(entry.path for entry in side.entries), *tensors]
    # Most state_dicts have no extra state, and one search tells so.
    candidates = [key for key in names if _EXTRA_STATE in key] if _EXTRA_STATE in "\n".join(names) else []
    keys = (_extra_state_key(key, side) for key in candidates)
    return {key for key in keys if key is not None}


def _extra_state_key(key: str, side: Checkpoint | None = None) -> str | None:
    """Return the key of the extra state that ``key`` is or is a part of; None if it is neither."""
    match = _EXTRA_STATE_KEY.match(key) if _EXTRA_STATE in key else None
    # A file lists the parts of a nested extra state under their own keys; a live model has only the exact key.
    if match is None or (side is not None and not side.files and match.end() < len(key)):
        return None
    return match[0]


def _is_copyable(pair: KeyPair) -> bool:
    """Return whether the kinds and dtypes let torch copy the found values into the expected tensor."""
    kinds = {pair.expected.kind, pair.found.kind}
    dtypes = {pair.expected.dtype, pair.found.dtype}
    is_kind_copyable = len(kinds) == 1 or not kinds & {"sparse", "quantized", "meta", "nested"}
    is_dtype_copyable = dtypes <= CASTABLE or (len(dtypes) == 1 and copies_dtype(pair.found.dtype))
    return _extra_state_key(pair.key) is not None or (is_kind_copyable and is_dtype_copyable)


def _filled_counters(
    missing: Iterable[TensorInfo], expected: Checkpoint, versions: Mapping[str, int]
) -> frozenset[str]:
    """Return the missing counters that torch fills in, because the state_dict has batch norm in a version below 2."""
    filled = set()
    for key in (info.key for info in missing if info.key.endswith(_BATCH_COUNTER)):
        prefix, _, name = key.rpartition(".")
        if name != _BATCH_COUNTER:
            continue
        mean = f"{prefix}.running_mean" if prefix else "running_mean"
        # Batch norm has version 2; a user's module with the same buffers has version 1.
        is_norm = mean in expected and expected.versions.get(prefix, 2) >= 2
        if is_norm and versions.get(prefix, 0) < 2:
            filled.add(key)
    return frozenset(filled)


def _versions_for(found: Checkpoint, key_map: KeyMap) -> Mapping[str, int]:
    """Return the versions of modules that torch would see: none where keys were renamed."""
    is_renamed = bool(key_map.copied_or_computed) or any(map(operator.ne, key_map.renamed, key_map.renamed.values()))
    return {} if is_renamed else found.versions
