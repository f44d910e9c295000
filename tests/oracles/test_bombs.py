"""Small files that expand: reading one ends soon and in little memory, with a list or an error."""

from __future__ import annotations

import io
import pickletools
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckptkit.formats.pickle import machine
from ckptkit.formats.torch.objects import TorchObjects
from tests.helpers_formats import (
    call,
    f32,
    get,
    glob,
    keyed_by,
    laughs,
    legacy_file,
    mapping,
    number,
    put,
    rezip,
    safetensors_file,
    saved,
    several,
    storage,
    tensor,
    text,
    torch_zip,
    with_weights,
    write,
)
from tests.hostile.contract import Accepted, assert_accepted, assert_refused, run_limited, written
from tests.hostile.test_c_pickle import SLOW, SMALL_FILES_THAT_BUILD_MUCH, batches, beside_weights
from tests.hostile.test_e_names import crowd

WEIGHTS = tensor()
CHILD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from ckptkit.errors import CkptkitError
from ckptkit.formats import open_checkpoint
try:
    with open_checkpoint(sys.argv[1]) as checkpoint:
        print("listed", len(checkpoint), sum(len(str(entry)) for entry in checkpoint.entries) < 10_000_000)
except CkptkitError as error:
    print("refused", len(error.reason) < 1000, error.reason[:200])
