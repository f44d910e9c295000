"""Build references to storages and tensors from the pickles of torch, without calling torch.

The builders take their arguments in the order of the functions in ``torch/_utils.py`` and ``torch/_tensor.py``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Region
from ckptkit.core.frozen import slot_setters
from ckptkit.core.text import quoted
from ckptkit.errors import FormatError
from ckptkit.formats.pickle.arrays import (
    ARRAY_CLASSES,
    FUNCTIONS,
    ArrayContent,
    ArrayDType,
    read_buffer,
    read_scalar,
    read_state,
)
from ckptkit.formats.pickle.values import CodeName, Interpreter, PickledMapping, Placeholder, check_key
from ckptkit.formats.torch.changes import changing_attribute, is_autograd_state

__all__ = [
    "STORAGE_TYPES",
    "TENSOR_TYPES",
    "ArrayRef",
    "DTypeRef",
    "StorageRef",
    "StorageType",
    "TensorRef",
    "TorchObjects",
    "made_by_class",
    "tensor_view",
]


@dataclass(frozen=True, eq=False, slots=True)
class StorageType:
    """A storage class of torch; ``dtype`` is empty for an untyped storage, which counts bytes."""

    dtype: str


@dataclass(frozen=True, eq=False, slots=True)
class DTypeRef:
    """A dtype of torch, by its safetensors code."""

    code: str


@dataclass(frozen=True, eq=False, slots=True, init=False)
class StorageRef:
    """A storage as a pickle names it: the key of the record, the dtype, and the range of a legacy view.

    ``data`` has the bytes of a numpy array, which are a part of the pickle itself.
    """

    key: str
    dtype: str
    nbytes: int
    start: int = 0  # in bytes; legacy files can name a part of a storage
    length: int = -1  # in bytes; -1 means the whole storage
    data: Region | None = None

    def __init__(  # noqa: PLR0917 - the fields of the dataclass, in its order
        self, key: str, dtype: str, nbytes: int, start: int = 0, length: int = -1, data: Region | None = None
    ) -> None:
        """Set all fields through their slots."""
        _set_key(self, key)
        _set_dtype(self, dtype)
        _set_nbytes(self, nbytes)
        _set_start(self, start)
        _set_length(self, length)
        _set_data(self, data)


_set_key, _set_dtype, _set_nbytes, _set_start, _set_length, _set_data = slot_setters(StorageRef)


@dataclass(frozen=True, eq=False, slots=True, init=False)
class TensorRef:
    """A tensor as a pickle describes it; ``storage`` is None for a tensor without bytes in the file.

    A DTensor has the shape of the whole tensor; ``local`` is the piece in the file, and ``spec`` says which piece. For
    a ShardedTensor, ``spec`` has the shards; for a quantised tensor, the scheme of torch with its scales.
    """

    dtype: str
    shape: tuple[int, ...]
    storage: StorageRef | None = None
    offset: int = 0
    stride: tuple[int, ...] = ()
    conj: bool = False
    neg: bool = False
    kind: str = "dense"
    local: TensorRef | None = None
    spec: object = None

    def __init__(  # noqa: PLR0917 - the fields of the dataclass, in its order
        self,
        dtype: str,
        shape: tuple[int, ...],
        storage: StorageRef | None = None,
        offset: int = 0,
        stride: tuple[int, ...] = (),
        conj: bool = False,
        neg: bool = False,
        kind: str = "dense",
        local: TensorRef | None = None,
        spec: object = None,
    ) -> None:
        """Set all fields through their slots."""
        values = (dtype, shape, storage, offset, stride, conj, neg, kind, local, spec)
        for setter, value in zip(_TENSOR_SETTERS, values, strict=True):
            setter(self, value)

    def is_same(self, other: object) -> bool:
        """Return whether ``other`` is the same view of the same storage."""
        return isinstance(other, TensorRef) and _is_same(self, other)


_TENSOR_SETTERS = slot_setters(TensorRef)


class ArrayRef(TensorRef):
    """A numpy array of a pickle, as a tensor. A pickle makes an array first, and gives it its content later."""

    def fill(self, content: ArrayContent, key: str) -> None:
        """Take the content; ``key`` is the key of the storage."""
        dtype, shape = content.dtype, content.shape
        made = TensorRef(f"numpy.{dtype.name}", shape, kind="values" if dtype.is_value else "unread")
        if content.data is not None:
            storage = StorageRef(key, dtype.code, content.data.nbytes, data=content.data)
            made = TensorRef(dtype.code, shape, storage, 0, content.stride)
        for name in TensorRef.__slots__:
            object.__setattr__(self, name, getattr(made, name))


def _is_same(first: StorageRef | TensorRef, second: StorageRef | TensorRef) -> bool:
    return all(getattr(first, name) == getattr(second, name) for name in first.__slots__)


_STORAGES: Final[Mapping[str, str]] = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexDouble": "C128", "ComplexFloat": "C64",
    "QInt8": "QI8", "QUInt8": "QU8", "QInt32": "QI32", "QUInt4x2": "QU4X2", "QUInt2x4": "QU2X4",
}  # fmt: skip
_DTYPE_ALIASES: Final[Mapping[str, str]] = {
    "half": "F16", "float": "F32", "double": "F64", "short": "I16", "int": "I32", "long": "I64",
    "cfloat": "C64", "cdouble": "C128", "chalf": "C32",
}  # fmt: skip


_PARAMETER = "torch.nn.parameter.Parameter"
_TENSOR_CLASS = re.compile(r"torch\.(?:cuda\.)?(?:sparse\.)?[A-Za-z0-9]*Tensor")
# Names of classes and functions that make tensors or arrays: lazy parameters, and types of other libraries.
_LOOKS_LIKE_TENSOR = re.compile(
    r"[\w.]*\._?(?:re)?(?:build|construct)_\w*(?:tensor|array|parameter)\w*|numpy\.[\w.]*(?:_reconstruct|_mareconstruct)"
    r"|torch\.[\w.]*\._rebuild_\w+"
    r"|[\w.]*\.\w*(?:Tensor|Parameter|Params4bit|Int8Params|NDArray|Buffer)|[\w.]*\.(?:DeviceArray|ArrayImpl)"
)
_NAME = re.compile(r"[a-z][a-z0-9_]{,30}")
_SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.api.ShardedTensor"
_DTENSOR = re.compile(r"torch\.distributed\.(?:_tensor|tensor)(?:\._?api)?\.DTensor")
_MOST_DIMENSIONS = 1024
_ONE_NAME = "storage {} shares its name or the name of its part with another storage or part"
_MOST_SLOTS = 64
_ARRAY_KEY = "\0array "  # begins the key of the storage of each array; no record of a file has such a name
_ARRAY_NUMBERS = itertools.count()  # one checkpoint can hold arrays of many pickles
_COMPLEX = ("C32", "C64", "C128")
_NEGATABLE = ("F16", "BF16", "F32", "F64", *_COMPLEX)


def _storage_types() -> dict[str, StorageType]:
    table: dict[str, StorageType] = {}
    for name, code in _STORAGES.items():
        kind = StorageType(code)
        table |= {f"{module}.{name}Storage": kind for module in ("torch", "torch.cuda", "torch.storage")}
    untyped = ("torch.storage.UntypedStorage", "torch.storage._UntypedStorage", "torch.UntypedStorage")
    return table | dict.fromkeys(untyped, StorageType(""))


STORAGE_TYPES: Final[Mapping[str, StorageType]] = _storage_types()
TENSOR_TYPES: Final[Mapping[str, DTypeRef]] = {
    f"{module}.{name}Tensor": DTypeRef(code) for name, code in _STORAGES.items() for module in ("torch", "torch.cuda")
}


def _constants() -> dict[str, object]:
    table: dict[str, object] = {f"torch.{d.torch_name}": DTypeRef(d.code) for d in DTYPES.values() if d.torch_name}
    table |= {f"torch.{name}": DTypeRef(code) for name, code in _DTYPE_ALIASES.items()}
    table |= STORAGE_TYPES
    for scheme in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric"):
        table[f"torch.per_{scheme}"] = scheme
    table["torch.per_channel_affine_float_qparams"] = "channel_affine_float_qparams"
    table |= dict.fromkeys(("torch.Tensor", "torch._tensor.Tensor"), "tensor")
    return table


_CONSTANTS: Final = _constants()


class TorchObjects:
    """The builders for the pickles of one torch file, and the storages that these pickles name."""

    def __init__(self, persistent: Callable[[object], object] | None = None) -> None:
        """Prepare the builders; ``persistent`` replaces the reading of persistent ids."""
        self.storages: dict[str, StorageRef] = {}
        self.locations: dict[str, str] = {}  # by the key of the storage
        self.retyped: dict[str, tuple[str, str]] = {}  # the dtypes of each storage that is named with two types
        self.changes: list[tuple[TensorRef, str]] = []  # tensors that the pickle changes later, and what it sets
        self._views: dict[str, StorageRef] = {}
        self.prefix = ""  # put before each storage key that the next pickle names
        self.sources: list[str] = []  # source files that a legacy pickle of a module embeds
        self.interpreter = Interpreter(
            self._builders(),
            _CONSTANTS,
            persistent or self._persistent,
            self._set_state,
            FUNCTIONS.keys() | ARRAY_CLASSES,
        )

    def _builders(self) -> dict[str, Callable[..., object]]:
        builders: dict[str, Callable[..., object]] = {
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor_v2,
            "torch._utils._rebuild_tensor_v3": _tensor_v3,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter_with_state,
            _PARAMETER: _old_parameter,
            "torch._utils._rebuild_qtensor": _quantized,
            "torch._utils._rebuild_sparse_tensor": _sparse,
            "torch._utils._rebuild_meta_tensor_no_storage": _meta,
            "torch._utils._rebuild_nested_tensor": _nested,
            "torch._utils._rebuild_wrapper_subclass": _subclass,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": _device_tensor,
            "torch.serialization._get_layout": _name,
            "torch.Size": _size,
            "torch.device": lambda *parts: ":".join(map(_name, parts)),
            "_codecs.encode": self._encode,
            "collections.deque": self._copy(list),
        }
        for name in ("_rebuild_device_tensor_from_numpy", "_rebuild_xla_tensor", "_rebuild_hpu_tensor",
                     "_rebuild_mlc_tensor", "_rebuild_ort_tensor"):  # fmt: skip
            builders[f"torch._utils.{name}"] = _device_tensor
        for module in ("storage", "tensor_methods", "serialization"):
            builders[f"torch_npu.utils.{module}._rebuild_npu_tensor"] = _tensor_v2
        arrays: dict[str, Callable[..., object]] = {
            "_reconstruct": self._array, "_frombuffer": self._array_of_buffer, "scalar": _scalar, "dtype": ArrayDType,
        }  # fmt: skip
        builders |= {dotted: arrays[function] for dotted, function in FUNCTIONS.items()}
        for module in ("torch._tensor", "torch.tensor"):
            builders[f"{module}._rebuild_from_type"] = self._from_type
            builders[f"{module}._rebuild_from_type_v2"] = self._from_type
        for name in ("OrderedDict", "defaultdict", "Counter"):
            builders[f"collections.{name}"] = partial(self._mapping, name)
        for module in ("builtins", "__builtin__"):
            builders[f"{module}.dict"] = partial(self._mapping, "dict")
            for kind in (list, set, frozenset, tuple):
                builders[f"{module}.{kind.__name__}"] = self._copy(kind)
            builders[f"{module}.complex"] = _complex
            builders[f"{module}.bytes"] = _empty_bytes
            builders[f"{module}.slice"] = lambda *parts: ["slice", *parts]
        return builders

    def _mapping(self, kind: str, *args: object) -> object:
        made = PickledMapping(kind)
        source = args[-1] if args else ()
        if isinstance(source, dict):
            self.interpreter.count_copy(source)
            made.update(source)
        elif kind == "Counter" and args:
            raise TypeError("it counts items")
        elif isinstance(source, list | tuple):
            self.interpreter.count_copy(source)
            for pair in source:
                key, value = pair
                check_key(key)
                self.interpreter.set_item(made, key, value)
        return made

    def _copy(self, kind: Callable[[Iterable[object]], object]) -> Callable[..., object]:
        def build(source: object = (), *_: object) -> object:
            if not isinstance(source, list | tuple | dict | set | frozenset):
                raise TypeError(f"a {type(source).__name__}")
            self.interpreter.count_copy(source)
            if kind in (set, frozenset) and not all(isinstance(item, str | bytes | float | None) for item in source):
                return list(source)  # other items can be slow to hash, and no reader needs a set here
            return kind(source)

        return build

    def _encode(self, text: object, encoding: object = "utf-8") -> object:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            return Placeholder("_codecs.encode", (text, encoding))
        self.interpreter.count_copy(text)
        return text.encode("latin-1")

    def _array(self, kind: object, *args: object) -> object:
        if not isinstance(kind, CodeName) or str(kind) not in ARRAY_CLASSES:
            return Placeholder(CodeName("numpy.core.multiarray", "_reconstruct"), (kind, *args))
        return ArrayRef("numpy.ndarray", (), kind="unread")

    def _array_of_buffer(self, *args: object) -> ArrayRef:
        made = ArrayRef("numpy.ndarray", (), kind="unread")
        self._fill(made, read_buffer(*args))
        return made

    def _fill(self, target: ArrayRef, content: ArrayContent) -> None:
        target.fill(content, f"{_ARRAY_KEY}{next(_ARRAY_NUMBERS)}")

    def _set_state(self, target: object, state: object) -> None:
        if isinstance(target, ArrayDType):
            target.set_state(state)
            return
        if isinstance(target, ArrayRef) and target.storage is None and target.shape == ():
            self._fill(target, read_state(state))
            return
        if isinstance(target, StorageRef):
            raise FormatError(f"storage {quoted(target.key)}: the pickle changes it after building it")
        if isinstance(target, TensorRef) and not is_autograd_state(state):
            self.changes.append((target, "state"))

    def _parameter_with_state(self, data: object, *rest: object) -> object:
        return self._with_attributes(_parameter(data), rest[2] if len(rest) > 2 else None)

    def _with_attributes(self, tensor: TensorRef, state: object) -> TensorRef:
        attribute = changing_attribute(state, tensor.is_same)
        if attribute:
            self.changes.append((tensor, attribute))
        return tensor

    def _from_type(self, function: object, subclass: object, args: object, state: object = None) -> object:
        if isinstance(function, CodeName) and function.name.startswith("_rebuild_from_type"):
            raise TypeError("it calls itself")  # a thousand nested calls would exhaust the stack of Python
        made = self.interpreter.call(function, args)
        if isinstance(made, TensorRef) and isinstance(subclass, CodeName) and _DTENSOR.fullmatch(str(subclass)):
            return _dtensor(made, state)
        if isinstance(made, TensorRef) and isinstance(subclass, CodeName) and str(subclass) == _SHARDED_TENSOR:
            shards = state[0] if isinstance(state, tuple) and state else None
            return replace(made, kind="sharded", spec=shards)
        plain = subclass == "tensor" or (isinstance(subclass, CodeName) and str(subclass) == _PARAMETER)
        if not isinstance(made, TensorRef):
            return made
        if plain:
            return self._with_attributes(made, state)
        return replace(made, kind="subclass") if made.kind == "dense" else made

    def _persistent(self, pid: object) -> object:
        if isinstance(pid, tuple) and pid and pid[0] == "module" and len(pid) == 4:
            if isinstance(pid[2], str):
                self.sources.append(pid[2])
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise FormatError("corrupt pickle: a persistent id does not name a storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        if isinstance(key, int) and not isinstance(key, bool):
            key = str(key)
        if not isinstance(kind, StorageType) or not isinstance(key, str) or not _is_count(numel):
            raise FormatError("corrupt pickle: a persistent id names a storage with an unknown type, key or size")
        if key.startswith(_ARRAY_KEY):
            raise FormatError("corrupt pickle: the name of a storage begins with a null byte")
        key = self.prefix + key
        width = _width(kind.dtype)
        storage = StorageRef(key, kind.dtype, numel * width)
        known = self.storages.setdefault(key, storage)
        if known.nbytes != storage.nbytes:
            raise FormatError(f"storage {quoted(key)} has two sizes, {known.nbytes} and {storage.nbytes} bytes")
        if isinstance(pid[3], str) and self.locations.setdefault(key, pid[3]) != pid[3]:
            raise FormatError(
                f"storage {quoted(key)} has two locations, {quoted(self.locations[key])} and {quoted(pid[3])}"
            )
        if known.dtype != storage.dtype and storage.nbytes:
            types = known.dtype or "U8", storage.dtype or "U8"  # torch counts an untyped storage in bytes
            if types[0] != types[1]:
                self.retyped.setdefault(key, types)
        if key in self._views:
            raise FormatError(_ONE_NAME.format(quoted(key)))
        if len(pid) == 6 and pid[5] is not None:
            return self._part(storage, pid[5], width)
        is_new_type = len(pid) == 6 and not storage.nbytes  # torch before 1.6 makes each empty storage again
        return storage if is_new_type else known  # the first type counts, as in torch

    def _part(self, storage: StorageRef, view: object, width: int) -> StorageRef:
        if not isinstance(view, tuple) or len(view) != 3 or not all(map(_is_count, view[1:])):
            raise FormatError(f"a view of storage {quoted(storage.key)} is not valid")
        start, length = view[1] * width, view[2] * width
        if start + length > storage.nbytes:
            raise FormatError(
                f"storage {quoted(storage.key)}: a view ends at byte {start + length} of {storage.nbytes}"
            )
        if not isinstance(view[0], str) and not _is_count(view[0]):
            raise FormatError(f"a view of storage {quoted(storage.key)} is not valid")
        # torch keeps views and storages by name in one table: a name that is used again keeps its first meaning.
        part = replace(storage, start=start, length=length)
        known = self._views.setdefault(str(view[0]), part)
        if str(view[0]) in self.storages or not _is_same(known, part):
            raise FormatError(_ONE_NAME.format(quoted(storage.key)))
        return part


def _is_count(number: object) -> bool:
    # torch counts with signed 64 bits; Python integers can be too long to print.
    return type(number) is int and 0 <= number < 2**63


def _name(part: object) -> str:
    if not isinstance(part, str | int):
        raise TypeError("the name is not a string")
    return str(part)


def _complex(real: object = 0.0, imag: object = 0.0) -> complex:
    if not isinstance(real, int | float) or not isinstance(imag, int | float):
        raise TypeError("the parts are not numbers")
    return complex(real, imag)


def _empty_bytes(*args: object) -> object:
    # Protocol 2 has no bytes: numpy pickles the elements of an empty array as a call.
    return Placeholder(CodeName("builtins", "bytes"), args) if args else b""


def _width(dtype: str) -> int:
    return DTYPES[dtype].bits // 8 if dtype else 1


def _size(sizes: object = ()) -> tuple[int, ...]:
    if type(sizes) is tuple and len(sizes) <= _MOST_DIMENSIONS and all(map(_is_count, sizes)):
        return sizes
    if not isinstance(sizes, list | tuple) or not all(type(n) is int for n in sizes):
        raise TypeError("the sizes are not integers")
    if len(sizes) > _MOST_DIMENSIONS:
        raise FormatError(f"corrupt pickle: a tensor has {len(sizes)} dimensions")
    if not all(map(_is_count, sizes)):
        raise FormatError(f"corrupt pickle: a size or stride of a tensor is below 0 or above 2^63: {str(sizes)[:80]}")
    return tuple(sizes)


def _tensor(storage: object, offset: object, size: object, stride: object) -> TensorRef:
    if not isinstance(storage, StorageRef) or type(offset) is not int:
        raise TypeError("the storage or the offset has the wrong type")
    return tensor_view(storage, storage.dtype or "U8", offset, size, stride)


def _tensor_v2(storage: object, offset: object, size: object, stride: object, *rest: object) -> TensorRef:
    return _flags(_tensor(storage, offset, size, stride), rest[2] if len(rest) > 2 else None)


def _tensor_v3(storage: object, offset: object, size: object, stride: object, *rest: object) -> TensorRef:
    dtype = rest[2]
    if isinstance(dtype, CodeName) and dtype.module == "torch" and _NAME.fullmatch(dtype.name):
        return TensorRef(str(dtype), _size(size), kind="unknown")  # a dtype of a torch that is newer than this table
    if not isinstance(storage, StorageRef) or type(offset) is not int or not isinstance(dtype, DTypeRef):
        raise TypeError("the storage, the offset or the dtype has the wrong type")
    return _flags(tensor_view(storage, dtype.code, offset, size, stride), rest[3] if len(rest) > 3 else None)


def made_by_class(value: object) -> TensorRef | None:
    """Return a tensor of unknown shape for the call of a tensor class, such as ``torch.FloatTensor``, else None.

    The kind is ``unread`` for a class or a function that only code outside of torch's loader can run.
    """
    if not isinstance(value, Placeholder):
        return None
    name = "torch.Tensor" if value.factory == "tensor" else str(value.factory)
    if name == _PARAMETER or _TENSOR_CLASS.fullmatch(name):
        return TensorRef(name, (), kind="unknown")
    return TensorRef(name, (), kind="unread") if _LOOKS_LIKE_TENSOR.fullmatch(name) else None


def tensor_view(storage: StorageRef, dtype: str, offset: int, size: object, stride: object) -> TensorRef:
    """Return the tensor of a view into a storage; raises ``FormatError`` for sizes, strides or offsets out of range."""
    shape, steps = _size(size), _size(stride)
    if len(shape) != len(steps):
        raise FormatError(f"corrupt pickle: a tensor has {len(shape)} dimensions and {len(steps)} strides")
    if not _is_count(offset):
        raise FormatError(f"corrupt pickle: the offset of a tensor is {offset}, below 0 or above 2^63")
    return TensorRef(dtype, shape, storage, offset, steps)


def _dtensor(tensor: TensorRef, state: object) -> TensorRef:
    slots: dict[object, object] = {}
    for part in state if isinstance(state, tuple) else (state,):
        slots |= part if isinstance(part, dict) and len(part) <= _MOST_SLOTS else {}
    local = slots.get("_local_tensor")
    if not isinstance(local, TensorRef) or local.kind != "dense":
        return replace(tensor, kind="dtensor")
    return replace(tensor, kind="dtensor", local=local, spec=slots.get("_spec"))


def _flags(tensor: TensorRef, metadata: object) -> TensorRef:
    if not isinstance(metadata, dict):
        return tensor
    conj, neg = "conj" in metadata, "neg" in metadata  # torch ignores the values
    if (conj and tensor.dtype not in _COMPLEX) or (neg and tensor.dtype not in _NEGATABLE):
        raise FormatError(f"corrupt pickle: a {tensor.dtype} tensor is marked as conjugate or negative")
    return replace(tensor, conj=conj, neg=neg)


def _parameter(data: object, *_: object) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise TypeError("the parameter is not a tensor")
    return data


def _device_tensor(data: object, dtype: object, *_: object) -> TensorRef:
    if not isinstance(data, TensorRef) or not isinstance(dtype, DTypeRef):
        raise TypeError("the data or the dtype has the wrong type")
    storage = data.storage
    if data.dtype == dtype.code or storage is None:
        return TensorRef(*(getattr(data, name) for name in TensorRef.__slots__))
    # torch saved bfloat16 as the float32 numbers of numpy: the upper half of each is the bfloat16 number.
    if (data.dtype, dtype.code) == ("F32", "BF16") and storage.data is not None and data.kind == "dense":
        raw = b"".join(map(bytes, storage.data.chunks()))
        if not raw[0::4].strip(b"\0") and not raw[1::4].strip(b"\0"):
            halves = replace(storage, dtype="BF16")
            return TensorRef("BF16", data.shape, halves, 2 * data.offset + 1, tuple(2 * step for step in data.stride))
    return TensorRef(dtype.code, data.shape, kind="converted")


def _scalar(dtype: object, *data: object) -> object:
    number = read_scalar(dtype, *data[:1])
    return Placeholder(CodeName("numpy", "generic"), (dtype, *data)) if number is None else number


def _old_parameter(*args: object) -> object:
    # Before torch 0.4, the pickle called the class with the data and set everything else as state.
    return (
        args[0] if args and isinstance(args[0], TensorRef) else Placeholder(CodeName(*_PARAMETER.rsplit(".", 1)), args)
    )


def _quantized(
    storage: object, offset: object, size: object, stride: object, quantizer: object, *_: object
) -> TensorRef:
    return replace(_tensor(storage, offset, size, stride), kind="quantized", spec=quantizer)


def _sparse(layout: object, data: object) -> TensorRef:
    if not isinstance(data, tuple) or len(data) > 5:
        raise TypeError("the parts are not a short tuple")
    parts = [part for part in data if isinstance(part, TensorRef)]
    size = data[2] if layout == "torch.sparse_coo" else data[3]
    return TensorRef(parts[-1].dtype, _size(size), kind="sparse")


def _meta(dtype: object, size: object, stride: object, _grad: object) -> TensorRef:
    if not isinstance(dtype, DTypeRef):
        raise TypeError("the dtype has the wrong type")
    return TensorRef(dtype.code, _size(size), stride=_size(stride), kind="meta")


def _nested(buffer: object, *_: object) -> TensorRef:
    if not isinstance(buffer, TensorRef):
        raise TypeError("the nested tensor has no buffer")
    return replace(buffer, kind="nested")


def _subclass(_class: object, dtype: object, size: object, stride: object, *_: object) -> TensorRef:
    if not isinstance(dtype, DTypeRef):
        raise TypeError("the dtype has the wrong type")
    return TensorRef(dtype.code, _size(size), stride=_size(stride), kind="subclass")
