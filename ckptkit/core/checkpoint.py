"""The vocabulary: what a tensor in a checkpoint is called, how it is laid out, and where its bytes come from."""

from __future__ import annotations

import math
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from ckptkit.core.closing import Closing
from ckptkit.core.text import quoted
from ckptkit.core.torch_types import Tensor

__all__ = [
    "DTYPES",
    "Checkpoint",
    "DType",
    "Entry",
    "Nest",
    "Payload",
    "Record",
    "Rest",
    "TensorInfo",
    "View",
    "is_contiguous",
    "reach",
    "row_major",
]


class DType(NamedTuple):
    """One element type: its safetensors code, its width in bits and its name in torch."""

    code: str
    bits: int
    torch_name: str
    storable: bool = True  # whether the safetensors format has a code for it
    parts: int = 1  # numbers in an element: byte order is a property of each part

    @property
    def part_bytes(self) -> int:
        """Bytes of one number; 1 where several share a byte."""
        return max(self.bits // 8 // self.parts, 1)


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        dtype.code: dtype
        for dtype in (
            DType("BOOL", 8, "bool"),
            DType("U8", 8, "uint8"),
            DType("I8", 8, "int8"),
            DType("U16", 16, "uint16"),
            DType("I16", 16, "int16"),
            DType("U32", 32, "uint32"),
            DType("I32", 32, "int32"),
            DType("U64", 64, "uint64"),
            DType("I64", 64, "int64"),
            DType("F4", 4, "float4_e2m1fn_x2"),
            DType("F6_E2M3", 6, ""),
            DType("F6_E3M2", 6, ""),
            DType("F8_E4M3", 8, "float8_e4m3fn"),
            DType("F8_E5M2", 8, "float8_e5m2"),
            DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
            DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
            DType("F8_E8M0", 8, "float8_e8m0fnu"),
            DType("F16", 16, "float16"),
            DType("BF16", 16, "bfloat16"),
            DType("F32", 32, "float32"),
            DType("F64", 64, "float64"),
            DType("C64", 64, "complex64", parts=2),
            DType("C32", 32, "complex32", storable=False, parts=2),
            DType("C128", 128, "complex128", storable=False, parts=2),
            DType("QI8", 8, "qint8", storable=False),
            DType("QU8", 8, "quint8", storable=False),
            DType("QI32", 32, "qint32", storable=False),
            DType("QU4X2", 8, "quint4x2", storable=False),
            DType("QU2X4", 8, "quint2x4", storable=False),
            DType("BITS8", 8, "bits8", storable=False),
            DType("BITS16", 16, "bits16", storable=False),
            DType("BITS1X8", 8, "bits1x8", storable=False),
            DType("BITS2X4", 8, "bits2x4", storable=False),
            DType("BITS4X2", 8, "bits4x2", storable=False),
        )
    }
)


class View(NamedTuple):
    """Where a tensor lies in memory: equal ``storage`` within one checkpoint means shared memory.

    ``offset`` and ``stride`` count elements, as in torch.
    """

    storage: int
    offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An entry of a state_dict minus the numbers: key (FQN), dtype (safetensors code) and shape.

    ``kind`` is ``"dense"`` for everything whose bytes can be copied; anything else (``"sparse"``,
    ``"quantized"``, ``"meta"``, …) is listed and cannot be written. ``stored`` is the size in bytes where the
    dtype is none of ours, such as the blocks of GGUF.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    view: View | None = None
    kind: str = "dense"
    stored: int = 0

    @property
    def elements(self) -> int:
        """Number of elements: the product of the shape."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take when stored contiguously."""
        dtype = DTYPES.get(self.dtype)
        return self.stored if dtype is None else (self.elements * dtype.bits + 7) // 8

    def __str__(self) -> str:
        """Dtype and shape, as every table and message gives them: ``F32 [64, 3]``."""
        kind = "" if self.kind == "dense" else f" ({self.kind})"
        return f"{self.dtype} {list(self.shape)}{kind}"


