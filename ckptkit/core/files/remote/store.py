"""One store: what is asked of it, counted, and asked again where it is worth it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ckptkit.core.files.remote.failures import TransientError, changed, explain
from ckptkit.core.files.remote.retries import Retries
from ckptkit.core.files.remote.traffic import Meter
from ckptkit.errors import PathError

__all__ = ["HEAD", "MOST_REQUESTS", "Listing", "ObjectState", "Store", "state_of"]

T = TypeVar("T")
HEAD = 64 << 10  # bytes that are asked for together with the size
MOST_REQUESTS = 100  # at once, of one store: the limit of aiohttp, and shards are opened in one round
_LATER = "run the command again later"


@dataclass(frozen=True, slots=True)
class ObjectState:
    """What tells one version of an object from another."""

    size: int
    etag: str = ""
    modified: str = ""

    def is_other(self, other: ObjectState) -> bool:
        """Return whether the states are of different versions; ETags decide, where both are known."""
        if self.size != other.size:
            return True
        if self.etag and other.etag:
            return self.etag != other.etag
        return bool(self.modified and other.modified) and self.modified != other.modified


def state_of(info: dict[str, Any]) -> ObjectState:
    """Return the state in what a filesystem says of an object."""
    etags = (str(info.get(name) or "") for name in ("ETag", "etag", "blob_id", "md5Hash", "sha256"))
    etag = next((etag for etag in etags if etag.strip('"')), "")  # some servers send an empty one
    modified = next(
        (info[name] for name in ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
         if info.get(name)), "",
    )  # fmt: skip
    if hasattr(modified, "timestamp"):
        modified = modified.timestamp()
    return ObjectState(int(info.get("size") or 0), etag, str(modified))


@dataclass(frozen=True, slots=True)
class Listing:
    """The names in a folder; ``files`` has what is known of each file."""

    files: dict[str, ObjectState | None]
    folders: frozenset[str] = frozenset()
    is_listed: bool = True
    is_cut: bool = False  # there are more names

    def has_file(self, name: str) -> bool | None:
        """Return whether there is a file of this name, or None where the listing does not tell."""
        if self.is_listed and name in self.files:
            return True
        return False if self.is_listed and not self.is_cut else None


@dataclass
class Store(ABC):
    """A bucket or a server. Its coroutines run on the loop of fsspec."""

    fs: Any
    meter: Meter
    pins: bool = False  # each request says which version it wants, so that no two versions are mixed
    retries_itself: bool = False
    _slots: asyncio.Semaphore | None = field(default=None, repr=False)
    _has_answered: bool = False

    @abstractmethod
    async def head(self, url: str, count: int, known: ObjectState | None) -> tuple[ObjectState, bytes]:
        """Return the state of an object and its first bytes, ``count`` or all; ``known`` is from a listing."""

    async def fetch(self, url: str, start: int, buffer: memoryview, state: ObjectState) -> None:
        """Fill the buffer with the bytes from ``start`` of this version of the object."""
        done = 0
        retries = Retries()
        while done < len(buffer):

            async def once(done: int = done) -> int:
                count = await self._fetch_once(url, start + done, buffer[done:], state)
                if not count:
                    raise TransientError("the connection was cut")
                return count

            done += await self.tried(once, url, retries)
            if done < len(buffer):  # the rest is asked for, not what came
                if not retries.progressed():
                    raise PathError("the connection was cut again and again", hint=_LATER, path=url)
                self.meter.add(retries=1)

    @abstractmethod
    async def _fetch_once(self, url: str, start: int, buffer: memoryview, state: ObjectState) -> int:
        """Fill the buffer, or a part of it where the connection is cut; return how many bytes."""

    @abstractmethod
    async def state(self, url: str) -> ObjectState:
        """Return the state that the object has now."""

    @abstractmethod
    async def listing(self, url: str, most: int) -> Listing:
        """Return the names in a folder: all, or at least ``most``. Raises ``NotFoundError`` where nothing is."""

    def check(self, url: str, state: ObjectState, now: ObjectState) -> None:
        """Raise ``ChangedError`` if the two states are of different versions."""
        if state.is_other(now):
            raise changed(url)

    async def tried(self, request: Callable[[], Awaitable[T]], url: str, retries: Retries | None = None) -> T:
        """Send a request, and send it again after a failure that may pass.

        Raises ``PathError``, ``NotFoundError`` or ``ChangedError``.
        """
        retries = retries or Retries()
        if self._slots is None:
            self._slots = asyncio.Semaphore(MOST_REQUESTS)
        while True:
            try:
                async with self._slots:
                    with self.meter.request():
                        result = await request()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - libraries raise what they like
                failure = explain(error, url)
                if not isinstance(failure, TransientError):
                    raise failure from None  # the foreign error may hold a URL with credentials
                is_last = self.retries_itself or (failure.is_unreachable and not self._has_answered)
                if is_last or not await retries.wait(failure.after):
                    raise PathError(failure.reason, hint=_way_out(failure), path=url) from None
                self.meter.add(retries=1)
            else:
                self._has_answered = True
                return result


def _way_out(failure: TransientError) -> str | None:
    if failure.after is not None:
        return f"the server asks to wait {failure.after:.0f} seconds"
    return "check the name of the server and the network" if failure.is_unreachable else _LATER
