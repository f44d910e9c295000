"""Azure Blob Storage and Google Cloud Storage, as far as their emulators go: what was written there is read there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers_cli import ROOT
from tests.oracles.servers.clouds import Cloud, azure_server, gcs_server
from tests.oracles.servers.processes import run_command

TIED = str(ROOT / "fixtures/encoder_tied.pt")
SERVERS = {"azure": azure_server, "gcs": gcs_server}
LIMIT = 120  # seconds


@pytest.fixture(params=SERVERS)
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cloud]:
    with SERVERS[request.param](tmp_path) as running:
        yield running


def test_what_is_written_is_read_there(cloud: Cloud, tmp_path: Path) -> None:
    """One file and shards; every command that reads says what it says of the same files on a disk."""
    empty = run_command("show", cloud.url, environment=cloud.variables, seconds=LIMIT)
    assert empty.err.startswith(f"ckpt: {cloud.url}: a directory without a checkpoint\n")
    outputs = {"one.safetensors": (), "shards": ("--max-shard-size", "20kB")}
    for name, options in outputs.items():
        for folder in (str(tmp_path), cloud.url):
            ran = run_command(
                "convert", TIED, "-o", f"{folder}/{name}", *options, environment=cloud.variables, seconds=LIMIT
            )
            assert ran.code == 0, ran.err
        told = []
        for folder in (str(tmp_path), cloud.url):
            ran = run_command("digest", "--json", f"{folder}/{name}", environment=cloud.variables, seconds=LIMIT)
            assert ran.code == 0, ran.err
            told.append(json.loads(ran.out)["tensors"])
        assert told[0] == told[1]
    again = run_command(
        "convert", TIED, "-o", f"{cloud.url}/one.safetensors", environment=cloud.variables, seconds=LIMIT
    )
    assert again.code == 2
    assert "exists" in again.err
    missing = run_command("show", f"{cloud.url}/missing.safetensors", environment=cloud.variables, seconds=LIMIT)
    assert (missing.code, missing.out) == (2, "")
    assert len(missing.err.splitlines()) == 1
