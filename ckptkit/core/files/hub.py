"""Find ``hf:org/name`` in the cache that Hugging Face libraries and ``hf download`` fill; the cache is only read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property

from ckptkit.core.files.hub_prefix import HUB_PREFIX
from ckptkit.core.text import listed, nearest, shell_word
from ckptkit.errors import PathError
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["HubPath", "hub_path", "may_ask_hub", "parse_hub_path", "suggest_hub_path"]

_KINDS = ("models", "datasets", "spaces")
_MAIN = "main"
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
_REFERENCES = lazy_pattern(r"refs/(?:convert/[\w.-]+|pr/\d+)(?=/|\Z)", re.ASCII)  # revisions with slashes
_ID = lazy_pattern(r"\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)
_SHORT_COMMIT = lazy_pattern(r"[0-9a-f]{5,40}")
_SHOWN = 12  # digits of a commit
_LONGEST_REFERENCE = 1000  # bytes of a file in refs/
_MOST_NAMED = 4


@dataclass(frozen=True)
class HubPath:
    """The parts of ``hf:[datasets/]org/name[@revision][/inside]``, and where the cache has it.

    ``kind`` is ``models``, ``datasets`` or ``spaces``. Without a revision, it is ``main``.
    """

    text: str
    kind: str
    repository: str
    revision: str
    inside: str

    @property
    def url(self) -> str:
        """The URL of the same file or folder at the hub."""
        from urllib.parse import quote

        kind = "" if self.kind == _KINDS[0] else f"{self.kind}/"
        revision = self.revision if _REFERENCES.fullmatch(self.revision) else quote(self.revision, safe="")
        at = "" if self.revision == _MAIN else f"@{revision}"
        inside = f"/{self.inside}" if self.inside else ""
        return f"hf://{kind}{self.repository}{at}{inside}"

    @property
    def repository_text(self) -> str:
        """The repository as ``hf:`` and its name, without revision and file."""
        return HUB_PREFIX + ("" if self.kind == _KINDS[0] else f"{self.kind}/") + self.repository

    @property
    def download(self) -> str:
        """The command of huggingface_hub that downloads the repository."""
        kind = "" if self.kind == _KINDS[0] else f" --repo-type {self.kind[:-1]}"
        revision = "" if self.revision == _MAIN else f" --revision {shell_word(self.revision)}"
        return f"hf download {self.repository}{kind}{revision}"

    @cached_property
    def commit(self) -> str:
        """The commit of the revision, if the cache has a snapshot of it, or an empty string.

        Raises ``PathError`` for a short commit that two snapshots begin with, and where the cache cannot be read.
        """
        commit = _read_reference(os.path.join(self._folder, "refs", *self.revision.split("/")))
        commits = self.commits
        if commit in commits:
            return commit
        if not commit and _SHORT_COMMIT.fullmatch(self.revision):
            found = [name for name in commits if name.startswith(self.revision)]
            if len(found) > 1:
                raise PathError(f"{len(found)} commits of the cache begin with it", hint=_or(found), path=self.text)
            return found[0] if found else ""
        return self.revision if not commit and self.revision in commits else ""

    @property
    def place(self) -> str:
        """The path of the file or folder in the snapshot of the cache, if there is one. Raises as ``commit``."""
        return os.path.join(self._folder, "snapshots", self.commit, *self.inside.split("/")).rstrip("/")

    @property
    def pinned(self) -> str:
        """The same file or folder at the commit of the cache, whatever its branch becomes."""
        inside = f"/{self.inside}" if self.inside else ""
        return f"{self.repository_text}@{self.commit[:_SHOWN]}{inside}"

    @property
    def commits(self) -> list[str]:
        """The commits of which the cache has a snapshot, in alphabetical order. Raises ``PathError``."""
        return sorted(name for name in _names(os.path.join(self._folder, "snapshots")) if not name.startswith("."))

    @property
    def is_known_missing(self) -> bool:
        """Whether the cache notes that the hub has no such file at the commit."""
        path = os.path.join(self._folder, ".no_exist", self.commit, *self.inside.split("/"))
        return bool(self.commit and self.inside) and os.path.isfile(path)

    @property
    def _folder(self) -> str:
        return os.path.join(_cache_folder(), _folder_name(self.kind, self.repository))


def hub_path(path: str, *, asking: bool = True) -> str:
    """Return the path in the cache of ``hf:org/name[@revision][/file]``, or its URL where the cache does not have it.

    Without ``asking``, a file that the snapshot of the cache lacks is a path that does not exist. Raises ``PathError``
    where the cache does not have it and the hub cannot be asked, and for a name that is not valid.
    """
    parsed = parse_hub_path(path)
    if parsed.commit and (not asking or os.path.exists(parsed.place)):
        return parsed.place
    may_ask_hub(parsed, "not in the Hugging Face cache")
    return parsed.url


def may_ask_hub(path: HubPath, reason: str) -> None:
    """Raise ``PathError`` with ``reason`` if the hub cannot be asked: it is forbidden, or its library is missing."""
    from importlib.util import find_spec

    if "/" not in path.repository:
        hint = _cached_names(path) or "write hf:org/name, with the organisation or user and the name of the repository"
        raise PathError(reason, hint=hint, path=path.text)
    variable = next(
        (name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "").upper() in _TRUE), ""
    )
    if variable:
        reason += f", and {variable} forbids asking the hub"
        raise PathError(reason, hint=_cached_names(path) or _without(variable, path), path=path.text)
    if find_spec("huggingface_hub") is None or find_spec("fsspec") is None:
        reason += ", and asking the hub needs huggingface_hub, which is not installed"
        ways = ["install the extra [hub]", path.download]
        raise PathError(reason, hint=", or ".join(filter(None, [_cached_names(path), *ways])), path=path.text)


def _without(variable: str, path: HubPath) -> str:
    return f"without {variable}: {path.download}"


def _cached_names(path: HubPath) -> str:
    """Return what the cache has instead: other revisions, a file that is not whole, or a name like this one."""
    if path.is_known_missing:
        return f"commit {path.commit[:_SHOWN]} has no such file: give another file or @revision"
    if path.commit:
        return ""
    others = path.commits
    if others:
        shown = [f"{path.repository_text}@{commit[:_SHOWN]}" for commit in others]
        return f"the cache has {_or(shown)}"
    prefix = f"{path.kind}--"
    names = {name.removeprefix(prefix): name for name in _names(_cache_folder()) if name.startswith(prefix)}
    near = nearest(path.repository.replace("/", "--"), names, cutoff=0.8)
    return f"did you mean {shell_word(_text_of(path.kind, near))}?" if near else ""


def _text_of(kind: str, folder: str) -> str:
    return HUB_PREFIX + ("" if kind == _KINDS[0] else f"{kind}/") + folder.replace("--", "/", 1)


def _or(names: list[str]) -> str:
    return listed(names, _MOST_NAMED, show=str)


def parse_hub_path(path: str, *, from_cache: bool = True) -> HubPath:
    """Return the parts of ``hf:[datasets/]org/name[@revision][/inside]``. Raises ``PathError`` if it is not valid.

    With ``from_cache``, a repository without an organisation, as the oldest have it, is found if the cache has it.
    """
    from urllib.parse import unquote

    text = path.removeprefix(HUB_PREFIX).rstrip("/")
    kind, slash, rest = text.partition("/")
    if not slash or kind not in _KINDS:
        kind, rest = _KINDS[0], text
    repository, mark, after = rest.partition("@")
    if mark and repository.count("/") < 2:
        reference = _REFERENCES.match(after)
        revision = reference[0] if reference else after.partition("/")[0]
        inside = after[len(revision) :].removeprefix("/")
        revision = unquote(revision)
    else:
        repository, inside = _split_repository(kind, rest) if from_cache else _first_two(rest)
        revision = _MAIN
    names = [*revision.split("/"), *(inside.split("/") if inside else ())]
    if not _ID.fullmatch(repository) or any(name in ("", ".", "..") or "\0" in name for name in names):
        raise PathError(
            "not a valid name of a repository",
            hint="write hf:org/name, hf:org/name/file or hf:org/name@revision",
            path=path,
        )
    return HubPath(path, kind, repository, revision, inside)


def suggest_hub_path(name: str) -> str:
    """Return how ``org/name`` is written as a path. A name alone needs its organisation, unless the cache has it."""
    is_whole = "/" in name or _names(os.path.join(_cache_folder(), _folder_name(_KINDS[0], name)))
    return f"{HUB_PREFIX}{name}" if is_whole else f"{HUB_PREFIX}ORG/{name}"


def _first_two(text: str) -> tuple[str, str]:
    names = text.split("/", 2)
    return "/".join(names[:2]), "/".join(names[2:])


def _split_repository(kind: str, text: str) -> tuple[str, str]:
    first, _, rest = text.partition("/")
    second = rest.partition("/")[0]
    whole, inside = _first_two(text)
    folder = _cache_folder()
    if second and not _names(os.path.join(folder, _folder_name(kind, whole))):
        is_old = bool(_names(os.path.join(folder, _folder_name(kind, first))))
        return (first, rest) if is_old else (whole, inside)
    return whole, inside


def _folder_name(kind: str, repository: str) -> str:
    return "--".join([kind, *repository.split("/")])


def _cache_folder() -> str:
    """Return the folder of the cache, as huggingface_hub finds it from the same variables."""
    environment = os.environ
    home = environment.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    home = _expanded(environment.get("HF_HOME", os.path.join(home, "huggingface")))
    legacy = environment.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    return _expanded(environment.get("HF_HUB_CACHE", legacy))


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def _read_reference(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST_REFERENCE).strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""
    except OSError as error:
        raise PathError((error.strerror or str(error)).lower(), path=path) from None


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise PathError((error.strerror or str(error)).lower(), path=folder) from None
