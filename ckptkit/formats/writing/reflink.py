"""Blocks that an output shares with an input, on file systems that can: XFS, Btrfs and others. Nothing is copied.

A later change of one file never changes the other: the file system then gives the changed block a place of its own.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

from ckptkit.core.checkpoint import Payload
from ckptkit.core.files.local import LocalFile
from ckptkit.core.files.payloads import Extent
from ckptkit.core.files.places import is_url
from ckptkit.core.files.source import ByteSource
from ckptkit.core.text import printable
from ckptkit.errors import OutputError

__all__ = ["REFLINKS", "Reflink", "clone_range", "shared_block", "shifted_by"]

Reflink: TypeAlias = Literal["auto", "always", "never"]
REFLINKS: Final = ("auto", "always", "never")
_CLONE_RANGE = getattr(fcntl, "FICLONERANGE", 0x4020940D)
_RANGE = struct.Struct("@qQQQ")
_LARGEST_BLOCK = 1 << 15
_FEWEST_BLOCKS = 4
_blocks: dict[tuple[int, int], int] = {}  # the block size by the devices of both; 0 where they cannot share blocks


def clone_range(source: int, offset: int, nbytes: int, target: int, at: int) -> bool:
    """Let ``nbytes`` bytes from ``at`` of a file be blocks of another, from ``offset``; return whether it was possible.

    Offsets and length must be multiples of the block size.
    """
    try:
        fcntl.ioctl(target, _CLONE_RANGE, _RANGE.pack(source, offset, nbytes, at))
    except OSError:
        return False
    return True


def shared_block(payloads: Iterable[Payload], path: str, reflink: Reflink) -> int:
    """Return the size of the blocks that a new file can share with the files of the payloads, or 0.

    It is 0 too where the ranges are too small. One block is shared as a trial, once for each pair of file systems.
    Raises ``OutputError`` for ``always`` where a file system cannot share blocks.
    """
    if reflink == "never" or is_url(path):
        return 0
    directory = os.path.dirname(path)
    files: dict[int, tuple[ByteSource, int]] = {}
    for payload in payloads:
        if isinstance(payload, Extent):
            file, largest = files.get(id(payload.file), (payload.file, 0))
            files[id(file)] = file, max(largest, payload.nbytes)
    blocks = []
    for file, largest in files.values():
        block = _block_of(file, directory)
        if not block and reflink == "always":
            raise OutputError(
                f"cannot share blocks with {printable(file.path)}: the file system has no reflinks, or there are two",
                hint="--reflink auto copies the bytes instead",
                path=path,
            )
        if block and largest >= _FEWEST_BLOCKS * block:
            blocks.append(block)
    return max(blocks, default=0)


def shifted_by(payloads: Iterable[Payload], block: int, alignment: int) -> int:
    """Return where in a block the first payload must begin so that most bytes of the payloads can be shared.

    The payloads are written one behind the other. The result is a multiple of ``alignment``.
    """
    weights: dict[int, int] = {}
    position = 0
    for payload in payloads:
        if isinstance(payload, Extent):
            shift = (payload.offset - position) % block
            if shift % alignment == 0:
                weights[shift] = weights.get(shift, 0) + payload.nbytes
        position += payload.nbytes
    return max(weights, key=weights.__getitem__, default=0)


def _block_of(file: ByteSource, directory: str) -> int:
    if not isinstance(file, LocalFile):
        return 0
    devices = file.identity[0], os.stat(directory).st_dev
    if devices not in _blocks:
        _blocks[devices] = _try_to_share(file, directory)
    return _blocks[devices]


def _try_to_share(file: LocalFile, directory: str) -> int:
    try:
        trial = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return 0
    try:
        block = os.fstatvfs(trial).f_bsize
        is_small = file.size < block
        with file.descriptor() as source:
            works = block <= _LARGEST_BLOCK and clone_range(source, 0, 0 if is_small else block, trial, 0)
    finally:
        os.close(trial)
    return block if works else 0
