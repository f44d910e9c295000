"""Pickles that call code or are corrupt: no code is run, and each fault is refused with its position."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest
import torch

from ckptkit.errors import FormatError
from tests.helpers_formats import (
    CODE_OF,
    call,
    glob,
    mapping,
    number,
    opened,
    refused,
    several,
    storage,
    tensor,
    text,
    torch_zip,
    with_weights,
)

WEIGHTS = tensor()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(call("posix.system", text("touch canary")), id="the object itself"),
        pytest.param(call("posix.system", text("touch canary")) + b"}b", id="with a state"),
        pytest.param(call("ultralytics.nn.tasks.DetectionModel") + mapping({"w": WEIGHTS}) + b"b", id="C20 a module"),
        pytest.param(b"](NNe" + b")R", id="called a list"),
    ],
)
def test_a_pickled_object_is_not_a_state_dict(tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(tmp_path, torch_zip(body))
    assert "holds a pickled object of class" in error.reason
    assert "state_dict()" in (error.hint or "")
    assert not os.path.exists("canary")


def test_unknown_classes_are_listed_by_name(tmp_path: Path) -> None:
    """C19, C20: unknown classes give a mild warning, and classes of common libraries give none."""
    model = glob("net.Model") + b")\x81" + mapping({"lr": number(3)}) + b"b"
    with opened(tmp_path, with_weights(model=model, args=call("argparse.Namespace"))) as checkpoint:
        assert (checkpoint.suspicious, checkpoint.references) == (False, ("net.Model",))
        assert checkpoint.warnings == ("contains 1 code reference, not run: net.Model",)
        shown = {entry.path: (entry.type, entry.value) for entry in checkpoint.entries}
    assert shown == {"model": ("net.Model", {"lr": 3}), "args": ("argparse.Namespace", "code reference, not run")}


def test_attributes_set_on_an_ordered_dict_are_data(tmp_path: Path) -> None:
    """C17: torch sets the attributes on the object, where they hide its methods."""
    body = call("collections.OrderedDict") + text("w") + WEIGHTS + b"s" + mapping({"items": b"N", "keys": b"N"}) + b"b"
    with opened(tmp_path, torch_zip(body)) as checkpoint:
        assert {key: info.shape for key, info in checkpoint.items()} == {"w": (2, 2)}
        assert {entry.path for entry in checkpoint.entries} == {"items", "keys"}


def test_names_in_references_cannot_move_the_cursor(tmp_path: Path) -> None:
    with opened(tmp_path, with_weights(x=text("os\x1b[2J") + text("x\nsystem") + b"\x93")) as checkpoint:
        assert all(line.isprintable() for line in checkpoint.warnings)


HUGE = 10**5000
CORRUPT = [
    pytest.param(b"", "nothing on the stack", id="C4 nothing before STOP"),
    pytest.param(b"j\5\0\0\0", "memo 5 is read before it is written", id="C5 long memo"),
    pytest.param(b"}p4294967296\n", "a memo index below 0 or beyond 2\\^32 before byte 15", id="C11 memo index"),
    pytest.param(b"}p-1\n", "a memo index below 0 or beyond", id="C11 negative memo index"),
    pytest.param(b"(", "stray MARK", id="C5 a MARK as the value"),
    pytest.param(b"\xff", "unknown opcode 0xff at byte 2", id="unknown opcode"),
    pytest.param(b"}(]tNs", "a list as dict key", id="C12 a list in a tuple as key"),
    pytest.param(b"}(NNNu", "a key without a value", id="a key without a value"),
    pytest.param(b"]NNs", "items set on a list", id="items on a list"),
    pytest.param(b"}Na", "values appended to a dict", id="values on a dict"),
    pytest.param(b"}" + number(2**61) + b"Ns", "a dict key is an integer of 62 bits", id="C11 an int beyond the hash"),
    pytest.param(b"}" + b")\x85\x85Ns", "a tuple of tuples", id="C7 a tuple of tuples as key"),
    pytest.param(b"}(" + b"N" * 100 + b"tNs", "a long tuple", id="C7 a long tuple as key"),
    pytest.param(b"}(\x91Ns", "a frozenset as dict key", id="C7 a frozenset as key"),
    pytest.param(b"}" + call("builtins.complex", b"K\1", b"K\2") + b"Ns", "a complex as dict key", id="C7 complex key"),
    pytest.param(b"\x8b" + struct.pack("<i", -1), "negative length", id="C13 LONG4 negative"),
    pytest.param(b"T" + struct.pack("<i", -1), "negative length", id="C13 BINSTRING negative"),
    pytest.param(b"I12x\n", "invalid literal", id="INT that is none"),
    pytest.param(b"Fx\n", "could not convert", id="FLOAT that is none"),
    pytest.param(b"S'abc\n", "a string without quotes", id="STRING without quotes"),
    pytest.param(b"S'\\d'\n", "a string with an unknown escape", id="STRING with an escape"),
    pytest.param(b"S'a'", "has no end|no end", id="a line without an end"),
    pytest.param(b"P0\n", "a persistent id does not name a storage", id="C18 PERSID"),
    pytest.param(
        several(text("storage"), b"N", text("0"), b"N", number(4)) + b"Q", "unknown type, key", id="C18 no type"
    ),
    pytest.param(storage(numel=HUGE), "unknown type, key or size", id="D6 numel of 5,000 digits"),
    pytest.param(tensor(offset=HUGE), "4300|offset", id="D1 offset of 5,000 digits"),
    pytest.param(tensor(size=(0, 2**40, 2**40), stride=(0, 0, 0)), "'w': the shape .* overflows", id="D2 zero first"),
    pytest.param(
        tensor(size=(2**62,) * 1000, stride=(0,) * 1000), "'w': the shape .* overflows", id="D2 1,000 factors"
    ),
    pytest.param(
        tensor(size=(1,) * 5000, stride=(0,) * 5000), "a tensor has 5000 dimensions", id="D12 5,000 dimensions"
    ),
    pytest.param(
        tensor(more=mapping({"neg": b"\x88"}), where=storage("0", 16, "torch.ByteStorage")),
        "U8 .*negative",
        id="a negative byte",
    ),
    pytest.param(tensor(more=mapping({"conj": b"\x88"})), "F32 tensor is marked as conjugate", id="a conjugate float"),
    pytest.param(call("torch._utils._rebuild_tensor_v2", b"N"), "does not take the given arguments", id="no storage"),
    pytest.param(
        call("torch._utils._rebuild_tensor_v3", storage(), b"NNNNNN"),
        "does not take the given arguments",
        id="no dtype",
    ),
    pytest.param(
        glob("collections.OrderedDict") + b"]R",
        "the arguments of collections.OrderedDict are a list, not a tuple",
        id="no tuple of arguments",
    ),
]


@pytest.mark.parametrize(("value", "reason"), CORRUPT)
def test_a_corrupt_pickle_is_refused_with_the_place(tmp_path: Path, value: bytes, reason: str) -> None:
    data = torch_zip(b"}" + text("w") + value + b"s") if b"_rebuild" in value else torch_zip(value)
    error = refused(tmp_path, data)
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason
    assert len(error.reason) < 300


def test_a_storage_with_two_types_has_the_first_and_is_not_read(tmp_path: Path) -> None:
    """D9: as in torch, the first type counts for all tensors. Their values are not read, because it is a fault."""
    other = tensor(storage("0", 16, "torch.ByteStorage"), size=(4,), stride=(1,))
    with opened(tmp_path, with_weights(v=other)) as checkpoint:
        theirs = torch.load(checkpoint.path, weights_only=True)
        assert {key: CODE_OF[value.dtype] for key, value in theirs.items()} == {"w": "F32", "v": "F32"}
        assert [str(info) for info in checkpoint.values()] == ["F32 [2, 2] (two-type)", "F32 [4] (two-type)"]
        with pytest.raises(FormatError, match="'v' is a two-type tensor"):
            checkpoint.read_bytes("v")
