"""What ``ckpt git install`` and ``ckpt git uninstall`` change: lines of attributes, and settings of git."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ckptkit.cli.git.attributes import DRIVER, with_lines, without_lines
from ckptkit.cli.git.repository import GitError, NotInRepositoryError, configured, run_git, top_folder
from ckptkit.core.text import listed, plural, printable, quoted
from ckptkit.errors import OutputError
from ckptkit.formats.writing.outputs import write_small_file
from ckptkit.formats.writing.targets import prepare_target

__all__ = ["PATTERNS", "Changes", "apply_changes", "plan_install", "plan_uninstall"]

PATTERNS: Final = ("*.safetensors", "*.pt", "*.pth", "*.bin", "*.ckpt", "*.gguf")
_SECTION: Final = f"diff.{DRIVER}"
_CACHE: Final = f"refs/notes/textconv/{DRIVER}"  # where git keeps the texts of files that it has compared
_FILE: Final = ".gitattributes"
_ENDING: Final = " git textconv --"  # of the command that git runs


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to be changed, and what is to be said of the result.

    Attributes:
        attributes: The path of the file of attributes, and its new text; None if it stays as it is.
        git: The arguments of each run of git that changes something.
        said: A sentence for each change.
        notes: What the user has to know, or to change.
    """

    attributes: tuple[str, str] | None = None
    git: tuple[tuple[str, ...], ...] = ()
    said: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def plan_install(patterns: Sequence[str], *, everywhere: bool) -> Changes:
    """Return what makes ``git diff`` compare files of these patterns, for this repository or ``everywhere``.

    Raises ``NotInRepositoryError`` outside of a repository, unless it is for everywhere. Raises ``GitError`` where the
    settings have another command, and ``OutputError`` where the file of attributes is a link in the repository.
    """
    where = "--global" if everywhere else "--local"
    path, name = _attributes_file(everywhere=everywhere)
    other = configured(f"{_SECTION}.textconv", where)
    if other and not other.endswith(_ENDING):
        raise GitError(
            f"{_SECTION}.textconv is {quoted(other)}, which is not a command of ckptkit",
            hint="remove it from the config of git first",
        )
    before = _text_of(path)
    text, added, moved = with_lines(before, patterns, () if everywhere else _overruled(patterns))
    said = [f"{name}: added {printable(line)}" for line in added]
    said += [f"{name}: moved to the end {printable(line)}" for line in moved]
    commands: list[tuple[str, ...]] = []
    for setting, value in ((f"{_SECTION}.textconv", _command()), (f"{_SECTION}.cachetextconv", "true")):
        if configured(setting, where) != value:
            commands.append(("config", where, "--replace-all", setting, value))
            said.append(f"git config {where}: set {setting} = {printable(value)}")
    said += _forget(commands)
    return Changes((path, text) if text != before else None, tuple(commands), tuple(said))


def plan_uninstall(*, everywhere: bool) -> Changes:
    """Return what undoes an installation. Raises as ``plan_install``."""
    where = "--global" if everywhere else "--local"
    path, name = _attributes_file(everywhere=everywhere)
    before = _text_of(path)
    text, removed, others = without_lines(before)
    said = [f"{name}: removed {printable(line)}" for line in removed]
    notes = [f"{name}: left as it is: {printable(line)}" for line in others]
    commands: list[tuple[str, ...]] = []
    command = configured(f"{_SECTION}.textconv", where)
    if command and not command.endswith(_ENDING):
        notes.append(f"left as it is: {_SECTION}.textconv = {printable(command)}")
    else:
        found = [name for name in (f"{_SECTION}.textconv", f"{_SECTION}.cachetextconv") if configured(name, where)]
        commands += [("config", where, "--unset-all", name) for name in found]
        said += [f"git config {where}: removed {name}" for name in found]
    said += _forget(commands)
    return Changes((path, text) if text != before else None, tuple(commands), tuple(said), tuple(notes))


