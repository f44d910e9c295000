"""A checkpoint gives its tensors: as a state_dict, some rows of one, or arrays of numpy."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ckptkit import CkptkitError, PathError, convert, open_checkpoint
from ckptkit.core.checkpoint import Access, Checkpoint, Description, TensorInfo, part_of, read_into
from ckptkit.core.files.local import LocalFile
from ckptkit.core.files.payloads import ByteSwapped, Extent
from ckptkit.core.torch_bridge import TensorPayload, as_checkpoint
from ckptkit.formats.layout import Block, BlockTensor, Box, InMemory, Strided

FIXTURES = Path("fixtures")


class Tied(torch.nn.Module):
    """An encoder and a decoder with one weight, a buffer of integers and a norm, which has a version."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(4, 6, bias=False)
        self.norm = torch.nn.BatchNorm1d(6)
        self.decoder = torch.nn.Linear(4, 6)
        self.decoder.weight = self.encoder.weight


def places(state: dict[str, torch.Tensor]) -> list[list[str]]:
    """Return the groups of keys with one storage."""
    groups: dict[int, list[str]] = {}
    for key, tensor in state.items():
        groups.setdefault(tensor.untyped_storage()._cdata, []).append(key)
    return sorted(groups.values())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    """Compare keys, order, dtypes, shapes and values."""
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_state_dict_is_what_torch_loads(tmp_path: Path, *, legacy: bool) -> None:
    """Keys, values, ties and ``_metadata`` are those of ``torch.load``, and a strict load accepts them."""
    path = tmp_path / "tied.pth"
    model = Tied()
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.state_dict()
    expected = torch.load(path)
    assert_same(found, expected)
    assert places(found) == places(expected)
    assert found._metadata == expected._metadata  # type: ignore[attr-defined]
    fresh = Tied()
    fresh.load_state_dict(found)
    assert torch.equal(fresh.decoder.weight, model.encoder.weight)


