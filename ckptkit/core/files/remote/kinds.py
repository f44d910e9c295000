"""Find whether a file or a folder is at a URL."""

from __future__ import annotations

from concurrent.futures import Future

from ckptkit.core.files.remote.failures import (
    NoBucketError,
    NotFoundError,
    RefusedError,
    public_errors,
)
from ckptkit.core.files.remote.kept import begin_list, begin_open, found_below
from ckptkit.core.files.remote.running import finish
from ckptkit.core.files.remote.store import Listing
from ckptkit.core.files.remote.urls import is_host

__all__ = ["kind_of_url"]


@public_errors()
def kind_of_url(url: str) -> str:
    """Return ``"file"``, ``"folder"``, or an empty string where nothing is found."""
    if url.endswith("/") or is_host(url):
        return _folder(begin_list(url), url, is_sure=True)
    file = begin_open(url)
    # A name without a suffix is probably a folder: both questions are asked in one round.
    folder = None if "." in url.rpartition("/")[2] else begin_list(url)
    refusal = None
    try:
        size = finish(file).state.size
    except NotFoundError:
        pass
    except RefusedError as error:  # some stores say so of a name that does not exist
        refusal = error
    else:
        # Some tools mark a folder by an empty object of its name.
        return "file" if size or folder is None else _folder(folder, url, is_sure=False) or "file"
    try:
        kind = _folder(folder or begin_list(url), url, is_sure=False)
    except RefusedError:
        kind = ""
    if refusal is not None and not kind:
        raise refusal
    return kind


def _folder(request: Future[Listing], url: str, *, is_sure: bool) -> str:
    try:
        listing = finish(request)
    except NoBucketError:
        raise
    except NotFoundError:
        return ""
    if listing.is_listed or listing.files or listing.folders or is_sure or found_below(url):
        return "folder"
    return ""
