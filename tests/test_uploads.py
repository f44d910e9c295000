"""Outputs in stores: whole or not at all, whichever call of the store fails, and never an index of mixed shards."""

from __future__ import annotations

import errno
import gc
import io
import json
import random
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save_file

from ckptkit import choose_output, convert, execute, open_checkpoint, plan_remap
from ckptkit.core.files.remote.traffic import meter_of
from ckptkit.errors import CkptkitError, OutputError
from ckptkit.formats.writing.stores import transfers
from ckptkit.formats.writing.stores.sending import Sending
from ckptkit.formats.writing.targets import present_state
from ckptkit.formats.writing.traces import left_between, note_replaced
from tests.helpers_cli import run_ckpt
from tests.helpers_outputs import same_state, tensor_of
from tests.helpers_stores import AtCloseStore, PartsFile, PartsStore, ShownStore, is_as_told, register_stores

NEW = {"a.weight": tensor_of("F32", (40, 3)), "a.bias": tensor_of("F32", (40,), 1), "b": tensor_of("BF16", (50,), 2)}
OLD = {"old": tensor_of("F32", (70,), 3), "older": tensor_of("U8", (200,), 4)}
STORES = (PartsStore, AtCloseStore, ShownStore)
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send many parts of few bytes."""
    monkeypatch.setattr(transfers, "_PART", 300)
    monkeypatch.setattr(transfers, "_PART_IN_ORDER", 300)
    monkeypatch.setattr(transfers, "_MIB", 1)
    register_stores()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(NEW, tmp_path / "in.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    return tmp_path / "in.safetensors"


class Case(NamedTuple):
    """An output: its name, and the options of ``convert``."""

    name: str
    options: dict[str, Any]


CASES = [
    Case("out.safetensors", {}),
    Case("out.pt", {"dtype": "F64"}),
    Case("out", {"max_shard_size": 300, "carry": True}),
    Case("out", {"format": "dcp"}),
]
NAMES = ["safetensors", "torch", "shards", "dcp"]
each_case = pytest.mark.parametrize("case", CASES, ids=NAMES)


def state_at(url: str) -> dict[str, torch.Tensor]:
    with open_checkpoint(url) as checkpoint:
        return {key: checkpoint.read(key) for key in checkpoint}


def write(source: Any, url: str, case: Case) -> None:
    convert(source, url, force=True, **case.options)


def wanted(case: Case, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in state.items()} if case.options.get("dtype") else state


@each_case
@pytest.mark.parametrize("store", STORES, ids=[store.protocol for store in STORES])
def test_a_new_output_is_whole_or_not_there(store: type[PartsStore], case: Case, source: Path) -> None:
    """Whichever call of the store fails, nothing is visible after the error, and no upload is unfinished."""
    url = f"{store.protocol}://bucket/{case.name}"
    for nth in range(1, 200):
        store.reset({}, nth)
        try:
            write(source, url, case)
        except CkptkitError as error:
            path = error.path
        else:
            break
        finally:
            store.fails_at = 0
        assert path is not None, nth
        assert path.startswith(url), nth
        assert (store.content(), store.unfinished) == ({}, set()), nth
    assert nth > 3
    same_state(state_at(url), wanted(case, NEW))


def index_is_of_one_checkpoint(content: dict[str, bytes]) -> None:
    """Assert that an index, if there is one, names files of one checkpoint."""
    data = content.get(f"/bucket/out/{INDEX}")
    if data is None:
        return
    for key, name in json.loads(data)["weight_map"].items():
        assert key in load(content[f"/bucket/out/{name}"])


def files_at(store: type[PartsStore]) -> dict[str, bytes]:
    return {path.rpartition("/")[2]: data for path, data in store.content().items()}


@each_case
@pytest.mark.parametrize("ends", ["fails", "interrupts"])
@pytest.mark.parametrize("store", STORES, ids=[store.protocol for store in STORES])
def test_an_old_output_is_replaced_or_the_error_says_what_is_where(
    store: type[PartsStore], ends: str, case: Case, source: Path
) -> None:
    """Whenever a call fails or Ctrl-C comes, all files are old, or all are new, or each file is as the message says.

    No index is ever wrong, and no upload is unfinished.
    """
    url = f"{store.protocol}://bucket/{case.name}"
    is_folder = "." not in case.name
    store.reset({})
    write(dict(OLD), url, Case(case.name, {name: value for name, value in case.options.items() if name != "carry"}))
    old = store.content()
    before, old = {**old, "/bucket/other": b"stays"}, files_at(store)
    write(source, url, case)
    new, count, is_noted = files_at(store), 0, True
    for nth in range(1, 200):
        store.reset(before)
        setattr(store, f"{ends}_at", nth)
        store.watch = None if store is ShownStore else lambda: index_is_of_one_checkpoint(store.content())
        try:
            write(source, url, case)
        except CkptkitError as error:
            told = error.hint or ""
        except KeyboardInterrupt as stopped:
            told = "; ".join(getattr(stopped, "__notes__", []))
            is_noted = is_noted and told == left_between()
        else:
            break
        finally:
            store.watch, store.fails_at, store.interrupts_at = None, 0, 0
            note_replaced(url)
        now = files_at(store)
        assert now.pop("other") == b"stays"
        if is_folder:
            assert is_as_told(told, url, now, old, new), (nth, told, sorted(now))
        else:
            what = {True: ("",), False: (f"{url} is the new file, whole", f"the old {url} was already replaced")}[
                now == old
            ]
            assert any(words in told for words in what), (nth, told)
            assert now in (old, new) or "is lost" in told
        assert not store.unfinished
        count += bool(told)
    assert count or ends == "interrupts"
    assert is_noted  # what the command says, callers from Python find in the exception
    same_state(state_at(url), wanted(case, NEW))
    assert not store.unfinished


@each_case
@pytest.mark.parametrize("store", STORES, ids=[store.protocol for store in STORES])
def test_a_lost_answer_is_not_an_error(store: type[PartsStore], case: Case, source: Path) -> None:
    """Files that got their names are there, whatever the store answered; nothing else is left."""
    url = f"{store.protocol}://bucket/{case.name}"
    for old in (
        {},
        {f"/bucket/{case.name}/config.json": b"old"} if "." not in case.name else {f"/bucket/{case.name}": b"old"},
    ):
        store.reset(dict(old))
        write(source, url, case)
        content = store.content()
        store.reset(dict(old))
        store.loses_answers = True
        write(source, url, case)
        assert store.content() == content
    same_state(state_at(url), wanted(case, NEW))


def test_a_file_of_another_program_is_never_removed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store fails when the file gets its name, and there is a file of another size."""
    url = "parts://bucket/out.safetensors"

    def another() -> None:
        PartsStore().show("/bucket/out.safetensors", b"of another program")
        raise OSError(errno.EIO, "the store failed")

    PartsStore.reset({})
    monkeypatch.setattr(PartsFile, "commit", lambda _: another())
    with pytest.raises(OutputError, match="cannot be written"):
        convert(source, url)
    assert PartsStore.content() == {"/bucket/out.safetensors": b"of another program"}
    assert not PartsStore.unfinished


