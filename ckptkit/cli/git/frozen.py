"""Compare the staged version of each file with an earlier one: tensors that must be frozen have to be equal."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ckptkit.checks.reading import unreadable_finding
from ckptkit.checks.report import CheckReport
from ckptkit.cli.common.hints import hint_for_command
from ckptkit.cli.git import codes
from ckptkit.cli.git.pointers import object_path, read_pointer
from ckptkit.cli.git.repository import GitError, run_git, save_blob
from ckptkit.comparison import diff
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.places import name_of
from ckptkit.core.findings import Finding
from ckptkit.core.patterns import Pattern, parse_pattern, suggest_pattern
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import listed, plural, printable, quoted, shell_word
from ckptkit.errors import CkptkitError, PathError, RuleError
from ckptkit.formats import open_checkpoint
from ckptkit.rules.parse import parse_rules

__all__ = ["Comparison", "compare_staged", "default_base"]

# pre-commit sets both where it compares two revisions: in CI, and before a push, which can be of any branch.
_FROM: Final = "PRE_COMMIT_FROM_REF"
_TO: Final = "PRE_COMMIT_TO_REF"
_REGULAR: Final = "100"
_OPTIONS: Final = frozenset({"--drop"})


@dataclass(frozen=True, slots=True)
class _Version:
    """An object of git, its name in the repository or in full, and the mapping that is chosen inside the checkpoint."""

    oid: str
    name: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The findings about each file, and whether one of the files could not be read."""

    reports: tuple[CheckReport, ...]
    unread: bool


def default_base() -> str:
    """Return the revision that pre-commit compares with, or HEAD."""
    return os.environ.get(_FROM) or "HEAD"


def compare_staged(
    files: Sequence[str], base: str, frozen: Sequence[str], drop: Sequence[str], *, allow_unused: bool
) -> Comparison:
    """Return the findings about the staged version of each file, compared with its version in ``base``.

    Where pre-commit compares two revisions, the version in the second is compared, and not the staged one. ``base`` is
    a revision, or ``REV:PATH`` for one file with which all are compared. A tensor that matches a pattern of ``frozen``
    and none of ``drop`` must have the same key, shape and values in both.

    Raises:
        NotInRepositoryError: The current directory is in no repository.
        GitError: ``base`` is not a revision, a file is not staged, or git cannot read it.
        RuleError: A pattern is not valid, or matches no key of any file that was compared; ``allow_unused`` allows it.
    """
    patterns = [parse_pattern(text) for text in frozen]
    dropped = [parse_pattern(text) for text in drop]
    revision = os.environ.get(_TO) or ""
    staged = [_found(file, revision) for file in files]
    bases = [_base(base, new.name) for new in staged]
    reports: list[CheckReport] = []
    names: dict[str, None] = {}
    used: set[str] = set()
    unread = False
    for file, new, old in zip(files, staged, bases, strict=True):
        if old is None or old.oid == new.oid:
            code = codes.NEW_FILE if old is None else codes.SAME_FILE
            text = "does not have this file, so nothing was compared" if old is None else "has the same file"
            hint = "--base REV:PATH compares with a file of another name" if old is None else ""
            finding = code.finding("", f"{printable(base)} {text}", hint)
            reports.append(CheckReport((finding,), checkpoint=CheckpointSummary(file)))
            continue
        try:
            with _content(old, old.name, new.key) as left, _content(new, file, new.key) as right:
                keys = list(dict.fromkeys((*left, *right)))
                kept = [key for key in keys if not any(pattern.match(key) for pattern in dropped)]
                names |= dict.fromkeys(keys)
                matching = [pattern for pattern in patterns if any(map(pattern.match, kept))]
                used |= {pattern.text for pattern in matching}
                report = _compared(left, right, matching, drop, base)
                unmatched = [pattern.text for pattern in patterns if pattern not in matching]
                notes = [codes.NO_KEY.finding("", f"no key matches {quoted(text)}") for text in unmatched]
                path = file.removesuffix(f"::{new.key}")  # the envelope has the rest
                summary = replace(CheckpointSummary.of(right), path=path)
                reports.append(replace(report, findings=(*report.findings, *notes), checkpoint=summary))
        except CkptkitError as error:
            if isinstance(error, RuleError):
                raise
            unread = True
            reports.append(CheckReport((unreadable_finding(error, file),), checkpoint=CheckpointSummary(file)))
    if names and not allow_unused:
        _refuse_unused([pattern for pattern in patterns if pattern.text not in used], names)
    return Comparison(tuple(reports), unread)


