"""Arrays of numpy and tensors of other devices in a pickle are read as tensors, without running code."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckptkit import load_into, plan_merge, plan_remap
from ckptkit.errors import FormatError, PlanError
from ckptkit.formats import open_checkpoint
from tests.features import needs
from tests.helpers_cli import run_ckpt
from tests.helpers_formats import bits, opened, saved, write

Array = np.ndarray[Any, Any]
T = torch.arange(6.0).reshape(2, 3)
ONES = torch.ones(2)


class Call:
    """A value that is pickled as the call of a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def raw(array: Array) -> bytes:
    """Return the bytes of an array: contiguous, row-major and little-endian."""
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()


ARRAYS: dict[str, Array] = {
    **{name: np.arange(6).astype(name).reshape(2, 3) for name in
       ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "c8", "c16", "?")},
    "big-endian": np.arange(6.0).astype(">f4").reshape(2, 3),
    "big-endian complex": (np.arange(6) * (1 + 2j)).astype(">c16"),
    "column-major": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "a transposed view": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
    "every other element": np.arange(12.0)[::2],
    "no dimension": np.array(5.0),
    "empty": np.zeros((0, 3)),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_are_read_as_torch_would_get_them(tmp_path: Path, protocol: int) -> None:
    """Values, shapes and dtypes are those that numpy has, in every protocol and both layouts of torch."""
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pt"
        torch.save({"state_dict": ARRAYS}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.envelope == "state_dict"
            for key, array in ARRAYS.items():
                assert checkpoint[key].shape == array.shape
                assert checkpoint.read_bytes(key) == raw(array)
                native = array.astype(array.dtype.newbyteorder("="))
                assert torch.equal(
                    checkpoint.read(key), torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))
                )


def test_scalars_text_and_objects_stay_entries(tmp_path: Path) -> None:
    values = {
        "a": np.float64(0.5), "b": np.int32(-3), "c": np.bool_(True), "d": np.complex64(1 + 2j), "e": np.float32("nan"),
        "f": np.array(["x", "y"]), "g": np.array([{}, None], dtype=object), "h": np.array(["2020-01-01"], "M8[D]"),
    }  # fmt: skip
    with opened(tmp_path, saved({"state_dict": {"w": ONES}, **values})) as checkpoint:
        entries = {entry.path: (entry.type, entry.value) for entry in checkpoint.entries}
        assert list(checkpoint) == ["w"]
    assert [entries[key] for key in "abce"] == [("float", 0.5), ("int", -3), ("bool", True), ("float", "nan")]
    assert entries["d"][0] == "complex"
    assert [entries[key][0] for key in "fgh"] == ["numpy.ndarray"] * 3


@needs(torch._utils, "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy")
def test_tensors_of_other_devices_are_read(tmp_path: Path) -> None:
    """XLA and private backends save a CPU tensor or an array; bfloat16 was saved as float32."""
    half = torch.randn(4, 3).to(torch.bfloat16)
    utils: Any = torch._utils
    tree = {
        "cpu": Call(utils._rebuild_device_tensor_from_cpu_tensor, T.t(), torch.float32, "xla:0", False),
        "numpy": Call(utils._rebuild_device_tensor_from_numpy, T.numpy(), torch.float32, "cpu", False),
        "half": Call(utils._rebuild_device_tensor_from_numpy, half.float().numpy(), torch.bfloat16, "cpu", False),
        "old": Call(utils._rebuild_xla_tensor, T.numpy(), torch.float32, "xla:0", False),
    }
    with open_checkpoint(write(tmp_path, saved(tree))) as checkpoint:
        wanted = {"cpu": T.t(), "numpy": T, "half": half, "old": T}
        assert {key: checkpoint.read_bytes(key) for key in checkpoint} == {key: bits(t) for key, t in wanted.items()}
        assert {key: checkpoint[key].dtype for key in checkpoint} == {**dict.fromkeys(wanted, "F32"), "half": "BF16"}
        assert checkpoint.warnings == ()


def test_a_cast_while_loading_is_not_read(tmp_path: Path) -> None:
    tree = {"a": Call(torch._utils._rebuild_device_tensor_from_numpy, T.numpy() / 3, torch.bfloat16, "cpu", False)}
    with opened(tmp_path, saved({**tree, "b": ONES})) as checkpoint:
        assert checkpoint["a"].kind == "converted"


