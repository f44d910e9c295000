"""Check how the program treats bad input, in a process of its own with limits on memory and time."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TextIO

from ckptkit.core.text import printable
from tests.helpers_cli import ROOT, Ran

__all__ = [
    "MEMORY",
    "Accepted",
    "Command",
    "MakeInput",
    "Refused",
    "assert_accepted",
    "assert_refused",
    "one_of_each_row",
    "paused",
    "run_limited",
    "written",
]

MEMORY = 300 << 20  # bytes of address space, which the program must never exceed
_SECONDS = 20  # of processor time, so that a test does not fail on a busy machine

MakeInput = Callable[[Path], Path]  # writes a file into an empty directory, and returns the path to give to ckpt
Command = Callable[[Path], list[str | Path]]  # the same, for a whole command line


@dataclass(frozen=True)
class Refused:
    """Input that must be refused: a function that writes it, and a part of the reason."""

    make: MakeInput | Command
    reason: str


@dataclass(frozen=True)
class Accepted:
    """Input that must be read: a function that writes it, a part of the warning, and a part of stdout."""

    make: MakeInput | Command
    warning: str = ""
    shown: str = ""


def written(data: bytes | Callable[[], bytes], name: str = "file.pt") -> MakeInput:
    """Return a function that writes one file; ``data`` can be a function that returns the bytes."""

    def make(directory: Path) -> Path:
        (directory / name).write_bytes(data() if callable(data) else data)
        return directory / name

    return make


def run_limited(
    *arguments: str | Path, memory: int = MEMORY, cwd: Path = ROOT, file_size: int = resource.RLIM_INFINITY
) -> Ran:
    """Run ``ckpt`` in a process that can use at most ``memory`` bytes."""
    limits = {"RLIMIT_AS": memory, "RLIMIT_CPU": _SECONDS, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": file_size}
    umask = os.umask(0)  # it can only be read by a change
    os.umask(umask)
    words = [os.fspath(argument) for argument in arguments]
    command = {"arguments": words, "cwd": os.fspath(cwd), "umask": umask, "limits": limits}
    server = _server()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        ends = [os.pipe(), os.pipe()]
        texts = [pool.submit(stack.enter_context(_opened(end)).read) for end, _ in ends]
        socket.send_fds(server, [json.dumps(command).encode()], [end for _, end in ends])
        for _, end in ends:
            os.close(end)
        code = os.waitstatus_to_exitcode(int(server.recv(100)))
        out, err = (text.result() for text in texts)
    return Ran(code, out, err)


def _opened(end: int) -> TextIO:
    return open(end, encoding="utf-8", errors="surrogateescape")


@cache
def _server() -> socket.socket:
    """Start the process that forks for each command, once for all tests of a worker."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        command = [sys.executable, "-m", "tests.hostile.server", str(there.fileno())]
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), pass_fds=[there.fileno()], stdin=subprocess.DEVNULL
        )
    atexit.register(process.wait)
    atexit.register(here.close)  # runs first, and ends the process
    return here


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


_PAUSED = f"""
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
from ckptkit.cli import run
def paused(real):
    def call(*arguments, **options):
        os.kill(os.getpid(), signal.SIGSTOP)
        return real(*arguments, **options)
    return call
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a program that is started by nohup, or in the
signal.signal(signal.SIGINT, signal.default_int_handler)  # background, inherits that both are ignored
name = sys.argv.pop(1)
setattr(os, name, paused(getattr(os, name)))
run()
"""


@contextlib.contextmanager
def paused(call: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Run ``ckpt`` until its first ``os.call``, before which it stops until it gets SIGCONT."""
    command = [sys.executable, "-c", _PAUSED, call, *(os.fspath(argument) for argument in arguments)]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), f"ended without calling os.{call}"
            yield process
        finally:
            process.kill()


def assert_refused(directory: Path, case: Refused, *, command: str = "show") -> None:
    """Assert that the input is refused: exit code 2, one line with path and reason, empty stdout, no file written."""
    ran, argument, before = _run(directory, case.make, command)
    assert (ran.code, ran.out) == (2, ""), ran
    lines = [line for line in ran.err.split("\n") if ": warning: " not in line and ": note: " not in line]
    hint = [
        line for line in lines[1:] if not line.startswith("      ")
    ]  # further ways out are indented below the first
    assert [line.partition(":")[0] for line in (lines[0], *hint)] in (["ckpt", ""], ["ckpt", "hint", ""]), ran.err
    where = lines[0].removeprefix("ckpt: ")
    # The error names the given path, or the part that is wrong, such as a shard.
    if not isinstance(argument, list):
        assert where.startswith((f"{printable(str(argument))}: ", printable(f"{directory / 'in'}/"))), ran.err
    assert case.reason in lines[0], ran.err
    assert len(ran.err) < 3000
    _assert_harmless(ran)
    _assert_untouched(directory, before)


def assert_accepted(directory: Path, case: Accepted, *, command: str = "show") -> None:
    """Assert that the input is read: exit code 0, the warning on stderr, no code run and no file written."""
    ran, _, before = _run(directory, case.make, command)
    assert ran.code == 0, ran.err
    assert case.warning in ran.err, ran.err
    assert case.shown in ran.out, ran.out
    _assert_harmless(ran)
    _assert_untouched(directory, before)


def one_of_each_row(names: Iterable[str]) -> list[str]:
    """Return the first case of every row, for tests that need one process for each case."""
    return list({name.split()[0]: name for name in reversed(list(names))}.values())


def _run(
    directory: Path, make: MakeInput | Command, command: str
) -> tuple[Ran, Path | list[str | Path], dict[str, bytes | None]]:
    inputs = directory / "in"
    inputs.mkdir()
    (directory / "out").mkdir()
    argument = make(inputs)
    before = _content(inputs)
    output: list[str | Path] = [] if command in ("show", "check") else ["-o", directory / "out" / "o.safetensors"]
    arguments = argument if isinstance(argument, list) else [command, argument, *output]
    # The working directory is empty, so that a file written there would be noticed.
    return run_limited(*arguments, cwd=directory / "out"), argument, before


def _assert_harmless(ran: Ran) -> None:
    printed = ran.out + ran.err
    assert all(char.isprintable() or char == "\n" for char in printed), ascii(printed)
    assert "Traceback" not in printed
    assert not re.search(r"\bsafe\b", printed)


def _assert_untouched(directory: Path, before: dict[str, bytes | None]) -> None:
    assert list((directory / "out").iterdir()) == []
    assert _content(directory / "in") == before


def _content(directory: Path) -> dict[str, bytes | None]:
    """Return the content of each file, or None for huge files and files that cannot be read."""
    return {
        os.fsdecode(path.relative_to(directory)): path.read_bytes() if _is_small(path) else None
        for path in sorted(directory.rglob("*"))
    }


def _is_small(path: Path) -> bool:
    return not path.is_symlink() and path.is_file() and path.stat().st_size < 1 << 26 and os.access(path, os.R_OK)
