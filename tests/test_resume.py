"""A run that was killed goes on with ``--continue``: finished shards are kept, and the bytes are those of one run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest
import torch
from safetensors.torch import save_file

import ckptkit.plans.verify
from ckptkit import (
    Plan,
    Written,
    choose_output,
    convert,
    execute,
    open_checkpoint,
    plan_extract_lora,
    plan_recipe,
)
from ckptkit.errors import CkptkitError, OutputError, PlanError
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_outputs import names_in, scratch, sha256

STATE = {f"l{number}": torch.full((100,), 10.0**number) for number in range(8)}  # 1e5 and more overflow in F16
SIZE = 450  # two tensors of F16 a shard
KILLED = f"""
import glob, os, signal, sys, time
from ckptkit import convert
from ckptkit.plans.writing import finished_shards
finished_shards._LOST_AT_MOST = 0  # as if each shard had taken some seconds
source, out, written = sys.argv[1], sys.argv[2], []
def progress(count):
    written.append(count)
    if sum(written) > 800:  # in the third shard
        while len(open(*glob.glob(out + ".ckptkit-*.tmp/journal")).readlines()) < 3:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
convert(source, out, dtype="F16", max_shard_size={SIZE}, allow_overflow=True, progress=progress)
"""


def after_two_shards(out: Path, act: Callable[[], object], nbytes: int = 400) -> Callable[[int], None]:
    """Return a progress that acts in the third shard of ``nbytes``, once the first two are recorded."""
    written = 0

    def progress(count: int) -> None:
        nonlocal written
        written += count
        if written > 2 * nbytes:
            while len(records(out)) < 2:
                time.sleep(0.001)
            act()

    return progress


def place_of(out: Path) -> Path:
    (place,) = out.parent.glob(f"{out.name}.ckptkit-*.tmp")
    return place


def records(out: Path) -> list[str]:
    return (place_of(out) / "journal").read_text().splitlines()[1:]


def stop() -> None:
    raise KeyboardInterrupt


def to_half(source: Path | str, out: Path, **options: Any) -> Written:
    options = {"dtype": "F16", "max_shard_size": SIZE, "allow_overflow": True, "resume": True, **options}
    return convert(source, out, **options)


def interrupted(source: Path | str, out: Path, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        to_half(source, out, progress=after_two_shards(out, stop), **options)


def content(out: Path) -> dict[str, str]:
    return {name: sha256(out / name) for name in names_in(out)}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with scratch() as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    with scratch() as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def source(shared: Path) -> Path:
    path = shared / "in.safetensors"
    save_file(STATE, path)
    return path


@pytest.fixture(scope="module")
def whole(source: Path, shared: Path) -> Written:
    """The output of a run that nothing interrupts."""
    return to_half(source, shared / "whole", resume=False)


@pytest.fixture(scope="module")
def killed_once(source: Path, shared: Path) -> Path:
    directory = shared / "killed"
    directory.mkdir()
    command = [sys.executable, "-c", KILLED, str(source), str(directory / "out")]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    return directory


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """The path of an output whose run was killed in its third shard."""
    shutil.copytree(killed_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def test_a_killed_run_leaves_only_its_staging_place(killed: Path) -> None:
    """There is no output, and the place beside it holds the two shards that were finished."""
    place = place_of(killed)
    assert names_in(killed.parent) == [place.name]
    assert [json.loads(line)["name"] for line in records(killed)] == [
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
    ]
    assert not (place / "files" / "model-00003-of-00004.safetensors").exists()


@pytest.mark.parametrize("verify", [False, True])
def test_the_bytes_are_those_of_one_run(killed: Path, source: Path, whole: Written, *, verify: bool) -> None:
    """Two shards are kept, the rest is made, and nothing else is left; the report has the losses of all shards."""
    progress: list[int] = []
    written = to_half(source, killed, verify=verify, progress=progress.append)
    assert content(killed) == content(Path(whole.path))
    assert names_in(killed.parent) == ["out"]
    assert (written.kept_shards, whole.kept_shards) == (2, 0)
    assert (written.losses, written.nbytes, written.files) == (whole.losses, whole.nbytes, whole.files)
    assert sum(progress) == sum(STATE[key].numel() * 2 for key in STATE)
    assert (written.verified is not None) == verify
    assert "kept 2 shards that an earlier run had finished" in str(written)
    assert written.to_dict()["output"]["kept_shards"] == 2


def test_the_command(killed: Path, source: Path, whole: Written, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run says what would be kept; without --continue a note names the place, and it stays as it is."""
    place = place_of(killed).name
    command: list[str | Path] = [
        "convert",
        source,
        "-o",
        killed,
        "--dtype",
        "F16",
        "--max-shard-size",
        str(SIZE),
        "--allow-overflow",
    ]
    dry = run_ckpt(capsys, *command, "--continue", "--dry-run")
    assert f"{place} holds 2 finished shards of this plan, which --continue compares and keeps" in dry.err
    before = content(place_of(killed) / "files")
    other = run_ckpt(capsys, *command)
    assert f"{place} is left of an earlier run, with 2 finished shards; --continue keeps those" in other.err
    assert "kept 2" not in other.err
    assert content(killed) == content(Path(whole.path))
    assert content(place_of(killed) / "files") == before
    shutil.rmtree(killed)
    ran = run_ckpt(capsys, *command, "--continue", "--json")
    assert json.loads(ran.out)["output"]["kept_shards"] == 2
    assert content(killed) == content(Path(whole.path))
    assert names_in(killed.parent) == ["out"]


