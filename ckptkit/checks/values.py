"""All checks of the values of a checkpoint alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptkit.checks.buffers import check_buffers
from ckptkit.checks.duplicates import check_duplicates, check_recorded_ties, equal_groups
from ckptkit.checks.quantized_weights import has_numbers
from ckptkit.checks.single_tensors import check_finite, check_single_tensors
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.checkpoint.payload import part_of
from ckptkit.core.files.payloads import same_bytes
from ckptkit.core.findings import Finding
from ckptkit.errors import CkptkitError
from ckptkit.quantized import Quantized
from ckptkit.values.extremes import Extremes
from ckptkit.values.kernels import MagnitudesKernel, Tally, computed
from ckptkit.values.reading import Source, Span
from ckptkit.values.workers import Workers

__all__ = ["check_values", "have_equal_bytes"]

_BEGIN = 1 << 16  # bytes at the begin of a tensor that tell most tensors apart
_MAX_BUFFER_BYTES = 1 << 20  # larger buffers of indices are not compared number by number


def check_values(
    checkpoint: Checkpoint, stats: Mapping[str, Extremes], quantized: Quantized, workers: Workers
) -> Iterator[Finding]:
    """Yield the findings about the values of a checkpoint; ``stats`` are their statistics by key.

    Of the parts of quantised weights, only NaN and infinities in scales and in fp8 codes are reported.
    """
    contents = _Contents(checkpoint, workers)
    infos = dict(checkpoint.items())  # a dict is asked much about each of many small tensors
    stats = finite = {key: stats[key] for key in infos if key in stats}
    parts = quantized.by_key
    if parts:
        finite = {key: found for key, found in stats.items() if has_numbers(infos[key], parts.get(key))}
        stats = {key: found for key, found in stats.items() if key not in parts}
    yield from check_finite(infos, finite)
    yield from check_single_tensors(infos, stats)
    yield from check_buffers(infos, stats, contents.of_buffer)
    yield from check_duplicates(infos, equal_groups(infos, stats, contents))
    judged = {key: infos[key] for key in stats} if checkpoint.metadata else {}
    yield from check_recorded_ties(judged, checkpoint.metadata, contents.are_equal)


@dataclass(frozen=True, slots=True)
class _Contents:
    """The bytes of tensors of a checkpoint, read again. The pass over the records has reported an unreadable file."""

    checkpoint: Checkpoint
    workers: Workers

    def are_equal(self, first: str, second: str) -> bool:
        """Return whether two tensors have equal bytes."""
        return have_equal_bytes(self.checkpoint, first, self.checkpoint, second)

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
            tally: Tally[set[float]] = Tally(self.checkpoint[key])
            source = Source(self.checkpoint.payload(key), (Span(tally, 0, tally.bytes_left, tally.width),))
            found = [magnitudes for _, magnitudes, _ in computed([source], MagnitudesKernel(), self.workers)]
            return len(found[-1] or ()) < 2
        except (CkptkitError, OSError):
            return False


def have_equal_bytes(first: Checkpoint, first_key: str, second: Checkpoint, second_key: str) -> bool:
    """Return whether two tensors have equal bytes; tensors that cannot be read are not equal."""
    try:
        return same_bytes(first.payload(first_key), second.payload(second_key))
    except (CkptkitError, OSError):
        return False  # the pass over the records has reported an unreadable file
