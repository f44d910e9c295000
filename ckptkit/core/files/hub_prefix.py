"""How a path of the Hugging Face Hub begins, apart from what finds it, since every command asks this of its paths."""

from __future__ import annotations

__all__ = ["HUB_PREFIX", "is_hub_path"]

HUB_PREFIX = "hf:"


def is_hub_path(path: str) -> bool:
    """Return whether ``path`` is ``hf:`` and the name of a repository. ``hf://`` is a URL as any other."""
    return path.startswith(HUB_PREFIX) and not path.startswith(f"{HUB_PREFIX}//")
