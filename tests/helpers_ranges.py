"""A small web server in a thread: it sends ranges, counts what was asked, and misbehaves as a test tells it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["RangeServer", "range_server"]


@dataclass
class RangeServer:
    """A server that runs. A test changes its fields between requests."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etags: bool = True
    ranges: bool = True
    sizes: bool = True  # a range says how large the file is
    shift: int = 0  # of the first byte that the answer names
    failures: list[int] = field(default_factory=list)  # the status of the next answers
    cut_after: list[int] = field(default_factory=list)  # bytes of the next bodies, after which the connection is closed
    asked: list[tuple[str, str]] = field(default_factory=list)  # the path and the range of each request
    headers: list[dict[str, str]] = field(default_factory=list)  # of each request
    together: threading.Barrier | None = None  # each answer waits until so many requests have come
    sent: int = 0

    def url(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.address}/{name}"


@contextmanager
def range_server() -> Iterator[RangeServer]:
    """Run a server while the block runs."""
    server = RangeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

        def do_GET(self) -> None:
            """Answer with a range."""
            name = self.path.partition("?")[0].removeprefix("/")
            server.asked.append((name, self.headers.get("Range", "")))
            server.headers.append({**dict(self.headers), "path": self.path})
            if server.together is not None:
                server.together.wait(5)
            data = server.files.get(name)
            if server.failures:
                self._plain(server.failures.pop(0), data or b"")
                return
            if data is None:
                self._plain(404)
                return
            start, end = 0, len(data)
            if server.ranges and "Range" in self.headers:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                start, end = int(first), min(int(last) + 1, end)
                self.send_response(206)
                size = len(data) if server.sizes else "*"
                self.send_header("Content-Range", f"bytes {start + server.shift}-{end - 1}/{size}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(end - start))
            if name.endswith("/"):
                self.send_header("Content-Type", "text/html")
            if server.etags:
                self.send_header("ETag", f'"{hash(data)}"')
            self.send_header("Last-Modified", f"Mon, 30 Nov 2026 0{data[0] % 10}:00:00 GMT")
            self.end_headers()
            body = data[start:end]
            if server.cut_after:
                body = body[: server.cut_after.pop(0)]
                self.close_connection = True
            try:
                for at in range(0, len(body), 1 << 16):
                    server.sent += len(body[at : at + (1 << 16)])  # before the client has it, and the test goes on
                    self.wfile.write(body[at : at + (1 << 16)])
            except ConnectionError:  # the client has seen enough
                self.close_connection = True

        def _plain(self, status: int, data: bytes = b"") -> None:
            text = b"x" * 1000 if status == 416 else b""
            self.send_response(status)
            if status == 416:
                self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(text)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
