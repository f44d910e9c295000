"""How one file is sent to a store: in parts that are kept back until all are there, as each filesystem can."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Hashable
from typing import Any, Protocol

from ckptkit.core.files.remote.store import ObjectState
from ckptkit.core.files.remote.traffic import Meter

__all__ = ["TakenError", "Transfer", "is_temporary", "transfer_to"]

_PART = 8 << 20  # bytes of a part where parts are sent at the same time
_PART_IN_ORDER = 16 << 20  # where each part waits for the one before
_MOST_PARTS = 10_000  # that S3 takes; other stores take more
_IN_FLIGHT = 64 << 20  # bytes of the parts that are sent at the same time
_MIB = 1 << 20
_TAKEN = (409, 412)
_NOT_KNOWN = (400, 501)  # of a store without conditions
_SMALL = 1 << 18  # bytes of a file that is sent with one request when it gets its name


class TakenError(Exception):
    """The store says that another program has created or changed the file meanwhile."""


class Transfer(Protocol):
    """A file on its way to a store. Its methods are called by other threads than the main thread."""

    part: int  # bytes of each part but the last
    at_once: int  # parts that may be sent at the same time, in any order
    is_held: bool  # whether the file can wait unseen for ``commit`` after the last part, without memory
    is_quick: bool  # whether ``commit`` is short however large the file is

    def begin(self) -> None:
        """Start; raise an error where the store does not let the file be written."""
        ...

    def send(self, number: int, part: bytes) -> None:
        """Send a part; the first has number 0."""
        ...

    def close(self) -> None:
        """All parts were sent; the file is not visible yet."""
        ...

    def commit(self, before: Hashable) -> None:
        """Give the file its name. Raises ``TakenError`` where the store finds another file than in state ``before``.

        None means that there was no file. Many stores do not compare.
        """
        ...

    def is_ours(self, state: ObjectState) -> bool | None:
        """Return whether a file of the right size in this state is what was sent; None where that is not known."""
        ...

    def abort(self) -> None:
        """Remove what was sent; the file was never visible."""
        ...

    def remains(self, url: str) -> str:
        """Return in words what stays in the store if ``abort`` fails; ``url`` is that of the file."""
        ...


def transfer_to(filesystem: Any, path: str, size: int, meter: Meter) -> Transfer:
    """Return the transfer of ``size`` bytes to a path of an fsspec filesystem; nothing is asked yet.

    ``meter`` counts the requests, or the calls of a filesystem that does not show its requests.
    """
    if hasattr(filesystem, "call_s3"):
        return _S3(filesystem, path, size, meter)
    if filesystem.protocol == "memory":
        return _Memory(filesystem, path, meter)
    return _Opened(filesystem, path, size, meter)


def is_temporary(name: str) -> bool:
    """Return whether a file of a store is one that this process has not given its name yet."""
    return _mark() in name


def _mark() -> str:
    return f".ckptkit-{os.getpid()}-"


def _part_size(size: int, least: int) -> int:
    """Return the bytes of a part, so that there are not more parts than a store takes."""
    needed = -(-size // _MOST_PARTS)
    return max(least, -(-needed // _MIB) * _MIB)


class _Memory:
    """A file of ``memory://``, which would be visible when it is opened. Its bytes are in this process anyway."""

    at_once = 1
    is_held = is_quick = True

    def __init__(self, filesystem: Any, path: str, meter: Meter) -> None:
        self.part = _PART
        self._meter = meter
        self._filesystem, self._path = filesystem, path
        self._data = bytearray()

    def begin(self) -> None:
        pass

    def send(self, number: int, part: bytes) -> None:  # noqa: ARG002 - parts come in order
        self._data += part

    def close(self) -> None:
        pass

    def commit(self, before: Hashable) -> None:  # noqa: ARG002 - fsspec has no conditions
        with self._meter.request():
            self._filesystem.pipe_file(self._path, bytes(self._data))
        self._data = bytearray()

    def is_ours(self, state: ObjectState) -> bool | None:  # noqa: ARG002 - the store tells nothing of the content
        return None

    def abort(self) -> None:
        self._data = bytearray()

    def remains(self, url: str) -> str:
        return _unfinished(url)


