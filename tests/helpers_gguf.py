"""GGUF files for the tests: honest ones made by gguf-py, hostile ones put together by hand."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Sequence

import gguf

__all__ = ["F32", "STRING", "U32", "array", "gguf_file", "info", "numbers", "pair", "string", "written"]

F32, U8, U32, STRING, ARRAY = 0, 0, 4, 8, 9


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, items: Sequence[bytes], count: int | None = None) -> bytes:
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


def info(name: str | bytes, dims: Sequence[int] = (4,), kind: int = F32, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_file(
    infos: Sequence[bytes] = (), pairs: Sequence[bytes] = (), data: bytes = b"", *, version: int = 3,
    counts: tuple[int, int] | None = None, alignment: int = 32,
) -> bytes:  # fmt: skip
    """Return a file of these parts, unchanged; without ``counts``, the header counts the given parts."""
    tensors, keys = counts or (len(infos), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def written(fill: Callable[[gguf.GGUFWriter], None]) -> bytes:
    """What gguf-py writes of what ``fill`` gives it."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "x.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(path, "rb") as file:
            return file.read()