class Entry(NamedTuple):
    """Something in a checkpoint that is no tensor of the state_dict: an epoch, an optimizer, arguments.

    ``value`` is the value itself where JSON can hold it, else a short description. ``outside`` says that it
    lies beside the mapping of weights and not in it, ``apart`` that it is a file of its own.
    """

    path: str
    type: str
    value: object
    outside: bool = False
    apart: bool = False


class Payload(Protocol):
    """The bytes of one tensor: contiguous, row-major, little-endian, not read until asked for."""

    @property
    def nbytes(self) -> int:
        """Exact number of bytes that ``chunks`` yields together."""
        ...

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        """Yield the bytes in order, in pieces of bounded size; a piece is valid until the next."""
        ...


class Record(NamedTuple):
    """A stretch of the file at ``path`` that its container keeps as one, still unread.

    ``crc`` is the CRC-32 of the payload's bytes, where one is recorded; ``keys`` name the tensors that lie in it.
    """

    path: str
    name: str
    payload: Payload
    crc: int | None = None
    keys: tuple[str, ...] = ()


class Nest(NamedTuple):
    """The mapping that a Checkpoint was taken from, as it is nested, and the keys that lead there to each tensor.

    Containers, numbers and texts are Python's own; in place of tensors, and of objects that need code, stand others.
    """

    value: object
    places: Mapping[str, tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Rest:
    """A file that holds more than the mapping of tensors taken from it, as it lies there: enough to write it again.

    ``path`` are the keys that lead to the mapping, ``places`` those that lead from there to each tensor. ``storage``
    gives the bytes of a storage by its name in the pickle, ``others`` what else the container holds, by name.
    ``references`` name code that torch's own weights-only loader would refuse; ``doubt`` says why nothing can be
    written again, if so.
    """

    path: tuple[object, ...]
    places: Mapping[str, tuple[object, ...]]
    pickle: Callable[[], bytes]
    storage: Callable[[str], Payload]
    others: Callable[[], Sequence[tuple[str, Payload]]]
    references: tuple[str, ...] = ()
    doubt: str = ""


class Checkpoint(Mapping[str, TensorInfo], Closing):
    """An open checkpoint: a mapping from key to ``TensorInfo`` whose bytes are read only on request.

    Close it, or use it as a context manager. ``entries`` lists what is no tensor of the mapping,
    ``references`` the code that the file names and that was not run, ``envelope`` which mapping
    inside the file was taken (empty: the file itself), ``versions`` the module versions that a
    state_dict carries as its ``_metadata``, ``made_up`` the keys that are names of ours, since the dotted names that
    they stand for are those of several places, or made of keys that are no strings; ``nest`` the mapping as it is
    nested, where it is; ``rest`` what the file holds beside the mapping, where that can be written again.
    """

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        payload: Callable[[TensorInfo], Payload],
        *,
        path: str,
        format: str,  # noqa: A002 - the field's word, and the name of the JSON field
        metadata: Mapping[str, str] | None = None,
        entries: Sequence[Entry] = (),
        warnings: Sequence[str] = (),
        references: Sequence[str] = (),
        suspicious: bool = False,
        envelope: str = "",
        versions: Mapping[str, int] | None = None,
        made_up: Mapping[str, str] | None = None,
        span: Callable[[TensorInfo], Payload | None] | None = None,
        records: Callable[[], Iterable[Record]] | None = None,
        files: Sequence[str] = (),
        check: Callable[[], None] | None = None,
        close: Callable[[], None] | None = None,
        nest: Nest | None = None,
        rest: Rest | None = None,
    ) -> None:
        """Take over the callbacks of the reader that opened the file."""
        self._infos = infos
        self._payload = payload
        self._span = span
        self._check = check
        self._close = close
        self._records = records
        self.path = path
        self.format = format
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.entries = tuple(entries)
        self.warnings = tuple(warnings)
        self.references = tuple(references)
        self.suspicious = suspicious
        self.envelope = envelope
        self.versions: Mapping[str, int] = MappingProxyType(dict(versions or {}))
        self.made_up: Mapping[str, str] = MappingProxyType(dict(made_up or {}))
        self.files = tuple(files)
        self.nest = nest
        self.rest = rest

    def __getitem__(self, key: str) -> TensorInfo:
        """Return the description of one tensor."""
        return self._infos[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over keys in the order of the file."""
        return iter(self._infos)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._infos)

    def __contains__(self, key: object) -> bool:
        """Return whether there is a tensor of this key."""
        return key in self._infos

    def items(self) -> ItemsView[str, TensorInfo]:
        """Return keys and descriptions, at the speed of a dict."""
        return self._infos.items()

    def values(self) -> ValuesView[TensorInfo]:
        """Return the descriptions, at the speed of a dict."""
        return self._infos.values()

    def __repr__(self) -> str:
        """Show what was opened, and never its contents."""
        return f"<Checkpoint {self.path!r}: {self.format}, {len(self)} tensors>"

    def payload(self, key: str) -> Payload:
        """Return the bytes of one tensor, still unread."""
        return self._payload(self._infos[key])

    def span(self, key: str) -> Payload | None:
        """Return the stored bytes from a view's first to its last element, or None where they say less.

        Two views of one storage can be written once through it. None means that only ``payload`` tells
        the logical values (a conjugate or negative view, a format without views).
        """
        return None if self._span is None else self._span(self._infos[key])

    def records(self) -> Iterable[Record]:
        """Return all that is stored, in the order of the files, unread; nothing of what lies in memory alone."""
        if self._records is not None:
            return self._records()
        stored = [info for info in self.values() if info.kind == "dense"] if self.files else []
        return (Record(self.path, info.key, self._payload(info), keys=(info.key,)) for info in stored)

    def read_bytes(self, key: str) -> bytes:
        """Return the contiguous little-endian bytes of one tensor."""
        return b"".join(bytes(chunk) for chunk in self.payload(key).chunks())

    def read(self, key: str) -> Tensor:
        """Return one tensor, in memory of its own, on the CPU.

        Raises ``KeyError`` for an unknown key and ``FormatError`` where the bytes are not what the header says.
        """
        import torch

        info = self._infos[key]
        name = DTYPES[info.dtype].torch_name if info.dtype in DTYPES else ""
        dtype: Any = getattr(torch, name, None) if name else None
        if info.dtype == "F4" and (not info.shape or info.shape[-1] % 2):
            raise TypeError(f"{quoted(key)}: torch holds F4 in pairs, and the last of {list(info.shape)} is not even")
        if dtype is None:
            raise TypeError(f"{quoted(key)}: this torch has no dtype for {info.dtype}")
        shape = (*info.shape[:-1], info.shape[-1] // 2) if info.dtype == "F4" and info.shape else info.shape
        if info.elements == 0:
            return torch.empty(shape, dtype=dtype)
        buffer = bytearray(info.nbytes)
        done = 0
        for chunk in self.payload(key).chunks():
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(shape)

    def check_unchanged(self) -> None:
        """Raise ``ChangedError`` if a file changed on disk since it was opened."""
        if self._check is not None:
            self._check()

    def close(self) -> None:
        """Release the files; reading tensors afterwards is an error."""
        close, self._close = self._close, None
        if close is not None:
            close()


def reach(info: TensorInfo) -> tuple[int, int]:
    """Return the first byte in its storage that a view covers, and the one behind the last."""
    if info.view is None or info.elements == 0:
        return 0, 0
    bits = DTYPES[info.dtype].bits
    last = info.view.offset + sum((n - 1) * step for n, step in zip(info.shape, info.view.stride, strict=True))
    return info.view.offset * bits // 8, ((last + 1) * bits + 7) // 8


def is_contiguous(info: TensorInfo) -> bool:
    """Return whether the elements lie in memory in row-major order, without gaps."""
    if info.view is None or info.elements == 0:
        return True
    expected = 1
    for size, step in zip(reversed(info.shape), reversed(info.view.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def versions_from(table: Mapping[Any, Any]) -> dict[str, int]:
    """Return the module versions in the ``_metadata`` of a state_dict, by module prefix."""
    return {
        prefix: entry["version"]
        for prefix, entry in table.items()
        if isinstance(prefix, str)
        and isinstance(entry, Mapping)
        and type(entry.get("version")) is int
        and 0 <= entry["version"] < 2**31
    }
