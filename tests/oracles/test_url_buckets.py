"""Buckets of an S3 server that are empty or missing are said to be so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.helpers_cli import ROOT
from tests.oracles.conftest import Store
from tests.oracles.servers.processes import run_command
from tests.oracles.servers.proxy import Proxy
from tests.oracles.servers.s3 import S3Server, variables_of

LENET = str(ROOT / "fixtures/lenet_tuned.safetensors")


def test_an_empty_bucket_is_a_directory_without_a_checkpoint(s3: S3Server) -> None:
    """It says the same as for an empty directory of this machine."""
    (s3.folder.parent / "vacant").mkdir(exist_ok=True)
    ran = run_command("show", "s3://vacant", environment=s3.variables)
    assert ran.code == 2
    assert ran.err.startswith("ckpt: s3://vacant: a directory without a checkpoint\n")


@pytest.mark.parametrize(
    "words",
    [
        ("show", "s3://nowhere/a.safetensors"),
        ("convert", LENET, "-o", "s3://nowhere/a.safetensors"),
        ("convert", LENET, "-o", "s3://nowhere/a", "--max-shard-size", "100kB"),
    ],
)
def test_a_missing_bucket_is_said(words: tuple[str, ...], s3: S3Server) -> None:
    """It is one sentence, for inputs and outputs."""
    ran = run_command(*words, environment=s3.variables)
    assert ran.code == 2
    assert ran.err.splitlines()[-1].endswith("there is no bucket s3://nowhere")


def test_the_time_limit_is_that_of_a_page_of_names(s3: S3Server, proxied: Callable[..., Proxy]) -> None:
    """A folder of thousands of names may take longer than one answer may."""
    folder = s3.folder / "many"
    folder.mkdir()
    for number in range(2500):
        (folder / f"{number:04}.bin").touch()
    (folder / "a.safetensors").write_bytes((ROOT / "fixtures/lenet_tuned.safetensors").read_bytes())
    proxy = proxied(s3.address, latency=2.0)
    variables = variables_of(proxy.url) | {"CKPTKIT_TIMEOUT": "5"}
    ran = run_command("show", "--json", "s3://tests/many/a.safetensors", environment=variables)
    assert ran.code == 0, ran.err
    pages = proxy.requests("list-type=2")
    assert len(pages) == 3
    assert pages[-1].ended - pages[0].started > 5


ODD = [
    f"a{odd}b.safetensors" for odd in (" ", "ü日", "#", "?", "%41", "%20", "+", "&c=", ";", "[1]", "'", "~", "@", ":")
]


def _odd(folder: Path) -> None:
    for name in ODD:
        (folder / name).write_bytes((ROOT / "fixtures/lenet_tuned.safetensors").read_bytes())


def test_odd_names_are_names(store: Store) -> None:
    """A name in a bucket stands as it is. In the URL of a web server, it is encoded as in a browser."""
    url = store.made("odd", _odd)
    is_web = url.startswith("http")
    paths = [f"{url}/{quote(name) if is_web else name}" for name in ODD]
    patterns = [url.replace("/files/", "/listed/") + "/*"]
    for words, count in ((paths, len(ODD)), (patterns, len(ODD))):
        ran = run_command("show", "--json", *words, environment=store.variables)
        assert ran.code == 0, ran.err
        assert [row["tensors"] for row in json.loads(ran.out)["checkpoints"]] == [10] * count
