"""The one bridge between torch's tensors and stored bytes; torch is imported when it is crossed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint import (
    DTYPES,
    Access,
    Checkpoint,
    Description,
    Entry,
    Payload,
    TensorInfo,
    View,
    is_contiguous,
    module_versions,
    storage_range,
    unpack_float4,
)
from ckptkit.core.text import printable, quoted
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.errors import ModelError, PlanError

if TYPE_CHECKING:
    import torch

__all__ = [
    "ABSENT",
    "CASTABLE",
    "CastPayload",
    "StateDictLike",
    "TensorPayload",
    "as_checkpoint",
    "code_of",
    "describe_state_dict",
    "dtype_code",
    "first_line",
    "flat_bytes",
    "same_values",
    "shape_or_none",
    "tensor_of_bytes",
    "torch_dtype",
]

ABSENT = "absent module"  # the type of an entry for a submodule that is None: torch looks at no key below it
CASTABLE = frozenset(
    dtype.code
    for dtype in DTYPES.values()
    if dtype.torch_name and dtype.bits >= 8 and not dtype.code.startswith(("Q", "BITS"))
)
_BLOCK = 4 << 20
StateDictLike = Any  # a Checkpoint, a Module, a Mapping of tensors, or a Mapping of TensorInfo


def code_of(dtype: torch.dtype) -> str:
    """Return the safetensors code of a torch dtype, or torch's name in capitals where there is none."""
    name = str(dtype).removeprefix("torch.")
    return next((known.code for known in DTYPES.values() if known.torch_name == name), name.upper())


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code; ``code`` must be one that torch has."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[code].torch_name)
    return dtype


def dtype_code(name: str) -> str | None:
    """Return the safetensors code of a dtype that is named by its code or by torch's name, or None."""
    short = name.removeprefix("torch.")
    found = (known.code for known in DTYPES.values() if short.upper() == known.code or short == known.torch_name)
    return next(found, None)


