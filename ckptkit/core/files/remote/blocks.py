"""The bytes of remote files that are held in memory: at most 64 MB a process, least recently used ones go first."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from ckptkit.core.files.remote.running import on_fork

__all__ = ["MOST_HELD", "Block", "FileBlocks", "held"]

MOST_HELD: Final = 64 << 20
_MOST_AHEAD: Final = 48 << 20  # bytes that nobody has asked for yet; the rest is for what is asked for now
_SECONDS: Final = 60.0  # after which what was announced, and was not read, is not expected any more


class Block:
    """A range of a file that was fetched, or is being fetched."""

    __slots__ = ("data", "end", "future", "is_ahead", "since", "start", "unread", "users")

    def __init__(self, start: int, data: bytes | bytearray) -> None:
        """Take the offset, and the bytes or the memory for them."""
        self.start = start
        self.end = start + len(data)
        self.data = data
        self.future: Future[None] | None = None  # of bytes that are being fetched
        self.unread = len(data)
        self.users = 0  # threads that wait for it or copy from it
        self.is_ahead = False  # it was announced, and nobody has read it yet
        self.since = time.monotonic()

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.end - self.start

    @property
    def is_done(self) -> bool:
        """Return whether the bytes are here, or could not be fetched."""
        return self.future is None or self.future.done()


class FileBlocks:
    """The blocks of one file, which do not overlap."""

    def __init__(self) -> None:
        """Begin without blocks."""
        self._starts: list[int] = []
        self._blocks: dict[int, Block] = {}

    def at(self, offset: int) -> Block | None:
        """Return the block that holds the byte at ``offset``."""
        number = bisect_right(self._starts, offset) - 1
        block = self._blocks[self._starts[number]] if number >= 0 else None
        return block if block is not None and offset < block.end else None

    def after(self, offset: int) -> Block | None:
        """Return the first block that begins at ``offset`` or later."""
        number = bisect_left(self._starts, offset)
        return self._blocks[self._starts[number]] if number < len(self._starts) else None

    def add(self, block: Block) -> None:
        """Add a block."""
        insort(self._starts, block.start)
        self._blocks[block.start] = block

    def remove(self, block: Block) -> None:
        """Remove a block."""
        if self._blocks.get(block.start) is block:
            del self._blocks[block.start]
            del self._starts[bisect_left(self._starts, block.start)]

    def all(self) -> list[Block]:
        """Return the blocks in the order of the file."""
        return [self._blocks[start] for start in self._starts]


class Held:
    """All blocks of the process. ``lock`` guards them, and the blocks of each file."""

    def __init__(self) -> None:
        """Hold nothing."""
        self.lock = threading.Lock()
        self.nbytes = 0
        self._owners: OrderedDict[Block, FileBlocks] = OrderedDict()
        self._waiting: dict[Callable[[], bool], float] = {}

    def has_room(self, nbytes: int, *, ahead: bool = False) -> bool:
        """Return whether so many more bytes may be held; blocks that nobody uses are dropped for them.

        For bytes that are fetched ``ahead``, no block is dropped that was fetched ahead itself and is not read yet.
        """
        most = _MOST_AHEAD if ahead else MOST_HELD
        if self.nbytes + nbytes <= most:
            return True
        now = time.monotonic()
        for block in list(self._owners):
            is_expected = ahead and block.is_ahead and now - block.since < _SECONDS
            if not block.users and block.is_done and not is_expected:
                self.drop(block)
                if self.nbytes + nbytes <= most:
                    return True
        return False

    def wait_for_room(self, fetch: Callable[[], bool]) -> None:
        """Call ``fetch`` when there is room, until it returns True; the first that waits comes first."""
        self._waiting.setdefault(fetch, time.monotonic())

    def fetch_waiting(self) -> None:
        """Fetch what waits for room."""
        now = time.monotonic()
        for fetch, since in list(self._waiting.items()):
            if now - since < _SECONDS and not fetch():
                return
            self._waiting.pop(fetch, None)

    def add(self, block: Block, owner: FileBlocks) -> None:
        """Hold a block of a file."""
        owner.add(block)
        self._owners[block] = owner
        self.nbytes += block.nbytes

    def use(self, block: Block) -> None:
        """Keep a block until it is left, and mark it as the most recently used."""
        block.users += 1
        block.is_ahead = False
        if block in self._owners:
            self._owners.move_to_end(block)

    def drop(self, block: Block) -> None:
        """Stop holding a block, and fetching it."""
        owner = self._owners.pop(block, None)
        if owner is not None:
            self.nbytes -= block.nbytes
            owner.remove(block)
            if block.future is not None:
                block.future.cancel()


held = Held()


@on_fork
def _forget() -> None:
    held.__init__()  # type: ignore[misc]
