"""Threads and reusable buffers for arithmetic over the chunks of tensors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ckptkit.core.closing import Closing
from ckptkit.core.torch_types import Tensor

if TYPE_CHECKING:
    import torch

__all__ = ["Workspace"]

_PIECE = 1 << 17  # numbers; a float64 copy of this many stays in the cache
_MIN_TO_SHARE = 1 << 15  # numbers; torch itself uses one thread for fewer
_MAX_THREADS = 8


class Workspace(Closing):
    """Threads, one for each processor, and the buffers of each thread.

    One workspace serves all tensors of a checkpoint, one after another. Close it, or use it as a context manager.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Use ``threads`` threads; by default one for each processor of this process, but at most 8."""
        self._threads = threads or min(len(os.sched_getaffinity(0)), _MAX_THREADS)
        self._pool: ThreadPoolExecutor | None = None
        self._local = threading.local()

    def share(self, work: Callable[[Tensor], None], numbers: Tensor) -> None:
        """Call ``work`` with each piece of ``numbers``, in the threads; pieces have a bounded size."""
        if numbers.numel() < _MIN_TO_SHARE:
            work(numbers)
            return
        if self._pool is None:
            import torch

            # On a busy machine the threads that torch starts inside an operation wait for each other much longer than
            # the operation takes.
            self._pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))
            self._torch_threads = torch.get_num_threads()
        pieces = [numbers[start : start + _PIECE] for start in range(0, numbers.numel(), _PIECE)]
        for _ in self._pool.map(work, pieces):
            pass

    def buffer(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return a buffer for ``count`` numbers; it reuses the memory of this thread's earlier buffer of that name."""
        import torch

        found: Tensor | None = getattr(self._local, name, None)
        if found is None or found.dtype is not dtype:
            found = torch.empty(_PIECE, dtype=dtype, device="cpu")
            setattr(self._local, name, found)
        return found[:count]

    def close(self) -> None:
        """End the threads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            import torch

            pool.shutdown()
            torch.set_num_threads(self._torch_threads)  # otherwise later threads would use only one
