"""Whether a checkpoint is what it should be: its files whole, its names complete, and what a model expects.

What was not looked at is a finding of its own: silence would read as health.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ckptkit.checks.adapters import lora_pairs
from ckptkit.checks.reading import UNJUDGED, Scan, unreadable
from ckptkit.checks.structure import dtype_mix, index_holes, lacking, not_dense, numbered
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import Finding, ReaderWarning, Report
from ckptkit.core.progress import Progress
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.formats import codes
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import as_rules

if TYPE_CHECKING:
    from ckptkit.comparison import StateDictDiff

__all__ = ["run_checks", "unreadable"]

_MOST_OF_A_CODE = 32
_HINTS = {
    codes.CODE_REFERENCE: "ckpt show lists them all; a loader that unpickles may run them",
    codes.CODE_SUSPICIOUS: "do not load it with pickle, nor with torch.load(weights_only=False)",
    codes.SKIPPED_DATA: "the tensors read as zeros: save it again without skip_data",
    codes.STALE_SHARD: "remove it: who reads the directory without its index takes it for a part",
    codes.SHARD_COUNT: "copy the whole directory again",
}
_PART = re.compile(r".+-(\d{5})-of-(\d{5})\.\w+")
_SCALED = frozenset({codes.ADAPTER_BASE.name, codes.ADAPTER_CONFIG.name})


def run_checks(
    checkpoint: StateDictLike,
    rules: Rules | Iterable[str] | Mapping[str, Any] | None = None,
    *,
    like: StateDictLike | None = None,
    fast: bool = False,
    values: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Return what is wrong or odd about a checkpoint, and last, what was not looked at.

    Reads every stored byte once, in bounded memory: compares it with its checksum where its container has recorded
    one, and judges the numbers of every tensor; without ``values`` no number is judged. ``fast`` reads headers only.
    ``like`` is what a model expects, as in ``diff``; one of ``py:`` is built for real where numbers are judged, and
    what looks like a fresh initialisation beside it is named. ``rules`` that keep and drop keys leave out what holds
    none of the tensors kept; they rename for the comparison with ``like`` alone. ``progress`` is told the number of
    bytes after each piece.

    Codes of errors: ``checksum``, ``unreadable``, ``changed``, ``code-suspicious``, ``lora-half``, ``lora-rank``; of
    numbers ``nan``, ``inf``, ``position-ids``, ``index-range``, ``negative-count``, ``negative-variance``; with
    ``like`` ``missing``, ``shape-mismatched``, ``uncopyable``, ``no-tensor``.
    Of warnings: ``code-reference``, ``skipped-data``, ``unused-record``, ``same-name``, ``repeated-key``,
    ``beside-unread``, ``adapter-config``, ``adapter-rank``, ``empty-weights``, ``not-in-parts``, ``index-hole``,
    ``sibling-lacks``, ``stale-shard``, ``shard-count``, ``total-size``, ``lora-alpha``, ``reader-warning``; of
    numbers ``all-zero``, ``constant``, ``lost-tie``, ``duplicate``, ``index-dtype``; with ``like`` ``unexpected``,
    ``dtype-mismatched``, ``extra-state``, ``at-init``.
    Of notes: ``no-checksum``, ``not-dense``, ``dtype-mix``, ``one-shard``, ``compressed``, ``constants``,
    ``uncounted``, ``adapter-base``, ``link-outside``, ``master-weights``, ``average-beside``, ``subnormal``,
    ``missing-tied``, ``filled``, ``as-expected``, and ``not-scanned``, which is always there. ``lora-alpha``,
    ``not-in-parts``, ``inf``, ``all-zero``, ``constant``, ``lost-tie``, ``duplicate`` and ``at-init`` are notes where
    that is usual.
    Raises ``RuleError`` where a rule goes wrong; what is wrong with a file is a finding.
    """
    opened = as_checkpoint(checkpoint, "checkpoint")
    key_map = apply_rules(as_rules(rules), opened)
    chosen = key_map.renamed
    findings = list(_headers(opened, chosen))
    compared = None
    if like is not None:
        from ckptkit.checks.expected import differences
        from ckptkit.comparison import diff_checkpoints

        compared = diff_checkpoints(as_checkpoint(like, "expected"), opened, key_map)
        findings += differences(compared)
    if fast:
        looked = f"headers only: no stored byte of a tensor was read, no checksum compared, {UNJUDGED}"
        return _report([*findings, _not_scanned(looked)])
    chosen_alone = None if len(chosen) == len(opened) else chosen.keys()
    scan = Scan(opened, chosen_alone)
    with contextlib.ExitStack() as stack:
        if values and _has_torch():
            from concurrent.futures import ThreadPoolExecutor

            from ckptkit.checks.reading import Judge
            from ckptkit.statistics.threads import Workspace

            scan.judge = Judge(opened, chosen.keys(), stack.enter_context(Workspace()))
            scan.beside = stack.enter_context(ThreadPoolExecutor(1))
        findings += scan.read(progress or (lambda _: None))
        if scan.unchecked and all(finding.code != "no-checksum" for finding in findings):
            findings.append(scan.without_checksum())
        if scan.judge is not None:
            findings += _judged(scan, compared)
    return _report([*findings, _not_scanned(scan.summary())])


