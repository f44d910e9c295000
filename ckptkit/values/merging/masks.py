"""Random numbers for each element of a tensor, which depend on nothing but the seed, the key, the input and the index.

Any part of a tensor has the same numbers in any piece, thread and shard: element j of a stream is the j-th number of
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), begun at a hash of the names. The numbers of torch depend on how many
were drawn before, too.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["BLOCK", "RandomNumbers", "Stream", "TorchStream", "bound_of"]

BLOCK: Final = 1 << 15  # numbers that are computed together, so that their scratch buffers stay in the cache
_LEVELS: Final = 1 << 24  # values of a random number, as many as float32 has between 0 and 1
_STEP: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_WORD: Final = (1 << 64) - 1
_TAKEN: Final = 1 << 18  # numbers of the Mersenne Twister between two states that are kept


class RandomNumbers(ABC):
    """The random numbers of the elements of one task vector."""

    __slots__ = ()

    @abstractmethod
    def of(self, start: int, count: int, workers: Workers) -> npt.NDArray[np.uint64]:
        """Return the numbers of ``count`` elements from ``start`` on, at most ``BLOCK``, in a buffer of this thread.

        Their upper 24 bits are random.
        """


@dataclass(frozen=True, slots=True)
class Stream(RandomNumbers):
    """Numbers of SplitMix64 from the state ``begin`` on."""

    begin: int

    @classmethod
    def named(cls, seed: int, key: str, number: int) -> Stream:
        """Return the numbers of a tensor: of its key in the output, and of the number of the input, from 1."""
        text = f"{seed}\0{key}\0{number}".encode("utf-8", "surrogateescape")
        return cls(int.from_bytes(hashlib.blake2b(text).digest()[:8], "little"))

    def of(self, start: int, count: int, workers: Workers) -> npt.NDArray[np.uint64]:
        """Return numbers of which only the upper 24 bits are those of SplitMix64."""
        import numpy as np

        out = workers.buffer("random", np.uint64, count)
        shifted = workers.buffer("random, shifted", np.uint64, count)
        np.add(_multiples()[:count], np.uint64((self.begin + start * _STEP) & _WORD), out=out)
        np.right_shift(out, np.uint64(30), out=shifted)
        np.bitwise_xor(out, shifted, out=out)
        np.multiply(out, np.uint64(_FIRST), out=out)
        np.right_shift(out, np.uint64(27), out=shifted)
        np.bitwise_xor(out, shifted, out=out)
        np.multiply(out, np.uint64(_SECOND), out=out)  # the last step of SplitMix64 changes only the lower 33 bits
        return out


@dataclass(frozen=True, slots=True)
class TorchStream(RandomNumbers):
    """The numbers that ``torch.bernoulli`` takes on the CPU after ``drawn`` others, from a seed on."""

    seed: int
    drawn: int

    def of(self, start: int, count: int, workers: Workers) -> npt.NDArray[np.uint64]:
        """Return the lower 24 bits of the numbers of the Mersenne Twister, as upper bits."""
        import numpy as np

        out = workers.buffer("random", np.uint64, count)
        np.copyto(out, _twister(self.seed).numbers(self.drawn + start, count))
        np.left_shift(out, np.uint64(40), out=out)
        return out


def bound_of(probability: float) -> int:
    """Return the number below which the upper 24 bits of a random number are with ``probability``, from 0 to 1."""
    return math.ceil(probability * _LEVELS)


@functools.cache
def _multiples() -> npt.NDArray[np.uint64]:
    import numpy as np

    made = np.arange(1, BLOCK + 1, dtype=np.uint64)
    np.multiply(made, np.uint64(_STEP), out=made)
    made.flags.writeable = False
    return made


class _Twister:
    """The numbers of the Mersenne Twister from a seed on, at any place; torch and numpy seed it in the same way."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._lock = threading.Lock()
        first = np.random.RandomState(seed & 0xFFFFFFFF)
        self._states: list[Any] = [first.get_state(legacy=False)]  # one for each _TAKEN numbers

    def numbers(self, start: int, count: int) -> npt.NDArray[np.uint64]:
        import numpy as np

        twister = np.random.MT19937(0)
        with self._lock:
            while len(self._states) <= start // _TAKEN:
                twister.state = self._states[-1]
                twister.random_raw(_TAKEN, output=False)
                self._states.append(twister.state)
        twister.state = self._states[start // _TAKEN]
        twister.random_raw(start % _TAKEN, output=False)
        raw: npt.NDArray[np.uint64] = twister.random_raw(count)  # any version of numpy has the same numbers here
        return raw


@functools.lru_cache(maxsize=2)
def _twister(seed: int) -> _Twister:
    return _Twister(seed)
