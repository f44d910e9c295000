"""What changed in a tensor is packed in few bytes, and gives the same bits again; damaged bytes are refused."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from ckptkit import TensorInfo
from ckptkit.core.checkpoint import Payload
from ckptkit.core.checkpoint.payload import HeldBytes, part_of, read_into
from ckptkit.core.dtypes import DTYPES
from ckptkit.errors import ArgumentError, CkptkitError, FormatError
from ckptkit.values.delta import Change, PatchedPayload, Spool, pack_changes, require_compression
from ckptkit.values.delta.blocks import BLOCK
from ckptkit.values.delta.coding import Compression
from ckptkit.values.sinks import NullSink
from ckptkit.values.workers import Workers
from tests.features import needs_module

HERE = Workers(1)
ODD = (0x7FC0, 0xFFC1, 0x8000, 0x0000, 0x7F80, 0xFF80, 0x0001, 0x8001)  # BF16: NaN, -0.0, infinities, subnormals


@dataclass(frozen=True)
class InOrder:
    """Bytes that can be read only from the first to the last, as those of a compressed archive."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), 1000):
            yield self.data[start : start + 1000]


def held(data: bytes | None) -> Payload | None:
    return None if data is None else HeldBytes(bytearray(data))


def pack(
    changes: Sequence[Change], compression: Compression = "zlib", workers: Workers = HERE
) -> dict[str, bytes | None]:
    with Spool() as spool:
        found = pack_changes(changes, spool, workers, compression)
        return {change.info.key: None if one is None else b"".join(one.chunks()) for change, one in found}


