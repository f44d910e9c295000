"""Copy the bytes of a checkpoint into tensors piece by piece, and compare each piece while it is in the cache."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckptkit.core.checkpoint.payload import self_writing
from ckptkit.core.closing import Closing
from ckptkit.core.files.payloads import Extent, PayloadReader
from ckptkit.core.torch_bridge import blocks, flat_bytes, libc, same_memory
from ckptkit.core.torch_types import Tensor
from ckptkit.loading.decision import Copy
from ckptkit.values.workers import Workers

__all__ = ["Copier"]

_PIECE = 1 << 20  # smaller pieces cost more calls; larger ones leave the cache before they are compared
_BLOCK = 1 << 17  # of a computed piece: the copy is still in the cache when it is compared
_TASK = 8 << 20  # one thread copies so many bytes, of one tensor or of several


@dataclass(frozen=True, slots=True)
class _Part:
    """At most a piece of the bytes of a file, and the address in the memory of a tensor where they belong."""

    key: str
    file: Extent
    start: int
    nbytes: int
    address: int


class Copier(Closing):
    """Copies payloads into tensors and compares payloads with tensors, with one buffer of 1 MB for each thread.

    The payload must have the dtype of the tensor. A tensor may have any strides, and be on any device. Close the
    copier, or use it as a context manager.

    ``begun`` has the keys of the tensors that can have new bytes, and ``finished`` those that have all of them.
    """

    def __init__(self) -> None:
        """Start no thread yet: small models need none."""
        self.begun: dict[str, None] = {}
        self.finished: dict[str, None] = {}
        self._workers = Workers()
        self._left: Counter[str] = Counter()
        self._lock = threading.Lock()

    def copy(self, copies: Sequence[Copy], in_order: Collection[str] = ()) -> Iterator[str]:
        """Copy all bytes, and yield the keys of tensors that did not have them right after the copy.

        Several threads copy what files hold as it is. The tensors at the keys ``in_order`` are copied one after the
        other, and are not judged: they may overlap. Raises what reading a payload raises.
        """
        direct = [copy for copy in copies if copy.key not in in_order and _is_direct(copy)]
        for copy in direct:
            self._left[copy.key] = copy.payload.nbytes
            _count_change(copy.target)
        yield from self._in_threads(self.copy_part, direct)
        done = {copy.key for copy in direct}
        for copy in copies:
            if copy.key not in done:
                self.begun[copy.key] = None
                if not self._copy_any(copy) and copy.key not in in_order:
                    yield copy.key
                self.finished[copy.key] = None

    def different(self, copies: Iterable[Copy]) -> Iterator[str]:
        """Yield the keys of tensors that do not have the bytes of their payload. Raises what reading them raises."""
        direct: list[Copy] = []
        for copy in copies:
            if _is_direct(copy):
                direct.append(copy)
            elif not self._is_equal(copy):
                yield copy.key
        yield from self._in_threads(self._holds_part, direct)

    def close(self) -> None:
        """Wait until no thread copies any more, and end the threads."""
        self._workers.close()

    def copy_part(self, part: _Part) -> bool:
        """Copy a part, and return whether the tensor has its bytes now."""
        with self._lock:
            self.begun[part.key] = None
        buffer = self._read(part)
        libc().memmove(part.address, _address(buffer), part.nbytes)
        same = same_memory(part.address, _address(buffer), part.nbytes)
        with self._lock:
            self._left[part.key] -= part.nbytes if same else 0
            if not self._left[part.key]:
                self.finished[part.key] = None
        return same

    def _holds_part(self, part: _Part) -> bool:
        return same_memory(part.address, _address(self._read(part)), part.nbytes)

    def _read(self, part: _Part) -> memoryview:
        return self._workers.read("load", part.file, part.start, part.nbytes)

    def _in_threads(self, work: Callable[[_Part], bool], copies: Iterable[Copy]) -> Iterator[str]:
        """Yield the keys for which the work on a part returned False."""

        def run(task: list[_Part]) -> list[str]:
            return [part.key for part in task if not work(part)]

        for keys in self._workers.each(run, _tasks(copies)):
            yield from keys

    def _is_equal(self, copy: Copy) -> bool:
        reader = PayloadReader(copy.payload)
        return all(self._holds(piece, self._fill(reader, piece)) for piece in _pieces(copy.target.detach()))

    def _copy_any(self, copy: Copy) -> bool:
        """Copy any payload into any tensor in this thread; return whether each piece had its bytes after its copy."""
        import torch

        writer = self_writing(copy.payload)
        if writer is not None and writer.nbytes and _is_flat_memory(copy.target):
            memory = _Memory(copy.target.data_ptr())
            _count_change(copy.target)
            for _ in writer.write_to(memory, 0):
                pass
            return memory.is_same
        reader = PayloadReader(copy.payload)
        same = True
        with torch.no_grad():
            for piece in _pieces(copy.target.detach()):  # a detached tensor counts its changes with the parameter
                size = self._fill(reader, piece)
                piece.copy_(self._bytes[:size].view(piece.dtype).view(piece.shape))
                same = self._holds(piece, size) and same
        return same

    @cached_property
    def _buffer(self) -> bytearray:
        return bytearray(_PIECE)

    @cached_property
    def _bytes(self) -> Tensor:
        import torch

        return torch.frombuffer(self._buffer, dtype=torch.uint8)

    def _fill(self, reader: PayloadReader, piece: Tensor) -> int:
        size = piece.numel() * piece.element_size()
        reader.read_into(memoryview(self._buffer)[:size])
        return size

    def _holds(self, piece: Tensor, size: int) -> bool:
        """Return whether a piece has the first bytes of the buffer."""
        if not size:
            return True
        found = flat_bytes(piece.resolve_conj().resolve_neg().cpu())
        return same_memory(found.data_ptr(), self._bytes.data_ptr(), size)


def _is_direct(copy: Copy) -> bool:
    """Return whether the bytes of a file go into contiguous memory, so that threads can copy any part alone."""
    return isinstance(copy.payload, Extent) and copy.payload.nbytes > 0 and _is_flat_memory(copy.target)


def _is_flat_memory(target: Tensor) -> bool:
    """Return whether the elements of a tensor lie in order in the memory of the CPU."""
    return target.device.type == "cpu" and target.is_contiguous() and not (target.is_conj() or target.is_neg())


class _Memory:
    """The memory of a tensor, which a payload writes into with several threads; each piece is compared after it."""

    def __init__(self, address: int) -> None:
        self._address = address
        self.is_same = True

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Copy ``data`` to the byte ``offset``, and compare it there."""
        held = memoryview(data if not memoryview(data).readonly else bytearray(data)).cast("B")
        source, place = _address(held), self._address + offset
        for start in range(0, len(held), _BLOCK):
            count = min(_BLOCK, len(held) - start)
            libc().memmove(place + start, source + start, count)
            if not same_memory(place + start, source + start, count):
                self.is_same = False


