"""Read many tensors as a state_dict, in which tensors that overlap in the file share memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.core.arguments import refuse, require_strings
from ckptkit.core.checkpoint.info import TensorInfo, UnknownKeyError, storage_range
from ckptkit.core.checkpoint.payload import Payload, read_into
from ckptkit.core.checkpoint.reading import Opener, read_tensor, torch_bytes, torch_dtype_of
from ckptkit.core.dtypes import DTYPES, dtype_code, torch_view
from ckptkit.core.text import first_line, printable, quoted
from ckptkit.core.ties import overlapping_tensors
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["cast_dtype", "choose", "read_state_dict", "to_device", "with_versions"]


def read_state_dict(
    infos: Sequence[TensorInfo],
    open_payload: Opener,
    open_span: Callable[[TensorInfo], Payload | None],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Return the tensors by key, as ``Checkpoint.state_dict`` says."""
    for info in infos:
        torch_dtype_of(info)
        if info.dtype == "F4" and dtype is not None:
            raise ArgumentError(f"{quoted(info.key)} is F4, which torch cannot cast", hint="leave out dtype")
        if info.elements:
            open_payload(info)  # refuses what cannot be read before any byte is read

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    blocks = {info.key: block for block in _blocks(infos, open_span) for info, _ in block.spans}
    tensors = {}
    for info in infos:
        block = blocks.get(info.key)
        tensors[info.key] = place(read_tensor(info, open_payload)) if block is None else block.view(info, place)
    return tensors


@dataclass(slots=True)
class _Block:
    """Tensors of one dtype that overlap in memory, each with the bytes from its first to its last element."""

    spans: list[tuple[TensorInfo, Payload]]
    flat: Tensor | None = None  # all elements of the block, once they are read

    def view(self, info: TensorInfo, place: Callable[[Tensor], Tensor]) -> Tensor:
        """Return one tensor of the block; ``place`` moves and casts the whole block."""
        first = min(storage_range(other)[0] for other, _ in self.spans)
        if self.flat is None:
            last = max(storage_range(other)[1] for other, _ in self.spans)
            self.flat = place(
                torch_bytes(last - first, lambda buffer: self._fill(buffer, first)).view(torch_dtype_of(info))
            )
        assert info.view is not None  # noqa: S101 - a tensor that overlaps others has a view
        offset = info.view.offset - first * 8 // DTYPES[info.dtype].bits
        return self.flat.as_strided(*torch_view(info.dtype, info.shape, info.view.stride, offset))

    def _fill(self, buffer: memoryview, first: int) -> None:
        done = 0
        for info, span in self.spans:  # in the order of their first bytes
            start, end = (at - first for at in storage_range(info))
            if end > done:
                read_into(span, buffer[start:end])
                done = end


def _blocks(infos: Iterable[TensorInfo], open_span: Callable[[TensorInfo], Payload | None]) -> Iterator[_Block]:
    by_dtype: dict[str, list[TensorInfo]] = {}
    for info in infos:
        by_dtype.setdefault(info.dtype, []).append(info)
    for group in [group for alike in by_dtype.values() for group in overlapping_tensors(alike)]:
        spans = [(info, span) for info in group if (span := open_span(info)) is not None]
        if len(spans) > 1:
            # Of the spans with one first byte, the longest comes first and often is the whole block.
            yield _Block(sorted(spans, key=lambda item: (storage_range(item[0])[0], -storage_range(item[0])[1])))


def choose(infos: Mapping[str, TensorInfo], keys: Iterable[str] | None) -> list[TensorInfo]:
    """Return the tensors at ``keys``, or all, in the order of the file; raise ``KeyError`` for an unknown key."""
    if keys is None:
        return list(infos.values())
    wanted = set(require_strings(keys, "keys", "keys of the checkpoint"))
    unknown = next((key for key in wanted if key not in infos), None)
    if unknown is not None:
        raise UnknownKeyError(unknown, infos)
    return [info for key, info in infos.items() if key in wanted]


def cast_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that floating-point tensors are cast to; raise ``ArgumentError`` for any other dtype."""
    if dtype is None:
        return None
    import torch

    code = dtype_code(str(dtype))
    found: Any = getattr(torch, DTYPES[code].torch_name or "none", None) if code is not None else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point or code == "F4":
        refuse(dtype, "dtype", "a floating-point dtype of torch, or its name")
    return found


def to_device(device: torch.device | str | int | None) -> torch.device | None:
    """Return the device that an argument names; raise ``ArgumentError`` where torch cannot put a tensor there."""
    import torch

    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (TypeError, RuntimeError, AssertionError) as error:  # a build without CUDA raises AssertionError
        hint = None if isinstance(error, TypeError) else f"torch says: {first_line(error)}"
        raise ArgumentError(f"device is {printable(repr(device))}, which torch cannot use here", hint=hint) from None


def with_versions(tensors: Mapping[str, Tensor], versions: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the tensors as a state_dict of torch, which has the versions of modules as ``_metadata``."""
    if not versions:
        return dict(tensors)
    state: OrderedDict[str, Tensor] = OrderedDict(tensors)
    state._metadata = OrderedDict((prefix, {"version": version}) for prefix, version in versions.items())  # type: ignore[attr-defined]  # noqa: SLF001
    return state
