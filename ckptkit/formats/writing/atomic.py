"""Write files and directories under temporary names; only complete output on disk gets the final name.

Before the rename, the path is compared with its state when the output was chosen, so that the newer output of another
program is never replaced. A file that another program renames to the path after this last comparison is still replaced:
no system call compares and renames in one step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Hashable, Iterator
from types import TracebackType
from typing import Self

from ckptkit.core.files.local import FileState
from ckptkit.core.text import human_bytes
from ckptkit.errors import ChangedError, CkptkitError, OutputError, hint_for_python
from ckptkit.formats.writing.output_file import OutputFile
from ckptkit.formats.writing.staging import Staging, temporary_path
from ckptkit.formats.writing.state import (
    Target,
    changed_meanwhile,
    created_meanwhile,
    name_leftover,
    path_state,
)
from ckptkit.formats.writing.traces import note_new_output, note_removed, note_temporary

__all__ = ["AtomicFile", "atomic_directory", "output_errors"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE = "free some space or write elsewhere"
_NO_LINKS = (
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EXDEV,
)  # from file systems without hard links


class AtomicFile(OutputFile):
    """A temporary file of known size that becomes the target when the ``with`` block ends without an error.

    Raises ``OutputError`` at the end if another program changed the target meanwhile; the newer file is kept.
    """

    def __init__(
        self, target: Target | str, size: int, block: int = 0, *, by_kernel: bool = True, place: str = ""
    ) -> None:
        """Take the target and the size in bytes. A target that is a string is replaced, whatever is there.

        ``block`` and ``by_kernel`` are as in ``OffsetWriter``. With a ``block``, no space is reserved. ``place`` is the
        directory of the temporary file, on the same disk as the target; by default the directory of the target.
        """
        super().__init__(size, block, by_kernel=by_kernel)
        self.target = target if isinstance(target, str) else target.path
        self.before = None if isinstance(target, str) else target.before
        self._place = place
        self._temporary = ""

    def __enter__(self) -> Self:
        """Create the temporary file and reserve its size. Raises ``OutputError`` where the disk is full."""
        at = os.path.join(self._place, os.path.basename(self.target)) if self._place else self.target
        self._temporary = temporary_path(at)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        if self.size >= 2**63:
            raise OutputError(f"not enough disk space: {human_bytes(self.size)} needed", path=self.target)
        note_temporary(self._temporary)
        try:
            self._fd = os.open(self._temporary, flags, 0o600)
            if self._block:
                os.ftruncate(self._fd, self.size)  # shared blocks need no space
            else:
                _reserve(self._fd, self.size)
        except BaseException as error:
            left = self._discard()
            if isinstance(error, OSError):
                failure = self._output_error(error)
                name_leftover(failure, left)
                raise failure from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rename the temporary file to the target, or remove it after an error."""
        try:
            if kind is None:
                self._commit()
        except OSError as failure:
            error = self._output_error(failure)
        except CkptkitError as failure:
            error = failure
        except BaseException:  # a signal while the disk writes
            self._discard()
            raise
        if isinstance(error, OSError):
            error = self._output_error(error)
        left = self._discard()
        if isinstance(error, CkptkitError):
            name_leftover(error, left)
            raise error from None

    def complete(self) -> str:
        """Return the temporary path of the file, which is complete."""
        return self._temporary

    def _commit(self) -> None:
        _keep_owner_and_mode(self._fd, self.target)
        os.fsync(self._fd)
        note_new_output(self.target)
        if self.before is not None and self.before.file is None:
            self._take_free_name()
        else:
            if self.before is not None and path_state(self.target).file != self.before.file:
                raise changed_meanwhile("file", self.target)
            os.replace(self._temporary, self.target)
        note_removed(self._temporary)
        self._temporary = ""
        sync_directory(os.path.dirname(self.target))

    def _take_free_name(self) -> None:
        try:
            # Unlike a rename, a link never replaces a file that another program created meanwhile.
            os.link(self._temporary, self.target)
        except FileExistsError:
            raise created_meanwhile(self.target) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.rename(self._temporary, self.target)
            return
        os.unlink(self._temporary)

    def _discard(self) -> list[str]:
        """Close the temporary file and remove it unless it has the final name; return its path if that fails."""
        self._end_threads()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # a complete file is on the disk already, see fsync
                os.close(fd)
        temporary, self._temporary = self._temporary, ""
        if temporary:
            try:
                os.unlink(temporary)
            except OSError:
                if os.path.lexists(temporary):
                    return [temporary]
            note_removed(temporary)
        return []

    def _output_error(self, error: OSError) -> OutputError:
        if error.errno == errno.EFBIG:
            return self._too_large()
        if error.errno in _FULL:
            disk = os.statvfs(os.path.dirname(self.target))
            free = disk.f_bavail * disk.f_frsize
            reason = f"not enough disk space: {human_bytes(self.size)} needed, {human_bytes(free)} free"
            if disk.f_files and not disk.f_favail:
                reason = "the disk cannot hold more files"
            return OutputError(reason, hint=_NO_SPACE, path=self.target)
        return OutputError((error.strerror or str(error)).lower(), path=self.target)

    def _too_large(self) -> OutputError:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit == resource.RLIM_INFINITY or limit >= self.size:
            reason = f"a file of {human_bytes(self.size)} is larger than this file system allows"
            return OutputError(reason, hint="write elsewhere, or write shards", path=self.target)
        reason = f"a file of {human_bytes(self.size)} is larger than the limit of this process, {human_bytes(limit)}"
        return OutputError(reason, hint="raise the limit (ulimit -f), or write smaller shards", path=self.target)


