"""Batches of numbers and short strings, which are read at once, and edits of files that hold many of them."""

from __future__ import annotations

import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import execute, open_checkpoint, plan_remap
from ckptkit.errors import FormatError
from ckptkit.formats.pickle.machine import parse_pickle
from ckptkit.formats.pickle.nodes import Run, iterate_nodes, read_nodes, write_nodes
from ckptkit.formats.pickle.values import Interpreter

NUMBERS = (0, 1, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**31, -(2**63), 0.5, float("inf"), True, False, None)
VALUES: dict[str, Any] = {
    "numbers": list(NUMBERS) * 700,
    "one kind": list(range(70_000)),
    "floats": [0.25 * number for number in range(3000)],
    "short strings": [f"sample {number}" for number in range(2500)],
    "strings of all lengths": ["é" * (length // 2) + "x" * (length % 2) for length in range(90)],
    "repeated strings": ["cat", "dog"] * 900,
    "by name": {f"s{number}": number / 3 for number in range(2100)},
    "by number": {number: str(number) for number in range(2100)},
    "by large number": {number * 2**40: -number for number in range(2100)},
    "numbers and texts by place": [value for number in range(300) for value in (number, f"t{number}", 0.5)],
    "mixed": [1, "a", (2, 3), [4] * 1200, {"x": "a"}, 5] * 300,
    "surrogates": ["\ud800", "x"] * 3,
}
VALUES["everything"] = OrderedDict(VALUES)


def made(data: bytes) -> object:
    return parse_pickle(data, Interpreter({"collections.OrderedDict": OrderedDict}, {}))[0]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", VALUES)
def test_batches_have_the_values_that_pickle_makes(name: str, protocol: int) -> None:
    """Also where a batch is written again after an edit, and whatever the order of the numbers in the memo."""
    data = pickle.dumps(VALUES[name], protocol=protocol)
    assert made(data) == VALUES[name]
    root, version = read_nodes(data)
    again = write_nodes(root, version, 10**7)
    assert pickle.loads(again) == VALUES[name]


def test_numbers_of_a_batch_take_no_parts_of_their_own() -> None:
    """Otherwise an edit of a file with a list of a million numbers takes a gigabyte."""
    root, _ = read_nodes(pickle.dumps({"seen": VALUES["one kind"]}, protocol=2))
    runs = [update.args for node in iterate_nodes(root) for update in node.updates]
    assert sum(len(run) for run in runs if isinstance(run, Run)) == 70_000


def test_a_string_of_a_batch_can_be_used_again() -> None:
    """The memo numbers of its strings count as before, and the string is written once for all later uses."""
    names = [f"name {number}" for number in range(300)]
    value = {"names": names, "best": [(names[number % 300],) for number in range(5000)], "last": names[-1]}
    data = pickle.dumps(value, protocol=2)
    root, version = read_nodes(data)
    again = write_nodes(root, version, 10**6)
    assert pickle.loads(again) == value
    assert len(again) < 1.2 * len(data)


def test_a_key_that_a_batch_sets_twice_is_known() -> None:
    """Its first value is lost, as in Python."""
    data = b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00bK\x02" * 20 + b"X\x01\x00\x00\x00aK\x03u."
    interpreter = Interpreter({}, {})
    assert parse_pickle(data, interpreter)[0] == {"a": 3, "b": 2}
    assert interpreter.repeated == "a"
    numbers = b"".join(b"K%cM\x00\x01" % number for number in range(40))
    interpreter = Interpreter({}, {})
    again = b"\x80\x02}(" + numbers + b"u(" + numbers.replace(b"\x00\x01", b"\x01\x01") + b"u."
    assert parse_pickle(again, interpreter)[0] == dict.fromkeys(range(40), 257)
    assert interpreter.repeated == "0"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x02}(" + b"K\x01" * 41 + b"u.", "a key without a value"),
        (b"\x80\x02](" + b"N" * 40 + b"X\x01\x00\x00\x00\xffe.", "can't decode"),
        (b"\x80\x02}(\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\x01" + b"NN" * 40 + b"u.", "an integer of 63 bits"),
        (b"\x80\x02}(" + b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\x01" * 40 + b"u.", "an integer of 63 bits"),
        (b"\x80\x02](" + b"N" * 40 + b"K", "has no end"),
    ],
    ids=["odd", "not text", "long key", "long keys", "no end"],
)
def test_limits_hold_in_batches(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        made(data)


def test_the_steps_of_a_batch_count() -> None:
    """The limits on steps and objects hold for batches too."""
    interpreter = Interpreter({}, {})
    parse_pickle(pickle.dumps(VALUES["one kind"], protocol=2), interpreter)
    assert interpreter.steps >= 70_000


@pytest.mark.parametrize(("longest", "is_read"), [(31, True), (32, False)])
def test_short_strings_of_a_mapping_count_as_half_an_object(
    monkeypatch: pytest.MonkeyPatch, longest: int, *, is_read: bool
) -> None:
    """A mapping of a million names to texts, such as a vocabulary, is read and edited: here with fewer."""
    monkeypatch.setattr("ckptkit.formats.pickle.machine._MOST_OBJECTS", 80_000)
    texts = {f"{number:0{longest}}": f"{-number:0{longest}}" for number in range(70_000)}
    data = pickle.dumps(texts, protocol=2)
    if is_read:
        assert made(data) == texts
        return
    with pytest.raises(FormatError, match="more than 80,000 objects"):
        made(data)


def test_damaged_batches_are_read_as_pickle_reads_them() -> None:
    """A changed byte gives the value that pickle makes, or an error."""
    data = pickle.dumps({"a": [1, 300, 70_000, 0.5, None, "x"] * 9, "b": {f"k{n}": n for n in range(40)}}, protocol=2)
    numbers = random.Random(0)  # noqa: S311 - the same damage in each run
    for _ in range(600):
        damaged = bytearray(data)
        damaged[numbers.randrange(2, len(data))] = numbers.choice(b"()KMJGNX\x88\x8aque.tbs01")
        try:
            found = made(bytes(damaged))
        except FormatError:
            continue
        try:
            expected = pickle.loads(bytes(damaged))
        except Exception:  # noqa: BLE001, S112 - pickle refuses more
            continue
        assert repr(found) == repr(expected)


def test_an_edit_keeps_large_containers(tmp_path: Path) -> None:
    """torch reads the same lists and mappings beside the renamed weights."""
    state = {"model": {"w": torch.ones(3)}, "seen": VALUES["one kind"], "scores": VALUES["by name"]}
    torch.save(state, tmp_path / "in.pt")
    with open_checkpoint(tmp_path / "in.pt") as checkpoint:
        execute(plan_remap(checkpoint, ["w=v"]), checkpoint, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["seen"] == state["seen"]
    assert found["scores"] == state["scores"]
    assert torch.equal(found["model"]["v"], torch.ones(3))