def test_a_directory_of_shards_is_one_state_dict() -> None:
    """The shards together give what ``safe_open`` reads from each, in the order of the checkpoint."""
    expected: dict[str, torch.Tensor] = {}
    for path in sorted((FIXTURES / "encoder_sharded").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            expected |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the object has no iterator
    with open_checkpoint(FIXTURES / "encoder_sharded") as checkpoint:
        assert_same(checkpoint.state_dict(), {key: expected[key] for key in checkpoint})
        assert set(checkpoint) == set(expected)


VIEWS = {
    "rows of one tensor": lambda base: {"a": base[:4], "b": base[2:6], "whole": base},
    "a transposed tie": lambda base: {"w": base, "t": base.T},
    "two that overlap and one that does not": lambda base: {"a": base[0:3], "b": base[2:5], "far": base[6:]},
    "a column inside": lambda base: {"column": base[:, 1], "w": base},
    "scalars of one storage": lambda base: {"a": base[0, 0], "b": base[0, 0], "c": base[0]},
    "empty": lambda base: {"none": base[:0], "w": base},
}


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_views_that_overlap_share_memory(tmp_path: Path, views: Any, dtype: torch.dtype | None) -> None:
    """A write through one view shows in the others exactly where ``torch.load`` shows it, also after a cast."""
    path = tmp_path / "views.pt"
    torch.save(views(torch.randn(8, 5)), path)
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.state_dict(dtype=dtype)
    expected = torch.load(path)
    assert_same(found, {key: tensor.to(dtype or tensor.dtype) for key, tensor in expected.items()})
    for key, tensor in expected.items():
        tensor.fill_(7)
        found[key].fill_(7)
        assert_same(found, {other: value.to(dtype or value.dtype) for other, value in expected.items()})


def test_only_floating_point_tensors_are_cast(tmp_path: Path) -> None:
    """Integers, booleans and complex numbers keep their dtype; a value that is too large becomes inf."""
    state = {"f": torch.tensor([1e30, 1.0]), "n": torch.arange(3), "b": torch.tensor([True]), "c": torch.ones(2) * 1j}
    path = tmp_path / "a.pt"
    torch.save(state, path)
    with open_checkpoint(path) as checkpoint:
        for good in (torch.float16, "float16", "F16", "torch.float16"):
            assert_same(checkpoint.state_dict(dtype=good), {**state, "f": state["f"].half()})
        bad: Any
        for bad in (torch.int8, "int8", "float", "F4", "F6_E2M3", 16):
            with pytest.raises(CkptkitError, match="dtype"):
                checkpoint.state_dict(dtype=bad)


def test_an_unknown_key_is_an_error_with_the_nearest_key() -> None:
    """It stays a ``KeyError`` with the key alone, as of every mapping, also from another process."""
    calls: list[Callable[[Checkpoint, str], object]] = [
        Checkpoint.read,
        Checkpoint.numpy,
        Checkpoint.read_bytes,
        lambda checkpoint, key: checkpoint.state_dict(keys=["fc3.bias", key]),
    ]
    with open_checkpoint(FIXTURES / "lenet_10class.pth") as checkpoint:
        for call in calls:
            with pytest.raises(KeyError) as caught:
                call(checkpoint, "fc3.wieght")
            assert str(caught.value) == "the checkpoint has no 'fc3.wieght': did you mean 'fc3.weight'?"
            assert caught.value.args == ("fc3.wieght",)
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        with pytest.raises(KeyError) as caught:
            checkpoint.read("zzz")
        assert str(caught.value) == "the checkpoint has no 'zzz'"
        with pytest.raises(KeyError, match=r"^'fc3\.wieght'$"):
            checkpoint["fc3.wieght"]


def test_some_keys_on_a_device(tmp_path: Path) -> None:
    """The order of the file counts, not that of ``keys``; an unknown key is a ``KeyError``; a device is torch's."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2), "b": torch.zeros(3), "c": torch.ones(1)}, path)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.state_dict(keys=["c", "a"])) == ["a", "c"]
        assert checkpoint.state_dict(keys=[]) == {}
        assert all(tensor.is_meta for tensor in checkpoint.state_dict(device="meta").values())
        with torch.device("meta"):  # the default device of a block is not the device of the values
            assert torch.equal(checkpoint.state_dict()["a"].cpu(), torch.ones(2, device="cpu"))
        with pytest.raises(KeyError, match="missing"):
            checkpoint.state_dict(keys=["a", "missing"])
        with pytest.raises(CkptkitError, match="device is 'gpu', which torch cannot use here"):
            checkpoint.state_dict(device="gpu")
        with pytest.raises(CkptkitError, match="keys"):
            checkpoint.state_dict(keys=[1])  # type: ignore[list-item]


def test_a_dtype_that_no_float_is_cast_to_is_named() -> None:
    """The message has the dtype of torch itself."""
    with pytest.raises(CkptkitError, match=r"dtype is torch\.int8 \(dtype must be a floating-point dtype"):
        as_checkpoint({"w": torch.ones(2)}, "state").state_dict(dtype=torch.int8)


def test_what_cannot_be_read_is_refused_before_the_rest_is_read(tmp_path: Path) -> None:
    """The error names the sparse tensor; the other tensors are read with ``keys``."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2), "s": torch.eye(2).to_sparse()}, path)
    with open_checkpoint(path) as checkpoint:
        with pytest.raises(CkptkitError, match="'s' is a sparse tensor"):
            checkpoint.state_dict()
        assert torch.equal(checkpoint.state_dict(keys=["w"])["w"], torch.ones(2))


SLICES = [
    slice(None), slice(2, 5), slice(-3, None), slice(None, -2), slice(4, 2), slice(5, 100), slice(-100, 3),
    slice(0, 7, 1), slice(7, 7),
]  # fmt: skip


@pytest.mark.parametrize("rows", SLICES, ids=str)
def test_rows_are_those_of_python(tmp_path: Path, rows: slice) -> None:
    """``safe_open``'s slices and those of ``torch.load`` are the oracles, for each way in which a tensor is stored."""
    base = torch.randn(7, 3, 2)
    stored = {
        "w": base,
        "t": torch.randn(2, 3, 7).permute(2, 1, 0),
        "conj": torch.randn(7, 2, dtype=torch.cfloat).conj(),
    }
    torch.save(stored, tmp_path / "a.pt")
    save_file({"w": base}, tmp_path / "a.safetensors")
    for opened in (open_checkpoint(tmp_path / "a.pt"), as_checkpoint(stored, "live")):
        with opened as checkpoint:
            for key, tensor in torch.load(tmp_path / "a.pt").items():
                assert torch.equal(checkpoint.read(key, rows=rows), tensor[rows])
                assert np.array_equal(checkpoint.numpy(key, rows=rows), tensor[rows].resolve_conj().numpy())
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint, safe_open(tmp_path / "a.safetensors", "pt") as file:
        start, stop, _ = rows.indices(7)
        expected = file.get_slice("w")[start : max(start, stop)] if start < stop else base[:0]
        assert torch.equal(checkpoint.read("w", rows=rows), expected)


@pytest.mark.parametrize(
    "rows",
    [slice(None, None, 2), slice(None, None, -1), slice("a"), 3, slice(0, 1, 0), slice(None, None, torch.ones(2))],
    ids=str,
)
def test_rows_that_are_not_adjacent_are_refused(rows: Any) -> None:
    """A step is refused in one sentence, before anything is read."""
    with open_checkpoint(FIXTURES / "lenet_10class.pth") as checkpoint, pytest.raises(CkptkitError, match="rows"):
        checkpoint.read("fc3.weight", rows=rows)


def test_a_number_has_no_rows(tmp_path: Path) -> None:
    """A tensor without dims is refused, as Python refuses to slice it."""
    torch.save({"n": torch.tensor(1.0)}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint, pytest.raises(CkptkitError, match="'n' has no dims"):
        checkpoint.read("n", rows=slice(1))


def test_only_the_bytes_of_the_rows_are_read(tmp_path: Path) -> None:
    """The rows of a contiguous tensor are read from a file that ends behind them."""
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(40_000.0).view(100, 400)}, path)
    with open_checkpoint(path) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 50 * 1600)
        assert torch.equal(checkpoint.read("w", rows=slice(10, 50)), torch.arange(40_000.0).view(100, 400)[10:50])
        with pytest.raises(CkptkitError, match="became shorter"):
            checkpoint.read("w", rows=slice(40, 60))


