"""Distributed checkpoints are read as torch reads them, and metadata that the files contradict is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.payloads import Extent
from ckptkit.errors import ChangedError, CkptkitError, FormatError, PathError
from ckptkit.formats.distributed.dcp_metadata import read_metadata
from ckptkit.formats.distributed.file_names import is_dcp
from ckptkit.wrappers.envelopes import Selection
from tests.features import FLOAT4, require, saves
from tests.helpers_dcp import (
    archive,
    edit,
    full_tensors,
    loaded,
    metadata_of,
    open_dcp,
    put_metadata,
    refusal,
    save,
    write_cut,
)
from tests.helpers_formats import CODE_OF, assert_same, bits, random_tensor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def broken(saved_by_ranks: Path, tmp_path: Path) -> str:
    """Return a copy of a checkpoint of two ranks, for a test that damages it."""
    return str(shutil.copytree(saved_by_ranks / "dcp", tmp_path / "copy"))


def assert_whole(checkpoint: Checkpoint) -> None:
    """Assert that every tensor is the whole of what the ranks saved."""
    expected = full_tensors()
    assert set(checkpoint) == set(expected)
    assert_same(checkpoint, {key: expected[key] for key in checkpoint})


def trained() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "lr": [0.5, 2.0]}


def test_the_weights_are_found_and_are_those_of_torch(tmp_path: Path) -> None:
    path = save(tmp_path / "run", trained())
    with open_dcp(path) as checkpoint:
        assert_same(checkpoint, loaded(path, tmp_path)["model"])
        assert checkpoint.envelope == "model"
        assert checkpoint.format == "dcp"
        assert {os.path.basename(file) for file in checkpoint.files} == {".metadata", "__0_0.distcp"}
        assert checkpoint.warnings == ()
        assert checkpoint.references == ()
        assert not checkpoint.suspicious
        entries = {entry.path: entry.value for entry in checkpoint.entries}
        assert entries == {"optimizer": "2 items, 18 tensors", "step": 7, "lr": [0.5, 2.0]}


def test_a_key_opens_a_mapping_of_the_nested_state(tmp_path: Path) -> None:
    path = save(tmp_path / "run", trained())
    whole = loaded(path, tmp_path)
    moments = {f"{index}.{name}": tensor for index, state in whole["optimizer"]["state"].items()
               for name, tensor in state.items()}  # fmt: skip
    with open_dcp(path, Selection("optimizer.state")) as checkpoint:
        assert_same(checkpoint, moments)
    with open_dcp(path, Selection("optimizer.state.0")) as checkpoint:
        assert_same(checkpoint, whole["optimizer"]["state"]["0"])
    with open_dcp(path, Selection("optimizer.param_groups.0")) as checkpoint:
        group = {entry.path: entry.value for entry in checkpoint.entries if "optimizer" not in entry.path}
        assert group["lr"] == whole["optimizer"]["param_groups"][0]["lr"] == 0.01
    error = refusal(path, "optimizer.staet")
    assert "holds nothing at 'optimizer.staet'" in error.reason
    assert error.path == path


def test_two_candidates_are_listed(tmp_path: Path) -> None:
    path = save(tmp_path / "run", {"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}})
    assert "holds 2 mappings of weights: model (" in refusal(path).reason
    with open_dcp(path, Selection("ema")) as checkpoint:
        assert_same(checkpoint, {"w": torch.zeros(2)})


def test_a_flat_state_needs_no_envelope(tmp_path: Path) -> None:
    state = {"a.b": torch.ones(2), "a.c": torch.zeros(3)}
    with open_dcp(save(tmp_path / "run", state)) as checkpoint:
        assert_same(checkpoint, state)
        assert checkpoint.envelope == ""


def test_without_planner_data_the_keys_are_flat(tmp_path: Path) -> None:
    path = save(tmp_path / "run", {"model": {"a": torch.ones(2), "b": torch.ones(3)}})
    edit(path, lambda metadata: setattr(metadata, "planner_data", None))
    with open_dcp(path) as checkpoint:
        assert_same(checkpoint, {"model.a": torch.ones(2), "model.b": torch.ones(3)})


def _is_held(dtype: torch.dtype) -> bool:
    return saves(CODE_OF[dtype]) and not str(dtype).startswith(("torch.q", "torch.bits"))


@pytest.mark.parametrize("dtype", [dtype for dtype in CODE_OF if _is_held(dtype)])
def test_every_dtype_that_dcp_can_hold(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = random_tensor(dtype, (3, 4))
    path = save(tmp_path / "run", {"w": tensor})
    assert bits(loaded(path, tmp_path)["w"]) == bits(tensor)
    with open_dcp(path) as checkpoint:
        assert_same(checkpoint, {"w": tensor})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, *FLOAT4, torch.complex128])
def test_a_grid_of_chunks_is_joined_for_every_width(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = random_tensor(dtype, (5, 6))
    view = tensor.view(torch.uint8) if dtype in FLOAT4 else tensor
    cuts = [((0, 0), (2, 4)), ((0, 4), (2, 2)), ((2, 0), (3, 1)), ((2, 1), (3, 5))]
    path = write_cut(tmp_path / "run", {"w": (view, cuts)})
    if dtype not in FLOAT4:
        with open_dcp(path) as checkpoint:
            assert_same(checkpoint, {"w": tensor})
        return
    whole = save(tmp_path / "packed", {"w": tensor})  # torch cannot slice this dtype, so the chunks are made from bytes
    data = b""
    metadata = metadata_of(path)
    places = metadata.storage_data
    for index in places:
        part = view[
            tuple(slice(at, at + n) for at, n in zip(index.offset, dict(cuts)[tuple(index.offset)], strict=True))
        ]
        content = archive(part.clone().view(dtype))
        places[index] = dataclasses.replace(
            places[index], relative_path="p.distcp", offset=len(data), length=len(content)
        )
        data += content
    (Path(path) / "p.distcp").write_bytes(data)
    metadata.state_dict_metadata["w"].properties = metadata_of(whole).state_dict_metadata["w"].properties
    with open_dcp(put_metadata(path, metadata)) as checkpoint:
        assert_same(checkpoint, {"w": tensor})


BASE = torch.arange(24, dtype=torch.float32)
COMPLEX = torch.complex(BASE[:6], BASE[6:12])
VIEWS = {
    "transposed": BASE.view(4, 6).T,
    "rows of a larger one": BASE.view(4, 6)[1:3],
    "column": BASE.view(4, 6)[:, 2],
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
    "channels last": BASE.view(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "conj": COMPLEX.conj(),
    "neg": COMPLEX.conj().imag,
    "scalar": BASE[3],
    "no rows": torch.empty(0, 3),
    "no columns": torch.empty(3, 0),
    "parameter": nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_and_empty_tensors(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "run", {"w": VIEWS[name]})
    assert bits(loaded(path, tmp_path)["w"]) == bits(VIEWS[name])
    with open_dcp(path) as checkpoint:
        assert_same(checkpoint, {"w": VIEWS[name]})


def test_two_ranks_give_whole_tensors(saved_by_ranks: Path, tmp_path: Path) -> None:
    """DTensors are split by rows or columns, with fewer rows than ranks, replicated, transposed, in bfloat16."""
    path = str(saved_by_ranks / "dcp")
    assert len([name for name in os.listdir(path) if name.endswith(".distcp")]) == 2
    whole = loaded(path, tmp_path)
    with open_dcp(path) as checkpoint:
        assert_same(checkpoint, whole["model"])
        assert_whole(checkpoint)
        assert {entry.path: entry.value for entry in checkpoint.entries} == {"step": 3, "lr": [0.5, 2.0]}
        kernel = {key for key in checkpoint if isinstance(checkpoint.payload(key), Extent)}
        assert kernel == {"one row", "whole", "plain"}, "one whole chunk is a range that the kernel can copy"
        for key in kernel:
            extent = checkpoint.payload(key)
            assert isinstance(extent, Extent)
            with open(extent.file.path, "rb") as file:
                file.seek(extent.offset)
                assert file.read(extent.nbytes) == bits(full_tensors()[key])
        checkpoint.check_unchanged()


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
def test_any_grid_of_chunks_reads_as_torch_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("grid")
    tensor = random_tensor(torch.int16, (rows, columns, 2))

    def ranges(size: int) -> list[tuple[int, int]]:
        cuts = sorted(data.draw(st.sets(st.integers(1, size), max_size=3)) | {0, size})
        return list(pairwise(cuts))

    cuts = [((top, left, 0), (bottom - top, right - left, 2)) for top, bottom in ranges(rows)
            for left, right in ranges(columns)]  # fmt: skip
    path = write_cut(tmp_path / "run", {"w": (tensor, data.draw(st.permutations(cuts)))})
    assert bits(loaded(path, tmp_path)["w"]) == bits(tensor)
    with open_dcp(path) as checkpoint:
        assert_same(checkpoint, {"w": tensor})


def test_a_thousand_files_do_not_exhaust_the_descriptors(tmp_path: Path) -> None:
    rows = 1100
    tensor = torch.arange(rows * 2).reshape(rows, 2)
    path = write_cut(tmp_path / "run", {"w": (tensor, [((row, 0), (1, 2)) for row in range(rows)])}, rows)
    before = len(os.listdir("/proc/self/fd"))
    with open_dcp(path) as checkpoint:
        assert_same(checkpoint, {"w": tensor})
        checkpoint.check_unchanged()
        assert len(os.listdir("/proc/self/fd")) < before + 150
        payload = checkpoint.payload("w")
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(PathError, match="the checkpoint was closed"):
        list(payload.chunks())


def test_too_many_or_too_large_objects_are_named_and_not_read(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "text": "x" * 2_000_000, "pair": (torch.ones(2), 1), "none": None}
    with open_dcp(save(tmp_path / "run", {"model": {"w": state.pop("w")}, **state})) as checkpoint:
        assert [(entry.path, entry.type) for entry in checkpoint.entries] == [
            ("text", "StoredObject"),
            ("pair", "StoredObject"),
            ("none", "null"),
        ]
        assert checkpoint.warnings == ("1 stored object not read (too many or too large): 'text', 2.0 MB",)


def test_objects_of_unknown_classes_are_references(tmp_path: Path) -> None:
    with open_dcp(save(tmp_path / "run", {"model": {"w": torch.ones(2)}, "config": Config()})) as checkpoint:
        assert any(name.endswith("test_dcp.Config") for name in checkpoint.references)
        assert "code reference, not run" in checkpoint.warnings[0]
        assert not checkpoint.suspicious


class Config:
    """A class of the user."""


def test_neither_torch_nor_numpy_is_imported(saved_by_ranks: Path) -> None:
    program = """if True:
        import sys
        from ckptkit import open_checkpoint
        for path in sys.argv[1:]:
            checkpoint = open_checkpoint(path)
            keys = [key for key in checkpoint if key not in ("transposed",)]
            assert sum(len(checkpoint.read_bytes(key)) for key in keys) > 700, keys
        print(sorted({"torch", "numpy", "pickle"} & set(sys.modules)))"""
    paths = [str(path) for path in (saved_by_ranks / "dcp", saved_by_ranks / "safetensors") if path.exists()]
    done = subprocess.run([sys.executable, "-c", program, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_directory_is_recognised_by_its_file_names() -> None:
    assert is_dcp(["__0_0.distcp"])
    assert is_dcp([".metadata"])
    assert is_dcp(["shard-00001-model-00001-of-00001.safetensors"])
    assert not is_dcp(["model-00001-of-00002.safetensors", "model.safetensors.index.json", "metadata", "distcp"])


class Attack:
    """Runs a command when pickle loads it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["planner_data", "storage_meta", "instead"])