def unread() -> dict[str, Any]:
    """Return what torch loads and what is listed here without its values."""
    lazy = nn.LazyLinear(3).state_dict()
    return {
        "sparse": T.to_sparse(), "csr": T.to_sparse_csr(), "meta": torch.empty(2, device="meta"),
        "quantized": torch.quantize_per_tensor(T, 0.1, 0, torch.qint8), "lazy": lazy["weight"],
        "fields": np.zeros(2, [("a", "f4"), ("b", "i4")]), "void": np.zeros(2, "V2"),
        "nested": torch.nested.nested_tensor([T, T]),
        "jagged": torch.nested.nested_tensor([T, T], layout=torch.jagged),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_unread_tensors_stop_every_writer_unless_they_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence names all; with --skip-unread the rest is written, and the plan names what it leaves out."""
    path, out = str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")
    torch.save({"w": ONES, **unread()}, path)
    base = {"w": torch.zeros(2), "sparse": T, "lazy": torch.ones(3, 4)}
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint) == {"w", *unread()}
        with pytest.raises(PlanError, match="9 tensors cannot be copied: 'sparse' ") as caught:
            plan_remap(checkpoint)
        assert "--skip-unread" in (caught.value.hint or "")
        with pytest.raises(PlanError, match="9 tensors cannot be copied: 'sparse' "):
            plan_merge(checkpoint, {"w": ONES})
        with pytest.raises(PlanError, match="2 tensors cannot be copied"):
            plan_merge(base, checkpoint)
        plan = plan_remap(checkpoint, skip_unread=True)
        assert [step.out.key for step in plan.steps] == ["w"]
        assert {drop.key for drop in plan.dropped} == set(unread())
        merged = plan_merge(base, checkpoint, skip_unread=True)
        assert [step.sources[0].role for step in merged.steps] == ["donor", "base", "base"]
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(2))
        model.meta = nn.Parameter(torch.zeros(2))
        with pytest.raises(PlanError, match="'meta' cannot be copied"):
            load_into(model, checkpoint)
        assert load_into(model, checkpoint, skip_unread=True).loaded == ("w",)
    for command in ("convert", "remap"):
        assert run_ckpt(capsys, command, path, "-o", out).code == 2
        assert not Path(out).exists()
        written = run_ckpt(capsys, command, path, "-o", out, "--skip-unread")
        assert (written.code, "sparse" in written.err) == (0, True)
        Path(out).unlink()


def test_an_edited_file_keeps_its_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A renamed array stays an array with its values; a cast array becomes a tensor."""
    path, out = str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
    array = np.arange(6, dtype="f4").reshape(2, 3)
    torch.save({"state_dict": OrderedDict(a=array, b=ONES), "best": np.float64(0.5)}, path)
    arguments = ["remap", path, "-o", out, "--rename", "a=c"]
    refused = run_ckpt(capsys, *arguments)  # torch.load refuses such a file by default
    assert (refused.code, "--keep-unknown" in refused.err) == (2, True)
    assert run_ckpt(capsys, *arguments, "--keep-unknown").code == 0
    loaded = torch.load(out, weights_only=False)
    assert np.array_equal(loaded["state_dict"]["c"], array)
    assert loaded["best"] == 0.5
    assert run_ckpt(capsys, *arguments, "--keep-unknown", "--force", "--dtype", "F16").code == 0
    assert torch.equal(torch.load(out, weights_only=False)["state_dict"]["c"], torch.from_numpy(array).half())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_pickle_of_arrays_is_read(tmp_path: Path, protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of detectron2 are such pickles; large arrays are not read before their values are asked for."""
    large = np.arange(60_000, dtype="f4").reshape(300, 200)
    model = {**ARRAYS, "large": large, "swapped": large.astype(">f4"), "turned": np.asfortranarray(large)}
    path, out = tmp_path / "model_final.pkl", tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"model": model, "__author__": "zoo", "matching_heuristics": True}, protocol))
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.envelope, checkpoint.format, checkpoint.warnings) == ("model", "pickle", ())
        assert {key: checkpoint.read_bytes(key) for key in checkpoint} == {key: raw(a) for key, a in model.items()}
        assert [entry.path for entry in checkpoint.entries] == ["__author__", "matching_heuristics"]
    assert run_ckpt(capsys, "convert", path, "-o", out).code == 0
    assert torch.equal(torch.load(out)["turned"], torch.from_numpy(large))
    path.write_bytes(path.read_bytes()[:-9])
    assert run_ckpt(capsys, "show", path).code == 2


def test_a_bare_pickle_without_arrays_is_refused(tmp_path: Path) -> None:
    values: list[object] = [{"a": 1}, {"a": T}, [], [True] * 3_000_000]
    for value in values:
        with pytest.raises(FormatError, match="a bare pickle"):
            opened(tmp_path, pickle.dumps(value))


DAMAGED: dict[str, tuple[bytes, bytes, str]] = {
    "too few bytes": (b"K\x02K\x03\x86", b"K\x02K\x04\x86", "an array of shape"),
    "a huge shape": (b"K\x02K\x03\x86", b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\x03\x86", "overflows"),
    "a negative size": (b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86", "not a tuple of sizes"),
}


@pytest.mark.parametrize(("old", "new", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_an_array_that_contradicts_itself_is_refused(tmp_path: Path, old: bytes, new: bytes, reason: str) -> None:
    data = saved({"a": np.ones((2, 3), "f4")}, legacy=True)
    assert old in data
    with pytest.raises(FormatError, match=reason):
        opened(tmp_path, data.replace(old, new))


def test_nothing_is_imported_and_numpy_stays_named(tmp_path: Path) -> None:
    """The code names remain references, since torch's weights-only loader refuses them."""
    with opened(tmp_path, saved({"a": np.ones(2)})) as checkpoint:
        assert checkpoint.container is None or "numpy.dtype" in checkpoint.container.references
    assert pickle.loads(pickle.dumps(np.ones(2))).shape == (2,)
