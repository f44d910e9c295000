"""Read all stored bytes once: compare checksums, and have a ``ValueReader`` judge the values."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ckptkit.checks import codes
from ckptkit.core.checkpoint import Checkpoint, Record
from ckptkit.core.crc32 import joined_crc32
from ckptkit.core.files.places import name_of
from ckptkit.core.findings import Code, Finding
from ckptkit.core.progress import Progress
from ckptkit.core.text import human_bytes, listed, plural, printable, quoted, shell_word
from ckptkit.errors import ChangedError, CkptkitError
from ckptkit.formats.codes import NO_CHECKSUM
from ckptkit.values.kernels import Tally
from ckptkit.values.reading import Read, Source, read_bytes, reads
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    from ckptkit.checks.reading.value_reader import ShortTensor, ValueReader

__all__ = ["VALUES_UNCHECKED", "ReadResult", "Scan", "loading_findings", "loading_summary", "unreadable_finding"]

VALUES_UNCHECKED = "no values were checked (NaN, Inf, zeros, equal tensors, indices out of range)"
_COPY_AGAIN = "copy or download it again"
_MOST_DEVICES = 8  # named in a finding
# What reads a file that looks like one of torch.save, and that torch.load(weights_only=True) never takes.
_OTHER_LOADERS = {"torchscript": "torch.jit.load", "torch-export": "torch.export.load", "pickle": "pickle.load"}


def unreadable_finding(error: CkptkitError, path: str) -> Finding:
    """Return the finding for a file that cannot be opened or read; ``path`` is the path of the checkpoint."""
    other_path = f"{printable(error.path)}: " if error.path and error.path != path else ""
    return _code_of(error).finding("", f"{other_path}{error.reason}", error.hint or "")


def _code_of(error: CkptkitError) -> Code:
    return codes.CHANGED if isinstance(error, ChangedError) else codes.UNREADABLE


def loading_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Yield a finding if torch.load refuses a file by default, and one if it needs ``map_location``."""
    loading = checkpoint.torch_loading
    if loading is None:
        return
    if loading.refused:
        message = f"torch.load(weights_only=True), which is the default, refuses the file: {'; '.join(loading.refused)}"
        way = "torch.serialization.safe_globals allows code that you trust; or " if loading.globals else ""
        path = shell_word(checkpoint.path)
        hint = f"{way}write the tensors alone: ckpt convert {path} -o OUT --format safetensors"
        yield codes.TORCH_LOAD.finding("", message, hint)
    if loading.devices:
        names = ", ".join(map(printable, loading.devices[:_MOST_DEVICES]))
        more = f" and {len(loading.devices) - _MOST_DEVICES} more" if len(loading.devices) > _MOST_DEVICES else ""
        message = f"its storages were on {names}{more}: torch.load needs map_location where such a device is missing"
        yield codes.MAP_LOCATION.finding("", message, f'torch.load({quoted(checkpoint.path)}, map_location="cpu")')


def loading_summary(checkpoint: Checkpoint) -> str:
    """Return the end of a sentence, which says that torch.load takes the file by default, or what else loads it."""
    loader = _OTHER_LOADERS.get(checkpoint.format)
    if loader is not None:
        return f"; the file is for {loader}, and torch.load(weights_only=True) refuses it"
    loading = checkpoint.torch_loading
    takes = loading is not None and not loading.refused
    return "; torch.load(weights_only=True) takes the file, judging by its pickle" if takes else ""


@dataclass(slots=True)
class _RecordInProgress:
    """A record that is being read: the checksum of its first ``done`` bytes, and whether the next cannot be read."""

    record: Record
    crc: int = 0
    done: int = 0
    failed: bool = False


def _has_crc(label: object) -> bool:
    return isinstance(label, _RecordInProgress) and label.record.crc is not None


ReadResult: TypeAlias = tuple[Read[Tally[Any]], list[int], list[Any], CkptkitError | OSError | None]


