"""Where a checkpoint says how it was merged: an item of its metadata, or a file beside it. And what marks a patch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ckptkit.core.files.places import is_file, join, kind_at

if TYPE_CHECKING:
    from ckptkit.core.checkpoint import Checkpoint

__all__ = ["DELTA", "PROVENANCE", "own_version", "provenance_beside", "provenance_name", "way_to_apply"]

PROVENANCE: Final = "ckptkit.merge"  # the metadata that says how an output was merged
DELTA: Final = "ckptkit.delta"  # the metadata of a patch, which is not a checkpoint of weights


def way_to_apply(patch: str) -> str:
    """Return what makes a checkpoint of a patch; ``patch`` is its word on the command line."""
    return f"ckpt apply BASE {patch} -o OUT makes a checkpoint of it"


def own_version() -> str:
    """Return the version of ckptkit, which outputs name; it is empty in a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ckptkit")
    except PackageNotFoundError:
        return ""


def provenance_name(path: str) -> str:
    """Return the path of the file beside ``path`` that says how it was merged; of one in a folder for an empty path."""
    return f"{path}.merge.json" if path else "merge.json"


def provenance_beside(checkpoint: Checkpoint) -> str | None:
    """Return the path of the file beside a checkpoint that says how it was merged, or None where there is none."""
    if not checkpoint.files:
        return None
    is_folder = kind_at(checkpoint.path) == "folder"
    name = provenance_name("" if is_folder else checkpoint.path)
    beside = join(checkpoint.path, name) if is_folder else name
    return beside if is_file(beside) else None
