"""Read strided views, and tensors that are stored in blocks, as contiguous bytes. No bit of a value changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final, Literal, NamedTuple

from ckptkit.core.checkpoint import Part, Payload, TensorInfo, row_major, storage_range
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import CHUNK, ByteSwapped, Inflated, Region, is_seekable
from ckptkit.core.text import human_bytes, quoted
from ckptkit.errors import FormatError

__all__ = [
    "Block",
    "BlockTensor",
    "Box",
    "InMemory",
    "Loop",
    "Strided",
    "check_cover",
    "copy_runs",
    "loops_of",
    "only_listed_error",
    "step_budget",
]


_MOST_STRIPES = 32
_WINDOW = 64 << 20  # a span up to this size is read as a whole
_LARGEST_GAP = 64 << 10  # runs with a larger gap between them are read separately
_WORDS: Final[dict[int, Literal["B", "H", "I", "Q"]]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_SIGN_FLIPPED: Final = bytes(byte ^ 0x80 for byte in range(256))


def only_listed_error(info: TensorInfo, path: str) -> FormatError:
    """Return the error for reading a tensor of another kind than ``"dense"``."""
    hint = (
        "open the directory with the files of all ranks, which joins them"
        if info.kind in ("dtensor", "sharded")
        else None
    )
    return FormatError(
        f"{quoted(info.key)} is a {info.kind} tensor, which is listed but cannot be read", hint=hint, path=path
    )


class Loop(NamedTuple):
    """One loop of a copy: the number of steps, and the bytes of a step in the target and in the source."""

    times: int
    target: int
    source: int


class _Segment(NamedTuple):
    """A segment of a copy: its offsets in target and source, its loops, and the bytes of a contiguous run."""

    target: int
    source: int
    loops: list[Loop]
    run: int


def loops_of(sizes: Sequence[int], target: Sequence[int], source: Sequence[int], width: int) -> tuple[list[Loop], int]:
    """Return the fewest loops that copy a tensor run by run, outermost first, and the bytes of a run.

    A run is contiguous in the target and in the source. ``target`` and ``source`` are strides in bytes; ``width`` is
    the bytes of an element.
    """
    run = width
    loops: list[Loop] = []
    for size, to, of in zip(reversed(sizes), reversed(target), reversed(source), strict=True):
        if size == 1:
            continue
        if not loops and to == of == run:
            run *= size
        elif loops and (to, of) == (loops[-1].times * loops[-1].target, loops[-1].times * loops[-1].source):
            loops[-1] = loops[-1]._replace(times=loops[-1].times * size)
        else:
            loops.append(Loop(size, to, of))
    return loops[::-1], run


def copy_runs(target: memoryview, source: memoryview, loops: Sequence[Loop], run: int) -> None:
    """Copy all runs of ``run`` bytes; target and source begin with the first run."""
    # A strided copy does the whole innermost loop at once, so the longest loop must be the innermost.
    _copy(target, source, sorted(loops, key=lambda loop: loop.times), run)


def _copy(target: memoryview, source: memoryview, loops: list[Loop], run: int) -> None:
    if not loops:
        target[:run] = source[:run]
    elif len(loops) == 1:
        _copy_loop(target, source, loops[0], run)
    else:
        loop, *rest = loops
        for index in range(loop.times):
            _copy(target[index * loop.target :], source[index * loop.source :], rest, run)


def _copy_loop(target: memoryview, source: memoryview, loop: Loop, run: int) -> None:
    times, to, of = loop
    if not of:
        source, of = memoryview(bytes(source[:run]) * times), run
    unit = math.gcd(to, of, run, 8)
    if run // unit > min(_MOST_STRIPES, times):
        for index in range(times):
            target[index * to : index * to + run] = source[index * of : index * of + run]
        return
    # One strided copy for each word of a run is faster than one short copy for each of many runs.
    out = target[: (times - 1) * to + run].cast(_WORDS[unit])
    data = source[: (times - 1) * of + run].cast(_WORDS[unit])
    for word in range(run // unit):
        last = word + (times - 1) * of // unit
        out[word :: to // unit] = data[word : last + 1 : of // unit]


def _segments(loops: list[Loop], run: int, side: Literal["target", "source"], most: int) -> Iterator[_Segment]:
    """Yield the segments of a copy, in order. Each segment spans at most ``most`` bytes of the target or the source."""
    if not loops:
        for start in range(0, run, most):
            yield _Segment(start, start, [], min(most, run - start))
        return
    first, *rest = loops
    step, span = getattr(first, side), run + sum((loop.times - 1) * getattr(loop, side) for loop in rest)
    if span > most or step - span > _LARGEST_GAP:
        for index in range(first.times):
            for segment in _segments(rest, run, side, most):
                yield segment._replace(
                    target=index * first.target + segment.target, source=index * first.source + segment.source
                )
        return
    rows = (most - span) // step + 1
    for index in range(0, first.times, rows):
        part = first._replace(times=min(rows, first.times - index))
        yield _Segment(index * first.target, index * first.source, [part, *rest], run)


@dataclass(frozen=True, slots=True)
class Strided:
    """The contiguous bytes of a view into ``storage``, with its conjugate and negative bits resolved as torch does.

    Memory is bounded by the size of the tensor and a window of 64 MB.
    """

    storage: Region
    info: TensorInfo
    conj: bool = False
    neg: bool = False

    @property
    def nbytes(self) -> int:
        """Number of bytes of the contiguous elements."""
        return self.info.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in row-major order, in chunks of bounded size.

        Raises ``FormatError`` if the elements are far apart in compressed data, since reading them would decompress too
        many bytes.
        """
        if not self.nbytes:
            return
        data, loops, run = self._read()
        buffer = bytearray(min(self.nbytes, CHUNK))
        for segment in _segments(loops, run, "target", CHUNK):
            out = memoryview(buffer)[: math.prod(loop.times for loop in segment.loops) * segment.run]
            copy_runs(out, data[segment.source :], segment.loops, segment.run)
            self._flip_signs(buffer, len(out))
            yield out

    def slice(self, start: int, nbytes: int) -> Payload:
        """Return the ``nbytes`` bytes from byte ``start``; whole rows are read without the rows before them."""
        row = self.nbytes // self.info.shape[0] if self.info.shape else 0
        if self.info.view is None or not row or start % row or nbytes % row:
            return Part(self, start, nbytes)
        offset = self.info.view.offset + start // row * self.info.view.stride[0]
        shape = (nbytes // row, *self.info.shape[1:])
        return replace(self, info=replace(self.info, shape=shape, view=self.info.view._replace(offset=offset)))

    def _read(self) -> tuple[memoryview, list[Loop], int]:
        loops, run = self._loops()
        first, last = storage_range(self.info)
        span = last - first
        if span <= max(_WINDOW, self.nbytes):
            payload = self.storage.slice(first, span)
            return memoryview(b"".join(bytes(chunk) for chunk in payload.chunks())), loops, run
        if not is_seekable(self.storage):
            raise self._too_far_apart(span)
        # The span is mostly gaps, so the elements are read in the order of the storage and packed without gaps.
        by_stride = sorted(
            (index for index, loop in enumerate(loops) if loop.source), key=lambda index: -loops[index].source
        )
        sizes = tuple(loops[index].times for index in by_stride)
        steps = dict(zip(by_stride, (step * run for step in row_major(sizes)), strict=True))
        packed = memoryview(bytearray(math.prod(sizes) * run))
        packing = [loops[index]._replace(target=steps[index]) for index in by_stride]
        for segment in _segments(packing, run, "source", CHUNK):
            length = segment.run + sum((loop.times - 1) * loop.source for loop in segment.loops)
            part = self.storage.slice(first + segment.source, length)
            data = memoryview(b"".join(bytes(chunk) for chunk in part.chunks()))
            copy_runs(packed[segment.target :], data, segment.loops, segment.run)
        return packed, [loop._replace(source=steps.get(index, 0)) for index, loop in enumerate(loops)], run

    def _too_far_apart(self, span: int) -> FormatError:
        stored = self.storage.source if isinstance(self.storage, ByteSwapped) else self.storage
        return FormatError(
            f"{quoted(self.info.key)}: {human_bytes(self.nbytes)} spread over {human_bytes(span)} of compressed data",
            hint="save the checkpoint again with torch.save, which does not compress",
            path=stored.packed.file.path if isinstance(stored, Inflated) else None,
        )

    def _loops(self) -> tuple[list[Loop], int]:
        assert self.info.view is not None  # noqa: S101 - callers pass only tensors with a storage
        shape, stride, width = self.info.shape, self.info.view.stride, DTYPES[self.info.dtype].bits // 8
        if self.info.dtype == "F4":  # in a dense F4 tensor, both elements of each byte stay together
            shape, stride, width = (*shape[:-1], shape[-1] // 2), (*(step // 2 for step in stride[:-1]), 1), 1
        return loops_of(shape, [step * width for step in row_major(shape)], [step * width for step in stride], width)

    def _flip_signs(self, buffer: bytearray, end: int) -> None:
        # Arithmetic would lose the sign of a zero and the bits of a NaN. The sign is the top bit of the last byte.
        dtype = DTYPES[self.info.dtype]
        for index, flip in enumerate((self.neg, self.neg != self.conj)[: dtype.parts]):
            if flip:
                top = slice((index + 1) * dtype.part_bytes - 1, end, dtype.bits // 8)
                buffer[top] = buffer[top].translate(_SIGN_FLIPPED)


_STEPS, _STEPS_PER_BOX = 1_000_000, 4  # a grid needs about three steps for each box


class Box(NamedTuple):
    """A block of a tensor: its offsets and sizes in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class _Slab(NamedTuple):
    start: int
    stop: int
    inside: list[int]  # indices of the boxes that cover the slab


def _slabs(boxes: Sequence[Box], among: list[int], dim: int, size: int) -> Iterator[_Slab]:
    """Yield the slabs of one dimension, cut at each edge of a box. Each box covers all or nothing of a slab."""
    by_offset = sorted(among, key=lambda index: boxes[index].offsets[dim])
    edges = {0, size}
    for index in among:
        offset = boxes[index].offsets[dim]
        edges |= {offset, offset + boxes[index].sizes[dim]}
    cuts = sorted(edges)
    inside: list[int] = []
    added = 0
    for start, stop in pairwise(cuts):
        inside = [index for index in inside if boxes[index].offsets[dim] + boxes[index].sizes[dim] > start]
        while added < len(by_offset) and boxes[by_offset[added]].offsets[dim] <= start:
            inside.append(by_offset[added])
            added += 1
        yield _Slab(start, stop, inside)


def step_budget(boxes: int) -> list[int]:
    """Return the number of steps that ``check_cover`` may take, since a few boxes can overlap in very many ways."""
    return [_STEPS + _STEPS_PER_BOX * boxes]


def check_cover(key: str, shape: tuple[int, ...], boxes: Sequence[Box], steps: list[int]) -> None:
    """Raise ``FormatError`` unless ``boxes`` cover every element of ``shape`` exactly once.

    The error names the rows or ranges that no box covers, or that several boxes cover. ``steps`` comes from
    ``step_budget`` and bounds the work over all tensors of a checkpoint.
    """
    for box in boxes:
        if not len(box.offsets) == len(box.sizes) == len(shape):
            raise FormatError(f"{quoted(key)}: a chunk at {_list(box.offsets)} of size {_list(box.sizes)} "
                              f"does not have the {len(shape)} dimensions of the tensor")  # fmt: skip
        if any(at + n > size for at, n, size in zip(box.offsets, box.sizes, shape, strict=True)):
            raise FormatError(f"{quoted(key)}: a chunk at {_list(box.offsets)} of size {_list(box.sizes)} "
                              f"reaches outside the shape {_list(shape)}")  # fmt: skip
    if 0 not in shape:
        _check_inside(
            key, shape, boxes, [index for index, box in enumerate(boxes) if 0 not in box.sizes], [], steps=steps
        )


def _check_inside(
    key: str, shape: tuple[int, ...], boxes: Sequence[Box], among: list[int], ranges: list[tuple[int, int]],
    *, steps: list[int],
) -> None:  # fmt: skip
    dim = len(ranges)
    if len(among) == 1 and boxes[among[0]].sizes[dim:] == shape[dim:]:
        return
    if not among or dim == len(shape):
        covered = "no chunk" if not among else f"{len(among)} chunks"
        raise FormatError(f"{quoted(key)}: {_ranges(ranges, shape)} covered by {covered}")
    for start, stop, inside in _slabs(boxes, among, dim, shape[dim]):
        steps[0] -= 1 + len(inside)
        if steps[0] < 0:
            raise FormatError(f"{quoted(key)}: the chunks overlap in too many ways to be checked")
        _check_inside(key, shape, boxes, inside, [*ranges, (start, stop)], steps=steps)


def _ranges(ranges: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> str:
    if not ranges:
        return "the only element is" if not shape else "the whole tensor is"
    parts = []
    all_single = True
    for dim, (start, stop) in enumerate(ranges):
        if dim > 0 and (start, stop) == (0, shape[dim]):
            continue
        noun = "row" if dim == 0 else "column" if len(shape) == 2 else "index"
        single = stop - start == 1
        all_single = all_single and single
        plural = noun if single else "indices" if noun == "index" else f"{noun}s"
        span = f"{start}" if single else f"{start}-{stop - 1}"
        parts.append(f"{plural} {span}" + (f" of dimension {dim}" if noun == "index" else ""))
    return f"{', '.join(parts)} {'is' if all_single and len(parts) == 1 else 'are'}"


def _list(numbers: Sequence[int]) -> str:
    return str(list(numbers))[:80]


@dataclass(frozen=True, slots=True)
class InMemory:
    """A region of bytes in memory."""

    data: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[memoryview]:
        """Yield all bytes at once."""
        yield self.data

    def slice(self, start: int, nbytes: int) -> InMemory:
        """Return the ``nbytes`` bytes from byte ``start``."""
        return InMemory(self.data[start : start + nbytes])


class Block(NamedTuple):
    """A box, and a function that opens its bytes in row-major order."""

    box: Box
    open: Callable[[], Payload]


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """The contiguous bytes of a tensor that is stored in blocks.

    ``check_cover`` has checked the blocks, and no block is empty. ``width`` is the bytes of an element.
    """

    shape: tuple[int, ...]
    width: int
    blocks: tuple[Block, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.width

    def slice(self, start: int, nbytes: int) -> Payload:
        """Return the ``nbytes`` bytes from byte ``start``; the blocks of the bytes before them are read too."""
        if start or nbytes != self.nbytes:
            return Part(self, start, nbytes)
        return self.blocks[0].open() if len(self.blocks) == 1 else self

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        """Yield the bytes in row-major order. Memory is bounded by a few chunks, not by the size of the tensor."""
        if self.nbytes:
            yield from _Assembly(self).emit(0, list(range(len(self.blocks))))


class _Assembly:
    """One pass over the blocks of a tensor, with the number of bytes read from each block."""

    def __init__(self, tensor: BlockTensor) -> None:
        self.shape, self.width, self.blocks = tensor.shape, tensor.width, tensor.blocks
        self.boxes = [block.box for block in tensor.blocks]
        self.regions: dict[int, Region] = {}
        self.done = [0] * len(tensor.blocks)
        self.buffer = bytearray()

    def emit(self, dim: int, among: list[int]) -> Iterator[bytes | bytearray | memoryview]:
        """Yield the bytes of the given blocks at one index of each dimension before ``dim``."""
        if len(among) == 1 and self.boxes[among[0]].sizes[dim:] == self.shape[dim:]:
            yield from self.take(among[0], math.prod(self.shape[dim:]) * self.width).chunks()
            return
        row = math.prod(self.shape[dim + 1 :]) * self.width
        for start, stop, inside in _slabs(self.boxes, among, dim, self.shape[dim]):
            if len(inside) == 1 and self.boxes[inside[0]].sizes[dim + 1 :] == self.shape[dim + 1 :]:
                yield from self.take(inside[0], (stop - start) * row).chunks()
            elif row > CHUNK:
                for _ in range(start, stop):
                    yield from self.emit(dim + 1, inside)
            else:
                for first in range(start, stop, CHUNK // row):
                    yield self.join_rows(dim, inside, min(CHUNK // row, stop - first), row)

    def take(self, index: int, nbytes: int) -> Payload:
        """Return the next bytes of a block."""
        if index not in self.regions:
            payload = self.blocks[index].open()
            if nbytes == payload.nbytes:
                return payload
            # A block without random access, such as a block of a transposed tensor, is read once and kept in memory.
            self.regions[index] = payload if is_seekable(payload) else InMemory(memoryview(_read_all(payload)))
        region, start = self.regions[index], self.done[index]
        self.done[index] += nbytes
        if self.done[index] == region.nbytes:
            del self.regions[index]
        return region.slice(start, nbytes)

    def join_rows(self, dim: int, inside: list[int], rows: int, row: int) -> memoryview:
        """Return ``rows`` rows in one buffer. The elements of each row are in several blocks."""
        if len(self.buffer) < rows * row:
            self.buffer = bytearray(rows * row)
        out = memoryview(self.buffer)[: rows * row]
        steps = [math.prod(self.shape[later + 1 :]) * self.width for later in range(dim, len(self.shape))]
        for index in inside:
            offsets, sizes = self.boxes[index].offsets[dim + 1 :], (rows, *self.boxes[index].sizes[dim + 1 :])
            count = math.prod(sizes) * self.width
            data = memoryview(_read_all(self.take(index, count)))
            at = sum(offset * step for offset, step in zip(offsets, steps[1:], strict=True))
            strides = [step * self.width for step in row_major(sizes)]
            copy_runs(out[at:], data, *loops_of(sizes, steps, strides, self.width))
        return out


def _read_all(payload: Payload) -> bytes:
    return b"".join(bytes(chunk) for chunk in payload.chunks())