class SharedRecords(Protocol):
    """Something that reads records elsewhere, such as in the workers of an executor."""

    def pays(self, sources: Sequence[Source[Tally[Any]]]) -> bool:
        """Return whether these are worth it."""
        ...

    def results(self, scan: Scan, sources: Sequence[Source[Tally[Any]]]) -> Iterator[ReadResult]:
        """Yield what ``read_one`` returns for each read."""
        ...


@dataclass(slots=True)
class Scan:
    """One pass over the stored bytes of a checkpoint.

    With ``chosen_keys``, only records that hold one of these keys are read. ``shared`` reads the records elsewhere.
    """

    checkpoint: Checkpoint
    chosen_keys: Collection[str] | None
    workers: Workers
    values: ValueReader | None = None
    records: int = 0
    nbytes: int = 0
    compared: int = 0
    unchecked: int = 0
    unchecked_bytes: int = 0
    left_out: int = 0
    stopped: bool = False
    shared: SharedRecords | None = None
    _is_shared: bool = False  # whether the bytes of reads are reported where they are read

    def read(self, report: Progress) -> Iterator[Finding]:
        """Yield a finding for each damaged record; stop if a file changes while it is read."""
        try:
            for read, checksums, parts, error in self._results(report):
                for (label, start, stop), checksum in zip(read.labels, checksums, strict=True):
                    if not isinstance(label, _RecordInProgress) or label.failed:
                        continue
                    finding = self._add(label, stop - start, checksum, error)
                    if error is None and not self._is_shared:
                        report(stop - start)
                    if finding is not None:
                        yield finding
                    if self.stopped:
                        return
                if self.values is not None and error is None:
                    self.values.take(read, parts)
            self.checkpoint.check_unchanged()
        except (CkptkitError, OSError) as error:
            self.stopped = True
            yield unreadable_finding(_as_ckptkit_error(error), self.checkpoint.path)

    def _chosen(self) -> Iterator[Record]:
        for record in self.checkpoint.records():
            if self.chosen_keys is not None and not any(key in self.chosen_keys for key in record.keys):
                self.left_out += 1
            else:
                yield record

    def _results(self, report: Progress) -> Iterator[ReadResult]:
        """Yield each read and what was found in it: its checksums, its values, and why it cannot be read."""
        short, others = self.divided()
        unread = self._judge_short(short, report)
        if self.shared is None:
            yield from self.workers.each(self.read_one, reads(self.sources([*others, *unread])))
            return
        sources = list(self.sources(others))
        self._is_shared = self.shared.pays(sources)
        if self._is_shared:
            yield from self.shared.results(self, sources)
            self._is_shared = False
            sources = []
        yield from self.workers.each(self.read_one, reads(chain(sources, self.sources(unread))))

    def divided(self) -> tuple[list[ShortTensor], list[Record]]:
        """Return the chosen records: short tensors, which are judged together, and all others."""
        if self.values is None:
            return [], list(self._chosen())
        short: list[ShortTensor] = []
        others: list[Record] = []
        for record in self._chosen():
            tensor = self.values.short_tensor(record)
            if tensor is None:
                others.append(record)
            else:
                short.append(tensor)
        return short, others

    def _judge_short(self, short: list[ShortTensor], report: Progress) -> list[Record]:
        """Read short tensors together, which needs no object for each, and return the records that cannot be read.

        Reading such a record again gives its finding.
        """
        if self.values is None:
            return []
        done: set[int] = set()
        with contextlib.suppress(CkptkitError, OSError):
            for places, nbytes in self.values.judge(short):
                done.update(places)
                self.nbytes += nbytes
                self.unchecked_bytes += nbytes
                report(nbytes)
        self.records += len(done)
        self.unchecked += len(done)
        return [tensor.record for at, tensor in enumerate(short) if at not in done]

    def sources(self, records: Iterable[Record]) -> Iterator[Source[Tally[Any]]]:
        """Yield what is read of these records, and which numbers are in it."""
        for record in records:
            spans = self.values.spans_of(record) if self.values is not None else ()
            yield Source(record.payload, spans, _RecordInProgress(record))

    def read_one(self, read: Read[Tally[Any]]) -> ReadResult:
        """Return a read, the checksum of each of its records, and what its values are; a thread calls this."""
        try:
            data = read_bytes(read, self.workers)
        except (CkptkitError, OSError) as error:
            return read, [0] * len(read.labels), [], error
        checksums = [zlib.crc32(data[start:stop]) if _has_crc(label) else 0 for label, start, stop in read.labels]
        return read, checksums, self.values.parts_of(read, data) if self.values is not None else [], None

    def _add(
        self, progress: _RecordInProgress, nbytes: int, checksum: int, error: CkptkitError | OSError | None
    ) -> Finding | None:
        """Add the next bytes of a record; return a finding if they cannot be read, or show damage at its end."""
        record = progress.record
        if error is not None:
            progress.failed = True
            problem = _as_ckptkit_error(error)
            code = _code_of(problem)
            self.stopped = code is codes.CHANGED
            return self._record_finding(code, record, f"cannot be read: {problem.reason}", problem.hint or "")
        progress.crc = joined_crc32(progress.crc, checksum, nbytes)
        progress.done += nbytes
        self.nbytes += nbytes
        if progress.done < record.payload.nbytes:
            return None
        self.records += bool(progress.done)
        if record.crc is None:
            self.unchecked += bool(progress.done)
            self.unchecked_bytes += progress.done
            return None
        self.compared += bool(progress.done)
        if progress.crc == record.crc:
            return None
        message = f"does not match its checksum: CRC-32 {record.crc:08x} recorded, {progress.crc:08x} read"
        return self._record_finding(codes.CHECKSUM, record, message, _COPY_AGAIN)

    def _record_finding(self, code: Code, record: Record, message: str, hint: str) -> Finding:
        file = "" if record.path == self.checkpoint.path else f" of {quoted(name_of(record.path))}"
        holds = f"; it holds {listed(record.keys)}" if record.keys else ""
        key = record.keys[0] if record.keys else ""
        return code.finding(key, f"{quoted(record.name)}{file} {message}{holds}", hint)

    def no_checksum_finding(self) -> Finding:
        """Return the note that damage to records without a checksum is not detected."""
        count = f"{self.unchecked:,} of {plural(self.records, 'record')} ({human_bytes(self.unchecked_bytes)})"
        message = f"{self.checkpoint.format}: no checksum is recorded for {count}: damage is not detected there"
        return NO_CHECKSUM.finding("", message)

    def in_short(self) -> str:
        """Return what was read, compared and checked, in a few words."""
        values = "no values checked" if self.values is None else self.values.summary()
        if not self.checkpoint.files:
            return f"held in memory, {values}"
        checksums = f"{self.compared:,} of {plural(self.records, 'checksum')} compared"
        return f"{human_bytes(self.nbytes)} read, {checksums if self.compared else 'no checksum recorded'}, {values}"

    def summary(self) -> str:
        """Return a sentence about the bytes that were read, and about everything that was not read."""
        values = VALUES_UNCHECKED if self.values is None else self.values.summary()
        if not self.checkpoint.files:
            return f"held in memory, not in a file: no byte of a file was read, {values}"
        read = f"{human_bytes(self.nbytes)} in {plural(self.records, 'record')} read, {self.compared:,} compared"
        parts = [f"{read} with a checksum; {values}; code was not analysed{loading_summary(self.checkpoint)}"]
        inside = [entry.path for entry in self.checkpoint.entries if not entry.is_file]
        if inside:
            parts.append(f"entries that are not tensors were not interpreted ({listed(inside)})")
        other_files = [entry.path for entry in self.checkpoint.entries if entry.is_file]
        if other_files:
            parts.append(f"other files were not read ({listed(other_files)})")
        if self.left_out:
            parts.append(f"{plural(self.left_out, 'record')} without a chosen tensor not read")
        if self.stopped:
            parts.append("the rest was not read")
        return "; ".join(parts)


def _as_ckptkit_error(error: CkptkitError | OSError) -> CkptkitError:
    return error if isinstance(error, CkptkitError) else CkptkitError((error.strerror or str(error)).lower())