def apply_changes(changes: Changes) -> None:
    """Write the file of attributes, and run git. Raises ``OutputError`` and ``GitError``."""
    if changes.attributes is not None:
        path, text = changes.attributes
        if text or os.path.islink(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_small_file(prepare_target(path, force=True), text.encode(errors="surrogateescape"))
        else:
            os.unlink(path)
    for arguments in changes.git:
        run_git(*arguments)


def notes_about_files(patterns: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each group of files in the repository that have another driver after an installation.

    Yields nothing outside of a repository.
    """
    with contextlib.suppress(GitError):
        top = top_folder()
        others: dict[str, list[str]] = {}
        for file, driver in _drivers(top, _tracked(top, patterns)):
            if driver != DRIVER:
                others.setdefault(driver, []).append(file)
        for driver, found in others.items():
            has = "has" if len(found) == 1 else "have"
            what = "no driver" if driver in ("unspecified", "unset") else f"diff={printable(driver)}"
            yield (
                f"{plural(len(found), 'file')} still {has} {what}: {listed(found, 3)}; another line of attributes "
                f"decides, in the repository or a deeper folder: write diff={DRIVER} there"
            )


def _attributes_file(*, everywhere: bool) -> tuple[str, str]:
    """Return the path of the file of attributes, and its name for messages."""
    if not everywhere:
        try:
            path = os.path.join(top_folder(), _FILE)
        except NotInRepositoryError as error:
            error.hint = "--global is for all repositories of this user"
            raise
        if os.path.islink(path):  # of whoever made the repository, to any file of this machine
            raise OutputError("is a link, which git does not read", hint="make it a file", path=_FILE)
        return path, _FILE
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    given = run_git("config", "--global", "--type=path", "--get", "core.attributesFile", allowed=(1,))
    path = os.path.abspath(given.removesuffix("\n") or os.path.join(home, "git", "attributes"))
    return path, printable(path)


def _text_of(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="surrogateescape")
    except FileNotFoundError:
        return ""


def _overruled(patterns: Sequence[str]) -> list[str]:
    """Return the patterns that match files to which another line gives another driver; one file is made up."""
    top = top_folder()
    found = []
    for pattern in patterns:
        files = _tracked(top, [pattern])
        sample = pattern.replace("*", "x").lstrip("/")
        if any(driver != DRIVER for _, driver in _drivers(top, [sample, *files])):
            found.append(pattern)
    return found


def _tracked(top: str, patterns: Sequence[str]) -> list[str]:
    """Return the files in git that match; a pattern without a slash is for every folder, as in a line of attributes."""
    anywhere = (pattern if "/" in pattern else f"**/{pattern}" for pattern in patterns)
    paths = [f":(glob){pattern.lstrip('/')}" for pattern in anywhere]
    return run_git("-C", top, "ls-files", "-z", "--", *paths).split("\0")[:-1]


def _drivers(top: str, files: Sequence[str]) -> list[tuple[str, str]]:
    """Return the driver of each file, as git finds it: a name, ``set``, ``unset`` or ``unspecified``."""
    fields = run_git("-C", top, "check-attr", "-z", "--stdin", "diff", given=files).split("\0")
    return list(zip(fields[0::3], fields[2::3], strict=False))


def _command() -> str:
    """Return the command that git runs, which works without an active environment and for names with a dash."""
    program = os.path.join(os.path.dirname(sys.executable), "ckpt")
    # -P: the current folder is that of a repository, which may have files of other people with the names of modules.
    words = [program] if os.path.exists(program) else [sys.executable, "-P", "-m", "ckptkit"]
    return f"{shlex.join(words)}{_ENDING}"


def _forget(commands: list[tuple[str, ...]]) -> Iterator[str]:
    """Add the command that removes the texts that git keeps, where there are some, and yield what it does."""
    with contextlib.suppress(GitError):
        if run_git("rev-parse", "--verify", "--quiet", _CACHE, allowed=(1,)):
            commands.append(("update-ref", "-d", _CACHE))
            yield f"git: forgot the texts that it kept in {_CACHE}"
