"""Run git, and ask it about the repository of the current directory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Iterable
from typing import Final

from ckptkit.core.text import printable
from ckptkit.errors import CkptkitError

__all__ = [
    "GitError",
    "NotInRepositoryError",
    "common_folder",
    "configured",
    "run_git",
    "save_blob",
    "top_folder",
]

_NO_REPOSITORY: Final = ("not a git repository", "must be run in a work tree")


class GitError(CkptkitError):
    """Raised where git cannot do what is asked; the reason is what git says."""


class NotInRepositoryError(GitError):
    """Raised where the current directory is in no working tree of a repository."""


def run_git(*arguments: str, allowed: Collection[int] = (), given: Iterable[str] = ()) -> str:
    """Return what git prints. ``given`` are the lines of its input, each with a NUL at its end.

    Raises ``GitError`` where git is not installed, and where it ends with an exit code that is neither 0 nor
    ``allowed``.
    """
    data = "".join(f"{line}\0" for line in given).encode(errors="surrogateescape")
    done = _run(*arguments, data=data, out=subprocess.PIPE)
    if done.returncode and done.returncode not in allowed:
        raise _error(arguments, done)
    return done.stdout.decode(errors="surrogateescape")


def save_blob(oid: str, path: str) -> None:
    """Write the content that git has under ``oid`` to the file ``path``. Raises ``GitError`` as ``run_git``."""
    arguments = ("cat-file", "blob", oid)
    with open(path, "xb") as file:
        done = _run(*arguments, data=b"", out=file.fileno())
    if done.returncode:
        raise _error(arguments, done)


def _run(*arguments: str, data: bytes, out: int) -> subprocess.CompletedProcess[bytes]:
    # The messages are searched below, so they must be in English.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(  # noqa: S603 - no shell, and git is what the user asks for
            ["git", *arguments],  # noqa: S607 - the git of the user
            input=data,
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        raise GitError("git is not installed", hint="install git, or add it to PATH") from None


def _error(arguments: tuple[str, ...], done: subprocess.CompletedProcess[bytes]) -> GitError:
    said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
    first = next((line for line in said if line.startswith(("fatal: ", "error: "))), said[0])  # warnings may be above
    reason = printable(first.removeprefix("fatal: ").removeprefix("error: "))
    if any(text in first for text in _NO_REPOSITORY):
        return NotInRepositoryError("the current directory is not in a git repository with a working tree")
    return GitError(f"git {arguments[0]}: {reason}")


def top_folder() -> str:
    """Return the top folder of the working tree. Raises ``NotInRepositoryError``."""
    return run_git("rev-parse", "--show-toplevel").removesuffix("\n")


def common_folder() -> str:
    """Return the folder that all working trees of the repository share, usually ``.git``.

    Raises ``NotInRepositoryError``.
    """
    return os.path.abspath(run_git("rev-parse", "--git-common-dir").removesuffix("\n"))


def configured(name: str, *where: str) -> str:
    """Return the last value of a setting, or an empty string; ``where`` is ``--global``, ``--local`` or nothing."""
    return run_git("config", *where, "--get", name, allowed=(1,)).removesuffix("\n")
