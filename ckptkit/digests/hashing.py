"""Hash the dtype, the shape and the bytes of tensors, in threads and in bounded memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Final, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from ckptkit.core.arguments import require_choice
from ckptkit.core.checkpoint import Payload, TensorInfo
from ckptkit.core.files.payloads import Extent, announce, is_seekable, place_of
from ckptkit.errors import ArgumentError, CkptkitError, FormatError
from ckptkit.values.reading import READ_BYTES, neighbours
from ckptkit.values.workers import Workers

__all__ = [
    "ALGORITHMS",
    "HEX_DIGITS",
    "Hash",
    "HashedTensor",
    "hash_function",
    "hash_payloads",
    "hash_tensors",
    "header_of",
    "shape_text",
]

HEX_DIGITS: Final = {"sha256": 64, "xxh3": 32}
ALGORITHMS: Final = tuple(HEX_DIGITS)
_FAILED: Final = -1
_LOOK_AGAIN: Final = 0.1  # seconds after which a task that waits looks whether all work has ended
_MOST_TOGETHER: Final = 512  # small tensors in memory that a task hashes


_Bytes = TypeVar("_Bytes", bound=Payload)


class Hash(Protocol):
    """A hash that is fed in pieces, as in ``hashlib``."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Add the next bytes."""
        ...

    def digest(self) -> bytes:
        """Return the hash of all bytes so far."""
        ...

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far in hexadecimal."""
        ...


class HashedTensor(NamedTuple):
    """The key of a tensor, and its hash in hexadecimal."""

    key: str
    hex: str


_Step: TypeAlias = tuple[Sequence[HashedTensor], int]  # the tensors that a task finished, and the bytes that it read
_Task: TypeAlias = Callable[[Workers], _Step]


def hash_function(algorithm: str) -> Callable[[bytes], Hash]:
    """Return the function that starts a hash with some bytes.

    Raises ``ArgumentError`` for an unknown algorithm, and for ``xxh3`` where the package xxhash is not installed.
    """
    require_choice(algorithm, ALGORITHMS, "algorithm")
    if algorithm == "sha256":
        return hashlib.sha256
    try:
        import xxhash
    except ImportError:
        raise ArgumentError(
            "xxh3 needs xxhash, which is not installed", hint="install the extra [fast], or use sha256"
        ) from None
    return xxhash.xxh3_128


@lru_cache(maxsize=4096)
def header_of(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return what is hashed before the bytes of a tensor: a line of JSON with its dtype and its shape."""
    return f"[{json.dumps(dtype)},{shape_text(shape)}]\n".encode()


