"""Conversions between torch tensors, dtypes and modules, and descriptions and bytes of tensors.

torch is imported by the functions that need it, not by this module.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard

from ckptkit.core.arguments import argument_text
from ckptkit.core.checkpoint import (
    UNINITIALISED,
    Access,
    Affine,
    Checkpoint,
    Configuration,
    Description,
    Entry,
    Part,
    Payload,
    TensorInfo,
    View,
    is_contiguous,
    memory_order,
    module_versions,
    storage_range,
)
from ckptkit.core.dtypes import DTYPES, unpack_float4
from ckptkit.core.text import first_line, printable, quoted
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.errors import ModelError, PlanError

if TYPE_CHECKING:
    import ctypes

    import torch

__all__ = [
    "ABSENT",
    "CASTABLE",
    "StateDictLike",
    "TensorPayload",
    "as_checkpoint",
    "blocks",
    "code_of",
    "copies_dtype",
    "copy_composite",
    "describe_state_dict",
    "flat_bytes",
    "get_or_none",
    "has_same_layout",
    "in_layout_of",
    "is_composite",
    "is_extra_state",
    "is_plain",
    "libc",
    "named_of",
    "same_composites",
    "same_memory",
    "same_values",
    "shape_or_none",
    "torch_dtype",
]

ABSENT = "absent module"  # the type of an entry for a submodule that is None; torch ignores keys below it
CASTABLE = frozenset(
    dtype.code
    for dtype in DTYPES.values()
    if dtype.torch_name and dtype.bits >= 8 and not dtype.code.startswith(("Q", "BITS"))
)
_BLOCK_BYTES = 4 << 20
# A mapping of TensorInfo has keys, dtypes and shapes, but no values.
StateDictLike: TypeAlias = Checkpoint | Module | Mapping[str, Tensor] | Mapping[str, TensorInfo]


@functools.cache
def code_of(dtype: torch.dtype) -> str:
    """Return the safetensors code of a torch dtype, or torch's name in capitals where it has no code."""
    name = str(dtype).removeprefix("torch.")
    return next((known.code for known in DTYPES.values() if known.torch_name == name), name.upper())


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code; raise ``PlanError`` where this torch has no dtype for ``code``."""
    import torch

    dtype = getattr(torch, DTYPES[code].torch_name or "-", None)
    if not isinstance(dtype, torch.dtype):
        raise PlanError(f"torch {torch.__version__} has no dtype for {code}", hint="use a newer torch")
    return dtype


def copies_dtype(code: str) -> bool:
    """Return whether torch copies tensors of this dtype: some versions have float4 and cannot copy it.

    torch is asked only where it is imported already, as it is with a live model. Files are compared without torch.
    """
    torch = sys.modules.get("torch")
    dtype = getattr(torch, DTYPES[code].torch_name or "-", None) if code == "F4" else None
    if torch is None or dtype is None:
        return True
    try:
        _zeros(dtype).copy_(_zeros(dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _zeros(dtype: torch.dtype) -> Tensor:
    import torch

    return torch.zeros(1, dtype=torch.uint8, device="cpu").view(dtype)


def shape_or_none(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the shape of a tensor, or None where it is uninitialised."""
    try:
        return tuple(tensor.shape)
    except RuntimeError:
        return None


def get_or_none(value: object, name: str) -> Any:
    """Return an attribute of an object of the user, or None where the object has none, or fails to give it."""
    try:
        return getattr(value, name, None)
    except Exception:  # noqa: BLE001 - a property or __getattr__ of the user may raise anything
        return None


