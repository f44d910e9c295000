"""Find the store of a URL: the filesystem of fsspec that serves it, made once a process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

from ckptkit.core.files.remote.failures import explain, missing_library, refused
from ckptkit.core.files.remote.retries import timeout
from ckptkit.core.files.remote.running import on_fork
from ckptkit.core.files.remote.store import MOST_REQUESTS, Store
from ckptkit.core.files.remote.stores.hub import HubStore
from ckptkit.core.files.remote.stores.others import AsyncStore, SyncStore
from ckptkit.core.files.remote.stores.s3 import S3Store
from ckptkit.core.files.remote.stores.web import HttpStore
from ckptkit.core.files.remote.traffic import meter_of
from ckptkit.core.files.remote.urls import has_login, host_of, own_part, request_url, scheme_of
from ckptkit.core.text import nearest, quoted
from ckptkit.errors import CkptkitError, PathError

__all__ = ["filesystem", "store_of"]

_WITHOUT_HOST = {"http", "https", "s3", "s3a", "gs", "gcs", "memory", "hf"}  # one filesystem serves every host
_RETRY_THEMSELVES = {"gs", "gcs", "az", "abfs", "abfss", "adl", "hf"}
_WITHOUT_LOGIN = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"}

_WITH_BUCKET = {"s3", "s3a", "gs", "gcs", "az", "http", "https"}
_LOGGERS: Final = ("gcsfs", "s3fs", "aiobotocore", "botocore", "azure", "adlfs", "fsspec", "google")
_LONGEST_START: Final = 10.0  # seconds
_REFUSED_FOR: Final = 2.0

_lock = threading.Lock()
_filesystems: dict[tuple[str, bool], Any] = {}
_refusals: dict[tuple[str, bool], tuple[float, CkptkitError]] = {}
_stores: dict[tuple[str, str], Store] = {}


@on_fork
def _forget() -> None:
    global _lock  # noqa: PLW0603 - a thread of the parent may hold the lock
    _lock = threading.Lock()
    _filesystems.clear()
    _stores.clear()


def store_of(url: str) -> Store:
    """Return the store of a URL. Raises ``PathError`` for an unknown scheme, or a library that is not installed."""
    key = (_key(url), host_of(url))
    with _lock:
        if key not in _stores:
            _stores[key] = _new_store(url)
        return _stores[key]


def _new_store(url: str) -> Store:
    fs, scheme, meter = _filesystem(url, writing=False), scheme_of(url), meter_of(host_of(url))
    if scheme in ("http", "https") and hasattr(fs, "set_session"):
        return HttpStore(fs, meter, pins=True)
    if scheme in ("s3", "s3a") and hasattr(fs, "_call_s3"):
        return S3Store(fs, meter, pins=True)
    if scheme == "hf" and hasattr(fs, "resolve_path"):
        return HubStore(fs, meter, scheme=scheme)
    if getattr(fs, "async_impl", False):
        return AsyncStore(fs, meter, retries_itself=scheme in _RETRY_THEMSELVES)
    return SyncStore(fs, meter, retries_itself=scheme in _RETRY_THEMSELVES, scheme=scheme)


def filesystem(url: str, *, writing: bool = False) -> tuple[Any, str]:
    """Return the filesystem of fsspec that serves a URL, and the path in it.

    One for ``writing`` sends failed requests again itself; else ckptkit does. Raises ``PathError`` as ``store_of``.
    """
    with _lock:
        fs = _filesystem(url, writing=writing)
    path: str = fs._strip_protocol(own_part(url))  # noqa: SLF001 - each filesystem of fsspec has it
    return fs, path


def _key(url: str) -> str:
    """Return what the options of a filesystem depend on."""
    if "::" in url:
        first, _, rest = url.partition("::")
        return f"{scheme_of(first) if '://' in first else first}::{rest}"
    return scheme_of(url) if scheme_of(url) in _WITHOUT_HOST else host_of(url)


def _filesystem(url: str, *, writing: bool) -> Any:
    scheme = scheme_of(url)
    if scheme in _WITH_BUCKET and host_of(url) == f"{scheme}://":
        what = "HOST/PATH" if scheme.startswith("http") else "BUCKET/NAME"
        raise PathError("the URL is not complete", hint=f"write {scheme}://{what}", path=url)
    key = (_key(url), writing)
    if (refusal := _refusals.get(key)) is not None and time.monotonic() - refusal[0] < _REFUSED_FOR:
        raise type(refusal[1])(refusal[1].reason, hint=refusal[1].hint, path=url)
    if key not in _filesystems:
        try:
            _filesystems[key] = _new_filesystem(url, writing=writing)
        except CkptkitError as error:
            _refusals[key] = (time.monotonic(), error)  # a command asks for several things, and need not wait again
            raise
        except ImportError as error:
            raise missing_library(url, error.__cause__ if isinstance(error.__cause__, ImportError) else error) from None
        except Exception as error:  # noqa: BLE001 - libraries raise what they like, some with the URL
            failure = explain(error, url)
            raise (failure if isinstance(failure, CkptkitError) else PathError(failure.reason, path=url)) from None
    return _filesystems[key]


def _new_filesystem(url: str, *, writing: bool) -> Any:
    scheme = scheme_of(url) if "://" in url.partition("::")[0] else url.partition("::")[0]
    try:
        import fsspec
        from fsspec.core import url_to_fs
        from fsspec.registry import registry
    except ImportError as error:
        raise missing_library(url, error) from None
    known = {*fsspec.available_protocols(), *registry}
    if scheme not in known:
        near = nearest(scheme, known)
        raise PathError(
            f"fsspec has no filesystem for {quoted(scheme + '://')}",
            hint=f"did you mean {near}://?" if near else None,
            path=url,
        )
    if scheme in _WITHOUT_LOGIN and has_login(url):
        raise PathError(
            f"{scheme}:// takes no user and password in the URL",
            hint="give them in the environment, as the library does",
            path=url,
        )
    for name in _LOGGERS:  # their warnings are said by our errors; without a handler, Python prints them
        logging.getLogger(name).addHandler(logging.NullHandler())
    options = {"skip_instance_cache": True, **_options(scheme, writing=writing)}
    fs = _made_in_time(lambda: url_to_fs(request_url(url), **options)[0], url)
    if scheme in ("s3", "s3a"):
        fs.retries = 1  # tries, not repetitions; where parts are written, botocore alone sends them again
    return fs


def _made_in_time(make: Callable[[], Any], url: str) -> Any:
    """Return what ``make`` returns. Some libraries look for credentials at servers that never answer."""
    made: Future[Any] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # noqa: BLE001 - it is raised again where the result is awaited
            made.set_exception(error)

    threading.Thread(target=run, name="ckptkit filesystem", daemon=True).start()
    try:
        return made.result(_LONGEST_START)
    except TimeoutError:
        raise refused(url, is_known=False) from None


def _options(scheme: str, *, writing: bool) -> dict[str, Any]:
    """Return the options of a filesystem: it keeps no listings, has no limit for a whole file, and does not retry."""
    from fsspec.config import conf

    if scheme in ("http", "https"):
        import aiohttp

        given = conf.get(scheme, {}).get("client_kwargs", {})
        times = aiohttp.ClientTimeout(total=None, sock_connect=timeout(), sock_read=timeout())
        # trust_env: proxies, and names and passwords in ~/.netrc. A signed redirection must arrive as it is.
        client = {"timeout": times, "trust_env": True, "requote_redirect_url": False, **given}
        return {"use_listings_cache": False, "client_kwargs": client}
    if scheme in ("s3", "s3a"):
        given = conf.get(scheme, {}).get("config_kwargs", {})
        limits = {"read_timeout": timeout(), "connect_timeout": timeout(), "max_pool_connections": MOST_REQUESTS}
        tries = {"mode": "standard", "total_max_attempts": 6} if writing else {"total_max_attempts": 1}
        return {"use_listings_cache": False, "config_kwargs": {**limits, "retries": tries, **given}}
    return {"use_listings_cache": False} if "::" not in scheme else {}