def _compared(
    left: Checkpoint, right: Checkpoint, matching: Sequence[Pattern], drop: Sequence[str], base: str
) -> CheckReport:
    if not matching:
        return CheckReport(())
    rules = parse_rules(drop=drop, allow_unused=True)
    found = diff(left, right, rules, expect_frozen=[pattern.text for pattern in matching])
    findings: list[Finding] = []
    for gate in found.gates:
        if gate.broken is not None:
            hint = hint_for_command(gate.hint, _OPTIONS, ("--rtol", "--rename"))
            keys = gate.broken.keys
            findings.append(codes.NOT_FROZEN.finding(keys[0] if keys else "", gate.broken.message, hint, keys=keys))
    count = sum(gate.tensors for gate in found.gates)
    shown = listed([pattern.text for pattern in matching], 3)
    match, same = ("matches", "is") if count == 1 else ("match", "are")
    proved = f"{plural(count, 'tensor')} that {match} {shown} {same} equal to {printable(base)}"
    return CheckReport(tuple(findings), proved=proved)


def _refuse_unused(unused: Sequence[Pattern], names: Collection[str]) -> None:
    if unused:
        first = unused[0]
        raise RuleError(
            f"--expect-frozen {shell_word(first.text)} matches none of {plural(len(names), 'key')} of the files",
            hint=f"{suggest_pattern(first, names, 'FILE')}; --allow-unused allows it",
        )


def _found(file: str, revision: str, key: str = "") -> _Version:
    """Return the staged version of a file, or that in a revision. ``FILE::KEY`` chooses a mapping in the checkpoint."""
    version = ("ls-tree",) if revision else ("--literal-pathspecs", "ls-files", "--stage")
    arguments = (*version, "--full-name", "-z", *([revision] if revision else []), "--", file)
    found = [entry.partition("\t") for entry in run_git(*arguments).split("\0")[:-1]]
    path, _, key_of_path = file.rpartition("::")
    if not found and path and not key:
        return _found(path, revision, key_of_path)
    if not found:
        what = f"is not in {printable(revision)}" if revision else "is not staged"
        hint = "git add it first; leave out a file that the commit removes"
        raise GitError(f"{what}, so there is nothing to compare", hint=hint, path=file)
    (about, _, name) = found[0]
    if len({name for _, _, name in found}) > 1:
        raise GitError("is a folder", hint="give files", path=file)
    if len(found) > 1:
        raise GitError("has a conflict to resolve, so there is nothing to compare", hint="git add it first", path=file)
    words = about.split(" ")
    if not words[0].startswith(_REGULAR):
        raise GitError("is a folder, a link or a submodule in git, not a file", path=file)
    return _Version(words[2 if revision else 1], name, key)


def _base(base: str, name: str) -> _Version | None:
    """Return the version that a file is compared with, or None if the base does not have it."""
    is_revision = bool(_object(f"{base}^{{tree}}"))  # HEAD@{10:00} is one too, but the rest of REV:PATH is a path
    if not is_revision and base == "HEAD":  # the first commit has no base
        return None
    whole = f"{base}:{name}" if is_revision else base
    oid = _object(whole)
    if oid is None and is_revision:
        return None
    if oid is None or run_git("cat-file", "-t", oid).strip() != "blob":
        reason = f"{quoted(whole)} is not a revision, or a file of one"
        raise GitError(reason, hint="give --base REV or --base REV:PATH; a shallow clone has few revisions")
    return _Version(oid, whole)


def _object(name: str) -> str | None:
    """Return the object that git calls ``name``, or None if there is none."""
    return run_git("rev-parse", "--verify", "--quiet", "--end-of-options", name, allowed=(1, 128)).strip() or None


@contextlib.contextmanager
def _content(version: _Version, name: str, key: str) -> Iterator[Checkpoint]:
    """Open the checkpoint that git has, or the mapping ``key`` in it; ``name`` is what errors call it."""
    with tempfile.TemporaryDirectory(prefix="ckpt-git-") as folder:
        path = os.path.join(folder, f"checkpoint{os.path.splitext(name_of(name))[1]}")
        save_blob(version.oid, path)
        pointer = read_pointer(path)
        if pointer is not None:
            found = object_path(pointer)
            if found is None:
                raise PathError(
                    "the Git LFS object is not in this repository", hint="git lfs fetch --all gets it", path=name
                )
            path = found
        chosen = f"{path}::{key}" if key else path
        try:
            with open_checkpoint(chosen) as checkpoint:
                yield checkpoint
        except CkptkitError as error:
            error.path = name if error.path in (path, chosen) else error.path
            raise
