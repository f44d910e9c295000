"""The statistics of many tensors of a checkpoint, read by the threads of this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptkit.core.checkpoint import Checkpoint, Payload
from ckptkit.core.files.payloads import Extent, announce, place_of
from ckptkit.core.progress import Progress
from ckptkit.statistics.columns import Columns, StatsTable
from ckptkit.statistics.kernel import StatsKernel, StatsPart
from ckptkit.statistics.value_stats import ValueStats
from ckptkit.values.arrays import real_code
from ckptkit.values.kernels import Tally, computed, computed_together, is_short
from ckptkit.values.reading import Source, Span
from ckptkit.values.workers import Workers

__all__ = ["measure_values"]


def measure_values(checkpoint: Checkpoint, keys: Iterable[str], workers: Workers, progress: Progress) -> StatsTable:
    """Return the statistics of tensors; they do not depend on how the bytes are read, nor on the number of threads."""
    kernel = StatsKernel()
    keys = list(keys)
    short: list[tuple[str, Extent, str]] = []
    others: list[tuple[str, Payload]] = []
    for key in keys:
        payload, code = checkpoint.payload(key), real_code(checkpoint[key].dtype)
        if isinstance(payload, Extent) and is_short(payload.nbytes, code):
            short.append((key, payload, code))
        else:
            others.append((key, payload))
    names: list[str] = []
    columns: list[Columns] = []
    if short:
        short_keys, extents, codes = zip(*short, strict=True)
        for places, found, nbytes in computed_together(extents, codes, kernel, workers):
            names += [short_keys[at] for at in places]
            columns.append(found)
            progress(nbytes)
    numbers: dict[str, ValueStats] = {}

    def sources() -> Iterator[Source[Tally[StatsPart]]]:
        others.sort(key=lambda item: place_of(item[1]))
        announce(payload for _, payload in others)
        for key, payload in others:
            tally: Tally[StatsPart] = Tally(checkpoint[key])
            if tally.bytes_left:
                yield Source(payload, (Span(tally, 0, tally.bytes_left, tally.width),))
            else:
                numbers[key] = kernel.together([], tally.code)

    for tally, result, nbytes in computed(sources(), kernel, workers):
        if result is not None:
            numbers[tally.keys[0]] = result
        progress(nbytes)
    table = StatsTable([*names, *numbers], Columns.joined([*columns, Columns.of(list(numbers.values()))]))
    return table if table.names == keys else table.take(table.rows_of(keys))