def test_h10_code_in_the_metadata_is_not_run(broken: str, tmp_path: Path, where: str) -> None:
    attack = Attack(f"touch {tmp_path}/ran")
    metadata = metadata_of(broken)
    if where == "instead":
        put_metadata(broken, attack)
        assert "the pickle is a 'posix.system', not a Metadata of DCP" in refusal(broken).reason
    else:
        if where == "planner_data":
            metadata.planner_data["more"] = attack
        else:
            metadata.storage_meta = attack
        put_metadata(broken, metadata)
        with open_dcp(broken) as checkpoint:
            assert checkpoint.suspicious
            assert "posix.system" in checkpoint.references
            assert "looks malicious" in checkpoint.warnings[0]
            assert_whole(checkpoint)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(AttributeError):  # the attack is real: torch's own reader runs it
        FileSystemReader(broken).read_metadata()
    assert (tmp_path / "ran").exists()


def test_h10_code_in_an_item_is_not_run(tmp_path: Path) -> None:
    path = save(tmp_path / "run", {"model": {"w": torch.ones(2)}, "x": Attack(f"touch {tmp_path}/ran")})
    with open_dcp(path) as checkpoint:
        assert checkpoint.suspicious
        assert "posix.system" in checkpoint.references
        assert checkpoint.entries[0].value == "code reference, not run"
    assert not (tmp_path / "ran").exists()