def shape_or_none(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the shape of a tensor, or None where it is uninitialised."""
    try:
        return tuple(tensor.shape)
    except RuntimeError:
        return None


def _blocks(view: Tensor) -> Iterator[Tensor]:
    """Yield a tensor in pieces along its leading dimensions, each of bounded size."""
    if view.dim() == 0 or view.numel() * view.element_size() <= _BLOCK:
        yield view
        return
    row = max(view[0].numel() * view.element_size(), 1)
    if row > _BLOCK:
        for inner in view:
            yield from _blocks(inner)
    else:
        rows = _BLOCK // row
        for first in range(0, len(view), rows):
            yield view[first : first + rows]


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    buffer = bytearray(tensor.numel() * tensor.element_size())
    if buffer:
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(flat_bytes(tensor))
    return memoryview(buffer)


def flat_bytes(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor in order, as a flat tensor of bytes."""
    import torch

    # A single element counts as contiguous with any stride, and view() wants the stride to be 1.
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def same_values(there: Tensor, value: Tensor) -> bool:
    """Return whether a tensor on the CPU has the bytes that ``value`` has in its dtype; NaN may have any of its bits.

    Not numbers are compared: NaN is not equal to itself, and -0.0 is to 0.0.
    """
    import torch

    found, expected = flat_bytes(there), flat_bytes(wanted := value.to(there.dtype))
    if torch.equal(found, expected):
        return True
    if there.dtype == value.dtype or not (there.is_floating_point() or there.is_complex()):
        return False
    # Which bits a NaN gets by a cast depends on the memory layout: torch has several kernels for it.
    differ = (found != expected).reshape(there.numel(), -1).any(dim=1)
    wide = torch.complex128 if there.is_complex() else torch.float64
    return all(bool(tensor.reshape(-1).to(wide)[differ].isnan().all()) for tensor in (there, wanted))


def tensor_of_bytes(data: bytes | bytearray | memoryview) -> Tensor:
    """Return bytes as a flat tensor of them: in their own memory where that can be written to, else in a copy."""
    import torch

    writable = isinstance(data, bytearray) or (isinstance(data, memoryview) and not data.readonly)
    return torch.frombuffer(data if writable else bytearray(data), dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class TensorPayload:
    """A payload that is a tensor in memory; ``nbytes`` is what its elements take."""

    tensor: Tensor
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes, piece by piece."""
        import torch

        buffer = bytearray(min(self.nbytes, _BLOCK))  # one for all: fresh memory costs more than the copy into it
        for block in _blocks(self.tensor.detach().resolve_conj().resolve_neg()):
            data = flat_bytes(block.cpu())
            if len(data):
                torch.frombuffer(buffer, dtype=torch.uint8)[: len(data)].copy_(data)
            yield memoryview(buffer)[: len(data)]


@dataclass(frozen=True, slots=True)
class CastPayload:
    """A payload whose elements become another dtype on the way, as ``Tensor.to`` would make them."""

    source: Payload
    found: TensorInfo
    made: TensorInfo

    @property
    def nbytes(self) -> int:
        """Bytes after the cast."""
        return self.made.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the cast bytes, piece by piece."""
        old, new = (torch_dtype(info.dtype) for info in (self.found, self.made))
        width = DTYPES[self.found.dtype].bits // 8
        rest = b""
        for chunk in self.source.chunks():
            data = rest + bytes(chunk) if rest else chunk
            whole = len(data) // width * width
            rest = bytes(data[whole:])
            if whole:
                values = tensor_of_bytes(data[:whole]).view(old)
                yield _bytes_of(values.to(new))


def as_checkpoint(thing: StateDictLike, role: str) -> Checkpoint:
    """Return a Checkpoint of whatever stands for a state_dict: itself, a Module, or a mapping of tensors.

    A mapping of ``TensorInfo`` has names and shapes but no bytes. ``role`` names it in messages.
    Raises ``ModelError`` for anything else, a path included: ``open_checkpoint`` is the one door for those.
    """
    if isinstance(thing, Checkpoint):
        return thing
    if isinstance(thing, str | bytes) or hasattr(thing, "__fspath__"):
        raise ModelError(f"{role} is a path", hint="open it first: open_checkpoint(path)")
    if isinstance(thing, Mapping):
        if all(isinstance(value, TensorInfo) for value in thing.values()):
            return Checkpoint(thing, Access(_no_bytes), Description(role, "description"))
        return describe_state_dict(thing, role)
    if not callable(getattr(thing, "state_dict", None)) or not _is_module(thing):
        raise ModelError(f"{role} is a {type(thing).__name__}", hint="give a Module, a Checkpoint or a dict of tensors")
    try:
        state = thing.state_dict(keep_vars=True)
    except Exception as error:  # extra state and hooks are the user's code: what works on no meta device, for one
        raise ModelError(f"state_dict() of {printable(role)} failed: {first_line(error)}") from error
    if not isinstance(state, Mapping):
        raise ModelError(f"state_dict() of {printable(role)} returned a {type(state).__name__}, not a mapping")
    return describe_state_dict(state, role).with_entries(*_absent(thing))


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of what it says, printable."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0])}" if lines else type(error).__name__


def _is_module(thing: Any) -> bool:
    import torch

    return isinstance(thing, torch.nn.Module)


def _absent(model: Module) -> Iterator[Entry]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name, child in module._modules.items():  # noqa: SLF001 - children() leaves out what is None
            if child is None:
                yield Entry(f"{path}.{name}" if path else name, ABSENT, None)


def _no_bytes(info: TensorInfo) -> Payload:
    raise PlanError(f"{quoted(info.key)} is only described: there are no bytes to read")


def describe_state_dict(state: Mapping[str, Any], path: str, format: str = "live model") -> Checkpoint:  # noqa: A002
    """Return a Checkpoint of a mapping from names to live tensors; what is no tensor becomes an entry.

    Tensors on the meta device are described and cannot be read.
    """
    import torch

    infos: dict[str, TensorInfo] = {}
    tensors: dict[str, Tensor] = {}
    entries: list[Entry] = []
    for key, value in state.items():
        if not isinstance(key, str):
            raise ModelError(f"the key {printable(repr(key))} is no string")
        if isinstance(value, torch.Tensor):
            tensors[key] = value
            infos[key] = _describe(key, value)
        else:
            entries.append(Entry(key, type(value).__name__, _shown(value)))

    def payload(info: TensorInfo) -> Payload:
        tensor = tensors[info.key]
        if tensor.is_meta or info.kind != "dense":
            raise ModelError(
                f"{quoted(info.key)} has no values: it is a {'meta' if tensor.is_meta else info.kind} tensor"
            )
        return TensorPayload(tensor, info.nbytes)

    def span(info: TensorInfo) -> Payload | None:
        tensor = tensors[info.key]
        if tensor.is_conj() or tensor.is_neg():
            return None
        if is_contiguous(info) or tensor.is_meta or info.kind != "dense":
            return payload(info)
        first, last = storage_range(info)
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return TensorPayload(raw.set_(tensor.untyped_storage(), first, (last - first,), (1,)), last - first)

    return Checkpoint(
        infos,
        Access(payload, span),
        Description(path, format, entries=entries, versions=module_versions(getattr(state, "_metadata", {}))),
    )


def _shown(value: object) -> str | int | float | None:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has neither nan nor infinity
    return value if isinstance(value, str | int | float) else None


def _describe(key: str, tensor: Tensor) -> TensorInfo:
    import torch
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        raise ModelError(
            f"{quoted(key)} is uninitialised: a lazy module has no shapes yet", hint="run one forward pass first"
        )
    code = code_of(tensor.dtype)
    kind = "dense"
    if tensor.layout is not torch.strided:
        kind = "sparse"
    elif tensor.is_quantized:
        kind = "quantized"
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        kind = "subclass"
    if tensor.is_nested:
        return TensorInfo(key, code, (), kind="nested")
    shape = tuple(tensor.shape)
    if kind != "dense":
        return TensorInfo(key, code, shape, kind=kind)
    stride, offset = tuple(map(int, tensor.stride())), int(tensor.storage_offset())
    if code == "F4":
        unpacked = unpack_float4(shape, stride, offset)
        if unpacked is None:
            return TensorInfo(key, code, shape, kind="packed")
        shape, stride, offset = unpacked
    return TensorInfo(key, code, shape, View(_storage_id(tensor), offset, stride))


def _storage_id(tensor: Tensor) -> int:
    # Not data_ptr: every tensor on the meta device has none, and ties between them still count.
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - torch's own test of identity
