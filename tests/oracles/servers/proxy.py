"""A proxy in front of a server: it counts the requests, and answers some of them as a bad network or server would."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

__all__ = ["Fault", "Proxy", "Seen", "proxy_of"]

_PIECE = 64 << 10  # bytes that are sent at once
_OWN_HEADERS = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade"}


@dataclass
class Fault:
    """What happens to requests: those with ``method``, ``path`` in their address and a range, if ``ranged``.

    The first ``skip`` of them pass, and the fault happens to the next ``times`` (-1: to all).
    """

    method: str = ""
    path: str = ""
    ranged: bool = False
    skip: int = 0
    times: int = 1
    status: int = 0  # the server is not asked; the answer has this status
    headers: Mapping[str, str] = field(default_factory=dict)  # set in the answer
    cut: int | None = None  # the connection is reset after so many bytes of the body
    missing: int = 0  # so many bytes at the end of the body are left out, and the length says so
    bytes_a_second: int = 0
    silent: float = 0  # seconds before the answer begins
    ignores_range: bool = False  # the whole object is the answer
    shifts_range: int = 0  # the answer has bytes that begin so much later, and says so
    loses_answer: bool = False  # the server does what was asked, and the connection is reset then
    waits: bool = False  # the request is handed on after ``go_on``; ``arrived`` is set before
    arrived: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    happened: int = 0

    def takes(self, seen: Seen) -> bool:
        """Return whether it happens to this request, and count it."""
        if (self.method and seen.method != self.method) or self.path not in seen.path:
            return False
        if self.ranged and not seen.range:
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times == self.happened:
            return False
        self.happened += 1
        return True


@dataclass
class Seen:
    """A request that arrived, and the answer: its status, the bytes of its body, and its times in seconds."""

    method: str
    path: str  # with the query, as a user would write it
    range: str
    started: float
    status: int = 0
    sent: int = 0
    ended: float = 0.0  # when the last bytes were sent


class Proxy:
    """A proxy that runs: its ``url``, the requests that it has ``seen``, and the ``faults`` that are to happen."""

    def __init__(self, upstream: str, *, latency: float = 0.0) -> None:
        """Listen on a free port; each answer begins ``latency`` seconds later than it could."""
        self.upstream = urlsplit(upstream).netloc
        self.latency = latency
        self.quiet = 0.0  # no answer begins before so many seconds have passed without a new request
        self.arrived = 0.0
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def fail(self, **fault: object) -> Fault:
        """Add a fault, and return it."""
        added = Fault(**fault)  # type: ignore[arg-type]
        with self.lock:
            self.faults.append(added)
        return added

    def reset(self) -> None:
        """Forget the faults, and the requests that were seen."""
        with self.lock:
            self.faults.clear()
            self.seen.clear()

    def requests(self, path: str = "", method: str = "") -> list[Seen]:
        """Return the requests for addresses that contain ``path``."""
        with self.lock:
            return [seen for seen in self.seen if path in seen.path and method in ("", seen.method)]

    def rounds(self, path: str = "") -> int:
        """Return how often requests were under way where none was before.

        With ``quiet``, requests that do not wait for each other are in one round, on a busy machine too.
        """
        number, last = 0, float("-inf")
        for seen in sorted(self.requests(path), key=lambda seen: seen.started):
            number += seen.started >= last
            last = max(last, seen.ended)
        return number

    def wait_until_quiet(self) -> None:
        """Wait until no request has arrived for ``quiet`` seconds."""
        while self.quiet and (left := self.arrived + self.quiet - time.monotonic()) > 0:
            time.sleep(left)

    @property
    def bytes_sent(self) -> int:
        """The bytes of all bodies that were sent."""
        return sum(seen.sent for seen in self.requests())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients may leave whenever they like."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: Proxy

    def setup(self) -> None:
        """Let the system keep little of what is sent, so that the count is near to what the client took."""
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIECE)
        super().setup()

    def do_GET(self) -> None:
        owner = self.owner
        seen = Seen(self.command, unquote(self.path), self.headers.get("Range", ""), time.monotonic())
        body = self._body()
        with owner.lock:
            owner.seen.append(seen)
            owner.arrived = seen.started
            fault = next((fault for fault in owner.faults if fault.takes(seen)), Fault())
        if fault.waits:
            fault.arrived.set()
            fault.go_on.wait(60)
        owner.wait_until_quiet()
        time.sleep(owner.latency + fault.silent)
        if fault.status:
            self._answer(seen, fault, fault.status, {"Content-Length": "0"}, ())
        else:
            self._forward(seen, fault, body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - names of the library

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forward(self, seen: Seen, fault: Fault, body: bytes) -> None:
        connection = http.client.HTTPConnection(self.owner.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() in _OWN_HEADERS | {"content-length", "expect"}:
                    continue
                if not (fault.ignores_range and name.lower() == "range"):
                    connection.putheader(name, value)
            if body or self.command in {"PUT", "POST"}:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            headers = {name: value for name, value in response.getheaders() if name.lower() not in _OWN_HEADERS}
            if fault.loses_answer:
                response.read()
                self._reset()
                return
            if self.command == "HEAD" or response.status in {204, 304}:
                self._answer(seen, fault, response.status, headers, ())
            elif "content-length" in {name.lower() for name in headers}:
                self._answer(seen, fault, response.status, headers, _pieces(response))
            else:
                whole = response.read()
                self._answer(seen, fault, response.status, {**headers, "Content-Length": str(len(whole))}, (whole,))
        finally:
            connection.close()

    def _answer(
        self,
        seen: Seen,
        fault: Fault,
        status: int,
        headers: Mapping[str, str],
        pieces: Sequence[bytes] | Iterator[bytes],
    ) -> None:
        seen.status, seen.ended = status, time.monotonic()
        by_name = {name.title(): value for name, value in headers.items()}
        by_name |= {name.title(): value for name, value in fault.headers.items()}
        length = int(by_name.get("Content-Length", 0)) - fault.missing
        by_name["Content-Length"] = str(max(length, 0))
        if fault.shifts_range and "Content-Range" in by_name:
            first, last, rest = re.findall(r"bytes (\d+)-(\d+)(.*)", by_name["Content-Range"])[0]
            by_name["Content-Range"] = f"bytes {int(first) + fault.shifts_range}-{int(last) + fault.shifts_range}{rest}"
            whole = b"".join(pieces)
            pieces = (whole[fault.shifts_range :] + bytes(min(fault.shifts_range, len(whole))),)
        self.send_response_only(status)
        for name, value in by_name.items():
            self.send_header(name, value)
        self.end_headers()
        left = length if fault.cut is None else min(length, fault.cut)
        for piece in pieces:
            taken = piece[: max(left, 0)]
            if taken:
                self._send(taken, seen, fault.bytes_a_second)
                left -= len(taken)
            if left <= 0:
                break
        if fault.cut is not None:
            self._reset()

    def _send(self, data: bytes, seen: Seen, bytes_a_second: int) -> None:
        step = max(bytes_a_second // 20, 1) if bytes_a_second else len(data)
        for start in range(0, len(data), step):
            # Counted before it is sent: when the client has it, the count is right.
            seen.sent, seen.ended = seen.sent + len(data[start : start + step]), time.monotonic()
            self.wfile.write(data[start : start + step])
            if bytes_a_second:
                time.sleep(1 / 20)

    def _reset(self) -> None:
        """Close the connection as a network that breaks: the client gets a reset, not an end."""
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the signature of the library
        """Print nothing."""


def _pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while piece := response.read(_PIECE):
        yield piece


@contextmanager
def proxy_of(upstream: str, *, latency: float = 0.0) -> Iterator[Proxy]:
    """Run a proxy in front of ``upstream`` while the block runs."""
    proxy = Proxy(upstream, latency=latency)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join(10)
