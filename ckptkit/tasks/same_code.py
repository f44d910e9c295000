"""Whether another machine has the same ckptkit and the same libraries: they decide the bytes of a result."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from typing import Final, NamedTuple

__all__ = ["LIBRARIES", "Code", "code_here", "version_of"]

LIBRARIES: Final = ("torch", "numpy", "ml_dtypes")  # other versions may round to other bits


class Code(NamedTuple):
    """The version of an installed ckptkit, or an empty string; a hash of its source files; versions of libraries."""

    version: str
    digest: str
    libraries: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return version and hash in a few characters."""
        return f"{self.version or 'not installed'}, code {self.digest[:8]}"

    def difference(self, other: Code) -> tuple[str, str, str]:
        """Return what differs, and what it is here and in the other."""
        if self[:2] == other[:2]:
            for name, mine, its in zip(LIBRARIES, self.libraries, other.libraries, strict=True):
                if mine != its:
                    return name, mine or "not installed", its or "not installed"
        return "ckptkit", str(self), str(other)


def version_of(library: str) -> str:
    """Return the version of an installed library, or an empty string."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return ""


@cache
def code_here() -> Code:
    """Return what this process runs."""
    found = hashlib.sha256()
    package = os.path.dirname(os.path.dirname(__file__))
    for folder, folders, names in os.walk(package):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    content = file.read()
                found.update(f"{os.path.relpath(path, package)}\0{len(content)}\0".encode())
                found.update(content)
    # A build for another accelerator computes the same on processors.
    libraries = tuple(version_of(name).partition("+")[0] for name in LIBRARIES)
    return Code(version_of("ckptkit"), found.hexdigest(), libraries)
