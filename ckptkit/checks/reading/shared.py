"""Read the records of a checkpoint in the workers of an executor, with the same reads as the threads of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from ckptkit.checks.reading import ReadResult, Scan
from ckptkit.checks.reading.value_reader import ValueReader, ValuesKernel
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.payloads import is_seekable
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.progress import Progress
from ckptkit.core.text import quoted
from ckptkit.tasks.inputs import opened_again
from ckptkit.tasks.sharing import Part, Sharing
from ckptkit.values.kernels import ExtremesKernel, Tally
from ckptkit.values.reading import READ_BYTES, Read, Source, planned_reads, reads
from ckptkit.values.workers import Workers

__all__ = ["SharedReads"]


class _Range(NamedTuple):
    """Sources of a scan from ``first`` to ``stop``, or of one long source its reads from ``begin`` to ``end``."""

    first: int
    stop: int
    begin: int = 0
    end: int | None = None
    nbytes: int = 0


class _Reading(NamedTuple):
    chosen: frozenset[str] | None
    reads_values: bool
    keys: tuple[str, ...] | None
    has_moments: bool
    range: _Range


class SharedReads:
    """Reads the sources of a scan in the workers of an executor."""

    def __init__(self, sharing: Sharing, progress: Progress) -> None:
        """Take the executor and its input; ``progress`` gets the bytes of each part."""
        self._sharing = sharing
        self._progress = progress

    def pays(self, sources: Sequence[Source[Tally[Any]]]) -> bool:
        """Return whether it takes less time to send the work to workers than to do it here."""
        return self._sharing.pays(sum(source.payload.nbytes for source in sources))

    def results(self, scan: Scan, sources: Sequence[Source[Tally[Any]]]) -> Iterator[ReadResult]:
        """Yield each read and what was found in it, in order. Raises what ``Sharing.run`` raises."""
        total = sum(source.payload.nbytes for source in sources)
        most = self._sharing.bytes_of_part(total)
        ranges = [one for at, source in enumerate(sources) for one in _ranges(at, source, most)]
        parts = [self._part(scan, _joined(group)) for group in self._sharing.parts_of(ranges, lambda one: one.nbytes)
                 for group in _by_kind(group)]  # fmt: skip
        for part, found in zip(parts, self._sharing.run(_read, parts, self._progress), strict=True):
            planned = _of_range(part.work.range, sources, planned_reads)
            for read, result in zip(planned, found, strict=True):
                yield (read, *result)

    def _part(self, scan: Scan, range_: _Range) -> Part[_Reading]:
        values = scan.values
        is_all = values is None or len(values.keys) == len(scan.checkpoint)
        work = _Reading(
            None if scan.chosen_keys is None else frozenset(scan.chosen_keys),
            values is not None,
            None if is_all or values is None else tuple(values.keys),
            values is not None and not isinstance(values.kernel, ExtremesKernel),
            range_,
        )
        return Part(self._sharing.inputs, work, f"records of {quoted(scan.checkpoint.path)}", range_.nbytes)


def _ranges(at: int, source: Source[Tally[Any]], most: int) -> Iterator[_Range]:
    nbytes = source.payload.nbytes
    step = max(most // READ_BYTES, 1)
    if nbytes <= most or not is_seekable(source.payload):
        yield _Range(at, at + 1, nbytes=nbytes)
        return
    count = -(-nbytes // READ_BYTES)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        yield _Range(at, at + 1, begin, end, min(end * READ_BYTES, nbytes) - begin * READ_BYTES)


def _by_kind(group: Sequence[_Range]) -> Iterator[list[_Range]]:
    """Yield neighbours that are whole sources together, and each range of reads alone."""
    whole: list[_Range] = []
    for one in group:
        if one.end is None:
            whole.append(one)
            continue
        if whole:
            yield whole
            whole = []
        yield [one]
    if whole:
        yield whole


def _joined(group: Sequence[_Range]) -> _Range:
    if len(group) == 1:
        return group[0]
    return _Range(group[0].first, group[-1].stop, nbytes=sum(one.nbytes for one in group))


def _of_range(
    range_: _Range,
    sources: Sequence[Source[Tally[Any]]],
    read: Callable[[Iterable[Source[Tally[Any]]]], Iterator[Read[Tally[Any]]]],
) -> Iterator[Read[Tally[Any]]]:
    return islice(read(sources[range_.first : range_.stop]), range_.begin, range_.end)


def _read(part: Part[_Reading]) -> list[tuple[Any, ...]]:
    """Return what was found in each read of a part."""
    work = part.work
    with opened_again(part.inputs[0]) as checkpoint, Workers() as workers, pause_gc():
        scan = Scan(checkpoint, work.chosen, workers)
        if work.reads_values:
            scan.values = ValueReader(checkpoint, _keys(checkpoint, work), workers, _kernel(work))
        _, others = scan.divided()
        sources = list(islice(scan.sources(others), work.range.stop))
        found = [result[1:] for result in workers.each(scan.read_one, _of_range(work.range, sources, reads))]
        checkpoint.check_unchanged()
        return found


def _keys(checkpoint: Checkpoint, work: _Reading) -> dict[str, None]:
    return dict.fromkeys(checkpoint if work.keys is None else work.keys)


def _kernel(work: _Reading) -> ValuesKernel[Any]:
    if not work.has_moments:
        return ExtremesKernel()
    from ckptkit.statistics.kernel import StatsKernel

    return StatsKernel()
