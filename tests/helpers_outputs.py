"""Random state_dicts for the tests of plans, writers and loading, and functions that compare tensors."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from hypothesis import strategies as st

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.dtypes import DTYPES
from tests.features import safetensors_has, saves

CODES = tuple(code for code in DTYPES if saves(code) and not code.startswith(("Q", "BITS", "F4")))
STORABLE = tuple(code for code in CODES if DTYPES[code].storable and safetensors_has(code))


def dtype_of(code: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[code].torch_name)
    return dtype


def tensor_of(code: str, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bits, so that every NaN and every rare code of a dtype can occur."""
    dtype = dtype_of(code)
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2 if code == "BOOL" else 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(tuple(shape))


def raw(tensor: torch.Tensor) -> bytes:
    """Return the elements as contiguous bytes, as a checkpoint must store them."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).tolist())


def described(**tensors: Sequence[int]) -> dict[str, TensorInfo]:
    """Return F32 descriptions by key; a double underscore in a name stands for a dot."""
    named = {name.replace("__", "."): tuple(shape) for name, shape in tensors.items()}
    return {key: TensorInfo(key, "F32", shape) for key, shape in named.items()}


def same_state(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Return whether both have the same keys in any order, with the same dtype, shape and bytes."""
    return found.keys() == expected.keys() and all(
        (found[key].dtype, found[key].shape, raw(found[key])) == (value.dtype, value.shape, raw(value))
        for key, value in expected.items()
    )


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary directory, in memory if the system has /dev/shm, because fsync is slow."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@st.composite
def state_dicts(draw: st.DrawFn, codes: Iterable[str] = CODES) -> dict[str, torch.Tensor]:
    """Return a random state_dict: contiguous, transposed, sliced, expanded, empty and 0-dim tensors, ties and views."""
    choice = st.sampled_from(tuple(codes))
    made: dict[str, torch.Tensor] = {}
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        whole = tensor_of(draw(choice), shape, seed=number)
        tensor = _with_layout(whole, draw(st.sampled_from(("plain", "transposed", "sliced", "expanded", "stepped"))))
        made[f"{draw(st.sampled_from(('a.', 'b.', 'ü.', ' ', '')))}t{number}"] = tensor
        relative = draw(st.sampled_from(("none", "none", "tie", "view", "transpose", "row")))
        if relative != "none":
            made[f"again.{number}"] = _relative(tensor, relative)
    return made


def _with_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1)
    if layout == "sliced" and tensor.dim():
        return tensor[..., 1:]
    if layout == "stepped" and tensor.dim():
        return tensor[..., ::2]
    if layout == "expanded":
        return tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor


def _relative(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "view" and tensor.is_contiguous():
        return tensor.view(-1)
    if kind == "transpose" and tensor.dim() >= 2:
        return tensor.transpose(0, 1)
    if kind == "row" and tensor.dim() and len(tensor):
        return tensor[0]
    return tensor
