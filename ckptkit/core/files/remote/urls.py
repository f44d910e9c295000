"""URLs as messages show them, and the credentials that were taken out of them, which only requests have."""

from __future__ import annotations

from ckptkit.lazy_patterns import lazy_pattern

__all__ = [
    "clean_url",
    "has_login",
    "host_of",
    "is_host",
    "join_url",
    "own_part",
    "parts_of",
    "request_url",
    "scheme_of",
    "without_secrets",
]

_HIDDEN = "***"
_MOST_REMEMBERED = 10_000
# Names of query values that only sign a request; the rest of the URL names the object.
_SIGNING = lazy_pattern(
    r"(?i)x-(?:amz|goog|oss|cos|ms|obs)-.*|(?:AWS|OSS|Google)?Access_?Key_?Id|GoogleAccessId|Key-Pair-Id"
    r"|.*(?:token|secret|passw|credential|api[_-]?key|access[_-]?key|signature|auth|session|bearer|jwt|private).*"
    r"|key|pwd|pass|sig|sas|hmac|md5|verify|hdnts|hdnea"
)
_SIGNED = lazy_pattern(r"(?i).*signature|sig|hmac|md5")
_BESIDE_SIGNATURE = lazy_pattern(  # of CloudFront, and of the shared access signatures of Azure
    r"(?i)expires|policy|s[eprvt]|sip|spr|ske|skoid|sks|skt|sktid|skv|saoid|scid|sdd|ses|srt|ss"
)
_SIGNS_ONE_FILE = lazy_pattern(r"(?i)x-(?:amz|goog|oss|cos|ms|obs)-signature|signature")
_NAMES_OBJECT = lazy_pattern(r"(?i)version_?id|generation|revision|ref|commit|sha\d*|etag|snapshot|id|file|path|name")
_LOOKS_RANDOM = lazy_pattern(r"(?=.*\d)(?=.*[A-Za-z])[\w+/=.~%-]{20,}")
_ANY_URL = lazy_pattern(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")

_logins: dict[str, str] = {}  # what stood before @, by the URL of a file, a folder or a server
_queries: dict[str, str] = {}  # the whole query of a file, by the URL that is shown
_signatures: dict[str, str] = {}  # what signs the query of a file and of others, by the folder
_secrets: set[str] = set()


def clean_url(url: str) -> str:
    """Return the URL without credentials, which are remembered for its requests. It may be called again.

    A user and a password before the host are taken out. So are the values of a query that sign it or look like a key.
    Two URLs that differ in the rest stay different.
    """
    if "@" not in url and "?" not in url and url == url.lower():
        return url
    return "::".join(map(_clean_part, url.split("::")))


def _clean_part(part: str) -> str:
    scheme, mark, rest = part.partition("://")
    if not mark:
        return part
    scheme = scheme.lower()
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    login, at, host = rest[:end].rpartition("@")
    if not at or (scheme in ("abfs", "abfss", "az") and ":" not in login):  # there, a container stands before @
        login, host = "", rest[:end]
    user = ""
    if login and not scheme.startswith("http"):  # a name alone is an address; for a web server it may be a token
        user = login.partition(":")[0] + "@"
        login = login if ":" in login else ""
    server = f"{scheme}://{user}{host}"
    path, mark, query = rest[end:].partition("?") if scheme.startswith("http") else (rest[end:], "", "")
    shown = server + path
    if login:
        _remember(_logins, _folder_of(shown), login)
        _remember(_logins, server, login)
        for word in login.split(":", 1)[bool(user) :]:
            _hide(word)
    return shown + _clean_query(shown, query) if mark else shown


def _clean_query(path: str, query: str) -> str:
    """Return the part of a query that is shown, with its question mark; the rest is remembered."""
    pairs = [(*item.partition("=")[::2], item) for item in query.split("&")]
    is_signed = any(_SIGNED.fullmatch(name) for name, _, _ in pairs)
    shown, signing = [], []
    is_masked = False
    for name, value, item in pairs:
        if _SIGNING.fullmatch(name) or (is_signed and _BESIDE_SIGNATURE.fullmatch(name)):
            signing.append(item)
            _hide(value)
        elif _LOOKS_RANDOM.fullmatch(value) and not _NAMES_OBJECT.fullmatch(name):
            shown.append(f"{name}={_HIDDEN}")
            _hide(value)
            is_masked = True
        else:
            shown.append(item)
    text = f"?{'&'.join(shown)}" if shown else ""
    if not signing and not is_masked:
        return text
    number = 1
    while is_masked and _queries.get(path + text, query) != query:  # another object, of which the same would be shown
        number += 1
        text = f"?{'&'.join(shown)}".replace(_HIDDEN, f"{_HIDDEN}{number}")
    _remember(_queries, path + text, query)
    if signing and not _is_of_one_file(pairs):
        _remember(_signatures, _folder_of(path), "&".join(signing))
    return text


def _hide(word: str) -> None:
    """Leave a word out of all texts, as it stands in the URL and as a library decodes it."""
    from urllib.parse import unquote

    _secrets.update(filter(None, (word, unquote(word))))


def _is_of_one_file(pairs: list[tuple[str, str, str]]) -> bool:
    """Return whether what signs a query is worth nothing for the files beside: the signature covers the name."""
    values = {name.lower(): value for name, value, _ in pairs}
    is_signed = any(_SIGNS_ONE_FILE.fullmatch(name) for name in values) and "policy" not in values  # of CloudFront
    return is_signed or values.get("sr") == "b"  # a blob, for a shared access signature of Azure


def _remember(where: dict[str, str], url: str, value: str) -> None:
    where.pop(url, None)
    where[url] = value
    if len(where) > _MOST_REMEMBERED:
        del where[next(iter(where))]


def request_url(url: str) -> str:
    """Return the URL with the credentials that were taken out of it, or out of a URL in the same folder or above."""
    if not _logins and not _queries:
        return url
    return "::".join(map(_request_part, url.split("::")))


def _request_part(part: str) -> str:
    path, _, query = part.partition("?") if part.startswith("http") else (part, "", "")
    login = _find(_logins, path)
    if part in _queries:
        query = _queries[part]
    elif hidden := _find(_signatures, path):
        query = f"{query}&{hidden}" if query else hidden
    if login:
        scheme, _, rest = path.partition("://")
        end = rest.find("/") if "/" in rest else len(rest)
        path = f"{scheme}://{login}@{rest[:end].rpartition('@')[2]}{rest[end:]}"
    return f"{path}?{query}" if query else path


def _find(where: dict[str, str], url: str) -> str:
    """Return the value of the URL, or of the nearest folder above it."""
    start = url.find("://") + 3
    while where:
        if url in where:
            return where[url]
        if url.rfind("/") < start:
            break
        url = url[: url.rfind("/")]
    return ""


def _folder_of(url: str) -> str:
    at = url.rstrip("/").rfind("/")
    return url[:at] if at > url.find("://") + 2 else url.rstrip("/")


def scheme_of(url: str) -> str:
    """Return the scheme of the first part, such as ``s3``; for ``simplecache::s3://...`` it is ``simplecache``."""
    return url.partition("::")[0].partition("://")[0].lower()


def host_of(url: str) -> str:
    """Return the scheme with the server or bucket of the last part of a URL, such as ``s3://bucket``."""
    scheme, mark, rest = url.rsplit("::", maxsplit=1)[-1].partition("://")
    return f"{scheme}{mark}{rest.partition('/')[0].partition('?')[0]}"


def has_login(url: str) -> bool:
    """Return whether a user and a password were taken out of this URL, or out of one of the same server."""
    return bool(_find(_logins, url.partition("?")[0]))


def without_secrets(text: str) -> str:
    """Return the text of a foreign error without the credentials in its URLs, and without all that were taken out."""
    text = _ANY_URL.sub(lambda match: clean_url(match[0]), text)
    for secret in sorted(_secrets, key=len, reverse=True):
        if len(secret) > 3:
            text = text.replace(secret, _HIDDEN)
    return text


def join_url(url: str, *names: str) -> str:
    """Return the URL of a name in the folder at ``url``; a name may be a path. A query stays at the end."""
    before, own, after = parts_of(url)
    if own.startswith("http"):
        names = tuple(name.replace("%", "%25").replace("?", "%3F").replace("#", "%23") for name in names)
    return before + "/".join([own.rstrip("/") if not own.endswith("://") else own[:-1], *names]) + after


def parts_of(url: str) -> tuple[str, str, str]:
    """Return what is before, in and after the part of a URL that holds its names: the first part with a scheme.

    A query is after it.
    """
    parts = url.split("::")
    number = next(number for number, part in enumerate(parts) if "://" in part)
    before = "".join(f"{part}::" for part in parts[:number])
    after = "".join(f"::{part}" for part in parts[number + 1 :])
    own, mark, query = parts[number].partition("?") if parts[number][:4].lower() == "http" else (parts[number], "", "")
    return before, own, mark + query + after


def own_part(url: str) -> str:
    """Return the part of a URL that its filesystem reads, with credentials: the first where that has a scheme."""
    first = url.partition("::")[0]
    return request_url(first if "://" in first else url)


def is_host(url: str) -> bool:
    """Return whether a URL is that of a whole bucket or server."""
    return "/" not in parts_of(url)[1].partition("://")[2]
