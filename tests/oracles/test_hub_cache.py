"""The cache that huggingface_hub itself fills is read as huggingface_hub finds it; and it is left as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptkit import PathError, open_checkpoint
from ckptkit.core.files.hub import hub_path
from tests.helpers_cli import ROOT
from tests.helpers_hub import OTHER_COMMIT, add_snapshot
from tests.oracles.servers.hub import COMMIT, hub_server

huggingface_hub = pytest.importorskip("huggingface_hub")

TUNED = ROOT / "fixtures/lenet_tuned.safetensors"
_FILL = """
import sys
import huggingface_hub
huggingface_hub.snapshot_download("org/whole")
huggingface_hub.snapshot_download("org/data", repo_type="dataset")
huggingface_hub.hf_hub_download("org/part", "config.json")
huggingface_hub.hf_hub_download("org/part", "model.safetensors", revision=sys.argv[1])
try:
    huggingface_hub.hf_hub_download("org/part", "no.json")
except huggingface_hub.errors.EntryNotFoundError:
    pass
"""


def _fill(tmp_path: Path, **variables: str) -> Path:
    hub = tmp_path / "hub"
    for repository in ("whole", "part", "data"):
        folder = hub / "org" / repository / "unet"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(TUNED.read_bytes())
        (folder.parent / "model.safetensors").write_bytes(TUNED.read_bytes())
        (folder.parent / "config.json").write_text("{}")
    cache = tmp_path / "cache"
    with hub_server(hub) as running:
        environment = {
            **os.environ, "HF_ENDPOINT": running.address, "HF_HUB_CACHE": str(cache), "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1", **variables,
        }  # fmt: skip
        subprocess.run([sys.executable, "-c", _FILL, COMMIT], env=environment, check=True, capture_output=True)
    return cache


@pytest.fixture(params=["links", "copies"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache after some downloads, from a hub that has stopped."""
    variables = {"HF_HUB_DISABLE_SYMLINKS": "1"} if request.param == "copies" else {}
    filled = _fill(tmp_path, **variables)
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(filled))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return filled


FILES = [
    ("org/whole", "model.safetensors"), ("org/whole", "unet/model.safetensors"), ("org/whole", "no.bin"),
    ("org/part", "config.json"), ("org/part", "model.safetensors"), ("org/part", "no.json"),
    ("org/part", "unet/model.safetensors"), ("org/none", "config.json"),
]  # fmt: skip


def test_each_file_is_where_huggingface_hub_finds_it(cache: Path) -> None:
    """``hf:`` names the same file as ``try_to_load_from_cache``, for each revision, or neither finds one."""
    add_snapshot(cache, "org/whole", {"model.safetensors": TUNED}, commit=OTHER_COMMIT, references=["refs/pr/1"])
    for repository, name in FILES:
        for revision in (None, "main", COMMIT, "refs/pr/1", "v1"):
            found = huggingface_hub.try_to_load_from_cache(repository, name, cache_dir=cache, revision=revision)
            at = "" if revision is None else f"@{revision}"
            if isinstance(found, str):
                assert hub_path(f"hf:{repository}{at}/{name}") == found
            else:
                with pytest.raises(PathError, match="not in the Hugging Face cache"):
                    hub_path(f"hf:{repository}{at}/{name}")


def test_each_snapshot_is_one_of_scan_cache_dir(cache: Path) -> None:
    """Every repository and revision that ``scan_cache_dir`` lists opens, and nothing in the cache changes."""
    before = {str(path): path.lstat().st_mtime_ns for path in cache.rglob("*")}
    listed = huggingface_hub.scan_cache_dir(cache)
    assert {repo.repo_id for repo in listed.repos} == {"org/whole", "org/part", "org/data"}
    for repo in listed.repos:
        kind = "datasets/" if repo.repo_type == "dataset" else ""
        for revision in repo.revisions:
            assert hub_path(f"hf:{kind}{repo.repo_id}@{revision.commit_hash}") == str(revision.snapshot_path)
            for reference in revision.refs:
                with open_checkpoint(f"hf:{kind}{repo.repo_id}@{reference}") as checkpoint:
                    (file,) = checkpoint.files
                    assert hub_path(file) == str(revision.snapshot_path / "model.safetensors")
    assert {str(path): path.lstat().st_mtime_ns for path in cache.rglob("*")} == before
