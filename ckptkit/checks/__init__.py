"""``run_checks``: check the files, names, shapes and values of a checkpoint.

The report also lists everything that was not checked, so that nobody takes a short report for proof.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from ckptkit.checks import codes
from ckptkit.checks.adapters import check_lora
from ckptkit.checks.quantized_weights import check_broken_parts, check_quantized
from ckptkit.checks.reading import VALUES_UNCHECKED, Scan, loading_findings, loading_summary
from ckptkit.checks.report import CheckReport
from ckptkit.checks.structure import check_structure
from ckptkit.core.arguments import require_flags, require_progress, takes_rules
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import Finding, ReaderWarning
from ckptkit.core.findings.ignoring import IgnoreEntry, IgnoreLike, ignore_findings, parse_ignore
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.progress import Progress
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import plural
from ckptkit.formats import codes as reader_codes
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.quantized import Quantized, quantized_weights
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules, RulesLike
from ckptkit.tasks.executor_type import Executor
from ckptkit.tasks.sharing import Sharing, require_shareable, sharing_of
from ckptkit.values.kernels import ExtremesKernel
from ckptkit.values.workers import Workers

__all__ = ["run_checks"]

_MAX_PER_CODE = 32
_ONE_OF_SEVERAL = frozenset({reader_codes.ONE_SHARD.name, reader_codes.PART_OF_SEVERAL.name})
# With these warnings the reader has already said where the scale of the adapter is, or that it is unknown.
_NOT_FINITE = {codes.NAN.name, codes.INF.name}  # of a broken part, which has a finding of its own
_SCALE_REPORTED = frozenset({reader_codes.ADAPTER_BASE.name, reader_codes.ADAPTER_CONFIG.name})


@takes_rules
def run_checks(
    checkpoint: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    like: CheckpointLike | None = None,
    fast: bool = False,
    values: bool = True,
    progress: Progress | None = None,
    ignore: IgnoreLike = (),
    executor: Executor | None = None,
) -> CheckReport:
    """Return a report of damaged and unusual parts of a checkpoint; the last finding lists everything unchecked.

    Every stored byte is read once, in bounded memory. Records are compared with their checksums if the file has
    checksums, and the values of all tensors are checked. ``docs/codes.md`` lists the codes of the findings.

    Args:
        checkpoint: A path, a Checkpoint, a Module, or a mapping of tensors or of ``TensorInfo``. What is opened here is
            closed at the end.
        rules: Rules that keep and drop keys, or the path of a rule file: records without a kept tensor are not read.
            Renames count only for the comparison with ``like``.
        like: The model to compare with, as ``expected`` in ``diff``. A ``py:`` model is built with its values, from a
            fixed seed, and tensors that look newly initialised are reported. The values of a Module may be trained, so
            with a Module only torch's own initialisation is recognised.
        fast: Read headers only.
        values: Whether values are checked.
        progress: Called with the number of bytes after each chunk.
        ignore: Expected findings, as ``CODE`` or ``CODE:KEY-PATTERN``. They are in ``ignored`` of the report, not in
            ``findings``. An entry that matches no finding is a note.
        executor: Shares the reading of ``checkpoint`` among its workers, as in ``stats``. Tensors of a few numbers, and
            what several tensors have in common, are still read by this process.

    Raises:
        ArgumentError: ``checkpoint`` is not a path, but there is an executor.
        RuleError: A rule cannot be applied, or an entry of ``ignore`` names a code that no check has.
        ModelError: ``checkpoint`` or ``like`` is not a checkpoint.
        PathError: A path cannot be opened.
        FormatError: The file at a path is not a checkpoint.

    A tensor that cannot be read is a finding, not an exception.

    Example:
        >>> run_checks("fixtures/lenet_10class.pth", fast=True).ok
        True
    """
    require_flags(fast=fast, values=values)
    require_progress(progress)
    require_shareable(executor, {} if fast else {"checkpoint": checkpoint})
    entries = parse_ignore(ignore)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pause_gc())
        found = stack.enter_context(opened(checkpoint, "checkpoint", warn=False))
        expected = None if like is None else stack.enter_context(opened(like, "expected"))
        sharing = None if fast else sharing_of(executor, [(checkpoint, found)])
        findings, proved = _check(
            found, rules_for(rules, found, expected), expected,
            fast=fast, values=values, progress=progress, sharing=sharing,
        )  # fmt: skip
        return replace(_report(findings, entries, found), proved=proved)


def _check(
    checkpoint: Checkpoint,
    rules: Rules,
    expected: Checkpoint | None,
    *,
    fast: bool,
    values: bool,
    progress: Progress | None,
    sharing: Sharing | None,
) -> tuple[list[Finding], str]:
    """Return the findings, and what was read, for a report without findings."""
    key_map = apply_rules(rules, checkpoint, expected)
    read = key_map.sources()
    chosen = dict.fromkeys(key for key in checkpoint if key in read)
    quantized = quantized_weights(checkpoint)
    findings = [*_check_headers(checkpoint, chosen, quantized), *loading_findings(checkpoint)]
    result = None
    if expected is not None:
        from ckptkit.checks.expected import check_differences
        from ckptkit.comparison import diff_checkpoints

        result = diff_checkpoints(expected, checkpoint, key_map)
        given = reader_codes.ADAPTER_BASE.name  # the base is given, so the user knows where its weights are
        findings = [finding for finding in findings if finding.code != given]
        findings += check_differences(result)
    findings += check_broken_parts(checkpoint, quantized, chosen, reads=values and not fast)
    if fast:
        message = f"headers only: no byte of a tensor was read, no checksum compared, {VALUES_UNCHECKED}"
        message += loading_summary(checkpoint)
        return [*findings, codes.NOT_SCANNED.finding("", message)], "headers only, no tensor was read"
    with Workers() as workers:
        scan = Scan(checkpoint, None if len(chosen) == len(checkpoint) else chosen, workers)
        if values:
            from ckptkit.checks.reading.value_reader import ValueReader, ValuesKernel

            # Only tensors of a new model are known by their moments.
            kernel: ValuesKernel[Any] = ExtremesKernel()
            if expected is not None and expected.model is not None:
                from ckptkit.statistics.kernel import StatsKernel

                kernel = StatsKernel()
            scan.values = ValueReader(checkpoint, chosen, workers, kernel)
        if sharing is not None:
            from ckptkit.checks.reading.shared import SharedReads

            scan.shared = SharedReads(sharing, progress or (lambda _: None))
        findings += scan.read(progress or (lambda _: None))
        if scan.unchecked and all(finding.code != reader_codes.NO_CHECKSUM.name for finding in findings):
            findings.append(scan.no_checksum_finding())
        if scan.values is not None:
            from ckptkit.checks.values import check_values

            if not scan.stopped:
                scan.values.read_remaining()
            broken = {finding.key for finding in findings if finding.code == codes.BROKEN_PART.name}
            found = check_values(checkpoint, scan.values.stats, quantized, workers)
            findings += (one for one in found if not (one.key in broken and one.code in _NOT_FINITE))
            if expected is not None and result is not None:
                from ckptkit.checks.expected import check_expected_values
                from ckptkit.core.random_state import NEW_MODEL_SEED, restored_random_state

                with restored_random_state(seed=NEW_MODEL_SEED):  # it has the same values in every run
                    findings += check_expected_values(result, expected, scan.values, quantized)
    return [*findings, codes.NOT_SCANNED.finding("", scan.summary())], scan.in_short()


def _report(findings: Sequence[Finding], ignore: Sequence[IgnoreEntry], checkpoint: Checkpoint) -> CheckReport:
    """Return the report, with the first 32 findings of each code and a count of further findings.

    The findings that ``ignore`` matches are left out before.
    """
    report = ignore_findings(CheckReport(tuple(findings), checkpoint=CheckpointSummary.of(checkpoint)), ignore)
    shown: list[Finding] = []
    last_of_all = sorted(report.findings, key=lambda finding: finding.code == codes.NOT_SCANNED.name)
    for _, group in groupby(last_of_all, key=lambda finding: (finding.code, finding.severity)):
        same = list(group)
        shown += same[:_MAX_PER_CODE]
        if len(same) > _MAX_PER_CODE:
            message = f"{plural(len(same) - _MAX_PER_CODE, 'more finding')} of this kind"
            shown.append(replace(same[_MAX_PER_CODE], message=message, hint="--keep 'PATTERN' checks only some keys"))
    return replace(report, findings=tuple(shown))


def _check_headers(opened: Checkpoint, chosen: Container[str], quantized: Quantized) -> Iterator[Finding]:
    """Yield the findings that need no byte of a tensor."""
    warnings = list(_reader_warnings(opened))
    yield from warnings
    infos = {key: info for key, info in opened.items() if key in chosen}
    is_one_shard = any(finding.code in _ONE_OF_SEVERAL for finding in warnings)
    yield from check_quantized(quantized, infos, is_one_shard=is_one_shard)
    yield from check_structure(infos, quantized, CheckpointSummary.of(opened).argument)
    parts = quantized.by_key
    others = {key: info for key, info in infos.items() if key not in parts} if parts else infos  # SVDQuant: lora_down
    yield from check_lora(others, scale_reported=any(finding.code in _SCALE_REPORTED for finding in warnings))


def _reader_warnings(checkpoint: Checkpoint) -> Iterator[Finding]:
    for warning in checkpoint.warnings:
        known = warning if isinstance(warning, ReaderWarning) else ReaderWarning(warning, reader_codes.READER_WARNING)
        yield known.finding()