"""


WIDE = b"}(" + b"".join(text(str(index)) + b"N" for index in range(50_000)) + b"u" + put(1)
NAMES = b"ABCD"
BOMBS: dict[str, Callable[[], bytes]] = {
    "C7 one long tuple as key, often": lambda: torch_zip(
        b"(" + b"N" * 500_000 + b"t" + put(0) + b"0" + keyed_by(*[get(0)] * 4000)
    ),
    "C7 frozensets as keys": lambda: torch_zip(keyed_by(laughs(40, b"(", b"\x91"), laughs(40, b"(", b"\x91"))),
    "C7 complex keys that collide": lambda: torch_zip(
        keyed_by(*(call("builtins.complex", number(-1_000_003 * n), number(n)) for n in range(30_000)))
    ),
    "C7 the same from pairs": lambda: torch_zip(
        call(
            "collections.OrderedDict",
            b"]("
            + b"".join(
                several(call("builtins.complex", number(-1_000_003 * n), number(n)), b"N") for n in range(30_000)
            )
            + b"e",
        )
    ),
    "C8 laughs beside the weights": lambda: torch_zip(
        mapping({"model": mapping({"w": WEIGHTS}), "x": laughs(60)} | {str(n): get(60 - n % 9) for n in range(20_000)})
    ),
    "C8 laughs as a class": lambda: torch_zip(laughs(60) + b")R"),
    "C8 laughs as a device": lambda: torch_zip(mapping({"w": WEIGHTS, "x": call("torch.device", laughs(60))})),
    "C8 laughs as a layout": lambda: torch_zip(call("torch.serialization._get_layout", laughs(60))),
    "C8 laughs as a source file": lambda: legacy_file(several(text("module"), b"N", laughs(60), b"N") + b"Q"),
    "C8 wide mappings behind many names": lambda: torch_zip(
        WIDE + b"0" + mapping({str(n): b"}" + text("model") + get(1) + b"s" for n in range(20_000)})
    ),
    "C8 wide mappings as entries": lambda: torch_zip(
        WIDE + b"0" + mapping({"model": mapping({"w": WEIGHTS})} | {str(n): get(1) for n in range(20_000)})
    ),
    "C8 long names, nested": lambda: torch_zip(
        text("x" * 1_000_000) + put(0) + b"0" + (b"}" + get(0)) * 150 + b"](" + b"N" * 1000 + b"e" + b"s" * 150
    ),
    "C9 100,000 dicts": lambda: torch_zip((b"}" + text("x")) * 100_000 + b"N" + b"s" * 100_000),
    "C9 100,000 objects": lambda: torch_zip(
        mapping({"w": WEIGHTS, "x": glob("a.b") * 100_000 + b")" + b"\x85R" * 100_000})
    ),
    "C9 100,000 rebuilds": lambda: torch_zip(
        (
            b"("
            + (glob("torch._tensor._rebuild_from_type_v2") + b"N(") * 50_000
            + b"N" * 3
            + b"tNt"
            + b"Nt" * 49_999
            + b"R"
        )[1:]
    ),
    "C10 a dict in itself": lambda: torch_zip(b"}" + put(0) + text("model") + get(0) + b"s"),
    "C11 tuple keys": lambda: torch_zip(keyed_by(*(b"(" + number(n * (2**61 - 1)) + b"t" for n in range(50_000)))),
    "C11 memo indexes": lambda: torch_zip(b"}" + b"".join(b"p%d\n" % (n * (2**61 - 1)) for n in range(1, 50_000))),
    "C16 a storage of 2^60": lambda: with_weights(x=tensor(storage("9", 2**60))),
    "OrderedDict by memo": lambda: torch_zip(
        b"]("
        + several(text("a"), b"N") * 10_000
        + b"e"
        + put(0)
        + b"0]("
        + (glob("collections.OrderedDict") + b"(" + get(0) + b"tR") * 20_000
        + b"e"
    ),
    "list by memo": lambda: torch_zip(
        b"]("
        + b"N" * 100_000
        + b"e"
        + put(0)
        + b"0]("
        + (glob("builtins.list") + b"(" + get(0) + b"tR") * 20_000
        + b"e"
    ),
    "sparse parts by memo": lambda: torch_zip(
        b"("
        + b"N" * 500_000
        + b"t"
        + put(0)
        + b"0]("
        + (glob("torch._utils._rebuild_sparse_tensor") + b"(" + text("torch.sparse_coo") + get(0) + b"tR") * 20_000
        + b"e"
    ),
    "a shape by memo": lambda: torch_zip(
        b"(" + number(2**62) * 500_000 + b"t" + put(0) + b"0" + call("torch.Size", get(0)) * 2 + b"\x86"
    ),
    "16 MB of sets, deflated": lambda: rezip(torch_zip(b"\x8f" * 16_000_000), method=zipfile.ZIP_DEFLATED),
    "16 MB of lists, deflated": lambda: rezip(torch_zip(b"]" * 16_000_000), method=zipfile.ZIP_DEFLATED),
    "2 MB of sets": lambda: torch_zip(b"\x8f" * 2_000_000),
    "a name of accents": lambda: safetensors_file({"a" + "\u0300\u0316" * 200_000: f32(0, 0, (0,))}),
    "names that expand when they are compared": lambda: torch_zip(
        b"}("
        + text("a")
        + tensor()
        + put(7)
        + text("\ufdfa" * 390)
        + b"}("
        + b"".join(b"M" + struct.pack("<H", index) + get(7) for index in range(60_000))
        + b"uu"
    ),
    "a legacy file with room": lambda: legacy_file(b"X\xff\xff\xff\x7f", ()),
}


EDIT = CHILD.replace("from ckptkit.formats import open_checkpoint", "from ckptkit import *").replace(
    "        print(",
    """        if len(checkpoint):
            output = choose_output(sys.argv[1] + ".out.pt", keep_unknown=True)
            execute(plan_remap(checkpoint, ["*=x.*"]), checkpoint, output)
        print(""",
)


@pytest.mark.parametrize("name", ["C8 laughs beside the weights", "C8 wide mappings as entries", "C9 100,000 objects"])
def test_what_can_be_listed_can_be_edited_or_is_refused(tmp_path: Path, name: str) -> None:
    """Editing keeps the expanding values beside the weights, within the same limits."""
    path = write(tmp_path, BOMBS[name]())
    done = subprocess.run([sys.executable, "-c", EDIT, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(f"{path}.out.pt").exists()


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_as_a_list_or_a_refusal(tmp_path: Path, name: str) -> None:
    """The child process has limits of memory and CPU time; reaching a limit fails the test."""
    path = write(tmp_path, BOMBS[name]())
    done = subprocess.run([sys.executable, "-c", CHILD, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"listed \d+ True|refused True \S", done.stdout), done.stdout


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_a_file_of_140_000_tensors_stays_below_the_limits(kind: type[torch.Tensor]) -> None:
    """Counted in a file of 500 tensors, because reading the large one takes seconds."""
    state = {f"model.layers.{number_}.weight": kind(torch.zeros(300, 300).half()) for number_ in range(500)}
    pickle = zipfile.ZipFile(io.BytesIO(saved(state))).read("archive/data.pkl")
    run = machine.PickleMachine(pickle, TorchObjects().interpreter, 0)
    before = sys.getallocatedblocks()
    tree, _ = run.run(machine.OPCODES)
    objects = sys.getallocatedblocks() - before
    assert isinstance(tree, dict)
    assert (len(tree), run.storages) == (500, 500)
    most_storages = machine._MOST_STORAGES
    most_opcodes = machine._MOST_OPCODES + machine._OPCODES_PER_STORAGE * most_storages
    most_objects = machine._MOST_OBJECTS + machine._OBJECTS_PER_STORAGE * most_storages
    assert 280 * sum(1 for _ in pickletools.genops(pickle)) < most_opcodes * 0.7
    assert 280 * objects < most_objects * 0.75
    assert 280 * len(run.memo) < machine._MOST_REFERENCES * 0.9
    assert 280 * (machine._MOST_ITEMS - run.items_left) < machine._MOST_ITEMS / 1.5


def test_a_list_of_millions_of_numbers_is_read(tmp_path: Path) -> None:
    """The losses of a long run fit the same limits of time and memory."""
    numbers = written(lambda: beside_weights(batches(b"G" + bytes(8), 2_600_000)))
    assert_accepted(tmp_path, Accepted(numbers, "", "2,600,000 items"))


@pytest.mark.parametrize("name", SLOW)
def test_a_small_pickle_that_builds_much_is_refused(name: str, tmp_path: Path) -> None:
    """The rows that the first tier leaves out."""
    assert_refused(tmp_path, SMALL_FILES_THAT_BUILD_MUCH[name])


@pytest.mark.parametrize(
    "seen",
    [{7 * number: number / 3 for number in range(10**6)}, {f"{number:07d}": number / 3 for number in range(10**6)}],
    ids=["by number", "by name"],
)
def test_a_file_with_a_mapping_of_a_million_numbers_can_be_edited(seen: dict[object, float], tmp_path: Path) -> None:
    """In the memory that every run may use, and torch reads the same mapping afterwards."""
    torch.save({"model": {"w": torch.ones(2)}, "seen": seen}, tmp_path / "in.pt")
    ran = run_limited("remap", tmp_path / "in.pt", "--rename", "w=v", "-o", tmp_path / "out.pt")
    assert ran.code == 0, ran.err
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["seen"] == seen
    assert list(found["model"]) == ["v"]


def test_e12_too_many_tensors_are_refused(tmp_path: Path) -> None:
    """The error gives the limit that stopped the reader."""
    (tmp_path / "x.pt").write_bytes(crowd(2_000_000))
    ran = run_limited("show", tmp_path / "x.pt")
    assert (ran.code, ran.out) == (2, "")
    assert "builds more than 2,500,000 references to objects" in ran.err
    assert "Traceback" not in ran.err
