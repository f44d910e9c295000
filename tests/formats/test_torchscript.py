"""TorchScript archives give the state_dict of torch.jit.load and the constants; their code is never read."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ckptkit import run_checks
from ckptkit.cli import main
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from tests.helpers_cli import run_ckpt
from tests.helpers_formats import (
    assert_same,
    bits,
    call,
    glob,
    mapping,
    number,
    opened,
    pickled,
    refused,
    rezip,
    several,
    storage,
    tensor,
    text,
    write,
    zip_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore:Lite Interpreter is deprecated"),
]
jit: Any = torch.jit


class Part(nn.Module):
    """A module with every kind of attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.arange(4.0)
        self.register_buffer("table", torch.arange(3, dtype=torch.int16))
        self.weight = nn.Parameter(torch.randn(2, 3).T)
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_parameter("nothing", None)
        self.register_buffer("empty", None)
        self.several = [torch.ones(1), torch.zeros(2)]
        self.count = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.weight + self.plain.sum() + self.several[0] + self.count
        return x + self.scratch + self.table.sum()  # type: ignore[operator]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2)
        self.part = Part()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))])
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.last.weight
        self.again: nn.Module = self.part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.part(x)
        for layer in self.layers:
            x = layer(x)
        made: torch.Tensor = self.tied(self.last(x)) + self.again(torch.ones(1, 3))
        return made


def saved(module: Any) -> bytes:
    buffer = io.BytesIO()
    jit.save(module, buffer)
    return buffer.getvalue()


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


NO_ROWS = torch.zeros(0, 2)


class Empty(nn.Module):
    """A module whose traced code has one constant, which is empty."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, NO_ROWS])


@functools.cache
def scripted() -> bytes:
    return saved(jit.script(net()))


@functools.cache
def traced() -> bytes:
    return saved(jit.trace(net(), torch.ones(2, 3)))


@functools.cache
def frozen() -> bytes:
    module = net()
    module.again = nn.Linear(3, 2)  # torch.jit.freeze rejects a module that is used twice
    return saved(jit.freeze(jit.script(module)))


def records(data: bytes, home: str) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [name for name in archive.namelist() if f"/{home}/" in name]


def saved_twice() -> bytes:
    return saved(jit.load(io.BytesIO(scripted())))


def lite() -> bytes:
    return bytes(jit.script(net())._save_to_buffer_for_lite_interpreter())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(scripted, id="scripted"),
        pytest.param(traced, id="traced, with constants in the code"),
        pytest.param(saved_twice, id="loaded and saved"),
        pytest.param(lite, id="for the lite interpreter"),
        pytest.param(lambda: rezip(scripted(), method=zipfile.ZIP_DEFLATED), id="deflated"),
    ],
)
def test_a_module_is_the_state_dict_that_torch_loads(tmp_path: Path, data: Any) -> None:
    path = write(tmp_path, data())
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "torchscript"
        assert_same(checkpoint, jit.load(path).state_dict())
        assert checkpoint["tied.weight"].view == checkpoint["last.weight"].view
        assert checkpoint["again.weight"].view == checkpoint["part.weight"].view
        assert checkpoint.references == ()


def test_attributes_outside_the_state_dict_are_named(tmp_path: Path) -> None:
    """A warning names the attributes, and no warning concerns the compressed code."""
    with opened(tmp_path, scripted()) as checkpoint:
        assert checkpoint.warnings == ("2 tensor attributes not in the state_dict: part.plain, again.plain",)
    with opened(tmp_path, rezip(scripted(), method=zipfile.ZIP_DEFLATED)) as checkpoint:
        assert any("the archive is compressed" in line for line in checkpoint.warnings)


def test_constants_of_the_code_lie_beside_the_state_dict(tmp_path: Path) -> None:
    path = write(tmp_path, traced())
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.envelope == "state_dict"
        assert [entry.path for entry in checkpoint.entries] == ["CONSTANTS"]
        assert any("and no other tensors: 'CONSTANTS'" in line for line in checkpoint.warnings)
    expected = {
        tuple(value.shape): bits(value) for value in jit.load(path).code_with_constants[1].const_mapping.values()
    }
    with open_checkpoint(f"{path}::CONSTANTS") as checkpoint:
        assert {info.shape: checkpoint.read_bytes(key) for key, info in checkpoint.items()}.items() >= expected.items()


def test_an_empty_constant_is_not_said_to_be_unread(tmp_path: Path) -> None:
    """An empty tensor holds no weights, so there is nothing to choose."""
    with opened(tmp_path, saved(jit.trace(nn.Sequential(nn.Linear(2, 2), Empty()), torch.ones(2, 2)))) as checkpoint:
        assert checkpoint.envelope == "state_dict"
        assert checkpoint.warnings == ()


def test_a_frozen_module_is_its_constants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The constants have the names that the code uses."""
    path = write(tmp_path, frozen())
    loaded = jit.load(path)
    assert not loaded.state_dict()
    constants = loaded.code_with_constants[1].const_mapping
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.envelope == "CONSTANTS"
        assert any("a frozen module" in line for line in checkpoint.warnings)
        assert {key: checkpoint.read_bytes(key) for key in constants} == {
            key: bits(value) for key, value in constants.items()
        }
        assert len(checkpoint) == len(records(frozen(), "constants"))
    assert main(["convert", path, "-o", str(tmp_path / "made.safetensors")]) == 0
    capsys.readouterr()
    made = load_file(tmp_path / "made.safetensors")
    assert {key: bits(made[key]) for key in constants} == {key: bits(value) for key, value in constants.items()}