def test_h11_an_interrupted_save_is_named(broken: str) -> None:
    os.remove(f"{broken}/.metadata")
    error = refusal(broken)
    assert error.reason == "2 .distcp files and no .metadata, which is written last: an interrupted save?"
    assert error.hint


def test_metadata_of_each_rank_is_not_an_interrupted_save(broken: str) -> None:
    os.rename(f"{broken}/.metadata", f"{broken}/__0.metadata")
    assert (
        refusal(broken).reason
        == "saved with use_collectives=False: each rank has its own metadata, and there is no joined one"
    )


Damage = Callable[[Any], object]


def _place(metadata: Any, key: str, number: int = 0) -> MetadataIndex:
    found: list[MetadataIndex] = [index for index in metadata.storage_data if index.fqn == key]
    return found[number]


def _moved(key: str, **fields: Any) -> Damage:
    def change(metadata: Any) -> None:
        index = _place(metadata, key)
        for name in fields:
            require(metadata.storage_data[index], name)
        metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **fields)

    return change


def _chunks(change: Callable[[list[ChunkStorageMetadata]], object], key: str = "model.rows") -> Damage:
    return lambda metadata: change(metadata.state_dict_metadata[key].chunks)


def _resize(index: int, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Damage:
    """Change a chunk and its place in the same way, so that they agree."""

    def change(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata["model.rows"].chunks[index]
        place = metadata.storage_data.pop(MetadataIndex("model.rows", chunk.offsets))
        chunk.offsets, chunk.sizes = torch.Size(offsets), torch.Size(sizes)
        metadata.storage_data[MetadataIndex("model.rows", offsets)] = place

    return change


def _both(*changes: Damage) -> Damage:
    return lambda metadata: [change(metadata) for change in changes]


def _drop_chunk(index: int) -> Damage:
    def change(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata["model.rows"].chunks.pop(index)
        del metadata.storage_data[MetadataIndex("model.rows", chunk.offsets)]

    return change


def _described(**fields: Any) -> Damage:
    return lambda metadata: metadata.state_dict_metadata["model.rows"].__dict__.update(fields)


def _set(**fields: Any) -> Damage:
    return lambda metadata: metadata.__dict__.update(fields)


DAMAGED: dict[str, tuple[Damage, str]] = {
    "H12 climbs": (_moved("model.rows", relative_path="../outside.distcp"), r"unsafe file '\.\./outside\.distcp'"),
    "H12 absolute": (_moved("model.rows", relative_path="/etc/passwd"), r"unsafe file '/etc/passwd'"),
    "H12 windows": (_moved("model.rows", relative_path="..\\x"), r"unsafe file '\.\.\\\\x'"),
    "H12 drive": (_moved("model.rows", relative_path="C:x"), "unsafe file 'C:x'"),
    "H12 NUL": (_moved("model.rows", relative_path="a\0b"), r"unsafe file 'a\\x00b'"),
    "H12 dots": (_moved("model.rows", relative_path=".."), r"unsafe file '\.\.'"),
    "H12 no such file": (
        _moved("model.rows", relative_path="__7_0.distcp"),
        r"no such file or directory \(the file that holds the chunk at \[0, 0\] of 'model\.rows'\)",
    ),
    "H12 offset past the end": (
        _moved("model.rows", offset=10**9),
        r"'model.rows': the metadata places the chunk at \[0, 0\] at bytes 1,000,000,000 to 1,000,001,\d+, and",
    ),
    "H12 length past the end": (_moved("step", length=10**9), "'step': the metadata places the value at bytes"),
    "H12 no bytes": (_moved("step", length=0), "'step': the metadata places the value at bytes"),
    "H12 negative": (_moved("step", offset=-4), "'step': its place has the offset '-4'"),
    "H12 enormous": (_moved("step", offset=2**70), r"'step': its place has the offset '1180591620717411303424'"),
    "H12 beyond printing": (_moved("step", offset=1 << 20000), r"the offset an integer of 20001 bits"),
    "H12 no numbers": (_moved("step", offset="0"), "'step': its place is not a file name with an offset and a length"),
    "H12 shared bytes": (_moved("model.rows", offset=8), r"places 'model\.rows' and '.*' in the same bytes from"),
    "H12 shifted": (
        _moved("step", offset=1, length=1000),
        r"'step': the item at byte 1: |'step' and 'lr' in the same bytes",
    ),
    "extension": (
        _moved("model.rows", transform_descriptors=["zstd"]),
        r"'model\.rows' is stored through the extension .*zstd",
    ),
    "H13 hole": (_drop_chunk(1), "'model.rows': rows 4-6 are covered by no chunk"),
    "H13 first": (_drop_chunk(0), "'model.rows': rows 0-3 are covered by no chunk"),
    "H13 nothing": (_both(_drop_chunk(0), _drop_chunk(0)), "'model.rows': the whole tensor is covered by no chunk"),
    "H13 small hole": (_resize(1, (5, 0), (2, 3)), "'model.rows': row 4 is covered by no chunk"),
    "H13 overlap": (_resize(1, (3, 0), (4, 3)), "'model.rows': row 3 is covered by 2 chunks"),
    "H13 outside": (_resize(1, (5, 0), (3, 3)), r"'model.rows': a chunk at \[5, 0\] of size \[3, 3\] reaches outside"),
    "H13 larger tensor": (_described(size=torch.Size((9, 3))), "'model.rows': rows 7-8 are covered by no chunk"),
    "H13 smaller tensor": (_described(size=torch.Size((5, 3))), "reaches outside the shape"),
    "H13 dimensions": (_described(size=torch.Size((7, 3, 1))), "does not have the 3 dimensions of the tensor"),
    "H13 wrong dtype": (
        _described(properties=TensorProperties(dtype=torch.int32)),
        r"'model\.rows': the item at byte \d+: holds F32 \[4, 3\], but the metadata says I32 \[4, 3\]",
    ),
    "H13 wrong shape": (
        _both(_resize(0, (0, 0), (3, 3)), _resize(1, (3, 0), (4, 3))),
        r"'model\.rows': the item at byte \d+: holds F32 \[4, 3\], but the metadata says F32 \[3, 3\]",
    ),
    "H13 same chunk twice": (
        _chunks(lambda chunks: chunks.append(chunks[0])),
        r"'model\.rows': storage_data has no place for the chunk at \[0, 0\]",
    ),
    "no place": (
        lambda metadata: metadata.storage_data.pop(_place(metadata, "model.rows", 1)),
        r"'model\.rows': storage_data has no place for the chunk at \[4, 0\]",
    ),
    "no place for a value": (
        lambda metadata: metadata.storage_data.pop(_place(metadata, "step")),
        "'step': storage_data has no place for it",
    ),
    "not described": (
        lambda metadata: metadata.state_dict_metadata.pop("step"),
        "storage_data places 'step', which state_dict_metadata does not describe",
    ),
    "a value for a tensor": (
        lambda metadata: metadata.storage_data.update(
            {_place(metadata, "model.plain"): metadata.storage_data.pop(_place(metadata, "step"))}
        ),
        "'step': storage_data has no place for it",
    ),
    "no tables": (_set(state_dict_metadata=None), "state_dict_metadata is a 'null', not a dict"),
    "no places": (_set(storage_data=[]), "storage_data is a 'list', not a dict"),
    "odd key": (
        lambda metadata: metadata.state_dict_metadata.update({3: metadata.state_dict_metadata["step"]}),
        "state_dict_metadata has an 'int' as a key",
    ),
    "odd place": (
        lambda metadata: metadata.storage_data.update({"x": 1}),
        "a key of storage_data is a 'str', not a MetadataIndex of DCP",
    ),
    "odd chunk": (
        _chunks(lambda chunks: chunks.append(None)),  # type: ignore[arg-type]
        r"'model\.rows': a chunk is a 'null', not a ChunkStorageMetadata",
    ),
    "odd chunks": (_described(chunks=3), r"'model\.rows': its chunks are an 'int', not a list"),
    "odd size": (_described(size=[7, 3]), r"'model\.rows': the shape is not a tuple of counts"),
    "negative size": (_described(size=(7, -3)), r"'model\.rows': the shape is not a tuple of counts: '\(7, -3\)'"),
    "too many dimensions": (_described(size=(1,) * 65), r"'model\.rows': the shape has 65 dimensions"),
    "overflow": (
        _both(_drop_chunk(0), _drop_chunk(0), _described(size=torch.Size((0, 2**62, 4)))),
        r"'model\.rows'|'rows': the shape .* overflows",
    ),
    "odd properties": (
        _described(properties=None),
        r"'model\.rows': its properties are a 'null'",
    ),
    "odd path": (
        lambda metadata: metadata.planner_data.update({"step": 5}),
        "'step': its path in planner_data is '5'",
    ),
    "empty path": (lambda metadata: metadata.planner_data.update({"step": ()}), "'step': its path in planner_data is"),
    "long path": (
        lambda metadata: metadata.planner_data.update({"step": ("a",) * 201}),
        "'step': its path in planner_data is",
    ),
    "negative path": (
        lambda metadata: metadata.planner_data.update({"step": ("a", -1)}),
        "'step': its path in planner_data has an index out of bounds",
    ),
    "two at one path": (
        lambda metadata: metadata.planner_data.update({"step": ("model", "rows")}),
        "planner_data gives 'step' the place of another value",
    ),
    "path through a tensor": (
        lambda metadata: metadata.planner_data.update({"step": ("model", "rows", "x")}),
        "planner_data places 'step' inside a value that is not a mapping",
    ),
    "path of a mapping": (
        lambda metadata: metadata.planner_data.update({"step": ("model",)}),
        "planner_data gives 'step' the place of another value",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_metadata_that_contradicts_itself_or_the_files_is_refused(broken: str, case: str) -> None:
    damage, reason = DAMAGED[case]
    error = refusal(edit(broken, damage))
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason


def test_torch_itself_ignores_a_gap(broken: str, tmp_path: Path) -> None:
    """torch converts the same directory without an error, which is the reason for the check of coverage."""
    assert loaded(edit(broken, _drop_chunk(1)), tmp_path)["model"]["rows"].shape == (7, 3)


@pytest.mark.parametrize("size", [0, 1, 100, 2000, -1])
def test_h12_a_file_cut_short_is_named(broken: str, size: int) -> None:
    target = Path(broken) / "__1_0.distcp"
    data = target.read_bytes()
    target.write_bytes(data[:size])
    error = refusal(broken)
    assert error.path == str(target)
    assert "truncated?" in error.reason


def test_h12_a_missing_file_is_named(broken: str) -> None:
    os.remove(f"{broken}/__1_0.distcp")
    error = refusal(broken)
    assert error.path == f"{broken}/__1_0.distcp"
    assert "no such file or directory (the file that holds" in error.reason


def test_every_cut_and_every_changed_byte_of_the_metadata_is_read_or_refused(broken: str) -> None:
    target = Path(broken) / ".metadata"
    data = target.read_bytes()
    for at in range(0, len(data), 7):
        for changed in (data[:at], data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :]):
            target.write_bytes(changed)
            try:
                with open_dcp(broken) as checkpoint:
                    for key in checkpoint:
                        checkpoint.read_bytes(key)
            except CkptkitError as error:
                assert "\n" not in str(error)  # noqa: PT017 - most changes are refused, a few harmless ones are not


def test_damage_inside_an_item_is_named_when_it_is_read(broken: str) -> None:
    metadata = metadata_of(broken)
    index = _place(metadata, "model.rows")
    place = metadata.storage_data[index]
    target = Path(broken) / place.relative_path
    data = bytearray(target.read_bytes())
    data[place.offset : place.offset + 4] = b"nope"
    target.write_bytes(data)
    with open_dcp(broken) as checkpoint:
        checkpoint.read_bytes("columns")
        with pytest.raises(FormatError, match=r"'model\.rows': the item at byte") as caught:
            checkpoint.read_bytes("rows")
        assert caught.value.path == str(target)


def test_an_item_that_is_not_a_tensor_is_refused(broken: str) -> None:
    swapped = metadata_of(broken)
    one, other = _place(swapped, "model.plain"), _place(swapped, "step")
    places = swapped.storage_data
    places[one], places[other] = places[other], places[one]
    with open_dcp(put_metadata(broken, swapped)) as checkpoint:
        with pytest.raises(FormatError, match=r"'model\.plain': the item at byte \d+: holds 'int', not a tensor"):
            checkpoint.read_bytes("plain")
        assert checkpoint.entries[-2].type == "StoredObject", "a tensor where a value should be stays unread"


def test_a_change_while_reading_is_noticed(broken: str) -> None:
    with open_dcp(broken) as checkpoint:
        checkpoint.read_bytes("rows")
        with open(f"{broken}/__0_0.distcp", "ab") as file:
            file.write(b"more")
        with pytest.raises(ChangedError):
            checkpoint.check_unchanged()


def test_a_warning_names_files_of_another_save(broken: str) -> None:
    shutil.copy(f"{broken}/__0_0.distcp", f"{broken}/__5_0.distcp")
    with open_dcp(broken) as checkpoint:
        assert checkpoint.warnings == ("1 file not named in .metadata, left from another save: '__5_0.distcp'",)


def test_a_warning_names_another_version(broken: str) -> None:
    with open_dcp(edit(broken, _set(version="2.0.0"))) as checkpoint:
        assert checkpoint.warnings == ("written in version '2.0.0' of the format; 1.0.0 is supported",)


def test_a_list_of_chunks_shared_by_many_tensors_is_not_walked_for_each() -> None:
    shape = torch.Size((0, 3))
    chunks = [ChunkStorageMetadata(shape, shape)] * 20_000
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), shape, chunks)
    metadata = Metadata({f"w{number}": tensor for number in range(100)}, {}, {})
    with pytest.raises(FormatError, match="more than 1,000,000 chunks"):
        read_metadata(pickle.dumps(metadata, 4))


def test_bytes_after_the_pickle_are_refused(broken: str) -> None:
    with open(f"{broken}/.metadata", "ab") as file:
        file.write(b"more")
    error = refusal(broken)
    assert error.reason == "4 bytes follow the pickle in .metadata"
    assert error.path == f"{broken}/.metadata"
