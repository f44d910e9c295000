"""A folder of a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckptkit.core.files.remote.failures import NotFoundError, RefusedError, public_errors
from ckptkit.core.files.remote.file import RemoteFile
from ckptkit.core.files.remote.kept import begin_list, begin_open, is_asked, is_known_missing, is_listing_kept
from ckptkit.core.files.remote.running import finish
from ckptkit.core.files.remote.store import Listing
from ckptkit.core.files.remote.urls import join_url
from ckptkit.core.files.source import ByteSource, Folder, FolderNames
from ckptkit.core.text import quoted
from ckptkit.errors import CkptkitError, PathError

__all__ = ["RemoteFolder"]


class RemoteFolder:
    """A folder of a store. Objects of one URL share what was asked."""

    def __init__(self, url: str) -> None:
        """Take the URL without credentials; nothing is asked."""
        self._url = url.rstrip("/") if not url.endswith("://") else url

    @property
    def path(self) -> str:
        """The URL without credentials, and without a slash at its end."""
        return self._url

    @public_errors()
    def names(self, most: int) -> FolderNames:
        """Return the names, at most ``most`` and one more. Raises ``PathError`` for a folder that does not exist."""
        listing = finish(begin_list(self._url, most + 1))
        files = sorted(listing.files)[: most + 1]
        folders = sorted(filter(_is_inside, listing.folders))[: most + 1 - len(files)]
        return FolderNames(tuple(files), tuple(folders), listing.is_listed)

    def _url_of(self, name: str) -> str:
        """Return the URL of a name in the folder. Raises ``PathError`` for one that would lead out of the folder."""
        if not _is_inside(name):
            raise PathError(f"not a valid name in a folder: {quoted(name)}", path=self._url)
        return join_url(self._url, name)

    @property
    def _is_web(self) -> bool:
        return self._url.startswith(("http://", "https://"))

    @public_errors()
    def _listing_of(self, name: str) -> tuple[Listing, str]:
        folder, _, last = name.rpartition("/")
        if not _is_inside(name):
            return Listing({}), last
        if self._is_web and not folder and not is_listing_kept(self._url):
            return Listing({}, is_listed=False), last
        try:
            return finish(begin_list(self._url_of(folder) if folder else self._url)), last
        except NotFoundError:
            return Listing({}), last

    def has_file(self, name: str) -> bool:
        """Return whether the folder has this file, by its listing or by asking for the file."""
        listing, last = self._listing_of(name)
        if (is_there := listing.has_file(last)) is not None:
            return is_there
        try:
            finish(begin_open(self._url_of(name)))
        except (NotFoundError, RefusedError):
            return False
        return True

    def knows(self, name: str) -> bool:
        """Return whether a listing answers ``has_file``, or the file was asked for."""
        listing, last = self._listing_of(name)
        return listing.has_file(last) is not None or is_asked(self._url_of(name))

    def has_folder(self, name: str) -> bool:
        """Return whether the folder has this folder, by its listing, or by that of this folder where names are cut."""
        listing, last = self._listing_of(name)
        if last in listing.folders or not listing.is_cut:
            return last in listing.folders
        try:
            return bool(finish(begin_list(self._url_of(name))))
        except NotFoundError:
            return False

    def has_link(self, name: str) -> bool:  # noqa: ARG002 - a store has no links
        """Return False."""
        return False

    def open(self, name: str) -> ByteSource:
        """Return the open file. Raises ``PathError`` where it is missing or cannot be read."""
        return RemoteFile(self._url_of(name))

    def folder(self, name: str) -> Folder:
        """Return the folder of this name; nothing is asked."""
        return RemoteFolder(self._url_of(name))

    def will_open(self, names: Sequence[str]) -> None:
        """Ask for the sizes and first bytes of these files, but for those that a listing lacks; do not wait."""
        urls = [self._url_of(name) for name in dict.fromkeys(names) if _is_inside(name)]
        urls = [url for url in urls if not is_known_missing(url)]
        for url in urls:
            self._hint(begin_open, url, of=len(urls))

    def will_list(self, names: Sequence[str]) -> None:
        """Ask for the names in these folders, and do not wait; the empty name is this folder."""
        for name in dict.fromkeys(names):
            if not name or _is_inside(name):
                self._hint(begin_list, join_url(self._url, name))

    def _hint(self, begin: Callable[..., object], url: str, **options: int) -> None:
        try:
            begin(url, **options)
        except CkptkitError:
            return


def _is_inside(name: str) -> bool:
    """Return whether a name, which may be a path, stays in its folder. A ``::`` would name another filesystem."""
    is_odd = "::" in name or "\\" in name or "\0" in name
    return not is_odd and not any(part in ("", ".", "..") for part in name.split("/"))
