"""Files and folders of stores, which are named by URLs."""

from __future__ import annotations

from ckptkit.core.files.source import ByteSource, Folder
from ckptkit.errors import PathError

__all__ = ["clean_url", "open_remote", "remote_folder", "remote_kind"]


def clean_url(url: str) -> str:
    """Return the URL that messages show."""
    return url


def open_remote(url: str) -> ByteSource:
    """Return the open file at ``url``. Raises ``PathError``."""
    raise _refusal(url)


def remote_folder(url: str) -> Folder:
    """Return the folder at ``url``. Raises ``PathError``."""
    raise _refusal(url)


def remote_kind(url: str) -> str:
    """Return what is at ``url``: ``"file"``, ``"folder"``, or an empty string. Raises ``PathError``."""
    raise _refusal(url)


def _refusal(url: str) -> PathError:
    return PathError("remote paths are not supported", hint="download the checkpoint first", path=url)
