"""A file in a store: sent in parts, and visible only when all of them are there."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Protocol, Self

from ckptkit.core.text import printable
from ckptkit.errors import CkptkitError
from ckptkit.formats.writing.output_file import OutputFile
from ckptkit.formats.writing.state import Target, changed_meanwhile, created_meanwhile, name_leftover
from ckptkit.formats.writing.stores.asking import Store, is_same_state, store_errors
from ckptkit.formats.writing.stores.sending import Sending
from ckptkit.formats.writing.stores.transfers import transfer_to
from ckptkit.formats.writing.traces import note_new_output, note_removed, note_temporary

__all__ = ["SentFile", "StoreFile", "name_lost"]


class SentFile:
    """A transfer with its threads: it is sent, gets its name, and can be removed again."""

    def __init__(self, url: str, size: int, before: Hashable) -> None:
        """Take the URL, the size in bytes, and the state of the file that is replaced; nothing is asked."""
        self.url = url
        self._before = before
        with store_errors(url):
            self.store = Store(url)
            self._transfer = transfer_to(self.store.filesystem, self.store.path, size)
        self.sending = Sending(self._transfer, size, self.store.meter)
        self.is_committed = False
        self._began_commit = False
        self._is_removed = False

    @property
    def is_held(self) -> bool:
        """Whether the sent file can wait unseen until it gets its name."""
        return self._transfer.is_held

    def begin(self) -> None:
        """Start the transfer. Raises ``OutputError`` where the store does not let the file be written."""
        note_temporary(self.url)
        with store_errors(self.url):
            self.sending.call(self._transfer.begin)

    def finish(self) -> None:
        """Send the last part and wait for all of them."""
        with store_errors(self.url):
            self.sending.finish()

    def commit(self) -> None:
        """Give the file its name."""

        def commit() -> None:
            self._began_commit = True
            self._transfer.commit()
            self.is_committed = True

        note_new_output(self.url)
        with store_errors(self.url):
            self.sending.call(commit)
        note_removed(self.url)

    @property
    def is_old_lost(self) -> bool:
        """Whether the file replaced an old one."""
        return self.is_committed and self._before is not None

    def remove(self) -> list[str]:
        """Remove what was sent, also if it has its name; return the URL if that fails."""
        if self._is_removed:
            return []
        self._is_removed = True

        def remove() -> None:
            if self._began_commit and not self.is_committed:  # the store can have done it before the error came
                self.is_committed = not is_same_state(self.store.file_state(), self._before)
            if self.is_committed:
                self.store.remove()
            self._transfer.abort()

        try:
            self.sending.stop(remove)
        except Exception:  # noqa: BLE001 - the libraries have no common class of errors
            return [self.url]
        finally:
            self.sending.end_threads()
        note_removed(self.url)
        return []

    def end(self) -> None:
        """End the threads."""
        self.sending.end_threads()


class Holder(Protocol):
    """The folder that gives its files their names."""

    def hold(self, file: SentFile) -> None:
        """Take a file of which all bytes were sent."""
        ...


class StoreFile(OutputFile):
    """A file that is sent to a store in order and has its name when ``complete`` returns, or later with its folder."""

    in_order = True

    def __init__(self, target: Target, size: int, holder: Holder | None = None) -> None:
        """Take the target and the size in bytes. With a ``holder``, the file gets its name from it."""
        super().__init__(size, by_kernel=False)
        self.target = target.path
        self._before: Hashable = target.before.file
        self._holder = holder
        self._sent: SentFile | None = None
        self._is_complete = False

    def __enter__(self) -> Self:
        """Begin the transfer. Raises ``OutputError`` where the store does not let the file be written."""
        sent = self._sent = SentFile(self.target, self.size, self._before)
        try:
            sent.begin()
        except BaseException:
            sent.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the file its name, or remove it after an error."""
        assert self._sent is not None  # noqa: S101 - the block has begun
        self._end_threads()
        if kind is None:
            try:
                self.complete()
            except BaseException as failure:
                self._removed(failure)
                raise
            if self._holder is None:
                self._sent.end()
            return
        self._removed(error)

    def _removed(self, error: BaseException | None) -> None:
        assert self._sent is not None  # noqa: S101
        left = self._sent.remove()
        if isinstance(error, CkptkitError):
            name_leftover(error, left)
            if self._sent.is_old_lost and self._holder is None:
                name_lost(error, self.target)

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Take all of ``data``, which belongs at ``offset``. Raises ``OutputError`` if an earlier part was not sent."""
        assert self._sent is not None  # noqa: S101 - the block has begun
        with store_errors(self.target):
            self._sent.sending.write(data, offset)

    def complete(self) -> str:
        """Send the rest and give the file its name, unless a folder does that; return its URL, or an empty string."""
        assert self._sent is not None  # noqa: S101 - the block has begun
        if not self._is_complete:
            self._is_complete = True
            self._sent.finish()
            if self._holder is not None:
                self._holder.hold(self._sent)
            else:
                refuse_changed(self._sent.sending.call, self._sent.store, self._before)
                self._sent.commit()
        return "" if self._holder is not None else self.target


def name_lost(error: CkptkitError, url: str) -> None:
    """Add to the hint of an error that an old file is gone, because the new one had replaced it already."""
    what = f"the old {printable(url)} was already replaced, and is lost"
    error.hint = f"{error.hint}; {what}" if error.hint else what


def refuse_changed(call: Callable[[Callable[[], Hashable]], Hashable], store: Store, before: Hashable) -> None:
    """Raise ``OutputError`` where another program created or changed the file since the output was chosen."""
    with store_errors(store.url):
        now = call(store.file_state)
    if not is_same_state(now, before):
        raise created_meanwhile(store.url) if before is None else changed_meanwhile("file", store.url)
