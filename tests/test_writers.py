"""Written files are read by torch, safetensors and zipfile, with every byte."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptkit import TensorInfo, choose_output, execute, open_checkpoint, plan_merge, plan_remap
from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, View, is_contiguous, storage_range
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.local import LocalFile
from ckptkit.core.files.payloads import Extent
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import ChangedError, OutputError, PlanError
from ckptkit.formats.safetensors import layout_safetensors
from ckptkit.formats.torch.write import layout_torch_zip, write_torch_zip
from ckptkit.formats.writing.atomic import AtomicFile
from ckptkit.formats.writing.copying import OffsetWriter, merge_extents
from tests.features import FLOAT4
from tests.helpers_outputs import CODES, STORABLE, described, raw, same_state, scratch, state_dicts, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
State = dict[str, torch.Tensor]


def written(state: Any, name: str, directory: Path) -> Path:
    out = directory / name
    execute(plan_remap(state), state, choose_output(out, force=True))
    return out


def loaded(path: Path, *, mmap: bool = False) -> State:
    state: State = torch.load(path, weights_only=True, mmap=mmap)
    return state


@settings(deadline=None, max_examples=120)
@given(state_dicts(STORABLE))
def test_safetensors_reads_what_was_written(state: State) -> None:
    """The library reads the same keys, dtypes, shapes and bytes for every dtype, stride and tie."""
    with scratch() as name:
        out = written(state, "a.safetensors", Path(name))
        assert same_state(load_file(out), state)
        with safe_open(out, framework="pt") as file:
            assert set(file.keys()) == set(state)
        again = written(open_checkpoint(out), "b.safetensors", Path(name))
        assert again.read_bytes() == out.read_bytes()


@settings(deadline=None, max_examples=60)
@given(state_dicts(STORABLE))
def test_torch_files_become_safetensors(state: State) -> None:
    """A file of torch.save with strides and shared storages is converted with every value."""
    with scratch() as name:
        torch.save(state, Path(name, "a.pt"))
        with open_checkpoint(Path(name, "a.pt")) as source:
            assert same_state(load_file(written(source, "a.safetensors", Path(name))), state)


def test_metadata_travels_and_data_is_aligned(tmp_path: Path) -> None:
    """The metadata is kept, and every tensor begins at a multiple of its element size."""
    state = {"a": tensor_of("U8", (3,)), "b": tensor_of("F64", (2,)), "c": tensor_of("BF16", (5,))}
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt", "ü": '"\n'})
    with open_checkpoint(tmp_path / "a.safetensors") as source:
        out = written(source, "b.safetensors", tmp_path)
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "ü": '"\n'}
    assert same_state(load_file(out), state)
    data = out.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    assert all(header[key]["data_offsets"][0] % value.itemsize == 0 for key, value in state.items())


def test_the_order_is_kept_where_alignment_allows() -> None:
    """Tensors of equal element size keep their order; otherwise wide elements come first."""
    floats = [TensorInfo(key, "F32", (1,)) for key in "cab"]
    assert [info.key for info in layout_safetensors(floats, {}).infos] == ["c", "a", "b"]
    mixed = [TensorInfo("x", "U8", (1,)), *floats, TensorInfo("y", "I64", (1,))]
    assert [info.key for info in layout_safetensors(mixed, {}).infos] == ["y", "c", "a", "b", "x"]


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (TensorInfo("w", "C128", (2,)), "'w' would be C128, which safetensors cannot store"),
        (TensorInfo("w", "NEW", (2,)), "'w' would be NEW, which safetensors cannot store"),
        (TensorInfo("__metadata__", "F32", (2,)), "a tensor is called '__metadata__'"),
        (TensorInfo("a\ud800", "F32", (2,)), "a name is not Unicode text"),
        (TensorInfo("k" * 100_000_001, "F32", (2,)), "the header would have 100,000,"),
    ],
    ids=["dtype", "unknown dtype", "reserved name", "surrogate", "header too large"],
)
def test_tensors_that_safetensors_cannot_hold_are_refused(info: TensorInfo, reason: str) -> None:
    """The error names the tensor, before any byte is written."""
    with pytest.raises(PlanError, match="^" + reason.replace("(", r"\(")):
        layout_safetensors([info], {})


def test_neighbours_in_one_file_are_copied_in_one_call(tmp_path: Path) -> None:
    """Only neighbours in the same file are joined, and the order of all tensors is kept."""
    (tmp_path / "a").write_bytes(bytes(100))
    one, other = LocalFile(str(tmp_path / "a")), LocalFile(str(tmp_path / "a"))
    live = as_checkpoint({"w": torch.ones(1)}, "live").payload("w")
    parts = [Extent(one, 0, 10), Extent(one, 10, 5), live, Extent(one, 15, 5), Extent(other, 20, 5), Extent(one, 30, 1)]
    made = [(part.offset, part.nbytes) if isinstance(part, Extent) else part for part in merge_extents(parts)]
    assert made == [(0, 15), live, (15, 5), (20, 5), (30, 1)]
    one.close()
    other.close()


def share(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def check_layout(state: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Check that ties are ties, and that layouts are kept where this costs no space."""
    infos = as_checkpoint(dict(state), "state")
    for key, tensor in state.items():
        first, last = storage_range(infos[key])
        if tensor.numel() and last - first <= infos[key].nbytes and not is_contiguous(infos[key]):
            assert found[key].stride() == tensor.stride()
        for other, value in state.items():
            same = tensor.is_set_to(value) and tensor.numel()
            assert not same or found[key].is_set_to(found[other])
            assert not share(found[key], found[other]) or share(tensor, value) or not tensor.numel()


