"""Buckets of an S3 server that are empty or missing are said to be so."""

from __future__ import annotations

import pytest

from tests.helpers_cli import ROOT
from tests.oracles.servers.processes import run_command
from tests.oracles.servers.s3 import S3Server

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
