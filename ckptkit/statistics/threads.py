"""What arithmetic over chunks is done with: threads that share the work, and buffers that are used again."""

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

_PIECE = 1 << 17  # numbers of which a copy in float64 stays in the cache
_ALONE = 1 << 15  # below this torch itself uses one thread
_MOST_THREADS = 8


class Workspace(Closing):
    """Threads, one for each processor, and the buffers of each.

    One workspace serves all tensors of a checkpoint, one after the other. Close it, or use it as a context manager.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Get ready; of ``threads`` there are by default as many as this process has processors, and 8 at most."""
        self._threads = threads or min(len(os.sched_getaffinity(0)), _MOST_THREADS)
        self._pool: ThreadPoolExecutor | None = None
        self._local = threading.local()

    def share(self, work: Callable[[Tensor], None], numbers: Tensor) -> None:
        """Call ``work`` with all of ``numbers``, in pieces of bounded size, each in one of the threads."""
        if numbers.numel() < _ALONE:
            work(numbers)
            return
        if self._pool is None:
            import torch

            # Where others use the processors, threads that torch starts inside an operation wait for each other many
            # times longer than the operation takes.
            self._pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))
            self._before = torch.get_num_threads()
        pieces = [numbers[start : start + _PIECE] for start in range(0, numbers.numel(), _PIECE)]
        for _ in self._pool.map(work, pieces):
            pass

    def buffer(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return room for ``count`` numbers of a piece; what this thread got under that name before is overwritten."""
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
            torch.set_num_threads(self._before)  # threads that are yet to come would have the one of ours
