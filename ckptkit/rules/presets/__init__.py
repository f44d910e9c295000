"""Presets: rule files for well-known models, stored beside this module, such as ``llama-meta-to-hf.toml``."""

from __future__ import annotations

from importlib.resources import files

from ckptkit.core.text import did_you_mean, quoted
from ckptkit.errors import RuleError

__all__ = ["preset_names", "preset_text"]

_SUFFIX = ".toml"


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets of rules, sorted.

    Example:
        >>> "llama-meta-to-hf" in ckptkit.preset_names()
        True
    """
    names = (item.name for item in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def preset_text(name: str) -> str:
    """Return the text of the rule file of a preset; raise ``RuleError``, listing all presets, for an unknown name."""
    known = preset_names()
    if name not in known:
        hint = did_you_mean(name, known, f"presets: {', '.join(known)}")
        raise RuleError(f"there is no preset {quoted(name)}", hint=hint)
    return (files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8")