def named_of(model: Module, kind: Literal["parameters", "buffers", "modules"]) -> list[tuple[str, Any]]:
    """Return every parameter, buffer or module of a model under each of its names, in order.

    Raises ``ModelError`` where the model cannot list them, or where an entry is not a tensor.
    """
    import torch

    method = f"named_{kind}"
    try:
        try:
            found: list[tuple[str, Any]] = list(getattr(model, method)(remove_duplicate=False))
        except TypeError:  # an override that was written before this argument existed
            found = list(getattr(torch.nn.Module, method)(model, remove_duplicate=False))
    except Exception as error:  # the methods may be code of the user
        raise ModelError(f"{method}() of the model failed: {first_line(error)}") from error
    wanted = torch.nn.Module if kind == "modules" else torch.Tensor
    for name, value in found:
        if not isinstance(value, wanted):
            raise ModelError(
                f"{quoted(name)} in {method}() of the model is a {type(value).__name__}, not a {wanted.__name__}"
            )
    return found


def blocks(view: Tensor, most: int = _BLOCK_BYTES) -> Iterator[Tensor]:
    """Yield a tensor in views along its leading dims, in row-major order, each of at most ``most`` bytes."""
    if view.dim() == 0 or view.numel() * view.element_size() <= most:
        yield view
        return
    row = max(view[0].numel() * view.element_size(), 1)
    if row > most:
        for inner in view:
            yield from blocks(inner, most)
    else:
        rows = most // row
        for first in range(0, len(view), rows):
            yield view[first : first + rows]


