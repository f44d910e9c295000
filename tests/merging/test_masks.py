"""Random numbers of masks: the numbers of the specification, and their independence of everything but their names."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from ckptkit.values.merging.masks import BLOCK, Stream, TorchStream, bound_of
from ckptkit.values.workers import Workers

WORD = (1 << 64) - 1


def uniform(seed: int, key: str, number: int, start: int, count: int) -> Any:
    """Return the random numbers between 0 and 1 of some elements."""
    return (Stream.named(seed, key, number).of(start, count, Workers(1)) >> np.uint64(40)) / 2.0**24


def test_the_first_numbers_are_those_of_the_specification() -> None:
    assert uniform(0, "l.0.w", 1, 0, 3) == pytest.approx([0.63368249, 0.83465183, 0.85666496], abs=1e-8)


def test_numbers_are_those_of_splitmix64() -> None:
    """The upper 24 bits of each number are those of the definition, computed one by one."""
    state, wanted = Stream.named(7, "a.b", 3).begin, []
    for _ in range(200):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        value = state
        value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & WORD
        value = ((value ^ value >> 27) * 0x94D049BB133111EB) & WORD
        wanted.append((value ^ value >> 31) >> 40)
    assert (Stream.named(7, "a.b", 3).of(0, 200, Workers(1)) >> np.uint64(40)).tolist() == wanted


def test_a_number_depends_only_on_its_index() -> None:
    """Elements far behind the first, and around the end of 64 bits, are the same in any piece."""
    far = 1 << 40
    whole = uniform(1, "w", 2, far, 3000)
    parts = [
        uniform(1, "w", 2, far + start, stop - start) for start, stop in itertools.pairwise([0, 1, 17, 2999, 3000])
    ]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
def test_the_share_that_is_kept_is_the_density(density: float) -> None:
    count = 0
    for piece in range(8):
        numbers = Stream.named(3, "w", 1).of(piece * BLOCK, BLOCK, Workers(1))
        count += int(np.count_nonzero(numbers < np.uint64(bound_of(density) << 40)))
    size = 8 * BLOCK
    assert abs(count - density * size) < 5 * math.sqrt(density * (1 - density) * size)


def test_masks_of_other_names_are_independent() -> None:
    """Two masks agree as often as two that are drawn anew, for another seed, key or input."""
    first = uniform(0, "w", 1, 0, BLOCK) < 0.5
    for other in ((1, "w", 1), (0, "v", 1), (0, "w", 2), (0, "w1", 1)):
        agreeing = int(np.count_nonzero(first == (uniform(*other, 0, BLOCK) < 0.5)))
        assert abs(agreeing - BLOCK / 2) < 5 * math.sqrt(BLOCK / 4), other


def test_a_name_of_bytes_that_are_not_text_has_a_stream() -> None:
    assert Stream.named(0, "w\udcff", 1) != Stream.named(0, "w", 1)


@pytest.mark.parametrize("seed", [0, 42, -1, (1 << 40) + 5])
def test_numbers_of_torch_are_those_of_bernoulli(seed: int) -> None:
    """Also far from the first number, and in any order of the pieces."""
    drawn, probability = 270_000, 0.3
    wanted = torch.bernoulli(torch.full((drawn,), probability), generator=torch.Generator().manual_seed(seed)).bool()
    bound = np.uint64(bound_of(float(np.float32(probability))) << 40)
    for before, start in ((0, drawn - 5000), (0, 0), (1000, 261_000)):
        numbers = TorchStream(seed, before).of(start, 5000, Workers(1))
        first = before + start
        assert (torch.from_numpy(numbers < bound) == wanted[first : first + 5000]).all()
