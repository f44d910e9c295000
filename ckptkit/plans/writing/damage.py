"""Damaged inputs: the bytes of tensors are compared with the checksums that zip archives record."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping

from ckptkit.core.checkpoint import Checkpoint, Record
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import FormatError
from ckptkit.plans.plan import Step
from ckptkit.values.workers import Workers

__all__ = ["refuse_damage"]


def refuse_damage(steps: Iterable[Step], sources: Mapping[str, Checkpoint]) -> None:
    """Raise ``FormatError`` where bytes that the steps read do not match the CRC-32 that the input records of them.

    All stored records that hold such tensors are read, by all threads. An input without checksums is not read.
    """
    used: dict[str, set[str]] = {}
    for step in steps:
        for source in step.sources:
            used.setdefault(source.role, set()).add(source.key)
    with Workers() as workers:
        for role, keys in used.items():
            records = _with_checksums(sources[role], keys)
            damaged = [record for record, crc in workers.each(_checksum, records) if crc != record.crc]
            if damaged:
                raise _damage_error(damaged, keys)


def _with_checksums(checkpoint: Checkpoint, keys: set[str]) -> Iterator[Record]:
    for record in checkpoint.records() if checkpoint.files else ():
        if record.crc is not None and not keys.isdisjoint(record.keys):
            yield record


def _checksum(record: Record) -> tuple[Record, int]:
    crc = 0
    for chunk in record.payload.chunks():
        crc = zlib.crc32(chunk, crc)
    return record, crc


def _damage_error(damaged: list[Record], keys: set[str]) -> FormatError:
    first, others = damaged[0], len(damaged) - 1
    more = f", and {plural(others, 'more record')} are damaged too" if others > 1 else ""
    more = ", and another record is damaged too" if others == 1 else more
    return FormatError(
        f"{quoted(first.name)} does not match its checksum, so {listed([key for key in first.keys if key in keys], 3)} "
        f"would be damaged in the output{more}",
        hint="copy or download it again; without --verify, the bytes are copied as they are",
        path=first.path,
    )
