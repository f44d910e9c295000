"""Comparisons of a checkpoint with a model: keys, shapes and dtypes, and values that were never trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby

from ckptkit.checks import codes
from ckptkit.checks.at_init import Untrained, find_untrained
from ckptkit.checks.reading.value_reader import ValueReader
from ckptkit.checks.values import have_equal_bytes
from ckptkit.comparison import KeyPair, StateDictDiff
from ckptkit.comparison.hints import joined_hint
from ckptkit.comparison.quantized import QuantizedKey, quantized_messages
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.live_prefix import LIVE_PREFIX
from ckptkit.core.findings import Code, Finding
from ckptkit.core.patterns import pattern_for
from ckptkit.core.text import listed, plural, printable, shell_word
from ckptkit.core.ties import tied_keys
from ckptkit.quantized import Quantized
from ckptkit.statistics.kernel import StatsKernel
from ckptkit.statistics.value_stats import ValueStats
from ckptkit.values.extremes import Extremes

__all__ = ["check_as_expected", "check_at_init", "check_differences", "check_expected_values"]

_MOST_PATTERNS = 4  # in a hint


def check_differences(result: StateDictDiff) -> Iterator[Finding]:
    """Yield one finding for each kind of difference that ``load_state_dict`` would report.

    Errors are ``missing``, ``shape-mismatched``, ``quantized-mismatched``, ``uncopyable`` and ``no-tensor``. Warnings
    are ``unexpected``, ``dtype-mismatched`` and ``extra-state``. Notes are ``missing-tied`` (EXPECTED ties the missing
    key to a stored key) and ``filled`` (a counter that torch fills in). ``own-code`` says what the code of a live model
    adds: an error where it refuses the checkpoint, a warning where it reports further keys, a note where names decided.
    """
    expected, path = result.expected_checkpoint.argument, result.found_checkpoint.argument
    told = set(quantized_messages(result.quantized))  # a finding of its own says this
    others = [hint for hint in result.hints if hint.message not in told]
    hint = joined_hint(others) or f"ckpt diff {expected or 'EXPECTED'} {path or 'PATH'} lists all keys"
    matched = {pair.key for pair in result.matched}
    partners = {key: group for group in tied_keys(result.expected.values()) for key in group}
    missing = [info.key for info in result.missing if info.key not in result.filled | result.excused]
    tied = [key for key in missing if any(other in matched for other in partners.get(key, ()))]
    elsewhere = {*result.blocked, *tied}
    lost = [key for key in missing if key not in elsewhere]
    yield from _findings_of_keys(codes.MISSING, lost, "of EXPECTED missing in the checkpoint", hint)
    text = "missing in the checkpoint, but filled by load_state_dict(strict=False), which loads a tied key"
    yield from _findings_of_keys(codes.MISSING_TIED, tied, text)
    filled = [info.key for info in result.missing if info.key in result.filled]
    text = "missing, as in checkpoints from before torch 0.4.1; load_state_dict fills these keys"
    yield from _findings_of_keys(codes.FILLED, filled, text)
    unexpected = [info.key for info in result.unexpected if info.key not in result.unseen]
    text = "of the checkpoint missing in EXPECTED"
    yield from _findings_of_keys(codes.UNEXPECTED, unexpected, text, hint)
    yield from _findings_of_pairs(
        codes.SHAPE_MISMATCHED, result.shape_mismatched, "with another shape than in EXPECTED"
    )
    for remark, group in groupby(result.quantized, lambda weight: weight.remark):
        weights = list(group)
        names = [weight.key for weight in weights]
        text = f"{plural(len(weights), 'weight')} {remark}: {listed(names)}"
        yield codes.QUANTIZED_MISMATCHED.finding(names[0], text, _way_to_plain(weights[0], expected, path), keys=names)
    uncopyable = {pair.key for pair in result.uncopyable}
    yield from _findings_of_pairs(codes.UNCOPYABLE, result.uncopyable, "with a kind or dtype that torch cannot copy")
    cast = [pair for pair in result.dtype_mismatched if pair.key not in uncopyable]
    yield from _findings_of_pairs(
        codes.DTYPE_MISMATCHED, cast, "with another dtype than in EXPECTED: torch casts silently"
    )
    not_tensors = [*result.blocked, *result.foreign]
    yield from _findings_of_keys(
        codes.NO_TENSOR, not_tensors, "without a tensor, but load_state_dict takes only tensors"
    )
    yield from _findings_of_keys(codes.EXTRA_STATE, result.extra_state, "of extra state that only one side has")
    yield from _own_code_findings(result)


def _way_to_plain(key: QuantizedKey, expected: str, path: str) -> str:
    """Return how to make plain weights of the side that is quantised, as a hint."""
    weight = key.weight
    source = expected or "EXPECTED" if key.side == "expected" else path or "PATH"
    if not weight.family or source.startswith(LIVE_PREFIX):
        return weight.way_out
    return f"ckpt convert {source} -o OUT --dequantize makes plain weights; or {weight.way_out}"


def _own_code_findings(result: StateDictDiff) -> Iterator[Finding]:
    for refusal in result.refusals:
        yield codes.OWN_CODE.finding("", f"load_state_dict raises, even with strict=False: {printable(refusal)}")
    if result.reported:
        text = f"load_state_dict reports {plural(len(result.reported), 'further key')}: {listed(result.reported)}"
        yield codes.OWN_CODE.finding(result.reported[0], text, severity="warning", keys=result.reported)
    if result.undecided:
        message = f"names decided: the model's own code for loading was not tried, because {result.undecided}"
        yield codes.OWN_CODE.finding("", message, severity="note")


def _findings_of_keys(code: Code, keys: Iterable[str], text: str, hint: str = "") -> Iterator[Finding]:
    names = list(keys)
    if names:
        yield code.finding(names[0], f"{plural(len(names), 'key')} {text}: {listed(names)}", hint, keys=names)


def _findings_of_pairs(code: Code, pairs: Iterable[KeyPair], text: str) -> Iterator[Finding]:
    found = list(pairs)
    if found:
        first = f"{found[0].expected} expected, {found[0].found} found"
        names = [pair.key for pair in found]
        yield code.finding(names[0], f"{plural(len(found), 'key')} {text}: {listed(names)} ({first})", keys=names)


def check_expected_values(
    result: StateDictDiff, expected: Checkpoint, values: ValueReader, quantized: Quantized
) -> Iterator[Finding]:
    """Yield findings about tensors that equal the tensors of ``expected``, and about tensors that look untrained.

    A ``py:`` model is built to get its values. Those of a Module may be trained, so nothing is compared with them but
    for equality.
    """
    pairs = [pair for pair in result.matched if values.checkpoint.get(pair.found.key) == pair.found]
    is_built = result.expected_checkpoint.is_built
    equal: set[str] = set()

    def is_equal(pair: KeyPair) -> bool:
        if have_equal_bytes(values.checkpoint, pair.found.key, expected, pair.expected.key):
            equal.add(pair.key)
        return pair.key in equal

    def is_worth_comparing(pair: KeyPair) -> bool:
        stats = values.stats.get(pair.found.key)
        is_constant = stats is not None and stats.constant is not None
        return pair.found.dtype == pair.expected.dtype and not (is_built and is_constant)

    yield from check_as_expected(filter(is_worth_comparing, pairs), is_equal)
    if expected.model is not None:
        keys = [pair.expected.key for pair in pairs] if is_built else []
        new = ValueReader(expected, keys, values.workers, StatsKernel())
        new.read_remaining()
        pairs = [pair for pair in pairs if pair.found.key not in quantized.by_key]
        found = {pair.key: values.stats[pair.found.key] for pair in pairs if pair.found.key in values.stats}
        untrained = find_untrained(pairs, _with_moments(found), _with_moments(new.stats), expected.model)
        yield from check_at_init(untrained, equal)


def _with_moments(stats: Mapping[str, Extremes]) -> dict[str, ValueStats]:
    return {key: found for key, found in stats.items() if isinstance(found, ValueStats)}


def check_as_expected(pairs: Iterable[KeyPair], have_equal_bytes: Callable[[KeyPair], bool]) -> Iterator[Finding]:
    """Yield an ``as-expected`` note on the tensors that equal the tensors of EXPECTED bit by bit."""
    compared = [pair for pair in pairs if pair.expected.elements]
    equal = [pair.key for pair in compared if have_equal_bytes(pair)]
    if equal:
        is_all = len(equal) == len(compared)
        count = (
            plural(len(equal), "tensor") if is_all else f"{len(equal):,} of {plural(len(compared), 'compared tensor')}"
        )
        message = f"{count} bit by bit equal to EXPECTED: {listed(equal)}"
        yield codes.AS_EXPECTED.finding(equal[0], message, keys=equal)


def _patterns(keys: Sequence[str]) -> list[str]:
    """Return the patterns of the modules of the keys, or one pattern for all keys if they have many modules."""
    patterns = list(dict.fromkeys(pattern_for(key, keys) for key in keys))
    return patterns if len(patterns) <= _MOST_PATTERNS else ["*"]


def check_at_init(untrained: Untrained, equal: AbstractSet[str]) -> Iterator[Finding]:
    """Yield ``at-init`` for tensors that look as in a new model; constant ones of trained modules are a note.

    Where the whole checkpoint looks so, the tensors ``equal`` to those of EXPECTED have a finding already.
    """
    keys = [key for key in untrained.keys if not (untrained.is_whole and key in equal)]
    if keys:
        message = f"{plural(len(keys), 'tensor')} with values distributed as in a new model: {listed(keys)}"
        entries = " ".join(f"--ignore {shell_word(f'{codes.AT_INIT.name}:{pattern}')}" for pattern in _patterns(keys))
        hint = f"never trained, or not saved? if they will be trained from scratch, {entries} leaves this out"
        yield codes.AT_INIT.finding(keys[0], message, hint, keys=keys)
    if untrained.constant:
        count = plural(len(untrained.constant), "tensor")
        message = (
            f"{count} with the constant initial values of a new model (ones or zeros): {listed(untrained.constant)}"
        )
        yield codes.AT_INIT.finding(untrained.constant[0], message, severity="note", keys=untrained.constant)