def test_a_file_that_is_removed_at_the_last_moment_is_said_to_be_changed(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that compares finds no file to replace; that the output does not exist would say nothing."""

    def removed() -> None:
        del PartsStore.store["/bucket/out.safetensors"]
        raise FileNotFoundError

    PartsStore.reset({"/bucket/out.safetensors": b"old"})
    monkeypatch.setattr(PartsFile, "commit", lambda _: removed())
    with pytest.raises(OutputError, match="another program changed this file"):
        convert(source, "parts://bucket/out.safetensors", force=True)
    assert PartsStore.content() == {}
    assert not PartsStore.unfinished


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=["file", "shards"])
def test_what_cannot_be_removed_is_said_after_an_interrupt(
    case: Case, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store fails when the unfinished uploads are to be removed."""
    url = f"parts://bucket/{case.name}"

    discard = PartsFile.discard

    def fail(file: PartsFile) -> None:
        if PartsStore.count >= PartsStore.interrupts_at:
            raise OSError(errno.EIO, "the store failed")
        discard(file)

    monkeypatch.setattr(PartsFile, "discard", fail)
    PartsStore.reset({})
    PartsStore.interrupts_at = 6
    with pytest.raises(KeyboardInterrupt) as stopped:
        write(source, url, case)
    told = "; ".join(stopped.value.__notes__)
    assert f"the unfinished upload of {url}" in told
    assert "could not be removed: remove it by hand" in told
    assert left_between() == told
    for path in PartsStore.unfinished:
        note_replaced(path.replace("/bucket", "parts://bucket"))
    note_replaced(url)
    count = PartsStore.count
    del stopped
    gc.collect()
    assert PartsStore.count == count  # nothing is sent when the file is collected


def test_a_directory_in_a_store_with_directories_is_not_replaced(source: Path) -> None:
    """As on a disk, also with ``force``, and before a value is read."""
    PartsStore.reset({"/bucket/out/inner/a.bin": b"1"})
    with pytest.raises(OutputError, match="contains the directory 'inner', so it is not replaced"):
        convert(source, "parts://bucket/out", max_shard_size=300, force=True)
    assert PartsStore.content() == {"/bucket/out/inner/a.bin": b"1"}


def test_torch_reads_checksums_behind_the_records(source: Path) -> None:
    """A torch file that was sent in order is a valid archive for torch and for zipfile."""
    PartsStore.reset({})
    write(source, "parts://bucket/out.pt", CASES[1])
    data = PartsStore.content()["/bucket/out.pt"]
    same_state(torch.load(io.BytesIO(data), weights_only=True), wanted(CASES[1], NEW))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert [info.flag_bits & 8 for info in archive.infolist()] == [0, 0, 8, 8, 8, 0]


def test_the_threads_of_a_file_end_before_the_next_one_is_sent(tmp_path: Path) -> None:
    """The number of threads does not grow with the number of shards."""
    save_file({str(key): torch.ones(300) for key in range(40)}, tmp_path / "in.safetensors")
    counts = []
    PartsStore.reset({})
    PartsStore.watch = lambda: counts.append(threading.active_count())
    convert(tmp_path / "in.safetensors", "parts://bucket/out", max_shard_size=1500)
    assert len(PartsStore.content()) == 41
    assert max(counts) < threading.active_count() + 10


def test_bytes_that_come_early_wait() -> None:
    """Bytes may come in any order that threads make; the parts are sent whole and in order."""

    class Transfer:
        part, at_once, is_held, is_quick = 300, 3, True, True

        def __init__(self) -> None:
            self.parts: dict[int, bytes] = {}

        def send(self, number: int, part: bytes) -> None:
            self.parts[number] = part

        def begin(self) -> None: ...
        def close(self) -> None: ...
        def commit(self, before: object) -> None: ...
        def abort(self) -> None: ...
        def is_ours(self, state: object) -> None: ...
        def remains(self, url: str) -> str:
            return url

    data = random.Random(0).randbytes(10_007)  # noqa: S311 - not a secret
    transfer = Transfer()
    sending = Sending(transfer, len(data), meter_of("test"))
    starts = list(range(0, len(data), 101))
    for window in range(0, len(starts), 7):
        for start in reversed(starts[window : window + 7]):
            sending.write(memoryview(data)[start : start + 101], start)
    sending.finish()
    sending.end_threads()
    assert b"".join(transfer.parts[number] for number in range(len(transfer.parts))) == data
    assert {len(part) for number, part in transfer.parts.items() if number < 33} == {300}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.com/a.safetensors", "https:// is only read"),
        ("zip://a.pt::memory://b.zip", "a chain of filesystems is only read"),
        ("hf:org/name", "hf: is only read"),
    ],
)
def test_stores_that_are_only_read_are_refused_at_once(url: str, reason: str) -> None:
    """The output is refused before an input is read, and the hint names the way out."""
    with pytest.raises(OutputError, match=reason) as refused:
        choose_output(url)
    assert "write to a path of this machine" in (refused.value.hint or "")