def one(base: bytes | None, new: bytes, code: str, compression: Compression = "zlib") -> bytes:
    """Return the packed bytes of one tensor."""
    info = TensorInfo("w", code, (len(new) * 8 // DTYPES[code].bits,))
    packed = pack([Change(info, held(base), HeldBytes(bytearray(new)))], compression)["w"]
    assert packed is not None
    return packed


def made(base: bytes | None, packed: bytes, code: str, nbytes: int) -> bytes:
    """Return the tensor that packed bytes give, read at once."""
    info = TensorInfo("w", code, (nbytes * 8 // DTYPES[code].bits,))
    buffer = bytearray(nbytes)
    read_into(PatchedPayload(held(base), HeldBytes(bytearray(packed)), info, HERE), memoryview(buffer))
    return bytes(buffer)


def sides(code: str, elements: int, seed: int) -> Iterator[tuple[bytes | None, bytes]]:
    """Yield pairs of a base and of new bytes: random bits, few and small changes, other sizes, and no base."""
    rng = np.random.default_rng(seed)
    nbytes = (elements * DTYPES[code].bits + 7) // 8
    base, other = rng.bytes(nbytes), rng.bytes(nbytes)
    yield base, other
    yield None, base
    yield None, bytes(nbytes)
    few = bytearray(base)
    for at in rng.integers(0, max(nbytes, 1), size=min(nbytes, 3)):
        few[at] ^= 1
    yield base, bytes(few)
    yield base[: nbytes // 2], base
    yield base + other, base
    odd = (np.array(ODD, np.uint16).tobytes() * (nbytes // 16 + 1))[:nbytes]
    yield odd, base
    yield base, odd


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_bit_comes_back(code: str) -> None:
    """For each dtype: NaN with any payload, both zeros, random bits, no element, one, and an odd number of them."""
    for elements in (0, 4, 1, 37, 300):
        if elements * DTYPES[code].bits % 8:
            continue
        for base, new in sides(code, elements, elements):
            info = TensorInfo("w", code, (elements,) if elements != 1 else ())
            packed = pack([Change(info, held(base), HeldBytes(bytearray(new)))])["w"]
            if packed is None:
                assert base == new
                continue
            payload = PatchedPayload(held(base), HeldBytes(bytearray(packed)), info, HERE)
            assert b"".join(map(bytes, payload.chunks())) == new
            assert len(packed) <= len(new) + 1 + 8 * (elements > 0)


@pytest.mark.parametrize("code", ["F32", "F6_E2M3"])
def test_a_range_is_made_alone_and_inputs_may_be_readable_only_in_order(code: str) -> None:
    """A tensor of several blocks has the same bytes in pieces, in ranges and at once, whatever its inputs are."""
    nbytes = BLOCK + 488
    base, new = tuned(nbytes, code)
    packed = one(base, new, code)
    info = TensorInfo("w", code, (nbytes * 8 // DTYPES[code].bits,))
    for payload in (
        PatchedPayload(held(base), HeldBytes(bytearray(packed)), info, HERE),
        PatchedPayload(InOrder(base), InOrder(packed), info, HERE),
    ):
        assert b"".join(map(bytes, payload.chunks())) == new
        for start, count in ((0, 1), (BLOCK - 8, 16), (BLOCK, 480), (5, 0)):
            assert b"".join(map(bytes, part_of(payload, start, count).chunks())) == new[start : start + count]
    assert pack([Change(info, InOrder(base), InOrder(new))])["w"] == packed


def tuned(nbytes: int, code: str = "BF16") -> tuple[bytes, bytes]:
    """Return weights, and what a short training makes of them; most of the last block stays."""
    rng = np.random.default_rng(3)
    width = 4 if code in ("F32", "C64", "I32") else 2
    weights = rng.standard_normal(nbytes // width).astype(np.float32) * 0.02
    steps = rng.standard_normal(nbytes // width).astype(np.float32) * 1e-4
    steps[-nbytes // width // 3 :] *= rng.random(len(steps[-nbytes // width // 3 :])) < 0.1
    if width == 2:
        return tuple(_brains(side) for side in (weights, weights + steps))  # type: ignore[return-value]
    if code == "I32":
        return tuple((side * 1e4).astype(np.int32).tobytes() for side in (weights, weights + steps))  # type: ignore[return-value]
    return weights.tobytes(), (weights + steps).tobytes()


def _brains(numbers: np.ndarray[tuple[int], np.dtype[np.float32]]) -> bytes:
    import ml_dtypes

    return numbers.astype(ml_dtypes.bfloat16).tobytes()


def test_the_bytes_do_not_depend_on_the_threads() -> None:
    """One thread, two and eight give the same packed bytes, of long tensors and short ones, and read them alike."""
    base, new = tuned(BLOCK + 8)
    changes = [Change(TensorInfo("long", "BF16", (len(new) // 2,)), held(base), HeldBytes(bytearray(new)))]
    for number in range(40):
        info = TensorInfo(f"n{number}", "BF16", (number,))
        changes.append(Change(info, held(base[: 2 * number]), HeldBytes(bytearray(new[: 2 * number]))))
    found = {}
    for threads in (1, 2, 8):
        with Workers(threads) as workers:
            found[threads] = pack(changes, workers=workers)
            payload = PatchedPayload(held(base), held(found[1]["long"]), changes[0].info, workers)  # type: ignore[arg-type]
            buffer = bytearray(len(new))
            read_into(payload, memoryview(buffer))
            assert buffer == new
    assert found[1] == found[2] == found[8]
    assert found[1]["n0"] is None
    assert list(found[1]) == [change.info.key for change in changes]


def test_equal_tensors_cost_nothing() -> None:
    """A tensor with the same bytes is not packed, and equal blocks of a changed tensor take eight bytes each."""
    base = np.random.default_rng(0).bytes(3 * BLOCK)
    assert pack([Change(TensorInfo("w", "F32", (3 * BLOCK // 4,)), held(base), HeldBytes(bytearray(base)))]) == {
        "w": None
    }
    new = bytearray(base)
    new[BLOCK + 5] ^= 128
    assert len(one(base, bytes(new), "F32")) < 3 * 8 + BLOCK // 1000


@pytest.mark.parametrize("code", ["BF16", "F32"])
def test_a_tuned_tensor_is_smaller_than_its_xor_in_planes(code: str) -> None:
    """The steps between numbers, by their exponents, take less than the best that zlib makes of planes of XOR."""
    base, new = tuned(BLOCK // 2, code)
    width = DTYPES[code].bits // 8
    xor = np.bitwise_xor(np.frombuffer(base, np.uint8), np.frombuffer(new, np.uint8)).reshape(-1, width)
    planes = [plane.tobytes() for plane in xor.T]
    hows = (zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY)
    rival = sum(min(len(plane), *(len(_deflated(plane, how)) for how in hows)) for plane in planes)
    assert len(one(base, new, code)) < (0.85 if code == "BF16" else 0.95) * rival


def _deflated(data: bytes, strategy: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return packer.compress(data) + packer.flush()


@needs_module("zstandard")
@pytest.mark.parametrize("code", ["BF16", "F32", "I64"])
def test_zstd_gives_the_same_tensor(code: str) -> None:
    """A patch with zstd has other bytes, and the same tensor."""
    base, new = tuned(BLOCK // 4, code)
    packed = one(base, new, code, "zstd")
    assert packed != one(base, new, code)
    assert made(base, packed, code, len(new)) == new


def test_an_unknown_compression_is_refused() -> None:
    """The error names the compressions, or the extra that is missing."""
    require_compression("zlib")
    with pytest.raises(ArgumentError, match="compression"):
        require_compression("lzma")


def refusal(base: bytes | None, packed: bytes, code: str, nbytes: int) -> FormatError:
    with pytest.raises(FormatError) as caught:
        made(base, packed, code, nbytes)
    assert caught.value.reason.startswith("'w' cannot be made: ")
    assert "\n" not in str(caught.value)
    return caught.value


def test_damaged_bytes_are_refused() -> None:
    """Each byte that is changed, and each cut, gives a FormatError that names the tensor, and never other values."""
    base, new = tuned(600)
    packed = one(base, new, "BF16")
    for at in range(len(packed)):
        damaged = bytearray(packed)
        damaged[at] ^= 1 << at % 8
        refusal(base, bytes(damaged), "BF16", 600)
    for at in range(0, len(packed), 7):
        refusal(base, packed[:at], "BF16", 600)
    assert "bytes are stored in place of" in refusal(base, packed + b"x", "BF16", 600).reason


def test_another_base_is_refused() -> None:
    """The checksum of each block shows it, and a caller can say more of it."""
    base, new = tuned(600)
    packed, other = one(base, new, "BF16"), bytes(600)
    assert "its base is another one" in refusal(other, packed, "BF16", 600).reason
    info = TensorInfo("w", "BF16", (300,))
    payload = PatchedPayload(
        held(other), HeldBytes(bytearray(packed)), info, HERE, lambda: CkptkitError("a better reason")
    )
    with pytest.raises(CkptkitError, match="a better reason"):
        payload.find_losses()


def block(body: bytes) -> bytes:
    """Return the packed bytes of a tensor of one block, with any checksum."""
    return bytes(4) + len(body).to_bytes(4, "little") + body


def plane(method: int, data: bytes) -> bytes:
    return bytes((method,)) + len(data).to_bytes(4, "little") + data


HALF = BLOCK // 2  # the bytes of a plane of BF16
BOMBS = {
    "deflate": plane(2, _deflated(bytes(100_000_000), zlib.Z_DEFAULT_STRATEGY)),
    "deflate of nothing": plane(2, b"\x03\x00"),
    "deflate without an end": plane(2, _deflated(bytes(HALF), zlib.Z_RLE)[:-1]),
    "deflate and more": plane(2, _deflated(bytes(HALF), zlib.Z_RLE) + b"x"),
    "not deflate": plane(2, b"\xff\xff\xff"),
    "an unknown method": plane(9, bytes(HALF)),
    "a short plane": plane(0, bytes(HALF - 1)),
    "a long plane": plane(0, bytes(HALF + 1)),
    "a constant of two bytes": plane(1, b"ab"),
    "a constant of no byte": plane(1, b""),
    "a size beyond the end": b"\0\xff\xff\xff\xff",
    "no size": b"\0\1",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_no_memory(name: str) -> None:
    """A plane gives exactly the bytes that it must have, or is refused before more are made."""
    packed = block(bytes((2,)) + BOMBS[name] + plane(1, b"\0"))
    tracemalloc.start()
    try:
        refusal(bytes(BLOCK), packed, "BF16", BLOCK)
        assert tracemalloc.get_traced_memory()[1] < 9 * BLOCK
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", [3, 4, 5, 16, 255, 6])
def test_an_unknown_form_is_refused(form: int) -> None:
    """A later version may pack blocks in other ways; ``6`` needs a dtype with exponents."""
    assert "form" in refusal(bytes(64), block(bytes((form,)) + plane(1, b"\0")), "U8", 64).reason


def test_a_sparse_block_has_as_many_numbers_as_its_flags() -> None:
    """Flags behind the last number, and planes of another size, are refused."""
    flags = plane(0, b"\x00" * 8 + b"\x01")  # 65 numbers of 8 flags a byte
    assert "more numbers" in refusal(bytes(65), block(bytes((9,)) + flags + plane(1, b"\1")), "U8", 65).reason
    two = plane(0, b"\xc0" + bytes(8))
    assert "another number" in refusal(bytes(65), block(bytes((9,)) + two + plane(0, b"\1")), "U8", 65).reason


def test_a_writer_takes_the_blocks_as_they_are_made() -> None:
    """The steps of a write are the bytes of the tensor, and its CRC-32 is theirs."""
    base, new = tuned(2 * BLOCK)
    packed, found = HeldBytes(bytearray(one(base, new, "BF16"))), []

    def steps(payload: PatchedPayload) -> Iterator[int]:
        found.append((yield from payload.write_to(NullSink(), 0, checksum=True)))

    with Workers(2) as workers:
        assert sum(steps(PatchedPayload(held(base), packed, TensorInfo("w", "BF16", (BLOCK,)), workers))) == len(new)
    assert found == [zlib.crc32(new)]
