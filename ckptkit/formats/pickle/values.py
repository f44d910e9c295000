"""The values that parsing a pickle returns, with placeholders for objects that need code."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sized
from typing import Final, cast

from ckptkit.core.text import printable
from ckptkit.errors import FormatError

__all__ = [
    "CodeName",
    "Interpreter",
    "PickledMapping",
    "Placeholder",
    "are_good_keys",
    "check_key",
    "is_harmless",
    "is_suspicious",
    "is_weights_only",
]


class CodeName:
    """The name of code, ``module.name``, to which a pickle refers; the code is never imported."""

    __slots__ = ("dotted", "module", "name")

    def __init__(self, module: str, name: str) -> None:
        """Take the module and the name in the module."""
        self.module = module
        self.name = name
        self.dotted = f"{module}.{name}"

    def __str__(self) -> str:
        """Return the dotted name."""
        return self.dotted


class Placeholder:
    """An object that only code could build: the function to call, the arguments, and the state to set."""

    __slots__ = ("args", "factory", "items", "pairs", "state")

    def __init__(self, factory: object, args: object = ()) -> None:
        """Take the function and the arguments of the call."""
        self.factory = factory
        self.args = args
        self.state: object = None
        self.items: list[object] = []
        self.pairs: dict[object, object] = {}


class PickledMapping(dict[object, object]):
    """An instance of a dict subclass, such as ``OrderedDict``, with its attributes."""

    __slots__ = ("attributes", "kind")

    def __init__(self, kind: str) -> None:
        """Make an empty mapping; ``kind`` is the name of the subclass."""
        super().__init__()
        self.kind = kind
        self.attributes: dict[object, object] = {}


_LONGEST_NAME = 1000
_LARGEST_KEY = 2**61 - 1  # integers that are equal modulo this number collide in every dict


def check_key(key: object) -> None:
    """Raise ``FormatError`` for a key that cannot be hashed, or that an attacker could make slow to hash or compare.

    The caller checks tuples. Complex numbers can be made to collide, and comparing two frozen sets of frozen sets
    takes exponential time.
    """
    if isinstance(key, str | bytes | float | None):
        return
    if isinstance(key, int):
        if not -_LARGEST_KEY < key < _LARGEST_KEY:
            raise FormatError(f"a dict key is an integer of {key.bit_length()} bits")
    elif type(key).__hash__ is not object.__hash__:
        raise FormatError(f"corrupt pickle: a {type(key).__name__} as dict key")


def are_good_keys(keys: Collection[object]) -> bool:
    """Return whether ``check_key`` accepts all of these keys, where a look at all of them at once can tell."""
    kinds = set(map(type, keys))
    if kinds == {int}:
        numbers = cast("Collection[int]", keys)
        return min(numbers) > -_LARGEST_KEY and max(numbers) < _LARGEST_KEY
    return kinds in ({str}, {float})


class Interpreter:
    """The functions and constants that a pickle may use: tables by dotted name.

    A builder gets the arguments of the pickle and returns a value; for wrong arguments it raises ``FormatError``.
    A constant is the value of a name, such as ``torch.float32``. Every other function call becomes a placeholder.
    """

    def __init__(
        self,
        builders: Mapping[str, Callable[..., object]],
        constants: Mapping[str, object],
        persistent: Callable[[object], object] | None = None,
        set_state: Callable[[object, object], None] = lambda *_: None,
        refused_by_torch: Collection[str] = (),
    ) -> None:
        """Take the tables; ``references`` collects every other code name of the pickle.

        ``persistent`` reads persistent ids. ``set_state`` gets each value that is neither a mapping nor a placeholder
        and that the pickle gives a state, and this state. ``refused_by_torch`` has names that count as references
        even if there is a builder, because torch's weights-only loader refuses these names.
        """
        self.builders = builders
        self.constants = constants
        self.persistent = persistent
        self.set_state = set_state
        self.refused_by_torch = refused_by_torch
        self.keep_bytes: Callable[[int, int], object] | None = None  # makes a value of long bytes that are not read
        self.references: dict[str, int] = {}
        self.names: set[str] = set()  # every code name of the pickle
        self.opcodes_refused_by_torch: set[int] = set()  # those of the pickle that torch's weights-only loader refuses
        self.repeated: str | None = None  # the first key that was set twice in one mapping
        self.budget = 0
        self.steps = 0  # the opcodes of the pickles, rounded down

    def count_copy(self, work: Sized) -> None:
        """Count a copy of ``work``; raises ``FormatError`` if a pickle copies many times its own size."""
        self.budget -= len(work)
        if self.budget < 0:
            raise FormatError("the pickle asks for copies of many times its own size")

    def set_item(self, target: dict[object, object], key: object, value: object) -> None:
        """Set an item, and remember a key that is set twice, because its first value is lost."""
        if key in target and self.repeated is None:
            self.repeated = str(key)
        target[key] = value

    def set_items(self, target: dict[object, object], items: Mapping[object, object]) -> None:
        """Set items with different keys, as ``set_item`` does for each."""
        before = len(target)
        target.update(items)
        if self.repeated is None and len(target) < before + len(items):
            self.repeated = str(next(key for key in target if key in items))

    def lookup(self, module: str, name: str) -> object:
        """Return the constant of this name, or the name itself."""
        dotted = f"{module}.{name}"
        if len(dotted) > _LONGEST_NAME:
            raise FormatError(f"the pickle refers to code by a name of {len(dotted)} characters")
        self.names.add(dotted)
        if dotted in self.constants:
            return self.constants[dotted]
        if dotted not in self.builders or dotted in self.refused_by_torch:
            self.references[dotted] = self.references.get(dotted, 0) + 1
        return CodeName(module, name)

    def call(self, function: object, args: object) -> object:
        """Return the result of a builder for ``function``, or a placeholder for the call."""
        builder = self.builders.get(function.dotted) if isinstance(function, CodeName) else None
        if builder is None:
            return Placeholder(function, args)
        if not isinstance(args, tuple):
            raise FormatError(f"corrupt pickle: the arguments of {function} are a {type(args).__name__}, not a tuple")
        try:
            return builder(*args)
        except (TypeError, ValueError, OverflowError, LookupError, AttributeError) as error:
            reason = printable(str(error))
            raise FormatError(f"corrupt pickle: {function} does not take the given arguments ({reason})") from None

    def create(self, function: object, args: object, keywords: object = None) -> object:
        """Return the result of ``cls.__new__(cls, *args)``, which is not always the result of ``cls(*args)``."""
        name = function.dotted if isinstance(function, CodeName) else ""
        if name in self.builders:
            if name.rpartition(".")[2].startswith(("_rebuild", "_get", "encode")):
                raise FormatError(f"corrupt pickle: {name} is a function, and cannot make an empty object")
            if keywords:
                raise FormatError(f"corrupt pickle: {name} does not take the given arguments (by name)")
            if name in _MADE_EMPTY:
                return self.call(function, ())
        made = self.call(function, args)
        if keywords and isinstance(made, Placeholder):
            made.pairs["keywords"] = keywords
        return made


# The method __new__ of these classes ignores its arguments: only __init__ adds items.
_MADE_EMPTY: Final = frozenset(
    {"collections.OrderedDict", "collections.Counter", "collections.defaultdict", "collections.deque"}
    | {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "set")}
)

# Many harmless checkpoints name this code, so there is no warning about it. Like all code, it is never run.
_HARMLESS: Final = (
    "argparse.", "types.SimpleNamespace", "pathlib.", "datetime.", "decimal.", "uuid.", "functools.partial", "enum.",
    "omegaconf.", "typing.", "collections.", "transformers.training_args.", "transformers.trainer_utils.",
    "torch.optim.", "torch.Size", "torch.device", "torch.torch_version.", "copyreg.", "copy_reg.", "_codecs.",
    "pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict",
    "numpy.dtype", "numpy.ndarray", "numpy.bool", "numpy.int", "numpy.uint", "numpy.float", "numpy.complex",
    "numpy.core.multiarray.", "numpy._core.multiarray.", "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer", "__torch__.", "torch.jit._pickle.",
    "torch.distributed.tensor.DTensor", "torch.distributed.tensor._api.DTensor",
    "torch.distributed._tensor.api.DTensor",
    "torch.distributed.tensor._dtensor_spec.", "torch.distributed._tensor._dtensor_spec.",
    "torch.distributed.tensor.placement_types.", "torch.distributed._tensor.placement_types.",
    "torch.distributed.device_mesh.DeviceMesh", "torch.distributed._mesh_layout.",
    "torch.distributed._shard.sharded_tensor.api.ShardedTensor", "torch.distributed._shard.sharded_tensor.shard.Shard",
    "torch.distributed._shard.sharded_tensor.metadata.ShardedTensorMetadata",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "torch.distributed._shard.metadata.ShardMetadata", "torch.distributed.remote_device._remote_device",
    "torch.distributed._shard.sharding_spec.chunk_sharding_spec.ChunkShardingSpec",
    "torch.distributed._shard.sharding_spec.api.EnumerableShardingSpec",
    "builtins.bytes", "__builtin__.bytes", "numpy.random._pickle.", "numpy.random._mt19937.", "numpy.random._pcg64.",
)  # fmt: skip
# No checkpoint needs these. The list only makes a warning stronger, and cannot be complete.
_SUSPICIOUS: Final = (
    "os.", "posix.", "nt.", "subprocess.", "sys.", "runpy.", "socket.", "pty.", "shutil.", "importlib.", "ctypes.",
    "webbrowser.", "urllib.", "http.", "requests.", "pickle.", "code.", "asyncio.", "multiprocessing.", "platform.",
    "torch.load", "torch.hub.", "torch.serialization.load", "operator.", "builtins.eval", "builtins.exec",
    "builtins.compile", "builtins.getattr", "builtins.setattr", "builtins.__import__", "builtins.open",
    "__builtin__.eval", "__builtin__.exec", "__builtin__.compile", "__builtin__.getattr", "__builtin__.__import__",
    "__builtin__.open", "__builtin__.apply", "__builtin__.execfile", "__builtin__.file", "builtins.breakpoint",
)  # fmt: skip
# Modules that other modules import: a pickle can reach them under another name, such as pathlib.os.system.
_IMPORTED_MODULES: Final = frozenset(
    {"os", "posix", "sys", "subprocess", "builtins", "builtin", "importlib", "import", "globals"}
)


# The names that torch's weights-only loader accepts (torch._weights_only_unpickler), by the names of Python 2 too.
_WEIGHTS_ONLY: Final = re.compile(
    r"torch\.(?:cuda\.)?(?:sparse\.)?[A-Z][A-Za-z0-9]+(?:Tensor|Storage)|torch\.(?:Size|Tensor|device)"
    r"|torch\.(?:q?u?int|bfloat|float|complex|bool|bits)[0-9a-z_]*|torch\.per_(?:tensor|channel)_[a-z_]+"
    r"|torch\.storage\.(?:Typed|Untyped)Storage|torch\.serialization\._get_layout|torch\.nn\.parameter\.Parameter"
    r"|torch\._utils\._rebuild_(?:tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|qtensor|sparse_tensor"
    r"|meta_tensor_no_storage|nested_tensor|wrapper_subclass|device_tensor_from_(?:cpu_tensor|numpy))"
    r"|torch\._tensor\._rebuild_from_type_v2|collections\.(?:OrderedDict|Counter)|_codecs\.encode"
    r"|(?:builtins|__builtin__)\.(?:bytearray|set|complex)"
)


def is_suspicious(name: str) -> bool:
    """Return whether no checkpoint needs code of this name; False does not mean that the code is harmless."""
    return name.startswith(_SUSPICIOUS) or any(part.strip("_") in _IMPORTED_MODULES for part in name.split(".")[1:])


def is_harmless(name: str) -> bool:
    """Return whether code of this name is common in honest checkpoints and needs no warning."""
    return name.startswith(_HARMLESS) and not is_suspicious(name)


def is_weights_only(name: str) -> bool:
    """Return whether torch's weights-only loader accepts a code name without a list of the user."""
    return _WEIGHTS_ONLY.fullmatch(name) is not None
