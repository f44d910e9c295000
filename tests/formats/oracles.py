"""Read checkpoints with ckptkit and with other libraries, in one form that can be compared."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException

from ckptkit.core.dtypes import DTYPES
from ckptkit.core.ties import shared_keys
from ckptkit.errors import CkptkitError
from ckptkit.formats import open_checkpoint
from tests.helpers_dcp import loaded
from tests.helpers_formats import CODE_OF, bits

_LARGEST_READ = 1 << 20
Seen = dict[str, tuple[str, tuple[int, ...], bytes | None]]  # no bytes: listed, and not to be read


def by_ckptkit(path: str) -> Seen | None:
    """Return keys, dtypes, shapes and bytes by ckptkit, or None where it refuses the file; other errors are raised."""
    try:
        with open_checkpoint(path) as checkpoint:
            shared_keys(checkpoint)
            repr((checkpoint.entries, checkpoint.warnings, checkpoint.versions))
            plain = {key for key, info in checkpoint.items() if info.kind == "dense" and info.nbytes <= _LARGEST_READ}
            return {
                key: (info.dtype, info.shape, checkpoint.read_bytes(key) if key in plain else None)
                for key, info in checkpoint.items()
            }
    except CkptkitError as error:
        if not error.path or "\n" in f"{error.reason} {error.hint}":
            raise AssertionError(f"an error without a path, or of several lines: {error}") from error
        return None


def by_safetensors(path: str) -> Seen | None:
    """Return the same by the safetensors library, or None where it refuses the file."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            slices = {key: file.get_slice(key) for key in names}
            shapes = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except Exception:  # noqa: BLE001 - whatever it raises, it refuses
        return None
    return {key: (code, shape, _bytes_by_safetensors(path, key)) for key, (code, shape) in shapes.items()}


def _bytes_by_safetensors(path: str, key: str) -> bytes:
    try:
        with safe_open(path, "pt") as file:
            return bits(file.get_tensor(key))
    except Exception:  # noqa: BLE001 - listed, and for torch there is no such tensor: F6, or an odd row of F4
        return b""


def by_torch(path: str) -> Seen | None:
    """Return the same by torch.load(weights_only=True), or None unless it gives a flat mapping.

    Asked only about files that we accept: on others it may allocate or hang. Where a deflated record is
    damaged, torch 2.13 hands out uninitialised memory: nothing can be compared with that.
    """
    with open_checkpoint(path) as checkpoint:
        if any("compressed" in line for line in checkpoint.warnings):
            return None
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it raises, it refuses
        return None
    tree = state.get("model", state) if isinstance(state, dict) else {}
    if not isinstance(tree, dict) or not tree:
        return None
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tree.items()):
        return None
    return {
        key: (CODE_OF[value.dtype], tuple(value.shape), bits(value))
        for key, value in tree.items()
        if value.layout is torch.strided and value.numel() * value.element_size() <= _LARGEST_READ
    }


def by_gguf(path: str) -> Seen | None:
    """Return the tensors of plain numbers by gguf-py, or None where it refuses the file."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tensors = gguf.GGUFReader(path).tensors
    except Exception:  # noqa: BLE001 - whatever it raises, it refuses
        return None
    return {
        tensor.name: (tensor.tensor_type.name, tuple(int(size) for size in tensor.shape)[::-1], tensor.data.tobytes())
        for tensor in tensors
        if tensor.tensor_type.name in DTYPES and tensor.n_bytes <= _LARGEST_READ
    }


def by_numpy(path: str) -> Seen | None:
    """Return the arrays of numbers by numpy.load without pickles, or None where it refuses the file."""
    seen: Seen = {}
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = np.load(path, allow_pickle=False)
        arrays = loaded if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
    except Exception:  # noqa: BLE001 - whatever it raises, it refuses
        return None
    for key in arrays:
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            array = arrays[key]
            code = CODE_OF.get(getattr(torch, array.dtype.name, None))
            if code and array.nbytes <= _LARGEST_READ:
                little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
                seen[key] = (code, array.shape, little.tobytes())
    return seen


def by_dcp(path: str) -> Seen | None:
    """Return the tensors of a distributed checkpoint by the converter of torch, or None unless they are flat.

    Asked only about metadata that we accept, which then names no code but torch's own.
    """
    logging.disable()  # torch logs each refusal with its traceback
    try:
        with tempfile.TemporaryDirectory() as directory:
            state = loaded(path, Path(directory))
    except (Exception, CheckpointException):  # noqa: BLE001 - whatever it raises, it refuses
        return None
    finally:
        logging.disable(logging.NOTSET)
    tree = state.get("model", state) if isinstance(state, dict) else {}
    if not isinstance(tree, dict) or not all(isinstance(value, torch.Tensor) for value in tree.values()):
        return None
    return {str(key): (CODE_OF[value.dtype], tuple(value.shape), bits(value)) for key, value in tree.items()}
