"""A directory of shards is one checkpoint; index and shards must agree, and shards must be in the directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit.core.ties import shared_keys
from ckptkit.errors import FormatError, PathError
from ckptkit.formats import open_checkpoint
from tests.helpers_formats import assert_same, refusal
from tests.helpers_gguf import gguf_file, info
from tests.helpers_shards import NAMES, STATE, TOTAL, edit, save, shard


@pytest.mark.parametrize("by", ["directory", "index"])
@pytest.mark.parametrize("kind", NAMES)
def test_shards_are_one_checkpoint(tmp_path: Path, kind: str, by: str) -> None:
    index = shard(tmp_path, kind)
    with open_checkpoint(tmp_path if by == "directory" else index) as checkpoint:
        assert_same(checkpoint, STATE)
        assert checkpoint.warnings == ()
        assert checkpoint.format.startswith("sharded ")
        assert "(2 shards)" in checkpoint.format
        assert {Path(file).name for file in checkpoint.files} == set(NAMES[kind])
        assert dict(checkpoint.metadata) == ({"format": "pt"} if kind == "safetensors" else {})
        checkpoint.check_unchanged()


def test_an_index_in_the_current_directory_is_opened_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = shard(tmp_path)
    monkeypatch.chdir(tmp_path)
    with open_checkpoint(index.name) as checkpoint:
        assert_same(checkpoint, STATE)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts the open files of the process")
@pytest.mark.parametrize("has_index", [True, False])
def test_few_of_many_shards_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_index: bool) -> None:
    """Otherwise a checkpoint of more shards than a process may have open files cannot be read."""
    monkeypatch.setattr("ckptkit.core.files.pool._MOST_OPEN", 2)
    names = [f"model-{number:05}-of-00009.safetensors" for number in range(1, 10)]
    for number, name in enumerate(names):
        save({f"w{number}": torch.full((2,), float(number))}, tmp_path / name)
    if has_index:
        index = {"weight_map": {f"w{number}": name for number, name in enumerate(names)}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = len(os.listdir("/proc/self/fd"))
    with open_checkpoint(tmp_path) as checkpoint:
        assert [checkpoint.read(key)[0].item() for key in checkpoint] == list(range(9))
        checkpoint.check_unchanged(by_path=True)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(PathError, match="closed"):
        checkpoint.read("w0")


def test_tensors_of_different_shards_share_nothing(tmp_path: Path) -> None:
    shard(tmp_path, "bin")
    first = NAMES["bin"][0]
    save({"a.w": STATE["a.w"], "a.b": STATE["a.w"]}, tmp_path / first)
    with open_checkpoint(tmp_path) as checkpoint:
        assert shared_keys(checkpoint) == {"a.w": ("a.b",), "a.b": ("a.w",)}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "anything.safetensors", "last.ckpt"]
)
def test_a_directory_with_a_single_file_is_that_file(tmp_path: Path, name: str) -> None:
    save(STATE, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        assert {key: checkpoint.read_bytes(key) for key in STATE}.keys() == dict(checkpoint).keys()
        assert checkpoint.path == str(tmp_path / name)


def test_an_index_wins_over_a_single_file_with_a_warning(tmp_path: Path) -> None:
    """H8: the index or the file is stale, and only the user knows which."""
    shard(tmp_path)
    save({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, STATE)
        assert ["'model.safetensors' is not read; only the index" in text for text in checkpoint.warnings] == [True]


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    shard(tmp_path, "bin")
    shard(tmp_path, "safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "sharded safetensors (2 shards)"


@pytest.mark.parametrize("total", [TOTAL + 1, 0, "60", [60], {"a": 1}, 10**4000, -0.5])
def test_a_wrong_total_size_is_a_warning(tmp_path: Path, total: Any) -> None:
    """H6: some writers give the sum of the file sizes."""
    shard(tmp_path, total=total)
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, STATE)
        assert ["total size" in text and f"have {TOTAL}" in text for text in checkpoint.warnings] == [True]
        assert len(checkpoint.warnings[0]) < 200


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(lambda document: document.pop("metadata"), id="no metadata"),
        pytest.param(lambda document: document.update(metadata=None), id="metadata null"),
        pytest.param(lambda document: document.update(metadata=[1]), id="metadata a list"),
        pytest.param(lambda document: document.update(more=1), id="more fields"),
    ],
)
def test_an_index_without_a_total_is_read(tmp_path: Path, document: Callable[[dict[str, Any]], object]) -> None:
    index = shard(tmp_path)
    made = json.loads(index.read_text())
    document(made)
    index.write_text(json.dumps(made))
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, STATE)
        assert checkpoint.warnings == ()


def test_shards_may_be_links_as_in_the_cache_of_a_hub(tmp_path: Path) -> None:
    """H2: the files of a snapshot are symbolic links to ../../blobs with plain names."""
    shard(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in NAMES["safetensors"]:
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    with open_checkpoint(snapshot) as checkpoint:
        assert_same(checkpoint, STATE)


FIRST, SECOND, INDEX = NAMES["safetensors"]


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "C:x.safetensors", "C:\\x.safetensors", "\\\\srv\\share\\x.safetensors",
     "..\\x.safetensors", "\\x.safetensors", "sub/x.safetensors", "./x.safetensors", "..", ".", "x\0.safetensors"],
)  # fmt: skip
def test_a_shard_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """H1: a name is checked by the rules of every operating system, before a shard is opened."""
    index = shard(tmp_path / "x")
    save({"a.w": STATE["a.w"]}, tmp_path / "x.safetensors")
    edit(index, **{"a.w": name})
    error = refusal(str(tmp_path / "x"))
    assert "the index names the unsafe shard" in error.reason
    assert error.path == str(index)


def test_an_extra_shard_is_allowed_where_the_index_is_given(tmp_path: Path) -> None:
    index = shard(tmp_path)
    save({"z": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    with open_checkpoint(index) as checkpoint:
        assert_same(checkpoint, STATE)


def test_another_model_beside_the_shards_is_ignored(tmp_path: Path) -> None:
    shard(tmp_path)
    save({"z": torch.ones(1)}, tmp_path / "other-00001-of-00001.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, STATE)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        pytest.param([], "a directory without a checkpoint", id="empty"),
        pytest.param(["config.json", "README.md"], "a directory without a checkpoint", id="no weights"),
        pytest.param(["a.pt", "b.pt"], "2 files of weights and no index: a.pt, b.pt", id="two files"),
        pytest.param(["a.safetensors.index.json", "b.safetensors.index.json"], "holds 2 indexes", id="two indexes"),
    ],
)
def test_a_directory_that_is_not_one_checkpoint_is_refused(tmp_path: Path, names: list[str], reason: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    error = refusal(str(tmp_path))
    assert isinstance(error, FormatError)
    assert reason in error.reason
    assert error.hint
    assert error.path == str(tmp_path)


def test_the_hint_for_an_incomplete_copy_is_to_copy_the_missing_file(tmp_path: Path) -> None:
    """Shards can lack their index, and an index can lack a shard."""
    shard(tmp_path)
    (index,) = tmp_path.glob("*.index.json")
    one = min(tmp_path.glob("*-of-*"))
    text, content = index.read_bytes(), one.read_bytes()
    index.unlink()
    one.unlink()
    error = refusal(str(tmp_path))
    assert error.reason == "1 of 2 shards and no index: 'model-00001-of-00002.safetensors' is missing"
    assert error.hint is not None
    assert error.hint.startswith("copy the missing files too; ")
    index.write_bytes(text)
    assert (refusal(str(tmp_path)).path, refusal(str(tmp_path)).hint) == (str(one), "download or copy it again")
    one.write_bytes(content)
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, STATE)


def test_a_mapping_inside_shards_is_refused_with_a_hint(tmp_path: Path) -> None:
    shard(tmp_path)
    error = refusal(f"{tmp_path}::a")
    assert "not a mapping 'a'" in error.reason
    assert error.hint == "without the :: part, --keep 'a.*' selects keys by their names"


def test_a_link_out_of_the_directory_is_followed_with_a_warning(tmp_path: Path) -> None:
    """H2: shards may be on another disk, but the user of an unknown archive must see the links."""
    shard(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    for name in (FIRST, SECOND):
        (tmp_path / "run" / name).rename(tmp_path / "disk" / name)
        (tmp_path / "run" / name).symlink_to(Path("../disk") / name)
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert_same(checkpoint, STATE)
        assert checkpoint.warnings == (
            f"'{FIRST}' is a link out of the directory, to '{tmp_path / 'disk' / FIRST}', like 1 more link",
        )
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").symlink_to(tmp_path / "disk" / SECOND)
    with open_checkpoint(tmp_path / "one") as checkpoint:
        assert list(checkpoint) == ["c.w"]
        assert ["is a link out of the directory" in text for text in checkpoint.warnings] == [True]


def test_blocks_keep_their_stored_size_in_a_shard(tmp_path: Path) -> None:
    """A shard can have any format: the dtype of GGUF blocks does not give their size."""
    (tmp_path / "a.bin").write_bytes(gguf_file([info("w", (32,), 8)], data=bytes(34)))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": "a.bin"}}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint["w"].dtype, checkpoint["w"].nbytes) == ("Q8_0", 34)