def test_the_code_is_never_opened(tmp_path: Path) -> None:
    """The test replaces the code with text that torch cannot parse."""
    garbage: dict[str, bytes | None] = dict.fromkeys(records(scripted(), "code"), b"os.system('true') \0\xff")
    assert garbage
    path = write(tmp_path, rezip(scripted(), garbage))
    with pytest.raises(RuntimeError):
        jit.load(path)
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, jit.load(io.BytesIO(scripted())).state_dict())


def test_an_archive_of_an_older_torch_lists_all_attributes(tmp_path: Path) -> None:
    """Old archives have no order of attributes, and only the code names the parameters, so all are listed."""
    with opened(tmp_path, rezip(scripted(), {"archive/byteorder": None})) as checkpoint:
        state = jit.load(io.BytesIO(scripted())).state_dict()
        assert checkpoint.keys() - state.keys() == {"part.plain", "again.plain"}
        assert state.keys() <= checkpoint.keys()
        assert any(line.startswith("written before torch 2.1") for line in checkpoint.warnings)


def made(kind: str, state: bytes) -> bytes:
    return glob(kind) + b")\x81" + state + b"b"


def script(body: bytes, constants: bytes = b")", **more: bytes) -> bytes:
    """Return an archive of handmade pickles, with one storage of 16 bytes for each pickle."""
    entries = {"data.pkl": pickled(body), "constants.pkl": pickled(constants), "byteorder": b"little"}
    entries |= {
        "data/0": bytes(range(16)),
        "constants/0": bytes(16),
        **{k.replace("_", "/"): v for k, v in more.items()},
    }
    return zip_of([(f"archive/{name}", content) for name, content in entries.items()])


MODULE = made("__torch__.Net", mapping({"w": tensor(), "training": b"\x89"}))


def test_the_storages_of_both_pickles_are_told_apart(tmp_path: Path) -> None:
    data = script(MODULE, several(tensor()))
    with opened(tmp_path, data) as checkpoint:
        assert checkpoint.read_bytes("w") == bytes(range(16))
    with open_checkpoint(f"{tmp_path}/file.pt::CONSTANTS") as checkpoint:
        assert checkpoint.read_bytes("c0") == bytes(16)


