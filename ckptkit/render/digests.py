"""Digests as the lines of a digest file, the result of a check of them, and both as JSON documents."""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.core.text import plural, printable, quoted, shell_word
from ckptkit.digests.check import DigestCheck
from ckptkit.digests.model import CONTENTS, NAMES_AND_SHAPES, Digests, key_text
from ckptkit.render.page import Block, Hint, Line, Listing, Message, Page, Table
from ckptkit.render.summary import checkpoint_document, tensor_document

__all__ = ["check_document", "check_page", "digests_document", "digests_page"]

_OK, _FAILED = "OK", "FAILED"


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

    With ``quiet``, only what is not OK is printed, and what explains it. Where all missing tensors have another prefix,
    one sentence says so in place of their lines.
    """
    prefixes = result.prefixes
    explained = {*result.moved, *result.moved.values()} if prefixes else ()
    rows = [row for row in _states(result) if not (quiet and row[1] == _OK)]
    lines = [
        f"{key_text(key)}: {state}{where and f', and {key_text(where)} has its contents'}"
        for key, state, where in rows
        if key not in explained
    ]
    is_explaining = not result.same_contents  # the same names and shapes are then worth a line
    for is_equal, name, is_shown in (
        (result.same_contents, CONTENTS, not quiet),
        (result.same_names_and_shapes, NAMES_AND_SHAPES, not quiet or is_explaining),
    ):
        if is_equal is not None and (is_shown or not is_equal):
            lines.append(f"{name}: {_OK if is_equal else _FAILED}")
    counts = f"{result.in_short} of {len(result.equal) + len(result.different) + len(result.missing):,} recorded"
    left_out = f"; {len(result.left_out):,} recorded not compared" if result.left_out else ""
    page: list[Block] = [Listing(tuple(lines)), Line((f"{counts}{left_out}",))] if lines or not quiet else []
    if prefixes:
        page.append(_renamed(result, *prefixes))
    if result.different and not quiet:
        argument = result.checkpoint.argument or "FOUND"
        page.append(
            Line(
                (
                    "hint: ",
                    Hint(f"with the recorded checkpoint, ckpt diff EXPECTED {argument} --values says how much changed"),
                )
            )
        )
    cells = tuple((printable(key), state, printable(where)) for key, state, where in rows)
    return [*page, Table(("key", "state", "moved to"), cells, only_tsv=True)]


def _renamed(result: DigestCheck, recorded: str, found: str) -> Line:
    """Return the sentence about tensors that only have another prefix, with the option that undoes it."""
    count = len(result.missing)
    every = "all " if count == len(result.missing) + len(result.equal) + len(result.different) and count > 1 else ""
    verb = "has" if count == 1 else "have"
    where = f"under {quoted(found)}" if found else f"without {quoted(recorded)}"
    said = f"{every}{plural(count, 'missing tensor')} {verb} the recorded contents {where}: "
    rename = shell_word(f"{found}*={recorded}*")
    return Line((Message(said), Hint(f"--rename {rename} compares {'it' if count == 1 else 'them'}")))


def _states(result: DigestCheck) -> Iterator[tuple[str, str, str]]:
    """Yield each key with its state, and the key that has its contents now."""
    states = dict.fromkeys(result.equal, _OK) | dict.fromkeys(result.different, _FAILED)
    states |= dict.fromkeys(result.missing, "MISSING") | dict.fromkeys(result.new, "NEW")
    for key in sorted(states):
        yield key, states[key], result.moved.get(key, "")


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
        "contents": result.same_contents,
        "names_and_shapes": result.same_names_and_shapes,
        "left_out": list(result.left_out),
    }


def _skipped(result: Digests | DigestCheck) -> list[dict[str, str]]:
    return [{"key": key, "reason": reason} for key, reason in result.skipped.items()]
