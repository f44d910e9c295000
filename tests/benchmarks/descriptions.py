"""What a benchmark is: a command, the commands that it is compared with, and the limits that it must keep."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

__all__ = ["Command", "Growth", "Rival", "Row", "ckpt", "code", "peer", "script", "shell", "timed"]


@dataclass(frozen=True)
class Command:
    """A program and its arguments, in the environment of a peer, or in this one if no peer is named."""

    program: str
    arguments: tuple[str, ...]
    peer: str = ""
    exit_codes: tuple[int, ...] = (0,)
    reports: bool = False  # it prints its own seconds and peak in bytes, without those of its preparations


@dataclass(frozen=True)
class Rival:
    """Another way to do the work, or the least possible work, and the ratio that ckptkit must keep to it."""

    name: str
    command: Command
    limit: float | None = None
    differs: str = ""  # what it leaves out, or does otherwise
    size: float | None = None  # limit of the bytes that ckptkit writes, as a share of those that it writes


@dataclass(frozen=True)
class Row:
    """A work, the files that it needs, and the commands that do it; ``ours`` is None where ckptkit cannot do it yet."""

    group: str
    name: str
    files: tuple[str, ...]
    ours: Command | None
    rivals: tuple[Rival, ...]
    seconds: float | None = None  # limit of the whole process of ckptkit
    megabytes: float | None = None  # limit of its peak, above that of a bare interpreter


@dataclass(frozen=True)
class Growth:
    """A work on files of growing size, which are made one by one under the same names."""

    name: str
    unit: str  # "GB" or "tensors"
    ours: Command
    rival: Rival


def ckpt(line: str, exit_code: int | None = 0) -> Command:
    """Return a command line of ckptkit; without an exit code, 0 and 1 are both accepted."""
    codes = (0, 1) if exit_code is None else (exit_code,)
    return Command("ckpt", tuple(shlex.split(line)), exit_codes=codes)


def code(text: str) -> Command:
    """Return a line of Python for this environment."""
    return Command("python", ("-c", text))


def script(line: str) -> Command:
    """Return a function of ``scripts.py`` with its arguments, for this environment."""
    return Command("script", tuple(shlex.split(line)))


def timed(line: str) -> Command:
    """Return a function of ``timed.py`` with its arguments: it prints its own seconds and peak."""
    return Command("timed", tuple(shlex.split(line)), reports=True)


def shell(line: str, exit_code: int = 0) -> Command:
    """Return a line for ``sh``."""
    return Command("sh", ("-c", line), exit_codes=(exit_code,))


def peer(name: str, line: str, exit_code: int = 0) -> Command:
    """Return a command line of a peer: a program of its environment, or ``script`` and a function of ``scripts.py``."""
    program, *arguments = shlex.split(line)
    return Command(program, tuple(arguments), peer=name, exit_codes=(exit_code,))
