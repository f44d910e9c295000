"""Decode quantised weights that are tensors, for tests of the decoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ckptkit import open_checkpoint
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.checkpoint.stored import StoredBytes
from ckptkit.core.torch_bridge import TensorPayload, code_of, torch_dtype
from ckptkit.quantized import quantized_weights
from ckptkit.quantized.decoding import Decoding
from ckptkit.values.dequantize.magnitudes import Magnitudes
from ckptkit.values.dequantize.model import Decoder, Settings
from ckptkit.values.dequantize.payload import DequantizedPayload
from ckptkit.values.dequantize.schemes import make_decoder


def payload(
    family: str, parts: Mapping[str, torch.Tensor], dtype: str = "F32", settings: Settings | None = None
) -> DequantizedPayload:
    """Return the payload of a weight with these parts by role."""
    infos = {role: TensorInfo(role, code_of(part.dtype), tuple(part.shape)) for role, part in parts.items()}
    decoder = make_decoder(family, infos, settings or {})
    sources = {role: TensorPayload(part, infos[role].nbytes) for role, part in parts.items()}
    return DequantizedPayload(decoder, sources, TensorInfo("w", dtype, decoder.shape), {})


def decoded(
    family: str, parts: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32, settings: Settings | None = None
) -> torch.Tensor:
    """Return a weight with these parts by role, whose numbers have the magnitudes that its decoder says."""
    made = payload(family, parts, code_of(dtype), settings)
    buffer = bytearray(made.nbytes)
    made.readinto(memoryview(buffer))
    if dtype == torch.float32:
        whole = {role: memoryview(b"".join(part.chunks())) for role, part in made.sources.items()}
        with np.errstate(all="ignore"):
            expect_magnitudes(made.decoder, made.decoder.prepare(whole), np.frombuffer(buffer, np.float32))
    return torch.frombuffer(buffer, dtype=dtype).reshape(made.decoder.shape)


def expect_magnitudes(decoder: Decoder, held: object, numbers: npt.NDArray[np.float32]) -> None:
    """Assert that finite numbers of a decoder are not smaller or larger than it says."""
    said = decoder.magnitudes(held)
    if said is not None:
        found = Magnitudes.of(numbers[np.isfinite(numbers)])
        assert np.float32(said.smallest) <= found.smallest
        assert np.float32(said.largest) >= found.largest


def decoded_by_rows(
    family: str, parts: Mapping[str, torch.Tensor], settings: Settings | None = None, rows: int = 1
) -> torch.Tensor:
    """Return a weight in F32 of which blocks of this many rows are decoded one by one."""
    made = payload(family, parts, settings=settings)
    buffer = bytearray(made.nbytes)
    step = made.decoder.grid[1] * 4 * rows
    for start in range(0, made.nbytes, step):
        made.read_range(start, memoryview(buffer)[start : start + step])
    return torch.frombuffer(buffer, dtype=torch.float32).reshape(made.decoder.shape)


def dequantized(path: Path, dtype: str = "F32") -> dict[str, torch.Tensor]:
    """Return the quantised weights of a checkpoint in this dtype, by their keys."""
    checkpoint = open_checkpoint(path)
    decoding, stored = Decoding(checkpoint), StoredBytes(checkpoint)
    made: dict[str, torch.Tensor] = {}
    for weight in quantized_weights(checkpoint).weights:
        decoder = decoding.decoded(weight).decoder
        sources = {role: stored.payload(key) for role, key in weight.roles}
        payload = DequantizedPayload(decoder, sources, TensorInfo(weight.key, dtype, decoder.shape), {})
        buffer = bytearray(payload.nbytes)
        payload.readinto(memoryview(buffer))
        made[weight.key] = torch.empty(decoder.shape, dtype=torch_dtype(dtype))
        if buffer:
            made[weight.key] = torch.frombuffer(buffer, dtype=torch_dtype(dtype)).reshape(decoder.shape)
    return made