def _judged(scan: Scan, compared: StateDictDiff | None) -> Iterator[Finding]:
    """Yield what the numbers tell that were taken while the bytes were read, and those that lie in no record."""
    from ckptkit.checks.values import about_expected, about_numbers

    if scan.judge is None:
        return
    if not scan.stopped:
        scan.judge.read_the_rest()
    yield from about_numbers(scan.checkpoint, scan.judge.numbers)
    if compared is not None:
        yield from about_expected(compared, scan.judge)


def _has_torch() -> bool:
    try:
        import torch  # noqa: F401
    except (ImportError, OSError, MemoryError):  # bytes and checksums need none of it, nor that much memory
        return False
    return True


def _report(findings: Iterable[Finding]) -> Report:
    """Return the report, with the first of very many findings of one code and a count of the others."""
    told: list[Finding] = []
    for (code, severity), group in groupby(findings, key=lambda finding: (finding.code, finding.severity)):
        same = list(group)
        told += same[:_MOST_OF_A_CODE]
        if len(same) > _MOST_OF_A_CODE:
            said = f"{plural(len(same) - _MOST_OF_A_CODE, 'more finding')} of this kind"
            told.append(Finding(code, severity, same[_MOST_OF_A_CODE].key, said, "--keep 'PATTERN' asks about some"))
    return Report(tuple(told))


def _not_scanned(message: str) -> Finding:
    return Finding("not-scanned", "note", "", message)


def _headers(opened: Checkpoint, chosen: Iterable[str]) -> Iterator[Finding]:
    """Yield what is found without reading a tensor."""
    told = list(_told(opened))
    yield from told
    infos = {key: opened[key] for key in chosen}
    yield from _one_shard(opened)
    yield from not_dense(infos.values())
    yield from dtype_mix(infos.values())
    lists = numbered(infos)
    yield from index_holes(lists)
    yield from lacking(lists)
    yield from lora_pairs(infos, scaled=any(finding.code in _SCALED for finding in told))


def _told(checkpoint: Checkpoint) -> Iterator[Finding]:
    for warning in checkpoint.warnings:
        known = warning if isinstance(warning, ReaderWarning) else ReaderWarning(warning, codes.READER_WARNING)
        yield known.finding(_HINTS.get(known.code, ""))


def _one_shard(checkpoint: Checkpoint) -> Iterator[Finding]:
    name = os.path.basename(checkpoint.files[0]) if len(checkpoint.files) == 1 else ""
    match = _PART.fullmatch(name)
    if match is not None and int(match[2]) > 1:
        said = f"{quoted(name)} is one of {int(match[2]):,} shards by its name: the others were not looked at"
        yield Finding("one-shard", "note", "", said, "give the path of the index, or of the directory")
