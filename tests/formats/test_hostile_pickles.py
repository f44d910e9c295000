"""Pickles that ask for code or lie: nothing of them is run, and each lie is refused with its place."""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptkit.errors import FormatError
from tests.helpers_formats import (
    call,
    glob,
    legacy_file,
    mapping,
    number,
    opened,
    pickled,
    refused,
    several,
    storage,
    tensor,
    text,
    torch_zip,
    with_weights,
)

WEIGHTS = tensor()


# --- code (C1, C2): `touch` makes a canary where it is run -----------------------------------------------------------

CODE: dict[str, Callable[[str], bytes]] = {
    "REDUCE": lambda touch: call("posix.system", text(touch)),
    "REDUCE os": lambda touch: call("os.system", text(touch)),
    "STACK_GLOBAL": lambda touch: text("posix") + text("system") + b"\x93" + several(text(touch)) + b"R",
    "INST": lambda touch: b"(" + text(touch) + b"iposix\nsystem\n",
    "OBJ": lambda touch: b"(" + glob("posix.system") + text(touch) + b"o",
    "NEWOBJ": lambda touch: glob("posix.system") + several(text(touch)) + b"\x81",
    "NEWOBJ_EX": lambda touch: glob("posix.system") + several(text(touch)) + b"}\x92",
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


def test_the_canary_sings_where_such_a_pickle_is_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(pickled(CODE["REDUCE"](f"touch '{canary}'")))
    assert canary.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("name", CODE)
def test_code_is_named_and_never_run(tmp_path: Path, name: str, kind: str) -> None:
    canary = tmp_path / "canary"
    body = mapping({"w": WEIGHTS, "x": CODE[name](f"touch '{canary}'")})
    with opened(tmp_path, torch_zip(body) if kind == "zip" else legacy_file(body)) as checkpoint:
        assert checkpoint.suspicious
        assert checkpoint.references != ()
        assert any("looks malicious" in line and checkpoint.references[0] in line for line in checkpoint.warnings)
        assert checkpoint.read_bytes("w") == bytes(range(16))
        assert "touch" not in repr(checkpoint)
    assert not canary.exists()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(CODE["REDUCE"]("touch canary"), id="the object itself"),
        pytest.param(CODE["REDUCE"]("touch canary") + b"}b", id="with a state"),
        pytest.param(call("ultralytics.nn.tasks.DetectionModel") + mapping({"w": WEIGHTS}) + b"b", id="C20 a module"),
        pytest.param(b"](NNe" + b")R", id="called a list"),
    ],
)
def test_a_pickled_object_is_no_state_dict(tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(tmp_path, torch_zip(body))
    assert "holds a pickled object of class" in error.reason
    assert "state_dict()" in (error.hint or "")
    assert not os.path.exists("canary")


def test_unknown_classes_are_listed_by_name(tmp_path: Path) -> None:
    """C19, C20: most are honest, so the words are milder; arguments of common libraries go without a warning."""
    model = glob("net.Model") + b")\x81" + mapping({"lr": number(3)}) + b"b"
    with opened(tmp_path, with_weights(model=model, args=call("argparse.Namespace"))) as checkpoint:
        assert (checkpoint.suspicious, checkpoint.references) == (False, ("net.Model",))
        assert checkpoint.warnings == ("contains 1 code reference, not run: net.Model",)
        shown = {entry.path: (entry.type, entry.value) for entry in checkpoint.entries}
    assert shown == {"model": ("net.Model", {"lr": 3}), "args": ("argparse.Namespace", "code reference, not run")}


def test_attributes_set_on_an_ordered_dict_are_data(tmp_path: Path) -> None:
    """C17: torch sets them on the object, where they shadow its methods."""
    body = call("collections.OrderedDict") + text("w") + WEIGHTS + b"s" + mapping({"items": b"N", "keys": b"N"}) + b"b"
    with opened(tmp_path, torch_zip(body)) as checkpoint:
        assert {key: info.shape for key, info in checkpoint.items()} == {"w": (2, 2)}
        assert {entry.path for entry in checkpoint.entries} == {"items", "keys"}


def test_names_in_references_cannot_move_the_cursor(tmp_path: Path) -> None:
    with opened(tmp_path, with_weights(x=text("os\x1b[2J") + text("x\nsystem") + b"\x93")) as checkpoint:
        assert all(line.isprintable() for line in checkpoint.warnings)


# --- corrupt pickles (C4, C5, C11 to C15, C18) and impossible tensors (D) --------------------------------------------

HUGE = 10**5000
CORRUPT = [
    pytest.param(b"", "nothing on the stack", id="C4 nothing before STOP"),
    pytest.param(b"R", "nothing on the stack at byte 2", id="C5 underflow"),
    pytest.param(b"t", "no MARK at byte 2", id="C5 no MARK"),
    pytest.param(b"h\5", "memo 5 is read before it is written", id="C5 memo"),
    pytest.param(b"j\5\0\0\0", "memo 5 is read before it is written", id="C5 long memo"),
    pytest.param(b"}p4294967296\n", "a memo index below 0 or beyond 2\\^32 before byte 15", id="C11 memo index"),
    pytest.param(b"}p-1\n", "a memo index below 0 or beyond", id="C11 negative memo index"),
    pytest.param(b"(", "stray MARK", id="C5 a MARK as the value"),
    pytest.param(b"\xff", "unknown opcode 0xff at byte 2", id="unknown opcode"),
    pytest.param(b"}]Ns", "a list as dict key", id="C12 a list as key"),
    pytest.param(b"}(]tNs", "a list as dict key", id="C12 a list in a tuple as key"),
    pytest.param(b"}(NNNu", "a key without a value", id="a key without a value"),
    pytest.param(b"]NNs", "items set on a list", id="items on a list"),
    pytest.param(b"}Na", "values appended to a dict", id="values on a dict"),
    pytest.param(b"}" + number(2**61) + b"Ns", "a dict key is an integer of 62 bits", id="C11 an int beyond the hash"),
    pytest.param(b"}" + b")\x85\x85Ns", "a tuple of tuples", id="C7 a tuple of tuples as key"),
    pytest.param(b"}(" + b"N" * 100 + b"tNs", "a long tuple", id="C7 a long tuple as key"),
    pytest.param(b"}(\x91Ns", "a frozenset as dict key", id="C7 a frozenset as key"),
    pytest.param(b"}" + call("builtins.complex", b"K\1", b"K\2") + b"Ns", "a complex as dict key", id="C7 complex key"),
    pytest.param(b"X\xff\xff\xff\x7f", "a length of 2147483647 bytes", id="C13 BINUNICODE"),
    pytest.param(b"\x8e" + struct.pack("<Q", 2**40), "a length of 1099511627776 bytes", id="C13 BINBYTES8"),
    pytest.param(b"\x95" + struct.pack("<Q", 2**62), "the frame .* longer than the file", id="C13 FRAME"),
    pytest.param(b"\x8b" + struct.pack("<i", 2**28), "a length of 268435456", id="C13 LONG4"),
    pytest.param(b"\x8b" + struct.pack("<i", -1), "negative length", id="C13 LONG4 negative"),
    pytest.param(b"T" + struct.pack("<i", -1), "negative length", id="C13 BINSTRING negative"),
    pytest.param(b"I" + b"9" * 10**6 + b"\n", "Exceeds the limit", id="C13 INT with a million digits"),
    pytest.param(b"I12x\n", "invalid literal", id="INT that is none"),
    pytest.param(b"Fx\n", "could not convert", id="FLOAT that is none"),
    pytest.param(b"S'abc\n", "a string without quotes", id="STRING without quotes"),
    pytest.param(b"S'\\d'\n", "a string with an unknown escape", id="STRING with an escape"),
    pytest.param(b"S'a'", "has no end|no end", id="a line without an end"),
    pytest.param(b"X\1\0\0\0\xff", "can't decode byte", id="C14 bad UTF-8"),
    pytest.param(b"\x80\x09N", "pickle protocol 9", id="C15 protocol 9"),
    pytest.param(b"\x82\1", "an extension registry", id="C15 EXT1"),
    pytest.param(b"\x97", "out-of-band buffers", id="C15 NEXT_BUFFER"),
    pytest.param(text("0") + b"Q", "a persistent id that names no storage", id="C18 str"),
    pytest.param(b"P0\n", "a persistent id that names no storage", id="C18 PERSID"),
    pytest.param(several(text("storage")) + b"Q", "names no storage", id="C18 1-tuple"),
    pytest.param(several(text("tensor"), b"NNNN") + b"Q", "names no storage", id="C18 unknown tag"),
    pytest.param(
        several(text("storage"), b"N", text("0"), b"N", number(4)) + b"Q", "unknown type, key", id="C18 no type"
    ),
    pytest.param(storage(numel=-1), "unknown type, key or size", id="D6 negative numel"),
    pytest.param(storage(numel=HUGE), "unknown type, key or size", id="D6 numel of 5,000 digits"),
    pytest.param(tensor(offset=100), "'w': the view ends at byte 416 of storage '0', which has 16", id="D1 offset"),
    pytest.param(tensor(stride=(1000, 1)), "'w': the view ends at byte 4008 of storage", id="D1 stride"),
    pytest.param(tensor(offset=HUGE), "4300|offset", id="D1 offset of 5,000 digits"),
    pytest.param(tensor(size=(2**40, 2**40)), "'w': the shape .* overflows", id="D2 overflow"),
    pytest.param(tensor(size=(0, 2**40, 2**40), stride=(0, 0, 0)), "'w': the shape .* overflows", id="D2 zero first"),
    pytest.param(
        tensor(size=(2**62,) * 1000, stride=(0,) * 1000), "'w': the shape .* overflows", id="D2 1,000 factors"
    ),
    pytest.param(
        tensor(size=(1,) * 5000, stride=(0,) * 5000), "a tensor of 5000 dimensions", id="D12 5,000 dimensions"
    ),
    pytest.param(tensor(size=(-2, 2)), "below 0 or above 2\\^63: \\[-2|below 0 or above 2\\^63: \\(-2", id="D4 size"),
    pytest.param(tensor(stride=(-2, 1)), "below 0 or above", id="D4 stride"),
    pytest.param(tensor(offset=-1), "at the offset -1", id="D4 offset"),
    pytest.param(tensor(size=(4,)), "a tensor of 1 dimensions with 2 strides", id="D5 rank"),
    pytest.param(
        tensor(more=mapping({"neg": b"\x88"}), where=storage("0", 16, "torch.ByteStorage")),
        "U8 .*negative",
        id="a negative byte",
    ),
    pytest.param(tensor(more=mapping({"conj": b"\x88"})), "F32 tensor marked as conjugate", id="a conjugate float"),
    pytest.param(call("torch._utils._rebuild_tensor_v2", b"N"), "arguments it does not take", id="no storage"),
    pytest.param(
        call("torch._utils._rebuild_tensor_v3", storage(), b"NNNNNN"), "arguments it does not take", id="no dtype"
    ),
    pytest.param(
        glob("collections.OrderedDict") + b"]R", "was given a list for its arguments", id="no tuple of arguments"
    ),
    pytest.param(b"](" + tensor() + tensor(storage("0", 5)) + b"e", "two sizes, 16 and 20 bytes", id="D8 two sizes"),
]


@pytest.mark.parametrize(("value", "reason"), CORRUPT)
def test_a_corrupt_pickle_is_refused_with_the_place(tmp_path: Path, value: bytes, reason: str) -> None:
    data = torch_zip(b"}" + text("w") + value + b"s") if b"_rebuild" in value else torch_zip(value)
    error = refused(tmp_path, data)
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason
    assert len(error.reason) < 300


def test_bytes_behind_the_pickle_are_warned_of(tmp_path: Path) -> None:
    with opened(tmp_path, torch_zip(mapping({"w": WEIGHTS}) + b".junk")) as checkpoint:
        assert checkpoint.warnings == ("5 bytes follow the pickle in data.pkl",)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param(tensor(size=(2**40,), stride=(0,)), "F32 [1099511627776]", id="D3 expanded"),
        pytest.param(tensor(storage(location="cuda:9999")), "F32 [2, 2]", id="D10 location"),
        pytest.param(tensor(size=(), stride=()), "F32 []", id="D12 scalar"),
        pytest.param(tensor(size=(0, 5), stride=(5, 1), offset=99), "F32 [0, 5]", id="D12 empty"),
        pytest.param(tensor(size=(1,) * 1000, stride=(1,) * 1000), f"F32 {[1] * 1000}", id="D12 1,000 dimensions"),
    ],
)
def test_odd_geometry_that_is_possible_is_listed(tmp_path: Path, value: bytes, shown: str) -> None:
    with opened(tmp_path, with_weights(v=value)) as checkpoint:
        assert str(checkpoint["v"]) == shown
        assert checkpoint.payload("v").nbytes == checkpoint["v"].nbytes


def test_one_storage_may_be_seen_as_two_dtypes(tmp_path: Path) -> None:
    """D9: torch allows it; the bytes are the same."""
    other = tensor(storage("0", 16, "torch.ByteStorage"), size=(16,), stride=(1,))
    with opened(tmp_path, with_weights(v=other)) as checkpoint:
        assert str(checkpoint["v"]) == "U8 [16]"
        assert checkpoint.read_bytes("v") == checkpoint.read_bytes("w")


def test_a_lone_surrogate_in_a_key_is_kept_and_escaped(tmp_path: Path) -> None:
    with opened(tmp_path, torch_zip(mapping({"\ud800": WEIGHTS}))) as checkpoint:
        assert list(checkpoint) == ["\ud800"]
