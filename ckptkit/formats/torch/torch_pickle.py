"""The pickle of a state_dict, written opcode by opcode: what ``torch.load(weights_only=True)`` accepts."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckptkit.core.checkpoint import DTYPES, TensorInfo

__all__ = ["STORAGE_CLASSES", "StoredTensor", "pickle_state_dict"]

# The dtypes that have a storage class of their own; torch writes the others through untyped storages.
STORAGE_CLASSES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage", "C128": "ComplexDoubleStorage", "C64": "ComplexFloatStorage",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the output: which record holds it, and how it lies in there; counts are of elements."""

    info: TensorInfo
    record: int
    record_nbytes: int
    offset: int
    stride: tuple[int, ...]


def pickle_state_dict(tensors: Iterable[StoredTensor], versions: Mapping[str, int]) -> bytes:
    """Return the pickle of an ``OrderedDict`` of names and tensors in order, with module versions as ``_metadata``."""
    emit = _Emitter()
    emit.out += b"\x80\x02"
    emit.ordered_dict()
    emit.out += b"("
    for tensor in tensors:
        emit.text(tensor.info.key)
        _tensor(emit, tensor)
    emit.out += b"u"
    if versions:
        _metadata(emit, versions)
    emit.out += b"."
    return bytes(emit.out)


def _metadata(emit: _Emitter, versions: Mapping[str, int]) -> None:
    emit.out += b"}"
    emit.text("_metadata")
    emit.ordered_dict()
    emit.out += b"("
    for prefix, version in versions.items():
        emit.text(prefix)
        emit.out += b"}"
        emit.text("version")
        emit.integer(version)
        emit.out += b"s"
    emit.out += b"usb"


def _tensor(emit: _Emitter, tensor: StoredTensor) -> None:
    info = tensor.info
    dtype, shape, offset, stride = info.dtype, info.shape, tensor.offset, tensor.stride
    if dtype == "F4":  # torch counts bytes of two elements each
        shape, offset = (*shape[:-1], shape[-1] // 2), offset // 2
        stride = (*(step // 2 for step in stride[:-1]), 1)
    storage = STORAGE_CLASSES.get(dtype)
    emit.name("torch._utils", "_rebuild_tensor_v2" if storage else "_rebuild_tensor_v3")
    emit.out += b"(("
    emit.constant("storage")
    if storage:
        emit.name("torch", storage)
    else:
        emit.name("torch.storage", "UntypedStorage")
    emit.text(str(tensor.record))
    emit.constant("cpu")
    emit.integer(tensor.record_nbytes // (DTYPES[dtype].bits // 8) if storage else tensor.record_nbytes)
    emit.out += b"tQ"
    emit.integer(offset)
    emit.integers(shape)
    emit.integers(stride)
    emit.out += b"\x89"
    emit.ordered_dict()
    if not storage:
        emit.name("torch", DTYPES[dtype].torch_name)
    emit.out += b"tR"


class _Emitter:
    """Opcodes of protocol 2; names and constants are written once and recalled from the memo."""

    def __init__(self) -> None:
        self.out = bytearray()
        self._memo: dict[tuple[str, ...], int] = {}

    def name(self, module: str, name: str) -> None:
        if not self._recall((module, name)):
            self.out += f"c{module}\n{name}\n".encode("ascii")
            self._remember((module, name))

    def constant(self, text: str) -> None:
        if not self._recall((text,)):
            self.text(text)
            self._remember((text,))

    def text(self, text: str) -> None:
        raw = text.encode("utf-8", "surrogatepass")
        self.out += b"X" + struct.pack("<I", len(raw)) + raw

    def integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += struct.pack("<cB", b"K", value)
        elif 0 <= value < 2**31:
            self.out += struct.pack("<ci", b"J", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += struct.pack("<cB", b"\x8a", len(raw)) + raw

    def integers(self, values: Iterable[int]) -> None:
        self.out += b"("
        for value in values:
            self.integer(value)
        self.out += b"t"

    def ordered_dict(self) -> None:
        self.name("collections", "OrderedDict")
        self.out += b")R"

    def _recall(self, key: tuple[str, ...]) -> bool:
        if key not in self._memo:
            return False
        self.out += struct.pack("<cB", b"h", self._memo[key])
        return True

    def _remember(self, key: tuple[str, ...]) -> None:
        self._memo[key] = len(self._memo)
        self.out += struct.pack("<cB", b"q", self._memo[key])