def flip(path: Path) -> None:
    """Change one byte, and nothing that the file system tells."""
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


SECOND = "model-00002-of-00004.safetensors"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte differs": lambda place: flip(place / "files" / SECOND),
    "the shard is shorter": lambda place: cut(place / "files" / SECOND),
    "the shard is gone": lambda place: (place / "files" / SECOND).unlink(),
    "the shard is a link": lambda place: link(place / "files" / SECOND),
    "the last line was cut off": lambda place: cut(place / "journal"),
    "the last line is not JSON": lambda place: (place / "journal").write_text(
        "".join(f"{line}\n" for line in (place / "journal").read_text().splitlines()[:2]) + "{\n"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_shard_is_made_anew(
    damage: Callable[[Path], object], killed: Path, source: Path, whole: Written
) -> None:
    """Only the first shard is kept."""
    damage(place_of(killed))
    written = to_half(source, killed)
    assert written.kept_shards == 1
    assert content(killed) == content(Path(whole.path))
    assert names_in(killed.parent) == ["out"]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another dtype": ({"dtype": "BF16"}, "of another plan: remove it by hand"),
    "another size": ({"max_shard_size": 700}, "of another plan: remove it by hand"),
    "other metadata": ({"metadata": {"a": "b"}}, "of another plan: remove it by hand"),
    "another input": ({}, "of inputs that have changed: remove it by hand"),
}


@pytest.mark.parametrize(("options", "why"), OTHERS.values(), ids=OTHERS.keys())
def test_another_plan_or_input_begins_anew(
    options: dict[str, Any], why: str, killed: Path, source: Path, tmp_path: Path
) -> None:
    """Nothing is kept, a note says why, and the place of the other run stays as it is."""
    place, given = place_of(killed), source
    if not options:
        given = tmp_path / "in.safetensors"
        save_file({key: value + 1 for key, value in STATE.items()}, given)
    before = content(place / "files")
    written = to_half(given, killed, **options)
    assert written.kept_shards == 0
    assert f"{place.name} is left of an earlier run, with 2 finished shards {why}" in str(written)
    assert content(killed) == content(Path(to_half(given, tmp_path / "new", resume=False, **options).path))
    assert content(place / "files") == before