def test_a_store_shares_no_blocks(source: Path) -> None:
    """``--reflink always`` is refused before an input is read; without it, the output is written."""
    url = "memory://uploads/shared.safetensors"
    with pytest.raises(OutputError, match="cannot share blocks") as refused:
        choose_output(url, reflink="always")
    assert refused.value.hint == "leave out --reflink"
    assert convert(source, url, force=True).path == url


def test_another_program_is_noticed(source: Path) -> None:
    """A file that appears or changes in the store after the output was chosen is not replaced."""
    url = "parts://bucket/out.safetensors"
    for before in ({}, {"/bucket/out.safetensors": b"old"}):
        PartsStore.reset(dict(before))
        output = replace(choose_output(url, force=True), before=present_state(url))
        PartsStore.reset({"/bucket/out.safetensors": b"of another program"})
        with pytest.raises(OutputError, match="another program"):
            execute(plan_remap(source), source, output)
        assert PartsStore.content() == {"/bucket/out.safetensors": b"of another program"}
        assert not PartsStore.unfinished


def test_a_dry_run_writes_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run asks the store once what is there."""
    PartsStore.reset({})
    ran = run_ckpt(capsys, "convert", str(source), "-o", "parts://bucket/out.safetensors", "--dry-run")
    assert (ran.code, PartsStore.content(), PartsStore.count) == (0, {}, 1), ran.err
