"""Every stored byte read once: for its checksum, where it has one, and for the numbers that it is a part of."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import Checkpoint, Record
from ckptkit.core.findings import Finding
from ckptkit.core.text import human_bytes, listed, plural, printable, quoted
from ckptkit.errors import ChangedError, CkptkitError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from ckptkit.checks.judging import Judge

__all__ = ["UNJUDGED", "Progress", "Scan", "unreadable"]

UNJUDGED = "no number was judged (NaN, Inf, zeros, equal tensors, indices out of range)"
_AGAIN = "copy or download it again"
_WORTH_A_THREAD = 1 << 18  # bytes
Progress = Callable[[int], None]


def unreadable(error: CkptkitError, path: str) -> Finding:
    """Return the finding that ``path`` could not be opened, or not be read further."""
    other = f"{printable(error.path)}: " if error.path and error.path != path else ""
    code = "changed" if isinstance(error, ChangedError) else "unreadable"
    return Finding(code, "error", "", f"{other}{error.reason}", error.hint or "")


@dataclass(slots=True)
class Scan:
    """One reading of everything stored, and how far it came; with ``chosen``, of what holds one of these keys."""

    checkpoint: Checkpoint
    chosen: Collection[str] | None
    judge: Judge | None = None
    beside: ThreadPoolExecutor | None = None  # where checksums are computed while the judge is at work
    records: int = 0
    nbytes: int = 0
    compared: int = 0
    unchecked: int = 0
    unchecked_bytes: int = 0
    left_out: int = 0
    stopped: bool = False

    def read(self, report: Progress) -> Iterator[Finding]:
        """Yield what is wrong with a record, record by record; a file that changes meanwhile ends it."""
        try:
            for record in self.checkpoint.records():
                if self.chosen is not None and not any(key in self.chosen for key in record.keys):
                    self.left_out += 1
                    continue
                finding = self._one(record, report)
                if finding is not None:
                    yield finding
                    if finding.code == "changed":
                        self.stopped = True
                        return
            self.checkpoint.check_unchanged()
        except (CkptkitError, OSError) as error:
            self.stopped = True
            yield unreadable(_as_ours(error), self.checkpoint.path)

    def _one(self, record: Record, report: Progress) -> Finding | None:
        crc = done = 0
        feed = self.judge.feed(record) if self.judge is not None else None
        try:
            for chunk in record.payload.chunks():
                checksum = self._checksum(chunk, crc) if record.crc is not None else None
                if feed is not None and self.judge is not None:
                    self.judge.add(feed, done, chunk)
                crc = checksum() if checksum is not None else 0
                done += len(chunk)
                report(len(chunk))
        except (CkptkitError, OSError) as error:
            problem = _as_ours(error)
            code = "changed" if isinstance(problem, ChangedError) else "unreadable"
            return self._about(record, code, f"cannot be read: {problem.reason}", problem.hint or "")
        finally:
            self.nbytes += done
        self.records += bool(done)
        if record.crc is None:
            self.unchecked += bool(done)
            self.unchecked_bytes += done
            return None
        self.compared += bool(done)
        if crc == record.crc:
            return None
        return self._about(
            record, "checksum", f"does not match its checksum: CRC-32 {record.crc:08x} recorded, {crc:08x} read", _AGAIN
        )

    def _checksum(self, chunk: bytes | bytearray | memoryview, crc: int) -> Callable[[], int]:
        """Return what gives the checksum, at the latest when it is called."""
        if self.beside is None or len(chunk) < _WORTH_A_THREAD:
            return partial(zlib.crc32, chunk, crc)
        return self.beside.submit(zlib.crc32, chunk, crc).result

    def _about(self, record: Record, code: str, what: str, hint: str) -> Finding:
        file = "" if record.path == self.checkpoint.path else f" of {quoted(os.path.basename(record.path))}"
        holds = f"; it holds {listed(record.keys)}" if record.keys else ""
        key = record.keys[0] if record.keys else ""
        return Finding(code, "error", key, f"{quoted(record.name)}{file} {what}{holds}", hint)

    def without_checksum(self) -> Finding:
        """Return the note that damage to some of the bytes, or all, cannot be seen."""
        count = f"{self.unchecked:,} of {plural(self.records, 'record')} ({human_bytes(self.unchecked_bytes)})"
        said = f"{self.checkpoint.format}: no checksum is recorded for {count}, and damage there goes unseen"
        return Finding("no-checksum", "note", "", said)

    def summary(self) -> str:
        """Return what was read, and what nobody looked at."""
        if not self.checkpoint.files:
            return f"held in memory, not in a file: no byte of a file was read, {self._judged()}"
        read = f"{human_bytes(self.nbytes)} in {plural(self.records, 'record')} read, {self.compared:,} compared"
        parts = [f"{read} with a checksum; {self._judged()}", "code was not analysed"]
        within = [entry.path for entry in self.checkpoint.entries if not entry.apart]
        if within:
            parts.append(f"what is beside the tensors was not interpreted ({listed(within)})")
        apart = [entry.path for entry in self.checkpoint.entries if entry.apart]
        if apart:
            parts.append(f"other files were not read ({listed(apart)})")
        if self.left_out:
            parts.append(f"{plural(self.left_out, 'record')} without a chosen tensor not read")
        if self.stopped:
            parts.append("the rest was not read")
        return ", ".join(parts)

    def _judged(self) -> str:
        return UNJUDGED if self.judge is None else self.judge.summary()


def _as_ours(error: CkptkitError | OSError) -> CkptkitError:
    return error if isinstance(error, CkptkitError) else CkptkitError((error.strerror or str(error)).lower())
