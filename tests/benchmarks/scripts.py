"""What a person writes by hand for the same work, one function each: ``python scripts.py FUNCTION FILES...``.

Functions import what they need, so that none pays for the imports of another. Those that write flush to the disk, as
ckptkit does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any


def parse(*names: str) -> None:
    """Parse the headers of safetensors files, and do nothing with them."""
    for name in names:
        _header(name)


def parse_and_print(name: str) -> None:
    """Parse a header, and print a line for each tensor."""
    for key, value in _header(name).items():
        print(key, value["dtype"], value["shape"])


def shapes(name: str) -> None:
    """Print names and shapes, with the library of safetensors and torch."""
    from safetensors import safe_open

    with safe_open(name, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            print(key, file.get_slice(key).get_shape())


def torch_list(name: str) -> None:
    """Print names and shapes of a torch file."""
    for key, value in _load(name, mmap=True).items():
        print(key, value.dtype, tuple(value.shape))


def ptloader_list(name: str) -> None:
    """Print names and shapes of a torch file with ptloader."""
    from importlib import import_module

    for key, value in import_module("ptloader").load(name).items():
        print(key, value.dtype, value.shape)


def torch_rename(name: str, output: str) -> None:
    """Load a torch file of weights, or of a run, remove a prefix, and save it."""
    import torch

    content = _load(name)
    weights = content.get("model", content)
    renamed = {key.replace("layers.", "h."): value for key, value in weights.items()}
    torch.save({**content, "model": renamed} if "model" in content else renamed, output)
    _flush(output)


def torch_convert(name: str, output: str) -> None:
    """Load a torch file, and write safetensors."""
    from safetensors.torch import save_file

    save_file(_load(name), output)
    _flush(output)


def torch_overlay(base: str, donor: str, output: str) -> None:
    """Write the values of the donor where the base has the key, and of the base elsewhere."""
    from safetensors.torch import load_file, save_file

    weights = load_file(base)
    weights.update({key: value for key, value in load_file(donor).items() if key in weights})
    save_file(weights, output)
    _flush(output)


def torch_cast(name: str, output: str) -> None:
    """Load safetensors, cast to bfloat16, and save."""
    import torch
    from safetensors.torch import load_file, save_file

    save_file({key: value.to(torch.bfloat16) for key, value in load_file(name).items()}, output)
    _flush(output)


def torch_dequantize(name: str, output: str) -> None:
    """Multiply fp8 by the scales of its blocks, as transformers does, and save bfloat16."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors, made = load_file(name), {}
    for key in [key for key in tensors if key.endswith(".weight")]:
        scales = tensors[f"{key}_scale_inv"][:, None, :, None]
        blocks = (
            tensors[key].float().reshape(scales.shape[0], -1, scales.shape[2], tensors[key].shape[1] // scales.shape[2])
        )
        made[key] = (blocks * scales).reshape(tensors[key].shape).to(torch.bfloat16)
    save_file(made, output)
    _flush(output)


def reminis_delta(base: str, name: str, output: str) -> None:
    """Convert two files to databases of reminis, and write the delta pack of both."""
    import subprocess
    import tempfile

    program = os.path.join(os.path.dirname(sys.executable), "reminis")
    with tempfile.TemporaryDirectory(dir=".") as directory:
        databases = [os.path.join(directory, f"{number}.db") for number in range(2)]
        for source, database in zip((base, name), databases, strict=True):
            subprocess.run([program, "convert", source, "-o", database, "-q"], check=True)
        subprocess.run([program, "diff", *databases, "-o", output, "-q"], check=True)
    _flush(output)


def xor_planes(base: str, name: str, output: str) -> None:
    """Write the XOR of the bytes of two files, in planes of bytes and compressed by zlib; equal pieces are left out."""
    import zlib

    import numpy as np

    dtypes = [value["dtype"] for key, value in _header(base).items() if key != "__metadata__"]
    width = 4 if "F32" in dtypes else 2
    size = 1 << 20
    with open(base, "rb") as first, open(name, "rb") as second, open(output, "wb") as out:
        for file in (first, second):
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        while old := first.read(size):
            new = second.read(size)
            if old == new:
                continue
            planes = (np.frombuffer(old, np.uint8) ^ np.frombuffer(new, np.uint8)).reshape(-1, width).T
            for plane in planes:
                packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
                data = plane.tobytes()
                packed = packer.compress(data) + packer.flush()
                out.write(min(packed, data, key=len))
    _flush(output)


def bitsandbytes_dequantize(name: str, output: str) -> None:
    """Dequantise every weight of 4 bits on the processor with bitsandbytes, and save what it gives."""
    from importlib import import_module

    import torch
    from safetensors.torch import load_file, save_file

    functional = import_module("bitsandbytes.functional")
    tensors, made = load_file(name), {}
    for key in [key for key in tensors if key.endswith(".weight")]:
        parts = {part.removeprefix(f"{key}."): value for part, value in tensors.items() if part.startswith(f"{key}.")}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        made[key] = functional.dequantize_4bit(tensors[key], state)
    save_file(made, output)
    _flush(output)


def torch_gptq(folder: str, output: str) -> None:
    """Unpack 4-bit codes of GPTQ with shifts, as AutoGPTQ does without a GPU, and save bfloat16."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors, made = load_file(f"{folder}/model.safetensors"), {}
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    for stem in [key.removesuffix("qweight") for key in tensors if key.endswith("qweight")]:
        words, points, groups = (tensors[stem + part] for part in ("qweight", "qzeros", "g_idx"))
        codes = (words[:, None] >> shifts[:, None] & 15).reshape(-1, words.shape[1])
        zeros = (points[:, :, None] >> shifts & 15).reshape(len(points), -1) + 1
        numbers = tensors[f"{stem}scales"].float()[groups] * (codes - zeros[groups])
        made[f"{stem}weight"] = numbers.T.contiguous().bfloat16()
    save_file(made, output)
    _flush(output)


def gguf_dequantize(name: str, output: str) -> None:
    """Read a GGUF file, dequantise every tensor, and save safetensors."""
    import gguf
    from safetensors.numpy import save_file

    tensors = gguf.GGUFReader(name).tensors
    save_file({one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in tensors}, output)
    _flush(output)


def hash_tensors(name: str) -> None:
    """Hash each tensor of a safetensors file with hashlib, in one thread."""
    import hashlib

    from safetensors import safe_open

    with safe_open(name, "np") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            print(hashlib.sha256(file.get_tensor(key)).hexdigest(), key)


def torch_stats(name: str) -> None:
    """Print mean, deviation, extremes and norm of each tensor, in float64."""
    for key, value in _tensors(name):
        double = value.double()
        print(key, double.mean(), double.std(), double.min(), double.max(), double.norm())


def torch_finite(name: str) -> None:
    """Print the tensors with NaN or Inf."""
    for key, value in _tensors(name):
        if not _with_arithmetic(value).isfinite().all():
            print(key)


def torch_extremes(name: str) -> None:
    """Print the extremes of each tensor, and whether it has NaN or Inf."""
    for key, value in _tensors(name):
        numbers = _with_arithmetic(value)
        print(key, numbers.isfinite().all(), numbers.min(), numbers.max())


def _with_arithmetic(value: Any) -> Any:
    """Return numbers of which torch finds the smallest: it does not for floats of one byte."""
    return value.float() if value.dtype.is_floating_point and value.dtype.itemsize == 1 else value


def checksum(name: str) -> None:
    """Compute the CRC-32 of a file."""
    import zlib

    total = 0
    with open(name, "rb", buffering=0) as file:
        while piece := file.read(4 << 20):
            total = zlib.crc32(piece, total)
    print(total)


def checksum_and_finite(name: str) -> None:
    """Compute the CRC-32 of a file of float32, and look for NaN and Inf in torch."""
    import zlib

    import torch

    total = 0
    with open(name, "rb", buffering=0) as file:
        while piece := file.read(4 << 20):
            total = zlib.crc32(piece, total)
            torch.frombuffer(bytearray(piece[: len(piece) // 4 * 4]), dtype=torch.float32).isfinite().all()
    print(total)


def move(share: str, output: str, *names: str) -> None:
    """Read files whole, and write a share of the bytes of the first: what a cast or a merge must move at least."""
    buffer = memoryview(bytearray(4 << 20))
    with open(output, "wb", buffering=0) as target:
        for place, name in enumerate(names):
            with open(name, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    if place == 0:
                        target.write(buffer[: int(count * float(share))])
        os.fsync(target.fileno())


def tensortracker_diff(first: str, second: str) -> None:
    """Find the tensors that differ, with tensortracker."""
    from importlib import import_module

    print(len(import_module("tensortracker").resolve_diff(first, second).changes))


def memcmp(first: str, second: str) -> None:
    """Read both files in pieces of 2 MiB and compare their bytes, as the C library does it."""
    import ctypes

    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    buffers = bytearray(1 << 21), bytearray(1 << 21)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in buffers]
    with open(first, "rb", buffering=0) as one, open(second, "rb", buffering=0) as other:
        differ = 0
        while count := one.readinto(buffers[0]):
            other.readinto(buffers[1])
            differ += compare(*addresses, count) != 0
    print(differ, "pieces differ")


def torch_compare(first: str, second: str) -> None:
    """Print the largest difference and the relative norm of it, for each tensor that differs."""
    from safetensors import safe_open

    with safe_open(first, "pt") as one, safe_open(second, "pt") as two:
        for key in one.keys():  # noqa: SIM118 - not a mapping
            expected, found = one.get_tensor(key), two.get_tensor(key)
            if not expected.equal(found):
                change = found - expected
                print(key, change.abs().max(), change.norm() / expected.norm())


def _header(name: str) -> dict[str, Any]:
    import json

    with open(name, "rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header


def _load(name: str, *, mmap: bool = False) -> dict[str, Any]:
    import torch

    content: dict[str, Any] = torch.load(name, weights_only=True, mmap=mmap)
    return content


def _tensors(name: str) -> Iterable[tuple[str, Any]]:
    from safetensors import safe_open

    with safe_open(name, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            yield key, file.get_tensor(key)


def _flush(name: str) -> None:
    with open(name, "rb") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
