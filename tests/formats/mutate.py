"""Damage valid files at random, and compare what ckptkit reads with what their own libraries read.

Only a ``CkptkitError`` may be raised. A long run, from the root of the repository:
``python -m tests.formats.mutate --mutants 100000 --seed 1``.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import resource
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ckptkit.core.dtypes import DTYPES
from tests.features import safetensors_knows
from tests.formats.corpora import PARTS, corpus, items, write_parts
from tests.formats.oracles import Seen, by_ckptkit, by_dcp, by_gguf, by_numpy, by_safetensors, by_torch
from tests.formats.patches import by_patch, patched
from tests.helpers_formats import f32, rezip, safetensors_file
from tests.helpers_tar import tar

KINDS = (
    "safetensors",
    "zip",
    "legacy",
    "tar",
    "index",
    "gguf",
    "pt2",
    "npy",
    "npz",
    "dcp",
    "torchscript",
    "delta",
    *PARTS,
)
_NUMBERS = (0, 1, 2, 4, 8, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_TOKENS = (
    *(b"-0", b"0", b"1", b"-1", b"1.0", b"1e2", b"1e999", b"18446744073709551616", b"true", b"null", b"[]", b"{}"),
    *(b'"F32"', b'"F4"', b'"U8"', b'"\\ud800"', b",", b":", b"[", b"]", b"{", b"}", b'"', b" ", b"\\"),
)
_MOST_MEMORY = 300_000  # kB
FILES = {
    "safetensors": "x.safetensors", "index": "x.safetensors.index.json", "gguf": "x.gguf", "pt2": "x.pt2",
    "npy": "x.npy", "npz": "x.npz", "dcp": "saved/.metadata", "delta": "patch.safetensors",
}  # fmt: skip
ORACLES: Mapping[str, Callable[[str], Seen | None]] = {
    "safetensors": by_safetensors, "zip": by_torch, "legacy": by_torch, "gguf": by_gguf, "npy": by_numpy,
    "npz": by_numpy, "dcp": by_dcp, "delta": lambda _: patched(),
}  # fmt: skip


READERS: Mapping[str, Callable[[str], Seen | None]] = {"delta": by_patch}


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return the file with one to four kinds of damage: bits, bytes, numbers, tokens, cuts, repeats, other pieces."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        at = rng.randrange(len(damaged) + 1)
        span = rng.choice((1, 2, 4, 8, 16, 64))
        how = rng.randrange(10)
        if how <= 1 and at < len(damaged):
            damaged[at] ^= 1 << rng.randrange(8)
        elif how == 2 and at < len(damaged):
            damaged[at] = rng.randrange(256)
        elif how == 3:
            width = rng.choice((1, 2, 4, 8))
            damaged[at : at + width] = (rng.choice(_NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
        elif how == 4:
            damaged[at:at] = rng.choice(_TOKENS)
        elif how == 5:
            numbers = [match.span() for match in re.finditer(rb"-?\d+|\"[^\"]*\"", damaged)]
            first, last = rng.choice(numbers) if numbers else (at, at)
            damaged[first:last] = rng.choice(_TOKENS) if rng.random() < 0.3 else b"%d" % rng.randrange(9)
        elif how == 6:
            del damaged[at : at + span]
        elif how == 7:
            damaged[at:at] = damaged[at : at + span]
        elif how == 8:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            damaged[at : at + span] = other[start : start + span]
        elif rng.random() < 0.3:
            del damaged[at:]
        else:
            _swap(damaged, rng)
    return bytes(damaged)


def _swap(damaged: bytearray, rng: random.Random) -> None:
    if len(damaged) > 2:
        first, second = rng.randrange(len(damaged)), rng.randrange(len(damaged))
        damaged[first], damaged[second] = damaged[second], damaged[first]


def _other_layout(data: bytes, rng: random.Random) -> bytes:
    """Return the file with one or two changes in the header, which is still JSON."""
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
    """Return the archive with one entry damaged and its checksum updated."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = rng.choice([name for name in archive.namelist() if archive.getinfo(name).file_size])
        return rezip(data, {name: mutate(archive.read(name), files, rng)})


def _other_member(data: bytes, files: list[bytes], rng: random.Random) -> bytes:
    """Return the tar archive with one member damaged and its header updated."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {info.name: file.read() for info in archive if (file := archive.extractfile(info))}
    name = rng.choice(list(members))
    return tar(members | {name: mutate(members[name], files, rng)})


def mutants(kind: str, count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(f"{kind} {seed}")  # noqa: S311 - the sequence must be repeatable
    files = corpus(kind)
    for index in range(count):
        data = files[index % len(files)]
        if kind in ("safetensors", "delta") and rng.random() < 0.5:
            yield _other_layout(data, rng)
        elif kind in ("safetensors", "delta") and rng.random() < 0.8:
            # Most damage changes the length of the header: with the new length, the reader reads further.
            size = 8 + int.from_bytes(data[:8], "little")
            yield safetensors_file(mutate(data[8:size], files, rng), data[size:])
        elif kind == "tar" and rng.random() < 0.8:
            yield _other_member(data, files, rng)
        elif kind in ("pt2", "npz", "torchscript", *PARTS) and rng.random() < 0.7:
            yield _other_entry(data, files, rng)
        else:
            yield mutate(data, files, rng)


def run(kind: str, count: int, seed: int, directory: Path) -> Counter[str]:
    """Read ``count`` damaged files and count the outcomes. Raises ``AssertionError`` where two readers differ."""
    path = directory / FILES.get(kind, "x.pt")
    for name, key in (("one", "w"), ("two", "v")):
        (directory / f"{name}.safetensors").write_bytes(safetensors_file({key: f32()}, b"1234"))
    if kind == "dcp":
        items(path.parent)
    if kind in PARTS:
        path = write_parts(kind, directory / "run")
    opened = directory / "run" if kind in PARTS else path.parent if kind == "dcp" else path
    ends: Counter[str] = Counter()
    for number, data in enumerate(mutants(kind, count, seed)):
        path.write_bytes(data)
        try:
            seen = _bounded(str(opened), READERS.get(kind, by_ckptkit))
            ends["accepted" if seen is not None else "refused"] += 1
            if seen is not None and kind in ORACLES:
                ends[_compared(kind, seen, ORACLES[kind](str(opened)))] += 1
        except BaseException as error:
            error.add_note(f"mutant {number} of {kind}, seed {seed}: {data!r}")
            raise
    return ends


def _bounded(path: str, reader: Callable[[str], Seen | None]) -> Seen | None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = reader(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > _MOST_MEMORY:
        raise AssertionError(f"reading it took {grown} kB")
    return seen


def _compared(kind: str, seen: Seen, expected: Seen | None) -> str:
    if expected is None:
        if kind == "npy" or (kind == "safetensors" and all(safetensors_knows(code) for code, _, _ in seen.values())):
            raise AssertionError("ckptkit accepts a file that the library refuses")
        return "no oracle"
    if kind == "safetensors":
        expected = {key: (code, shape, data or seen[key][2]) for key, (code, shape, data) in expected.items()}
    if kind == "npz":
        # ckptkit lists an array without inflating it, so it does not see all the damage that numpy sees.
        seen = {key: entry for key, entry in seen.items() if key in expected}
    # A tensor that is listed and cannot be read has no values to compare.
    unread = {key for key, (_, _, data) in seen.items() if data is None}
    seen, expected = ({key: part[key] for key in part if key not in unread} for part in (seen, expected))
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