def test_two_runs_never_share_a_place(source: Path, tmp_path: Path, whole: Written) -> None:
    """A run that goes on refuses an output that another process writes now, and the other run ends well."""
    refusals: list[CkptkitError] = []

    def other() -> None:
        if not refusals:
            with pytest.raises(OutputError) as refusal:
                to_half(source, tmp_path / "out")
            refusals.append(refusal.value)

    to_half(source, tmp_path / "out", progress=after_two_shards(tmp_path / "out", other))
    assert refusals[0].reason.startswith(f"another process writes this output now, in {tmp_path / 'out.ckptkit-'}")
    assert content(tmp_path / "out") == content(Path(whole.path))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_place_of_another_user_does_not_count(killed: Path, source: Path, whole: Written) -> None:
    """Another user could have written anything into it."""
    for path in (place_of(killed), place_of(killed) / "journal"):
        os.chown(path, 65534, -1)
    assert to_half(source, killed).kept_shards == 0
    assert content(killed) == content(Path(whole.path))


def test_an_error_keeps_shards_only_with_resume(
    source: Path, tmp_path: Path, whole: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error says where they are, and the next run keeps all four; without it, nothing is left."""
    out = tmp_path / "out"
    with pytest.raises(PlanError, match="do not fit"):
        to_half(source, out, allow_overflow=False, resume=False)
    assert names_in(tmp_path) == []
    with pytest.raises(PlanError) as refusal:
        to_half(source, out, allow_overflow=False)
    kept = f"4 finished shards are kept in {place_of(out)}"
    assert f"allow_overflow=True writes the output anyway; {kept}: resume=True goes on from there" in str(refusal.value)
    command: list[str | Path] = [
        "convert",
        source,
        "-o",
        out,
        "--dtype",
        "F16",
        "--max-shard-size",
        str(SIZE),
        "--continue",
    ]
    ran = run_ckpt(capsys, *command)
    assert (ran.code, f"{kept}: --continue goes on from there" in ran.err) == (2, True)
    written = to_half(source, out)
    assert (written.kept_shards, written.losses) == (4, whole.losses)
    assert content(out) == content(Path(whole.path))


def test_shards_that_verify_refuses_are_not_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their digests would match in the next run too."""

    def refuse(*_: object) -> None:
        raise OutputError("does not have the bytes that the plan makes")

    monkeypatch.setattr(ckptkit.plans.verify, "verify_safetensors", refuse)
    with pytest.raises(OutputError, match="the bytes that the plan makes"):
        to_half(source, tmp_path / "out", verify=True)
    assert names_in(tmp_path) == []


def test_an_input_that_changes_keeps_nothing(tmp_path: Path) -> None:
    """No later run could use the shards."""
    source = tmp_path / "in.safetensors"
    save_file(STATE, source)
    with pytest.raises(CkptkitError, match="changed while it was read"):
        to_half(source, tmp_path / "out", progress=after_two_shards(tmp_path / "out", lambda: os.utime(source)))
    assert names_in(tmp_path) == ["in.safetensors"]


def test_the_other_files_of_a_replaced_directory_are_those_of_now(source: Path, tmp_path: Path) -> None:
    """With ``force`` and ``carry``: the old shards go, and the files beside them are as they are when the run ends."""
    out = tmp_path / "out"
    shutil.copy2(source, tmp_path / "in.safetensors")
    (tmp_path / "config.json").write_text('{"torch_dtype": "float32"}')
    to_half(source, out, max_shard_size=10**6)
    (out / "notes.txt").write_text("old")
    interrupted(tmp_path / "in.safetensors", out, force=True, carry=True)
    assert names_in(out) == ["model.safetensors", "notes.txt"]
    (out / "notes.txt").write_text("new")
    written = to_half(tmp_path / "in.safetensors", out, force=True, carry=True)
    assert written.kept_shards == 2
    assert len(names_in(out)) == 7  # four shards, the index and two others
    assert (out / "notes.txt").read_text() == "new"
    assert json.loads((out / "config.json").read_text()) == {"torch_dtype": "float16"}
    assert len(list(tmp_path.glob("out*"))) == 1


def extraction(paths: dict[str, Path]) -> Plan:
    with open_checkpoint(paths["base"]) as base, open_checkpoint(paths["donor"]) as donor:
        return plan_extract_lora(base, donor, 2)


def merge_of_opposites(paths: dict[str, Path]) -> Plan:
    recipe = {"method": "slerp", "t": 0.5, "input": [{"name": name} for name in paths]}
    return plan_recipe(recipe, inputs=paths)


@pytest.mark.parametrize("plan", [extraction, merge_of_opposites])
def test_what_is_known_only_of_a_shard_that_was_made_is_kept(
    plan: Callable[[dict[str, Path]], Plan], tmp_path: Path
) -> None:
    """How much of a change its factors hold, and the warnings of a method, are recorded with their shard."""
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("base", "donor")}
    base = {f"{name}.weight": torch.randn(8, 8) for name in "abcd"}
    save_file(base, paths["base"])
    save_file({key: -value for key, value in base.items()}, paths["donor"])
    made = plan(paths)
    size = made.nbytes // 4
    whole = execute(made, paths, choose_output(tmp_path / "whole", max_shard_size=size))
    out = choose_output(tmp_path / "out", max_shard_size=size)
    progress = after_two_shards(tmp_path / "out", stop, size)
    with pytest.raises(KeyboardInterrupt):
        execute(made, paths, out, resume=True, progress=progress)
    written = execute(made, paths, out, resume=True)
    assert (written.kept_shards, bool(whole.extracted or whole.merged)) == (2, True)
    assert (written.extracted, written.merged) == (whole.extracted, whole.merged)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


