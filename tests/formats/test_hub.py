"""``hf:org/name`` is found in the local cache of the Hugging Face libraries, without a network and without an extra."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from ckptkit import Checkpoint, PathError, load_rules, merge, open_checkpoint, open_optimizer
from ckptkit.core.files.hub import hub_path
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_hub import COMMIT, OTHER_COMMIT, add_snapshot

TUNED = ROOT / "fixtures/lenet_tuned.safetensors"
DDP = ROOT / "fixtures/lenet_ddp.pt"
RULES = b'keep = ["conv*"]\n'
_VARIABLES = (
    "HF_HUB_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an empty cache; the hub must not be asked."""
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    return tmp_path / "hub"


def keys_of(path: Path) -> list[str]:
    with safe_open(path, "np") as file:
        return sorted(file.keys())


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of the snapshot that are read; their names in messages show the commit, not the cache."""
    assert all(file.startswith("hf:") for file in checkpoint.files)
    return [Path(hub_path(file)) for file in checkpoint.files]


@pytest.mark.parametrize("layout", ["links", "copies", "shared blobs"])
def test_the_snapshot_of_main_is_read(cache: Path, layout: str) -> None:
    """Links to blobs, copies, and links to blobs that repositories share are read, and one note names the commit."""
    store = cache / "blobs" if layout == "shared blobs" else None
    folder = add_snapshot(cache, "org/lenet", {"model.safetensors": TUNED}, linked=layout != "copies", store=store)
    with open_checkpoint("hf:org/lenet") as checkpoint:
        assert sorted(checkpoint) == keys_of(TUNED)
        assert files_of(checkpoint) == [folder / "model.safetensors"]
        (note,) = checkpoint.warnings
    assert COMMIT[:12] in note
    assert "'main'" in note


REVISIONS = {
    "": COMMIT,
    "@main": COMMIT,
    "@v1": OTHER_COMMIT,
    "@refs/pr/1": OTHER_COMMIT,
    "@a%2Fbranch": OTHER_COMMIT,
    f"@{OTHER_COMMIT}": OTHER_COMMIT,
    "@607a3f": OTHER_COMMIT,
}


@pytest.mark.parametrize("revision", REVISIONS)
def test_revisions(cache: Path, revision: str) -> None:
    """Branches, tags, references of pull requests, and whole and short commits each name one snapshot."""
    files: dict[str, bytes | Path] = {"model.safetensors": TUNED, "a/rules.toml": RULES}
    add_snapshot(cache, "org/lenet", files)
    other = add_snapshot(
        cache, "org/lenet", {**files, "b.txt": b""}, commit=OTHER_COMMIT, references=["v1", "refs/pr/1", "a/branch"],
        linked=False,
    )  # fmt: skip
    folder = other.parent / REVISIONS[revision]
    with open_checkpoint(f"hf:org/lenet{revision}/model.safetensors") as checkpoint:
        assert files_of(checkpoint) == [folder / "model.safetensors"]
    with open_checkpoint(f"hf:org/lenet{revision}") as checkpoint:
        assert files_of(checkpoint) == [folder / "model.safetensors"]


# What each variable is set to in a folder; the cache is in huggingface/hub of it. The other variables must not count.
FOLDERS: dict[str, dict[str, str]] = {
    "HF_HUB_CACHE": {"HF_HUB_CACHE": "huggingface/hub", "HUGGINGFACE_HUB_CACHE": "x", "HF_HOME": "x"},
    "HUGGINGFACE_HUB_CACHE": {"HUGGINGFACE_HUB_CACHE": "huggingface/hub", "HF_HOME": "x"},
    "HF_HOME": {"HF_HOME": "huggingface", "XDG_CACHE_HOME": "x"},
    "XDG_CACHE_HOME": {"XDG_CACHE_HOME": ""},
    "nothing": {},
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", FOLDERS)
def test_the_folder_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The folder is where huggingface_hub has it: the first variable that is set counts, else the home directory."""
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / ".cache"
    for variable, value in FOLDERS[name].items():
        monkeypatch.setenv(variable, str(place / value))
    folder = add_snapshot(place / "huggingface/hub", "org/lenet", {"model.safetensors": TUNED})
    with open_checkpoint("hf:org/lenet") as checkpoint:
        assert files_of(checkpoint) == [folder / "model.safetensors"]


