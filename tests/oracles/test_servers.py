"""The servers of these tests answer as the programs that they are, and the proxy makes the faults that it is told."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable

import pytest

from tests.oracles.servers.proxy import Proxy
from tests.oracles.servers.s3 import KEY, SECRET, S3Server
from tests.oracles.servers.web import WebServer

DATA = bytes(range(256)) * 4096


def taken(url: str, range_: str = "", method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, headers={"Range": range_} if range_ else {}, method=method)  # noqa: S310
    with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - a server of these tests
        return answer.status, {name.title(): value for name, value in answer.getheaders()}, answer.read()


def test_nginx_serves_ranges_where_it_should(web: WebServer, proxied: Callable[..., Proxy]) -> None:
    (web.folder / "a.bin").write_bytes(DATA)
    proxy = proxied(web.address)
    for address in (web.address, proxy.url):
        status, headers, body = taken(f"{address}/files/a.bin", "bytes=1000-1999")
        assert (status, body, headers["Content-Range"]) == (206, DATA[1000:2000], f"bytes 1000-1999/{len(DATA)}")
        assert headers["Etag"]
        assert "Etag" not in taken(f"{address}/without-etags/a.bin")[1]
        assert taken(f"{address}/without-ranges/a.bin", "bytes=1000-1999")[::2] == (200, DATA)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            taken(f"{address}/private/a.bin")
    assert [seen.range for seen in proxy.requests("files/a.bin")] == ["bytes=1000-1999"]
    assert proxy.bytes_sent >= 1000 + 2 * len(DATA)


def test_the_proxy_makes_faults(web: WebServer, proxied: Callable[..., Proxy]) -> None:
    (web.folder / "b.bin").write_bytes(DATA)
    proxy = proxied(web.address)
    url = f"{proxy.url}/files/b.bin"
    proxy.fail(status=503, headers={"Retry-After": "1"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        taken(url)
    caught.value.close()
    assert (caught.value.code, caught.value.headers["Retry-After"]) == (503, "1")
    proxy.fail(cut=100_000)
    with pytest.raises(ConnectionResetError):
        taken(url)
    proxy.fail(missing=7, ranged=True)
    assert taken(url)[2] == DATA
    assert taken(url, "bytes=0-99")[2] == DATA[:93]
    proxy.fail(shifts_range=1)
    _, headers, body = taken(url, "bytes=0-99")
    assert (headers["Content-Range"], body) == (f"bytes 1-100/{len(DATA)}", DATA[1:100] + b"\0")
    proxy.fail(headers={"ETag": '"other"'}, skip=1)
    assert [taken(url, method="HEAD")[1]["Etag"] == '"other"' for _ in range(3)] == [False, True, False]
    proxy.fail(loses_answer=True)
    with pytest.raises((ConnectionResetError, urllib.error.URLError)):
        taken(url)
    proxy.fail(ignores_range=True)
    assert taken(url, "bytes=0-99")[::2] == (200, DATA)


def test_an_s3_client_works_through_the_proxy(s3: S3Server, proxied: Callable[..., Proxy]) -> None:
    s3fs = pytest.importorskip("s3fs")
    (s3.folder / "a.bin").write_bytes(DATA)
    proxy = proxied(s3.address, latency=0.05)
    client = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=proxy.url, skip_instance_cache=True)
    assert client.cat_ranges(["tests/a.bin"] * 8, list(range(8)), list(range(10, 18))) == [
        DATA[start : start + 10] for start in range(8)
    ]
    assert (len(proxy.requests("a.bin")), proxy.rounds("a.bin")) == (8, 1)
    with client.open("tests/folder/b.bin", "wb", block_size=5 << 20) as file:
        file.write(DATA * 12)
    assert (s3.folder / "folder" / "b.bin").read_bytes() == DATA * 12
