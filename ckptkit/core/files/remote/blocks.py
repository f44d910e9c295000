"""The bytes of remote files that are held in memory: at most 64 MB a process, least recently used ones go first."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from concurrent.futures import Future
from typing import Final

from ckptkit.core.files.remote.running import on_fork

__all__ = ["MOST_HELD", "Block", "FileBlocks", "held"]

MOST_HELD: Final = 64 << 20


class Block:
    """A range of a file that was fetched, or is being fetched."""

    __slots__ = ("data", "end", "future", "start", "unread", "users")

    def __init__(self, start: int, data: bytes | bytearray) -> None:
        """Take the offset, and the bytes or the memory for them."""
        self.start = start
        self.end = start + len(data)
        self.data = data
        self.future: Future[None] | None = None  # of bytes that are being fetched
        self.unread = len(data)
        self.users = 0  # threads that wait for it or copy from it

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

    def gap(self, offset: int, end: int) -> int:
        """Return where the bytes end that no block holds, from ``offset`` to at most ``end``."""
        number = bisect_left(self._starts, offset)
        return min(end, self._starts[number]) if number < len(self._starts) else end

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

    def has_room(self, nbytes: int) -> bool:
        """Return whether so many more bytes may be held; blocks that nobody uses are dropped for them."""
        if self.nbytes + nbytes <= MOST_HELD:
            return True
        for block in list(self._owners):
            if not block.users and block.is_done:
                self.drop(block)
                if self.nbytes + nbytes <= MOST_HELD:
                    return True
        return False

    def add(self, block: Block, owner: FileBlocks) -> None:
        """Hold a block of a file."""
        owner.add(block)
        self._owners[block] = owner
        self.nbytes += block.nbytes

    def use(self, block: Block) -> None:
        """Keep a block until it is left, and mark it as the most recently used."""
        block.users += 1
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