class _S3:
    """A file of S3: a multipart upload, or one request where it is small.

    The file object of s3fs would send one part after the other, so the calls of S3 are made here, through s3fs.
    """

    is_held = is_quick = True

    def __init__(self, filesystem: Any, path: str, size: int, meter: Meter) -> None:
        self.part = _part_size(size, _PART)
        self._meter = meter
        self.at_once = max(1, min(8, _IN_FLIGHT // self.part))
        self._filesystem = filesystem
        bucket, key, _ = filesystem.split_path(path)
        self._object = {"Bucket": bucket, "Key": key}
        self._is_small = size <= _SMALL
        self._small = b""
        self._upload: str | None = None
        self._parts: dict[int, dict[str, str | int]] = {}
        self._path = path
        self._sum_of_first = ""  # the MD5 of the first part

    def _call(self, name: str, **options: Any) -> Any:
        with self._meter.request():
            return self._filesystem.call_s3(name, **options)

    def begin(self) -> None:
        if not self._is_small:
            self._upload = self._call("create_multipart_upload", **self._object)["UploadId"]

    def send(self, number: int, part: bytes) -> None:
        if self._is_small:
            self._small = part
            return
        if number == 0:
            self._sum_of_first = hashlib.md5(part, usedforsecurity=False).hexdigest()
        call = {**self._object, "UploadId": self._upload, "PartNumber": number + 1}
        answer = self._call("upload_part", **call, Body=part)
        sums = {name: value for name, value in answer.items() if name.startswith("Checksum") and name != "ChecksumType"}
        self._parts[number] = {"PartNumber": number + 1, "ETag": answer["ETag"], **sums}

    def close(self) -> None:
        pass

    def commit(self, before: Hashable) -> None:
        if self._is_small:
            name, call = "put_object", {**self._object, "Body": self._small}
        else:
            parts = {"Parts": [self._parts[number] for number in sorted(self._parts)]}
            name, call = "complete_multipart_upload", {**self._object, "MultipartUpload": parts}
            call["UploadId"] = self._upload
        condition = {}  # s3fs leaves out what an old botocore does not know
        if before is None:
            condition = {"IfNoneMatch": "*"}
        elif isinstance(before, ObjectState) and before.etag:
            condition = {"IfMatch": before.etag}
        try:
            self._call(name, **call, **condition)
        except Exception as error:
            status = _status_of(error) if condition else 0
            if status in _TAKEN:
                raise TakenError from error
            if status not in _NOT_KNOWN:
                raise
            self._call(name, **call)
        self._upload = None

    def is_ours(self, state: ObjectState) -> bool | None:
        if self._is_small:
            with self._meter.request():
                return bool(self._filesystem.cat_file(self._path) == self._small)
        sums = [str(self._parts[number]["ETag"]).strip('"') for number in sorted(self._parts)]
        found = state.etag.strip('"')
        if "-" not in found or sums[0] != self._sum_of_first:  # the store names its files in another way
            return None
        return found == f"{hashlib.md5(bytes.fromhex(''.join(sums)), usedforsecurity=False).hexdigest()}-{len(sums)}"

    def abort(self) -> None:
        if self._upload is not None:
            with contextlib.suppress(FileNotFoundError):  # the upload is over
                self._call("abort_multipart_upload", **self._object, UploadId=self._upload)
            self._upload = None

    def remains(self, url: str) -> str:
        return _unfinished(url)


def _status_of(error: BaseException | None) -> int:
    """Return the HTTP status in an error of botocore, or in that which caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
        error = error.__cause__
    return 0


class _Opened:
    """A file that the filesystem itself opens: it keeps the file back until ``commit``, or at least until it is closed.

    A filesystem that does neither gets the file under a temporary name.
    """

    at_once = 1

    def __init__(self, filesystem: Any, path: str, size: int, meter: Meter) -> None:
        self.part = _part_size(size, _PART_IN_ORDER)
        self._meter = meter
        self.is_held = True
        self.is_quick = False
        self._filesystem, self._path = filesystem, path
        self._file: Any = None
        self._temporary = ""
        self._commits = False  # whether the file has a commit of its own

    def begin(self) -> None:
        from fsspec.spec import AbstractBufferedFile

        # Some filesystems show and empty a file when it is opened, so the first one opened has a temporary name.
        self._temporary = f"{self._path}{_mark()}{os.urandom(4).hex()}.tmp"
        file = self._file = self._open(self._temporary)
        commit = getattr(type(file), "commit", None) or getattr(file, "commit", None)
        self._commits = commit is not None and commit is not AbstractBufferedFile.commit
        self.is_held = self._commits or not isinstance(file, AbstractBufferedFile)
        self.is_quick = self._commits
        if self._commits or not self.is_held:
            self.abort()
            self._temporary = ""
            self._file = self._open(self._path)

    def _open(self, path: str) -> Any:
        with self._meter.request():
            return self._opened(path)

    def _opened(self, path: str) -> Any:
        try:
            files = self._filesystem.transaction.files
        except (AttributeError, NotImplementedError):  # of huggingface_hub, whose files are held until they are closed
            return self._filesystem.open(path, "wb", block_size=self.part)
        file = self._filesystem.open(path, "wb", block_size=self.part, autocommit=False)
        with contextlib.suppress(AttributeError, ValueError):
            files.remove(file)  # which would keep it, and its memory, forever
        return file

    def send(self, number: int, part: bytes) -> None:  # noqa: ARG002 - parts come in order
        with self._meter.request():
            self._file.write(part)

    def close(self) -> None:
        if self.is_held:
            with self._meter.request():
                self._file.close()

    def commit(self, before: Hashable) -> None:  # noqa: ARG002 - fsspec has no conditions
        with self._meter.request():
            if not self.is_held:
                self._file.close()
            elif self._commits:
                self._file.commit()
            else:
                self._filesystem.mv(self._temporary, self._path)

    def is_ours(self, state: ObjectState) -> bool | None:  # noqa: ARG002 - the store tells nothing of the content
        return None

    def abort(self) -> None:
        file = self._file
        if file is None:
            return
        try:
            self._discard(file)
        finally:
            with contextlib.suppress(AttributeError):
                file.closed = True  # otherwise it would be sent when it is collected

    def _discard(self, file: Any) -> None:
        if self._commits:
            file.discard()
        elif self.is_held:
            file.close()
            with contextlib.suppress(FileNotFoundError):  # it has another name already
                self._filesystem.rm_file(self._temporary)
        spooled = getattr(file, "temp_file", None)  # of huggingface_hub
        if spooled is not None:
            spooled.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(spooled.name)

    def remains(self, url: str) -> str:
        return url + self._temporary.removeprefix(self._path) if self._temporary else _unfinished(url)


def _unfinished(url: str) -> str:
    return f"the unfinished upload of {url}"
