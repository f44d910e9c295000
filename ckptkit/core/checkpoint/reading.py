"""Read the bytes of one tensor into a torch tensor or a numpy array."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptkit.core.arguments import refuse, require_type
from ckptkit.core.checkpoint.info import UNINITIALISED, TensorInfo
from ckptkit.core.checkpoint.payload import Payload, part_of, read_into
from ckptkit.core.dtypes import DTYPES, torch_shape
from ckptkit.core.text import printable, quoted
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

__all__ = ["numpy_dtype", "read_array", "read_tensor", "torch_bytes", "torch_dtype_of"]

_HUGE, _MADV_HUGEPAGE = 4 << 20, 14  # the size from which numpy gives the advice, and its number on Linux
Opener: TypeAlias = Callable[[TensorInfo], Payload]


def read_tensor(info: TensorInfo, open_payload: Opener, rows: slice | None = None) -> Tensor:
    """Return a tensor, or some of its rows, as ``Checkpoint.read`` says."""
    import torch

    dtype = torch_dtype_of(info)
    part, payload = _part(info, open_payload, rows)
    shape = torch_shape(part.dtype, part.shape)
    if payload is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch_bytes(part.nbytes, lambda buffer: read_into(payload, buffer)).view(dtype).reshape(shape)


def read_array(info: TensorInfo, open_payload: Opener, rows: slice | None = None) -> npt.NDArray[Any]:
    """Return a tensor, or some of its rows, as ``Checkpoint.numpy`` says."""
    import numpy as np

    dtype = numpy_dtype(info.dtype)
    if dtype is None:
        raise ArgumentError(
            f"{quoted(info.key)}: numpy has no dtype for {info.dtype}", hint="read the bytes with read_bytes()"
        )
    part, payload = _part(info, open_payload, rows)
    if payload is None:
        return np.empty(part.shape, dtype)
    data = np.empty(part.nbytes, np.uint8)
    read_into(payload, data.data)
    return data.view(dtype).reshape(part.shape)


def torch_bytes(nbytes: int, fill: Callable[[memoryview], None]) -> Tensor:
    """Return a flat uint8 tensor on the CPU that ``fill`` fills: it gets the memory of the tensor."""
    import ctypes  # Tensor.numpy() would need numpy

    import torch

    data = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if nbytes >= _HUGE:
        _ask_for_huge_pages(data.data_ptr(), nbytes)
    fill(memoryview((ctypes.c_char * nbytes).from_address(data.data_ptr())).cast("B"))
    return data


def _ask_for_huge_pages(address: int, nbytes: int) -> None:
    """Advise the kernel to back new memory with huge pages, as numpy does: filling it is then several times faster."""
    if sys.platform != "linux":
        return
    import ctypes

    page = os.sysconf("SC_PAGE_SIZE")
    skipped = -address % page
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:  # a kernel without huge pages refuses, and nothing is lost
        advise(ctypes.c_void_p(address + skipped), ctypes.c_size_t((nbytes - skipped) // page * page), _MADV_HUGEPAGE)


def torch_dtype_of(info: TensorInfo) -> torch.dtype:
    """Return the torch dtype of a tensor; raise ``ArgumentError`` where torch cannot hold the tensor."""
    import torch

    name = DTYPES[info.dtype].torch_name if info.dtype in DTYPES else ""
    dtype = getattr(torch, name, None) if name else None
    if info.dtype == "F4" and (not info.shape or info.shape[-1] % 2):
        raise ArgumentError(
            f"{quoted(info.key)}: torch stores F4 elements in pairs, and the last size of {list(info.shape)} is odd"
        )
    if not isinstance(dtype, torch.dtype):
        which = "this torch" if name else "torch"  # another version may have it
        raise ArgumentError(f"{quoted(info.key)}: {which} has no dtype for {info.dtype}")
    return dtype


def numpy_dtype(code: str) -> np.dtype[Any] | None:
    """Return the numpy dtype of elements of ``code``, which ml_dtypes may define; None if there is none.

    Elements of fewer than 8 bits have none, because numpy would store each of them in a byte of its own.
    """
    import numpy as np

    known = DTYPES.get(code)
    name = known.torch_name if known is not None and known.bits >= 8 else ""
    scalar = getattr(np, "bool_" if name == "bool" else name, None) if name else None
    if scalar is None and name.startswith(("bfloat16", "float8")):
        import ml_dtypes

        scalar = getattr(ml_dtypes, name, None)
    return None if scalar is None else np.dtype(scalar)


def _part(info: TensorInfo, open_payload: Opener, rows: slice | None) -> tuple[TensorInfo, Payload | None]:
    """Return the description and the bytes of the rows; no bytes where there is no element."""
    if rows is None:
        has_bytes = info.elements or info.kind == UNINITIALISED  # whose payload says why it cannot be read
        return info, open_payload(info) if has_bytes else None
    start, stop = _range_of(rows, info)
    part = replace(info, shape=(stop - start, *info.shape[1:]), view=None)
    if not part.elements:
        return part, None
    row_bits = math.prod(info.shape[1:]) * DTYPES[info.dtype].bits
    if start * row_bits % 8 or part.elements * DTYPES[info.dtype].bits % 8:
        raise ArgumentError(
            f"{quoted(info.key)}: rows {start} to {stop} begin or end inside a byte of two {info.dtype}"
        )
    return part, part_of(open_payload(info), start * row_bits // 8, part.nbytes)


def _range_of(rows: slice, info: TensorInfo) -> tuple[int, int]:
    """Return the first row and the end (exclusive), as Python counts them."""
    require_type(rows, slice, "rows", "a slice, such as slice(0, 10)")
    if not info.shape:
        raise ArgumentError(f"{quoted(info.key)} has no dims, so it has no rows", hint="leave out rows")
    if rows.step is not None and not (isinstance(rows.step, int) and rows.step == 1):
        raise ArgumentError(
            f"rows has the step {printable(repr(rows.step))}, and adjacent rows are read together",
            hint="read the rows without a step, and slice the result",
        )
    try:
        start, stop, _ = rows.indices(info.shape[0])
    except TypeError:
        refuse(rows, "rows", "a slice of integers")
    return start, max(start, stop)
