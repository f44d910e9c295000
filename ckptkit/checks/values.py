"""All that the numbers of a checkpoint tell, alone and beside those of what a model expects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptkit.checks.buffers import buffers
from ckptkit.checks.copies import copies, equal_groups, untied
from ckptkit.checks.expected import as_expected, like_a_fresh_model
from ckptkit.checks.numbers import constant, not_finite, subnormal
from ckptkit.checks.reading import Judge
from ckptkit.comparison import KeyPair, StateDictDiff
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files import same_bytes
from ckptkit.core.findings import Finding
from ckptkit.errors import CkptkitError
from ckptkit.formats import LIVE_PREFIX
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["about_expected", "about_numbers"]

_LARGEST_TABLE = 1 << 20  # bytes of a table of which every number is looked at


def about_numbers(checkpoint: Checkpoint, numbers: Mapping[str, ValueStats]) -> Iterator[Finding]:
    """Yield what is found in the numbers of the tensors of a checkpoint, by key."""

    def same(one: str, other: str) -> bool:
        return _same(checkpoint, one, checkpoint, other)

    def content(key: str) -> bytes:
        try:
            return checkpoint.read_bytes(key) if checkpoint[key].nbytes <= _LARGEST_TABLE else b""
        except (CkptkitError, OSError):
            return b""

    numbers = {key: numbers[key] for key in checkpoint if key in numbers}
    yield from not_finite(checkpoint, numbers)
    yield from constant(checkpoint, numbers)
    yield from subnormal(checkpoint, numbers)
    yield from buffers(checkpoint, numbers, content)
    yield from copies(checkpoint, equal_groups(checkpoint, numbers, same))
    yield from untied({key: checkpoint[key] for key in numbers}, checkpoint.metadata, same)


def about_expected(compared: StateDictDiff, judge: Judge) -> Iterator[Finding]:
    """Yield what is as EXPECTED has it; a ``py:`` model is built for real, once, for its fresh numbers."""
    expected = compared.expected
    if not isinstance(expected, Checkpoint):
        return
    found = judge.numbers
    pairs = [pair for pair in compared.matched if judge.checkpoint.get(pair.found.key) == pair.found]
    live = expected.path.startswith(LIVE_PREFIX)
    equal: set[str] = set()

    def same(pair: KeyPair) -> bool:
        if _same(judge.checkpoint, pair.found.key, expected, pair.expected.key):
            equal.add(pair.key)
        return pair.key in equal

    def worth_it(pair: KeyPair) -> bool:
        constant = pair.found.key in found and found[pair.found.key].constant is not None
        return pair.found.dtype == pair.expected.dtype and not (live and constant)

    yield from as_expected(filter(worth_it, pairs), same)
    if live:
        fresh = Judge(expected, [pair.expected.key for pair in pairs], judge.workspace)
        fresh.read_the_rest()
        yield from like_a_fresh_model((pair for pair in pairs if pair.key not in equal), found, fresh.numbers)


def _same(one: Checkpoint, key: str, other: Checkpoint, other_key: str) -> bool:
    try:
        return same_bytes(one.payload(key), other.payload(other_key))
    except (CkptkitError, OSError):
        return False  # what cannot be read was told where it was read first
