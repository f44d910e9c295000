"""Tensors of random bits, and their comparison bit by bit."""

from __future__ import annotations

import torch

from ckptkit.core.dtypes import DTYPES
from ckptkit.core.torch_bridge import CASTABLE, flat_bytes
from tests.features import has_dtype

MOVABLE = sorted(filter(has_dtype, CASTABLE))
MOVES = (
    "concat", "deinterleave", "fuse_qkv", "interleave", "permute", "reshape", "rope_permute", "slice", "split",
    "split_qkv", "stack", "transpose", "unstack",
)  # fmt: skip


def dtype_of(code: str) -> torch.dtype:
    dtype = getattr(torch, DTYPES[code].torch_name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def random_bits(shape: tuple[int, ...], code: str, seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bits, with NaN payloads, negative zeros, and booleans other than 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype_of(code)
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of each element as an integer, or as a complex number for 128 bits."""
    return tensor.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.itemsize, tensor.dtype)
    )


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(flat_bytes(tensor).tolist())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bits(one) == bits(other)
