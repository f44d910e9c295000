"""Find tensors whose bytes on both sides are known to be one range of one file, without reading them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.payloads import is_same_range
from ckptkit.core.files.places import identity_at

__all__ = ["keys_with_same_range", "share_a_file"]


def share_a_file(expected: Checkpoint, found: Checkpoint) -> bool:
    """Return whether a file of one side is a file of the other too, perhaps under another name, as through a link."""
    return not _files(expected.files).isdisjoint(_files(found.files))


def keys_with_same_range(expected: Checkpoint, found: Checkpoint, sources: Mapping[str, str]) -> frozenset[str]:
    """Return the expected keys whose bytes are the same range of a file as those of their found key in ``sources``.

    An empty tensor has no range.
    """
    return frozenset(
        key
        for key, source in sources.items()
        if expected[key].dtype == found[source].dtype
        and expected[key].elements
        and is_same_range(expected.payload(key), found.payload(source))
    )


def _files(paths: Iterable[str]) -> set[Hashable]:
    """Return the identity of each file; one that is gone can still be read, but is not known to be the same."""
    return {identity_at(path) for path in paths} - {None}
