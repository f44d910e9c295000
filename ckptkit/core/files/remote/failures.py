"""What went wrong in a request, in plain words; no text of a foreign error is shown with its credentials."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from ckptkit.core.files.remote.urls import host_of, scheme_of, without_secrets
from ckptkit.core.text import printable
from ckptkit.errors import ChangedError, CkptkitError, PathError

__all__ = [
    "NoBucketError",
    "NotFoundError",
    "RefusedError",
    "TransientError",
    "changed",
    "explain",
    "missing_library",
    "not_found",
    "public_errors",
    "refused",
    "status_failure",
]

_EXTRAS = {
    "http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az",
    "abfss": "az", "hf": "hub",
}  # fmt: skip
_CREDENTIALS = {
    "http": "name and password come from ~/.netrc, or stand in the URL: https://USER:PASSWORD@HOST/...",
    "s3": "s3fs takes credentials from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or ~/.aws; "
    "FSSPEC_S3_ANON=true reads a public bucket",
    "gs": "gcsfs takes credentials from GOOGLE_APPLICATION_CREDENTIALS or gcloud auth application-default login; "
    "FSSPEC_GS_TOKEN=anon reads a public bucket",
    "az": "adlfs takes credentials from AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or from "
    "AZURE_STORAGE_CONNECTION_STRING",
    "hub": "huggingface_hub takes a token from HF_TOKEN, or after hf auth login",
}
_RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError",
    "DefaultCredentialsError", "RefreshError", "ClientAuthenticationError", "CredentialUnavailableError",
}  # fmt: skip
_CUT = {  # classes of aiohttp, botocore, urllib3 and requests, which are not imported here
    "ClientPayloadError", "ServerDisconnectedError", "ClientOSError", "ClientConnectionError", "IncompleteRead",
    "ConnectionClosedError", "HTTPClientError", "ResponseStreamingError", "IncompleteReadError", "ChunkedEncodingError",
    "ProtocolError", "RemoteProtocolError", "ReadError", "ClientConnectionResetError", "ContentLengthError",
    "TransferEncodingError", "ResponseParserError", "SSLError", "ConnectError",
}  # fmt: skip
_SLOW = {
    "ReadTimeoutError", "ConnectTimeoutError", "AioReadTimeoutError", "ServerTimeoutError", "SocketTimeoutError",
    "ConnectionTimeoutError", "FSTimeoutError", "ReadTimeout", "ConnectTimeout", "PoolTimeout", "TimeoutError",
    "TimeoutException", "RequestTimeout",
}  # fmt: skip
_LONGEST = 200


class NotFoundError(PathError):
    """No file is there."""


class NoBucketError(NotFoundError):
    """The bucket does not exist."""


class RefusedError(PathError):
    """The store asks for other credentials."""


@contextlib.contextmanager
def public_errors() -> Iterator[None]:
    """Raise the public class for an error that only this package tells from others."""
    try:
        yield
    except (NotFoundError, RefusedError) as error:
        raise PathError(error.reason, hint=error.hint, path=error.path) from None


class TransientError(Exception):
    """A request that may succeed if it is sent again."""

    def __init__(self, reason: str, *, after: float | None = None, is_unreachable: bool = False) -> None:
        """Take the reason, the seconds that the store asks to wait, and whether there was no connection at all."""
        super().__init__(reason)
        self.reason = reason
        self.after = after
        self.is_unreachable = is_unreachable


def not_found(url: str) -> NotFoundError:
    """Return the error for a URL at which nothing is."""
    return NotFoundError("no such file or directory", path=url)


def changed(url: str) -> ChangedError:
    """Return the error for an object that another program replaced."""
    return ChangedError("another program replaced the file while it was read", hint="run the command again", path=url)


def _library(url: str) -> str:
    """Return the extra with the library for a URL, or an empty string."""
    return _EXTRAS.get(scheme_of(url), "")


def refused(url: str, *, is_known: bool = True) -> RefusedError:
    """Return the error for missing or wrong credentials."""
    library = _library(url)
    if library == "hub":
        reason = "not found, or private or gated"
    else:
        reason = "permission denied" if is_known else "credentials are needed, and none were found"
    return RefusedError(reason, hint=_CREDENTIALS.get(library), path=url)


def status_failure(
    status: int, url: str, *, retry_after: str = "", words: str = "", code: str = ""
) -> CkptkitError | TransientError:
    """Return the error for a response with this HTTP status; ``code`` is the word of an S3 server."""
    if code == "NoSuchBucket":
        return NoBucketError(f"there is no bucket {host_of(url)}", path=url)
    if status in (404, 410):
        return not_found(url)
    if status in (401, 403, 407):
        return refused(url)
    if status == 412:
        return changed(url)
    text = f"the server answers {status}{' ' if words else ''}{printable(without_secrets(words))[:_LONGEST]}"
    if status in _RETRIED or code in ("SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable"):
        return TransientError(text, after=float(retry_after) if retry_after.isdecimal() else None)
    return PathError(text, path=url)


def explain(error: BaseException, url: str, *, failure: str = "cannot be read") -> CkptkitError | TransientError:
    """Return the error that says in plain words why a request failed; ``failure`` is said of an unknown error."""
    if isinstance(error, CkptkitError | TransientError):
        return error
    chain = list(_chain(error))
    names = {base.__name__ for link in chain for base in type(link).__mro__}
    if "RevisionNotFoundError" in names:
        return PathError("the repository has no such revision", path=url)
    for link in chain:
        if (found := _status_of(link)) is not None:
            status, code, retry_after = found
            return status_failure(status, url, code=code, retry_after=retry_after)
    if names & _NO_CREDENTIALS:
        return refused(url, is_known=False)
    if names & {"GatedRepoError", "RepositoryNotFoundError", "DisabledRepoError"}:
        return refused(url)
    if "ParamValidationError" in names:  # of botocore, which has sent nothing
        return PathError("not a valid name of a bucket or an object", path=url)
    if "OfflineModeIsEnabled" in names:
        return PathError("HF_HUB_OFFLINE forbids asking the hub", path=url)
    if isinstance(error, ImportError):
        return missing_library(url, error)
    text = printable(without_secrets(" ".join(str(error).split())))[:_LONGEST]
    if isinstance(error, PermissionError) or text.startswith("Forbidden"):  # of gcsfs
        return refused(url)
    if isinstance(error, ValueError) and "credentials" in text:  # of adlfs
        return refused(url, is_known=False)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return not_found(url)
    if isinstance(error, IsADirectoryError):
        return NotFoundError("a folder, not a file", path=url)
    if (unreachable := _unreachable(chain, names, url)) is not None:
        return unreachable
    if names & _SLOW or isinstance(error, TimeoutError):
        return TransientError("no answer in time")
    if names & _CUT or isinstance(error, ConnectionError | EOFError):
        return TransientError("the connection was cut")
    if isinstance(error, NotImplementedError):
        return PathError(f"the library for {scheme_of(url)}:// cannot do this", path=url)
    return PathError(f"{failure}: {type(error).__name__}{': ' if text else ''}{text}", path=url)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and what caused it; libraries wrap the errors of other libraries."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status_of(error: BaseException) -> tuple[int, str, str] | None:
    """Return the HTTP status, the code of S3, and Retry-After in the error of a library, if it has a status."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        metadata = response.get("ResponseMetadata", {})
        code = str(response.get("Error", {}).get("Code", ""))
        status = metadata.get("HTTPStatusCode")
        headers = metadata.get("HTTPHeaders", {})
    else:  # of aiohttp, requests, httpx and azure
        status = getattr(response, "status_code", None) or getattr(error, "status", None)
        status = status or getattr(error, "status_code", None)
        if type(error).__name__ == "HttpError":  # of gcsfs
            status = getattr(error, "code", None)
        code, headers = "", getattr(response, "headers", None) or getattr(error, "headers", None) or {}
    if not isinstance(status, int) or status < 300:
        return None
    return status, code, str(headers.get("retry-after") or headers.get("Retry-After") or "")


