"""Random numbers for each element of a tensor, which depend on nothing but the seed, the key, the input and the index.

Any part of a tensor has the same numbers in any piece, thread and shard: element j of a stream is the j-th number of
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), begun at a hash of the names.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import TYPE_CHECKING, Final

from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["BLOCK", "bound_of", "mix", "stream"]

BLOCK: Final = 1 << 15  # numbers that are computed together, so that their scratch buffers stay in the cache
_LEVELS: Final = 1 << 24  # values of a random number, as many as float32 has between 0 and 1
_STEP: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_WORD: Final = (1 << 64) - 1


def stream(seed: int, key: str, number: int) -> int:
    """Return where the random numbers of a tensor begin: its output key, and the number of the input, from 1."""
    text = f"{seed}\0{key}\0{number}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text).digest()[:8], "little")


def bound_of(probability: float) -> int:
    """Return the number below which the upper 24 bits of a random number are with ``probability``, from 0 to 1."""
    return math.ceil(probability * _LEVELS)


def mix(begin: int, start: int, count: int, workers: Workers) -> npt.NDArray[np.uint64]:
    """Return the random numbers of ``count`` elements, at most ``BLOCK``, of the stream that begins at ``begin``.

    Element ``start`` is the first. Only the upper 24 bits of each number are those of SplitMix64. The array is a buffer
    of this thread.
    """
    import numpy as np

    out = workers.buffer("random", np.uint64, count)
    shifted = workers.buffer("random, shifted", np.uint64, count)
    np.add(_multiples()[:count], np.uint64((begin + start * _STEP) & _WORD), out=out)
    np.right_shift(out, np.uint64(30), out=shifted)
    np.bitwise_xor(out, shifted, out=out)
    np.multiply(out, np.uint64(_FIRST), out=out)
    np.right_shift(out, np.uint64(27), out=shifted)
    np.bitwise_xor(out, shifted, out=out)
    np.multiply(out, np.uint64(_SECOND), out=out)  # the last step of SplitMix64 changes only the lower 33 bits
    return out


@functools.cache
def _multiples() -> npt.NDArray[np.uint64]:
    import numpy as np

    made = np.arange(1, BLOCK + 1, dtype=np.uint64)
    np.multiply(made, np.uint64(_STEP), out=made)
    made.flags.writeable = False
    return made
