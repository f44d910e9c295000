"""Whether a checkpoint's files are whole: every stored byte read once, and compared with its checksum where it has one.

What was not looked at is a finding of its own: silence would read as health.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptkit.errors import ChangedError, CkptkitError
from ckptkit.findings import Finding, Remark, Report
from ckptkit.rules import Rules, apply_rules, as_rules
from ckptkit.tensors import Checkpoint, Record, TensorInfo
from ckptkit.text import human_bytes, plural, printable, quoted
from ckptkit.torch_bridge import StateDictLike, as_checkpoint

__all__ = ["run_checks", "unreadable"]

_MOST_NAMED = 8
_AGAIN = "copy or download it again"
_HINTS = {
    "code-reference": "ckpt show lists them all; a loader that unpickles may run them",
    "code-suspicious": "do not load it with pickle, nor with torch.load(weights_only=False)",
    "skipped-data": "the tensors read as zeros: save it again without skip_data",
}
Progress = Callable[[int], None]


def run_checks(
    checkpoint: StateDictLike,
    rules: Rules | Iterable[str] | Mapping[str, Any] | None = None,
    *,
    fast: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Return what is wrong or odd about the files of a checkpoint, and last, what was not looked at.

    Reads every stored byte once, in bounded memory, and compares it with its checksum where its container has
    recorded one; no value is judged. ``fast`` reads headers only. ``rules`` that keep and drop keys leave out what
    holds none of the tensors kept. ``progress`` is told the number of bytes after each piece.

    Codes of errors: ``checksum``, ``unreadable``, ``changed``, ``code-suspicious``; of warnings: ``code-reference``,
    ``skipped-data``, ``unused-record``, ``same-name``, ``repeated-key``, ``beside-unread``, ``adapter-config``,
    ``adapter-rank``, ``empty-weights``, ``not-in-parts``, ``reader-warning``; of notes:
    ``no-checksum``, ``not-dense``, ``compressed``, ``constants``, ``uncounted``, ``adapter-base``, ``link-outside``,
    ``master-weights``, ``not-in-parts``, ``average-beside``, and ``not-scanned``, which is always there.
    Raises ``RuleError`` where a rule goes wrong; what is wrong with a file is a finding.
    """
    opened = as_checkpoint(checkpoint, "checkpoint")
    chosen = apply_rules(as_rules(rules), opened).renamed
    findings = [*_told(opened), *_not_dense([opened[key] for key in chosen])]
    if fast:
        return Report((*findings, _note("headers only: no stored byte of a tensor was read, no checksum compared")))
    scan = _Scan(opened, None if len(chosen) == len(opened) else chosen.keys())
    findings += scan.read(progress or (lambda _: None))
    if scan.unchecked and all(finding.code != "no-checksum" for finding in findings):
        findings.append(scan.without_checksum())
    return Report((*findings, _note(scan.summary())))


def unreadable(error: CkptkitError, path: str) -> Finding:
    """Return the finding that ``path`` could not be opened, or not be read further."""
    other = f"{printable(error.path)}: " if error.path and error.path != path else ""
    code = "changed" if isinstance(error, ChangedError) else "unreadable"
    return Finding(code, "error", "", f"{other}{error.reason}", error.hint or "")


def _note(message: str) -> Finding:
    return Finding("not-scanned", "note", "", message)


def _told(checkpoint: Checkpoint) -> Iterator[Finding]:
    for warning in checkpoint.warnings:
        remark = warning if isinstance(warning, Remark) else Remark(warning, "reader-warning")
        yield Finding(remark.code, remark.severity, "", str(remark), _HINTS.get(remark.code, ""))


def _not_dense(infos: Iterable[TensorInfo]) -> Iterator[Finding]:
    kinds: dict[str, list[str]] = {}
    for info in infos:
        if info.kind != "dense":
            kinds.setdefault(info.kind, []).append(info.key)
    for kind, keys in kinds.items():
        said = f"{plural(len(keys), f'{kind} tensor')} listed, and not read or written as numbers: {_named(keys)}"
        yield Finding("not-dense", "note", keys[0], said)


def _named(keys: Collection[str]) -> str:
    names = ", ".join(quoted(key) for _, key in zip(range(_MOST_NAMED), keys, strict=False))
    return names + (f" and {len(keys) - _MOST_NAMED:,} more" if len(keys) > _MOST_NAMED else "")


@dataclass(slots=True)
class _Scan:
    """One reading of everything stored, and how far it came; with ``chosen``, of what holds one of these keys."""

    checkpoint: Checkpoint
    chosen: Collection[str] | None
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
        try:
            for chunk in record.payload.chunks():
                if record.crc is not None:
                    crc = zlib.crc32(chunk, crc)
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

    def _about(self, record: Record, code: str, what: str, hint: str) -> Finding:
        file = "" if record.path == self.checkpoint.path else f" of {quoted(os.path.basename(record.path))}"
        holds = f"; it holds {_named(record.keys)}" if record.keys else ""
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
            return "held in memory, not in a file: nothing was read, and values were not judged"
        read = f"{human_bytes(self.nbytes)} in {plural(self.records, 'record')} read, {self.compared:,} compared"
        parts = [f"{read} with a checksum; values were not judged (NaN, Inf, zeros)", "code was not analysed"]
        within = [entry.path for entry in self.checkpoint.entries if not entry.apart]
        if within:
            parts.append(f"what is beside the tensors was not interpreted ({_named(within)})")
        apart = [entry.path for entry in self.checkpoint.entries if entry.apart]
        if apart:
            parts.append(f"other files were not read ({_named(apart)})")
        if self.left_out:
            parts.append(f"{plural(self.left_out, 'record')} without a chosen tensor not read")
        if self.stopped:
            parts.append("the rest was not read")
        return ", ".join(parts)


def _as_ours(error: CkptkitError | OSError) -> CkptkitError:
    return error if isinstance(error, CkptkitError) else CkptkitError((error.strerror or str(error)).lower())
