"""A directory of shards is one checkpoint: the index and the shards must agree, and nothing outside is followed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats import open_checkpoint
from ckptkit.sharing import shared_keys
from tests.helpers_formats import assert_same, refusal

STATE = {"a.w": torch.arange(6.0).reshape(2, 3), "a.b": torch.ones(2, dtype=torch.bfloat16), "c.w": torch.arange(4)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
TOTAL = 24 + 4 + 32
NAMES = {
    "safetensors": (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ),
    "bin": ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
}


def save(state: Mapping[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(dict(state), path, {"format": "pt"})
    else:
        torch.save(dict(state), path)


def shard(directory: Path, kind: str = "safetensors", total: Any = TOTAL) -> Path:
    """Write the state as two shards; return the path of the index."""
    directory.mkdir(exist_ok=True)
    first, second, index = NAMES[kind]
    save({key: STATE[key] for key in ("a.w", "a.b")}, directory / first)
    save({"c.w": STATE["c.w"]}, directory / second)
    weight_map = {"a.w": first, "a.b": first, "c.w": second}
    (directory / index).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return directory / index


def edit(index: Path, **weight_map: Any) -> None:
    document = json.loads(index.read_text())
    document["weight_map"] = {key: value for key, value in (document["weight_map"] | weight_map).items() if value != ""}
    index.write_text(json.dumps(document))


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


def test_an_index_beside_no_other_path_is_opened_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = shard(tmp_path)
    monkeypatch.chdir(tmp_path)
    with open_checkpoint(index.name) as checkpoint:
        assert_same(checkpoint, STATE)


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


def test_an_index_goes_before_a_single_file_and_that_is_said(tmp_path: Path) -> None:
    """H8: one of the two is stale; which one, only a person can tell."""
    shard(tmp_path)
    save({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, STATE)
        assert ["'model.safetensors' lies beside the index" in text for text in checkpoint.warnings] == [True]


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    shard(tmp_path, "bin")
    shard(tmp_path, "safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "sharded safetensors (2 shards)"


@pytest.mark.parametrize("total", [TOTAL + 1, 0, "60", [60], {"a": 1}, 10**4000, -0.5])
def test_a_wrong_total_size_is_a_warning(tmp_path: Path, total: Any) -> None:
    """H6: some writers put the sum of the file sizes there."""
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
    """H2: snapshots are symbolic links to ../../blobs; their own names are plain."""
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
    """H1: by the rules of every system at once, before anything is opened."""
    index = shard(tmp_path / "x")
    save({"a.w": STATE["a.w"]}, tmp_path / "x.safetensors")
    edit(index, **{"a.w": name})
    error = refusal(str(tmp_path / "x"))
    assert "the index names the unsafe shard" in error.reason
    assert error.path == str(index)


def _rewrite(index: Path, text: str) -> None:
    index.write_text(text)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "H3 missing": (lambda at: (at.parent / SECOND).unlink(), "no such file .*should hold 'c.w'", SECOND),
    "H3 empty": (lambda at: (at.parent / SECOND).write_bytes(b""), "the file is empty .*should hold 'c.w'", SECOND),
    "H3 a pointer": (lambda at: (at.parent / SECOND).write_bytes(LFS), "git-lfs pointer.*should hold 'c.w'", SECOND),
    "H3 truncated": (
        lambda at: (at.parent / SECOND).write_bytes((at.parent / SECOND).read_bytes()[:-1]),
        "truncated: 1 of",
        SECOND,
    ),
    "H3 a directory": (lambda at: _replace(at.parent / SECOND, Path.mkdir), "not a regular file", SECOND),
    "H3 a dangling link": (
        lambda at: _replace(at.parent / SECOND, lambda path: path.symlink_to("gone")),
        "link to 'gone'",
        SECOND,
    ),
    "H4 in the index only": (lambda at: edit(at, x=FIRST), "the index places 'x' here, but the shard does not", FIRST),
    "H4 in the wrong shard": (
        lambda at: edit(at, **{"a.w": SECOND}),
        "places 'a.w' here, but the shard does not",
        SECOND,
    ),
    "H4 in the shard only": (lambda at: edit(at, **{"a.b": ""}), "the shard holds 'a.b' here, but the index", FIRST),
    "H4 in two shards": (
        lambda at: save({"c.w": STATE["c.w"], "a.w": STATE["a.w"]}, at.parent / SECOND),
        "the shard holds 'a.w'",
        SECOND,
    ),
    "H4 a third shard": (
        lambda at: save({"z": torch.ones(1)}, at.parent / "model-00003-of-00003.safetensors"),
        "'model-00003-of-00003.safetensors' lies beside the index and is not named",
        "",
    ),
    "H5 not JSON": (lambda at: _rewrite(at, "{"), "the index is not JSON", INDEX),
    "H5 empty": (lambda at: _rewrite(at, ""), "the index is not JSON", INDEX),
    "H5 a list": (lambda at: _rewrite(at, "[]"), "the index is a JSON list", INDEX),
    "H5 not UTF-8": (lambda at: at.write_bytes(b'{"\xff":1}'), "the index is not UTF-8", INDEX),
    "H5 nested": (lambda at: _rewrite(at, "[" * 10**5), "nested too deeply|not JSON", INDEX),
    "H5 no map": (lambda at: _rewrite(at, "{}"), "the index has no weight_map", INDEX),
    "H5 an empty map": (lambda at: _rewrite(at, '{"weight_map":{}}'), "the index has no weight_map", INDEX),
    "H5 a list as map": (lambda at: _rewrite(at, '{"weight_map":[1]}'), "the index has no weight_map", INDEX),
    "H5 a number": (lambda at: edit(at, **{"a.w": 1}), "maps 'a.w' to a int, not to a file name", INDEX),
    "H5 an object": (lambda at: edit(at, **{"a.w": {"file": FIRST}}), "maps 'a.w' to a dict, not", INDEX),
    "H5 null": (lambda at: edit(at, **{"a.w": None}), "maps 'a.w' to a NoneType, not to a file", INDEX),
    "H5 twice": (lambda at: _rewrite(at, '{"weight_map":{"a":"x","a":"y"}}'), "the index names 'a' twice", INDEX),
    "H7 a pickle": (lambda at: edit(at, **{"a.w": "x.bin"}), "an index of safetensors shards names 'x.bin'", INDEX),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_set_of_shards_names_the_file_and_the_tensor(tmp_path: Path, case: str) -> None:
    damage, reason, name = BROKEN[case]
    damage(shard(tmp_path))
    error = refusal(str(tmp_path))
    assert isinstance(error, CkptkitError)
    assert re.search(reason, error.reason), error.reason
    assert error.path == str(tmp_path / name if name else tmp_path)


def test_an_extra_shard_is_no_matter_where_the_index_itself_is_given(tmp_path: Path) -> None:
    index = shard(tmp_path)
    save({"z": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    with open_checkpoint(index) as checkpoint:
        assert_same(checkpoint, STATE)


def test_another_model_beside_the_shards_is_no_matter(tmp_path: Path) -> None:
    shard(tmp_path)
    save({"z": torch.ones(1)}, tmp_path / "other-00001-of-00001.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, STATE)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        pytest.param([], "a directory without a checkpoint in it", id="empty"),
        pytest.param(["config.json", "README.md"], "a directory without a checkpoint in it", id="no weights"),
        pytest.param(["a.pt", "b.pt"], "2 files of weights and no index, such as a.pt, b.pt", id="two files"),
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


def test_a_mapping_inside_shards_is_refused_with_the_way_out(tmp_path: Path) -> None:
    shard(tmp_path)
    error = refusal(f"{tmp_path}::a")
    assert "there is no mapping 'a' inside" in error.reason
    assert error.hint == "use --keep 'a.*'"
