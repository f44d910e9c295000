"""The blocks of GGUF become the numbers that gguf-py makes of them, bit for bit."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.dtypes import BLOCK_TYPES
from ckptkit.values.dequantize.gguf import BLOCK_DECODERS
from ckptkit.values.dequantize.model import BrokenPartError
from ckptkit.values.dequantize.schemes import make_decoder
from ckptkit.values.workers import Workers
from tests.helpers_cli import run_ckpt
from tests.helpers_dequantize import expect_magnitudes

Array = np.ndarray[Any, np.dtype[Any]]


def theirs(blocks: Array, kind: Kind) -> Array | None:
    """Return what gguf-py makes of blocks; None if it does not dequantise this type."""
    try:
        with np.errstate(all="ignore"):
            return gguf.quants.dequantize(blocks, kind)
    except NotImplementedError:
        return None


def ours(blocks: Array, kind: Kind, pieces: Sequence[tuple[int, int]] = ()) -> Array:
    elements = BLOCK_TYPES[kind.name].elements
    info = TensorInfo("w", kind.name, (len(blocks), elements), kind="quantized", stored_bytes=blocks.nbytes)
    decoder = make_decoder("gguf", {"codes": info}, {})
    out = np.full(decoder.grid, np.nan, np.float32)
    with Workers(1) as workers:
        for first, last in pieces or [(0, len(blocks))]:
            start, count = decoder.range_of("codes", first, last)
            data = memoryview(blocks.tobytes())[start : start + count]
            with np.errstate(over="ignore"):  # as the caller of decoders
                decoder.decode(first, last, {"codes": data}, None, out[first:last], workers)
    expect_magnitudes(decoder, None, out[np.isfinite(out)])
    return out


def random_blocks(kind: Kind, count: int) -> Array:
    seed = zlib.crc32(kind.name.encode())
    return np.random.default_rng(seed).integers(0, 256, (count, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)


IN_BLOCKS = [kind for kind, (elements, _) in GGML_QUANT_SIZES.items() if elements > 1]
QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]  # by gguf-py
KNOWN = [kind for kind in IN_BLOCKS if theirs(random_blocks(kind, 1), kind) is not None]


def test_every_type_that_the_library_reads_is_read() -> None:
    assert {kind.name for kind in KNOWN} <= BLOCK_DECODERS.keys() <= BLOCK_TYPES.keys()


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.name)
def test_random_blocks_become_the_same_numbers(kind: Kind) -> None:
    """Every bit is the same, in one piece and in several; a block whose scale is not finite is refused."""
    blocks = random_blocks(kind, 700)
    expected = theirs(blocks, kind)
    assert expected is not None
    is_finite = np.isfinite(expected).all(axis=1)
    blocks, expected = blocks[is_finite], expected[is_finite]
    assert len(blocks) > 500
    assert ours(blocks, kind).tobytes() == expected.tobytes()
    pieces = [(40, len(blocks)), (0, 1), (1, 40)]
    assert ours(blocks, kind, pieces).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KNOWN if kind not in {Kind.MXFP4, Kind.NVFP4}],  # whose scales of one byte are finite
    ids=lambda kind: kind.name,
)
def test_a_scale_that_is_not_finite_is_refused(kind: Kind) -> None:
    blocks = random_blocks(kind, 700)
    expected = theirs(blocks, kind)
    assert expected is not None
    bad = blocks[~np.isfinite(expected).all(axis=1)]
    assert len(bad) > 0
    for block in bad:
        with pytest.raises(BrokenPartError, match="has blocks with a scale that is NaN or infinite"):
            ours(block[None], kind)


@pytest.mark.parametrize("name", QUANTISED)
def test_what_the_library_quantises_is_read(name: str) -> None:
    kind = Kind[name]
    numbers = np.random.default_rng(0).standard_normal((8, 512), np.float32)
    blocks = gguf.quants.quantize(numbers, kind).reshape(-1, BLOCK_TYPES[name].nbytes)
    expected = theirs(blocks, kind)
    assert expected is not None
    assert ours(blocks, kind).tobytes() == expected.tobytes()


def test_one_bit_and_the_type_of_intermediate_results_follow_their_definitions() -> None:
    """gguf-py dequantises neither; ggml-quants.c gives +d or -d for a bit of Q1_0, and d times a code for Q8_K."""
    one_bit = np.frombuffer(np.float16(0.5).tobytes() + bytes([0b101, *[0] * 15]), np.uint8)[None]
    assert ours(one_bit, Kind.Q1_0)[0].tolist() == [0.5, -0.5, 0.5, *[-0.5] * 125]
    codes = np.arange(256).astype(np.int8)
    wide = np.frombuffer(np.float32(1.5).tobytes() + codes.tobytes() + bytes(32), np.uint8)[None]
    assert ours(wide, Kind.Q8_K)[0].tolist() == (codes * np.float32(1.5)).tolist()


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (TensorInfo("w", "Q4_K", (255,), kind="quantized", stored_bytes=144), "do not divide into blocks of 256"),
        (TensorInfo("w", "Q4_K", (256,), kind="quantized", stored_bytes=143), "has 143 bytes"),
    ],
)
def test_what_is_not_whole_blocks_is_refused(info: TensorInfo, reason: str) -> None:
    with pytest.raises(BrokenPartError, match=reason):
        make_decoder("gguf", {"codes": info}, {})


def stored(path: Path, kind: Kind, blocks: Array) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("fine.weight", np.ones((1, 4), np.float32))
    writer.add_tensor("w.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_broken_block_is_a_finding_and_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check finds it, whichever block it is, and every command that reads the numbers names the tensor."""
    blocks = gguf.quants.quantize(np.ones((300, 1024), np.float32), Kind.Q8_0)
    path = stored(tmp_path / "m.gguf", Kind.Q8_0, blocks)
    fine = run_ckpt(capsys, "check", path)
    assert (fine.code, "broken-part" in fine.out) == (0, False)
    blocks[-1, -34:-32] = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
    stored(path, Kind.Q8_0, blocks)
    message = "'w.weight' cannot be dequantised: it has blocks with a scale that is NaN or infinite"
    checked = run_ckpt(capsys, "check", path)
    assert f"error: {message}  [broken-part]" in checked.out
    commands: tuple[list[str | Path], ...] = (["convert", path, "-o", tmp_path / "out.safetensors"], ["stats", path])
    for command in commands:
        ran = run_ckpt(capsys, *command, "--dequantize")
        assert (ran.code, message in ran.err) == (2, True)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_type_that_no_weight_has_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored(tmp_path / "m.gguf", Kind.Q8_1, np.zeros((1, 40), np.uint8))
    ran = run_ckpt(capsys, "convert", path, "-o", tmp_path / "out.safetensors", "--dequantize")
    assert "'w.weight' is quantised (GGUF Q8_1 of intermediate results), which ckptkit cannot dequantise" in ran.err
