"""Statistics of tensors that workers of an executor measure: the same parts as in one process, put together here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.checkpoint.payload import part_of
from ckptkit.core.files.payloads import is_seekable
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.progress import Progress
from ckptkit.quantized.view import as_numbers
from ckptkit.statistics.columns import Columns, StatsTable
from ckptkit.statistics.kernel import StatsKernel, StatsPart
from ckptkit.statistics.measured import measure_values
from ckptkit.statistics.value_stats import ValueStats
from ckptkit.tasks.inputs import opened_again
from ckptkit.tasks.sharing import Part, Sharing, name_of_part
from ckptkit.values.kernels import Tally, parts_of
from ckptkit.values.reading import READ_BYTES, Source, Span, read_bytes, reads
from ckptkit.values.workers import Workers

__all__ = ["measure_shared"]


class _Measuring(NamedTuple):
    """What a worker measures: whole tensors, or the bytes from ``start`` to ``stop`` of one tensor."""

    dequantize: str | None
    keys: tuple[str, ...]
    start: int = 0
    stop: int = 0


class _Range(NamedTuple):
    key: str
    start: int
    stop: int
    is_whole: bool


def measure_shared(
    checkpoint: Checkpoint, keys: Sequence[str], dequantize: str | None, sharing: Sharing, progress: Progress
) -> StatsTable:
    """Return what ``measure_values`` returns; the workers read the bytes. Raises what ``Sharing.run`` raises."""
    total = sum(checkpoint[key].nbytes for key in keys)
    if not sharing.pays(total):
        with Workers() as workers:
            return measure_values(checkpoint, keys, workers, progress)
    # The reads of a tensor begin at multiples of READ_BYTES, so parts of it have the same reads.
    most = -(-sharing.bytes_of_part(total) // READ_BYTES) * READ_BYTES
    ranges = [one for key in keys for one in _ranges(checkpoint, key, most)]
    groups = sharing.parts_of(ranges, lambda one: one.stop - one.start)
    cut = [part for group in groups for part in _by_kind(group)]
    tables: list[StatsTable] = []
    pieces: dict[str, list[StatsPart]] = {}
    parts = [
        Part(
            sharing.inputs,
            _Measuring(dequantize, tuple(one.key for one in part))
            if part[0].is_whole
            else _Measuring(dequantize, (part[0].key,), part[0].start, part[0].stop),
            name_of_part([one.key for one in part]),
            sum(one.stop - one.start for one in part),
        )
        for part in cut
    ]
    for part, found in zip(parts, sharing.run(_measure, parts, progress), strict=True):
        if isinstance(found, StatsTable):
            tables.append(found)
        else:
            pieces.setdefault(part.work.keys[0], []).extend(found)
    kernel = StatsKernel()
    numbers: dict[str, ValueStats] = {
        key: kernel.together(found, Tally[Any](checkpoint[key]).code) for key, found in pieces.items()
    }
    names = [*(name for table in tables for name in table.names), *numbers]
    columns = Columns.joined([*(table.columns for table in tables), Columns.of(list(numbers.values()))])
    table = StatsTable(names, columns)
    return table if names == list(keys) else table.take(table.rows_of(keys))


def _ranges(checkpoint: Checkpoint, key: str, most: int) -> Iterator[_Range]:
    nbytes = checkpoint[key].nbytes
    if nbytes <= most or not is_seekable(checkpoint.payload(key)):
        yield _Range(key, 0, nbytes, is_whole=True)
        return
    for start in range(0, nbytes, most):
        yield _Range(key, start, min(start + most, nbytes), is_whole=False)


def _by_kind(group: Sequence[_Range]) -> Iterator[list[_Range]]:
    """Yield the whole tensors of a group together, and each other range alone."""
    whole = [one for one in group if one.is_whole]
    if whole:
        yield whole
    yield from ([one] for one in group if not one.is_whole)


def _measure(part: Part[_Measuring]) -> StatsTable | list[StatsPart]:
    work = part.work
    with opened_again(part.inputs[0]) as stored, Workers() as workers, pause_gc():
        found = as_numbers(stored, work.dequantize or False).checkpoint
        measured = (
            _parts(found, work, workers) if work.stop else measure_values(found, work.keys, workers, lambda _: None)
        )
        found.check_unchanged()
        return measured


def _parts(checkpoint: Checkpoint, work: _Measuring, workers: Workers) -> list[StatsPart]:
    kernel, key = StatsKernel(), work.keys[0]
    tally: Tally[StatsPart] = Tally(checkpoint[key])
    nbytes = work.stop - work.start
    source = Source(part_of(checkpoint.payload(key), work.start, nbytes), (Span(tally, 0, nbytes, tally.width),))

    def measure(read: Any) -> list[StatsPart]:
        return parts_of(read, read_bytes(read, workers), kernel, workers)

    return [part for found in workers.each(measure, reads([source])) for part in found]
