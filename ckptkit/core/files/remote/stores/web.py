"""Objects of web servers: each range is judged by the head of its response, before its body is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ckptkit.core.files.remote.failures import NotFoundError, TransientError, status_failure
from ckptkit.core.files.remote.store import Listing, ObjectState, Store
from ckptkit.core.files.remote.urls import request_url
from ckptkit.core.text import human_bytes
from ckptkit.errors import PathError
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["MOST_WITHOUT_RANGES", "HttpStore", "check_range", "copy_body", "total_of", "without_ranges"]

MOST_WITHOUT_RANGES = 1 << 20  # bytes of a body that was not asked for
_LARGEST_PAGE = 4 << 20  # a list of files in HTML
_ENCODED = lazy_pattern(r"(?a)[!#$%&'()*+,/:;=?@\[\]~\w.-]+")
_LINK = lazy_pattern(r"""(?i)<a\s[^<>]*?href\s*=\s*["']([^"'?#]+)["']""")
_INDEX = lazy_pattern(r"(?i)<(title|h1)[^<>]*>\s*(?:index of|directory listing (?:for|of))\s")
_CONTENT_RANGE = lazy_pattern(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


class HttpStore(Store):
    """A web server."""

    async def head(self, url: str, count: int, known: ObjectState | None) -> tuple[ObjectState, bytes]:
        """Return the state and the first bytes by one request. A server without ranges may send a small file whole."""
        asked = min(count, known.size) if known and known.size else count

        async def once() -> tuple[ObjectState, bytes]:
            async with self._get(url, 0, asked) as response:
                state = await self._state(response, url, 0)
                if response.status == 416:
                    return state, b""
                whole = response.status == 200
                data = bytearray(state.size if whole else min(asked, state.size))
                if await copy_body(response.content, memoryview(data), self) < len(data):
                    raise TransientError("the connection was cut")
                return state, bytes(data)

        return await self.tried(once, url)

    async def _fetch_once(self, url: str, start: int, buffer: memoryview, state: ObjectState) -> int:
        async with self._get(url, start, start + len(buffer), state.etag) as response:
            self.check(url, state, await self._state(response, url, start))
            if response.status == 416:  # the body is a text about the refusal
                raise status_failure(416, url, words=response.reason or "")
            if response.status == 200:
                whole = memoryview(bytearray(state.size))
                done = await copy_body(response.content, whole, self)
                buffer[:] = whole[start : start + len(buffer)]
                return len(buffer) if done == state.size else 0
            return await copy_body(response.content, buffer, self)

    async def state(self, url: str) -> ObjectState:
        """Return the state that the object has now."""

        async def once() -> ObjectState:
            async with self._get(url, 0, 1) as response:
                return await self._state(response, url, 0)

        return await self.tried(once, url)

    @asynccontextmanager
    async def _get(self, url: str, start: int, end: int, etag: str = "") -> AsyncIterator[Any]:
        """Send the request for a range, and give the response before its body is read."""
        options = dict(self.fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        if etag and not etag.startswith("W/"):  # a weak one never matches
            headers["If-Match"] = etag
        async with self._send(url, headers, options) as response:
            yield response

    @asynccontextmanager
    async def _send(self, url: str, headers: dict[str, str], options: dict[str, Any]) -> AsyncIterator[Any]:
        import yarl

        session = await self.fs.set_session()
        target = request_url(url)
        # An encoded URL may be signed, and must arrive as it is.
        parsed = yarl.URL(target, encoded=self.fs.encoded or _ENCODED.fullmatch(target) is not None)
        response = await session.get(parsed, headers=headers, **options)
        is_read = False
        try:
            if response.status >= 400 and response.status != 416:
                failure = status_failure(
                    response.status,
                    url,
                    words=response.reason or "",
                    retry_after=response.headers.get("Retry-After", ""),
                )
                raise failure
            if response.url.path.endswith("/") and not parsed.path.endswith("/"):
                raise NotFoundError("a folder, not a file", path=url)
            yield response
            is_read = response.content.at_eof()
        finally:
            # A connection with unread bytes is closed; else the next request uses it.
            if is_read:
                response.release()
            else:
                response.close()

    async def _state(self, response: Any, url: str, start: int) -> ObjectState:
        """Return the state in the head of a response for a range that begins at ``start``.

        Raises ``PathError`` for a server that ignores ranges, or sends another one.
        """
        headers = response.headers
        etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
        etag = etag if etag.strip('"') else ""
        total = total_of(headers.get("Content-Range", ""))
        if response.status == 416:
            if total != "*":
                return ObjectState(int(total), etag, modified)
            raise status_failure(416, url, words=response.reason or "")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise PathError(
                "the server compresses the file, so that no part of it can be read", hint="download it first", path=url
            )
        check_range(headers.get("Content-Range", ""), start, url)
        if response.status == 206 and total != "*":
            return ObjectState(int(total), etag, modified)
        size = response.content_length if response.status == 200 else None
        if size is not None and size <= MOST_WITHOUT_RANGES:
            return ObjectState(size, etag, modified)
        is_chunked = response.status == 200 and size is None
        if is_chunked:
            data = await response.content.read(MOST_WITHOUT_RANGES + 1)
            while len(data) <= MOST_WITHOUT_RANGES and (more := await response.content.read(MOST_WITHOUT_RANGES)):
                data += more
            self.meter.add(received=len(data))
            if len(data) <= MOST_WITHOUT_RANGES:
                response.content.unread_data(data)
                return ObjectState(len(data), etag, modified)
        raise without_ranges(size, url)

    async def listing(self, url: str, most: int) -> Listing:  # noqa: ARG002 - a page has all names
        """Return the links of the page that the server has for a folder; without a page, the folder is not listed."""
        page = url.rstrip("/") + "/"

        async def once() -> bytes:
            options = dict(self.fs.kwargs)
            async with self._send(page, options.pop("headers", {}), options) as response:
                if response.content_type != "text/html":
                    return b""
                data = b""
                while len(data) <= _LARGEST_PAGE and (more := await response.content.read(1 << 16)):
                    data += more
                self.meter.add(received=len(data))
                return data

        try:
            text = (await self.tried(once, url)).decode("utf-8", "replace")
        except PathError:
            return Listing({}, is_listed=False)
        return _links(text, page) if len(text) <= _LARGEST_PAGE else Listing({}, is_listed=False)


def total_of(content_range: str) -> str:
    """Return the number of bytes of the whole file in a header ``Content-Range``, or ``*`` if it is not known."""
    found = _CONTENT_RANGE.fullmatch(content_range)
    return found[3] if found else "*"


def check_range(content_range: str, start: int, url: str) -> None:
    """Raise ``PathError`` for a header ``Content-Range`` of bytes from elsewhere, or of a file of unknown size."""
    found = _CONTENT_RANGE.fullmatch(content_range)
    if not found or not found[1]:
        return
    if int(found[1]) != start:
        raise PathError("the server sent another part of the file than was asked for", path=url)
    if found[3] == "*":
        raise PathError(
            "the server does not say how large the file is", hint="download it, and give its path", path=url
        )


def without_ranges(size: int | None, url: str) -> PathError:
    """Return the error for a server that would send the whole file, which has ``size`` bytes if that is known."""
    what = f"all {human_bytes(size)}" if size else "the whole file"
    return PathError(
        f"the server cannot send a part of the file, only {what}", hint="download it, and give its path", path=url
    )


def _links(text: str, page: str) -> Listing:
    """Return the names that a page links to. Only a page that a server makes of a folder has all its names."""
    from html import unescape
    from urllib.parse import unquote, urljoin

    files: dict[str, ObjectState | None] = {}
    folders = set()
    for link in _LINK.findall(text):
        full = urljoin(page, unescape(link))
        if not full.startswith(page):
            continue
        name = unquote(full[len(page) :])
        if name.endswith("/") and name.count("/") == 1 and name.strip("./"):
            folders.add(name[:-1])
        elif name and "/" not in name:
            files[name] = None
    return Listing(files, frozenset(folders), is_listed=_INDEX.search(text) is not None and bool(files or folders))


async def copy_body(content: Any, buffer: memoryview, store: Store) -> int:
    """Fill the buffer from the stream of a response; return how many bytes came before it ended."""
    done = 0
    try:
        while done < len(buffer):
            chunk = await content.readany()
            if not chunk:
                break
            count = min(len(chunk), len(buffer) - done)
            buffer[done : done + count] = chunk[:count] if count < len(chunk) else chunk
            done += count
    except asyncio.CancelledError:
        raise
    except Exception:
        if not done:
            raise
    finally:
        store.meter.add(received=done)
    return done
