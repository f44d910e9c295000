"""Bytes on their way to a store: put in order, cut into parts, and sent by threads while the next ones are made.

All calls of a store are made in these threads. A signal interrupts only the main thread, which then ends the transfer
when the call is over: a transfer that has begun is always known, and can be removed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from ckptkit.core.files.remote.traffic import Meter
from ckptkit.formats.writing.stores.transfers import Transfer

__all__ = ["Sending"]

_Result = TypeVar("_Result")


class Sending:
    """One file that is sent. Several threads may write at once, each into a range of its own, in roughly this order.

    Bytes that come before those in front of them wait in memory; the threads that compute are never far apart. At most
    ``at_once`` parts of the transfer are sent at the same time, while one more is filled.
    """

    def __init__(self, transfer: Transfer, size: int, meter: Meter) -> None:
        """Take the transfer, the number of bytes, and what counts the bytes; nothing is sent yet."""
        self._meter = meter
        self._transfer = transfer
        self._size = size
        self._lock = threading.Lock()
        self._early: dict[int, bytes] = {}
        self._filled = bytearray()
        self._position = 0  # bytes that are in a part
        self._number = 0  # of the part that is filled
        self._free = threading.Semaphore(transfer.at_once)
        self._pool = ThreadPoolExecutor(transfer.at_once)
        self._sent: set[Future[Any]] = set()  # also other calls, which are not waited for if a signal comes

    def call(self, work: Callable[[], _Result]) -> _Result:
        """Return the result of a call of the store, made in a thread."""
        future = self._pool.submit(work)
        self._sent.add(future)
        result = future.result()
        self._sent.discard(future)
        return result

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Take bytes; wait where too many parts are being sent. Raises what sending an earlier part raised."""
        with self._lock:
            if offset != self._position:
                self._early[offset] = bytes(data)
                return
            self._append(memoryview(data))
            while (early := self._early.pop(self._position, None)) is not None:
                self._append(memoryview(early))

    def _append(self, data: memoryview) -> None:
        part = self._transfer.part
        done = 0
        while done < len(data):
            count = min(part - len(self._filled), len(data) - done)
            self._filled += data[done : done + count]
            done += count
            if len(self._filled) == part:
                self._send_filled()
        self._position += done

    def _send_filled(self) -> None:
        filled, number = bytes(self._filled), self._number  # libraries copy a bytearray again
        self._filled, self._number = bytearray(), number + 1
        self._free.acquire()
        self._raise_failure()
        self._sent.add(self._pool.submit(self._send, number, filled))

    def _send(self, number: int, part: bytes) -> None:
        try:
            self._transfer.send(number, part)
            self._meter.add(sent=len(part))
        finally:
            self._free.release()

    def _raise_failure(self) -> None:
        for future in [future for future in self._sent if future.done()]:
            self._sent.discard(future)
            future.result()

    def finish(self) -> None:
        """Send the rest and wait for all parts. Raises what sending a part raised."""
        assert self._position == self._size, "a range of the output was not written"  # noqa: S101
        if self._filled or not self._size:
            self._send_filled()
        done, _ = wait(self._sent, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        self._sent.clear()
        self.call(self._transfer.close)

    def stop(self, remove: Callable[[], _Result]) -> _Result:
        """Send no other part, wait for those that are being sent, and return the result of ``remove``.

        A thread does all of it, so a second signal does not interrupt it.
        """
        for future in self._sent:
            future.cancel()

        def wait_and_remove() -> _Result:
            wait(self._sent)
            return remove()

        return self._pool.submit(wait_and_remove).result()

    def end_threads(self) -> None:
        """End the threads; a later call begins new ones."""
        pool, self._pool = self._pool, ThreadPoolExecutor(self._transfer.at_once)
        pool.shutdown()
