"""``hf:`` and ``hf://`` read a hub on this machine: few requests, errors of one line, and no token shown."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptkit import convert
from tests.helpers_cli import ROOT
from tests.oracles.servers.hub import COMMIT, SIGNATURE, TOKEN, HubServer, hub_server
from tests.oracles.servers.proxy import Proxy

pytest.importorskip("huggingface_hub")

TUNED = ROOT / "fixtures/lenet_tuned.safetensors"
SECRETS = (TOKEN, SIGNATURE)


@dataclass
class Hub:
    """A hub behind a proxy, and a folder without a cache from which commands run."""

    server: HubServer
    proxy: Proxy
    folder: Path

    def ckpt(self, *arguments: str, code: int = 0, **variables: str) -> tuple[str, str]:
        """Run a command; return what it printed on both outputs, in which no secret is."""
        self.proxy.seen.clear()
        known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = {**known, "HF_ENDPOINT": self.proxy.url, "HF_HOME": str(self.folder / "home"), **variables}
        environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "ckptkit", *arguments],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert not any(secret in text for secret in SECRETS for text in (done.stdout, done.stderr))
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    def asked(self) -> list[str]:
        """Return the paths of the requests of the last command, without the redirections to the store of the hub."""
        return [seen.path for seen in self.proxy.requests() if not seen.path.startswith("/store/")]


@pytest.fixture
def hub(tmp_path: Path, proxied: Callable[..., Proxy]) -> Iterator[Hub]:
    """A hub with a file, a training run, shards and a pipeline."""
    folder = tmp_path / "hub"
    for name in ("org/lenet/model.safetensors", "org/pipe/unet/model.safetensors", "org/pipe/vae/model.safetensors"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(TUNED, folder / name)
    (folder / "org/lenet/config.json").write_text("{}")
    (folder / "org/pipe/model_index.json").write_text("{}")
    shutil.copy(ROOT / "fixtures/lenet_ddp.pt", folder / "org/lenet/run.pt")
    convert(TUNED, folder / "org/shards", max_shard_size="60kB")
    with hub_server(folder) as server:
        yield Hub(server, proxied(server.address), tmp_path)


def test_everything_that_a_path_names_is_read(hub: Hub) -> None:
    """A file, a mapping, shards, a part of a pipeline and a commit have the tensors of the local file."""
    for path in (
        "hf:org/lenet/model.safetensors", "hf://org/lenet/model.safetensors", "hf:org/shards", "hf:org/pipe::unet",
        f"hf://org/shards@{COMMIT}",
    ):  # fmt: skip
        out, _ = hub.ckpt("diff", str(TUNED), path, "--values")
        assert "10 matched, 0 missing" in out
    out, _ = hub.ckpt("optim", "show", "hf:org/lenet/run.pt")
    assert "optimizer state" in out
    hub.ckpt("convert", "hf:org/lenet/model.safetensors", "-o", "out.safetensors", "--carry", "--verify")
    assert (hub.folder / "out.safetensors").read_bytes()[-248_000:] == TUNED.read_bytes()[-248_000:]
    assert (hub.folder / "config.json").read_text() == "{}"


def test_headers_take_few_requests(hub: Hub) -> None:
    """A header is one request, and shards are one more each; a tensor that is not kept is not fetched."""
    hub.ckpt("remap", "hf:org/lenet/model.safetensors", "-o", "out.safetensors", "--keep", "fc3.bias")
    weights = [seen for seen in hub.proxy.requests("/store/org/lenet/model.safetensors") if seen.sent > 1]
    assert len(weights) <= 2
    assert sum(seen.sent for seen in weights) < 70_000
    hub.ckpt("show", "hf:org/shards")
    assert len([path for path in hub.asked() if "/resolve/" in path and "-of-" in path]) == 3
    assert len(hub.asked()) <= 10


REFUSED = {
    "missing": ("hf:org/none", "not found, or private or gated", "hf auth login"),
    "private": ("hf://org/shards", "not found, or private or gated", "HF_TOKEN"),
    "gated": ("hf:org/lenet/model.safetensors", "not found, or private or gated", "HF_TOKEN"),
    "no such revision of a folder": ("hf:org/pipe@v3", "the repository has no such revision", ""),
    "no such revision": ("hf:org/pipe@v3/unet/model.safetensors", "the repository has no such revision", ""),
    "no such file": ("hf:org/pipe/none.safetensors", "no such file or directory", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_of_the_hub_are_one_line(hub: Hub, name: str) -> None:
    """The error says how huggingface_hub takes a token."""
    path, reason, hint = REFUSED[name]
    hub.server.private.add("org/shards")
    hub.server.gated.add("org/lenet")
    out, err = hub.ckpt("show", path, code=2)
    assert (out, reason in err, hint in err) == ("", True, True), err
    assert len(err.splitlines()) <= 2


def test_a_token_opens_what_is_private(hub: Hub) -> None:
    """The token of the environment is sent to the hub, not to the store that it redirects to, and is never printed."""
    hub.server.private.add("org/shards")
    hub.server.gated.add("org/lenet")
    hub.ckpt("stats", "hf:org/shards", HF_TOKEN=TOKEN)
    hub.ckpt("show", "hf:org/lenet/model.safetensors", HF_TOKEN=TOKEN)


def test_offline_asks_nothing(hub: Hub) -> None:
    """``HF_HUB_OFFLINE`` forbids both spellings, and no request is sent."""
    for path in ("hf:org/lenet", "hf://org/lenet"):
        _, err = hub.ckpt("show", path, code=2, HF_HUB_OFFLINE="1")
        assert "HF_HUB_OFFLINE forbids asking the hub" in err
        assert hub.asked() == []


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 503}, {"cut": 1000}, {"silent": 3.0}])
def test_faults_are_repeated(hub: Hub, fault: dict[str, float]) -> None:
    """Statuses that may pass, cut connections and answers that come too late are asked for again."""
    happened = hub.proxy.fail(path="/store/org/lenet/model", **fault)
    out, err = hub.ckpt("show", "hf:org/lenet/model.safetensors", "-v", CKPTKIT_TIMEOUT="1")
    assert (happened.happened, "10 tensors" in out) == (1, True), err
    assert re.search(r"\d retr(y|ies)", err), err  # a busy machine can be late with another answer too


def test_a_file_that_is_partly_cached_is_read_at_the_hub(hub: Hub) -> None:
    """A cache that has only the configuration does not hide the weights of the hub; a note says which was read."""
    cached = hub.folder / "home/hub/models--org--lenet"
    (cached / "snapshots" / COMMIT).mkdir(parents=True)
    (cached / "snapshots" / COMMIT / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    _, err = hub.ckpt("show", "hf:org/lenet")
    assert "the Hugging Face cache has files of the repository, but no weights: the hub was read" in err
    shutil.copy(TUNED, cached / "snapshots" / COMMIT / "model.safetensors")
    hub.ckpt("show", "hf:org/lenet")
    assert hub.asked() == []


def test_what_is_written_is_read_there(hub: Hub) -> None:
    """Each file is a commit; the index comes last, and other files of the repository stay."""
    for name, options in (("new.safetensors", ()), ("new", ("--max-shard-size", "60kB"))):
        hub.ckpt("convert", str(TUNED), "-o", f"hf://org/lenet/{name}", *options, "--verify", HF_TOKEN=TOKEN)
        out, _ = hub.ckpt("diff", str(TUNED), f"hf://org/lenet/{name}", "--values", HF_TOKEN=TOKEN)
        assert "10 matched, 0 missing" in out
    written = [name for (name,) in hub.server.commits]
    assert written[0] == "new.safetensors"
    assert sorted(written[1:]) == sorted(f"new/{name}" for name in os.listdir(hub.server.folder / "org/lenet/new"))
    assert written[-1] == "new/model.safetensors.index.json"
    _, err = hub.ckpt("convert", str(TUNED), "-o", "hf://org/lenet/new.safetensors", code=2, HF_TOKEN=TOKEN)
    assert "already exists" in err
    assert (hub.server.folder / "org/lenet/config.json").read_text() == "{}"
