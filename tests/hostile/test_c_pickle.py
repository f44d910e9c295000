"""Table C: pickles that ask for code, lie or expand: no code is run, and reading ends soon and in little memory."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptkit.errors import FormatError
from tests.helpers_formats import (
    call,
    get,
    glob,
    keyed_by,
    laughs,
    legacy_file,
    mapping,
    number,
    opened,
    pickled,
    put,
    refused,
    several,
    storage,
    tensor,
    text,
    torch_zip,
    with_weights,
    zip_of,
)
from tests.hostile.contract import Accepted, Refused, assert_accepted, assert_refused, written

WEIGHTS = tensor()


# `touch` creates a canary file where it is run.
CODE: dict[str, Callable[[str], bytes]] = {
    "REDUCE": lambda touch: call("posix.system", text(touch)),
    "REDUCE os": lambda touch: call("os.system", text(touch)),
    "STACK_GLOBAL": lambda touch: text("posix") + text("system") + b"\x93" + several(text(touch)) + b"R",
    "INST": lambda touch: b"(" + text(touch) + b"iposix\nsystem\n",
    "OBJ": lambda touch: b"(" + glob("posix.system") + text(touch) + b"o",
    "NEWOBJ": lambda touch: glob("posix.system") + several(text(touch)) + b"\x81",
    "NEWOBJ_EX": lambda touch: glob("posix.system") + several(text(touch)) + b"}\x92",
    "BUILD on a class": lambda touch: glob("posix.system") + mapping({"__setstate__": text(touch)}) + b"b",
    "eval": lambda touch: call("builtins.eval", text(f"__import__('os').system({touch!r})")),
    "Python 2": lambda touch: call("__builtin__.eval", text(f"__import__('os').system({touch!r})")),
    "getattr": lambda _: call("builtins.getattr", call("builtins.__import__", text("os")), text("system")),
    "dotted": lambda touch: text("torch.serialization") + text("os.system") + b"\x93" + several(text(touch)) + b"R",
    "by way of another module": lambda touch: call("pathlib.os.system", text(touch)),
    "by a private name": lambda touch: call("collections._sys.modules.get", text(touch)),
    "subprocess": lambda touch: call("subprocess.Popen", b"](" + text("sh") + text("-c") + text(touch) + b"e"),
    "runpy": lambda touch: call("runpy._run_code", text(f"import os; os.system({touch!r})"), b"}"),
    "nested load": lambda touch: call("pickle.loads", b"C" + _short(pickled(call("os.system", text(touch))))),
    "torch.load": lambda touch: call("torch.load", text(touch)),
    "argument": lambda touch: call("collections.OrderedDict", b"](" + several(text("a"), CODE["REDUCE"](touch)) + b"e"),
    "discarded": lambda touch: CODE["REDUCE"](touch) + b"0N",
    "key": lambda touch: b"}" + CODE["REDUCE"](touch) + b"Ns",
}


def _short(raw: bytes) -> bytes:
    return bytes([len(raw)]) + raw


EVIL = mapping({"w": WEIGHTS, "x": CODE["REDUCE"]("touch canary")})
EVERY_WAY = mapping({"w": WEIGHTS} | {name: code("touch canary") for name, code in CODE.items()})


def module(name: str, **state: bytes) -> bytes:
    """Return the pickle of an ``nn.Module`` of an unknown class."""
    return glob(name) + b")\x81" + mapping(state) + b"b"


CONV = module("ultralytics.nn.modules.Conv", _parameters=mapping({"bias": WEIGHTS}))
MODULE = module(
    "ultralytics.nn.tasks.DetectionModel",
    stride=WEIGHTS,
    _parameters=mapping({"weight": WEIGHTS}),
    _buffers=mapping({"mean": WEIGHTS}),
    _modules=mapping({"conv": CONV}),
)
FUNCTION = call(
    "cloudpickle.cloudpickle._make_function", call("types.CodeType", b"K\0", b"C\4touc"), b"N", text("f"), b"N", b"N"
)


WHOLE = mapping({"w": WEIGHTS, "name": text("net"), "step": number(2**40), "loss": b"G" + bytes(8)})


def archive(pickle: bytes) -> bytes:
    return zip_of([("archive/data.pkl", pickle), ("archive/data/0", bytes(16)), ("archive/version", b"3")])


def at_once(value: bytes) -> Callable[[Path], Path]:
    return written(torch_zip(value))


REFUSED: dict[str, Refused] = {
    "C3 cut in the middle": Refused(written(archive(pickled(WHOLE)[:100])), "has no end: truncated?"),
    "C4 no STOP": Refused(written(archive(b"\x80\x02}")), "the pickle that starts at byte 0 has no end: truncated?"),
    "C5 underflow": Refused(at_once(b"R"), "corrupt pickle: nothing on the stack at byte 2"),
    "C5 no MARK": Refused(at_once(b"t"), "corrupt pickle: no MARK at byte 2"),
    "C5 memo": Refused(at_once(b"h\5"), "memo 5 is read before it is written, at byte 3"),
    "C7 hash": Refused(
        at_once(b"}" + laughs(60, b"", b"\x86") + b"Ns"), "a tuple of tuples, which no checkpoint needs"
    ),
    "C8 laughs": Refused(at_once(mapping({"w": WEIGHTS, "x": laughs(60)})), "so often that it expands too far"),
    "C9 lists": Refused(written(lambda: torch_zip(b"]" * 200_000 + b"a" * 199_999)), "nested too deeply"),
    "C9 tuples": Refused(written(lambda: torch_zip(b")" + b"\x85" * 200_000)), "nested too deeply"),
    "C10 a list in itself": Refused(
        at_once(mapping({"w": WEIGHTS, "x": b"]" + put(0) + get(0) + b"a"})), "nested too deeply"
    ),
    "C10 a dict in itself": Refused(
        at_once(mapping({"w": WEIGHTS, "x": b"}" + put(0) + text("x") + get(0) + b"s"})), "nested too deeply"
    ),
    "C11 keys that collide": Refused(
        written(lambda: torch_zip(keyed_by(*(number(n * (2**61 - 1)) for n in range(20_000))))),
        "a dict key is an integer of 61 bits",
    ),
    "C12 a list as key": Refused(at_once(b"}]Ns"), "corrupt pickle: a list as dict key"),
    "C13 BINUNICODE": Refused(
        at_once(b"X\xff\xff\xff\x7f"), "a length of 2147483647 bytes at byte 7 points past the end"
    ),
    "C13 BINBYTES8": Refused(at_once(b"\x8e" + struct.pack("<Q", 2**40)), "a length of 1099511627776 bytes"),
    "C13 FRAME": Refused(at_once(b"\x95" + struct.pack("<Q", 2**62)), "the frame at byte 11 is longer than the file"),
    "C13 LONG4": Refused(at_once(b"\x8b" + struct.pack("<i", 2**28)), "a length of 268435456 bytes"),
    "C13 INT": Refused(written(lambda: torch_zip(b"I" + b"9" * 10**6 + b"\n")), "corrupt pickle: Exceeds the limit"),
    "C14 bad UTF-8": Refused(at_once(b"X\1\0\0\0\xff"), "can't decode byte 0xff"),
    "C15 protocol 9": Refused(at_once(b"\x80\x09N"), "pickle protocol 9 is not known"),
    "C15 EXT1": Refused(at_once(b"\x82\1"), "an extension registry at byte 2, which no checkpoint needs"),
    "C15 NEXT_BUFFER": Refused(at_once(b"\x97"), "out-of-band buffers at byte 2, which no checkpoint needs"),
    "C16 qtensor": Refused(
        written(
            with_weights(
                x=call(
                    "torch._utils._rebuild_qtensor",
                    storage(),
                    number(0),
                    several(number(2**38)),
                    several(number(1)),
                    b"NNN",
                )
            )
        ),
        "'x': the view ends at byte 1099511627776 of storage '0', which has 16",
    ),
    "C18 str": Refused(at_once(text("0") + b"Q"), "a persistent id does not name a storage"),
    "C18 1-tuple": Refused(at_once(several(text("storage")) + b"Q"), "a persistent id does not name a storage"),
    "C18 module": Refused(at_once(several(text("module"), b"NN") + b"Q"), "a persistent id does not name a storage"),
    "C18 unknown tag": Refused(
        at_once(several(text("tensor"), b"NNNN") + b"Q"), "a persistent id does not name a storage"
    ),
}
BESIDE = {"model": mapping({"w": WEIGHTS})}


def beside_weights(value: bytes) -> bytes:
    return torch_zip(mapping({**BESIDE, "x": value}))


def batches(value: bytes, count: int) -> bytes:
    """Return a list of ``count`` values in steps of a thousand, as Python's own pickler writes it."""
    return b"]" + (b"(" + value * 1000 + b"e") * (count // 1000)


def one_tensor_with_many_names() -> bytes:
    names = b"".join(text(str(number_)) + get(7) for number_ in range(260_000))
    return torch_zip(b"}" + text("a") + WEIGHTS + put(7) + b"s(" + names + b"u")


def edited(value: bytes) -> Callable[[Path], list[str | Path]]:
    """Return the command that renames a tensor in a file which also holds ``value``."""

    def make(directory: Path) -> list[str | Path]:
        path = written(beside_weights(value))(directory)
        return ["remap", path, "--rename", "w=v", "-o", directory.parent / "out" / "o.pt"]

    return make


SMALL_FILES_THAT_BUILD_MUCH: dict[str, Refused] = {
    "C21 lists": Refused(written(lambda: beside_weights(batches(b"]", 3_000_000))), "more than 1,600,000 objects"),
    "C21 lists after numbers that are gone": Refused(
        written(lambda: beside_weights(batches(b"G" + bytes(8), 1_400_000) + b"0" + batches(b"]", 3_000_000))),
        "more than 1,600,000 objects",
    ),
    "C21 lists after long lists of numbers": Refused(
        written(lambda: beside_weights(batches(b"G" + bytes(8), 2_600_000) + b"0" + batches(b"]", 3_000_000))),
        "more than 1,600,000 objects",
    ),
    "C21 numbers": Refused(
        written(lambda: beside_weights(batches(b"G" + bytes(8), 3_600_000))), "more than 1,600,000 objects"
    ),
    "C21 lists beside small numbers": Refused(
        written(lambda: beside_weights(batches(b"K\5", 5_000_000) + b"0" + batches(b"]", 3_000_000))),
        "more than 1,600,000 objects",
    ),
    "C21 strings": Refused(
        written(lambda: beside_weights(batches(text("a" * 63), 2_800_000))), "objects, which no checkpoint needs"
    ),
    "C21 None": Refused(
        written(lambda: beside_weights(b"](" + b"N" * 3_000_000 + b"e")), "more than 2,500,000 references to objects"
    ),
    "C21 tuples": Refused(written(lambda: beside_weights(batches(b"N\x85", 2_000_000))), "more than 1,600,000 objects"),
    "C21 mappings": Refused(
        written(lambda: beside_weights(glob("collections.OrderedDict") + put(9) + batches(b"h\t)R", 900_000))),
        "more than 1,600,000 objects",
    ),
    "C21 steps": Refused(written(lambda: beside_weights(b"N0" * 4_200_000 + b"N")), "more than 8,000,000 steps"),
    "C21 dicts of one item": Refused(
        written(lambda: beside_weights(batches(b"}NNs", 500_000))), "builds more than 10,000,000 items"
    ),
    "C21 sparse memo": Refused(
        written(lambda: torch_zip(b"}" + b"".join(put(7 * index) for index in range(600_000)))), "numbers out of order"
    ),
    "C21 names": Refused(written(one_tensor_with_many_names), "holds more than 250,000 tensors"),
    "C21 tensors": Refused(written(lambda: beside_weights(batches(WEIGHTS, 400_000))), "more than 250,000 tensors"),
    "C21 tensors of a legacy file": Refused(
        written(lambda: legacy_file(mapping({"x": batches(WEIGHTS, 400_000)}))), "more than 250,000 tensors"
    ),
    "C21 an edit of a long list": Refused(edited(batches(b"K\5", 5_000_000)), "more objects than an edit can hold"),
}
REFUSED |= SMALL_FILES_THAT_BUILD_MUCH
ACCEPTED: dict[str, Accepted] = {
    "C21 a log of a million numbers": Accepted(
        written(lambda: beside_weights(batches(b"G" + bytes(8), 1_000_000))), "", "1,000,000 items"
    ),
    "C1 zip": Accepted(written(torch_zip(EVIL)), "looks malicious: it asks to call posix.system", "posix.system"),
    "C1 legacy": Accepted(written(legacy_file(EVIL)), "looks malicious: it asks to call posix.system", "posix.system"),
    "C2 every way": Accepted(written(torch_zip(EVERY_WAY)), "looks malicious: it asks to call", "subprocess.Popen"),
    "C4 behind STOP": Accepted(
        written(torch_zip(mapping({"w": WEIGHTS}) + b".junk")), "5 bytes follow the pickle in data.pkl", "F32"
    ),
    "C6 memo of 2^31": Accepted(written(torch_zip(b"}" + put(2**31 - 1) + text("w") + WEIGHTS + b"s")), "", "F32"),
    "C14 lone surrogate": Accepted(written(torch_zip(mapping({"\ud800": WEIGHTS}))), "", r"\ud800"),
    "C16 bytearray": Accepted(
        written(with_weights(x=call("builtins.bytearray", number(2**38)))), "1 code reference, not run", "F32"
    ),
    "C16 FloatTensor": Accepted(
        written(with_weights(x=call("torch.FloatTensor", number(2**38)))), "1 code reference, not run", "F32"
    ),
    "C17 attributes": Accepted(
        written(
            torch_zip(call("collections.OrderedDict") + text("w") + WEIGHTS + b"s" + mapping({"items": b"N"}) + b"b")
        ),
        "",
        "items",
    ),
    "C19 function": Accepted(
        written(with_weights(f=FUNCTION)), "2 code references, not run: cloudpickle", "_make_function"
    ),
    "C20 module": Accepted(
        written(torch_zip(mapping({"epoch": b"K\3", "model": MODULE}))),
        "2 code references, not run: ultralytics.nn.tasks.DetectionModel",
        "conv.bias",
    ),
}
OTHER = ("C1 written", "C1 canary", "C2 each way", "C3 every length")


# tests/oracles/test_bombs.py tries the others of this kind: each takes a second or more.
SLOW = [name for name in SMALL_FILES_THAT_BUILD_MUCH if name != "C21 lists"]


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in SLOW])
def test_a_hostile_pickle_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, REFUSED[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_pickle_is_listed_without_running_code(name: str, tmp_path: Path) -> None:
    assert_accepted(tmp_path, ACCEPTED[name])


def test_c1_pickle_itself_runs_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: Python's own pickle runs the code that ckpt does not run, and creates the canary file."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled(CODE["REDUCE"]("touch canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("command", ["convert", "remap", "merge"])
def test_c1_nothing_is_written_from_a_file_that_asks_for_code(command: str, tmp_path: Path) -> None:
    def make(directory: Path) -> list[str | Path]:
        path = written(torch_zip(EVIL))(directory)
        return [command, *([path, path] if command == "merge" else [path]), "-o", "o.safetensors", "-q"]

    assert_refused(tmp_path, Refused(make, "refers to code that no checkpoint needs (posix.system)"))


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("name", CODE)
def test_c2_code_is_named_and_never_run(tmp_path: Path, name: str, kind: str) -> None:
    canary = tmp_path / "canary"
    body = mapping({"w": WEIGHTS, "x": CODE[name](f"touch '{canary}'")})
    with opened(tmp_path, torch_zip(body) if kind == "zip" else legacy_file(body)) as checkpoint:
        assert checkpoint.suspicious
        assert checkpoint.references != ()
        assert any("looks malicious" in line and checkpoint.references[0] in line for line in checkpoint.warnings)
        assert checkpoint.read_bytes("w") == bytes(range(16))
        assert "touch" not in repr(checkpoint)
    assert not canary.exists()


def test_c3_a_pickle_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Half a pickle is never read, even in a whole archive with a correct checksum."""
    whole = pickled(WHOLE)
    for length in range(len(whole)):
        error = refused(tmp_path, archive(whole[:length]))
        assert isinstance(error, FormatError)
        assert re.search("truncated|points past the end", error.reason), error.reason
