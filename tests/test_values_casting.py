"""Casts of bytes have the values of ``Tensor.to``, whatever the pieces, the threads and the kind of the source."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ckptkit import TensorInfo
from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint import Payload
from ckptkit.core.checkpoint.payload import read_into
from ckptkit.core.torch_bridge import CASTABLE
from ckptkit.errors import ChangedError
from ckptkit.formats.writing.copying import merge_extents
from ckptkit.values import cast_payload
from ckptkit.values.cast_payload import CastPayload
from ckptkit.values.casting import cast_bytes
from ckptkit.values.workers import Workers
from tests.features import has_dtype
from tests.helpers_outputs import dtype_of, raw, tensor_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning"),
]
KNOWN = sorted(code for code in CASTABLE if has_dtype(code))
WIDE = {"F32": np.float32, "F64": np.float64}


@functools.cache
def source_of(code: str) -> torch.Tensor:
    """Return every bit pattern of a dtype of 8 or 16 bits; of a wider one, random bits and numbers near each limit."""
    dtype = dtype_of(code)
    if code == "BOOL":
        return torch.tensor([True, False])
    if dtype.itemsize <= 2:
        width = {1: np.uint8, 2: np.uint16}[dtype.itemsize]
        return torch.from_numpy(np.arange(1 << 8 * dtype.itemsize, dtype=width).view(np.uint8)).view(dtype)
    bits = tensor_of(code, (9001,), 5)
    if code not in WIDE:
        return bits
    limits = []
    with np.errstate(all="ignore"):
        halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float64)
        brains = (np.arange(0, 65536, 7, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
        for numbers in (halves[np.isfinite(halves)][::5], brains[np.isfinite(brains)]):
            numbers.sort()
            middle = ((numbers[1:] + numbers[:-1]) / 2).astype(WIDE[code])
            limits += [numbers.astype(WIDE[code]), middle]
            limits += [np.nextafter(middle, np.array(way, middle.dtype)) for way in (-np.inf, np.inf)]
        special = [0.0, -0.0, np.inf, np.nan, 464, 464.1, 448, 57344, 61440, 65504, 65519.99, 65520, 2.0**-25, 3.4e38]
        limits.append(np.array([*special, *(-value for value in special)]).astype(WIDE[code]))
    return torch.cat([bits, *map(torch.from_numpy, limits)])


@pytest.mark.parametrize("before", KNOWN)
def test_a_cast_has_the_values_of_tensor_to(before: str) -> None:
    """For each pair of dtypes every bit is equal, also the sign of 0; only the bits of a NaN may be others."""
    source = source_of(before)
    data, workers = raw_view(source), Workers(1)
    for after in KNOWN:
        wanted = source.to(dtype_of(after))
        made = torch.frombuffer(bytearray(cast_bytes(data, before, after, workers)), dtype=torch.uint8)
        rows = (tensor.view(torch.uint8).reshape(len(source), -1) for tensor in (made, wanted))
        differ = torch.ne(*rows).any(dim=1) & is_held(source, after)
        for tensor in (made.view(wanted.dtype), wanted):
            assert bool(wide(tensor)[differ].isnan().all()), after


def is_held(source: torch.Tensor, after: str) -> torch.Tensor:
    """Mark the numbers for which torch promises what they become: C does not for numbers out of range of an integer."""
    real = wide(source).real.double() if source.is_complex() else source.double()
    dtype = dtype_of(after)
    if after == "F8_E4M3":  # older versions of torch give NaN
        return ~(real.abs() > 464)
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or not is_float(source):
        return torch.ones(len(source), dtype=torch.bool)
    limits = torch.iinfo(dtype)
    return (real > float(limits.min) - 1) & (real < float(limits.max) + (limits.bits < 64))


def is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def raw_view(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


@pytest.mark.parametrize("before", [code for code in KNOWN if code == "F16" or code.startswith("F8_E")])
def test_subnormal_numbers_are_kept_where_the_processor_takes_them_for_0(before: str) -> None:
    """In a thread that called ``torch.set_flush_denormal``, the numbers in F32 have the same bits as elsewhere."""
    source = source_of(before)
    held = source.float().isfinite().numpy()  # where none is NaN, they are widened in another way
    bits = np.frombuffer(raw_view(source), f"u{source.element_size()}")[held]
    data = bits.view(np.uint8).data

    def widen() -> bytes:
        torch.set_flush_denormal(True)
        return bytes(cast_bytes(data, before, "F32", Workers(1)))

    with ThreadPoolExecutor(1) as pool:  # the setting is that of one thread
        made = pool.submit(widen).result()
    assert made == bytes(cast_bytes(data, before, "F32", Workers(1)))


@pytest.mark.parametrize("before", ["F32", "F64", "BF16", "F8_E4M3", "I64"])
def test_a_number_out_of_range_has_the_largest_value_of_f8_e4m3(before: str) -> None:
    """So do newer versions of torch, whatever version is installed; NaN stays NaN."""
    numbers = torch.tensor([465, -465, 60000, 0], dtype=torch.float64)
    if before in ("F8_E4M3", "I64"):
        source = numbers.clamp(-448, 448).to(dtype_of(before))
    else:
        source = torch.cat([numbers, torch.tensor([torch.inf, -torch.inf, torch.nan]).double()]).to(dtype_of(before))
    made = torch.frombuffer(
        bytearray(cast_bytes(raw_view(source), before, "F8_E4M3", Workers(1))), dtype=torch.float8_e4m3fn
    )
    assert torch.equal(made.double().nan_to_num(7), source.double().clamp(-448, 448).nan_to_num(7))


@dataclass(frozen=True)
class Pieces:
    """A payload in pieces of the given size, which may end within an element."""

    data: bytes
    size: int

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        yield from (self.data[at : at + self.size] for at in range(0, len(self.data), self.size))


class Written:
    """Bytes that are written in any order, by any thread."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        self.data[offset : offset + len(data)] = data


