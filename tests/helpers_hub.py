"""Make the cache of the Hugging Face libraries by hand: blobs, snapshots of links to them, and references."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["COMMIT", "OTHER_COMMIT", "add_snapshot"]

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
OTHER_COMMIT = "607a3ff783dfa663caf39e06633721c8d4cfcd7e"


def add_snapshot(
    cache: Path,
    repository: str,
    files: Mapping[str, bytes | Path],
    *,
    commit: str = COMMIT,
    references: Sequence[str] = ("main",),
    kind: str = "models",
    linked: bool = True,
    store: Path | None = None,
) -> Path:
    """Add a snapshot of the files to the cache, and return its folder.

    Without ``linked``, the files are copies, as on a disk without links. With ``store``, the blobs are links into the
    folder that several repositories share.
    """
    folder = cache / "--".join([kind, *repository.split("/")])
    snapshot = folder / "snapshots" / commit
    for name, given in files.items():
        data = given.read_bytes() if isinstance(given, Path) else given
        file = snapshot / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not linked:
            file.write_bytes(data)
            continue
        digest = hashlib.sha256(data).hexdigest()
        blob = folder / "blobs" / digest
        blob.parent.mkdir(parents=True, exist_ok=True)
        if store is not None:
            shared = store / digest[:2] / digest
            shared.parent.mkdir(parents=True, exist_ok=True)
            shared.write_bytes(data)
            blob.symlink_to(os.path.relpath(shared, blob.parent))
        else:
            blob.write_bytes(data)
        file.symlink_to(os.path.relpath(blob, file.parent))
    for reference in references:
        written = folder / "refs" / reference
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(commit)
    return snapshot
