"""Compress the bytes of one plane, and decompress them into a size that is known."""

from __future__ import annotations

import zlib
from typing import Final, Literal, TypeAlias

from ckptkit.core.arguments import require_choice
from ckptkit.errors import ArgumentError, FormatError

__all__ = ["COMPRESSIONS", "Compression", "compress", "decompress", "require_compression"]

Compression: TypeAlias = Literal["zlib", "zstd"]
COMPRESSIONS: Final = ("zlib", "zstd")
_RAW, _DEFLATE, _ZSTD = 0, 1, 2


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


def compress(plane: bytes, compression: Compression) -> tuple[int, bytes]:
    """Return how the bytes are stored, and what is stored: the bytes themselves where nothing is smaller."""
    if compression == "zstd":
        import zstandard

        method, packed = _ZSTD, zstandard.ZstdCompressor(level=1).compress(plane)
    else:
        packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
        method, packed = _DEFLATE, packer.compress(plane) + packer.flush()
    return (method, packed) if len(packed) < len(plane) else (_RAW, bytes(plane))


def decompress(method: int, packed: memoryview, nbytes: int) -> bytes | memoryview:
    """Return the ``nbytes`` bytes of a plane. Raises ``FormatError`` where ``packed`` has other bytes."""
    if method == _RAW:
        plane: bytes | memoryview = packed
    elif method == _DEFLATE:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            plane = unpacker.decompress(packed, nbytes + 1)
        except zlib.error as error:
            raise FormatError(f"compressed bytes are damaged: {error}") from None
        if not unpacker.eof or unpacker.unused_data:
            raise FormatError("compressed bytes do not end where they must")
    elif method == _ZSTD:
        plane = _unpack_zstd(packed, nbytes)
    else:
        raise FormatError(f"bytes are stored by the unknown method {method}")
    if len(plane) != nbytes:
        raise FormatError(f"{len(plane):,} bytes are stored in place of {nbytes:,}")
    return plane


def _unpack_zstd(packed: memoryview, nbytes: int) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise FormatError(
            "it is compressed with zstd, and zstandard is not installed", hint="install the extra [fast]"
        ) from None
    try:
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"compressed bytes are damaged: {error}") from None
