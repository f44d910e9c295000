"""A tensor in blocks is refused unless the blocks cover it exactly, and reads as the whole tensor."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.core.files.local import LocalFile
from ckptkit.core.files.payloads import CHUNK, Extent
from ckptkit.errors import FormatError
from ckptkit.formats.layout import Block, BlockTensor, Box, InMemory, check_cover, step_budget
from tests.helpers_formats import bits, random_tensor

WIDTHS = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.int64, 16: torch.complex128}


def cover(shape: tuple[int, ...], boxes: list[Box]) -> None:
    check_cover("w", shape, boxes, step_budget(len(boxes)))


def cut(box: Box, depth: int, chance: random.Random) -> list[Box]:
    """Return the boxes of a random recursive division of a box."""
    dims = [dim for dim, size in enumerate(box.sizes) if size > 1]
    if not depth or not dims:
        return [box]
    dim = chance.choice(dims)
    at = chance.randint(1, box.sizes[dim] - 1)

    def part(start: int, size: int) -> Box:
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim] += start
        sizes[dim] = size
        return Box(tuple(offsets), tuple(sizes))

    halves = cut(part(0, at), depth - 1, chance) + cut(part(at, box.sizes[dim] - at), depth - 1, chance)
    return chance.sample(halves, len(halves))


def blocks_of(tensor: torch.Tensor, boxes: list[Box]) -> BlockTensor:
    def block(box: Box) -> Block:
        part = tensor[tuple(slice(at, at + n) for at, n in zip(*box, strict=True))]
        return Block(box, lambda: InMemory(memoryview(bits(part))))

    return BlockTensor(tuple(tensor.shape), tensor.element_size(), tuple(block(box) for box in boxes))


def joined(tensor: BlockTensor) -> bytes:
    return b"".join(bytes(piece) for piece in tensor.chunks())


shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@settings(deadline=None, max_examples=200)
@given(shape=shapes, seed=st.integers(0, 2**32), depth=st.integers(0, 5), width=st.sampled_from(sorted(WIDTHS)))
def test_any_division_reads_as_the_whole_tensor(shape: tuple[int, ...], seed: int, depth: int, width: int) -> None:
    tensor = random_tensor(WIDTHS[width], shape, seed)
    boxes = cut(Box((0,) * len(shape), shape), depth, random.Random(seed))  # noqa: S311
    cover(shape, boxes)
    blocks = blocks_of(tensor, boxes)
    assert blocks.nbytes == len(bits(tensor))
    assert joined(blocks) == bits(tensor)
    assert joined(blocks) == bits(tensor), "a second reading begins anew"


@settings(deadline=None, max_examples=300)
@given(shape=shapes, seed=st.integers(0, 2**32), depth=st.integers(0, 5), data=st.data())
def test_boxes_pass_only_where_every_element_is_in_one(
    shape: tuple[int, ...], seed: int, depth: int, data: st.DataObject
) -> None:
    boxes = cut(Box((0,) * len(shape), shape), depth, random.Random(seed))  # noqa: S311
    for _ in range(data.draw(st.integers(0, 2))):
        index = data.draw(st.integers(0, len(boxes) - 1))
        kind = data.draw(st.sampled_from(["drop", "double", "move", "resize"]))
        offsets, sizes = list(boxes[index].offsets), list(boxes[index].sizes)
        if kind == "drop" and len(boxes) > 1:
            del boxes[index]
        elif kind == "double":
            boxes.append(boxes[index])
        elif shape:
            dim = data.draw(st.integers(0, len(shape) - 1))
            changed = offsets if kind == "move" else sizes
            changed[dim] = max(changed[dim] + data.draw(st.integers(-2, 2)), 0)
            boxes[index] = Box(tuple(offsets), tuple(sizes))
    seen = torch.zeros(shape, dtype=torch.int64)
    outside = False
    for box in boxes:
        seen[tuple(slice(at, at + n) for at, n in zip(*box, strict=True))] += 1
        outside |= any(at + n > size for at, n, size in zip(*box, shape, strict=True))
    if bool((seen == 1).all()) and not outside:
        cover(shape, boxes)
    else:
        with pytest.raises(FormatError, match=r"^'w': .*(covered by (no chunk|\d+ chunks)|outside the shape)"):
            cover(shape, boxes)


REFUSED: dict[str, tuple[tuple[int, ...], list[Box], str]] = {
    "hole in the middle": ((9, 2), [Box((0, 0), (4, 2)), Box((7, 0), (2, 2))], "rows 4-6 are covered by no chunk"),
    "hole at the end": ((9, 2), [Box((0, 0), (8, 2))], "row 8 is covered by no chunk"),
    "no chunk": ((9, 2), [], "the whole tensor is covered by no chunk"),
    "no chunk of a scalar": ((), [], "the only element is covered by no chunk"),
    "hole in columns": ((2, 9), [Box((0, 0), (2, 3)), Box((0, 5), (2, 4))], "rows 0-1, columns 3-4 are covered by no"),
    "corner": (
        (2, 2),
        [Box((0, 0), (1, 2)), Box((1, 0), (1, 1))],
        "row 1, column 1 are covered by no chunk",
    ),
    "deep": (
        (2, 3, 4),
        [Box((0, 0, 0), (2, 3, 2)), Box((0, 0, 3), (2, 3, 1))],
        "rows 0-1, index 2 of dimension 2 are covered by no chunk",
    ),
    "overlap": ((9,), [Box((0,), (5,)), Box((4,), (5,))], "row 4 is covered by 2 chunks"),
    "overlap of columns": (
        (2, 3),
        [Box((0, 0), (2, 2)), Box((0, 1), (2, 2))],
        "rows 0-1, column 1 are covered by 2 chunks",
    ),
    "twice a scalar": ((), [Box((), ()), Box((), ())], "the only element is covered by 2 chunks"),
    "outside": ((9, 2), [Box((4, 0), (6, 2))], r"a chunk at \[4, 0\] of size \[6, 2\] reaches outside the shape"),
    "dimensions": ((9, 2), [Box((0,), (9,))], r"does not have the 2 dimensions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_ranges(case: str) -> None:
    shape, boxes, reason = REFUSED[case]
    with pytest.raises(FormatError, match=reason):
        cover(shape, boxes)


def test_empty_boxes_cover_nothing() -> None:
    cover((0, 3), [])
    cover((0, 3), [Box((0, 0), (0, 3)), Box((0, 0), (0, 3))])
    cover((1, 3), [Box((0, 0), (1, 3)), Box((1, 0), (0, 3)), Box((1, 0), (0, 3))])


def test_boxes_that_overlap_in_too_many_ways_are_refused_early() -> None:
    side = 4000
    steps = [Box((0, at), (at + 1, 1)) for at in range(side)]
    steps += [Box((at + 1, at), (side - at - 1, 1)) for at in range(side - 1)]
    budget = step_budget(len(steps))
    with pytest.raises(FormatError, match="overlap in too many ways"):
        check_cover("w", (side, side), steps, budget)


def test_a_grid_of_any_size_is_within_the_budget() -> None:
    boxes = [Box((row, column), (1, 1)) for row, column in itertools.product(range(200), range(200))]
    cover((200, 200), boxes)


@pytest.mark.parametrize("dim", [1, 2])
def test_rows_longer_than_a_piece_are_joined_in_bounded_memory(tmp_path: Path, dim: int) -> None:
    """A tensor of 48 MB in two blocks, whose rows are larger than a piece, needs little memory."""
    shape = (2, 6, CHUNK // 4)
    tensor = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    near = shape[dim] // 2 - 1
    parts = [tensor.narrow(dim, 0, near), tensor.narrow(dim, near, shape[dim] - near)]
    path = tmp_path / "blocks"
    path.write_bytes(b"".join(part.contiguous().numpy().tobytes() for part in parts))
    file = LocalFile(str(path))
    first = Extent(file, 0, parts[0].nbytes)
    second = Extent(file, first.nbytes, parts[1].nbytes)
    start = tuple(near if here == dim else 0 for here in range(3))
    boxes = [Box((0, 0, 0), tuple(parts[0].shape)), Box(start, tuple(parts[1].shape))]
    cover(shape, boxes)
    blocks = BlockTensor(shape, 4, (Block(boxes[0], lambda: first), Block(boxes[1], lambda: second)))
    expected, at = memoryview(tensor.numpy().tobytes()), 0
    tracemalloc.start()
    try:
        for piece in blocks.chunks():
            assert expected[at : at + len(piece)] == piece
            at += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        file.close()
    assert at == len(expected)
    assert peak < 5 * CHUNK
