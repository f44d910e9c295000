"""A file or a directory that takes its name only when it is whole and on the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from ckptkit.core.checkpoint import Payload
from ckptkit.core.files import CHUNK, Extent
from ckptkit.core.text import human_bytes, printable, quoted
from ckptkit.errors import ChangedError, OutputError

__all__ = ["AtomicFile", "atomic_directory", "prepare_directory", "prepare_target"]

_LONGEST_NAME = 200  # bytes of the final name that go into the temporary one, so that it stays below 255
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)  # of file systems without them


def prepare_target(path: str, *, force: bool) -> str:
    """Return the real path of an output file, through any symbolic link.

    Raises ``OutputError`` where its directory is missing, it is no regular file, or it exists without ``force``.
    """
    target, status = _look(path)
    if status is not None and not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise OutputError(f"is {what}", hint="give a file name", path=path)
    if status is not None and not force:
        raise OutputError("already exists", hint="--force replaces it, whole or not at all", path=path)
    return target


def prepare_directory(path: str, *, force: bool) -> str:
    """Return the real path of an output directory, through any symbolic link.

    Raises ``OutputError`` where the directory above it is missing, where it is no directory, is the current one,
    holds directories of its own, or holds anything without ``force``.
    """
    target, status = _look(path)
    if status is None:
        return target
    if not stat.S_ISDIR(status.st_mode):
        raise OutputError("is a file, and shards need a directory", hint="give a new name", path=path)
    try:
        entries = list(os.scandir(target))
    except OSError as error:
        raise OutputError((error.strerror or str(error)).lower(), path=path) from None
    inner = next((entry.name for entry in entries if entry.is_dir(follow_symlinks=False)), None)
    if os.path.samefile(target, os.getcwd()):
        raise OutputError(
            "is the current directory, which replacing would leave deleted", hint="work above it", path=path
        )
    if inner is not None:
        raise OutputError(
            f"holds the directory {quoted(inner)}, so it is not replaced", hint="give a new directory", path=path
        )
    if entries and not force:
        raise OutputError("already exists", hint="--force replaces its shards and keeps its other files", path=path)
    return target


def _look(path: str) -> tuple[str, os.stat_result | None]:
    """Return the real path of an output and what stands there; every fault of the name shows before the first byte."""
    target = os.path.realpath(path)
    parent = os.path.dirname(target)
    try:
        above = os.stat(parent).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise OutputError(f"its directory {printable(parent)} does not exist", path=path) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"its directory {printable(parent)}: {reason}", path=path) from None
    if not stat.S_ISDIR(above):
        raise OutputError(f"its directory {printable(parent)} is not a directory", path=path)
    try:
        # Not of the real path: a pipe behind /dev/stdout has none.
        return target, os.stat(path)
    except FileNotFoundError:
        return target, None
    except OSError as error:
        raise OutputError((error.strerror or str(error)).lower(), path=path) from None


class AtomicFile:
    """A file of known size beside its target, which takes its name on a clean exit and is removed on any other."""

    def __init__(self, target: str, size: int, *, replace: bool = True) -> None:
        """Remember the real path of the target, the exact size in bytes, and whether a file there may be replaced."""
        self.target = target
        self.size = size
        self.replace = replace
        self._fd = -1
        self._temporary = ""

    def __enter__(self) -> Self:
        """Create the temporary file and reserve its size; raises ``OutputError`` where the disk has no room."""
        self._temporary = _beside(self.target)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        if self.size >= 2**63:
            raise OutputError(f"no room: needs {human_bytes(self.size)}", path=self.target)
        try:
            self._fd = os.open(self._temporary, flags, 0o600)
            _reserve(self._fd, self.size)
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise self._refusal(error) from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the file its name, or remove it."""
        try:
            if kind is None:
                self._commit()
        except OSError as failure:
            raise self._refusal(failure) from None
        finally:
            self._discard()
        if isinstance(error, OSError):
            raise self._refusal(error) from None

    @property
    def temporary(self) -> str:
        """The path under which the file can be read back before it takes its name."""
        return self._temporary

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)

    def copy(self, payload: Payload, offset: int) -> Iterator[int]:
        """Copy a payload to ``offset``, in the kernel where it can; yield the bytes of each step.

        Raises ``ChangedError`` where the source has become shorter.
        """
        if isinstance(payload, Extent):
            yield from self._copy_extent(payload, offset)
            return
        done = 0
        for chunk in payload.chunks():
            self.write(chunk, offset + done)
            done += len(chunk)
            yield len(chunk)
        if done != payload.nbytes:
            raise ChangedError(f"a tensor gave {done} bytes, and {payload.nbytes} were announced")

    def _copy_extent(self, extent: Extent, offset: int) -> Iterator[int]:
        done = 0
        while done < extent.nbytes:
            count = min(extent.nbytes - done, 16 * CHUNK)
            try:
                copied = os.copy_file_range(extent.file.fileno(), self._fd, count, extent.offset + done, offset + done)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                rest = extent.slice(done, extent.nbytes - done)
                for chunk in rest.chunks():
                    self.write(chunk, offset + done)
                    done += len(chunk)
                    yield len(chunk)
                return
            if copied == 0:
                raise ChangedError("the file became shorter while it was read", path=extent.file.path)
            done += copied
            yield copied

    def _commit(self) -> None:
        _keep_owner_and_mode(self._fd, self.target)
        os.fsync(self._fd)
        if self.replace:
            os.replace(self._temporary, self.target)
        else:
            self._take_free_name()
        self._temporary = ""
        sync_directory(os.path.dirname(self.target))

    def _take_free_name(self) -> None:
        try:
            # Unlike a rename, a link never replaces what another process has put there meanwhile.
            os.link(self._temporary, self.target)
        except FileExistsError:
            raise _come_between(self.target) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.rename(self._temporary, self.target)
            return
        os.unlink(self._temporary)

    def _discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = ""

    def _refusal(self, error: OSError) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            disk = os.statvfs(os.path.dirname(self.target))
            free = disk.f_bavail * disk.f_frsize
            reason = f"no room: needs {human_bytes(self.size)}, {human_bytes(free)} free"
            if disk.f_files and not disk.f_favail:
                reason = "no room: the disk takes no more files"
            return OutputError(reason, hint="free some space or write elsewhere", path=self.target)
        return OutputError((error.strerror or str(error)).lower(), path=self.target)