def test_an_object_that_is_not_a_module_has_no_state_dict(tmp_path: Path) -> None:
    """As in torch, the attributes of an instance of a TorchScript class are not listed."""
    helper = made("__torch__.Helper", mapping({"hidden": tensor()}))
    data = script(made("__torch__.Net", mapping({"w": tensor(), "training": b"\x89", "helper": helper})))
    with opened(tmp_path, data) as checkpoint:
        assert list(checkpoint) == ["w"]


def nested(depth: int) -> bytes:
    body = MODULE
    for _ in range(depth):
        body = made("__torch__.Net", mapping({"training": b"\x89", "m": body}))
    return body


def laughing(levels: int) -> bytes:
    """Return modules that each hold the next one twice: 2^levels modules in a few kilobytes."""
    body = MODULE + b"q\x00"
    for level in range(levels):
        state = (
            b"}("
            + text("training")
            + b"\x89"
            + text("a")
            + b"h"
            + bytes([level])
            + text("b")
            + b"h"
            + bytes([level])
            + b"u"
        )
        body += b"0" + made("__torch__.Net", state) + b"q" + bytes([level + 1])
    return body


HOSTILE = {
    "no module": (script(b"}"), "a TorchScript archive without a module"),
    "a tensor": (script(tensor()), "a TorchScript archive without a module"),
    "no constants": (script(MODULE, b"}"), "a TorchScript archive without a module"),
    "big-endian": (script(MODULE, byteorder=b"big"), "a TorchScript archive of a big-endian machine"),
    "key of the other pickle": (
        script(made("__torch__.Net", mapping({"w": tensor(storage("constants/0"))}))),
        "names storages that belong to another pickle",
    ),
    "no record": (script(MODULE, several(tensor(storage("1")))), None),
    "record too short": (
        script(made("__torch__.Net", mapping({"w": tensor(storage("0", 5)), "training": b"\x89"}))),
        "storage '0': the pickle says 20 bytes, the archive has 16",
    ),
    "nested": (script(nested(300)), "modules are nested too deeply"),
    "laughs": (script(laughing(60)), "expand too far"),
    "constants of another root": (
        zip_of([("a/data.pkl", pickled(b")")), ("b/constants.pkl", pickled(b")"))]),
        "constants.pkl and data.pkl are in different folders",
    ),
    "two modules": (
        zip_of([(f"{r}/{n}.pkl", pickled(b")")) for r in "ab" for n in ("data", "constants")]),
        "2 entries",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_archive_that_contradicts_itself_is_refused(tmp_path: Path, name: str) -> None:
    data, reason = HOSTILE[name]
    if reason is None:  # missing constants matter only if something uses them
        with opened(tmp_path, data) as checkpoint:
            assert list(checkpoint) == ["w"]
        with pytest.raises(FormatError, match="storage 'constants/1' is not in the archive"):
            open_checkpoint(f"{tmp_path}/file.pt::CONSTANTS")
        return
    error = refused(tmp_path, data)
    assert isinstance(error, FormatError)
    assert reason in error.reason


def test_code_that_pickles_name_is_listed_and_not_run(tmp_path: Path) -> None:
    body = made("__torch__.Net", mapping({"w": tensor(), "x": call("os.system", text("true")), "n": number(1)}))
    with opened(tmp_path, script(body)) as checkpoint:
        assert checkpoint.references == ("os.system",)
        assert checkpoint.suspicious


@pytest.mark.parametrize("name", ["attribute", "frozen"])
def test_what_the_reader_cannot_know_is_a_note(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A healthy archive has no finding above a note, and ``show`` prints a note."""
    module = torch.nn.Linear(2, 2)
    module.extra = torch.ones(3)
    script = torch.jit.script(module.eval())
    torch.jit.save(torch.jit.freeze(script) if name == "frozen" else script, tmp_path / "script.pt")
    assert {finding.severity for finding in run_checks(tmp_path / "script.pt").findings} == {"note"}
    ran = run_ckpt(capsys, "show", tmp_path / "script.pt")
    assert (ran.code, "script.pt: note: " in ran.err, "warning" in ran.err) == (0, True, False)
