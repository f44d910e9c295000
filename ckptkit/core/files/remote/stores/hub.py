"""Files of the Hugging Face Hub: a range of a file gives its size and version too. Its library names and lists them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ckptkit.core.files.hub import HubPath, parse_hub_path
from ckptkit.core.files.remote.failures import TransientError, status_failure
from ckptkit.core.files.remote.retries import timeout
from ckptkit.core.files.remote.running import in_thread
from ckptkit.core.files.remote.store import Listing, ObjectState
from ckptkit.core.files.remote.stores.others import SyncStore
from ckptkit.core.files.remote.stores.web import MOST_WITHOUT_RANGES, check_range, total_of, without_ranges
from ckptkit.errors import PathError

__all__ = ["HubStore"]

_CHUNK = 1 << 20
_TYPES = {"models": None, "datasets": "dataset", "spaces": "space"}


class HubStore(SyncStore):
    """The repositories of an organisation."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take what ``SyncStore`` takes."""
        super().__init__(*args, **options)
        self._by_library = SyncStore(*args, **options, retries_itself=True)  # it repeats what it asks

    async def head(self, url: str, count: int, known: ObjectState | None) -> tuple[ObjectState, bytes]:
        """Return the state and the first bytes by one request."""
        path = _path_of(url)
        if path is None:
            return await self._by_library.head(url, count, known)
        asked = min(count, known.size) if known and known.size else count

        async def once() -> tuple[ObjectState, bytes]:
            data = bytearray(asked)
            state, done = await in_thread(lambda: self._range(url, path, 0, memoryview(data)))
            if done < min(asked, state.size):
                raise TransientError("the connection was cut")
            return state, bytes(data[:done])

        return await self.tried(once, url)

    async def _fetch_once(self, url: str, start: int, buffer: memoryview, state: ObjectState) -> int:
        path = _path_of(url)
        if path is None:
            return await self._by_library._fetch_once(url, start, buffer, state)  # noqa: SLF001 - of the same class
        now, done = await in_thread(lambda: self._range(url, path, start, buffer))
        self.check(url, state, now)
        return done

    async def state(self, url: str) -> ObjectState:
        """Return the state that the file has now."""
        return (await self.head(url, 1, None))[0] if _path_of(url) else await self._by_library.state(url)

    async def listing(self, url: str, most: int) -> Listing:
        """Return the names in a folder. Versions are told by the files themselves, since a list names other hashes."""
        found = await self._by_library.listing(url, most)
        if _path_of(url) is None:
            return found
        self.meter.add(requests=1)  # the library asks for the repository too
        sizes = {name: ObjectState(state.size) if state else None for name, state in found.files.items()}
        return Listing(sizes, found.folders)

    def _range(self, url: str, path: HubPath, start: int, buffer: memoryview) -> tuple[ObjectState, int]:
        """Fill the buffer from the file; return the state of the file, and how many bytes came."""
        import huggingface_hub

        target = huggingface_hub.hf_hub_url(
            path.repository,
            path.inside,
            repo_type=_TYPES[path.kind],
            revision=path.revision,
            endpoint=self.fs.endpoint,
        )
        end = start + len(buffer)
        headers = {
            **huggingface_hub.utils.build_hf_headers(token=self.fs.token),
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        done = 0
        with _answer(target, headers) as response:
            check_range(response.headers.get("Content-Range", ""), start, url)
            state = _state(response, url)
            left_out = start if response.status_code == 200 else 0
            for chunk in _pieces(response) if response.status_code != 416 else ():
                self.meter.add(received=len(chunk))
                part = memoryview(chunk)[left_out:]
                left_out -= len(chunk) - len(part)
                count = min(len(part), len(buffer) - done)
                buffer[done : done + count] = part[:count]
                done += count
                if done == len(buffer):
                    break
        return state, done


def _path_of(url: str) -> HubPath | None:
    """Return the parts of the URL of a file in a repository; None for what has no revisions, such as a bucket."""
    name = url.removeprefix("hf://")
    if name.partition("/")[0] in ("buckets", "kernels"):
        return None
    path = parse_hub_path(f"hf:{name}", from_cache=False)
    return path if path.inside else None


@contextlib.contextmanager
def _answer(target: str, headers: dict[str, str]) -> Iterator[Any]:
    """Send a request with the session of huggingface_hub, and give the response before its body is read."""
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    if callable(session.stream):  # of httpx; older versions use requests
        with session.stream("GET", target, headers=headers, timeout=timeout()) as response:
            yield response
    else:
        with contextlib.closing(session.get(target, headers=headers, timeout=timeout(), stream=True)) as response:
            yield response


def _pieces(response: Any) -> Iterator[bytes]:
    pieces: Iterator[bytes] = (response.iter_content if hasattr(response, "iter_content") else response.iter_bytes)(
        _CHUNK
    )
    return pieces


def _state(response: Any, url: str) -> ObjectState:
    status = response.status_code
    first = next(iter(response.history), response).headers  # the hub names the version before it sends us to the file
    if status >= 400 and status != 416:
        raise _failure(response, first.get("X-Error-Code", ""), url)
    etag = (first.get("X-Linked-Etag") or first.get("ETag") or "").removeprefix("W/").strip('"')
    total = total_of(response.headers.get("Content-Range", ""))
    if status in (206, 416) and total != "*":
        return ObjectState(int(total), etag)
    length = response.headers.get("Content-Length", "")
    size = int(length) if status == 200 and length.isdecimal() else None
    if size is None or size > MOST_WITHOUT_RANGES:
        raise without_ranges(size, url)
    return ObjectState(size, etag)


def _failure(response: Any, code: str, url: str) -> Exception:
    if code == "RevisionNotFound":
        return PathError("the repository has no such revision", path=url)
    return status_failure(response.status_code, url, retry_after=response.headers.get("Retry-After", ""))
