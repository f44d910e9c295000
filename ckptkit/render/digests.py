"""Digests as the lines of a digest file, the result of a check of them, and both as JSON documents."""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.core.text import printable
from ckptkit.digests.check import DigestCheck
from ckptkit.digests.model import CONTENTS, NAMES_AND_SHAPES, Digests, key_text
from ckptkit.render.page import Line, Listing, Page, Table
from ckptkit.render.summary import checkpoint_document, tensor_document

__all__ = ["check_document", "check_page", "digests_document", "digests_page"]


def digests_page(result: Digests) -> Page:
    """Return the page of ``ckpt digest``: the lines of the digest file."""
    rows = (
        (one.digest, one.info.dtype, str(list(one.info.shape)), printable(key)) for key, one in result.tensors.items()
    )
    return [Listing(tuple(result.lines)), Table(("digest", "dtype", "shape", "key"), tuple(rows), only_tsv=True)]


def digests_document(result: Digests) -> dict[str, object]:
    """Return the document of ``ckpt digest --json``."""
    return {
        "schema": "ckptkit.digest/1",
        "checkpoint": checkpoint_document(result.checkpoint),
        "algorithm": result.algorithm,
        "tensors": [{**tensor_document(one.info), "digest": one.digest} for one in result.tensors.values()],
        "skipped": _skipped(result),
        "contents": result.contents,
        "names_and_shapes": result.names_and_shapes,
    }


def check_page(result: DigestCheck, *, quiet: bool = False) -> Page:
    """Return the page of ``ckpt digest --check``: a line for each key in order, as sha256sum prints it, and the counts.

    With ``quiet``, only what is not OK is printed.
    """
    lines = [line for is_ok, line in _lines(result) if not (quiet and is_ok)]
    counts = f"{result.in_short} of {len(result.equal) + len(result.different) + len(result.missing):,} recorded"
    return [Listing(tuple(lines)), Line((counts,))] if lines or not quiet else []


def _lines(result: DigestCheck) -> Iterator[tuple[bool, str]]:
    state = dict.fromkeys(result.equal, "OK") | dict.fromkeys(result.different, "FAILED")
    state |= dict.fromkeys(result.missing, "MISSING") | dict.fromkeys(result.new, "NEW")
    state |= {key: f"MISSING, and {key_text(new)} has its contents" for key, new in result.moved.items()}
    for key in sorted(state):
        yield state[key] == "OK", f"{key_text(key)}: {state[key]}"
    for is_ok, name in ((result.ok, CONTENTS), (result.same_names_and_shapes, NAMES_AND_SHAPES)):
        yield is_ok, f"{name}: {'OK' if is_ok else 'FAILED'}"


def check_document(result: DigestCheck) -> dict[str, object]:
    """Return the document of ``ckpt digest --check --json``."""
    return {
        "schema": "ckptkit.digest-check/1",
        "checkpoint": checkpoint_document(result.checkpoint),
        "algorithm": result.algorithm,
        "equal": list(result.equal),
        "different": list(result.different),
        "missing": [{"key": key, "moved_to": result.moved.get(key)} for key in result.missing],
        "new": list(result.new),
        "skipped": _skipped(result),
        "contents": result.ok,
        "names_and_shapes": result.same_names_and_shapes,
    }


def _skipped(result: Digests | DigestCheck) -> list[dict[str, str]]:
    return [{"key": key, "reason": reason} for key, reason in result.skipped.items()]
