"""Files for the tests of readers: good files by torch and safetensors, and handmade hostile files."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.dtypes import DTYPES
from ckptkit.errors import CkptkitError
from ckptkit.formats import open_checkpoint
from tests.features import has_dtype

CODE_OF = {getattr(torch, dtype.torch_name): code for code, dtype in DTYPES.items() if has_dtype(code)}
MAGIC = 0x1950A86A20F9469CFC6C


def write(tmp_path: Path, data: bytes, name: str = "file.pt") -> str:
    path = tmp_path / name
    path.write_bytes(data)
    return str(path)


def opened(tmp_path: Path, data: bytes, name: str = "file.pt") -> Checkpoint:
    return open_checkpoint(write(tmp_path, data, name))


def read_everything(path: str) -> dict[str, bytes]:
    with open_checkpoint(path) as checkpoint:
        return {key: checkpoint.read_bytes(key) for key in checkpoint}


def refusal(path: str) -> CkptkitError:
    """Return the error of opening ``path`` and reading everything; assert that it is one line with the file name."""
    with pytest.raises(CkptkitError) as caught:
        read_everything(path)
    assert caught.value.path
    assert "\n" not in str(caught.value)
    return caught.value


def refused(tmp_path: Path, data: bytes, name: str = "file.pt") -> CkptkitError:
    return refusal(write(tmp_path, data, name))


def random_tensor(dtype: torch.dtype, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bits, so that every NaN and every unused code of a dtype can occur."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype is torch.bool else 256
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, top, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(tuple(shape))


def bits(tensor: torch.Tensor) -> bytes:
    """Return the logical values of a tensor as contiguous bytes."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    plain = (
        plain.view(torch.uint8) if plain.dtype is torch.bool else plain
    )  # a copy as booleans would turn odd bytes into 1
    plain = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(plain.view(torch.uint8).tolist())


def assert_same(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """Assert that names, order, dtypes, shapes and bytes equal ``expected``, in every way of reading."""
    assert list(checkpoint) == list(expected)
    for key, tensor in expected.items():
        info = checkpoint[key]
        assert info.dtype == CODE_OF[tensor.dtype], key
        assert info.kind == "dense", key
        doubled = (*tensor.shape[:-1], 2 * tensor.shape[-1]) if info.dtype == "F4" else tuple(tensor.shape)
        assert info.shape == doubled, key
        assert info.nbytes == checkpoint.payload(key).nbytes == tensor.numel() * tensor.element_size(), key
        assert checkpoint.read_bytes(key) == bits(tensor), key
        read = checkpoint.read(key)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape), key
        assert bits(read) == bits(tensor), key


def safetensors_file(header: Mapping[str, Any] | str | bytes, data: bytes = b"") -> bytes:
    text = json.dumps(header) if isinstance(header, Mapping) else header
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


def f32(begin: int = 0, end: int = 4, shape: Sequence[int] = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def library_accepts(path: str | Path) -> bool:
    """Return whether the safetensors library accepts these bytes as a whole file."""
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except Exception:  # noqa: BLE001 - whatever it raises, it refuses
        return False
    return True


def saved(thing: object, *, legacy: bool = False, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zip_of(entries: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def rezip(data: bytes, changes: Mapping[str, bytes | None] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """Return the archive rewritten by zipfile with other contents of these entries; None removes an entry."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    entries |= changes or {}
    return zip_of([(name, content) for name, content in entries.items() if content is not None], method)


CENTRAL = {"flags": (8, "H"), "method": (10, "H"), "crc": (16, "L"), "packed": (20, "L"), "size": (24, "L"),
           "attributes": (38, "L"), "header": (42, "L")}  # fmt: skip


def patch_central(data: bytes, name: str, **fields: int) -> bytes:
    """Return the archive with other values in one entry of its central directory."""
    raw = name.encode()
    at = data.rfind(raw) - 46
    assert data[at : at + 4] == b"PK\1\2"
    made = bytearray(data)
    for field, value in fields.items():
        offset, code = CENTRAL[field]
        struct.pack_into(f"<{code}", made, at + offset, value)
    return bytes(made)


def glob(dotted: str) -> bytes:
    module, _, name = dotted.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw)) + raw


def several(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(dotted: str, *args: bytes) -> bytes:
    return glob(dotted) + several(*args) + b"R"


def mapping(pairs: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in pairs.items()) + b"u"


def storage(
    key: str = "0", numel: int = 4, kind: str = "torch.FloatStorage", location: str = "cpu", *more: bytes
) -> bytes:
    return several(text("storage"), glob(kind), text(key), text(location), number(numel), *more) + b"Q"


def tensor(
    where: bytes | None = None, *, offset: int = 0, size: Sequence[int] = (2, 2), stride: Sequence[int] = (2, 1),
    more: bytes = b"",
) -> bytes:  # fmt: skip
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage() if where is None else where,
        number(offset),
        several(*map(number, size)),
        several(*map(number, stride)),
        b"\x89",
        call("collections.OrderedDict"),
        more,
    )


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def laughs(levels: int, open_: bytes = b"](", close: bytes = b"e") -> bytes:
    """Return a list of two lists of two lists ...: a few bytes for each level, but 2^levels places."""
    made = b"]" + put(0) + b"0"
    for level in range(1, levels + 1):
        made += open_ + get(level - 1) * 2 + close + put(level) + b"0"
    return made + get(levels)


def keyed_by(*keys: bytes) -> bytes:
    return b"}(" + b"".join(key + b"N" for key in keys) + b"u"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def torch_zip(body: bytes, records: Mapping[str, bytes] | None = None) -> bytes:
    """Return a torch zip file with a handmade pickle, and by default one storage of 16 bytes."""
    stored = {"0": bytes(range(16))} if records is None else records
    entries = [("archive/data.pkl", pickled(body)), ("archive/byteorder", b"little")]
    entries += [(f"archive/data/{key}", data) for key, data in stored.items()]
    return zip_of([*entries, ("archive/version", b"3\n")])


def with_weights(**more: bytes) -> bytes:
    """Return a torch zip file of a mapping with one tensor, ``w``, and the given extra values."""
    return torch_zip(mapping({"w": tensor(), **more}))


def legacy_file(
    body: bytes, keys: object = ("0",), stored: bytes | None = None, magic: int = MAGIC, protocol: int = 1001
) -> bytes:
    """Return a legacy file with a handmade pickle, and by default one storage of four floats."""
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, 2) for part in (magic, protocol, info))
    tail = struct.pack("<q", 4) + bytes(range(16)) if stored is None else stored
    return head + pickled(body) + pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2) + tail
