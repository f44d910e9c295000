"""open_checkpoint recognises any path by its content; an error is one line that names the path."""

from __future__ import annotations

import errno
import gzip
import os
import re
import socket
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from ckptkit.core.files.payloads import Extent
from ckptkit.errors import CkptkitError, FormatError, ModelError, PathError
from ckptkit.formats import open_checkpoint
from ckptkit.formats.live import build_model
from tests.helpers_formats import (
    assert_same,
    bits,
    f32,
    opened,
    refusal,
    refused,
    safetensors_file,
    saved,
    write,
    zip_of,
)

STATE = {"w": torch.arange(4.0)}
GOOD = safetensors_file({"w": f32(0, 16, [4])}, bits(STATE["w"]))

NO_CHECKPOINT = [
    pytest.param(b"", "the file is empty", id="A1 empty"),
    pytest.param(b"P", "too short to be a checkpoint: 1 bytes", id="A2 one byte"),
    pytest.param(b"PK\3\4", "no directory at its end", id="A2 a zip's first bytes"),
    pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer", id="A3 pointer"),
    pytest.param(b"<!DOCTYPE html><html>404</html>", "an HTML page, not a checkpoint", id="A4 HTML"),
    pytest.param(b"\r\n <html lang='en'>", "an HTML page, not a checkpoint", id="A4 HTML behind blanks"),
    pytest.param(b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an HTML page", id="A4 XML of a bucket"),
    pytest.param(b"\0" * 4096, "only zero bytes", id="A5 zeros"),
    pytest.param(b"\0" * 4, "only zero bytes", id="A5 four zeros"),
    pytest.param(gzip.compress(GOOD), "a gzip-compressed file", id="A6 gzip"),
    pytest.param(b"BZh91AY", "a bzip2-compressed file", id="A6 bzip2"),
    pytest.param(b"\x28\xb5\x2f\xfd" + bytes(20), "a zstd-compressed file", id="A6 zstd"),
    pytest.param(b"7z\xbc\xaf\x27\x1c" + bytes(20), "a 7-zip archive", id="A6 7z"),
    pytest.param(b"hello, world, this is text", "a text file, which holds no tensors", id="A7 text"),
    pytest.param(b"\xc3\xa9" * 255 + b"\xe2\x82\xac" * 3, "a text file, which holds no tensors", id="A7 text, cut"),
    pytest.param(b"\x1bnot \x00text", "unknown format: the first bytes are 1b 6e 6f 74 20 00 74 65", id="A7 other"),
    pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(20), "a PNG picture", id="A7 PNG"),
    pytest.param(bytes(257) + b"ustar" + b"x" * 300, "a tar archive", id="A7 tar"),
    pytest.param(b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file", id="A14 HDF5"),
    pytest.param(
        zip_of([("m/data.pkl", b"}."), ("m/constants.pkl", b").")]), "a TorchScript archive", id="TorchScript"
    ),
    pytest.param(b"\x80\x02}q\0.", "a bare pickle, not a file of torch.save", id="a bare pickle"),
    pytest.param(
        b"\x80\x04\x95" + bytes(30), "a bare pickle, not a file of torch.save", id="a bare pickle, protocol 4"
    ),
]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin.incomplete", ""])
@pytest.mark.parametrize(("data", "reason"), NO_CHECKPOINT)
def test_a_file_of_another_format_is_named_by_its_content(
    tmp_path: Path, data: bytes, reason: str, suffix: str
) -> None:
    error = refused(tmp_path, data, f"file{suffix}")
    assert isinstance(error, FormatError)
    assert reason in error.reason
    assert error.path == str(tmp_path / f"file{suffix}")


def test_a_pickled_object_is_refused_with_a_hint(tmp_path: Path) -> None:
    error = refused(tmp_path, saved(torch.Generator()))
    assert "a pickled object of class" in error.reason
    assert "not a state_dict" in error.reason
    assert error.hint == "save the state_dict() of the object instead"


def test_a_directory_of_distributed_shards_without_readable_metadata_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"x")
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    assert isinstance(refusal(str(tmp_path)), FormatError)


