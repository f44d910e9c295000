"""What the names of code in a pickle say: common in honest checkpoints, of no use to any, or known to torch itself."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["is_harmless", "is_suspicious", "is_weights_only"]

# Named by many honest checkpoints and harmless to show: no warning for these, and still nothing of them is run.
_HARMLESS: Final = (
    "argparse.", "types.SimpleNamespace", "pathlib.", "datetime.", "decimal.", "uuid.", "functools.partial", "enum.",
    "omegaconf.", "typing.", "collections.", "transformers.training_args.", "transformers.trainer_utils.",
    "torch.optim.", "torch.Size", "torch.device", "torch.torch_version.", "copyreg.", "copy_reg.", "_codecs.",
    "pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict",
    "numpy.dtype", "numpy.ndarray", "numpy.bool", "numpy.int", "numpy.uint", "numpy.float", "numpy.complex",
    "numpy.core.multiarray.", "numpy._core.multiarray.", "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer", "__torch__.", "torch.jit._pickle.",
    "numpy.random._pickle.", "numpy.random._mt19937.", "numpy.random._pcg64.",
)  # fmt: skip
# Nothing that a checkpoint needs; the list only sharpens the words of a warning and cannot be complete.
_SUSPICIOUS: Final = (
    "os.", "posix.", "nt.", "subprocess.", "sys.", "runpy.", "socket.", "pty.", "shutil.", "importlib.", "ctypes.",
    "webbrowser.", "urllib.", "http.", "requests.", "pickle.", "code.", "asyncio.", "multiprocessing.", "platform.",
    "torch.load", "torch.hub.", "torch.serialization.load", "operator.", "builtins.eval", "builtins.exec",
    "builtins.compile", "builtins.getattr", "builtins.setattr", "builtins.__import__", "builtins.open",
    "__builtin__.eval", "__builtin__.exec", "__builtin__.compile", "__builtin__.getattr", "__builtin__.__import__",
    "__builtin__.open", "__builtin__.apply", "__builtin__.execfile", "__builtin__.file", "builtins.breakpoint",
)  # fmt: skip
# Modules that others import, by which pickles reach them unseen: pathlib.os.system.
_REACHED: Final = frozenset(
    {"os", "posix", "sys", "subprocess", "builtins", "builtin", "importlib", "import", "globals"}
)


# What torch's weights-only loader accepts beyond what is read here: old kinds of tensors, dtypes of few bits.
_WEIGHTS_ONLY: Final = re.compile(
    r"torch\.(?:cuda\.)?(?:sparse\.)?[A-Z][A-Za-z0-9]+Tensor|torch\.u?int[1-7]|builtins\.bytearray"
    r"|torch\.storage\.TypedStorage|torch\._utils\._rebuild_device_tensor_from_(?:cpu_tensor|numpy)"
)


def is_suspicious(name: str) -> bool:
    """Return whether code of this name has no business in a checkpoint; a False promises nothing."""
    return name.startswith(_SUSPICIOUS) or any(part.strip("_") in _REACHED for part in name.split(".")[1:])


def is_harmless(name: str) -> bool:
    """Return whether code of this name is common in honest checkpoints, and needs no warning."""
    return name.startswith(_HARMLESS) and not is_suspicious(name)


def is_weights_only(name: str) -> bool:
    """Return whether torch's weights-only loader takes code of this name, of what no reader here has a meaning for."""
    return _WEIGHTS_ONLY.fullmatch(name) is not None