def _come_between(target: str) -> OutputError:
    return OutputError("came to be while this was written, and was left alone", hint="--force replaces it", path=target)


def _beside(target: str) -> str:
    """Return a new name in the target's directory, which says whose it is and never gets too long."""
    parent, name = os.path.split(target)
    short = os.fsencode(name)[:_LONGEST_NAME].decode("utf-8", "ignore")
    return os.path.join(parent, f"{short}.ckptkit-{os.getpid()}-{os.urandom(4).hex()}.tmp")


def _reserve(fd: int, size: int) -> None:
    if not size:
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(fd, size)  # a file system that cannot reserve; a full disk then shows while writing


def _keep_owner_and_mode(new: int | str, target: str) -> None:
    """Give the new file or directory what the old one of that name has, or what any new file gets."""
    try:
        old = os.stat(target)
    except FileNotFoundError:
        if isinstance(new, int):  # it was created for nobody else's eyes; a directory was not
            os.chmod(new, 0o666 & ~current_umask())
        return
    made = os.stat(new)
    mode = stat.S_IMODE(old.st_mode)
    if made.st_gid != old.st_gid:
        try:
            os.chown(new, -1, old.st_gid)
        except PermissionError:
            mode &= ~(stat.S_IRWXG | stat.S_ISGID)  # another group must not get what that one had
    if made.st_uid != old.st_uid:
        with contextlib.suppress(PermissionError):
            os.chown(new, old.st_uid, -1)
    os.chmod(new, mode)


def current_umask() -> int:
    """Return the umask without changing it, which another thread could notice, where the system tells it."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_directory(path: str, *, force: bool, ours: frozenset[str]) -> Iterator[str]:
    """Give a directory in which to write; on a clean exit it takes the place of ``path``, whole.

    Of an existing directory (only with ``force``) the files in ``ours`` are replaced or go, every other
    file stays and is there from the beginning. Raises what ``prepare_directory`` raises.
    """
    import shutil

    target = prepare_directory(path, force=force)
    exists = os.path.lexists(target)
    temporary = _beside(target)
    try:
        os.mkdir(temporary)
        _keep_owner_and_mode(temporary, target)
        if exists:
            _bring_along(target, temporary, ours)
        yield temporary
        sync_directory(temporary)
        _swap(temporary, target, exists=exists)
        sync_directory(os.path.dirname(target))
    except OutputError as error:
        error.path = path  # the temporary path inside is nothing to look for
        raise
    except OSError as error:
        raise OutputError((error.strerror or str(error)).lower(), path=path) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _bring_along(target: str, temporary: str, ours: frozenset[str]) -> None:
    for entry in os.scandir(target):
        goal = os.path.join(temporary, entry.name)
        if entry.name in ours:
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), goal)
        else:
            os.link(entry.path, goal)


def _swap(temporary: str, target: str, *, exists: bool) -> None:
    if not exists:
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _come_between(target) from None
            raise
        return
    import ctypes

    # RENAME_EXCHANGE: at no moment is there no directory of this name, or half of one.
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, flag = -100, 2
    if exchange is not None and exchange(at_cwd, os.fsencode(temporary), at_cwd, os.fsencode(target), flag) == 0:
        return
    aside = _beside(target)
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    os.rename(aside, temporary)
