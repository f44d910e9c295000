"""Headers come with few requests, whatever the size of the object and the number of shards, and in bounded memory."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers_cli import ROOT
from tests.oracles.conftest import Store
from tests.oracles.servers.processes import run_command
from tests.oracles.servers.proxy import Proxy
from tests.oracles.servers.s3 import S3Server, variables_of
from tests.oracles.servers.web import WebServer

QUIET = 0.25  # seconds without a new request, after which a round is over
MB = 1_000_000


def _sharded(folder: Path, shards: int) -> None:
    folder.mkdir()
    names = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({f"layers.{number}.weight": torch.full((4, 3), float(number))}, folder / name)
        names[f"layers.{number}.weight"] = name
    index = {"metadata": {"total_size": 48 * shards}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _large_header(folder: Path) -> None:
    tensors = {f"model.layers.{number}.self_attn.q_proj.weight": torch.zeros(1) for number in range(30_000)}
    save_file(tensors, folder / "large_header.safetensors")  # 3 MB


def _many_entries(folder: Path) -> None:
    torch.save({f"layer.{number}": torch.zeros(5000) for number in range(100)}, folder / "many.pt")  # 2 MB


def _files(folder: Path) -> None:
    for name in ("lenet_tuned.safetensors", "encoder_tied.pt", "lenet_ddp.pt"):
        (folder / name).write_bytes((ROOT / "fixtures" / name).read_bytes())
    _large_header(folder)
    _many_entries(folder)
    for shards in (2, 60):
        _sharded(folder / f"of_{shards}", shards)


MOST: Mapping[str, int] = {
    "lenet_tuned.safetensors": 2, "large_header.safetensors": 2, "encoder_tied.pt": 3, "lenet_ddp.pt": 3, "many.pt": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", MOST)
def test_a_header_takes_few_ranges(name: str, store: Store) -> None:
    """safetensors at most 2, a zip archive at most 3, as ``-v`` says too."""
    url = store.made("requests", _files)
    store.proxy.quiet = QUIET
    ran = run_command("show", "-v", f"{url}/{name}", environment=store.variables)
    assert ran.code == 0, ran.err
    seen = store.proxy.requests()
    assert 1 <= len([request for request in seen if request.method == "GET" and name in request.path]) <= MOST[name], (
        seen
    )
    assert store.proxy.rounds() <= MOST[name] + 1, seen  # the last asks for configurations beside the file
    counted = re.search(r"(\d+) requests? in (\d+) rounds?, ([\d.]+ k?M?B) read", ran.err)
    assert counted, ran.err
    assert int(counted[1]) == len(seen), (ran.err, seen)


@pytest.mark.parametrize("shards", [2, 60])
def test_a_sharded_checkpoint_opens_in_two_rounds(shards: int, store: Store) -> None:
    """The index comes first, then all headers at once; for a folder as well, where the store lists it."""
    url = f"{store.made('requests', _files)}/of_{shards}"
    store.proxy.quiet = 4 * QUIET  # a client needs a while to sign 60 requests
    for path in (url, f"{url}/model.safetensors.index.json"):
        if path == url and url.startswith("http"):
            continue
        store.proxy.reset()
        ran = run_command("show", "--json", path, environment=store.variables)
        assert ran.code == 0, ran.err
        assert len(json.loads(ran.out)["tensors"]) == shards
        seen = store.proxy.requests()
        assert store.proxy.rounds() == 2, seen
        assert len([request for request in seen if "-of-" in request.path and request.method == "GET"]) <= 2 * shards, (
            seen
        )


def _sparse(path: Path, size: int) -> None:
    """Write a valid safetensors file of one tensor, without its bytes."""
    header = {"big.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).ljust(512).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)


def test_show_of_100_gb_takes_what_show_of_a_small_object_takes(
    s3_without_etags: S3Server, web: WebServer, proxied: Callable[..., Proxy]
) -> None:
    """The same requests, and no more bytes than one first piece."""
    proxies = {"s3": proxied(s3_without_etags.address), "web": proxied(web.address)}
    for store, folder in (("s3", s3_without_etags.folder), ("web", web.folder)):
        seen = []
        for name, size in (("small", 100_000), ("large", 100_000 * MB)):
            proxy = proxies[store]
            _sparse(folder / f"{name}.safetensors", size)
            url = s3_without_etags.url if store == "s3" else f"{proxy.url}/files"
            proxy.reset()
            ran = run_command("show", f"{url}/{name}.safetensors", environment=variables_of(proxy.url))
            assert ran.code == 0, ran.err
            seen.append([(request.method, request.range) for request in proxy.requests(name)])
            assert proxy.bytes_sent <= 200_000
        assert seen[0] == seen[1]


def test_a_tensor_of_a_large_object_takes_little_more_than_its_bytes(
    s3_without_etags: S3Server, proxied: Callable[..., Proxy], tmp_path: Path
) -> None:
    """``--keep`` of one tensor reads that tensor."""
    sizes = {"a.weight": 40 * MB, "b.weight": 1 * MB, "c.weight": 40 * MB}
    save_file(
        {key: torch.full((size,), 7, dtype=torch.uint8) for key, size in sizes.items()},
        s3_without_etags.folder / "three.safetensors",
    )
    proxy = proxied(s3_without_etags.address)
    arguments = ("-o", tmp_path / "b.safetensors", "--keep", "b.*")
    url = f"{s3_without_etags.url}/three.safetensors"
    ran = run_command("remap", url, *arguments, environment=variables_of(proxy.url))
    assert ran.code == 0, ran.err
    assert proxy.bytes_sent <= 2 * MB


def test_memory_is_bounded(web: WebServer, tmp_path: Path) -> None:
    """Reading 300 MB from a store needs no more memory than reading it from a disk, but for 64 MB of pieces.

    The libraries of the store are in both figures: the first also reads a small object.
    """
    pytest.importorskip("resource")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer.{number}.weight": torch.randn(7_500_000, generator=generator) for number in range(10)}
    save_file(tensors, web.folder / "large.safetensors")
    save_file({"a": torch.ones(3)}, web.folder / "tiny.safetensors")
    commands: tuple[tuple[str | Path, ...], ...] = (("digest",), ("check",), ("convert", "-o", tmp_path / "out.pt"))
    for command, *rest in commands:
        least = run_command(command, f"{web.url}/tiny.safetensors", *rest, "--force" if rest else "-q", environment={})
        here = run_command(
            command, web.folder / "large.safetensors", *rest, "--force" if rest else "-q", environment={}
        )
        ran = run_command(command, f"{web.url}/large.safetensors", *rest, "--force" if rest else "-q", environment={})
        assert ran.code == 0, ran.err
        assert ran.memory <= max(least.memory, here.memory) + 96 * MB, (command, ran.memory, here.memory, least.memory)
    (web.folder / "large.safetensors").unlink()


@pytest.mark.parametrize("where", ["without-ranges", "ignored"])
def test_a_server_without_ranges_is_refused_before_its_body_is_read(
    where: str, web: WebServer, proxied: Callable[..., Proxy]
) -> None:
    """At most 1 MB of 200 MB is taken, and the way out is to download the file."""
    _sparse(web.folder / "no_ranges.safetensors", 200 * MB)
    proxy = proxied(web.address)
    if where == "ignored":
        proxy.fail(ignores_range=True, times=-1)
    path = "files" if where == "ignored" else where
    ran = run_command("check", f"{proxy.url}/{path}/no_ranges.safetensors", environment={})
    assert (ran.code, ran.out) == (2, "")
    assert "range" in ran.err
    assert "download" in ran.err
    assert len([line for line in ran.err.splitlines() if line.startswith("ckpt: ")]) == 1
    assert proxy.bytes_sent <= MB
