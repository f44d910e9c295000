"""Table I, interruptions: whatever stops the program, the output is the old file or the new file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers_cli import ROOT
from tests.helpers_outputs import names_in, same_state, scratch
from tests.helpers_shards import STATE, save
from tests.hostile.contract import Accepted, Refused, paused, run_limited

REFUSED: dict[str, Refused] = {}
ACCEPTED: dict[str, Accepted] = {}
OTHER = (
    "I7 killed at a step", "I8 a signal", "I11 a broken pipe", "I12 closed streams", "I12 ascii", "I12 full",
    "I13 a name that is no text", "I14 two runs, one output", "I15 the input changes", "I15 the input is replaced",
    "I16 killed between shards",
)  # fmt: skip
TEMPORARY = re.compile(r"out.*\.ckptkit-\d+-[0-9a-f]{8}\.tmp")
OLD = {"old": torch.ones(2)}


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a directory on a fast disk with a good file and an older output in it."""
    with scratch() as name:
        save(STATE, Path(name) / "in.safetensors")
        save(OLD, Path(name) / "out.safetensors")
        yield Path(name)


def converting(place: Path, name: str = "out.safetensors", *options: str) -> list[str | Path]:
    return ["convert", place / "in.safetensors", "-o", place / name, *options]


@pytest.mark.parametrize("step", ["posix_fallocate", "copy_file_range", "fsync", "replace"])
def test_i7_killed_at_a_step_the_old_output_is_whole(step: str, place: Path) -> None:
    """A temporary file has ckptkit in its name and is not a valid checkpoint until all bytes are written."""
    with paused(step, *converting(place, "out.safetensors", "--force")) as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert same_state(load_file(place / "out.safetensors"), OLD)
    (litter,) = set(names_in(place)) - {"in.safetensors", "out.safetensors"}
    assert TEMPORARY.fullmatch(litter)
    if step in ("posix_fallocate", "copy_file_range"):
        assert run_limited("show", place / litter).code == 2
    assert run_limited(*converting(place, "out.safetensors", "--force")).code == 0
    assert same_state(load_file(place / "out.safetensors"), STATE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["INT", "TERM", "HUP"])
@pytest.mark.parametrize("options", [(), ("--max-shard-size", "30")], ids=["file", "shards"])
def test_i8_a_signal_removes_unfinished_output(number: signal.Signals, options: tuple[str, ...], place: Path) -> None:
    """A signal during the write ends the program with 128 + n, without output and without temporary files.

    Only an interrupt by the user says so.
    """
    said = "ckpt: interrupted: nothing was written\n" if number == signal.SIGINT else ""
    before = names_in(place)
    with paused("pwrite", *converting(place, "new" if options else "new.pt", *options)) as process:
        assert names_in(place) != before
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        streams = process.communicate()
    assert (process.returncode, streams) == (128 + number, ("", said))
    assert names_in(place) == before


