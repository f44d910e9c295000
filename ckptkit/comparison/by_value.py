"""``compare_values``: the values of two checkpoints, among the keys that both have."""

from __future__ import annotations

from functools import partial

from ckptkit.comparison import diff_checkpoints
from ckptkit.comparison.values import ValueDiff, compare_named, require_tolerances
from ckptkit.comparison.values.shared import SharedSides, compare_shared
from ckptkit.core.arguments import require_progress
from ckptkit.core.progress import Progress
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import RulesLike
from ckptkit.tasks.executor_type import Executor
from ckptkit.tasks.sharing import require_shareable, sharing_of

__all__ = ["compare_values"]


def compare_values(
    expected: CheckpointLike,
    found: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> ValueDiff:
    """Return how the values of two checkpoints differ, among the keys that both have with one shape.

    Each side is read once, in pieces of bounded size; equal bytes are not computed with. Found is cast to expected's
    dtype first, as torch casts. Without tolerances, equal means equal bits: -0.0 differs from 0.0, and a NaN equals a
    NaN of the same bits. Keys of one side alone, shapes and dtypes are told by ``diff``.

    Args:
        expected: A path, a Checkpoint, a Module or a mapping of tensors. What is opened here is closed at the end.
        found: The checkpoint to compare, in any of these forms.
        rules: Renames, filters and operations for the tensors of ``found``, as in ``diff``. What they make is compared.
        rtol: The relative tolerance of ``torch.allclose(found, expected)``; None is 0 beside another tolerance.
        atol: The absolute tolerance, likewise.
        progress: Called with the number of bytes after each piece, those of both sides.
        executor: Shares the work among its workers, as in ``stats``.

    Raises:
        ArgumentError: A tolerance is not a number of at least 0, or a side is not a path, but there is an executor.
        WorkerError: A worker ended before its task was done.
        PathError: A path cannot be read.
        FormatError: A file is not a valid checkpoint, or its bytes do not agree with its header.
        ModelError: A side is not a state_dict, or a tensor is on the meta device.
        PlanError: A side has descriptions of tensors, without bytes.
        RuleError: A rule matches nothing, or gives two keys the same name.
        ChangedError: A file changes while it is read.

    Example:
        >>> a, b = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([3.0, 4.5])}
        >>> (worst,) = ckptkit.compare_values(a, b).different
        >>> worst.key, worst.max_abs, worst.rel_l2, worst.place
        ('w', 0.5, 0.1, (1,))
    """
    require_tolerances(rtol, atol)
    require_progress(progress)
    require_shareable(executor, {"expected": expected, "found": found})
    with opened(expected, "expected") as expected_side, opened(found, "found") as found_side:
        key_map = apply_rules(rules_for(rules, found_side, expected_side), found_side, expected_side)
        result = diff_checkpoints(expected_side, found_side, key_map)
        names = {pair.key: result.moved.get(pair.key, pair.key) for pair in result.matched}
        sharing = sharing_of(executor, [(expected, expected_side), (found, found_side)])
        compare = None if sharing is None else partial(compare_shared, SharedSides(sharing))
        return compare_named(
            expected_side, found_side, key_map, names, rtol=rtol, atol=atol, progress=progress, compare=compare
        )
