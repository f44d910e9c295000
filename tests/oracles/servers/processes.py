"""Programs that a test starts, with a limit on their time: servers, and ``ckpt`` with the variables of a user."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.helpers_cli import ROOT

__all__ = ["Finished", "free_port", "run_command", "server"]

_LIFE = "1800"  # seconds after which a server ends by itself, also where the tests were killed


@dataclass(frozen=True)
class Finished:
    """What a command printed, its exit code, and the most memory that it used, in bytes."""

    code: int
    out: str
    err: str
    memory: int


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def server(command: Sequence[str | Path], port: int, log: Path) -> Iterator[None]:
    """Run a server while the block runs; the block begins when the port answers."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["timeout", _LIFE, *map(str, command)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=_end_with_parent,  # noqa: PLW1509 - no threads yet
        )  # fmt: skip
    try:
        _wait_for(port, process, log)
        yield
    finally:
        process.terminate()  # timeout hands the signal on
        process.wait(20)


def _end_with_parent() -> None:
    """Let the process get SIGTERM where the tests are killed; only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def run_command(
    *arguments: str | Path,
    environment: Mapping[str, str],
    seconds: float = 60,
    program: Sequence[str] = ("-m", "ckptkit"),
) -> Finished:
    """Run ``ckpt`` in a process of its own, which is killed, and fails the test, after ``seconds``."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
    variables |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        words = [os.fspath(argument) for argument in arguments]
        process = subprocess.Popen(
            [sys.executable, *program, *words], env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        killer = threading.Timer(seconds, process.send_signal, (signal.SIGKILL,))
        killer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            killer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)  # else Popen would wait for it again
        texts = [_text(stream) for stream in (out, err)]
    assert process.returncode != -signal.SIGKILL, f"ckpt {words} took more than {seconds} s\n{texts[1]}"
    return Finished(process.returncode, texts[0], texts[1], usage.ru_maxrss * 1024)


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode("utf-8", "surrogateescape")