@settings(deadline=None, max_examples=120)
@given(state_dicts())
def test_torch_loads_what_was_written(state: State) -> None:
    """torch loads the file with weights_only, with and without mmap, and ties and strides are kept."""
    with scratch() as name:
        out = written(state, "a.pt", Path(name))
        with zipfile.ZipFile(out) as archive:
            assert archive.testzip() is None
            assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        found = loaded(out)
        assert list(found) == list(state)
        assert same_state(found, state)
        check_layout(state, found)
        assert same_state(loaded(out, mmap=True), state)


@settings(deadline=None, max_examples=80)
@given(state_dicts())
def test_torch_files_are_rewritten_as_they_were(state: State) -> None:
    """Legacy and zip files of torch.save are rewritten twice; values, ties and views are kept."""
    with scratch() as name:
        torch.save(state, Path(name, "a.pt"))
        with open_checkpoint(Path(name, "a.pt")) as source:
            first = written(source, "b.pt", Path(name))
        with open_checkpoint(first) as source:
            second = written(source, "c.pt", Path(name))
        for out in (first, second):
            found = loaded(out)
            assert same_state(found, state)
            check_layout(state, found)
            with zipfile.ZipFile(out) as archive:
                assert archive.testzip() is None
        assert second.read_bytes() == first.read_bytes()


FUSED = torch.arange(24.0).reshape(6, 4)
VIEWS: dict[str, State] = {
    "rows of one": {"qkv": FUSED, "q": FUSED[:2], "k": FUSED[2:4], "v": FUSED[4:]},
    "chained rows": {"a": FUSED[:3], "b": FUSED[2:5], "c": FUSED[4:]},
    "transpose": {"w": FUSED, "t": FUSED.t()},
    "flat": {"w": FUSED, "flat": FUSED.view(-1)},
}


@pytest.mark.parametrize("state", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "live"])
def test_views_of_one_storage_stay_views_of_one(state: State, tmp_path: Path, *, from_file: bool) -> None:
    """Training one view still changes the other, and the file holds the shared bytes once."""
    torch.save(state, tmp_path / "a.pt")
    source: Any = open_checkpoint(tmp_path / "a.pt") if from_file else state
    found = loaded(written(source, "b.pt", tmp_path))
    assert same_state(found, state)
    names = list(state)
    if from_file or names != ["a", "b", "c"]:  # live views that only overlap have no common span
        assert all(share(found[names[0]], found[name]) for name in names)
        assert sum(info.file_size for info in records(tmp_path / "b.pt")) == 96


