"""What a checkpoint says about ``torch.load`` is what ``torch.load`` does."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import decimal
import io
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckptkit import open_checkpoint, run_checks
from ckptkit.formats.torch.tree import describe_entry
from tests.features import needs_module
from tests.helpers_export import exported

TENSOR = {"w": torch.ones(2)}
VALUES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.ones(2),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "attribute": lambda: nn.Parameter(torch.ones(2), requires_grad=False),
    "bfloat16": lambda: torch.ones(2, dtype=torch.bfloat16),
    "complex": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "dtype": lambda: torch.float16,
    "device": lambda: torch.device("cpu"),
    "size": lambda: torch.Size([1, 2]),
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset({1}),
    "bytes": lambda: b"ab",
    "bytearray": lambda: bytearray(b"ab"),
    "big int": lambda: 2**200,
    "long int": lambda: 2**3000,
    "float": lambda: 0.5,
    "complex number": lambda: 1 + 2j,
    "None": lambda: [None, True, False, (), [], {}],
    "ordered": lambda: collections.OrderedDict(a=1),
    "counter": lambda: collections.Counter("aab"),
    "defaultdict": lambda: collections.defaultdict(int, a=1),
    "numpy array": lambda: np.ones(2),
    "numpy scalar": lambda: np.float64(0.5),
    "numpy dtype": lambda: np.dtype("float32"),
    "namespace": lambda: argparse.Namespace(lr=0.1),
    "date": lambda: dt.date(2020, 1, 1),
    "decimal": lambda: decimal.Decimal("1.5"),
    "path": lambda: pathlib.PurePosixPath("a/b"),
    "range": lambda: range(3),
    "slice": lambda: slice(1, 2),
    "type": lambda: int,
    "module": lambda: nn.Linear(2, 2),
    "random state": torch.get_rng_state,
}


NOT_ALWAYS = {"set", "bytes", "bytearray", "complex number"}  # allowed since torch 2.5


def _allows_sets() -> bool:
    file = io.BytesIO()
    torch.save({1}, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def takes(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 4"])
@pytest.mark.parametrize("name", VALUES)
def test_torch_takes_a_file_where_the_checkpoint_says_so(name: str, form: str, tmp_path: Path) -> None:
    """Every value beside a weight, in the formats of torch, and with a later protocol of pickle."""
    if name in NOT_ALWAYS and not _allows_sets():
        pytest.skip("this torch allows less")
    path = tmp_path / "file.pt"
    protocol = 4 if form == "protocol 4" else 2
    content = {"model": TENSOR, "beside": VALUES[name]()}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form != "legacy")
    with open_checkpoint(path) as checkpoint:
        loading = checkpoint.torch_loading
    assert loading is not None
    assert (not loading.refused) == takes(path), loading
    report = run_checks(path)
    assert ("torch-load" in {finding.code for finding in report.findings}) == bool(loading.refused)
    assert ("takes the file" in report.findings[-1].message) == (not loading.refused)


def test_the_devices_of_the_storages_are_named(tmp_path: Path) -> None:
    """torch raises without ``map_location`` where the device is missing, and a note says so."""
    torch.save(TENSOR, tmp_path / "cpu.pt")
    path = tmp_path / "cuda.pt"
    with zipfile.ZipFile(tmp_path / "cpu.pt") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:7"))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.torch_loading is not None
        assert checkpoint.torch_loading.devices == ("cuda:7",)
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match="CUDA"):
        torch.load(path, weights_only=True)
    assert torch.equal(torch.load(path, weights_only=True, map_location="cpu")["w"], TENSOR["w"])
    (note,) = [finding for finding in run_checks(path).findings if finding.code == "map-location"]
    assert (note.severity, "cuda:7" in note.message) == ("note", True)


def test_a_file_that_torch_save_did_not_write_says_nothing() -> None:
    assert open_checkpoint("fixtures/lenet_10class.safetensors").torch_loading is None


def _script(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def _bare(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": np.ones(2)}))


def _exported(path: Path) -> None:
    path.write_bytes(exported())


OTHER_LOADERS = [
    ("torch.jit.load", _script),
    pytest.param("torch.export.load", _exported, marks=needs_module("torch.export.pt2_archive")),
    ("pickle.load", _bare),
]


@pytest.mark.filterwarnings("ignore")  # torch warns of TorchScript
@pytest.mark.parametrize(("loader", "write"), OTHER_LOADERS)
def test_a_file_for_another_loader_is_named(loader: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    """TorchScript, exported programs and bare pickles look like files of torch.save, which torch.load does not take."""
    path = tmp_path / "file.pt2"
    write(path)
    sentence = f"the file is for {loader}, and torch.load(weights_only=True) refuses it"
    assert sentence in run_checks(path).findings[-1].message
    # Versions before 2.6 hand TorchScript to torch.jit.load.
    try:
        loaded = torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError):
        return
    assert isinstance(loaded, torch.jit.ScriptModule)


def test_a_long_list_leaves_others_to_be_counted() -> None:
    """What stands behind a long list, or behind lists of lists, is counted as if it stood alone."""
    tree = {
        "a": [0.5] * 12_000,
        "b": [[[number]] for number in range(12_000)],
        "names": ["x" * 9] * 1001,
        "pairs": [[[1]]] * 99,
    }
    budget = [10_000]
    assert {key: describe_entry(key, value, budget).value for key, value in tree.items()} == {
        "a": "12,000 items: 0.5, 0.5, 0.5, ..., 0.5",
        "b": "12,000 items, too deep or too many to count",
        "names": "1,001 items",
        "pairs": "99 items",
    }
