"""Objects of S3: one request gives the size, the ETag and the first bytes, and each later one names the ETag."""

from __future__ import annotations

from typing import Any

from ckptkit.core.files.remote.failures import TransientError, not_found
from ckptkit.core.files.remote.store import Listing, ObjectState, state_of
from ckptkit.core.files.remote.stores.others import AsyncStore
from ckptkit.core.files.remote.stores.web import check_range, copy_body, total_of, without_ranges

__all__ = ["S3Store"]

_LARGEST_PAGE = 1 << 20  # bytes


class S3Store(AsyncStore):
    """A bucket."""

    async def head(self, url: str, count: int, known: ObjectState | None) -> tuple[ObjectState, bytes]:
        """Return the state and the first bytes by one request, except of an empty object."""
        if known is not None and not known.size:
            return known, b""
        asked = min(count, known.size) if known else count

        async def once() -> tuple[ObjectState, bytes] | None:
            try:
                response = await self._get(url, 0, asked)
            except OSError as error:
                cause = getattr(error.__cause__, "response", None) or {}
                if cause.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                    return None
                raise
            state = self._checked(response, url, 0)
            data = bytearray(min(asked, state.size))
            if await self._body(response, memoryview(data)) < len(data):
                raise TransientError("the connection was cut")
            return state, bytes(data)

        found = await self.tried(once, url)
        return found if found is not None else (await self.state(url), b"")

    async def _fetch_once(self, url: str, start: int, buffer: memoryview, state: ObjectState) -> int:
        response = await self._get(url, start, start + len(buffer), state.etag)
        self._checked(response, url, start, state)
        return await self._body(response, buffer)

    def _checked(self, response: Any, url: str, start: int, state: ObjectState | None = None) -> ObjectState:
        """Return the state in the head of a response, and close the response where it is not the one that was asked."""
        try:
            now = _state(response, url, start)
            if state is not None:
                self.check(url, state, now)
        except BaseException:
            response["Body"].close()
            raise
        return now

    async def _get(self, url: str, start: int, end: int, etag: str = "") -> Any:
        bucket, key, version = self.fs.split_path(self.target(url))
        options = {"Range": f"bytes={start}-{end - 1}"}
        if etag:
            options["IfMatch"] = etag
        if version:
            options["VersionId"] = version
        return await self._call("get_object", Bucket=bucket, Key=key, **options)

    async def _body(self, response: Any, buffer: memoryview) -> int:
        body = response["Body"]
        raw = getattr(body, "raw_stream", None) or getattr(body, "__wrapped__", None)
        content = getattr(raw, "content", None)
        done = 0
        try:
            done = await copy_body(content if hasattr(content, "readany") else _Reader(body), buffer, self)
        finally:
            if done == len(buffer) and raw is not None and hasattr(raw, "release"):
                raw.release()  # the connection is used again
            else:
                body.close()
        return done

    async def listing(self, url: str, most: int) -> Listing:
        """Return the names in a folder, with the size and the ETag of each object.

        Each page of 1000 names is a request with its own time limit.
        """
        bucket, key, _ = self.fs.split_path(self.target(url).rstrip("/"))
        prefix = f"{key}/" if key else ""
        files: dict[str, ObjectState | None] = {}
        folders: set[str] = set()
        options = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
        is_found = not key  # an empty bucket is there
        while True:
            page = await self.tried(lambda: self.timed(self._call("list_objects_v2", **options), _LARGEST_PAGE), url)
            objects, inside = page.get("Contents") or (), page.get("CommonPrefixes") or ()
            files |= {
                row["Key"][len(prefix) :]: state_of({**row, "size": row["Size"]})
                for row in objects
                if row["Key"] != prefix  # the marker of the folder itself
            }
            folders |= {row["Prefix"][len(prefix) : -1] for row in inside}
            is_found = is_found or bool(objects or inside)
            options["ContinuationToken"] = following = page.get("NextContinuationToken") or ""
            is_cut = bool(page.get("IsTruncated") and following)
            if not is_cut or len(files) + len(folders) >= most:
                break
        if not is_found:
            raise not_found(url)
        return Listing(files, frozenset(folders), is_cut=is_cut)

    async def _call(self, method: str, **options: str) -> Any:
        """Return the answer of the server, which is asked once."""
        return await self.fs._call_s3(method, **options, **getattr(self.fs, "req_kw", {}))  # noqa: SLF001 - fsspec calls coroutines so


class _Reader:
    """The body of a response of another HTTP library than aiohttp."""

    def __init__(self, body: Any) -> None:
        self._body = body

    async def readany(self) -> bytes:
        data: bytes = await self._body.read(1 << 20)
        return data


def _state(response: Any, url: str, start: int) -> ObjectState:
    sent = response.get("ContentRange") or ""
    check_range(sent, start, url)
    total = total_of(sent)
    if total == "*" and start:
        raise without_ranges(None, url)
    return state_of({**response, "size": int(response["ContentLength"] if total == "*" else total)})