def _unreachable(chain: list[BaseException], names: set[str], url: str) -> TransientError | None:
    host = host_of(url)
    for link in chain:
        if isinstance(link, socket.gaierror) or type(link).__name__ == "ClientConnectorDNSError":
            return TransientError(f"the server of {host} is not found", is_unreachable=True)
        if isinstance(link, OSError) and link.errno in (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH):
            return TransientError(f"the server of {host} does not accept connections", is_unreachable=True)
    if names & {"ClientConnectorCertificateError", "SSLCertVerificationError"}:
        return TransientError(f"the certificate of the server of {host} is not valid", is_unreachable=True)
    if names & {"ClientConnectorError", "EndpointConnectionError", "ConnectError"}:
        return TransientError(f"the server of {host} cannot be reached", is_unreachable=True)
    return None


def missing_library(url: str, error: ImportError) -> PathError:
    """Return the error for a library that is not installed; it names the extra or the package."""
    extra = _library(url)
    name = error.name or "its library"
    said = _said_by_fsspec(url) or str(error)
    if error.name and f'"{error.name}"' in said:  # a package is not always called as its module
        said = f"install the package {error.name}"
    return PathError(
        f"{scheme_of(url)}:// needs {printable(name)}, which is not installed",
        hint=f"install the extra [{extra}]" if extra else printable(without_secrets(said))[:_LONGEST],
        path=url,
    )


def _said_by_fsspec(url: str) -> str:
    """Return which package fsspec asks for, or an empty string where it says nothing."""
    try:
        from fsspec.registry import known_implementations
    except ImportError:
        return ""
    scheme = scheme_of(url) or url.partition("::")[0]
    return str(known_implementations.get(scheme, {}).get("err", ""))