def test_it_stands_wherever_a_path_is_taken(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mappings, folders of pipelines, optimizer states, rule files and donors are found too, as are datasets."""
    folder = add_snapshot(cache, "org/lenet", {"run.pt": DDP, "unet/model.safetensors": TUNED, "rules.toml": RULES})
    add_snapshot(cache, "org/data", {"model.safetensors": TUNED}, kind="datasets")
    add_snapshot(cache, "gpt2", {"pytorch_model.bin": DDP})
    with open_checkpoint("hf:org/lenet::unet") as checkpoint:
        assert sorted(checkpoint) == keys_of(TUNED)
    with open_checkpoint("hf:org/lenet/run.pt::model") as checkpoint:
        assert checkpoint.envelope == "model"
    for path in ("hf:org/lenet/run.pt", "hf:gpt2::optimizer", "hf:gpt2/pytorch_model.bin"):
        with open_optimizer(path) as state:
            assert state.envelope == "optimizer"
    assert load_rules("hf:org/lenet/rules.toml") == load_rules(folder / "rules.toml")
    out = tmp_path / "out.safetensors"
    ran = run_ckpt(capsys, "remap", "hf:org/lenet::unet", "-o", out, "--rules", "hf:org/lenet/rules.toml")
    assert ran.code == 0, ran.err
    assert keys_of(out) == [key for key in keys_of(TUNED) if key.startswith("conv")]
    merge("fixtures/lenet_10class.pth", "hf:datasets/org/data", out, force=True)
    assert keys_of(out) == keys_of(TUNED)
    ran = run_ckpt(capsys, "diff", TUNED, "hf:datasets/org/data", "--values")
    assert ran.code == 0
    assert "was read in the Hugging Face cache" in ran.err


def test_the_cache_is_not_written(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output cannot be named ``hf:``, and reading leaves no file in the cache."""
    folder = add_snapshot(cache, "org/lenet", {"model.safetensors": TUNED})
    before = sorted(cache.rglob("*"))
    ran = run_ckpt(capsys, "convert", TUNED, "-o", "hf:org/lenet/model.safetensors", "--force")
    assert ran.code == 2
    assert "hf:org/lenet/model.safetensors" in ran.err
    assert run_ckpt(capsys, "check", "hf:org/lenet").code == 0
    assert sorted(cache.rglob("*")) == before
    assert (folder / "model.safetensors").read_bytes() == TUNED.read_bytes()


def _whole(cache: Path) -> None:
    add_snapshot(cache, "org/lenet", {"model.safetensors": TUNED, "tokenizer.json": b"{}"})


def _unfinished(cache: Path) -> None:
    folder = add_snapshot(cache, "org/lenet", {"model.safetensors": TUNED})
    os.remove(folder / "model.safetensors")  # as while hf download is at work
    (folder.parents[1] / "blobs" / "123.incomplete").write_bytes(TUNED.read_bytes()[:1000])


def _broken_link(cache: Path) -> None:
    folder = add_snapshot(cache, "org/lenet", {"model.safetensors": TUNED})
    (folder / "model.safetensors").resolve().unlink()


def _no_weights(cache: Path) -> None:
    add_snapshot(cache, "org/lenet", {"tokenizer.json": b"{}", "model.safetensors.index.json": b"{}"})


def _one_shard(cache: Path) -> None:
    add_snapshot(cache, "org/lenet", {"model-00001-of-00002.safetensors": TUNED})


def _known_missing(cache: Path) -> None:
    folder = add_snapshot(cache, "org/lenet", {"model.safetensors": TUNED})
    (folder.parents[1] / ".no_exist" / COMMIT).mkdir(parents=True)
    (folder.parents[1] / ".no_exist" / COMMIT / "config.json").write_bytes(b"")


def _two_commits(cache: Path) -> None:
    add_snapshot(cache, "org/lenet", {"model.safetensors": TUNED})
    add_snapshot(cache, "org/lenet", {"x": b""}, commit=OTHER_COMMIT, references=[])


OFFLINE = "HF_HUB_OFFLINE forbids asking the hub"
REFUSED: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "nothing cached": (
        lambda _: None,
        "hf:org/lenet",
        ("not in the Hugging Face cache", OFFLINE, "hf download org/lenet"),
    ),
    "another file": (_whole, "hf:org/lenet/other.bin", ("not in the Hugging Face cache", "hf download org/lenet")),
    "another name": (_whole, "hf:org/lennet", ("did you mean 'hf:org/lenet'?",)),
    "another revision": (_whole, "hf:org/lenet@v2", ("hf:org/lenet@607a30d783df",)),
    "no organisation": (_whole, "hf:lenet", ("hf:org/name",)),
    "an unfinished download": (_unfinished, "hf:org/lenet", ("no weights", "hf download org/lenet")),
    "a blob that was removed": (_broken_link, "hf:org/lenet", ("'model.safetensors'", OFFLINE)),
    "an index without shards": (_no_weights, "hf:org/lenet", ("no weights", OFFLINE)),
    "a part of the shards": (_one_shard, "hf:org/lenet", ("1 of 2 shards", OFFLINE)),
    "a file that the hub has not": (_known_missing, "hf:org/lenet/config.json", ("has no such file",)),
    "two commits": (_two_commits, "hf:org/lenet@607a3", ("2 commits", COMMIT, OTHER_COMMIT)),
    "a folder above": (_whole, "hf:org/lenet/../../x", ("not a valid name of a repository",)),
    "a reference above": (_whole, "hf:org/lenet@..%2F..", ("not a valid name of a repository",)),
    "one slash": (_whole, "hf:/org/lenet", ("not a valid name of a repository", "hf:org/name")),
    "no name": (_whole, "hf:", ("not a valid name of a repository",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_cache_lacks_is_refused_offline(cache: Path, name: str) -> None:
    """The error says what the cache lacks, and how to get it."""
    make, path, parts = REFUSED[name]
    make(cache)
    with pytest.raises(PathError) as raised:
        open_checkpoint(path)
    text = f"{raised.value.reason} / {raised.value.hint}"
    assert [part for part in parts if part not in text] == [], text
    assert raised.value.path == path


@pytest.mark.usefixtures("cache")
def test_the_extra_is_named_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without huggingface_hub, what the cache lacks is refused with the name of the extra."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "huggingface_hub" else find_spec(name, *more)
    )
    with pytest.raises(PathError, match="needs huggingface_hub") as raised:
        open_checkpoint("hf:org/lenet@v1")
    assert raised.value.hint == "install the extra [hub], or hf download org/lenet --revision 'v1'"


@pytest.mark.usefixtures("cache")
def test_a_plain_name_gets_the_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``org/name`` stays a path, and the hint says how to name the repository."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PathError) as raised:
        open_checkpoint("org/lenet")
    assert raised.value.hint == "for a model of the Hugging Face Hub write hf:org/lenet"
