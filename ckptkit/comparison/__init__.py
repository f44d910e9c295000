"""``diff``: compare the keys, shapes and dtypes of a checkpoint with a model, and its values on request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ckptkit.comparison.gates import Gates, Subject, judge, parse_gates, refuse_unmatched
from ckptkit.comparison.hints import joined_hint
from ckptkit.comparison.matching import diff_checkpoints
from ckptkit.comparison.parts import align_command
from ckptkit.comparison.quantized import numbers_of_either, with_dtypes_of_plain
from ckptkit.comparison.same_ranges import keys_with_same_range, share_a_file
from ckptkit.comparison.state_dict_diff import (
    KeyPair,
    StateDictDiff,
    find_unmet_in,
    loaded_keys,
    reasons_not_loaded,
)
from ckptkit.comparison.values import ValueDiff, compare_named
from ckptkit.core.arguments import has_no_argument, require_flags, require_number, require_progress, takes_rules
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.coverage.requirements import parse_requirements
from ckptkit.core.progress import Progress
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.ties import tied_keys
from ckptkit.errors import RuleError
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.quantized.view import DequantizedView, DequantizeLike, as_numbers, parse_dequantize
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import KeyMap, Rule, Rules, RulesLike
from ckptkit.tasks.executor_type import Executor
from ckptkit.tasks.sharing import Sharing, require_shareable, sharing_of

if TYPE_CHECKING:
    from ckptkit.comparison.values import ComparePairs

__all__ = ["KeyPair", "StateDictDiff", "diff", "diff_checkpoints", "find_unmet_in", "loaded_keys"]


@has_no_argument(strict="the result says .loads_strict for strict=True of torch, and .loads for strict=False")
@takes_rules
def diff(
    expected: CheckpointLike,
    found: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
    values: bool = False,
    dequantize: DequantizeLike = False,
    rtol: float | None = None,
    atol: float | None = None,
    expect_frozen: str | Sequence[str] = (),
    expect_changed: str | Sequence[str] = (),
    max_rel_l2: float | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
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
        dequantize: Whether quantised weights of both sides are compared as numbers, or the dtype of the numbers.
            Without one, a weight has the dtype of the plain tensor that the other side has of it. It is F32 if both
            sides are quantised, so that a small difference is not rounded away. Such weights are compared in the dtype
            that is given.
        rtol: The tolerance relative to the expected value, as in ``torch.allclose``; 0 where only ``atol`` is given.
        atol: The absolute tolerance, as in ``torch.allclose``; 0 where only ``rtol`` is given.
        expect_frozen: A pattern or a list of patterns: the values of every matching tensor must be equal. A matching
            tensor without a partner of the same shape breaks the gate, unless ``keep`` or ``drop`` of the rules leaves
            it out. ``gates`` of the result has all judgements, ``unmet`` the broken gates.
        expect_changed: As ``expect_frozen``, for tensors whose values must differ.
        max_rel_l2: The largest relative L2 change that a tensor of both sides may have.
        progress: Called with the number of bytes of each step while values are compared.
        executor: Shares the comparison of values among its workers, as in ``stats``.

    Raises:
        ArgumentError: ``min_coverage`` is not a share, a tolerance or ``max_rel_l2`` is negative, or a side is not a
            path, but there is an executor.
        WorkerError: A worker ended before its task was done.
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
    reads = values or bool(gates) or rtol is not None or atol is not None
    require_shareable(executor, {"expected": expected, "found": found} if reads else {})
    with opened(expected, "expected") as stored_expected, opened(found, "found") as stored_found:
        views = as_numbers(stored_expected, dequantize), as_numbers(stored_found, dequantize)
        expected_side, found_side = (view.checkpoint for view in views)
        all_rules = rules_for(rules, found_side, expected_side)
        key_map = apply_rules(all_rules, found_side, expected_side)
        if dequantize is True:
            views = with_dtypes_of_plain(*views, key_map)
            expected_side, found_side = (view.checkpoint for view in views)
            key_map = apply_rules(all_rules, found_side, expected_side)
        result = diff_checkpoints(expected_side, found_side, key_map)
        if views[0].weights or views[1].weights:
            result = replace(
                result,
                expected_numbers=views[0].listed,
                found_numbers=views[1].listed,
                expected_checkpoint=CheckpointSummary.of(stored_expected),
                found_checkpoint=CheckpointSummary.of(stored_found),
            )
        if result.missing and key_map.dropped:
            result = replace(result, left_out=_left_out(result, all_rules, key_map, found_side, expected_side))
        unmet = find_unmet_in(result, requirements, of="the model", source="the checkpoint") if requirements else []
        if share_a_file(expected_side, found_side):  # few pairs do
            sources = _unchanged_sources(result, key_map)
            result = replace(result, same_ranges=keys_with_same_range(expected_side, found_side, sources))
        if unmet:
            result = replace(result, unmet=tuple(unmet))
        if not reads:
            return result
        keys = _keys_of_both(result)
        ties = _ties_to_compared(result, {pair.key for pair in result.matched}) if result.left_out else {}
        refuse_unmatched(gates, keys, result.left_out - ties.keys())
        names = {pair.key: result.moved.get(pair.key, pair.key) for pair in result.matched}
        stated = parse_dequantize(dequantize)[1]
        sharing = sharing_of(executor, [(expected, stored_expected), (found, stored_found)])
        compared = compare_named(
            expected_side, found_side, key_map, names,
            dtypes={} if stated is None else dict.fromkeys(numbers_of_either(*views, key_map, names), stated),
            rtol=rtol, atol=atol, progress=progress, compare=_compare_in_workers(sharing, views),
        )  # fmt: skip
    return _with_values(result, gates, compared, keys)


def _compare_in_workers(sharing: Sharing | None, views: Sequence[DequantizedView]) -> ComparePairs | None:
    if sharing is None:
        return None
    from ckptkit.comparison.values.shared import SharedSides, compare_shared

    return partial(compare_shared, SharedSides.of(sharing, views))


def _unchanged_sources(result: StateDictDiff, key_map: KeyMap) -> dict[str, str]:
    """Return each matched key with the key of its tensor in the found file, where the rules compute nothing."""
    computed = key_map.copied_or_computed
    return {pair.key: pair.found.key for pair in result.matched if result.moved.get(pair.key, pair.key) not in computed}


def _left_out(
    result: StateDictDiff, rules: Rules, key_map: KeyMap, found: Checkpoint, expected: Checkpoint
) -> frozenset[str]:
    """Return the missing keys that the found side has, but that ``keep`` or ``drop`` of the rules leave out."""
    stages = tuple(replace(stage, keep=(), rules=tuple(filter(_is_kept, stage.rules))) for stage in rules.stages)
    if stages == rules.stages:
        return frozenset()
    try:
        unfiltered = apply_rules(Rules(stages, allow_unused=True), found, expected).renamed
    except RuleError:  # two keys get one name where none is left out
        return frozenset()
    names = {unfiltered[key] for key in key_map.dropped if key in unfiltered}
    return frozenset(info.key for info in result.missing if info.key in names)


def _is_kept(rule: Rule) -> bool:
    """Return whether a rule is none of the filters; rules of a file have a place, and belong to the model."""
    return bool(rule.where) or not rule.drops


def _keys_of_both(result: StateDictDiff) -> Collection[str]:
    """Return the names of all tensors of both sides, after the rules."""
    return dict.fromkeys((*result.expected, *(result.names.get(info.key, info.key) for info in result.unexpected)))


def _rename_hint(result: StateDictDiff, keys: Collection[str]) -> str:
    """Return what may explain that some of these keys are missing on one side; an empty string if nothing does."""
    unexpected = {result.names.get(info.key, info.key): info.shape for info in result.unexpected}
    missing = {info.key: info.shape for info in result.missing}
    lone = [
        (side[key], others)
        for side, others in ((missing, unexpected), (unexpected, missing))
        for key in keys
        if key in side
    ]
    if not lone:
        return ""
    if result.hints:
        return joined_hint(result.hints)
    if all(shape in others.values() for shape, others in lone):
        return f"{align_command(result.expected_checkpoint, result.found_checkpoint)} looks for rules that rename them"
    return ""


def _with_values(result: StateDictDiff, gates: Gates, values: ValueDiff, keys: Collection[str]) -> StateDictDiff:
    """Return the result with the compared values, and with the judgement of each gate."""
    if not gates:
        return replace(result, values=values)
    why = {
        **dict.fromkeys(result.expected, "missing in FOUND"),
        **dict.fromkeys(result.computed, "made by the model's own code"),
        **reasons_not_loaded(result),
    }
    skipped = {one.key: f"not compared: {one.reason}" for one in values.skipped}
    compared = {pair.key for pair in result.matched} - skipped.keys()
    ties = _ties_to_compared(result, compared)
    reasons = {key: why.get(key, "missing in EXPECTED") for key in keys if key not in compared and key not in ties}
    reasons |= skipped
    left_out = result.left_out - ties.keys()
    subject = Subject(keys, left_out, reasons, ties, lambda missing: _rename_hint(result, missing))
    judged = judge(gates, values, subject)
    broken = (gate.broken for gate in judged if gate.broken)
    return replace(result, values=values, gates=tuple(judged), unmet=(*result.unmet, *broken))


def _ties_to_compared(result: StateDictDiff, compared: AbstractSet[str]) -> dict[str, str]:
    """Return each key of one side that is tied to a key whose values were compared, with that key: they are one tensor.

    Keys are the names after the rules.
    """
    missing = {info.key: info.key for info in result.missing}
    unexpected = {info.key: result.names.get(info.key, info.key) for info in result.unexpected}
    of_expected = {key: key for key in compared}
    of_found = {pair.found.key: pair.key for pair in result.matched if result.names.get(pair.found.key) == pair.key}
    ties: dict[str, str] = {}
    sides = (missing, of_expected, result.expected), (unexpected, of_found, result.found)
    for lone, others, infos in sides:
        for keys in tied_keys(infos.values()) if lone else ():
            first = next((others[key] for key in keys if others.get(key) in compared), None)
            if first is not None:
                ties |= {lone[key]: first for key in keys if key in lone}
    return ties