@pytest.mark.parametrize(
    "what", ["missing", "missing directory", "file as directory", "dangling", "loop", "NUL", "long", "no name"]
)
def test_a_path_without_a_file_is_refused_with_a_reason(tmp_path: Path, what: str) -> None:
    (tmp_path / "dangling").symlink_to("gone.pt")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(GOOD)
    paths = {
        "missing": (str(tmp_path / "no.pt"), "no such file or directory"),
        "missing directory": (str(tmp_path / "no/such/file.pt"), "no such file or directory"),
        "file as directory": (str(tmp_path / "file/x.pt"), "not a directory"),
        "dangling": (str(tmp_path / "dangling"), "a symbolic link to 'gone.pt', which does not exist"),
        "loop": (str(tmp_path / "loop"), "too many levels of symbolic links"),
        "NUL": (str(tmp_path / "a\0b"), "null"),
        "long": (str(tmp_path / ("x" * 5000)), "file name too long"),
        "no name": ("", "the path is empty"),
    }
    path, reason = paths[what]
    with pytest.raises(PathError) as caught:
        open_checkpoint(path)
    assert reason in caught.value.reason
    assert caught.value.path == path


@pytest.mark.parametrize("what", ["fifo", "socket", "device", "link to a fifo"])
def test_a_special_file_is_refused_without_waiting_for_it(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A10: opening a FIFO without a writer would never return, and reading /dev/zero never ends."""
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    os.mkfifo("fifo")
    os.symlink("fifo", "link to a fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        error = refusal("/dev/zero" if what == "device" else what)
    assert isinstance(error, PathError)
    assert error.reason == "not a regular file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("directory", [False, True])
def test_a_file_without_permission_is_refused(tmp_path: Path, directory: bool) -> None:
    target = tmp_path / "x"
    target.mkdir() if directory else target.write_bytes(GOOD)
    target.chmod(0)
    error = refusal(str(target))
    target.chmod(0o700)
    assert isinstance(error, PathError)
    assert error.reason == "permission denied"


@pytest.mark.parametrize(
    ("data", "name", "warning"),
    [
        pytest.param(GOOD, "x.pt", "the file name says torch, but the content is safetensors", id="A12 as .pt"),
        pytest.param(
            saved(STATE), "x.safetensors", "the file name says safetensors, but the content is torch-zip", id="A12 zip"
        ),
        pytest.param(saved(STATE, legacy=True), "x.safetensors", "the content is torch-legacy", id="A12 legacy"),
        pytest.param(GOOD, "x.safetensors", "", id="the right name"),
        pytest.param(saved(STATE), "x.anything", "", id="a name that says nothing"),
        pytest.param(saved(STATE), "x", "", id="a name without a suffix"),
    ],
)
def test_the_content_decides_and_a_warning_names_a_wrong_suffix(
    tmp_path: Path, data: bytes, name: str, warning: str
) -> None:
    with opened(tmp_path, data, name) as checkpoint:
        assert_same(checkpoint, STATE)
        assert len(checkpoint.warnings) == bool(warning)
        assert warning in "".join(checkpoint.warnings)


@pytest.mark.parametrize("name", ["a b.pt", "ü.pt", "a::b.pt", "./a://b.pt", "-x.pt", "a\nb.pt", os.fsdecode(b"\xff")])
def test_a_path_may_have_any_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(saved({"m": {"w": STATE["w"]}, "epoch": 1}))
    with open_checkpoint(name) as checkpoint:
        assert_same(checkpoint, STATE)
    with open_checkpoint(f"{name}::m") as checkpoint:
        assert_same(checkpoint, STATE)


@pytest.mark.parametrize("key", ["a::b", "['a::b']", "['a::b'].m"])
def test_a_mapping_inside_may_have_colons_in_its_name(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, saved({"a::b": {"m": {"w": STATE["w"]}, "w": STATE["w"]}, "c": 1}))
    with open_checkpoint(f"{path}::{key}") as checkpoint:
        assert set(checkpoint) == ({"w"} if key.endswith("m") else {"w", "m.w"})


def test_a_flat_file_has_no_mapping_inside(tmp_path: Path) -> None:
    error = refusal(f"{write(tmp_path, GOOD, 'x.safetensors')}::a.b")
    assert "holds only tensors, and not a mapping 'a.b'" in error.reason
    assert error.hint == "without the :: part, --keep 'a.b.*' selects keys by their names"


def test_a_module_that_is_taken_for_a_mapping_gets_the_mapping_that_has_it(tmp_path: Path) -> None:
    weights = {"net.fc.w": STATE["w"]}
    path = write(tmp_path, saved({"model": weights, "ema": {"module.net.fc.w": STATE["w"]}, "epoch": 1}))
    assert refusal(f"{path}::net.fc").hint == "with '::model' alone, --keep 'net.fc.*' selects keys by their names"
    assert refusal(f"{path}::fc").hint == "the keys at that level: model, ema, epoch"
    path = write(tmp_path, saved({"model": weights, "ema": weights}), "two.pt")
    assert refusal(f"{path}::net").hint == "the keys at that level: model, ema"


@pytest.mark.parametrize("call", ["pread", "preadv"])
def test_a_disk_that_fails_is_a_refusal_that_names_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The error names the input, not the output, and there is no traceback."""

    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    path = write(tmp_path, GOOD)
    with open_checkpoint(path) as checkpoint:
        file = checkpoint.payload("w")
        assert isinstance(file, Extent)
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(PathError, match="stale file handle") as caught:
            file.file.read(0, 1) if call == "pread" else checkpoint.read_bytes("w")
    assert caught.value.path == path


def test_a_closed_checkpoint_releases_its_file(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    checkpoint = opened(tmp_path, GOOD)
    checkpoint.close()
    checkpoint.close()
    for data, _ in (param.values for param in NO_CHECKPOINT):
        with pytest.raises(CkptkitError):
            opened(tmp_path, data)  # type: ignore[arg-type]
    assert (set(os.listdir("/proc/self/fd")) if before else before) <= before


MODULE = """
    import functools
    import sys
    import warnings
    import torch
    from torch import nn

    print("importing")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 3)
            with torch.no_grad():
                self.fc.weight.fill_(2.0)

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.tensor([float(torch.ones(1, device="cpu").item())]))
            if self.table.is_meta:
                raise RuntimeError("no meta device for me")

    class Asks(Net):  # its extra state has a value on no meta device
        def get_extra_state(self):
            print("on stdout")
            return {"norm": self.fc.weight.sum().item()}

        def set_extra_state(self, state):
            pass

    class Hopeless(Net):
        def get_extra_state(self):
            raise KeyError("no\x1b[2Jpe")

    def varying(meta, real):
        base = torch.arange(12.0)
        return (meta if base.is_meta else real)(base)

    def transposed():
        return varying(lambda base: {"w": base.view(3, 4).T, "v": base[:2]},
                       lambda base: {"w": base.view(4, 3), "v": base[:2]})

    def shifted():
        return varying(lambda base: {"w": base[:4]}, lambda base: {"w": base[4:8]})

    def untied():
        return varying(lambda base: {"w": base, "v": base, "other": base + 1},
                       lambda base: {"w": base, "v": base.clone(), "other": base + 1})

    def tied():
        return varying(lambda base: {"w": base, "v": base.clone()}, lambda base: {"w": base, "v": base})

    def same():
        base = torch.arange(12.0)
        return {"w": base.view(3, 4).T, "v": base[2:3], "other": base.clone(), "e": base[:0]}

    instance = Net()
    table = {"w": torch.ones(2)}
    number = 5

    def build():
        return Net()

    def pretrained():
        warnings.warn("the weights are old")
        net = Net()
        net.load_state_dict({"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3)})
        return net

    def fails():
        raise ValueError("no data set at hand\\nsecond line")

    def leaves():
        sys.exit(3)

    def wrong():
        return 5

    def demanding(size):
        return Net()

    class WithState:
        named_parameters = state_dict = dict

    def asks_inside():
        return demanding()

    def inside(size):
        return torch.nn.Linear(2, size, large=1)

    def raises_itself():
        error = ValueError("no data set at hand")
        raise error from error

    class Sized(torch.nn.Module):
        def __init__(self, size=3):
            super().__init__()
            self.fc = torch.nn.Linear(2, size)
            torch.nn.init.constant_(self.fc.weight, 2.0)

        @classmethod
        def make(cls, size):
            return cls(size)

    def downloads(pretrained=True):
        raise ConnectionError("no network")

    def sized(size=3, kind="", options=None):
        return Sized(size)

    @functools.lru_cache(maxsize=None)
    def constants(size):
        return {"eye": torch.eye(size)}

    @functools.lru_cache(maxsize=4)
    def norms(size):
        return [constants(size)["eye"].norm()]

    def keeps(size=2):
        net = Net()
        net.register_buffer("eye", constants(size)["eye"])
        return net

    def keeps_and_asks():
        assert norms(3)[0].item() > 1
        return keeps(3)
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "livemodels").mkdir()
    (tmp_path / "livemodels" / "__init__.py").write_text("")
    (tmp_path / "livemodels" / "nets.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "livemodels" / "broken.py").write_text("import no_such_module_at_all")
    (tmp_path / "livemodels" / "operator.py").write_text(
        "raise RuntimeError('operator torch_other::nms does not exist')"
    )
    (tmp_path / "livemodels" / "library.py").write_text(
        "raise OSError('Could not load this library: /v/site-packages/torch_other/a.so') from OSError('no libc10')"
    )
    (tmp_path / "livemodels" / "older.py").write_text("import json.no_such_part")
    (tmp_path / "livemodels" / "fails").mkdir()
    (tmp_path / "livemodels" / "fails" / "__init__.py").write_text("from livemodels.fails import inside")
    (tmp_path / "livemodels" / "fails" / "inside.py").write_text("raise RuntimeError('imported once')")
    (tmp_path / "livemodels" / "exits.py").write_text("raise SystemExit(0)")
    (tmp_path / "livemodels" / "syntax.py").write_text("def")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "livemodels"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["build", "Net", "instance"])
def test_a_live_model_is_a_checkpoint(modules: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with open_checkpoint(f"py:livemodels.nets:{name}") as checkpoint:
        assert {key: str(info) for key, info in checkpoint.items()} == {"fc.weight": "F32 [3, 2]", "fc.bias": "F32 [3]"}
        assert checkpoint.format == "live model"
        assert checkpoint.path == f"py:livemodels.nets:{name}"
        assert checkpoint.read_bytes("fc.weight") == bits(torch.full((3, 2), 2.0))
    assert capsys.readouterr().out == ""
    assert modules.exists()


def test_a_model_that_cannot_be_built_on_meta_is_built_on_its_device(modules: Path) -> None:
    with open_checkpoint("py:livemodels.nets:Stubborn") as checkpoint:
        assert_same(checkpoint, {"table": torch.ones(1)})
    with open_checkpoint("py:livemodels.nets:table") as checkpoint:
        assert_same(checkpoint, {"w": torch.ones(2)})
    assert isinstance(build_model("livemodels.nets:build", device="meta"), torch.nn.Module)
    assert modules.exists()


def test_a_model_that_loads_its_weights_gives_no_warning_of_the_meta_device(
    modules: Path, recwarn: pytest.WarningsRecorder
) -> None:
    with open_checkpoint("py:livemodels.nets:pretrained") as checkpoint:
        assert_same(checkpoint, {"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3)})
    assert {str(one.message) for one in recwarn} == {"the weights are old"}
    assert modules.exists()


def test_extra_state_that_needs_values_comes_from_a_second_build(
    modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_checkpoint("py:livemodels.nets:Asks") as checkpoint:
        assert [entry.path for entry in checkpoint.entries] == ["_extra_state"]
        assert checkpoint.read_bytes("fc.weight") == bits(torch.full((3, 2), 2.0))
    assert capsys.readouterr().out == ""
    assert modules.exists()


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(("name", "size"), [("keeps", 2), ("keeps_and_asks", 3)])
def test_a_build_on_the_meta_device_leaves_nothing_in_the_caches_of_the_code(name: str, size: int) -> None:
    """A function with a cache returns constants with values again, where the first build passed or failed."""
    with open_checkpoint(f"py:livemodels.nets:{name}") as checkpoint:
        assert checkpoint.read_bytes("eye") == bits(torch.eye(size))


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        ("sized(size=4)", (4, 2)),
        ("sized(size=4, kind='a)b', options={'x': [1, (2.5, None)]})", (4, 2)),
        ("Sized(size=5)", (5, 2)),
        ("Sized.make(size=6,)", (6, 2)),
        ("sized()", (3, 2)),
    ],
)
def test_a_callable_takes_literals_as_keyword_arguments(modules: Path, call: str, shape: tuple[int, ...]) -> None:
    """The model is built with the arguments, on the meta device and for its values."""
    with open_checkpoint(f"py:livemodels.nets:{call}") as checkpoint:
        assert checkpoint["fc.weight"].shape == shape
        assert checkpoint.read_bytes("fc.weight") == bits(torch.full(shape, 2.0))
    assert modules.exists()


@pytest.mark.parametrize("name", ["transposed", "shifted", "untied", "tied"])
def test_a_second_build_with_another_layout_is_refused(modules: Path, name: str) -> None:
    """The bytes of one layout with the views of another layout would be wrong."""
    with open_checkpoint(f"py:livemodels.nets:{name}") as checkpoint:
        for read in (checkpoint.payload, checkpoint.span):
            with pytest.raises(
                ModelError, match="'w' has other strides or ties when the model is built again"
            ) as caught:
                read("w")
            assert caught.value.hint
        if "other" in checkpoint:
            assert checkpoint.read_bytes("other") == bits(torch.arange(12.0) + 1)
    with open_checkpoint("py:livemodels.nets:same") as checkpoint:
        base = torch.arange(12.0)
        assert_same(checkpoint, {"w": base.view(3, 4).T, "v": base[2:3], "other": base, "e": base[:0]})
    assert modules.exists()


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("livemodels.none:build", "searched in the current directory and on sys.path"),
        (
            "no_such_module:build",
            "searched in the current directory and on sys.path: go where 'no_such_module' is, or set PYTHONPATH",
        ),
        ("livemodels.net:build", "did you mean 'py:livemodels.nets:build'?"),
        ("livemodels.nets.Sized", "did you mean 'py:livemodels.nets:Sized'?"),
        ("livemodels.nets.build", "did you mean 'py:livemodels.nets:build'?"),
        ("livemodels.nets", "write py:package.module:callable"),
        ("no_such_package.build", "write py:package.module:callable"),
        ("livemodels/nets.py:build", "did you mean 'py:livemodels.nets:build'?"),
        ("./livemodels/nets:build", "did you mean 'py:livemodels.nets:build'?"),
        ("/code/nets.py:build", "write 'py:nets:build', and set PYTHONPATH='/code'"),
        (
            "livemodels.broken:build",
            (
                f"the code imports 'no_such_module_at_all', which {sys.executable} does not have: "
                "install it there, or install ckptkit where the code runs"
            ),
        ),
        (
            "livemodels.older:build",
            (
                f"the code imports 'json.no_such_part', which {sys.executable} does not have: "
                "install it there, or install ckptkit where the code runs"
            ),
        ),
        ("livemodels.nets:sized(seize=4)", "did you mean 'size'?"),
        ("livemodels.nets:sized(large=4)", "it takes 'size', 'kind', 'options'"),
        (
            "livemodels.nets:downloads",
            "the code needs the network: an argument such as pretrained=False or weights=None may avoid it",
        ),
        ("livemodels.nets:sized(size=four)", "did you mean size='four'?"),
        ("livemodels.nets:sized(size=null)", "did you mean size=None?"),
        ("livemodels.syntax:build", None),
        (
            "livemodels.nets:Sized::fc",
            ":: selects a part of a file; for a part of a model, write a function that returns it",
        ),
        (
            "livemodels.operator:build",
            "torch_other was probably built for another torch: install versions of both that belong together",
        ),
        (
            "livemodels.library:build",
            "torch_other was probably built for another torch: install versions of both that belong together",
        ),
        ("livemodels.nets:sized(4, kind='x')", """did you mean "py:livemodels.nets:sized(size=4, kind='x')"?"""),
        (
            "livemodels.nets:sized(**{'size': 4})",
            "write py:package.module:callable(name=value), with Python literals as values",
        ),
        ("livemodels.nets:asks_inside", None),
        ("livemodels.nets:inside(size=3)", None),
        ("livemodels.nets:raises_itself", None),
        ("livemodels.exits.build", "did you mean 'py:livemodels.exits:build'?"),
        (
            "livemodels.nets:sized(4, size=4)",
            "write py:package.module:callable(name=value), with Python literals as values",
        ),
        ("livemodels.nets:fails", None),
    ],
)
def test_the_hint_says_what_to_write_or_to_install(modules: Path, target: str, hint: str | None) -> None:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(f"py:{target}")
    assert caught.value.hint == hint
    assert modules.exists()


def test_names_of_links_and_files_cannot_move_the_cursor(tmp_path: Path) -> None:
    (tmp_path / "link.pt").symlink_to("gone\x1b[2J")
    assert r"gone\x1b[2J" in refusal(str(tmp_path / "link.pt")).reason
    for directory, suffix in (("files", ".pt"), ("indexes", ".bin.index.json")):
        (tmp_path / directory).mkdir()
        for name in ("a\x1b[2J", "b"):
            (tmp_path / directory / f"{name}{suffix}").write_bytes(b"")
        reason = refusal(str(tmp_path / directory)).reason
        assert r"a\x1b[2J" in reason
        assert reason.isprintable()


def test_code_that_cannot_be_imported_is_imported_once(modules: Path) -> None:
    """A second import of code that failed can fail in another way, such as KeyError: 'fails'."""
    with pytest.raises(ModelError, match="failed: RuntimeError: imported once") as caught:
        open_checkpoint("py:livemodels.fails.inside:build")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.__context__ is caught.value.__cause__
    assert modules.exists()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        pytest.param("livemodels.nets:Hopeless", r"failed: KeyError: 'no\\x1b[2Jpe'", id="its extra state fails"),
        pytest.param("livemodels.nets", "does not name a callable", id="no colon"),
        pytest.param("livemodels.nets:", "does not name a callable", id="no name"),
        pytest.param(":build", "does not name a callable", id="no module"),
        pytest.param("", "does not name a callable", id="nothing"),
        pytest.param(
            "livemodels.none:build", "importing 'livemodels.none' failed: ModuleNotFoundError", id="no such module"
        ),
        pytest.param("livemodels.broken:build", "No module named 'no_such_module_at_all'", id="an import inside fails"),
        pytest.param(
            "livemodels.exits:build", "importing 'livemodels.exits' failed: SystemExit", id="the module exits"
        ),
        pytest.param("livemodels.syntax:build", "importing 'livemodels.syntax' failed: SyntaxError", id="no Python"),
        pytest.param("livemodels.nets:none", "'livemodels.nets' has no 'none'", id="no such name"),
        pytest.param("livemodels.nets:Net.none", "'livemodels.nets' has no 'Net.none'", id="no such attribute"),
        pytest.param("livemodels.nets:number", "'number' is an int, not a callable or a model", id="a number"),
        pytest.param("livemodels.nets:fails", "calling 'fails' failed: ValueError: no data set at hand", id="it fails"),
        pytest.param("livemodels.nets:WithState", "is a WithState", id="it returns an object with other methods"),
        pytest.param("livemodels.nets:leaves", "calling 'leaves' failed: SystemExit: 3", id="it exits"),
        pytest.param("livemodels.nets:wrong", "'wrong' returned an int, not a model", id="it returns a number"),
        pytest.param("livemodels.nets:demanding", "calling 'demanding' failed: TypeError", id="it wants arguments"),
        pytest.param("livemodels.nets:sized(4)", "'(4)' has arguments without a name", id="a position"),
        pytest.param("livemodels.library:x", "a.so, because of OSError: no libc10", id="an error because of another"),
        pytest.param("livemodels.nets:sized(**{'size': 4})", "has arguments without a name", id="a mapping"),
        pytest.param("livemodels.nets:sized(size=open('x'))", "'size' is not a Python literal", id="a call"),
        pytest.param("livemodels.nets:sized(size=size)", "'size' is not a Python literal", id="a name"),
        pytest.param("livemodels.nets:sized(size=4", "'(size=4' is not a valid list of arguments", id="left open"),
        pytest.param("livemodels.nets:sized(size=4)()", "is not a valid list of arguments", id="a call of a call"),
        pytest.param("livemodels.nets:sized(size=4).x", "is not a valid list of arguments", id="an attribute"),
        pytest.param("livemodels.nets:sized(a=1, a=2)", "'(a=1, a=2)' has 'a' twice", id="a name twice"),
        pytest.param("livemodels.nets:sized(" + "[" * 9999, "is not a valid list of arguments", id="deep"),
        pytest.param("livemodels.nets:sized(seize=4)", "unexpected keyword argument 'seize'", id="unknown name"),
        pytest.param("livemodels.nets:instance(x=1)", "'instance' is a model, not a callable", id="an instance"),
        pytest.param("livemodels.nets:number(x=1)", "'number' is an int, not a callable", id="a number with arguments"),
        pytest.param("..:x", "importing '..' failed", id="a relative name"),
    ],
)
def test_a_live_model_that_cannot_be_built_is_refused_with_a_reason(modules: Path, target: str, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(f"py:{target}")
    assert re.search(re.escape(reason), caught.value.reason), caught.value.reason
    assert caught.value.path == f"py:{target}"
    assert "\n" not in str(caught.value)
    assert modules.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_safetensors_header_whose_length_begins_a_pickle_is_read(protocol: int, tmp_path: Path) -> None:
    """The first bytes of a header of 1,152 bytes are those of a pickle of protocol 4."""
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(protocol * 256 + 128)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.format, list(checkpoint)) == ("safetensors", ["w"])
