"""Tensors that are merged while they are read: pieces of all inputs, by all threads, rounded once."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.checkpoint.payload import HeldBytes, Payload, part_of, read_into
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Extent, is_seekable
from ckptkit.core.text import quoted
from ckptkit.errors import PlanError
from ckptkit.values.arrays import real_code
from ckptkit.values.casting import cast_bytes
from ckptkit.values.computed import BlockPayload, JoinedPayload, bytes_of
from ckptkit.values.losses import Losses, count_losses
from ckptkit.values.merging.model import Array, Facts, Merging, NoResultError
from ckptkit.values.workers import PIECE, Workers

if TYPE_CHECKING:
    from collections.abc import Generator

    from ckptkit.core.checkpoint.payload import Sink

__all__ = ["MergeInput", "MergedPayload", "OnNonfinite"]

OnNonfinite: TypeAlias = Literal["error", "allow", "base"]
_FEW: Final = 4  # inputs whose pieces have the usual size; those of more inputs are smaller, so that memory is bounded
_BITS: Final = {"F32": "u4", "F64": "u8"}


class MergeInput(NamedTuple):
    """One tensor of a merge: what messages call its input, its description, and its bytes."""

    name: str
    info: TensorInfo
    payload: Payload


class _Piece(NamedTuple):
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class _Held:
    """The bytes of inputs that can be read only in order, and what the passes have found."""

    lock: threading.Lock = field(default_factory=threading.Lock)  # held during all passes
    reading: threading.Lock = field(default_factory=threading.Lock)
    payloads: dict[int, Payload] = field(default_factory=dict)
    is_measured: bool = False
    known: Any = None
    is_checked: bool = False  # whether a pass has read all pieces, and looked for NaN and equality
    are_equal: bool = False  # whether all inputs that are read have the same bits; false before ``is_checked``


@dataclass(frozen=True, slots=True)
class MergedPayload(BlockPayload[_Piece]):
    """A payload that merges its inputs while it is read, and rounds the numbers once to the dtype of ``out``.

    It computes with numbers of the dtype ``working``, F32 or F64. ``on_nonfinite`` says what happens where an input
    that is read has a NaN or an infinity: ``error`` raises ``PlanError``, ``allow`` computes with it, and
    ``base`` takes the element of the first input, which must be finite. Once all bytes were read, ``losses`` has the
    losses of the rounding by the key of ``out``. ``facts`` then has what a user should know of the tensor, if anything.
    The threads are those of ``workers``, which may be shared.
    """

    merging: Merging
    inputs: Sequence[MergeInput]
    out: TensorInfo
    losses: MutableMapping[str, CastLoss] | None = None
    facts: MutableMapping[str, Facts] | None = None
    workers: Workers = field(default_factory=Workers, repr=False, compare=False)
    on_nonfinite: OnNonfinite = "error"
    working: str = "F32"
    _held: _Held = field(default_factory=_Held, repr=False, compare=False)

    def blocks(self, low: int = 0, high: int | None = None) -> Iterator[_Piece]:
        """Yield the pieces that have the elements from ``low`` to ``high``."""
        parts = DTYPES[self.out.dtype].parts
        numbers = self.out.elements * parts
        size = self._size
        for start in range(low * parts // size * size, numbers if high is None else high * parts, size):
            yield _Piece(start, min(start + size, numbers))

    @property
    def _size(self) -> int:
        """The numbers of a piece, which depend on nothing but the description of the merge."""
        unit = max(self.merging.unit, 1)
        return max(PIECE * _FEW // max(len(self.merging.reads), _FEW) // unit, 1) * unit

    def first_element(self, block: _Piece) -> int:
        """Return the number of elements before a piece."""
        return block.start // DTYPES[self.out.dtype].parts

    def write_to(self, out: Sink, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        """Write all bytes from ``offset`` of ``out`` in all threads, as ``SelfWriting`` says."""
        self._measure(self.workers, in_threads=True)
        return (yield from BlockPayload.write_to(self, out, offset, checksum=checksum))

    @property
    def _is_small(self) -> bool:
        """Whether the tensor is one piece, of inputs that are not held in memory."""
        is_piece = self.out.elements * DTYPES[self.out.dtype].parts <= self._size
        return is_piece and all(is_seekable(one.payload) for one in self.inputs)

    def joins(self, other: Payload) -> bool:
        """Return whether both are small: then each is merged by one thread, and several at once."""
        return isinstance(other, MergedPayload) and self._is_small and other._is_small  # noqa: SLF001 - of this class

    def join(self, others: Sequence[Payload]) -> Payload:
        """Return one payload of this tensor and ``others``."""
        return JoinedPayload((self, *(other for other in others if isinstance(other, MergedPayload))))

    def make(self, block: _Piece, workers: Workers) -> tuple[memoryview, Losses]:
        """Return the bytes of a piece in a buffer of this thread, and the losses of their rounding."""
        import numpy as np

        self._measure(workers)
        held, merging = self._held, self.merging
        inputs = self._read(block, workers)
        count = block.stop - block.start
        if held.are_equal or (merging.identity == "piece" and _are_equal(inputs)):
            merged = inputs[0]
            self._refuse_nonfinite(block, merged, workers)
            losses = Losses()
        else:
            if merging.hides_nonfinite and not held.is_checked:
                self._refuse_inputs(block, inputs, workers)
            merged = workers.buffer("merged", _float(self.working), count)
            with np.errstate(all="ignore"):
                merging.apply(inputs, block.start, held.known, merged, workers)
            losses = self._overflows(block, merged, workers)
        found: memoryview = merged.view(np.uint8).data
        working, code = self.working, real_code(self.out.dtype)
        if code == working:
            return found, losses
        made = cast_bytes(found, working, code, workers)
        if self.losses is not None:
            losses = losses.plus(count_losses(found, made, working, code, workers))
        return made, losses

    def keep(self, losses: Losses) -> None:
        """Store the losses of all pieces and the facts, if they are wanted, and forget what was held of the inputs."""
        self._held.payloads.clear()
        known = self._held.known
        if self.facts is not None and known is not None and (facts := self.merging.facts(known)) != Facts():
            self.facts[self.out.key] = facts
        if self.losses is not None:
            key = self.out.key
            self.losses[key] = losses.of(key, self.working, self.out.dtype, self.out.elements)

    def checked(self, block: _Piece, workers: Workers) -> list[Array]:
        """Return the numbers of the inputs that count, in buffers of this thread, as the merge computes with them.

        Raises ``PlanError`` for a NaN or an infinity, as ``on_nonfinite`` says.
        """
        inputs = self._read(block, workers)
        self._refuse_inputs(block, inputs, workers)
        return inputs

    def _measure(self, workers: Workers, *, in_threads: bool = False) -> None:
        """Make the passes, unless they were made."""
        held, merging = self._held, self.merging
        if held.is_measured or not merging.passes or not self.out.elements:
            return
        with held.lock:
            if held.is_measured:
                return
            known: Any = None
            for number in range(merging.passes):
                if not merging.needs(number, known):
                    break
                sample = merging.ranges(number, known)
                blocks = self.blocks() if sample is None else map(_Piece._make, sample)
                is_first = sample is None and not held.is_checked
                if is_first:
                    held.are_equal = merging.identity == "tensor"
                work = functools.partial(self._measure_piece, number, known, workers, is_first)
                results = workers.each(work, blocks) if in_threads else map(work, blocks)
                try:
                    known = merging.combine(number, results, known)
                except NoResultError as error:
                    raise PlanError(f"{quoted(self.out.key)} cannot be merged: {error}") from None
                for _ in results:  # the last pieces may have errors
                    pass
                held.is_checked |= is_first
                if held.are_equal:
                    break
            held.known, held.is_measured = known, True

    def _measure_piece(self, number: int, known: Any, workers: Workers, is_first: bool, block: _Piece) -> Any:
        """Return what a pass needs of a piece; the first pass that reads all pieces also looks for NaN and equality."""
        import numpy as np

        inputs = self._read(block, workers)
        if is_first:
            self._refuse_inputs(block, inputs, workers)
            if self._held.are_equal and not _are_equal(inputs):
                self._held.are_equal = False
        with np.errstate(all="ignore"):
            return self.merging.measure(number, inputs, block.start, known, workers)

    def _read(self, block: _Piece, workers: Workers) -> list[Array]:
        """Return the numbers of the inputs that are read, in buffers of this thread."""
        inputs = [self._numbers(number, block, workers) for number in self.merging.reads]
        if self.on_nonfinite == "base":
            self._replace_nonfinite(block, inputs, workers)
        return inputs

    def _numbers(self, number: int, block: _Piece, workers: Workers) -> Array:
        import numpy as np

        code = real_code(self.inputs[number].info.dtype)
        working = self.working
        width, count = DTYPES[code].bits // 8, block.stop - block.start
        start, nbytes, name = block.start * width, count * width, f"merge input {number}"
        source = self._source(number)
        if code != working:
            return np.frombuffer(
                cast_bytes(workers.read("merge source", source, start, nbytes), code, working, workers, name),
                _BITS[working],
            ).view(_float(working))
        numbers: Array = workers.buffer(name, _float(working), count)
        whole = count == self.out.elements * DTYPES[self.out.dtype].parts
        read_into(source if whole else part_of(source, start, nbytes), numbers.view(np.uint8).data)
        return numbers

    def _source(self, number: int) -> Payload:
        """Return the bytes of an input that can be read in any order."""
        payload = self.inputs[number].payload
        if is_seekable(payload):
            return payload
        held = self._held
        with held.reading:
            if number not in held.payloads:
                held.payloads[number] = HeldBytes(bytes_of(payload))
            return held.payloads[number]

    def _overflows(self, block: _Piece, merged: Array, workers: Workers) -> Losses:
        """Return how many finite numbers became infinite; refuse a number of an input that is not finite."""
        import numpy as np

        finite = np.isfinite(merged, out=workers.buffer("merge finite", np.bool_, len(merged)))
        if finite.all():
            return Losses()
        lost = ~finite
        for number in self.merging.reads:
            numbers = self._numbers(number, block, workers)
            found = np.isfinite(numbers)
            if self.on_nonfinite == "error" and not found.all():
                raise self._refusal(number, block, numbers)
            lost &= found
        count = int(np.count_nonzero(lost))
        return Losses(overflowed=count, is_mask=False) if count else Losses()

    def _refuse_inputs(self, block: _Piece, inputs: Sequence[Array], workers: Workers) -> None:
        for number, numbers in zip(self.merging.reads, inputs, strict=True):
            self._refuse_nonfinite(block, numbers, workers, number)

    def _refuse_nonfinite(self, block: _Piece, numbers: Array, workers: Workers, number: int | None = None) -> None:
        import numpy as np

        if self.on_nonfinite == "allow":
            return
        if not np.isfinite(numbers, out=workers.buffer("merge finite", np.bool_, len(numbers))).all():
            raise self._refusal(self.merging.reads[0] if number is None else number, block, numbers)

    def _refusal(self, number: int, block: _Piece, numbers: Array) -> PlanError:
        import numpy as np

        one = self.inputs[number]
        at = int(np.flatnonzero(~np.isfinite(numbers))[0])
        value = "NaN" if np.isnan(numbers[at]) else f"{numbers[at]}"
        index = _index((block.start + at) // DTYPES[self.out.dtype].parts, self.out.shape)
        place = f"element {list(index)}" if index else "value"
        path = one.payload.file.path if isinstance(one.payload, Extent) else None
        key = "" if one.info.key == self.out.key else f" ({quoted(one.info.key)})"
        base = "" if number == 0 else "; base takes the value of the first input"
        return PlanError(
            f"{quoted(self.out.key)} cannot be merged: its {place} in {quoted(one.name)}{key} is {value}",
            hint=f'--param on_nonfinite=allow, or in a recipe on_nonfinite = "allow", computes with it{base}',
            call=f'on_nonfinite = "allow" in the recipe computes with it{base}',
            path=path,
        )

    def _replace_nonfinite(self, block: _Piece, inputs: Sequence[Array], workers: Workers) -> None:
        """Put the elements of the first input in place of those that are not finite."""
        import numpy as np

        first: Array | None = None
        for number, numbers in zip(self.merging.reads, inputs, strict=True):
            finite = np.isfinite(numbers, out=workers.buffer("merge finite", np.bool_, len(numbers)))
            if finite.all():
                continue
            if number == 0:
                raise self._refusal(0, block, numbers)
            wrong = np.flatnonzero(~finite)
            if first is None:
                first = inputs[0] if self.merging.reads[0] == 0 else self._numbers(0, block, workers)
            numbers[wrong] = first[wrong]
            self._refuse_nonfinite(block, numbers, workers, 0)


def _are_equal(inputs: Sequence[Array]) -> bool:
    """Return whether all arrays have the same bits; the first numbers nearly always show that they have not."""
    first = inputs[0].view(f"u{inputs[0].itemsize}")
    others = [numbers.view(first.dtype) for numbers in inputs[1:]]
    return all((first[:8] == other[:8]).all() for other in others) and all((first == other).all() for other in others)


def _float(working: str) -> str:
    return "f4" if working == "F32" else "f8"


def _index(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.insert(0, rest)
    return tuple(index)
