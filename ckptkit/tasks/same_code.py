"""Whether another machine has the same ckptkit: its code decides the bytes of a result."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from typing import NamedTuple

__all__ = ["Code", "code_here"]


class Code(NamedTuple):
    """The version of an installed ckptkit, or an empty string, and a hash of its source files."""

    version: str
    digest: str

    def __str__(self) -> str:
        """Return both in a few characters."""
        return f"{self.version or 'not installed'}, code {self.digest[:8]}"


@cache
def code_here() -> Code:
    """Return what this process runs."""
    from importlib.metadata import PackageNotFoundError, version

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
    try:
        return Code(version("ckptkit"), found.hexdigest())
    except PackageNotFoundError:
        return Code("", found.hexdigest())
