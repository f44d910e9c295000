"""Honest files, damaged by chance, read by us and by their own libraries: only refusals may escape, and we agree.

A long run: ``python -m tests.formats.mutate --mutants 100000 --seed 1`` from the root of the repository.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import sys
import tempfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from ckptkit.errors import CkptkitError
from ckptkit.formats import open_checkpoint
from ckptkit.sharing import shared_keys
from ckptkit.tensors import DTYPES
from tests.helpers_export import small
from tests.helpers_formats import CODE_OF, bits, f32, rezip, safetensors_file, saved
from tests.helpers_gguf import written

BASE = torch.arange(12, dtype=torch.float32)
STATE = OrderedDict(
    [("a.weight", BASE.reshape(3, 4)), ("a.bias", BASE[4:8]), ("t", BASE.reshape(3, 4).T), ("n", torch.tensor(7))]
)
ARRAYS: tuple[dict[str, np.ndarray[Any, Any]], ...] = (
    {"w": np.arange(6, dtype="<f4").reshape(2, 3), "b": np.arange(4, dtype="|i1")},
    {"w": np.asfortranarray(np.arange(6, dtype=">f8").reshape(3, 2)), "n": np.array(7, dtype=">i2")},
    {"w": np.arange(3, dtype="<c16"), "odd": np.array([{}, None], dtype=object), "e": np.zeros((0, 2), dtype="|b1")},
)
KINDS = ("safetensors", "zip", "legacy", "index", "gguf", "pt2", "npy", "npz")
_NUMBERS = (0, 1, 2, 4, 8, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_TOKENS = (
    *(b"-0", b"0", b"1", b"-1", b"1.0", b"1e2", b"1e999", b"18446744073709551616", b"true", b"null", b"[]", b"{}"),
    *(b'"F32"', b'"F4"', b'"U8"', b'"\\ud800"', b",", b":", b"[", b"]", b"{", b"}", b'"', b" ", b"\\"),
)
_LARGEST_READ = 1 << 20


def corpus(kind: str) -> list[bytes]:
    """Small files of one kind, as their own libraries write them."""
    if kind == "safetensors":
        header = {"__metadata__": {"format": "pt"}, "w": f32(0, 24, [2, 3]), "b": f32(24, 26, [2], "U8")}
        plain = safetensors_file(header, bytes(range(26)))
        return [
            plain,
            safetensors_file({"x": f32(0, 0, [0, 3]), "y": f32(0, 2, [4], "F4"), "z": f32(2, 4, [], "BF16")}, b"abcd"),
        ]
    if kind == "index":
        weight_map = {"w": "one.safetensors", "v": "two.safetensors"}
        return [json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}).encode()]
    if kind in ("npy", "npz"):
        return [_by_numpy(arrays, kind) for arrays in ARRAYS]
    if kind == "pt2":
        return [small()]
    if kind == "gguf":
        return [written(_plain_gguf), written(_quantised_gguf)]
    nested = {
        "model": STATE,
        "epoch": 3,
        "lr": 0.5,
        "optimizer": {"state": {0: {"m": BASE}}, "param_groups": [{"params": [0]}]},
    }
    legacy = kind == "legacy"
    made = [saved(tree, legacy=legacy) for tree in (STATE, nested)]
    if legacy:
        made = [_with_stable_keys(data) for data in made]
    else:
        # Without checksums damage reaches the pickle machine, which is what is to be tested.
        torch.serialization.set_crc32_options(False)
        made += [
            saved(tree)
            for tree in (STATE, nested, {"w": BASE.to(torch.float8_e5m2), "c": BASE.to(torch.complex64).conj()})
        ]
        torch.serialization.set_crc32_options(True)
        made.append(rezip(made[0], method=8))
    return made


def _by_numpy(arrays: dict[str, np.ndarray[Any, Any]], kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, arrays["w"], allow_pickle=True)
    elif "odd" in arrays:
        np.savez_compressed(buffer, allow_pickle=True, **arrays)
    else:
        np.savez(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


def _plain_gguf(writer: gguf.GGUFWriter) -> None:
    writer.add_custom_alignment(8)
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("b", np.arange(4, dtype=np.int8))
    writer.add_tensor("h", np.arange(2, dtype=np.float16))


def _quantised_gguf(writer: gguf.GGUFWriter) -> None:
    writer.add_token_list([f"t{index}" for index in range(20)])
    writer.add_array("few", [1, 2, 3])
    writer.add_tensor("q", np.zeros((2, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("n", np.arange(3, dtype=np.int64))


def _with_stable_keys(data: bytes) -> bytes:
    # torch names a legacy storage by its address, which differs from run to run; the order of names is kept.
    for number, key in enumerate(sorted(set(re.findall(rb"\d{12,}", data)))):
        data = data.replace(key, b"%0*d" % (len(key), number))
    return data


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to four kinds of damage: bits, bytes, numbers and tokens, cuts, repeats, and pieces of other files."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        at = rng.randrange(len(made) + 1)
        span = rng.choice((1, 2, 4, 8, 16, 64))
        how = rng.randrange(10)
        if how <= 1 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif how == 2 and at < len(made):
            made[at] = rng.randrange(256)
        elif how == 3:
            width = rng.choice((1, 2, 4, 8))
            made[at : at + width] = (rng.choice(_NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
        elif how == 4:
            made[at:at] = rng.choice(_TOKENS)
        elif how == 5:
            numbers = [match.span() for match in re.finditer(rb"-?\d+|\"[^\"]*\"", made)]
            first, last = rng.choice(numbers) if numbers else (at, at)
            made[first:last] = rng.choice(_TOKENS) if rng.random() < 0.3 else b"%d" % rng.randrange(9)
        elif how == 6:
            del made[at : at + span]
        elif how == 7:
            made[at:at] = made[at : at + span]
        elif how == 8:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            made[at : at + span] = other[start : start + span]
        elif rng.random() < 0.3:
            del made[at:]
        else:
            _swap(made, rng)
    return bytes(made)


def _swap(made: bytearray, rng: random.Random) -> None:
    if len(made) > 2:
        one, two = rng.randrange(len(made)), rng.randrange(len(made))
        made[one], made[two] = made[two], made[one]


def _other_layout(data: bytes, rng: random.Random) -> bytes:
    """The file with a header that is still JSON, and says something else in one or two places."""
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    for _ in range(rng.choice((1, 2))):
        key = rng.choice([key for key in header if key != "__metadata__"])
        entry = header[key]
        how = rng.randrange(8)
        if how == 0:
            entry["dtype"] = rng.choice(sorted(DTYPES))
        elif how == 1:
            rng.shuffle(entry["shape"])
        elif how == 2:
            entry["shape"].insert(0, rng.choice((1, 1, 2, 0)))
        elif how == 3 and entry["shape"]:
            entry["shape"].pop()
        elif how == 4:
            entry["data_offsets"][rng.randrange(2)] += rng.choice((-4, -1, 1, 4))
        elif how == 5:
            entry[rng.choice(("x", "dtype ", "strides"))] = rng.choice((1, None, [1], {"a": "b"}, 1e10))
        elif how == 6:
            header[rng.choice(("", "\0", "\x1b[2J", "w", "\u202e"))] = header.pop(key)
        else:
            header["__metadata__"] = rng.choice(({}, {"a": "b"}, {"a": 1}, None, []))
    cut = rng.choice((0, 0, 0, 0, 1, 4))
    return safetensors_file(header, data[size : len(data) - cut])


def _other_entry(data: bytes, files: list[bytes], rng: random.Random) -> bytes:
    """The archive with one entry damaged, and checksums that say that it is whole."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = rng.choice([name for name in archive.namelist() if archive.getinfo(name).file_size])
        return rezip(data, {name: mutate(archive.read(name), files, rng)})