def test_every_numpy_dtype() -> None:
    """Arrays have the values, shapes and dtypes that ``Tensor.numpy`` gives."""
    dtypes = (
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32",
        "float64", "complex64", "complex128",
    )  # fmt: skip
    state = {name: torch.tensor([[1, 0], [3, 4]]).to(getattr(torch, name)) for name in dtypes}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    with as_checkpoint(state, "live") as checkpoint:  # torch.save of older torch does not know every dtype
        for key, tensor in state.items():
            array = checkpoint.numpy(key)
            assert array.flags.writeable
            assert (array.dtype, array.shape) == (tensor.numpy().dtype, tuple(tensor.shape))
            assert np.array_equal(array, tensor.numpy())


def test_dtypes_that_numpy_lacks(tmp_path: Path) -> None:
    """bfloat16 and float8 have the values of torch; complex32 has no dtype in numpy and is refused."""
    state = {
        "BF16": torch.tensor([1.5, -2.0]).bfloat16(), "F8_E4M3": torch.ones(3).to(torch.float8_e4m3fn),
    }  # fmt: skip
    torch.save(state, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        for key in ("BF16", "F8_E4M3"):
            assert checkpoint.numpy(key).astype(np.float32).tolist() == state[key].float().tolist()
    other = Checkpoint(
        {"w": TensorInfo("w", "C32", (1,))}, Access(lambda _: InMemory(memoryview(b"1234"))), Description("a", "test")
    )
    with pytest.raises(CkptkitError, match="has no dtype for C32"):
        other.numpy("w")


def test_numpy_needs_no_torch() -> None:
    """Reading arrays and rows of them does not import torch."""
    program = (
        "import sys, ckptkit\n"
        "with ckptkit.open_checkpoint('fixtures/lenet_10class.pth') as checkpoint:\n"
        "    print(checkpoint.numpy('fc3.weight', rows=slice(2)).shape)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "(2, 84)\nFalse\n"


def test_a_payload_reads_into_memory(tmp_path: Path) -> None:
    """``read_into`` fills the same bytes from each kind of payload, whole and in part."""
    data = np.arange(96, dtype=np.uint16)
    (tmp_path / "a").write_bytes(data.tobytes())
    file = LocalFile(str(tmp_path / "a"))
    extent, tensor = Extent(file, 0, 192), torch.from_numpy(data.astype(np.int16)).view(12, 8)
    transposed = torch.from_numpy(data.view(np.int16)).view(8, 12).T
    info = as_checkpoint({"t": transposed}, "live")["t"]
    halves = [Block(Box((at,), (48,)), partial(Extent(file, 0, 192).slice, 2 * at, 96)) for at in (0, 48)]
    cases = {
        "blocks": (BlockTensor((96,), 2, tuple(halves)), data),
        "extent": (extent, data), "swapped": (ByteSwapped(extent, 2), data.byteswap()),
        "memory": (InMemory(data.data.cast("B")), data), "tensor": (TensorPayload(tensor, 192), data),
        "strided": (Strided(extent, info), transposed.contiguous().numpy().ravel().view(np.uint16)),
    }  # fmt: skip
    for name, (payload, expected) in cases.items():
        for start, nbytes in ((0, 192), (16, 48), (48, 48), (6, 20), (190, 2)):
            buffer = bytearray(nbytes)
            read_into(part_of(payload, start, nbytes), memoryview(buffer))  # type: ignore[arg-type]
            assert bytes(buffer) == expected.tobytes()[start : start + nbytes], (name, start)
    file.close()


@pytest.mark.parametrize("stored", [b"123", b"12345"])
def test_a_payload_with_other_bytes_than_promised_is_refused(stored: bytes) -> None:
    """No tensor is made of too few bytes, and no byte is written behind the memory of a tensor."""
    infos = {"w": TensorInfo("w", "F32", (1,))}
    checkpoint = Checkpoint(infos, Access(lambda _: InMemory(memoryview(stored))), Description("a", "test"))
    with pytest.raises(CkptkitError, match="4 bytes"):
        checkpoint.read("w")


def test_a_closed_checkpoint_is_refused(tmp_path: Path) -> None:
    """Every use of the bytes says that it was closed, and names its file, also where an output is written."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        pass
    uses: list[Callable[[], object]] = [
        lambda: checkpoint.read("w"),
        lambda: checkpoint.numpy("w"),
        checkpoint.state_dict,
        checkpoint.check_unchanged,
        lambda: convert(checkpoint, tmp_path / "out.safetensors"),
    ]
    for use in uses:
        with pytest.raises(PathError, match="the checkpoint was closed") as caught:
            use()
        assert caught.value.path == str(tmp_path / "a.pt")
    assert not (tmp_path / "out.safetensors").exists()
