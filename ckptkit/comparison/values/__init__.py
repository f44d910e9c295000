"""Compare the values of two checkpoints: any formats, also through rules, in one pass of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from ckptkit.comparison.made import MadeTensors
from ckptkit.core.arguments import require_number
from ckptkit.core.checkpoint import UNINITIALISED, Checkpoint, TensorInfo, under_key
from ckptkit.core.checkpoint.stored import StoredBytes, is_in_blocks
from ckptkit.core.files.payloads import announce, is_same_range, place_of
from ckptkit.core.frozen import FrozenDict
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.progress import Progress
from ckptkit.core.result import Result
from ckptkit.core.text import plural
from ckptkit.core.ties import first_of_ties
from ckptkit.core.torch_bridge import CASTABLE
from ckptkit.quantized import quantized_weights
from ckptkit.rules.model import KeyMap

if TYPE_CHECKING:
    from ckptkit.values.difference import BytesDiffer, Pair, Part, Tolerance

    ComparePairs: TypeAlias = Callable[
        ["Comparison", Sequence[Pair], Tolerance | None, Progress], dict[int, Part | BytesDiffer]
    ]

__all__ = [
    "Comparison",
    "SideCounts",
    "SkippedValue",
    "ValueDiff",
    "ValueDifference",
    "compare_named",
    "compare_pairs",
    "require_tolerances",
]

_NO_VALUES = ("meta", UNINITIALISED)  # their payloads raise and say why


@dataclass(frozen=True, slots=True)
class SideCounts:
    """How many elements there are on the expected and on the found side."""

    expected: int = 0
    found: int = 0


@dataclass(frozen=True, slots=True)
class SkippedValue:
    """A key whose values were not compared, and the reason."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """How the values of one tensor differ, after found is cast to the dtype of expected, as torch casts.

    Sums, norms and ``max_ulp`` use the elements that are finite on both sides. An element of a complex tensor is one
    element; its magnitude counts. All numbers are None for a dtype of which only bytes can be compared, such as
    F6_E2M3.

    Attributes:
        expected: The tensor on the expected side.
        found: The tensor on the found side, under its own name; with operations, under the names of its sources.
        names: All expected keys that share this tensor; the first is that of ``expected``.
        changed: The share of elements whose bits differ.
        changed_elements: The number of elements whose bits differ. After a cast, two NaNs are equal with any bits.
        beyond: The number of elements that are not close by the tolerances; None without tolerances.
        nonfinite: The number of elements that differ as numbers where one side is NaN or infinite.
        max_abs: The largest absolute difference; exact for integers, and inf with ``nonfinite``.
        mean_abs: The mean of the absolute differences; None if no element is finite on both sides.
        rel_l2: ``|found - expected| / |expected|``; inf if only expected is all zero, and None as ``mean_abs``.
        cosine: The cosine of the angle between both tensors; None if one of both is all zero, or as ``mean_abs``.
        max_ulp: The largest distance in units in the last place: how many numbers of the dtype lie from one to the
            other. -0.0 and 0.0 are one number. None for integers and booleans.
        nan: The elements that are NaN on each side.
        inf: The elements that are infinite on each side.
        place: The index of the element with the largest difference, the first of several.
        bits: The bytes of that element on both sides.

    Example:
        >>> result = ckptkit.compare_values({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([0.0, 1.5])})
        >>> worst = result.different[0]
        >>> worst.changed, worst.max_abs, worst.place, worst.values
        (0.5, 0.5, (1,), ('1.0', '1.5'))
    """

    expected: TensorInfo
    found: TensorInfo
    names: tuple[str, ...]
    changed: float | None = None
    changed_elements: int | None = None
    beyond: int | None = None
    nonfinite: int = 0
    max_abs: float | None = None
    mean_abs: float | None = None
    rel_l2: float | None = None
    cosine: float | None = None
    max_ulp: int | None = None
    nan: SideCounts = SideCounts()
    inf: SideCounts = SideCounts()
    place: tuple[int, ...] | None = None
    bits: tuple[bytes, bytes] = field(default=(b"", b""), repr=False)

    @property
    def key(self) -> str:
        """The expected key."""
        return self.expected.key

    @property
    def values(self) -> tuple[str, str]:
        """The expected and the found value of the element with the largest difference, as text; or empty texts."""
        if self.place is None:
            return "", ""
        from ckptkit.values.difference import text_of

        return text_of(self.bits[0], self.expected.dtype), text_of(self.bits[1], self.expected.dtype)


_NO_COUNTS = SideCounts()


@dataclass(frozen=True, slots=True, repr=False)
class ValueDiff(Result):
    """The values that differ between two checkpoints, among the keys that both have with one shape.

    Attributes:
        compared: The number of tensors that were compared; tied tensors count once.
        equal: The number of them whose elements have equal bits.
        different: The tensors that differ, beyond the tolerances if there are any. First those where NaN or infinities
            differ, then those with the largest ``rel_l2``, and last those that were all zero, by ``max_abs``.
        within: The tensors whose bits differ, but that are close by the tolerances; empty without tolerances.
        skipped: Keys whose values were not compared.
        as_stored: Expected keys of the parts of quantised weights, and of weights in blocks of GGUF: their codes were
            compared, and not the numbers that the codes stand for.
        keys: The expected keys that were compared, in their order; tied ones too.
        rtol: The relative tolerance, or None without tolerances.
        atol: The absolute tolerance, or None without tolerances.

    Example:
        >>> path = "fixtures/lenet_10class.pth"
        >>> result = ckptkit.compare_values(path, "fixtures/lenet_10class.safetensors")
        >>> result.compared, result.equal, result.all_equal
        (10, 10, True)
    """

    _truth: ClassVar[str] = "ask for .all_equal or .different"

    compared: int
    equal: int
    different: tuple[ValueDifference, ...] = ()
    within: tuple[ValueDifference, ...] = ()
    skipped: tuple[SkippedValue, ...] = ()
    as_stored: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    rtol: float | None = None
    atol: float | None = None

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        count = len(self.different)
        beyond = "" if self.rtol is None else " beyond the tolerances"
        skipped = f", {len(self.skipped)} not compared" if self.skipped else ""
        verb = "differs" if 1 in (count, self.compared) else "differ"
        return f"{count} of {plural(self.compared, 'tensor')} {verb} in values{beyond}{skipped}"

    @property
    def all_equal(self) -> bool:
        """Whether all values of the common keys were compared, at least one, and none differs beyond the tolerances."""
        return self.compared > 0 and not self.different and not self.skipped


def require_tolerances(rtol: float | None, atol: float | None) -> None:
    """Raise ``ArgumentError`` unless each tolerance is None or a number of at least 0."""
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if tolerance is not None:
            require_number(tolerance, name, "a number of at least 0, or None", at_least=0)


def compare_named(
    expected: Checkpoint,
    found: Checkpoint,
    key_map: KeyMap,
    names: Mapping[str, str],
    *,
    dtypes: Mapping[str, str] = FrozenDict({}),
    rtol: float | None = None,
    atol: float | None = None,
    progress: Progress | None = None,
    compare: ComparePairs | None = None,
) -> ValueDiff:
    """Compare the values of tensors that both sides have with one number of elements.

    ``names`` maps each expected key to the name of the found tensor after the rules. ``dtypes`` has the dtype in which
    the two tensors of an expected key are compared, where it is not that of the expected one. Without tolerances, bits
    must be equal. Otherwise an element differs where its bits do and ``torch.isclose(found, expected, rtol, atol)`` is
    false; a tolerance of None counts as 0 beside another. The threads read pieces of bounded size. A tensor that an
    operation makes is made in memory. ``compare`` reads and compares the pairs, by
    default in the threads of this process.

    Raises:
        ArgumentError: A tolerance is not a number of at least 0.
        ModelError: A tensor has no values, such as one on the meta device.
        PlanError: A side has only descriptions of tensors, or both have views that repeat few bytes for hours.
        FormatError: The stored bytes do not agree with the header.
        ChangedError: A file changes while it is read.
    """
    require_tolerances(rtol, atol)
    with pause_gc():
        comparison = Comparison(expected, found, key_map, names, dtypes)
        return comparison.run(tolerance_of(rtol, atol), progress or (lambda _: None), compare or compare_pairs)


def tolerance_of(rtol: float | None, atol: float | None) -> Tolerance | None:
    """Return both tolerances, or None if there is none."""
    from ckptkit.values.difference import Tolerance

    return None if rtol is None and atol is None else Tolerance(float(rtol or 0), float(atol or 0))


class Comparison:
    """The pairs of tensors to compare, and what is known of them."""

    def __init__(
        self,
        expected: Checkpoint,
        found: Checkpoint,
        key_map: KeyMap,
        names: Mapping[str, str],
        dtypes: Mapping[str, str],
    ) -> None:
        self._expected, self._found, self._names, self._dtypes = expected, found, names, dtypes
        self._made = MadeTensors(found, key_map)
        self._ties, self._found_ties = _first_of_all_ties(expected), _first_of_all_ties(found)
        self._keys: list[list[str]] = []  # the tied expected keys of each pair
        self._skipped: list[SkippedValue] = []
        self._stored = StoredBytes(expected), StoredBytes(found)
        self._blocks: set[str] = set()  # the keys of tensors in blocks, such as those of GGUF

    def run(self, tolerance: Tolerance | None, progress: Progress, compare: ComparePairs) -> ValueDiff:
        """Return the result, after all values were read."""
        self._refuse_endless()
        pairs = self.pairs()
        found = compare(self, pairs, tolerance, progress)
        for side in (self._expected, self._found):
            side.check_unchanged()
        del pairs
        merged = self._merge_ties(found)
        del found
        all_of = [self._difference(keys, part, tolerance) for keys, part in merged if part is not None]
        within = [one for one in all_of if one.beyond == 0]
        return ValueDiff(
            len(merged),
            len(merged) - len(all_of),
            tuple(sorted((one for one in all_of if one.beyond != 0), key=_badness)),
            tuple(sorted(within, key=_badness)),
            tuple(self._skipped),
            tuple(self._coded_keys()),
            tuple(self._compared_keys()),
            None if tolerance is None else tolerance.rtol,
            None if tolerance is None else tolerance.atol,
        )

    def pairs(self) -> list[Pair]:
        """Return the pairs of tensors whose values must be read, in the order of the expected file."""
        return sorted(self._pairs(), key=lambda pair: place_of(pair.expected))

    def for_worker(self, numbers: Sequence[int]) -> tuple[dict[str, str], KeyMap, dict[str, str]]:
        """Return the names, the rules and the dtypes that a worker needs to make the pairs with these numbers again."""
        names = {key: self._names[key] for key in (self._keys[number][0] for number in numbers)}
        origins = {name: self._made.origin(name) for name in names.values()}
        is_plain = {name: self._made.is_renamed(name) for name in origins}
        key_map = KeyMap(
            {origin.sources[0]: name for name, origin in origins.items() if is_plain[name]},
            {name: origin for name, origin in origins.items() if not is_plain[name]},
        )
        return names, key_map, {key: self._dtypes[key] for key in names if key in self._dtypes}

    def _refuse_endless(self) -> None:
        """Raise ``PlanError`` if views on both sides repeat a few bytes for hours; one side alone may."""
        from ckptkit.values.endless import refuse_endless, why_endless

        if why_endless(self._expected, [self._expected[key] for key in self._names]):
            origins = map(self._made.origin, self._names.values())
            refuse_endless(self._found, [self._found[key] for origin in origins for key in origin.sources])

    def _pairs(self) -> Iterator[Pair]:
        """Yield the tensors whose values must be read; tied keys make one pair."""
        from ckptkit.values.difference import Pair, has_numbers

        number_of: dict[object, int] = {}
        for key, name in self._names.items():
            expected, found = self._expected[key], self._made.describe(name)
            code = expected.dtype
            is_plain = code == found.dtype and expected.shape == found.shape and expected.kind == found.kind == "dense"
            has_blocks = not is_plain and self._are_blocks(expected, found, name)
            if not (is_plain or has_blocks) and (reason := _why_skipped(expected, found)):
                self._skipped.append(SkippedValue(key, reason))
                continue
            first = self._ties.get(key)
            tie = key if first is None else (first, self._identity_of(name))
            number = number_of.setdefault(tie, len(self._keys))
            if number < len(self._keys):
                self._keys[number].append(key)
                continue
            self._keys.append([key])
            if has_blocks:
                self._blocks.add(key)
                payloads = self._stored[0].payload(key), self._stored[1].payload(found.key)
            else:
                payloads = self._expected.payload(key), self._made.payload(name)
            if not payloads[0].nbytes or (code == found.dtype and is_same_range(*payloads)):
                continue
            if has_numbers(code) and (code != "F4" or expected.elements % 2 == 0):
                in_code = self._dtypes.get(key, code)
                yield Pair(number, *payloads, in_code, code, found.dtype, expected.elements)
            else:
                yield Pair(number, *payloads, "", "", "", payloads[0].nbytes)

    def _are_blocks(self, expected: TensorInfo, found: TensorInfo, name: str) -> bool:
        """Return whether both tensors are stored in blocks of one type, of which equal bytes are equal numbers."""
        is_alike = (expected.dtype, expected.shape, expected.nbytes) == (found.dtype, found.shape, found.nbytes)
        return is_alike and is_in_blocks(expected) and is_in_blocks(found) and self._made.origin(name).recipe is None

    def _identity_of(self, name: str) -> object:
        origin = self._made.origin(name)
        return tuple(self._found_ties.get(key, key) for key in origin.sources), origin.recipe

    def _merge_ties(self, found: Mapping[int, Part | BytesDiffer]) -> list[tuple[list[str], Part | BytesDiffer | None]]:
        """Return the keys of each pair, and its result; an expected tensor with equal results is one."""
        merged: dict[object, tuple[list[str], Part | BytesDiffer | None]] = {}
        for number, keys in enumerate(self._keys):
            part = found.get(number)
            first = self._ties.get(keys[0])
            same = number if first is None else (first, part)
            if same in merged:
                merged[same][0].extend(keys)
            else:
                merged[same] = keys, part
        return list(merged.values())

    def _difference(self, keys: list[str], part: Part | BytesDiffer, tolerance: Tolerance | None) -> ValueDifference:
        names = tuple(key for key in self._names if key in keys) if len(keys) > 1 else tuple(keys)
        expected, found = self._expected[names[0]], self._made.describe(self._names[names[0]])
        expected = under_key(expected, expected.key, self._dtypes.get(names[0], expected.dtype))
        if not isinstance(part, tuple):
            return ValueDifference(expected, found, names)
        total = part.total
        rel_l2 = cosine = None
        if part.finite:
            is_beyond = total.distance == math.inf or (total.distance > 0 and not total.expected)
            rel_l2 = math.inf if is_beyond else total.distance / (total.expected or 1.0)
        if total.expected and total.found:
            cosine = max(-1.0, min(total.cosine, 1.0))
        return ValueDifference(
            expected, found, names, part.changed / expected.elements, part.changed,
            None if tolerance is None else part.beyond, part.nonfinite, part.largest,
            total.magnitudes / part.finite if part.finite else None, rel_l2, cosine, part.ulp,
            _side_counts(part.nan), _side_counts(part.inf), _index(part.place, expected.shape), part.values,
        )  # fmt: skip

    def _coded_keys(self) -> Iterator[str]:
        """Yield the compared keys that are parts of quantised weights, or such weights in blocks."""
        coded = quantized_weights(self._expected).by_key
        return (key for key in self._compared_keys() if key in coded or key in self._blocks)

    def _compared_keys(self) -> Iterator[str]:
        skipped = {one.key for one in self._skipped}
        return (key for key in self._names if key not in skipped)


def compare_pairs(
    _: Comparison, pairs: Sequence[Pair], tolerance: Tolerance | None, progress: Progress
) -> dict[int, Part | BytesDiffer]:
    """Return the differences of the pairs that differ, by their numbers. Raises what reading raises."""
    from ckptkit.values.difference import differences
    from ckptkit.values.workers import Workers

    announce(pair.expected for pair in pairs)
    announce(pair.found for pair in pairs)
    found: dict[int, Part | BytesDiffer] = {}
    with Workers() as workers:
        for pair, part, nbytes in differences(pairs, workers, tolerance):
            progress(nbytes)
            if part is not None:
                found[pair.number] = part
    return found


def _why_skipped(expected: TensorInfo, found: TensorInfo) -> str:
    """Return why the values of two tensors are not compared; an empty string if they are."""
    for info in (expected, found):
        if info.kind != "dense" and info.kind not in _NO_VALUES:
            return f"a {info.kind} tensor"
    if expected.elements != found.elements:
        return f"the shape is {list(found.shape)}, not {list(expected.shape)}"
    if expected.dtype == found.dtype:
        return "" if expected.nbytes == found.nbytes else "the sizes in bytes differ"
    unknown = next((info.dtype for info in (expected, found) if info.dtype not in CASTABLE), None)
    return f"ckptkit cannot cast {found.dtype} to {expected.dtype}" if unknown else ""


def _first_of_all_ties(side: Checkpoint) -> dict[str, str]:
    """Return each key of a tied tensor with the first key of the tensor, which has itself."""
    first_of = first_of_ties((info for info in side.values() if info.kind == "dense"), side.span)
    return {**first_of, **{first: first for first in first_of.values()}}


def _badness(difference: ValueDifference) -> tuple[int, float, float, str]:
    """Return the key by which the worst difference is the first; one of bytes alone is before all numbers.

    A tensor that was all zero, such as a new bias, has no relative change: it is behind those that have one.
    """
    rel_l2 = difference.rel_l2
    if difference.nonfinite:
        rank = 0
    elif rel_l2 is None:
        rank = 1
    else:
        rank = 3 if rel_l2 == math.inf else 2
    return rank, -(rel_l2 or 0.0), -(difference.max_abs or 0.0), difference.key


def _side_counts(counts: tuple[int, int]) -> SideCounts:
    return SideCounts(*counts) if any(counts) else _NO_COUNTS


def _index(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 1:
        return (place,)
    index: list[int] = []
    for size in reversed(shape):
        place, inner = divmod(place, size)
        index.append(inner)
    return tuple(reversed(index))
