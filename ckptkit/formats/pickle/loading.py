"""What a file needs of ``torch.load``: whether the weights-only loader takes it, and on which devices it was saved."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ckptkit.core.checkpoint import TorchLoading
from ckptkit.core.text import listed
from ckptkit.formats.pickle.values import Interpreter, is_weights_only

__all__ = ["torch_loading"]

_TAR = "torch-tar"
_FORMATS = ("torch-zip", "torch-legacy", _TAR)
_EVERYWHERE = frozenset({"cpu", "meta"})


def torch_loading(
    interpreter: Interpreter, locations: Iterable[str], sources: Collection[str], file_format: str
) -> TorchLoading | None:
    """Return what a file needs of ``torch.load``; None if torch.save did not write it.

    The code names and opcodes of its pickle, which ``interpreter`` met, are compared with those that torch's
    weights-only loader allows without a list of the user. ``locations`` are the devices of its storages, and
    ``sources`` the source code that it embeds. Nothing of the file is run.
    """
    if file_format not in _FORMATS:
        return None
    names = tuple(sorted(name for name in interpreter.names if not is_weights_only(name)))
    reasons: list[str] = []
    if file_format == _TAR:
        reasons.append("it is in the tar format")
    if names:
        reasons.append(f"it names code that is not allowed by default: {listed(names, 4)}")
    if sources:
        reasons.append("it embeds the source code of a module")
    if opcodes := sorted(interpreter.opcodes_refused_by_torch):
        reasons.append(f"its pickle has opcodes beyond protocol 2 ({', '.join(map('0x{:02x}'.format, opcodes[:4]))})")
    return TorchLoading(tuple(reasons), names, tuple(sorted(set(locations) - _EVERYWHERE)))