@lru_cache(maxsize=4096)
def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as JSON without spaces."""
    return json.dumps(shape, separators=(",", ":"))


def hash_payloads(payloads: Iterable[Payload]) -> bytes:
    """Return the SHA-256 of the bytes of payloads, one after the other."""
    digest = hashlib.sha256()
    for payload in payloads:
        for chunk in payload.chunks():
            digest.update(chunk)
    return digest.digest()


def hash_tensors(tensors: Iterable[tuple[TensorInfo, Payload]], algorithm: str, workers: Workers) -> Iterator[_Step]:
    """Yield the tensors that a step finishes, with their hashes, and the number of bytes that it read.

    Long tensors come first, because the bytes of one tensor are hashed one after the other: each thread has its own
    tensor as long as there are several. Small tensors are read together. The hashes depend on nothing but the tensors.
    Raises what reading raises, and what ``hash_function`` raises.
    """
    start = hash_function(algorithm)
    finished: list[HashedTensor] = []
    long: list[_LongTensor] = []
    near: list[_Small[Extent]] = []
    others: list[_Small[Payload]] = []
    for info, payload in tensors:
        header = header_of(info.dtype, info.shape)
        if not payload.nbytes:
            finished.append(HashedTensor(info.key, start(header).hexdigest()))
        elif payload.nbytes > READ_BYTES:
            long.append(_LongTensor(info.key, payload, start(header)))
        elif isinstance(payload, Extent):
            near.append(_Small(info.key, header, payload))
        else:
            others.append(_Small(info.key, header, payload))
    yield finished, 0
    long.sort(key=lambda tensor: -tensor.payload.nbytes)
    near.sort(key=lambda tensor: place_of(tensor.payload))
    announce([*(one.payload for one in long), *(one.payload for one in near), *(one.payload for one in others)])
    runs = neighbours([tensor.payload for tensor in near])
    short = chain(
        (partial(_hash_run, near[first:stop], start) for first, stop in runs),
        (partial(_hash_each, group, start) for group in _groups(others)),
    )

    def run(task: _Task) -> _Step:
        return task(workers)

    yield from workers.each(run, _in_turn([tensor.tasks() for tensor in long], short, workers.threads))


class _Small(NamedTuple, Generic[_Bytes]):
    """A tensor that one task hashes whole."""

    key: str
    header: bytes
    payload: _Bytes


class _LongTensor:
    """A tensor that several tasks hash, each the bytes that follow those of the task before it."""

    def __init__(self, key: str, payload: Payload, hash_of_header: Hash) -> None:
        self.key = key
        self.payload = payload
        self._hash = hash_of_header
        self._chunks: Iterator[bytes | bytearray | memoryview] | None = None
        self._taken = 0  # bytes of the chunks
        self._done = 0  # bytes that are hashed
        self._turn = threading.Condition()

    def tasks(self) -> Iterator[_Task]:
        """Yield the tasks; threads may run them at once if each begins in this order."""
        for start in range(0, self.payload.nbytes, READ_BYTES):
            yield partial(self._hash_piece, start, min(start + READ_BYTES, self.payload.nbytes))

    def _hash_piece(self, start: int, stop: int, workers: Workers) -> _Step:
        # The next task reads while this one hashes. Bytes that can be read only in order wait for their turn.
        data: memoryview | CkptkitError | OSError | None = None
        if is_seekable(self.payload):
            try:
                data = workers.read("bytes", self.payload, start, stop - start)
            except (CkptkitError, OSError) as error:
                data = error  # raised in its turn, after any error of an earlier task
        with self._turn:
            while _FAILED < self._done < start and not workers.stopped:
                self._turn.wait(_LOOK_AGAIN)
            if self._done == start:
                self._done = _FAILED
                try:
                    self._add(data, stop)
                    self._done = stop
                finally:
                    self._turn.notify_all()
            # A task that a system without threads began, and gave back, is run a second time.
            is_last = self._done == stop == self.payload.nbytes
            return (HashedTensor(self.key, self._hash.hexdigest()),) if is_last else (), stop - start

    def _add(self, data: memoryview | CkptkitError | OSError | None, stop: int) -> None:
        if isinstance(data, Exception):
            raise data
        if data is not None:
            self._hash.update(data)
            return
        if self._chunks is None:
            self._chunks = self.payload.chunks()
        while self._taken < stop or stop == self.payload.nbytes:  # the end may show that the bytes are damaged
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._taken += len(chunk)
            self._hash.update(chunk)
        if self._taken < stop or self._taken > self.payload.nbytes:
            raise _other_length(self.payload, self._taken)


def _hash_run(run: Sequence[_Small[Extent]], start: Callable[[bytes], Hash], workers: Workers) -> _Step:
    """Hash neighbours in a file, which are read together."""
    begin, last = run[0].payload.offset, run[-1].payload
    data = workers.read("bytes", Extent(last.file, begin, last.offset + last.nbytes - begin))
    hashed, nbytes = [], 0
    for key, header, extent in run:
        digest = start(header)
        digest.update(data[extent.offset - begin : extent.offset - begin + extent.nbytes])
        hashed.append(HashedTensor(key, digest.hexdigest()))
        nbytes += extent.nbytes
    return hashed, nbytes


def _hash_each(group: Sequence[_Small[Payload]], start: Callable[[bytes], Hash], _: Workers) -> _Step:
    hashed, nbytes = [], 0
    for key, header, payload in group:
        digest, taken = start(header), 0
        for chunk in payload.chunks():
            digest.update(chunk)
            taken += len(chunk)
        if taken != payload.nbytes:
            raise _other_length(payload, taken)
        hashed.append(HashedTensor(key, digest.hexdigest()))
        nbytes += taken
    return hashed, nbytes


def _other_length(payload: Payload, taken: int) -> FormatError:
    return FormatError(f"{taken:,} bytes are stored of a tensor of {payload.nbytes:,} bytes")


def _groups(tensors: Iterable[_Small[Payload]]) -> Iterator[list[_Small[Payload]]]:
    group: list[_Small[Payload]] = []
    nbytes = 0
    for tensor in tensors:
        group.append(tensor)
        nbytes += tensor.payload.nbytes
        if len(group) == _MOST_TOGETHER or nbytes >= READ_BYTES:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


def _in_turn(long: Sequence[Iterator[_Task]], short: Iterator[_Task], threads: int) -> Iterator[_Task]:
    """Yield tasks of as many long tensors as there are threads in turn; and short ones if there are too few."""
    waiting, active = deque(long), deque[Iterator[_Task]]()
    while waiting or active:
        while waiting and len(active) < threads:
            active.append(waiting.popleft())
        yield from islice(short, threads - len(active))
        for tasks in tuple(active):
            task = next(tasks, None)
            if task is None:
                active.remove(tasks)
            else:
                yield task
    yield from short