def flat_bytes(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor in order, as a flat tensor of bytes; of a quantized tensor, its integers."""
    import torch

    if tensor.is_quantized:  # a view of such a tensor as bytes ends the process
        tensor = tensor.int_repr()
    # A tensor of one element is contiguous with any stride, but view() requires the stride 1.
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def same_memory(first: int, second: int, nbytes: int) -> bool:
    """Return whether the bytes at two addresses are equal, ten times as fast as ``torch.equal`` compares bytes."""
    return bool(libc().memcmp(first, second, nbytes) == 0)


@functools.cache
def libc() -> ctypes.CDLL:
    """Return the C library with ``memcmp`` and ``memmove``, which run while other threads run Python."""
    import ctypes

    found = ctypes.CDLL(None)
    found.memcmp.argtypes = found.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    found.memmove.restype = ctypes.c_void_p
    return found


def _have_equal_bytes(found: Tensor, expected: Tensor) -> bool:
    import torch

    if not all(type(one) is torch.Tensor and one.device.type == "cpu" for one in (found, expected)):
        return torch.equal(found, expected)
    return len(found) == len(expected) and same_memory(found.data_ptr(), expected.data_ptr(), len(found))


def same_values(tensor: Tensor, value: Tensor) -> bool:
    """Return whether a tensor on the CPU has the bytes of ``value`` in the tensor's dtype.

    Bytes are compared, not numbers: a NaN equals itself, and -0.0 differs from 0.0. After a cast, any two NaNs are
    equal.
    """
    import torch

    found, expected = flat_bytes(tensor), flat_bytes(cast := value.to(tensor.dtype))
    if _have_equal_bytes(found, expected):
        return True
    if tensor.dtype == value.dtype or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    # The bits of a NaN after a cast depend on the kernel, which torch chooses by the memory layout.
    differ = (found != expected).reshape(tensor.numel(), -1).any(dim=1)
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return all(bool(side.reshape(-1).to(wide)[differ].isnan().all()) for side in (tensor, cast))


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Return whether ``value`` is a tensor with strides, and not of a subclass such as DTensor."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and _is_of_torch(value)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_nested)
    )


def _is_of_torch(tensor: Tensor) -> bool:
    """Return whether the class of a tensor is of torch itself; some versions of torch have no class for buffers."""
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", None))


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Return whether ``value`` is a DTensor; False where this torch has none."""
    import torch

    if type(value) in (torch.Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return False
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:  # torch before 2.5
        from torch.distributed._tensor import DTensor  # type: ignore[attr-defined]
    return isinstance(value, DTensor)


def is_composite(value: object) -> TypeGuard[Tensor]:
    """Return whether ``value`` is a tensor made of others by torch's protocol for subclasses, as 8-bit state is."""
    import torch

    return isinstance(value, torch.Tensor) and not is_plain(value) and hasattr(value, "__tensor_flatten__")


def copy_composite(tensor: Any) -> Tensor:
    """Return a composite tensor in memory of its own."""
    names, context = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    copies = {name: copy_composite(part) if is_composite(part) else part.clone() for name, part in parts.items()}
    copied: Tensor = type(tensor).__tensor_unflatten__(copies, context, tensor.size(), tensor.stride())
    return copied


def same_composites(one: object, other: object) -> bool:
    """Return whether two composite tensors have one class and equal parts."""
    import torch

    if not is_composite(one) or not is_composite(other):
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            return False
        return one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    names = one.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return type(one) is type(other) and all(same_composites(getattr(one, name), getattr(other, name)) for name in names)


def has_same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two plain tensors of one shape have their elements in the same order of memory, without gaps.

    Strides of dims of size 1 do not count.
    """
    order = memory_order(tuple(tensor.shape), tuple(tensor.stride()))
    return order is not None and order == memory_order(tuple(other.shape), tuple(other.stride()))


def in_layout_of(tensor: Tensor, other: Tensor) -> Tensor:
    """Return ``tensor`` with the order of memory that ``torch.zeros_like(other)`` has; the shapes must be equal."""
    import torch

    like = torch.empty_like(other, dtype=tensor.dtype, device=tensor.device)
    return tensor if has_same_layout(tensor, like) else like.copy_(tensor)


@dataclass(frozen=True, slots=True)
class TensorPayload:
    """The payload of a tensor in memory; ``nbytes`` is the size of its elements."""

    tensor: Tensor
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces; each piece is valid until the next one is asked for."""
        import torch

        buffer = bytearray(min(self.nbytes, _BLOCK_BYTES))  # new memory for each block would cost more than the copy
        for block in blocks(self.tensor.detach().resolve_conj().resolve_neg()):
            data = flat_bytes(block.cpu())
            if len(data):
                torch.frombuffer(buffer, dtype=torch.uint8)[: len(data)].copy_(data)
            yield memoryview(buffer)[: len(data)]

    def slice(self, start: int, nbytes: int) -> Payload:
        """Return the ``nbytes`` bytes from byte ``start``; whole rows are read without the rows before them."""
        row = self.nbytes // len(self.tensor) if self.tensor.dim() and len(self.tensor) else 0
        if not row or start % row or nbytes % row:
            return Part(self, start, nbytes)
        return TensorPayload(self.tensor[start // row : (start + nbytes) // row], nbytes)


@dataclass(frozen=True, slots=True)
class _Codes:
    """The integers of a quantised tensor in memory."""

    tensor: Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def chunks(self) -> Iterator[memoryview]:
        yield from TensorPayload(self.tensor.int_repr(), self.nbytes).chunks()


def _affine(tensor: Tensor) -> Affine | None:
    """Return the integers, scales and zero points of a tensor that torch quantised, or None for another scheme."""
    import torch

    if not tensor.is_quantized or tensor.is_meta:
        return None
    scheme = tensor.qscheme()
    if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return Affine(_Codes(tensor), (tensor.q_scale(),), (tensor.q_zero_point(),), -1)
    if scheme in (torch.per_channel_affine, torch.per_channel_symmetric):
        scales, zeros = tensor.q_per_channel_scales().tolist(), tensor.q_per_channel_zero_points().tolist()
        return Affine(_Codes(tensor), tuple(scales), tuple(zeros), tensor.q_per_channel_axis())
    return None


def as_checkpoint(state: StateDictLike, role: str) -> Checkpoint:
    """Return a Checkpoint of a Module or of a mapping of tensors or ``TensorInfo``; a Checkpoint is returned as it is.

    A mapping of ``TensorInfo`` has no bytes to read. Messages call the argument ``role``, such as ``base``. Raises
    ``ModelError`` for any other value, also for a path, which ``inputs.opened`` opens.
    """
    given: object = state  # the caller may have passed anything
    if isinstance(given, Checkpoint):
        return given
    if isinstance(given, Mapping):
        if all(isinstance(value, TensorInfo) for value in given.values()):
            return Checkpoint(given, Access(_no_bytes), Description(role, "description"))
        described = describe_state_dict(given, role, "state_dict")
        if not described:
            _refuse_other_arrays(given, role)
        return described
    if not callable(getattr(given, "state_dict", None)) or not _is_module(given):
        made = f"give an instance of it: {given.__name__}(); or " if isinstance(given, type) else "give "
        raise ModelError(
            f"{role} is {argument_text(given)}", hint=f"{made}a path, a Module, a Checkpoint or a dict of tensors"
        )
    return _describe_module(given, role)


def is_extra_state(key: str) -> bool:
    """Return whether the key is the extra state of a module, which only the module can interpret."""
    return key.rpartition(".")[2] == "_extra_state"


def _refuse_other_arrays(state: Mapping[str, object], role: str) -> None:
    """Raise ``ModelError`` where a mapping without a tensor has its weights in another form: the result would be empty.

    These are arrays, and a mapping of tensors at a key of a training checkpoint.
    """
    import torch

    for key, value in state.items():
        if is_extra_state(str(key)):  # a value of any form, which the module made
            continue
        if hasattr(value, "__array__") and getattr(value, "ndim", False):  # numbers of numpy stand beside weights
            kind, hint = "an array", "give a mapping of keys to tensors of torch, as of torch.from_numpy(array)"
        elif isinstance(value, Mapping) and any(isinstance(inner, torch.Tensor) for inner in value.values()):
            kind, hint = "a mapping", f"give the mapping of tensors inside it, such as {role}[{quoted(str(key))}]"
        else:
            continue
        raise ModelError(f"{role} has no tensor: its {quoted(str(key))} is {kind}", hint=hint)


def _describe_module(model: Module, role: str) -> Checkpoint:
    try:
        state: object = model.state_dict(keep_vars=True)
    except Exception as error:  # hooks and extra state are code of the user, which may fail on the meta device
        raise ModelError(f"state_dict() of {printable(role)} failed: {first_line(error)}") from error
    if not isinstance(state, Mapping):
        raise ModelError(f"state_dict() of {printable(role)} returned a {type(state).__name__}, not a mapping")
    modules = named_of(model, "modules")
    described = describe_state_dict(state, role, layers=_layers(modules), model=model).with_entries(*_absent(modules))
    return described.with_configuration(_configuration(model))


def _configuration(model: Module) -> Configuration | None:
    """Return the configuration of a model of transformers, whose classes have ``config_class``, else None."""
    config = getattr(model, "config", None)
    if not callable(getattr(config, "to_dict", None)) or not hasattr(type(model), "config_class"):
        return None
    names = [item.__name__ for item in type(model).__mro__ if item.__module__.startswith("transformers.")]
    return Configuration(config, tuple(names)) if names else None


def _is_module(value: object) -> TypeGuard[Module]:
    import torch

    return isinstance(value, torch.nn.Module)


def _absent(modules: Iterable[tuple[str, Module]]) -> Iterator[Entry]:
    for path, module in modules:
        for name, child in module._modules.items():  # noqa: SLF001 - children() leaves out modules that are None
            if child is None:
                yield Entry(f"{path}.{name}" if path else name, ABSENT, None)


def _layers(modules: Iterable[tuple[str, Module]]) -> dict[str, str]:
    return {path: _kind_of_layer(module) for path, module in modules if path}


def _kind_of_layer(module: Module) -> str:
    from torch import nn

    if isinstance(module, nn.Embedding):
        # One with its own positions or norms is called in another way than with tokens; one that scales is not.
        is_plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if is_plain else "other"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution" if module.groups == 1 else "other"
    # transformers is not imported: its Conv1D is known by its name and by its attribute for the output features.
    names = {cls.__name__ for cls in type(module).__mro__}
    return "transposed" if "Conv1D" in names and hasattr(module, "nf") else "other"


def _no_bytes(info: TensorInfo) -> Payload:
    raise PlanError(f"{quoted(info.key)} is a description without values")


def describe_state_dict(
    state: Mapping[str, object],
    path: str,
    format: str = "live model",  # noqa: A002
    layers: Mapping[str, str] | None = None,
    *,
    model: Module | None = None,
) -> Checkpoint:
    """Return a Checkpoint of a mapping from keys to live tensors; any other value becomes an entry.

    ``model`` is the live model whose state_dict the mapping is. Quantised layers of torch have tuples with
    a quantised tensor: the tensors in them have the key of the tuple with their number, as in files.

    Tensors on the meta device are described and cannot be read. So is an uninitialised tensor, which has no elements.
    Raises ``ModelError`` for a key that is not a string.
    """
    import torch

    infos: dict[str, TensorInfo] = {}
    tensors: dict[str, Tensor] = {}
    entries: list[Entry] = []
    for key, value in state.items():
        if not isinstance(key, str):
            raise ModelError(f"the key {printable(repr(key))} is not a string")
        if isinstance(value, torch.Tensor):
            tensors[key] = value
            infos[key] = _describe(key, value)
        elif isinstance(value, list | tuple) and any(getattr(one, "is_quantized", False) for one in value):
            listed = {f"{key}.{number}": one for number, one in enumerate(value) if isinstance(one, torch.Tensor)}
            tensors |= listed
            infos |= {name: _describe(name, one) for name, one in listed.items()}
        else:
            entries.append(Entry(key, type(value).__name__, _shown(value)))

    def payload(info: TensorInfo) -> Payload:
        tensor = tensors[info.key]
        if tensor.is_meta or info.kind != "dense":
            kind = info.kind if info.kind == UNINITIALISED or not tensor.is_meta else "meta"
            raise ModelError(
                f"{quoted(info.key)} has no values: it is {'an' if kind == UNINITIALISED else 'a'} {kind} tensor",
                hint="run one forward pass first" if kind == UNINITIALISED else None,
            )
        if info.nbytes and not tensor.untyped_storage().nbytes():  # to read it would end the process
            raise ModelError(f"{quoted(info.key)} has no values: its memory was freed")
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
        Access(payload, span, affine=lambda info: _affine(tensors[info.key])),
        Description(
            path,
            format,
            entries=entries,
            versions=module_versions(getattr(state, "_metadata", {})),
            references=_foreign_classes(tensors[key] for key, info in infos.items() if info.kind == "subclass"),
            layers=layers or {},
        ),
        model=model,
    )


def _foreign_classes(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """Return the names of the classes of tensors that are not classes of torch."""
    classes = dict.fromkeys(map(type, tensors))
    return tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in classes if not cls.__module__.startswith("torch."))


def _shown(value: object) -> str | int | float | None:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has neither nan nor infinity
    return value if isinstance(value, str | int | float) else None


def _describe(key: str, tensor: Tensor) -> TensorInfo:
    import torch
    from torch.nn.parameter import is_lazy

    code = code_of(tensor.dtype)
    if is_lazy(tensor):
        return TensorInfo(key, code, (0,), kind=UNINITIALISED)
    kind = "dense"
    if tensor.layout is not torch.strided:
        kind = "sparse"
    elif tensor.is_quantized:
        kind = "quantized"
    elif not _is_of_torch(tensor):
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
    storage = tensor.untyped_storage()
    # Two storages can have one memory: those of two torch.from_numpy() of one array.
    address = storage.data_ptr() if tensor.device.type == "cpu" else 0
    # On the meta device every address is 0, and ties still count. torch compares storages by _cdata.
    return address or int(storage._cdata)  # noqa: SLF001
