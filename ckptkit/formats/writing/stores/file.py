"""A file in a store: sent in parts, and visible only when all of them are there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Protocol, Self

from ckptkit.core.files.remote.store import ObjectState
from ckptkit.core.text import printable
from ckptkit.errors import OutputError
from ckptkit.formats.writing.output_file import OutputFile
from ckptkit.formats.writing.state import (
    Target,
    changed_meanwhile,
    created_meanwhile,
    is_wrong_output,
)
from ckptkit.formats.writing.stores.asking import Store, is_same_state, store_errors
from ckptkit.formats.writing.stores.remains import tell_what_is_left
from ckptkit.formats.writing.stores.sending import Sending
from ckptkit.formats.writing.stores.transfers import TakenError, transfer_to
from ckptkit.formats.writing.traces import (
    note_new_output,
    note_removed,
    note_temporary,
)

__all__ = ["SentFile", "StoreFile"]


class SentFile:
    """A transfer with its threads: it is sent, gets its name, and can be taken back.

    ``is_named`` says whether it has its name; None is not known, because the answer of the store did not come.
    """

    def __init__(self, url: str, size: int, before: Hashable) -> None:
        """Take the URL, the size in bytes, and the state of the file that is replaced; nothing is asked."""
        self.url = url
        self.size = size
        self._before = before
        with store_errors(url):
            self.store = Store(url)
            self._transfer = transfer_to(self.store.filesystem, self.store.path, size, self.store.meter)
        self.sending = Sending(self._transfer, size, self.store.meter)
        self.is_named: bool | None = False
        self._seen: Hashable = None  # the state of the file after it got its name, if that was asked
        self.is_removed = False
        self.is_finished = False
        self._is_stopped = False

    @property
    def is_held(self) -> bool:
        """Whether the sent file can wait unseen until it gets its name."""
        return self._transfer.is_held

    @property
    def is_quick(self) -> bool:
        """Whether it gets its name in a short time."""
        return self._transfer.is_quick

    @property
    def has_replaced(self) -> bool:
        """Whether the old file is gone, or can be."""
        return self.is_named is not False and self._before is not None

    def begin(self) -> None:
        """Start the transfer. Raises ``OutputError`` where the store does not let the file be written."""
        note_temporary(self.url)
        with store_errors(self.url):
            self.sending.call(self._transfer.begin)

    def finish(self) -> None:
        """Send the last part and wait for all of them."""
        with store_errors(self.url):
            self.sending.finish()
        self.is_finished = True
        self.end()  # a folder has many files

    def commit(self, *, is_free: bool = False) -> None:
        """Give the file its name, which ``is_free`` where the old file was removed for it."""
        if is_free:
            self._before = None
        note_new_output(self.url)
        with store_errors(self.url):
            self.sending.call(self._commit)
        note_removed(self.url)
        self.end()

    def _commit(self) -> None:
        self.is_named = None
        try:
            self._transfer.commit(self._before)
        except Exception as error:
            now = self._before
            with contextlib.suppress(Exception):  # the first error says more
                now = self._ask()
            if not self.is_named:
                is_gone = now is None and self._before is not None
                if is_gone or isinstance(error, TakenError):
                    raise _taken(self.url, self._before) from None
                raise  # with its cause, which says what the server answered
            with contextlib.suppress(Exception):
                self._transfer.abort()
        else:
            self.is_named = True

    def _ask(self) -> Hashable:
        """Learn from the store whether the file has its name, where the answer was lost; return its present state."""
        now = self._seen = self.store.file_state()
        is_ours = self._is_ours(now)
        self.is_named = not is_same_state(now, self._before) if is_ours is None else is_ours
        return now

    def _is_ours(self, state: Hashable) -> bool | None:
        if not isinstance(state, ObjectState) or state.size != self.size:
            return False
        return self._transfer.is_ours(state)

    def stop(self) -> list[str]:
        """Send nothing more, and remove what was sent unless it has its name; return in words what is left of it."""
        if self._is_stopped:
            return []
        self._is_stopped = True

        def stop() -> None:
            if self.is_named is None:
                self._ask()
            if not self.is_named:
                self._transfer.abort()

        try:
            self.sending.stop(stop)
        except Exception:  # noqa: BLE001 - the libraries have no common class of errors
            return [self._transfer.remains(self.url)]
        note_removed(self.url)
        return []

    def remove(self) -> list[str]:
        """Remove the file if it has its name; return in words what is left of it. Call ``stop`` first.

        A file of another program, which has replaced it meanwhile, stays.
        """
        if not self.is_named:
            return [] if self.is_named is False else [f"{self.url}, if it is there,"]

        def remove() -> None:
            now = self.store.file_state()
            if self._is_ours(now) is not False and (self._seen is None or is_same_state(now, self._seen)):
                self.store.remove()

        try:
            self.sending.call(remove)
        except Exception:  # noqa: BLE001
            return [self.url]
        self.is_removed = True
        return []

    def end(self) -> None:
        """End the threads; a later call begins new ones."""
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
            sent.stop()
            sent.end()
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
        """Remove what was sent, except a file of a folder, and a whole file that has replaced another one."""
        assert self._sent is not None  # noqa: S101
        left = self._sent.stop()
        if self._holder is None:
            if not self._sent.has_replaced or is_wrong_output(error):
                left += self._sent.remove()
            self._sent.end()
        elif not self._sent.is_finished:
            self._sent.end()
        tell_what_is_left(error, self.target, left, self._told() if self._holder is None else "")

    def _told(self) -> str:
        """Return what became of the old file, or an empty string where it is still there."""
        assert self._sent is not None  # noqa: S101
        url = printable(self.target)
        if not self._sent.has_replaced:
            return ""
        if self._sent.is_removed:
            return f"the old {url} was already replaced, and is lost"
        if self._sent.is_named is None:
            return f"the answer of the store was lost: {url} may be the old file or the new one"
        return f"{url} is the new file, whole: it has replaced the old one already"

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


def refuse_changed(call: Callable[[Callable[[], Hashable]], Hashable], store: Store, before: Hashable) -> None:
    """Raise ``OutputError`` where another program created or changed the file since the output was chosen."""
    with store_errors(store.url):
        now = call(store.file_state)
    if not is_same_state(now, before):
        raise _taken(store.url, before)


def _taken(url: str, before: Hashable) -> OutputError:
    return created_meanwhile(url) if before is None else changed_meanwhile("file", url)
