"""A bad network or server gives the right answer or one line on stderr: never a wrong value, and never a hang."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers_cli import ROOT
from tests.oracles.conftest import Store
from tests.oracles.servers.processes import Finished, run_command
from tests.oracles.servers.proxy import Proxy
from tests.oracles.servers.s3 import KEY, SECRET, S3Server, variables_of
from tests.oracles.servers.web import PASSWORD, USER, WebServer

LIMIT = 60  # seconds, after which a command is said to hang


def _files(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"layer.{number}.weight": torch.randn(500, 500, generator=generator) for number in range(12)}
    save_file(tensors, folder / "model.safetensors")  # 12 MB
    torch.save(tensors, folder / "model.pt")
    shutil.copytree(ROOT / "fixtures/encoder_sharded", folder / "sharded")


# What happens, and whether the command must succeed in spite of it.
PASSING: Mapping[str, dict[str, Any]] = {
    "one 503": {"status": 503},
    "one 429 that says when": {"status": 429, "headers": {"Retry-After": "1"}},
    "two 500": {"status": 500, "times": 2},
    "a cut before the body": {"cut": 0, "method": "GET"},
    "a cut in the body": {"cut": 100, "method": "GET"},
    "a cut in a later body": {"cut": 1000, "method": "GET", "skip": 2},
    "a lost answer": {"loses_answer": True, "method": "GET"},
    "a short body": {"missing": 7, "method": "GET", "ranged": True},
    "slow bytes": {"bytes_a_second": 400_000, "method": "GET", "skip": 1},
    "a slow server": {"silent": 1.0},
}
LASTING: Mapping[str, dict[str, Any]] = {
    "always 503": {"status": 503, "times": -1},
    "always cut": {"cut": 100, "times": -1, "method": "GET"},
    "always short": {"missing": 7, "times": -1, "method": "GET", "ranged": True},
    "wrong ranges": {"shifts_range": 1, "times": -1, "method": "GET"},
    "wrong ranges after the header": {"shifts_range": 4, "times": -1, "method": "GET", "skip": 2},
    "forbidden": {"status": 403, "times": -1},
    "another object from the third request on": {"headers": {"ETag": '"other"'}, "skip": 2, "times": -1},
}


def one_line(ran: Finished) -> bool:
    """Return whether a command failed with one line, and perhaps hints, and printed nothing on stdout."""
    lines = ran.err.splitlines()
    hints = [line for line in lines if line.startswith(("hint: ", "      "))]
    return ran.code == 2 and not ran.out and len(lines) - len(hints) == 1 and lines[0].startswith("ckpt: ")


def path_of(store: Store, name: str) -> str:
    """Return the URL of a checkpoint; the index of a sharded one, where the store lists no folders."""
    inside = "/model.safetensors.index.json" if name == "sharded" and store.url.startswith("http") else ""
    return f"{store.made('faults', _files)}/{name}{inside}"


def right_answer(store: Store, name: str, out: str) -> bool:
    """Return whether ``digest --json`` says what it says of the files of the disk."""
    return bool(json.loads(out)["tensors"] == json.loads(_said(store.folder / "faults" / name))["tensors"])


def _said(path: Path) -> str:
    return run_command("digest", "--json", path, environment={}).out


@pytest.mark.parametrize(
    ("name", "fault"), [*product(("model.safetensors", "sharded"), PASSING), ("model.pt", "a cut in a later body")]
)
def test_a_fault_that_passes_costs_time_only(name: str, fault: str, store: Store) -> None:
    """The request is sent again, and the answer is right."""
    url = path_of(store, name)
    happening = store.proxy.fail(**PASSING[fault])
    ran = run_command("digest", "--json", url, environment=store.variables, seconds=LIMIT)
    assert ran.code == 0, ran.err
    assert right_answer(store, name, ran.out)
    assert happening.happened, store.proxy.requests()


@pytest.mark.parametrize(
    ("name", "fault"),
    [*product(("model.safetensors",), LASTING), ("sharded", "always 503"), ("model.pt", "wrong ranges")],
)
def test_a_fault_that_stays_is_one_line(name: str, fault: str, store: Store, tmp_path: Path) -> None:
    """The command ends with code 2 and one line, or with the right answer; nothing is written."""
    url = path_of(store, name)
    store.proxy.fail(**LASTING[fault])
    out = tmp_path / "out.safetensors"
    ran = run_command("convert", url, "-o", out, environment=store.variables, seconds=LIMIT)
    assert one_line(ran), ran
    assert os.listdir(tmp_path) == []
    assert url in ran.err or "sharded" in ran.err


def test_an_object_that_changes_meanwhile_is_an_error(store: Store, tmp_path: Path) -> None:
    """Another object under the same name between two requests: no output, and the message says that it changed."""
    url = store.made("faults", _files)
    path = store.folder / "faults" / "changing.safetensors"
    shutil.copy(store.folder / "faults" / "model.safetensors", path)
    os.utime(path, (1e9, 1e9))  # the ETag of nginx is the size and the second of the last change
    store.proxy.latency = 0.05
    changed = False

    class Changing(list[Any]):
        def __iter__(self) -> Any:
            nonlocal changed
            if not changed and len([seen for seen in store.proxy.seen if "changing" in seen.path]) > 2:
                changed = True
                other = {f"layer.{number}.weight": torch.zeros(500, 500) for number in range(12)}
                save_file(other, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
            return super().__iter__()

    store.proxy.faults = Changing(store.proxy.faults)
    out = tmp_path / "out.safetensors"
    ran = run_command("convert", f"{url}/changing.safetensors", "-o", out, environment=store.variables, seconds=LIMIT)
    assert changed
    assert one_line(ran), ran
    assert "replaced the file while it was read" in ran.err
    assert os.listdir(tmp_path) == []


def _everything(ran: Finished, folder: Path) -> str:
    files = [path.read_bytes().decode("latin-1") for path in sorted(folder.rglob("*")) if path.is_file()]
    return "\n".join((ran.out, ran.err, *files))


# After each command, whether it is also run in a program with a bug.
COMMANDS = {
    ("show", "URL", "--json", "-v"): False,
    ("convert", "URL", "-o", "OUT/out.safetensors", "--plan", "OUT/plan.json", "-v"): False,
    ("diff", "URL", "URL.missing", "--json"): True,
    ("remap", "URL", "-o", "OUT/out.pt", "--keep", "nothing"): False,
}
BUG = """
from ckptkit.cli import run
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.remote import failures
def broken(*arguments, **options):
    raise ZeroDivisionError(f"a bug in {arguments}")  # and the error of the library is printed before it
