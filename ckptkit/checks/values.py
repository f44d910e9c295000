"""All checks of values: of a checkpoint alone, and of a checkpoint compared with a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptkit.checks.at_init import find_untrained
from ckptkit.checks.buffers import check_buffers
from ckptkit.checks.duplicates import check_duplicates, check_recorded_ties, equal_groups
from ckptkit.checks.expected import check_as_expected, check_at_init
from ckptkit.checks.quantized_weights import has_numbers
from ckptkit.checks.single_tensors import check_finite, check_single_tensors
from ckptkit.checks.value_reader import ValueReader
from ckptkit.comparison import KeyPair, StateDictDiff
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files import same_bytes
from ckptkit.core.findings import Finding
from ckptkit.errors import CkptkitError
from ckptkit.formats import LIVE_PREFIX
from ckptkit.quantized import Quantized
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["check_expected_values", "check_values"]

_MAX_BUFFER_BYTES = 1 << 20  # larger buffers of indices are not compared number by number


def check_values(checkpoint: Checkpoint, stats: Mapping[str, ValueStats], quantized: Quantized) -> Iterator[Finding]:
    """Yield the findings about the values of a checkpoint; ``stats`` are their statistics by key.

    Of the parts of quantised weights, only NaN and infinities in scales and in fp8 codes are reported.
    """

    def have_equal_bytes(first: str, second: str) -> bool:
        return _have_equal_bytes(checkpoint, first, checkpoint, second)

    def read_bytes(key: str) -> bytes:
        try:
            return checkpoint.read_bytes(key) if checkpoint[key].nbytes <= _MAX_BUFFER_BYTES else b""
        except (CkptkitError, OSError):
            return b""

    stats = {key: stats[key] for key in checkpoint if key in stats}
    parts = quantized.by_key
    finite = {key: found for key, found in stats.items() if has_numbers(checkpoint[key], parts.get(key))}
    yield from check_finite(checkpoint, finite)
    stats = {key: found for key, found in stats.items() if key not in parts}
    yield from check_single_tensors(checkpoint, stats)
    yield from check_buffers(checkpoint, stats, read_bytes)
    yield from check_duplicates(checkpoint, equal_groups(checkpoint, stats, have_equal_bytes))
    infos = {key: checkpoint[key] for key in stats}
    yield from check_recorded_ties(infos, checkpoint.metadata, have_equal_bytes)


def check_expected_values(
    result: StateDictDiff, expected: Checkpoint, values: ValueReader, quantized: Quantized
) -> Iterator[Finding]:
    """Yield findings about tensors that equal the tensors of ``expected``, and about tensors that look untrained.

    A ``py:`` model is built to get its values. Those of a Module may be trained, so nothing is compared with them but
    for equality.
    """
    pairs = [pair for pair in result.matched if values.checkpoint.get(pair.found.key) == pair.found]
    is_built = expected.path.startswith(LIVE_PREFIX)
    equal: set[str] = set()

    def have_equal_bytes(pair: KeyPair) -> bool:
        if _have_equal_bytes(values.checkpoint, pair.found.key, expected, pair.expected.key):
            equal.add(pair.key)
        return pair.key in equal

    def is_worth_comparing(pair: KeyPair) -> bool:
        stats = values.stats.get(pair.found.key)
        is_constant = stats is not None and stats.constant is not None
        return pair.found.dtype == pair.expected.dtype and not (is_built and is_constant)

    yield from check_as_expected(filter(is_worth_comparing, pairs), have_equal_bytes)
    if expected.model is not None:
        new = ValueReader(expected, [pair.expected.key for pair in pairs] if is_built else [], values.workspace)
        new.read_remaining()
        pairs = [pair for pair in pairs if pair.found.key not in quantized.by_key]
        found = {pair.key: stats for pair in pairs if (stats := values.stats.get(pair.found.key)) is not None}
        yield from check_at_init(find_untrained(pairs, found, new.stats, expected.model), equal)


def _have_equal_bytes(first: Checkpoint, first_key: str, second: Checkpoint, second_key: str) -> bool:
    try:
        return same_bytes(first.payload(first_key), second.payload(second_key))
    except (CkptkitError, OSError):
        return False  # the pass over the records has reported an unreadable file
