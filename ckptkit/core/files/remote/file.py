"""A file of a store, which is open for reading."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Final

from ckptkit.core.files.remote.blocks import Block, FileBlocks, held
from ckptkit.core.files.remote.failures import NotFoundError, public_errors
from ckptkit.core.files.remote.kept import Opened, open_now
from ckptkit.core.files.remote.read_ahead import AHEAD, NEAR, PART, ReadAhead
from ckptkit.core.files.remote.running import finish, start
from ckptkit.core.files.remote.store import ObjectState, Store
from ckptkit.core.files.remote.stores import store_of
from ckptkit.errors import ChangedError, PathError

__all__ = ["RemoteFile"]


class RemoteFile:
    """A file of a store. Threads may read it at once."""

    is_remote: Final = True

    @public_errors()
    def __init__(self, url: str) -> None:
        """Open the file at a URL without credentials. Raises ``PathError`` where it is missing or cannot be read."""
        opened = open_now(url)
        self._url = url
        self._state = opened.state
        self._is_closed = False
        self._begin(opened)

    def _begin(self, opened: Opened) -> None:
        self._process = os.getpid()
        self._blocks = FileBlocks()
        self._ahead = ReadAhead(self.size)
        self._check: Future[ObjectState] | None = None
        with held.lock:
            for offset, data in opened.pieces:
                if data and held.has_room(len(data)):
                    held.add(Block(offset, data), self._blocks)

    @property
    def path(self) -> str:
        """The URL without credentials."""
        return self._url

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self._state.size

    @property
    def identity(self) -> Hashable:
        """The URL and the version of the object."""
        return self._url, self._state

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly ``count`` bytes. Raises ``ChangedError``, or ``PathError`` where the store does not answer."""
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    @public_errors()
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes from ``offset``. Raises the same errors as ``read``."""
        end = offset + len(buffer)
        if end > self.size:
            raise ChangedError("the file became shorter while it was read", path=self._url)
        if self._process != os.getpid():  # in a child process, nothing that was under way ever comes
            self._begin(Opened(self._state, ()))
        after: Iterator[tuple[int, int]] | None = None
        position = offset
        while position < end:
            with held.lock:
                self._refuse_closed()
                block = self._blocks.at(position) or self._begin_block(position, self._until(position, end))
                held.use(block)  # before anything else is held, for which this block could be dropped
                if after is None:  # reading the first bytes, which came unasked, does not show what is read next
                    is_first = block.future is None and end <= block.end
                    after = iter(()) if is_first else self._ahead.after(offset, end)
                if end > block.end:
                    self._fetch(block.end, min(self._until(block.end, end), position + AHEAD))
                if end <= position + AHEAD:
                    self._fetch_all(after)
                    after = iter(())
            position += self._copy(block, buffer[position - offset :], position)

    def _copy(self, block: Block, buffer: memoryview, position: int) -> int:
        """Copy what the block has for the buffer, and return how many bytes; 0 if it was given up meanwhile."""
        count = 0
        try:
            if block.future is not None:
                finish(block.future)
            count = min(block.end - position, len(buffer))
            begin = position - block.start
            buffer[:count] = memoryview(block.data)[begin : begin + count]
        except CancelledError:
            count = 0
        finally:
            with held.lock:
                block.users -= 1
                block.unread -= count
                if not count or (block.unread <= 0 and block.nbytes > NEAR):  # values are read once
                    held.drop(block)
                    held.fetch_waiting()
        return count

    def _until(self, position: int, end: int) -> int:
        """Return where a request for this range ends: it is not very small, unless that was announced."""
        if end - position < NEAR and not self._ahead.is_announced(position):
            return min(position + NEAR, self.size)
        return end

    def _begin_block(self, position: int, end: int) -> Block:
        """Begin to fetch what no block holds from ``position`` on, at most a part. The lock is held."""
        end = self._gap(position, end)
        held.has_room(end - position)
        block = Block(position, bytearray(end - position))
        held.add(block, self._blocks)
        block.future = start(self._store.fetch(self._url, position, memoryview(block.data), self._state))
        return block

    def _gap(self, position: int, end: int) -> int:
        """Return where a request for what no block holds from ``position`` on ends; it is at most a part.

        Small blocks inside the range are dropped: to fetch them again costs less than a request more.
        """
        end = min(end, position + PART)
        while (block := self._blocks.after(position)) is not None and block.start < end:
            if block.nbytes >= NEAR or block.end >= end or block.users or not block.is_done:
                return block.start
            held.drop(block)
        return end

    def _fetch(self, position: int, end: int) -> bool:
        """Begin to fetch what no block holds of a range that is read later; False where there is no room for all."""
        while position < end:
            block = self._blocks.at(position)
            if block is None:
                stop = self._gap(position, end)
                if not held.has_room(stop - position, ahead=True):
                    return False
                block = self._begin_block(position, stop)
                block.is_ahead = True
            position = block.end
        return True

    def _fetch_all(self, spans: Iterator[tuple[int, int]]) -> bool:
        return all(self._fetch(begin, end) for begin, end in spans)

    def _fetch_announced(self) -> bool:
        """Begin to fetch the first ranges that were announced; False where there is no room for them."""
        if self._is_closed or self._process != os.getpid():
            return True
        return self._fetch_all(self._ahead.next_announced())

    @property
    def _store(self) -> Store:
        return store_of(self._url)

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Take a hint: these ranges, as offset and number of bytes, are read next. The first are fetched now."""
        if self._process != os.getpid() or self._is_closed:
            return
        with held.lock:
            self._ahead.announce((offset, offset + count) for offset, count in ranges)
            held.wait_for_room(self._fetch_announced)
            held.fetch_waiting()

    @public_errors()
    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise ``ChangedError`` if the file changed since it was opened.

        A store that compares the version with each request is asked only with ``by_path``.
        """
        self._refuse_closed()
        if not by_path and self._store.pins and (self._state.etag or self._state.modified):
            return
        if self._process != os.getpid():
            self._begin(Opened(self._state, ()))
        asked, self._check = self._check, None  # an answer counts once, since the file may change after it
        try:
            now = finish(asked or start(self._store.state(self._url)))
        except NotFoundError:
            return
        self._store.check(self._url, self._state, now)

    def will_check(self) -> None:
        """Ask for the state of the file, which ``check_unchanged(by_path=True)`` takes; do not wait."""
        if self._process == os.getpid() and not self._is_closed:
            self._check = start(self._store.state(self._url))

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise PathError("the checkpoint was closed", hint="read it before it is closed", path=self._url)

    def close(self) -> None:
        """Drop what is held, and stop fetching. Closing twice is allowed."""
        with held.lock:
            self._is_closed = True
            for block in self._blocks.all():
                held.drop(block)
