"""All checks of values: of a checkpoint alone, and of a checkpoint compared with a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptkit.checks.at_init import find_untrained
from ckptkit.checks.buffers import check_buffers
from ckptkit.checks.duplicates import check_duplicates, check_recorded_ties, equal_groups
from ckptkit.checks.expected import check_as_expected, check_at_init
from ckptkit.checks.quantized_weights import has_numbers
from ckptkit.checks.single_tensors import check_finite, check_single_tensors
from ckptkit.checks.value_reader import ValueReader
from ckptkit.comparison import KeyPair, StateDictDiff
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.checkpoint.payload import part_of
from ckptkit.core.files import same_bytes
from ckptkit.core.findings import Finding
from ckptkit.errors import CkptkitError
from ckptkit.formats import LIVE_PREFIX
from ckptkit.quantized import Quantized
from ckptkit.statistics.kernel import StatsKernel
from ckptkit.statistics.value_stats import ValueStats
from ckptkit.values.extremes import Extremes
from ckptkit.values.kernels import MagnitudesKernel, Tally, computed
from ckptkit.values.reading import Source, Span
from ckptkit.values.workers import Workers

__all__ = ["check_expected_values", "check_values"]

_BEGIN = 1 << 16  # bytes at the begin of a tensor that tell most tensors apart
_MAX_BUFFER_BYTES = 1 << 20  # larger buffers of indices are not compared number by number


def check_values(
    checkpoint: Checkpoint, stats: Mapping[str, Extremes], quantized: Quantized, workers: Workers
) -> Iterator[Finding]:
    """Yield the findings about the values of a checkpoint; ``stats`` are their statistics by key.

    Of the parts of quantised weights, only NaN and infinities in scales and in fp8 codes are reported.
    """
    contents = _Contents(checkpoint, workers)
    stats = {key: stats[key] for key in checkpoint if key in stats}
    parts = quantized.by_key
    finite = {key: found for key, found in stats.items() if has_numbers(checkpoint[key], parts.get(key))}
    yield from check_finite(checkpoint, finite)
    stats = {key: found for key, found in stats.items() if key not in parts}
    yield from check_single_tensors(checkpoint, stats)
    yield from check_buffers(checkpoint, stats, contents.of_buffer)
    yield from check_duplicates(checkpoint, equal_groups(checkpoint, stats, contents))
    infos = {key: checkpoint[key] for key in stats}
    yield from check_recorded_ties(infos, checkpoint.metadata, contents.are_equal)


@dataclass(frozen=True, slots=True)
class _Contents:
    """The bytes of tensors of a checkpoint, read again. The pass over the records has reported an unreadable file."""

    checkpoint: Checkpoint
    workers: Workers

    def are_equal(self, first: str, second: str) -> bool:
        """Return whether two tensors have equal bytes."""
        return _have_equal_bytes(self.checkpoint, first, self.checkpoint, second)

    def begin(self, key: str) -> bytes:
        """Return the first bytes of a tensor."""
        try:
            payload = self.checkpoint.payload(key)
            return b"".join(map(bytes, part_of(payload, 0, min(payload.nbytes, _BEGIN)).chunks()))
        except (CkptkitError, OSError):
            return b""

    def of_buffer(self, key: str) -> bytes:
        """Return the bytes of a tensor of indices, unless it is large."""
        try:
            return self.checkpoint.read_bytes(key) if self.checkpoint[key].nbytes <= _MAX_BUFFER_BYTES else b""
        except (CkptkitError, OSError):
            return b""

    def have_one_magnitude(self, key: str) -> bool:
        """Return whether all finite numbers of a tensor that are not zero have the same magnitude."""
        try:
            tally = Tally[set[float]](self.checkpoint[key])
            source = Source(self.checkpoint.payload(key), (Span(tally, 0, tally.bytes_left, tally.width),))
            found = [magnitudes for _, magnitudes, _ in computed([source], MagnitudesKernel(), self.workers)]
            return len(found[-1] or ()) < 2
        except (CkptkitError, OSError):
            return False


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
        keys = [pair.expected.key for pair in pairs] if is_built else []
        new = ValueReader(expected, keys, values.workers, StatsKernel())
        new.read_remaining()
        pairs = [pair for pair in pairs if pair.found.key not in quantized.by_key]
        found = {pair.key: values.stats[pair.found.key] for pair in pairs if pair.found.key in values.stats}
        untrained = find_untrained(pairs, _with_moments(found), _with_moments(new.stats), expected.model)
        yield from check_at_init(untrained, equal)


def _with_moments(stats: Mapping[str, Extremes]) -> dict[str, ValueStats]:
    return {key: found for key, found in stats.items() if isinstance(found, ValueStats)}


def _have_equal_bytes(first: Checkpoint, first_key: str, second: Checkpoint, second_key: str) -> bool:
    try:
        return same_bytes(first.payload(first_key), second.payload(second_key))
    except (CkptkitError, OSError):
        return False  # the pass over the records has reported an unreadable file
