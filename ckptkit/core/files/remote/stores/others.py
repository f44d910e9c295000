"""Objects of any other filesystem of fsspec: its coroutines where it has them, else its calls in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ckptkit.core.files.remote.failures import NotFoundError, not_found
from ckptkit.core.files.remote.retries import timeout
from ckptkit.core.files.remote.running import in_thread
from ckptkit.core.files.remote.store import Listing, ObjectState, Store, state_of
from ckptkit.core.files.remote.urls import is_host, own_part
from ckptkit.errors import PathError

__all__ = ["AsyncStore", "SyncStore"]

_SLOWEST = 20_000  # bytes a second; these libraries do not show single bytes
_PAGES = 10 << 20  # bytes of the pages of a long listing, which they do not show either
_ARCHIVES = {"zip", "tar", "libarchive", "git", "sftp", "ssh"}  # their threads share one open file or connection


class AsyncStore(Store):
    """A filesystem with coroutines."""

    def target(self, url: str) -> str:
        """Return the path of a URL in the filesystem."""
        path: str = self.fs._strip_protocol(own_part(url))  # noqa: SLF001 - each filesystem of fsspec has it
        return path

    async def head(self, url: str, count: int, known: ObjectState | None) -> tuple[ObjectState, bytes]:
        """Return the state and the first bytes by two requests at once, or by one where the state is known."""
        if known is not None:
            return known, await self._first(url, min(count, known.size))
        state, data = await asyncio.gather(self.state(url), self._first(url, count), return_exceptions=True)
        if isinstance(state, BaseException):
            raise state
        if isinstance(data, BaseException):
            if state.size:
                raise data
            data = b""  # some refuse every range of an empty object
        return state, data

    async def _first(self, url: str, count: int) -> bytes:
        if not count:
            return b""
        return await self.tried(lambda: self._bytes(url, 0, count), url)

    async def _fetch_once(self, url: str, start: int, buffer: memoryview, state: ObjectState) -> int:  # noqa: ARG002
        data = await self._bytes(url, start, start + len(buffer))
        count = min(len(data), len(buffer))
        buffer[:count] = data[:count]
        return count

    async def _bytes(self, url: str, start: int, end: int) -> bytes:
        data: bytes = await self.timed(self.cat(self.target(url), start, end), end - start)
        self.meter.add(received=len(data))
        return data

    async def timed(self, waiting: Any, nbytes: int = 0) -> Any:
        """Return what a call returns. Raises ``TimeoutError`` where it takes too long."""
        return await asyncio.wait_for(waiting, timeout() + nbytes / _SLOWEST)

    async def cat(self, path: str, start: int, end: int) -> Any:
        """Return a range of a file."""
        return await self.fs._cat_file(path, start=start, end=end)  # noqa: SLF001 - fsspec calls coroutines so

    async def info(self, path: str) -> Any:
        """Return what the filesystem says of a path now."""
        return await self.fs._info(path)  # noqa: SLF001 - fsspec calls coroutines so

    async def ls(self, path: str) -> Any:
        """Return what the filesystem says of each name in a folder now."""
        return await self.fs._ls(path, detail=True)  # noqa: SLF001 - fsspec calls coroutines so

    async def state(self, url: str) -> ObjectState:
        """Return the state that the object has now."""

        async def once() -> ObjectState:
            self.fs.invalidate_cache()
            info = await self.timed(self.info(self.target(url)))
            if info.get("type") == "directory":
                raise IsADirectoryError
            if info.get("size") is None:
                raise PathError("the size of the file is not known", hint="download it, and give its path", path=url)
            return state_of(info)

        return await self.tried(once, url)

    async def listing(self, url: str, most: int) -> Listing:  # noqa: ARG002 - these libraries give all names at once
        """Return the names in a folder, with what the filesystem says of each file."""
        path = self.target(url).rstrip("/")

        async def once() -> Any:
            self.fs.invalidate_cache()
            return await self.timed(self.ls(path), _PAGES)

        rows = await self.tried(once, url)
        if not rows and not is_host(url):  # an empty bucket is there
            raise not_found(url)
        files: dict[str, ObjectState | None] = {}
        folders = set()
        for row in rows:
            whole = row["name"].rstrip("/")
            name = whole.rpartition("/")[2]
            if whole.strip("/") == path.strip("/"):  # a file, or the marker of an empty folder
                if row["type"] == "file" and len(rows) == 1 and not row["name"].endswith("/"):
                    raise NotFoundError("a file, not a folder", path=url)
                continue
            if row["type"] == "directory":
                folders.add(name)
            else:
                files[name] = state_of(row)
        return Listing(files, frozenset(folders))


class SyncStore(AsyncStore):
    """A filesystem without coroutines: each call has a thread, or its turn where threads would share a connection."""

    def __init__(self, *args: Any, scheme: str, **options: Any) -> None:
        """Take what ``Store`` takes, and the scheme of the URLs."""
        super().__init__(*args, **options)
        self._is_immediate = scheme == "memory"
        self._turn = asyncio.Lock() if scheme in _ARCHIVES else None

    async def _call(self, call: Callable[[], Any]) -> Any:
        if self._is_immediate:
            return call()
        if self._turn is None:
            return await in_thread(call)
        async with self._turn:
            return await in_thread(call)

    async def cat(self, path: str, start: int, end: int) -> Any:
        """Return a range of a file."""
        options = {} if self._is_immediate else {"cache_type": "none"}  # a cache would fetch more than the range
        return await self._call(lambda: self.fs.cat_file(path, start=start, end=end, **options))

    async def info(self, path: str) -> Any:
        """Return what the filesystem says of a path now."""
        return await self._call(lambda: self.fs.info(path))

    async def ls(self, path: str) -> Any:
        """Return what the filesystem says of each name in a folder now."""
        return await self._call(lambda: self.fs.ls(path, detail=True))