def test_i8_an_interrupt_after_the_write_does_not_say_that_nothing_was_written(place: Path) -> None:
    """The output has its name already; the directory is not yet on the disk."""
    interrupted = (
        "from ckptkit.formats.writing import atomic; from ckptkit.cli import run\n"
        "def interrupt(path): raise KeyboardInterrupt\n"
        "atomic.sync_directory = interrupt; run()"
    )
    command = [sys.executable, "-c", interrupted, *map(str, converting(place, "new.pt"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "ckpt: interrupted\n")
    assert (place / "new.pt").exists()


def test_i11_a_broken_pipe_is_quiet(place: Path) -> None:
    """``ckpt show … | head -1`` ends without an error, even with more output than a pipe holds."""
    save_file({f"{number:05}.weight": torch.ones(1) for number in range(4000)}, place / "many.safetensors")
    command = f"{sys.executable} -m ckptkit show {place}/many.safetensors | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["141"]


def test_i12_a_full_stdout_is_an_error(place: Path) -> None:
    """Output that cannot be written gives one line on stderr and exit code 2."""
    with open("/dev/full", "wb") as full:
        command: list[str | Path] = [sys.executable, "-m", "ckptkit", "show", place / "in.safetensors"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (2, b"ckpt: standard output: no space left on device\n")


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_i12_closed_streams_do_not_crash(closing: str, place: Path) -> None:
    """Nothing is printed into the output file."""
    for arguments in (f"show {place}/in.safetensors", f"convert {place}/in.safetensors -o {place}/new.safetensors"):
        command = f"{sys.executable} -m ckptkit {arguments} {closing}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=False)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert same_state(load_file(place / "new.safetensors"), STATE)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_i12_characters_outside_the_encoding_are_escaped(encoding: str, place: Path) -> None:
    save_file({"κ": torch.ones(1), "layers.0.w": torch.ones(1), "layers.1.w": torch.ones(1)}, place / "x.safetensors")
    command: list[str | Path] = [sys.executable, "-m", "ckptkit", "show", place / "x.safetensors"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u03ba" in done.stdout
    assert b"layers.{0,1}.w" in done.stdout


def test_i13_a_file_name_that_is_not_text_works_and_is_escaped(place: Path) -> None:
    source, out = place / os.fsdecode(b"\xff.safetensors"), place / os.fsdecode(b"\xfe.pt")
    os.rename(place / "in.safetensors", source)
    shown = run_limited("show", source)
    made = run_limited("convert", source, "-o", out)
    assert (shown.code, made.code) == (0, 0)
    assert shown.out.startswith(f"{place}/\\udcff.safetensors: safetensors")
    assert made.err.startswith(f"wrote {place}/\\udcfe.pt: torch")
    assert same_state(torch.load(out, weights_only=True), STATE)


@pytest.mark.parametrize("name", ["new.safetensors", "new.pt", "set"])
@pytest.mark.parametrize("force", [True, False], ids=["with force", "without"])
def test_i14_the_output_of_two_runs_is_that_of_one_of_them(name: str, place: Path, *, force: bool) -> None:
    """The run that finishes first wins, with --force too: the other run did not see its output when it began."""
    options = (*(("--force",) if force else ()), *(("--max-shard-size", "1kB") if name == "set" else ()))
    with paused("posix_fallocate", *converting(place, name, *options)) as late:
        other = run_limited("remap", place / "in.safetensors", "-o", place / name, "--rename", "*=x.*", *options)
        assert other.code == 0
        late.send_signal(signal.SIGCONT)
        _, err = late.communicate()
    assert late.returncode == 2, err
    assert err.startswith(
        f"ckpt: {place / name}: another program created this path during this run; it was not replaced"
    )
    found = place / name / "model.safetensors" if name == "set" else place / name
    state = torch.load(found, weights_only=True) if name == "new.pt" else load_file(found)
    assert same_state(state, {f"x.{key}": value for key, value in STATE.items()})
    assert names_in(place) == sorted(["in.safetensors", "out.safetensors", name])


def test_i15_an_input_that_is_replaced_is_an_error(place: Path) -> None:
    """The output would hold the values of a file that the path no longer names, so nothing is written."""
    with paused("posix_fallocate", *converting(place, "new.safetensors")) as process:
        os.replace(place / "out.safetensors", place / "in.safetensors")
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith(f"ckpt: {place / 'in.safetensors'}: another program replaced the file while it was read")
    assert names_in(place) == ["in.safetensors"]
    assert same_state(load_file(place / "in.safetensors"), OLD)


@pytest.mark.parametrize("present", [True, False], ids=["old set", "none"])
def test_i16_killed_between_shards_the_old_set_is_whole(place: Path, *, present: bool) -> None:
    """The new shards are in a temporary directory until all shards and the index are written."""
    options = ("--max-shard-size", "30", "--force")
    if present:
        assert run_limited("convert", place / "out.safetensors", "-o", place / "set", *options).code == 0
    before = names_in(place)
    with paused("replace", *converting(place, "set", *options)) as process:
        process.send_signal(signal.SIGCONT)
        os.waitpid(process.pid, os.WUNTRACED)  # the first shard has its name, the second is about to get it
        process.kill()
    (litter,) = set(names_in(place)) - set(before)
    assert re.fullmatch(r"set\.ckptkit-\d+-[0-9a-f]{8}\.tmp", litter)
    assert "model.safetensors.index.json" not in names_in(place / litter)
    assert not present or same_state(load_file(place / "set" / "model.safetensors"), OLD)