def records(path: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return [info for info in archive.infolist() if "/data/" in info.filename]


def test_small_views_do_not_copy_a_large_storage(tmp_path: Path) -> None:
    """The part of a storage that no view uses is not written."""
    large = torch.arange(100_000.0)
    out = written({"a": large[:4], "b": large[-4:], "c": large[::50_000]}, "a.pt", tmp_path)
    assert out.stat().st_size < 3000
    assert same_state(loaded(out), {"a": large[:4], "b": large[-4:], "c": large[::50_000]})


X, Z = torch.arange(12.0).reshape(4, 3), torch.arange(12.0).reshape(4, 3) * (1 + 1j)
FLAGGED = {
    "plain": ({"a": X, "b": X[::2], "c": X[:1], "d": X}, {"abcd"}, ()),
    "conj rows": ({"a": Z, "b": Z, "c": Z[:2].conj()}, {"ab", "c"}, (("a", "c"),)),
    "conj whole": ({"a": Z.conj(), "b": Z[:3], "c": Z}, {"a", "bc"}, (("a", "b"),)),
    "neg rows": ({"a": X, "b": X[:3], "c": torch._neg_view(X[:2])}, {"ab", "c"}, (("a", "c"),)),
    "neg joins": ({"a": X[:1], "b": X[3:], "c": torch._neg_view(X)}, {"a", "b", "c"}, (("a", "b", "c"),)),
    "gaps": ({"a": Z[:, :1], "b": Z[1::2, 0]}, {"a", "b"}, (("a", "b"),)),
}


@pytest.mark.parametrize("case", FLAGGED)
@pytest.mark.parametrize("is_live", [True, False])
def test_views_keep_their_ties_beside_a_conj_or_neg_view(case: str, is_live: bool, tmp_path: Path) -> None:
    """A view whose values are not the stored bytes gets a storage of its own; the result names every lost tie."""
    state, storages, untied = FLAGGED[case]
    torch.save(state, tmp_path / "in.pt")
    with as_checkpoint(state, "live") if is_live else open_checkpoint(tmp_path / "in.pt") as source:
        result = execute(plan_remap(source), source, tmp_path / "out.pt")
    found = loaded(tmp_path / "out.pt")
    groups: dict[int, str] = {}
    for key, value in found.items():
        groups[value.untyped_storage().data_ptr()] = groups.get(value.untyped_storage().data_ptr(), "") + key
    assert (set(groups.values()), result.untied) == (storages, untied)
    assert same_state(found, state)


def test_views_of_two_dtypes_are_written_apart(tmp_path: Path) -> None:
    """torch gives all tensors of a typed storage one dtype, so views of two dtypes are not shared."""
    data = tensor_of("F32", (4,))
    info = [TensorInfo(key, code, (4,), View(0, 0, (1,))) for key, code in (("f", "F32"), ("i", "I32"))]
    live = as_checkpoint({"f": data, "i": data.view(torch.int32)}, "live")
    layout = layout_torch_zip(info, lambda info: live.payload(info.key), lambda info: live.span(info.key))
    with AtomicFile(str(tmp_path / "a.pt"), layout.nbytes) as file:
        list(write_torch_zip(layout, file))
    assert same_state(loaded(tmp_path / "a.pt"), {"f": data, "i": data.view(torch.int32)})


@pytest.mark.parametrize("code", [*CODES, *(["F4"] if FLOAT4 else [])])
def test_every_dtype_of_torch_is_written(code: str, tmp_path: Path) -> None:
    """Each dtype is written with its storage class or an untyped storage, as torch writes it."""
    value = tensor_of(code, (2, 6)) if code != "F4" else tensor_of("U8", (2, 6)).view(FLOAT4[0])
    assert same_state(loaded(written({"w": value}, "a.pt", tmp_path)), {"w": value})


@pytest.mark.parametrize("code", ["QI8", "F6_E2M3", "BITS8", "NEW"])
def test_dtypes_that_torch_lacks_are_refused(code: str) -> None:
    """The error names the tensor, before any byte is written."""
    with pytest.raises(PlanError, match=f"'w' is {code}, which cannot be written to a torch file"):
        layout_torch_zip([TensorInfo("w", code, (2,))], lambda _: Nothing(), lambda _: None)


class Nothing:
    """A payload with a size and without bytes."""

    nbytes = 8

    def chunks(self) -> Iterator[bytes]:
        return iter(())


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_payload_of_another_size_is_noticed(name: str, tmp_path: Path) -> None:
    """Otherwise zeros would be written in place of the missing bytes."""
    source = Checkpoint(described(w=(2,)), Access(lambda _: Nothing()), Description("source", "test"))
    with pytest.raises(ChangedError, match="has 0 bytes in place of 8"):
        execute(plan_remap(source), source, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", ".", "a\nb", "a\0b", "ключ.重み", "\ud800", "data.pkl", "x" * 5000, "a.b.c", "0"])
def test_every_name_survives(key: str, tmp_path: Path) -> None:
    """A torch file can hold any string as a key, a safetensors file any Unicode text."""
    state = {key: torch.ones(2), "plain": torch.zeros(1)}
    assert same_state(loaded(written(state, "a.pt", tmp_path)), state)
    if key != "\ud800":
        assert same_state(load_file(written(state, "a.safetensors", tmp_path)), state)


def test_a_plan_without_tensors_writes_no_file(tmp_path: Path) -> None:
    """A file without tensors would only hide that nothing matched."""
    plan = plan_merge({}, {"x": torch.ones(1)})
    with pytest.raises(PlanError, match="the plan writes no tensor"):
        execute(plan, {"base": {}, "donor": {}}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


class Holes(OffsetWriter):
    """An output file that keeps copied ranges of files as holes, so large files take no space."""

    def __init__(self, path: Path) -> None:
        super().__init__(0)
        self.file = path.open("wb")

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        self.file.seek(offset)
        self.file.write(data)

    def copy(self, payload: Payload, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        assert offset % 64 == 0 or not isinstance(payload, Extent)
        if not isinstance(payload, Extent):
            return (yield from super().copy(payload, offset, checksum=checksum))
        yield payload.nbytes
        return payload.crc or 0


@pytest.mark.parametrize("large", [2**32 - 2, 2**32 - 1, 2**32, 4_800_000_000], ids=["below", "at", "above", "4.8 GB"])
def test_records_beyond_4_gib(large: int, tmp_path: Path) -> None:
    """Sizes and offsets have 64 bits where needed, and zipfile, torch and ckptkit read the records behind."""
    (tmp_path / "zeros").write_bytes(b"")
    source = LocalFile(str(tmp_path / "zeros"))
    tail = torch.arange(5.0)
    infos = [TensorInfo("large", "U8", (large,)), TensorInfo("tail", "F32", (5,)), TensorInfo("end", "F32", (5,))]
    live = as_checkpoint({"tail": tail, "end": tail + 1}, "live")

    def payload(info: TensorInfo) -> Any:
        return Extent(source, 0, large, crc=0) if info.key == "large" else live.payload(info.key)

    layout = layout_torch_zip(infos, payload, lambda _: None)
    out = Holes(tmp_path / "big.pt")
    assert sum(write_torch_zip(layout, out)) > large
    out.file.close()
    assert (tmp_path / "big.pt").stat().st_size == layout.nbytes
    with zipfile.ZipFile(tmp_path / "big.pt") as archive:
        assert archive.getinfo("archive/data/0").file_size == large
        assert archive.read("archive/data/2") == raw(tail + 1)
        assert archive.getinfo("archive/data/2").header_offset > large
    found = loaded(tmp_path / "big.pt", mmap=True)
    assert found["large"].shape == (large,)
    assert torch.equal(found["tail"], tail)
    with open_checkpoint(tmp_path / "big.pt") as checkpoint:
        assert checkpoint["large"].nbytes == large
        assert torch.equal(checkpoint.read("end"), tail + 1)
    source.close()


def test_an_output_error_names_the_target(tmp_path: Path) -> None:
    """The error has the name of the output, not the temporary name."""
    with (
        pytest.raises(OutputError, match="operation not permitted") as caught,
        AtomicFile(str(tmp_path / "a.pt"), 1),
    ):
        raise PermissionError(1, "Operation not permitted")
    assert caught.value.path == str(tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_the_widths_of_the_table_are_those_of_torch() -> None:
    """The table has the element sizes of torch."""
    for code in CODES:
        assert DTYPES[code].bits == 8 * tensor_of(code, (1,)).itemsize