def _tasks(copies: Iterable[Copy]) -> Iterator[list[_Part]]:
    """Yield the parts of all tensors in order, for one thread each time."""
    task: list[_Part] = []
    size = 0
    for part in itertools.chain.from_iterable(map(_parts, copies)):
        if size and size + part.nbytes > _TASK:
            yield task
            task, size = [], 0
        task.append(part)
        size += part.nbytes
    yield task


def _parts(copy: Copy) -> Iterator[_Part]:
    file, address = copy.payload, copy.target.data_ptr()
    assert isinstance(file, Extent)  # noqa: S101 - _is_direct has asked for it
    for start in range(0, file.nbytes, _PIECE):
        yield _Part(copy.key, file, start, min(_PIECE, file.nbytes - start), address + start)


def _count_change(target: Tensor) -> None:
    """Let torch count a change of a tensor, as autograd needs it, though its bytes are written without torch."""
    import torch

    with torch.no_grad():
        flat_bytes(target)[:0].zero_()  # older versions of torch cannot fill every dtype


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views of a tensor of at most 1 MB each, in row-major order."""
    if _is_flat_memory(tensor):
        flat = flat_bytes(tensor)
        for first in range(0, len(flat), _PIECE):
            yield flat[first : first + _PIECE]
    else:
        yield from blocks(tensor, _PIECE)
