"""What was asked before it is needed: first bytes of files, and names in folders. Both are kept for a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ckptkit.core.files.remote.failures import NotFoundError, RefusedError
from ckptkit.core.files.remote.first_bytes import asked_next
from ckptkit.core.files.remote.running import finish, on_fork, start
from ckptkit.core.files.remote.store import HEAD, Listing, ObjectState, Store
from ckptkit.core.files.remote.stores import store_of
from ckptkit.core.files.remote.traffic import Meter
from ckptkit.errors import CkptkitError

__all__ = [
    "Opened",
    "begin_list",
    "begin_open",
    "forget",
    "found_below",
    "is_asked",
    "is_known_missing",
    "is_listing_kept",
    "known_state",
    "open_now",
]

T = TypeVar("T")
_SECONDS = 60.0
_MOST_FILES = 4096
_MOST_FOLDERS = 256
_MOST_NAMES = 10_000  # to find files beside one; they are asked for by name in a larger folder
_MOST_AHEAD = 16 << 20  # bytes of all files that are opened at once
_SMALLEST_HEAD = 4 << 10
_ZIP_TAIL = 64 << 10  # in which a reader looks for the directory of a zip archive
_LARGEST_KEPT = 16 << 10  # bytes of a file that is kept after it was opened


@dataclass(frozen=True, slots=True)
class Opened:
    """The size, the version and the first bytes of a file."""

    state: ObjectState
    pieces: tuple[tuple[int, bytes | bytearray], ...]  # each with its offset


class _Kept(Generic[T]):
    """Answers by URL, for a minute."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._answers: dict[str, tuple[float, Future[T]]] = {}
        self._lock = threading.Lock()

    def get(self, url: str) -> Future[T] | None:
        with self._lock:
            since, answer = self._answers.get(url, (0.0, None))
            if answer is None or time.monotonic() - since > _SECONDS:
                return None
            is_lost = answer.done() and (
                answer.cancelled() or not isinstance(answer.exception(), NotFoundError | RefusedError | None)
            )
            return None if is_lost else answer

    def begin(self, url: str, request: Coroutine[Any, Any, T], meter: Meter) -> Future[T]:
        async def begun() -> T:
            meter.let_go()
            return await request

        meter.hold()
        answer = start(begun())
        with self._lock:
            self._answers.pop(url, None)
            self._answers[url] = (time.monotonic(), answer)
            if len(self._answers) > self._most:
                del self._answers[next(iter(self._answers))]
        return answer

    def pop(self, url: str) -> Future[T] | None:
        answer = self.get(url)
        with self._lock:
            self._answers.pop(url, None)
        return answer

    def forget(self, url: str) -> None:
        below = url.rstrip("/") + "/"
        with self._lock:
            for other in [other for other in self._answers if f"{other}/".startswith(below)]:
                del self._answers[other]

    def forget_in(self, folder: str) -> None:
        with self._lock:
            for other in [other for other in self._answers if other.rpartition("/")[0] == folder]:
                del self._answers[other]

    def below(self, url: str) -> list[Future[T]]:
        with self._lock:
            return [answer for other, (_, answer) in self._answers.items() if other.startswith(url.rstrip("/") + "/")]


_files: _Kept[Opened] = _Kept(_MOST_FILES)
_folders: _Kept[Listing] = _Kept(_MOST_FOLDERS)


@on_fork
def _forget_all() -> None:
    _files.__init__(_MOST_FILES)  # type: ignore[misc]
    _folders.__init__(_MOST_FOLDERS)  # type: ignore[misc]


def forget(url: str) -> None:
    """Keep nothing of this URL, of what is below it, and of the folder that holds it, with the files in it."""
    folder = url.rstrip("/").rpartition("/")[0]
    _files.forget(url)
    _folders.forget(url)
    if not folder.endswith(":/"):
        _files.forget_in(folder)  # shards of an index that may have been written anew, and configurations
        _folders.pop(folder)


def begin_open(url: str, *, of: int = 1) -> Future[Opened]:
    """Ask for the size and the first bytes of a file, one of ``of`` files, unless that was done; do not wait."""
    kept = _files.get(url)
    if kept is not None:
        return kept
    count = max(min(HEAD, _MOST_AHEAD // of), _SMALLEST_HEAD)
    store = store_of(url)
    return _files.begin(url, _open(store, url, count, _MOST_AHEAD // of, known_state(url)), store.meter)


async def _open(store: Store, url: str, count: int, most: int, known: ObjectState | None) -> Opened:
    state, first = await store.head(url, count, known)
    following = asked_next(first, state.size, max(most, _ZIP_TAIL))
    if following is None:
        return Opened(state, ((0, first),))
    more = bytearray(following[1] - following[0])
    await store.fetch(url, following[0], memoryview(more), state)
    return Opened(state, ((0, first), (following[0], more)))


def open_now(url: str) -> Opened:
    """Return what ``begin_open`` asked, or ask now. Only a small file, which is whole, is kept for the next time."""
    is_kept = False
    try:
        opened = finish(begin_open(url))
        is_kept = opened.state.size <= _LARGEST_KEPT
    except NotFoundError:
        is_kept = True
        raise
    finally:
        if not is_kept:
            _files.pop(url)
    return opened


def begin_list(url: str, most: int = _MOST_NAMES) -> Future[Listing]:
    """Ask for the names in a folder, all or at least ``most``, unless that was done; do not wait."""
    url = url.rstrip("/") if not url.endswith("://") else url
    kept = _folders.get(url)
    if kept is not None and not _has_too_few(kept, most):
        return kept
    store = store_of(url)
    return _folders.begin(url, store.listing(url, most), store.meter)


def _has_too_few(answer: Future[Listing], most: int) -> bool:
    if most <= _MOST_NAMES:
        return False
    try:
        listing = finish(answer)
    except CkptkitError:
        return False
    return listing.is_cut and len(listing.files) + len(listing.folders) < most


def known_state(url: str) -> ObjectState | None:
    """Return what a listing that is kept says of a file."""
    listing, name = _listing_above(url)
    return None if listing is None else listing.files.get(name)


def is_known_missing(url: str) -> bool:
    """Return whether a listing that is kept has no such file."""
    listing, name = _listing_above(url)
    return listing is not None and listing.has_file(name) is False


def is_asked(url: str) -> bool:
    """Return whether a file was asked for, and the answer is kept or under way."""
    return _files.get(url) is not None


def is_listing_kept(url: str) -> bool:
    """Return whether the names in a folder were asked for."""
    return _folders.get(url) is not None


def _listing_above(url: str) -> tuple[Listing | None, str]:
    """Return the listing that has come of the folder around a URL, and the name in it."""
    folder, _, name = url.rpartition("/")
    listing = _folders.get(folder)
    if listing is None or not listing.done() or listing.cancelled() or listing.exception() is not None:
        return None, name
    return listing.result(), name


def found_below(url: str) -> bool:
    """Return whether a file below the URL was opened or is kept; the answers are waited for."""
    return any(answer.exception() is None for answer in _files.below(url))
