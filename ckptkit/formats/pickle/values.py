"""Inert values: what the pickle machine builds in place of objects that would need code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sized
from typing import Final

from ckptkit.core.text import printable
from ckptkit.errors import FormatError

__all__ = [
    "CodeName",
    "Interpreter",
    "PickledMapping",
    "Placeholder",
    "check_key",
    "is_harmless",
    "is_suspicious",
    "is_weights_only",
]


class CodeName:
    """A name of code, ``module.name``, that the pickle refers to; it is never looked up."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        """Keep the two parts of the name."""
        self.module = module
        self.name = name

    def __str__(self) -> str:
        """Return the dotted name."""
        return f"{self.module}.{self.name}"


class Placeholder:
    """An object that the pickle would build with code: what it would call, with what, and the state it would set."""

    __slots__ = ("args", "factory", "items", "pairs", "state")

    def __init__(self, factory: object, args: object = ()) -> None:
        """Record the call."""
        self.factory = factory
        self.args = args
        self.state: object = None
        self.items: list[object] = []
        self.pairs: dict[object, object] = {}


class PickledMapping(dict[object, object]):
    """A dict subclass of the pickle, such as ``OrderedDict``, with the attributes it carries."""

    __slots__ = ("attributes", "kind")

    def __init__(self, kind: str) -> None:
        """Start empty; ``kind`` is the class it stands for."""
        super().__init__()
        self.kind = kind
        self.attributes: dict[object, object] = {}


_LONGEST_NAME = 1000
_LARGEST_KEY = 2**61 - 1  # integers equal modulo this collide in every dict


def check_key(key: object) -> None:
    """Raise ``FormatError`` where hashing or comparing ``key`` could be made expensive, or is not possible.

    Tuples are left to the caller; complex numbers can all be made to collide, and comparing two
    frozen sets of frozen sets takes exponential time.
    """
    if isinstance(key, str | bytes | float | None):
        return
    if isinstance(key, int):
        if not -_LARGEST_KEY < key < _LARGEST_KEY:
            raise FormatError(f"a dict key is an integer of {key.bit_length()} bits")
    elif type(key).__hash__ is not object.__hash__:
        raise FormatError(f"corrupt pickle: a {type(key).__name__} as dict key")


class Interpreter:
    """What the machine may turn into values: the builders of a format, by dotted name, and its persistent ids.

    A builder takes the arguments as the pickle gave them, and raises ``FormatError`` where they are not
    what it expects. Constants stand for globals that are values, such as ``torch.float32``.
    """

    def __init__(
        self,
        builders: Mapping[str, Callable[..., object]],
        constants: Mapping[str, object],
        persistent: Callable[[object], object] | None = None,
    ) -> None:
        """Keep the tables; ``references`` collects every other global that the pickle names."""
        self.builders = builders
        self.constants = constants
        self.persistent = persistent
        self.references: dict[str, int] = {}
        self.repeated: str | None = None  # a key that was set twice in one mapping
        self.budget = 0

    def spend(self, work: Sized) -> None:
        """Pay for a copy of ``work``; a pickle that copies many times its own size is a bomb."""
        self.budget -= len(work)
        if self.budget < 0:
            raise FormatError("the pickle asks for copies of many times its own size")

    def set_item(self, target: dict[object, object], key: object, value: object) -> None:
        """Set an item as a pickle says, remembering a key that comes twice: nobody sees what its first value was."""
        if key in target and self.repeated is None:
            self.repeated = str(key)
        target[key] = value

    def lookup(self, module: str, name: str) -> object:
        """Return what a global stands for: a constant, or its name."""
        dotted = f"{module}.{name}"
        if len(dotted) > _LONGEST_NAME:
            raise FormatError(f"the pickle refers to code by a name of {len(dotted)} characters")
        if dotted in self.constants:
            return self.constants[dotted]
        if dotted not in self.builders:
            self.references[dotted] = self.references.get(dotted, 0) + 1
        return CodeName(module, name)

    def call(self, function: object, args: object) -> object:
        """Return what calling ``function`` would make: a value where a builder knows it, else a placeholder."""
        builder = self.builders.get(f"{function.module}.{function.name}") if isinstance(function, CodeName) else None
        if builder is None:
            return Placeholder(function, args)
        if not isinstance(args, tuple):
            raise FormatError(f"corrupt pickle: {function} was given a {type(args).__name__} for its arguments")
        try:
            return builder(*args)
        except (TypeError, ValueError, OverflowError, LookupError, AttributeError) as error:
            told = printable(str(error))
            raise FormatError(f"corrupt pickle: {function} was given arguments it does not take ({told})") from None


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