def payloads(kind: str, losses: dict[str, CastLoss], workers: Workers) -> list[Payload]:
    """Return casts of tensors of several sizes, with values that are lost in some of them."""
    made: list[Payload] = []
    for number, count in enumerate([0, 1, 1000, 3, 20_001, 5]):
        tensor = tensor_of(kind, (count,), number)
        info = TensorInfo(f"t{number}", kind, (count,))
        out = TensorInfo(info.key, "F16", (count,))
        made.append(CastPayload(Pieces(raw(tensor), 4099), info, out, losses, workers))
    return made


@pytest.mark.parametrize("kind", ["F32", "F64", "I32"])
def test_pieces_threads_and_joining_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, checksum and the losses of each tensor are the same for every size of pieces and number of threads."""
    results = []
    for piece, threads in ((1 << 19, 1), (1 << 19, 3), (1000, 2), (177, 3)):
        monkeypatch.setattr(cast_payload, "PIECE", piece)
        losses: dict[str, CastLoss] = {}
        with Workers(threads) as workers:
            many = payloads(kind, losses, workers)
            (joined,) = merge_extents(many)
            out = Written(joined.nbytes)
            crc = write(joined, out)
            results.append((bytes(out.data), crc, losses))
            alone: dict[str, CastLoss] = {}
            filled = bytearray(out.data)
            at = 0
            for payload in payloads(kind, alone, workers):
                read_into(payload, memoryview(filled)[at : at + payload.nbytes])
                at += payload.nbytes
                assert b"".join(map(bytes, payload.chunks())) == filled[at - payload.nbytes : at]
            assert (bytes(filled), alone) == (bytes(out.data), losses)
    assert all(result == results[0] for result in results)
    assert zlib.crc32(results[0][0]) == results[0][1]
    assert any(results[0][2].values())


def write(payload: Payload, out: Written) -> int:
    """Write a payload, and return the checksum that comes after all steps."""
    steps = payload.write_to(out, 0, checksum=True)  # type: ignore[attr-defined]
    total = 0
    while True:
        try:
            total += next(steps)
        except StopIteration as end:
            assert total == payload.nbytes
            return int(end.value)


def test_a_source_of_another_size_is_an_error() -> None:
    """A payload that yields too few bytes is never completed with others."""
    info, out = TensorInfo("w", "F32", (10,)), TensorInfo("w", "BF16", (10,))
    for nbytes in (36, 38, 44):
        payload = CastPayload(Pieces(bytes(nbytes), 8), info, out)
        with pytest.raises(ChangedError, match=f"a tensor has {nbytes} bytes in place of 40"):
            list(payload.chunks())
