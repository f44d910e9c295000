"""A small Hugging Face Hub: it lists repositories, and sends ranges of their files from another address, as hubs do.

``huggingface_hub`` finds it by ``HF_ENDPOINT``. Put a proxy of ``proxy.py`` in front of it for faults.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["COMMIT", "SIGNATURE", "TOKEN", "HubServer", "hub_server"]

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
TOKEN = "hf_the-token-of-the-tests"  # noqa: S105 - of a server that runs on this machine while the test runs
SIGNATURE = "the-signature-of-the-tests"
_ID = r"(?P<id>[\w.-]+/[\w.-]+)"
_API = re.compile(
    rf"/api/(?:models|datasets)/{_ID}(?:/(?P<call>revision|tree|paths-info|preupload|commit)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
_RESOLVE = re.compile(rf"/(?:datasets/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_STORE = re.compile(rf"/store/{_ID}/(?P<path>.+)")
_LARGE = 100_000  # bytes: larger files are sent from the store


class HubServer:
    """A hub that runs: repositories are folders ``org/name`` of ``folder``, with one revision, ``main``.

    Those in ``gated`` need a token whose user was let in, those in ``private`` are only seen with a token.
    """

    def __init__(self, folder: Path) -> None:
        """Listen on a free port."""
        self.folder = folder
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.commits: list[list[str]] = []  # the paths of the files that each commit wrote
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: HubServer

    def do_GET(self) -> None:
        """Answer one request."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        path = unquote(address.path)
        if match := _API.fullmatch(path):
            self._api(match, body)
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match)
        elif match := _STORE.fullmatch(path):
            if parse_qs(address.query).get("Signature") != [SIGNATURE] or self.headers.get("Authorization"):
                self._send(403, b"")
            else:
                self._file(self.owner.folder / match["id"] / match["path"])
        else:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET  # noqa: N815 - names of the library

    def _is_refused(self, match: re.Match[str]) -> bool:
        """Answer as the hub does where the repository is missing, private or gated, or has no such revision."""
        repository, given = match["id"], self.headers.get("Authorization", "")
        is_known = given == f"Bearer {TOKEN}"
        if not (self.owner.folder / repository).is_dir() or (repository in self.owner.private and not is_known):
            self._send(404 if is_known else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repository in self.owner.gated and not is_known and match.re is not _API:
            self._send(401, b"", {"X-Error-Code": "GatedRepo"})
        elif match["revision"] not in {None, "main", COMMIT}:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _api(self, match: re.Match[str], body: bytes) -> None:
        if self._is_refused(match):
            return
        root = self.owner.folder / match["id"]
        if match["call"] == "tree":
            place = root / (match["path"] or "")
            if not place.is_dir():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            query = parse_qs(urlsplit(self.path).query)
            found = place.rglob("*") if query.get("recursive", ["False"])[0].lower() == "true" else place.iterdir()
            self._json([_entry(root, file) for file in sorted(found)])
        elif match["call"] == "paths-info":
            names = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            self._json([_entry(root, root / name) for name in names if (root / name).exists()])
        elif match["call"] == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]})
        elif match["call"] == "commit":
            self._commit(match["id"], [json.loads(line) for line in body.splitlines()])
        else:
            numbers = {
                "private": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [],
            }  # what old versions need
            self._json({"id": match["id"], "sha": COMMIT, **numbers})

    def _commit(self, repository: str, rows: list[dict[str, Any]]) -> None:
        """Write and remove files; every file is in the request, as small ones are at a real hub."""
        for row in rows:
            place = self.owner.folder / repository / row["value"].get("path", "")
            if row["key"] == "file":
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(base64.b64decode(row["value"]["content"]))
            elif row["key"] == "deletedFile":
                place.unlink()
        self.owner.commits.append([row["value"]["path"] for row in rows if row["key"] == "file"])
        page = f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}"
        self._json({"commitUrl": page, "commitOid": COMMIT, "success": True})

    def _resolve(self, match: re.Match[str]) -> None:
        if self._is_refused(match):
            return
        file = self.owner.folder / match["id"] / match["path"]
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif file.stat().st_size > _LARGE:
            headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": _etag(file), "X-Linked-Size": str(file.stat().st_size)}
            signed = f"{self._host}/store/{match['id']}/{match['path']}?Signature={SIGNATURE}"
            self._send(302, b"", {**headers, "Location": signed})
        else:
            self._file(file)

    @property
    def _host(self) -> str:
        # another name of this machine is another host to the client, which then sends no token
        return f"http://localhost:{self.headers['Host'].rpartition(':')[2]}"

    def _file(self, file: Path) -> None:
        data = file.read_bytes()
        headers = {"ETag": _etag(file), "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self._send(200, data, headers)
            return
        first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        self._send(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the signature of the library
        """Print nothing."""


def _etag(file: Path) -> str:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f'"{digest if file.stat().st_size > _LARGE else digest[:40]}"'


def _entry(root: Path, path: Path) -> dict[str, object]:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}  # noqa: S324
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    entry: dict[str, object] = {"type": "file", "oid": digest[:40], "size": size, "path": name}
    return {**entry, "lfs": {"oid": digest, "size": size, "pointerSize": 134}} if size > _LARGE else entry


@contextmanager
def hub_server(folder: Path) -> Iterator[HubServer]:
    """Run the hub while the block runs."""
    hub = HubServer(folder)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join(10)
