"""Servers on this machine, for tests of paths that are URLs. Each worker of pytest starts its own when a test asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.oracles.servers.proxy import Proxy, proxy_of
from tests.oracles.servers.s3 import S3Server, s3_server, variables_of
from tests.oracles.servers.web import WebServer, web_server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server that names objects by their MD5, as S3 does."""
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="session")
def s3_without_etags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server for large objects, which it does not read to name them."""
    with s3_server(tmp_path_factory.mktemp("s3"), etags=False) as running:
        yield running


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """An HTTP server."""
    with web_server(tmp_path_factory.mktemp("web")) as running:
        yield running


@pytest.fixture
def proxied() -> Iterator[Callable[..., Proxy]]:
    """A function that starts a proxy in front of an address: ``proxied(address, latency=0.0)``."""
    with ExitStack() as running:
        yield lambda address, *, latency=0.0: running.enter_context(proxy_of(address, latency=latency))


@dataclass(frozen=True)
class Store:
    """A server behind a proxy: the folder that it serves, its URL, and the variables of its user."""

    folder: Path
    proxy: Proxy
    url: str
    variables: dict[str, str]

    def made(self, name: str, write: Callable[[Path], object]) -> str:
        """Return the URL of a folder in which ``write`` has written once."""
        if not (self.folder / name).exists():
            (self.folder / name).mkdir(parents=True)
            write(self.folder / name)
        return f"{self.url}/{name}"


@pytest.fixture(params=["s3", "web"])
def store(request: pytest.FixtureRequest, proxied: Callable[..., Proxy]) -> Store:
    """The S3 server and the HTTP server, one after the other."""
    server: S3Server | WebServer = request.getfixturevalue(request.param)
    proxy = proxied(server.address)
    if isinstance(server, S3Server):
        return Store(server.folder, proxy, server.url, variables_of(proxy.url))
    return Store(server.folder, proxy, f"{proxy.url}/files", {})