def _reserve(fd: int, size: int) -> None:
    if not size:
        return
    # A reservation that cannot succeed would take all free space first, and other programs would see a full disk.
    disk = os.fstatvfs(fd)
    if disk.f_blocks and size > disk.f_bfree * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(fd, size)  # this file system cannot reserve space, so a full disk causes an error later


def _keep_owner_and_mode(new: int | str, target: str) -> None:
    """Give the new file or directory the owner and mode of the old target, or the defaults if there is no target."""
    try:
        old = os.stat(target)
    except FileNotFoundError:
        if isinstance(new, int):  # the temporary file is private; a temporary directory is not
            os.chmod(new, 0o666 & ~current_umask())
        return
    current = os.stat(new)
    mode = stat.S_IMODE(old.st_mode)
    if current.st_gid != old.st_gid:
        try:
            os.chown(new, -1, old.st_gid)
        except PermissionError:
            mode &= ~(stat.S_IRWXG | stat.S_ISGID)  # the new group must not get the permissions of the old group
    if current.st_uid != old.st_uid:
        with contextlib.suppress(PermissionError):
            os.chown(new, old.st_uid, -1)
    os.chmod(new, mode)


def current_umask() -> int:
    """Return the umask, from ``/proc`` if possible, since changing the umask would affect other threads."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync_directory(path: str) -> None:
    """Flush the names in a directory to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_directory(target: Target, staging: Staging, *, replaced: frozenset[str], left: list[str]) -> Iterator[str]:
    """Yield a directory that replaces the target as a whole at the end of the ``with`` block.

    The directory is in the staging place. It begins with the finished files of that place, and with all files of the
    old directory except those named in ``replaced``. The old directory is removed at the end; if that fails, ``left``
    gets its temporary path. Raises ``OutputError`` if the directory cannot be written, or if another program changed
    the target meanwhile.
    """
    exists = target.before.file is not None
    try:
        staging.begin()
        _keep_owner_and_mode(staging.files, target.path)
        if exists:
            _keep_other_files(target.path, staging.files, replaced)
        yield staging.files
        sync_directory(staging.files)
        if exists and not _is_unchanged(target, replaced):
            raise changed_meanwhile("directory", target.given)
        note_new_output(target.path)
        _swap(staging.files, target.path, exists=exists)
        staging.keeps_finished = False
        sync_directory(os.path.dirname(target.path))
    except CkptkitError as error:
        if isinstance(error, OutputError):
            error.path = target.given  # the user does not know the temporary path
        _end_after_error(staging, error)
        raise
    except OSError as failure:
        refusal = _plain_error(failure, target.given)
        # The other program may have removed the old directory.
        if isinstance(failure, FileNotFoundError) and exists and not _is_unchanged(target, replaced):
            refusal = changed_meanwhile("directory", target.given)
        _end_after_error(staging, refusal)
        raise refusal from None
    except BaseException:
        staging.end_after_error()
        raise
    left += staging.end()


def _end_after_error(staging: Staging, error: CkptkitError) -> None:
    if isinstance(error, ChangedError):  # no later run has these inputs
        staging.keeps_finished = False
    kept, left = staging.end_after_error()
    if kept:
        way_out = f"{kept}: --continue goes on from there"
        error.call = f"{error.call}; {hint_for_python(way_out)}" if error.call else None
        error.hint = f"{error.hint}; {way_out}" if error.hint else way_out
    name_leftover(error, left)


@contextlib.contextmanager
def output_errors(path: str) -> Iterator[None]:
    """Turn an error of the operating system into an ``OutputError`` that names its file, or else the output."""
    try:
        yield
    except OSError as error:
        raise _plain_error(error, error.filename if isinstance(error.filename, str) else path) from None


def _plain_error(error: OSError, path: str) -> OutputError:
    hint = _NO_SPACE if error.errno in _FULL else None
    return OutputError((error.strerror or str(error)).lower(), hint=hint, path=path)


def _is_unchanged(target: Target, replaced: frozenset[str]) -> bool:
    """Return whether a directory has the same entries as before.

    A file that is kept may have grown, because the new directory links to the same file.
    """
    before = target.before
    now = path_state(target.path)
    if now.file != before.file or now.entries.keys() != before.entries.keys():
        return False
    return all(
        state == before.entries[name] if name in replaced else _identity(state) == _identity(before.entries[name])
        for name, state in now.entries.items()
    )


def _identity(state: Hashable) -> Hashable:
    return (state.device, state.inode) if isinstance(state, FileState) else state


def _keep_other_files(target: str, temporary: str, replaced: frozenset[str]) -> None:
    for entry in os.scandir(target):
        kept = os.path.join(temporary, entry.name)
        if entry.name in replaced:
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), kept)
        else:
            os.link(entry.path, kept)


def _swap(temporary: str, target: str, *, exists: bool) -> None:
    if not exists:
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise created_meanwhile(target) from None
            raise
        return
    import ctypes

    # Exchanging both names in one call means that the path always names a complete directory.
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, flag = -100, 2
    if exchange is not None and exchange(at_cwd, os.fsencode(temporary), at_cwd, os.fsencode(target), flag) == 0:
        return
    old_directory = temporary_path(target)
    os.rename(target, old_directory)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old_directory, target)
        raise
    os.rename(old_directory, temporary)
