"""An HTTP server: nginx on a folder, with ranges and without, open and behind a password."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.oracles.servers.processes import free_port, server

__all__ = ["PASSWORD", "USER", "WebServer", "web_server"]

USER = "reader"
PASSWORD = "the-password-of-the-tests"  # noqa: S105 - of a server that runs on this machine while the test runs

_SETTINGS = """
daemon off;
pid {root}/pid;
error_log {root}/error.log;
worker_processes 1;
{user}
events {{ worker_connections 256; }}
http {{
    access_log off;
    default_type application/octet-stream;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location /files/ {{ alias {folder}/; }}
        location /listed/ {{ alias {folder}/; autoindex on; }}
        location /without-ranges/ {{ alias {folder}/; max_ranges 0; }}
        location /without-etags/ {{ alias {folder}/; etag off; }}
        location /private/ {{ alias {folder}/; auth_basic private; auth_basic_user_file {root}/users; }}
    }}
}}
"""


@dataclass(frozen=True)
class WebServer:
    """A server that runs: its folder, and its address.

    The folder is served under ``/files/``, ``/listed/`` (with a page that lists it), ``/without-ranges/``,
    ``/without-etags/`` and ``/private/`` (with ``USER`` and ``PASSWORD``).
    """

    folder: Path
    address: str

    @property
    def url(self) -> str:
        """The URL of the folder, with ranges and ETags."""
        return f"{self.address}/files"


@contextmanager
def web_server(root: Path) -> Iterator[WebServer]:
    """Run nginx on ``root / "files"``."""
    pytest.importorskip("aiohttp", reason="needs aiohttp, of the extra [http]")
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("needs nginx: apt-get install nginx-light")
    folder = root / "files"
    folder.mkdir()
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""  # else the worker could not read the folder of the tests
    (root / "users").write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n", encoding="utf-8")
    (root / "nginx.conf").write_text(_SETTINGS.format(root=root, folder=folder, port=port, user=user), encoding="utf-8")
    with server([program, "-e", root / "error.log", "-c", root / "nginx.conf"], port, root / "nginx.log"):
        yield WebServer(folder, f"http://127.0.0.1:{port}")
