"""Compress the bytes of one plane, and decompress them into a size that is known."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from ckptkit.core.arguments import require_choice
from ckptkit.errors import ArgumentError, FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes: TypeAlias = npt.NDArray[np.uint8]

__all__ = ["COMPRESSIONS", "Compression", "compress", "decompress", "require_compression", "require_decompression"]

Compression: TypeAlias = Literal["zlib", "zstd"]
COMPRESSIONS: Final = ("zlib", "zstd")
_STORED, _CONSTANT, _DEFLATE, _ZSTD = range(4)
_RUNS: Final = 8  # of neighbouring bytes in a sample
_RUN: Final = 1 << 11  # bytes of each
_MOST_BITS: Final = 7.95  # for a byte, by the frequencies of its values; above it, compression gains nothing
_LEAST_EQUAL: Final = 0.25  # share of bytes that equal the byte before them, from which runs are worth a search
_MEMORY_LEVEL: Final = 9  # the highest: most bytes share a table of codes
_LEAST_GAIN: Final = 0.97  # a search for repeated bytes takes much time


def require_compression(compression: str) -> None:
    """Raise ``ArgumentError`` for an unknown compression, and for zstd where zstandard is not installed."""
    require_choice(compression, COMPRESSIONS, "compression")
    if compression == "zstd":
        try:
            import zstandard  # noqa: F401
        except ImportError:
            raise ArgumentError(
                "zstd needs zstandard, which is not installed", hint="install the extra [fast], or use zlib"
            ) from None


def require_decompression(compression: str) -> None:
    """Raise ``FormatError`` for zstd where zstandard is not installed."""
    if compression == "zstd":
        try:
            import zstandard  # noqa: F401
        except ImportError:
            raise FormatError(
                "it is compressed with zstd, and zstandard is not installed", hint="install the extra [fast]"
            ) from None


def compress(plane: Bytes, compression: Compression, *, can_repeat: bool) -> tuple[int, bytes]:
    """Return how the bytes are stored, and what is stored: the bytes themselves where nothing is smaller.

    ``can_repeat`` says that longer sequences of bytes may come again, for which zlib does not search otherwise.
    """
    if not len(plane) or bool((plane == plane[0]).all()):
        return _CONSTANT, plane[:1].tobytes()
    if compression == "zstd":
        import zstandard

        method, packed = _ZSTD, zstandard.ZstdCompressor(level=1).compress(plane.data)
    else:
        method, packed = _DEFLATE, _deflate_as_sampled(plane, can_repeat=can_repeat)
    return (method, packed) if packed and len(packed) < len(plane) else (_STORED, plane.tobytes())


def decompress(method: int, packed: memoryview, nbytes: int) -> Bytes:
    """Return the ``nbytes`` bytes of a plane, which must not be written to.

    Raises ``FormatError`` where ``packed`` has other bytes. No more than ``nbytes`` bytes are made of them.
    """
    import numpy as np

    plane: bytes | memoryview
    if method == _STORED:
        plane = packed
    elif method == _CONSTANT:
        if len(packed) != min(nbytes, 1):
            raise FormatError("a plane of one value has another size")
        return np.broadcast_to(np.frombuffer(packed, np.uint8), nbytes)
    elif method == _DEFLATE:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            plane = unpacker.decompress(packed, nbytes + 1)
        except zlib.error as error:
            raise FormatError(f"compressed bytes are damaged: {error}") from None
        if len(plane) == nbytes and (not unpacker.eof or unpacker.unused_data):
            raise FormatError("compressed bytes do not end where they must")
    elif method == _ZSTD:
        plane = _unpack_zstd(packed, nbytes)
    else:
        raise FormatError(f"bytes are stored by the unknown method {method}")
    if len(plane) != nbytes:
        raise FormatError(f"another number of bytes is stored than the {nbytes:,} of a plane")
    return np.frombuffer(plane, np.uint8)


def _deflate_as_sampled(plane: Bytes, *, can_repeat: bool) -> bytes:
    """Return the bytes compressed in the way that a sample of them promises, or no bytes if that does not help."""
    import numpy as np

    sample = _sample(plane)
    counts = np.bincount(sample, minlength=256)
    shares = counts[counts > 0] / len(sample)
    if can_repeat:
        found = _deflate(sample, zlib.Z_DEFAULT_STRATEGY)
        if len(found) < _LEAST_GAIN * min(len(_deflate(sample, zlib.Z_RLE)), len(sample)):
            return _deflate(plane, zlib.Z_DEFAULT_STRATEGY)
    if -float((shares * np.log2(shares)).sum()) > _MOST_BITS:
        return b""
    has_runs = np.count_nonzero(sample[1:] == sample[:-1]) > _LEAST_EQUAL * len(sample)
    return _deflate(plane, zlib.Z_RLE if has_runs else zlib.Z_HUFFMAN_ONLY)


def _sample(plane: Bytes) -> Bytes:
    import numpy as np

    if len(plane) <= 2 * _RUNS * _RUN:
        return plane
    gap = len(plane) // _RUNS
    return np.concatenate([plane[start : start + _RUN] for start in range(gap // 2, len(plane), gap)])


def _deflate(data: Bytes, strategy: int) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, _MEMORY_LEVEL, strategy)
    return packer.compress(data.data) + packer.flush()


def _unpack_zstd(packed: memoryview, nbytes: int) -> bytes:
    require_decompression("zstd")
    import zstandard

    options: dict[str, Any] = {"max_output_size": nbytes, "allow_extra_data": False}
    unpacker = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(packed) != nbytes:  # so much memory would be taken
            raise FormatError(f"another number of bytes is stored than the {nbytes:,} of a plane")
        try:
            return unpacker.decompress(packed, **options)
        except TypeError:  # an old zstandard, which ignores extra data
            return unpacker.decompress(packed, max_output_size=nbytes)
    except zstandard.ZstdError as error:
        raise FormatError(f"compressed bytes are damaged: {error}") from None
