"""Processes of ``ckpt`` that a signal ends in the middle, and those that go on with ``--continue``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_outputs import names_in, scratch, sha256
from tests.hostile.contract import paused

BASE = {f"layers.{number}.weight": torch.randn(16, 16) for number in range(8)}
COMMANDS = {
    "convert": ["convert", "base.safetensors", "--dtype", "BF16", "--max-shard-size", "1200"],
    "remap": ["remap", "base.safetensors", "--rename", "layers.*=blocks.*", "--max-shard-size", "2200"],
    "merge": ["merge", "base.safetensors", "tuned.safetensors", "--max-shard-size", "2200"],
    "merge with a method": [
        "merge", "base.safetensors", "tuned.safetensors", "other.safetensors", "--max-shard-size", "2200",
        "--method", "dare_ties", "--base", "base", "--weight", "tuned=0.6", "--weight", "other=0.4",
        "--density", "0.5", "--param", "seed=7",
    ],
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_file(BASE, tmp_path / "base.safetensors")
    save_file({key: value + 1 for key, value in BASE.items()}, tmp_path / "tuned.safetensors")
    save_file({key: value - 2 for key, value in BASE.items()}, tmp_path / "other.safetensors")
    (tmp_path / "outputs").mkdir()
    return tmp_path


def command(place: Path, name: str, out: str, *options: str) -> list[str]:
    words = [str(place / word) if (place / word).exists() else word for word in COMMANDS[name]]
    return [*words, "-o", str(place / "outputs" / out), *options]


def end(words: list[str], number: signal.Signals) -> tuple[int, str]:
    """End a run before its fourth and last shard gets its name; return its exit code and what it printed on stderr."""
    with paused("replace", *words) as process:
        for _ in range(3):
            process.send_signal(signal.SIGCONT)
            os.waitpid(process.pid, os.WUNTRACED)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate()
    return process.returncode, err


def content(out: Path) -> dict[str, str]:
    return {name: sha256(out / name) for name in names_in(out)}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_process(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At least the first two of four shards are kept, and the bytes are those of a run that nothing ended."""
    assert run_ckpt(capsys, *command(place, name, "whole")).code == 0
    assert end(command(place, name, "out", "--continue"), signal.SIGKILL)[0] == -signal.SIGKILL
    assert len(names_in(place / "outputs")) == 2  # the whole one, and the place of the other
    ran = run_ckpt(capsys, *command(place, name, "out", "--continue", "--verify", "--json"))
    assert (ran.code, json.loads(ran.out)["output"]["kept_shards"] in {2, 3}) == (0, True)
    assert content(place / "outputs" / "out") == content(place / "outputs" / "whole")
    assert names_in(place / "outputs") == ["out", "whole"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_process(number: signal.Signals, place: Path) -> None:
    """With --continue the shards stay, and the message says where; without it, nothing stays."""
    code, err = end(command(place, "convert", "out"), number)
    assert (code, names_in(place / "outputs")) == (128 + number, [])
    code, err = end(command(place, "convert", "out", "--continue"), number)
    (left,) = names_in(place / "outputs")
    assert code == 128 + number
    assert f"3 finished shards are kept in {place / 'outputs' / left}: --continue goes on from there" in err


def test_two_processes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused while the first one works, and the first one ends well."""
    words = command(place, "convert", "out", "--continue")
    with paused("replace", *words) as process:
        ran = run_ckpt(capsys, *words)
        assert (ran.code, "another process writes this output now" in ran.err) == (2, True)
        while True:
            process.send_signal(signal.SIGCONT)
            if not os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]):
                break
    assert names_in(place / "outputs") == ["out"]
    assert len(load_file(place / "outputs" / "out" / "model-00001-of-00004.safetensors")) == 2


EACH_CALL = """
import json, os, shutil, signal, sys
import fcntl
from ckptkit import convert
from ckptkit.plans.writing import finished_shards
from tests.helpers_faults import CALLS
finished_shards._LOST_AT_MOST = 0
source, place, is_killed = json.loads(sys.argv[1])
out = os.path.join(place, "out")
options = {"dtype": "BF16", "max_shard_size": 1200, "force": True}
real = {name: getattr(fcntl if name == "ioctl" else os, name) for name in CALLS}

def content(path):
    return {name: open(os.path.join(path, name), "rb").read() for name in os.listdir(path)}

count = 0

def fail_at(nth):
    def wrapped(name):
        def call(*args, **options):
            global count
            if "dir_fd" not in options:
                count += 1
                if count == nth:
                    if is_killed:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(5, "Input/output error")
            return real[name](*args, **options)
        return call
    for name in CALLS:
        setattr(fcntl if name == "ioctl" else os, name, wrapped(name))

convert(source, out, **options)
whole, kept = content(out), []
for nth in range(1, 1000):
    child = os.fork()
    if child == 0:
        fail_at(nth)
        try:
            convert(source, out, resume=not is_killed, **options)
        except Exception:
            pass
        os._exit(0 if count < nth else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert content(out) == whole, nth
    shutil.rmtree(out)  # each shard comes from this run or from the place of the other
    kept.append(convert(source, out, resume=True, **options).kept_shards)
    assert content(out) == whole, nth
    for name in os.listdir(place):
        if name != "out":  # of a process that ended before it had a journal, or while it removed everything
            assert not os.path.exists(os.path.join(place, name, "journal")), nth
            shutil.rmtree(os.path.join(place, name))
    if status == 0:
        break
print(json.dumps(kept))
"""


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "failed"])
def test_at_each_system_call(*, is_killed: bool) -> None:
    """Whatever call a kill or an error comes at, the next run gives the bytes of one run, and leaves nothing else."""
    with scratch() as directory:
        source, outputs = Path(directory, "base.safetensors"), Path(directory, "outputs")
        save_file(BASE, source)
        outputs.mkdir()
        words = [sys.executable, "-c", EACH_CALL, json.dumps([str(source), str(outputs), is_killed])]
        done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    kept = json.loads(done.stdout)
    assert {0, 1, 2, 3, 4} == set(kept)
    assert kept[-1] == 0  # the run ended, and its output was removed
