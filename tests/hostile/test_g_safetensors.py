"""Table G: a safetensors header is read strictly, and every file that the library refuses is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from tests.features import safetensors_knows
from tests.helpers_formats import bits, f32, library_accepts, refusal, safetensors_file
from tests.hostile.contract import Accepted, Refused, assert_accepted, assert_refused, one_of_each_row, paused, written

W = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
GOOD = safetensors_file({"w": f32()}, b"1234")
NAME = "x.safetensors"


def header(text: str, data: bytes = b"1234") -> bytes:
    return safetensors_file('{"w":' + W[:-1] + text + "}}", data)


def twice(first: str, second: str) -> bytes:
    return safetensors_file(f'{{"{first}":{W},"{second}":{W}}}', b"1234")


def entry(**fields: Any) -> bytes:
    made = f32() | fields
    return safetensors_file({"w": {name: value for name, value in made.items() if value is not None}}, b"1234")


def two(first: tuple[int, int], second: tuple[int, int], size: int = 8) -> bytes:
    return safetensors_file({"w": f32(*first), "v": f32(*second)}, bytes(size))


BROKEN: dict[str, tuple[bytes, str]] = {
    "G1 seven bytes": (b"\0\0\0\0\0\0\0", "only zero bytes"),
    "G1 length 0": (b"\0" * 8 + b"{}", "the header does not begin with '{'"),
    "G1 length 2^32": (GOOD[:4] + b"\1" + GOOD[5:], "4,294,967,357 bytes, more than the limit"),
    "G1 limit": ((100_000_001).to_bytes(8, "little") + GOOD[8:], "100,000,001"),
    "G1 past the end": ((1000).to_bytes(8, "little") + GOOD[8:], "1,000 bytes and the file has"),
    "G1 length 2^64-1": (b"\xff" * 8 + GOOD[8:], "the first bytes are ff ff"),
    "G2 not JSON": (safetensors_file("{w}"), "not JSON"),
    "G2 junk behind": (safetensors_file("{} x"), "not JSON"),
    "G2 NUL padding": (safetensors_file("{}\0\0"), "not JSON"),
    "G2 leading space": (safetensors_file(" {}"), "does not begin with '{'"),
    "G2 array": (safetensors_file("[]"), "unknown format"),
    "G2 BOM": (safetensors_file("\ufeff{}"), "unknown format"),
    "G2 NaN": (header(',"x":NaN'), "NaN, which is not JSON"),
    "G2 Infinity": (header(',"x":-Infinity'), "-Infinity, which is not JSON"),
    "G2 a number too large": (header(',"x":1e999'), "1e999, which is not a finite number"),
    "G2 an integer too large": (header(',"x":' + "9" * 400), "the header entry holds an integer of 13"),
    "G2 an integer of 5,000 digits": (header(',"x":' + "9" * 5000), "not JSON"),
    "G3 not UTF-8": (safetensors_file(b'{"\xff":1}'), "not UTF-8 at byte 2"),
    "G3 lone surrogate": (safetensors_file('{"\\ud800":1}'), "half of a surrogate pair"),
    "G4 a tensor twice": (twice("w", "w"), "names 'w' twice"),
    "G4 written in another way": (twice("w", "\\u0077"), "names 'w' twice"),
    "G5 an unknown field twice": (header(',"x":1,"x":2'), "names 'x' twice"),
    "G5 a field twice": (header(',"dtype":"F32"'), "names 'dtype' twice"),
    "G5 metadata twice": (safetensors_file('{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "G6 metadata int": (safetensors_file('{"__metadata__":{"a":1}}'), "strings to strings"),
    "G6 metadata nested": (safetensors_file('{"__metadata__":{"a":{}}}'), "strings to strings"),
    "G6 metadata list": (safetensors_file('{"__metadata__":[]}'), "strings to strings"),
    "G7 unknown dtype": (entry(dtype="F33"), "'w': unknown dtype 'F33'"),
    "G7 lower case": (entry(dtype="f32"), "'w': unknown dtype 'f32'"),
    "G7 a dtype of torch only": (entry(dtype="C128"), "'w': unknown dtype 'C128'"),
    "G7 no string": (entry(dtype=[1]), "'w': unknown dtype"),
    "G8 float": (entry(shape=[1.0]), "'w': the shape [1.0]"),
    "G8 negative": (entry(shape=[-1]), "'w': the shape [-1]"),
    "G8 text": (entry(shape=["1"]), "'w': the shape"),
    "G8 bool": (entry(shape=[True]), "'w': the shape"),
    "G8 no list": (entry(shape=1), "'w': the shape 1"),
    "G8 2^63": (entry(shape=[2**63]), "'w': the shape"),
    "G8 overflow": (entry(shape=[2**62, 2**62]), "'w': the shape overflows, with 130 binary"),
    "G8 more overflow": (entry(shape=[2**62] * 9), "'w': the shape overflows"),
    "G8 zero first": (entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "overflows"),
    "G8 huge factors": (entry(shape=[10**4000] * 1000), "'w': the shape"),
    "G8 2,000 dimensions": (entry(shape=[1] * 2000), "'w': a shape of 2000 dimensions"),
    "G8 minus zero": (safetensors_file('{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "'w': the shape"),
    "G9 one offset": (entry(data_offsets=[0]), "'w': the offsets [0]"),
    "G9 three offsets": (entry(data_offsets=[0, 2, 4]), "'w': the offsets"),
    "G9 float": (entry(data_offsets=[0, 4.0]), "'w': the offsets"),
    "G9 negative": (entry(data_offsets=[-4, 0]), "'w' "),
    "G9 reversed": (entry(data_offsets=[4, 0]), "'w': F32 [1] needs 4 bytes, offsets give -4"),
    "G9 too few": (entry(shape=[3, 2]), "'w': F32 [3, 2] needs 24 bytes, offsets give 4"),
    "G9 offsets of 30 digits": (entry(data_offsets=[10**30, 10**30 + 4]), "'w': "),
    "G9 start gap": (
        two((4, 8), (8, 12), 12),
        "'w' leaves a gap before it: it begins at byte 4, and the data before it ends at byte 0",
    ),
    "G9 gap": (
        two((0, 4), (8, 12), 12),
        "'v' leaves a gap before it: it begins at byte 8, and the data before it ends at byte 4",
    ),
    "G9 overlap": (
        two((0, 4), (2, 6)),
        "'v' overlaps the tensor before it: it begins at byte 2, and the data before it ends at byte 4",
    ),
    "G9 same range": (two((0, 4), (0, 4), 4), "overlaps"),
    "G10 one byte more": (header("", b"12345"), "not part of a tensor: 1 byte after the last tensor"),
    "G10 one byte less": (header("", b"123"), "truncated: 1 of 4 bytes are missing"),
    "G11 odd F4": (safetensors_file({"w": f32(0, 2, [3], "F4")}, b"12"), "'w': F4 [3] needs 1.5 bytes"),
    "G14 100,000 levels": (header(',"x":' + "[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "G14 127 levels": (header(',"x":' + "[" * 126 + "]" * 126), "'w': the header entry is nested too deeply"),
    "G16 no shape": (entry(shape=None), "'w': the header entry has no shape"),
    "G16 no dtype": (entry(dtype=None), "'w': the header entry has no dtype"),
    "G16 no offsets": (entry(data_offsets=None), "'w': the header entry has no data_offsets"),
    "G16 no object": (safetensors_file('{"w":[]}'), "'w': the header entry is not an object"),
    "G16 null": (safetensors_file('{"w":null}'), "'w': the header entry is not an object"),
    "G17 cut at the end of the header": (header("", b""), "truncated: 4 of 4 bytes are missing"),
}
REFUSED = {name: Refused(written(data, NAME), reason) for name, (data, reason) in BROKEN.items()}

# Cases that the library reads and ckpt refuses, with the reason.
STRICTER = {
    "G2 leading space": "the format's own text asks for a brace, and other readers hold to it",
    "G4 a tensor twice": "the format forbids it; the library takes the last one, others the first",
    "G4 written in another way": "the same name, escaped",
    "G5 an unknown field twice": "readers disagree about which one counts",
    "G8 2,000 dimensions": "torch has no such tensor, and each costs time",
}

READ = {
    "G7 a dtype that torch lacks": (safetensors_file({"w": f32(0, 3, [2, 2], "F6_E2M3")}, b"abc"), "", "F6_E2M3"),
    "G12 unaligned": (safetensors_file({"b": f32(0, 1, [1], "U8"), "w": f32(1, 5)}, b"x1234"), "", "F32"),
    "G15 unknown field": (header(',"extra":{"a":[1]}'), "1 entry with unknown fields", "F32"),
}
ACCEPTED = {name: Accepted(written(data, NAME), warning, shown) for name, (data, warning, shown) in READ.items()}
EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
SMALL_FILES_THAT_BUILD_MUCH = {
    "G19 empty tensors": (
        lambda: safetensors_file("{" + ",".join(f'"{number}":{EMPTY}' for number in range(1_000_000)) + "}"),
        "the header describes more than 250,000 tensors",
    ),
    "G19 a long shape": (
        lambda: safetensors_file('{"a":{"dtype":"F32","shape":[' + "0," * 15_000_000 + '0],"data_offsets":[0,0]}}'),
        "the header holds more values than any checkpoint needs",
    ),
    "G19 metadata": (
        lambda: safetensors_file('{"__metadata__":{' + ",".join(f'"{n}":""' for n in range(2_000_000)) + "}}"),
        "the header holds more values than any checkpoint needs",
    ),
}
BUILD_MUCH = {
    name: Refused(written(data, NAME), reason) for name, (data, reason) in SMALL_FILES_THAT_BUILD_MUCH.items()
}
OTHER = (*BUILD_MUCH, "G13 200,000 empty tensors", "G18 truncated by another process", "G18 touched by another process")


@pytest.mark.parametrize("name", BUILD_MUCH)
def test_a_header_that_builds_much_is_refused_before_it_is_parsed(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, BUILD_MUCH[name])


@pytest.mark.parametrize("name", BROKEN)
def test_the_tensor_and_the_numbers_are_named(name: str, tmp_path: Path) -> None:
    """The library refuses the same files, with the listed exceptions."""
    data, reason = BROKEN[name]
    path = written(data, NAME)(tmp_path)
    error = refusal(str(path))
    assert isinstance(error, FormatError)
    assert reason in error.reason
    assert len(error.reason) < 500
    assert library_accepts(path) == (name in STRICTER)


@pytest.mark.parametrize("name", [*one_of_each_row(REFUSED), "G8 huge factors"])
def test_it_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, REFUSED[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_is_read(name: str, tmp_path: Path) -> None:
    """The tensors are those of the library, where the library knows the dtype."""
    assert_accepted(tmp_path, ACCEPTED[name])
    if not safetensors_knows(ACCEPTED[name].shown):
        return
    path = tmp_path / "in" / NAME
    with open_checkpoint(path) as checkpoint, safe_open(path, "pt") as file:
        assert set(checkpoint) == set(file.keys())
        if "F6" not in ACCEPTED[name].shown:
            assert all(checkpoint.read_bytes(key) == bits(file.get_tensor(key)) for key in checkpoint)


def test_g13_many_empty_tensors_are_listed(tmp_path: Path) -> None:
    """Very many tensors without data are listed within the limits; the library needs seconds for them."""

    def one_of_many(directory: Path) -> list[str | Path]:
        empty = ",".join(f'"t{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(100_000))
        return ["show", written(safetensors_file("{" + empty + "}"), NAME)(directory), "--keep", "t99999"]

    assert_accepted(tmp_path, Accepted(one_of_many, "", "1 tensor, 0 elements"))


@pytest.mark.parametrize("change", ["shorter", "touched"])
@pytest.mark.parametrize("out", ["out.safetensors", "out.pt"])
def test_g18_a_file_that_changes_meanwhile_is_an_error(change: str, out: str, tmp_path: Path) -> None:
    """Another process changes the file after the program has read the header; a memory map would crash here."""
    source = tmp_path / NAME
    source.write_bytes(safetensors_file({"w": f32(0, 1 << 20, [1 << 18])}, bytes(1 << 20)))
    with paused("posix_fallocate", "convert", source, "-o", tmp_path / out) as process:
        os.truncate(source, 5000) if change == "shorter" else os.utime(source, (1, 1))
        process.send_signal(signal.SIGCONT)
        output, err = process.communicate()
    assert (process.returncode, output) == (2, ""), err
    how = "became shorter" if change == "shorter" else "changed"
    assert err == f"ckpt: {source}: the file {how} while it was read\n"
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