failures.explain = failures.status_failure = Checkpoint.__len__ = broken
run()
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_credentials_are_never_shown(
    command: tuple[str, ...], s3: S3Server, web: WebServer, proxied: Callable[..., Proxy], tmp_path: Path
) -> None:
    """Not by reports, errors, written files or the traceback of a bug, whether a server takes them or refuses them."""
    _copy_fixture(s3.folder / "secret.safetensors")
    _copy_fixture(web.folder / "secret.safetensors")
    proxy = proxied(web.address)
    address = proxy.url.removeprefix("http://")
    urls = {
        f"{s3.url}/secret.safetensors": (s3.variables, 0),
        f"{s3.url}/secret.safetensors#refused": (variables_of(s3.address) | {"AWS_ACCESS_KEY_ID": "AKIDOFANOTHER"}, 2),
        f"http://{USER}:{PASSWORD}@{address}/private/secret.safetensors": ({}, 0),
        f"http://{USER}:{PASSWORD}2@{address}/private/secret.safetensors": ({}, 2),
        f"{proxy.url}/files/secret.safetensors?X-Amz-Signature={SECRET}&X-Amz-Credential={KEY}": ({}, 0),
        f"{proxy.url}/files/secret.safetensors?sv=2024&sig={SECRET}": ({}, 0),
    }
    for number, (url, (variables, code)) in enumerate(urls.items()):
        for program in (("-m", "ckptkit"), ("-c", BUG))[: 1 + COMMANDS[command]]:
            folder = tmp_path / f"{number}{program[0]}"
            folder.mkdir()
            path, _, _ = url.partition("#")
            plain, question, query = path.partition("?")
            words = [
                word.replace("URL.missing", f"{plain}.missing{question}{query}").replace("URL", path)
                .replace("OUT", str(folder)) for word in command
            ]  # fmt: skip
            ran = run_command(*words, environment=variables, program=program, seconds=LIMIT)
            told = _everything(ran, folder)
            assert [secret for secret in (SECRET, PASSWORD, KEY) if secret in told] == [], told
            if program[0] == "-m" and not any("missing" in word or word == "nothing" for word in command):
                assert ran.code == code, (url, ran)
            elif program[0] == "-c" and ("URL.missing" in command or code == 2):
                assert (ran.code, "a bug" in ran.err) == (70, True), ran


def _copy_fixture(path: Path) -> None:
    if not path.exists():
        shutil.copy(ROOT / "fixtures/lenet_tuned.safetensors", path)