Seen = dict[str, tuple[str, tuple[int, ...], bytes]]


def ours(path: str) -> Seen | None:
    """Names, dtypes, shapes and bytes as we read them; None for a refusal. Anything else is a bug, and escapes."""
    try:
        with open_checkpoint(path) as checkpoint:
            shared_keys(checkpoint)
            repr((checkpoint.entries, checkpoint.warnings, checkpoint.versions))
            return {
                key: (info.dtype, info.shape, checkpoint.read_bytes(key))
                for key, info in checkpoint.items()
                if info.kind == "dense" and info.nbytes <= _LARGEST_READ
            }
    except CkptkitError as error:
        if not error.path or "\n" in f"{error.reason} {error.hint}":
            raise AssertionError(f"an error without a path, or of several lines: {error}") from error
        return None


def by_safetensors(path: str) -> Seen | None:
    """The same by the safetensors library; None where it refuses the file."""
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
    """The same by torch.load(weights_only=True), where it gives a flat mapping; None else.

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
    """The tensors of plain numbers by gguf-py; None where it refuses the file."""
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
    """The arrays of numbers by numpy.load, without pickles; None where it refuses the file, no key where an array."""
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


def mutants(kind: str, count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(f"{kind} {seed}")  # noqa: S311 - a seeded sequence is what is wanted
    files = corpus(kind)
    for index in range(count):
        data = files[index % len(files)]
        if kind == "safetensors" and rng.random() < 0.5:
            yield _other_layout(data, rng)
        elif kind == "safetensors" and rng.random() < 0.8:
            # Most damage to the header changes its length: told so, the reader looks further.
            size = 8 + int.from_bytes(data[:8], "little")
            yield safetensors_file(mutate(data[8:size], files, rng), data[size:])
        elif kind in ("pt2", "npz") and rng.random() < 0.7:
            yield _other_entry(data, files, rng)
        else:
            yield mutate(data, files, rng)


def run(kind: str, count: int, seed: int, directory: Path) -> Counter[str]:
    """Read ``count`` mutants; return how they ended. Raises ``AssertionError`` where the two readings differ."""
    names = {
        "safetensors": "x.safetensors",
        "index": "x.safetensors.index.json",
        "gguf": "x.gguf",
        "pt2": "x.pt2",
        "npy": "x.npy",
        "npz": "x.npz",
    }
    path = directory / names.get(kind, "x.pt")
    for name, key in (("one", "w"), ("two", "v")):
        (directory / f"{name}.safetensors").write_bytes(safetensors_file({key: f32()}, b"1234"))
    oracles: dict[str, Callable[[str], Seen | None]] = {
        "safetensors": by_safetensors,
        "zip": by_torch,
        "legacy": by_torch,
        "gguf": by_gguf,
        "npy": by_numpy,
        "npz": by_numpy,
    }
    ends: Counter[str] = Counter()
    for number, data in enumerate(mutants(kind, count, seed)):
        path.write_bytes(data)
        try:
            seen = ours(str(path))
            ends["accepted" if seen is not None else "refused"] += 1
            if seen is not None and kind in oracles:
                ends[_compared(kind, seen, oracles[kind](str(path)))] += 1
        except BaseException as error:
            error.add_note(f"mutant {number} of {kind}, seed {seed}: {data!r}")
            raise
    return ends


def _compared(kind: str, seen: Seen, expected: Seen | None) -> str:
    if expected is None:
        if kind in ("safetensors", "npy"):
            raise AssertionError("we accept what the library refuses")
        return "no oracle"
    if kind == "safetensors":
        expected = {key: (code, shape, data or seen[key][2]) for key, (code, shape, data) in expected.items()}
    if kind == "npz":
        # Listing inflates no array: damage that numpy sees in one, where it reads that, is no difference.
        seen = {key: entry for key, entry in seen.items() if key in expected}
    differing = {key for key in seen.keys() | expected.keys() if seen.get(key) != expected.get(key)}
    if differing:
        raise AssertionError(f"{differing} differ: {seen} and {expected}")
    return "agreed"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="read damaged checkpoints, and compare with torch and safetensors")
    parser.add_argument("--mutants", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    options = parser.parse_args(arguments)
    for kind in options.kind or KINDS:
        with tempfile.TemporaryDirectory() as directory:
            ends = run(kind, options.mutants, options.seed, Path(directory))
        sys.stdout.write(f"{kind}: {dict(ends)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