class Refused(NamedTuple):
    """The words of an output, why it is refused, and the words of one that is not."""

    words: list[str]
    reason: str
    instead: list[str]


REFUSED = {
    "one file": Refused(["out.pt"], "a killed run leaves only finished shards, and this output is one", ["out.pt"]),
    "DCP": Refused(
        ["out", "--format", "dcp"], "and this output is a distributed checkpoint",
        ["out", "--max-shard-size", "5GB", "--continue"],
    ),
    "a store": Refused(
        ["memory://out", "--max-shard-size", "1kB"], "a store keeps no finished shards of a killed run",
        ["memory://out", "--max-shard-size", "1kB"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_other_outputs_are_refused(
    case: Refused, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They leave nothing that could be kept: one sentence says so before anything is written, and names ways out."""
    monkeypatch.chdir(tmp_path)
    ran = run_ckpt(capsys, "convert", source, "-o", *case.words, "--continue")
    assert (ran.code, names_in(tmp_path)) == (2, [])
    assert case.reason in ran.err
    assert run_ckpt(capsys, "convert", source, "-o", *case.instead).code == 0


def test_an_input_of_a_store_is_known_by_its_version(source: Path, tmp_path: Path, whole: Written) -> None:
    """Another object under the same URL is another input."""
    store = fsspec.filesystem("memory")
    store.pipe_file("/resumed.safetensors", source.read_bytes())
    interrupted("memory://resumed.safetensors", tmp_path / "out")
    shutil.copytree(tmp_path, tmp_path / "again", ignore=shutil.ignore_patterns("again"))
    assert to_half("memory://resumed.safetensors", tmp_path / "out").kept_shards == 2
    assert content(tmp_path / "out") == content(Path(whole.path))
    store.pipe_file("/resumed.safetensors", source.read_bytes())
    assert to_half("memory://resumed.safetensors", tmp_path / "again" / "out").kept_shards == 0


def test_an_input_in_memory_is_refused(tmp_path: Path) -> None:
    """Nothing tells whether it is the same as in the earlier run."""
    with pytest.raises(OutputError, match="the source is in memory, and may be another one than in the earlier run"):
        convert(STATE, tmp_path / "out", max_shard_size=SIZE, resume=True)
    convert(STATE, tmp_path / "out", max_shard_size=SIZE)
    assert names_in(tmp_path) == ["out"]
