"""Find the prefix that explains most differences between two lists of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptkit.comparison.hints import count_prefixes
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.tensor_ops.operation import Shape

__all__ = ["Prefix", "apply_common_prefix"]

_MAX_RIVALS = 16
_Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix to remove from all found keys, or to add to them."""

    text: str = ""
    is_added: bool = False

    @property
    def rule(self) -> tuple[str, str]:
        """Both sides of the rename."""
        return ("*", f"{self.text}*") if self.is_added else (f"{self.text}*", "*")

    def apply(self, key: str) -> str:
        """Return a found key with the prefix added or removed."""
        return f"{self.text}{key}" if self.is_added else key.removeprefix(self.text)

    def undo(self, key: str) -> str | None:
        """Return the found key that becomes an expected key; None if no found key does."""
        if not self.is_added:
            return f"{self.text}{key}"
        return key.removeprefix(self.text) if key.startswith(self.text) else None


def apply_common_prefix(
    expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]
) -> tuple[Prefix | None, Mapping[str, TensorInfo]]:
    """Return the prefix that explains most differences, and the found tensors by their keys with that prefix changed.

    Without such a prefix, return None and the found tensors as they are. A student and a teacher have the same keys
    below two prefixes: where two prefixes give one tensor two places, or two tensors one place, neither is taken.
    """
    missing = {key: info.shape for key, info in expected.items() if key not in found}
    unexpected = {key: info.shape for key, info in found.items() if key not in expected}
    removed, added = count_prefixes(missing, unexpected)
    options = [(count, Prefix(text)) for text, count in removed.items()]
    options += [(count, Prefix(text, is_added=True)) for text, count in added.items()]
    options.sort(key=lambda option: -option[0])
    best, prefix = options[0] if options else (0, Prefix())
    if best == 0 or 2 * best < min(len(missing), len(unexpected)):
        return None, found
    rivals = [other for count, other in options[1 : _MAX_RIVALS + 1] if 2 * count >= best]
    if any(_compete(prefix, rival, missing, unexpected) for rival in rivals):
        return None, found
    changed = {prefix.apply(key) if key in unexpected else key: info for key, info in found.items()}
    return (prefix, changed) if len(changed) == len(found) else (None, found)


def _compete(prefix: Prefix, rival: Prefix, missing: _Shapes, unexpected: _Shapes) -> bool:
    """Return whether two prefixes give one found tensor two expected places, or one place two found tensors."""
    for key, shape in unexpected.items():
        first, second = prefix.apply(key), rival.apply(key)
        if first != second and missing.get(first) == missing.get(second) == shape:
            return True
    for key, shape in missing.items():
        sources = prefix.undo(key), rival.undo(key)
        if sources[0] != sources[1] and all(source and unexpected.get(source) == shape for source in sources):
            return True
    return False
