"""A patch of ``ckpt delta`` makes the new checkpoint of its base bit by bit, or nothing."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit.core.checkpoint.provenance import DELTA
from ckptkit.deltas.patch_file import read_patch
from ckptkit.errors import ChangedError, CkptkitError, FormatError, OutputError, PlanError
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_faults import Faults, outcome
from tests.helpers_outputs import names_in, same_state, sha256

TEN, TUNED, DDP = (
    str(ROOT / "fixtures" / name) for name in ("lenet_10class.pth", "lenet_tuned.safetensors", "lenet_ddp.pt")
)
State = dict[str, torch.Tensor]
METADATA = {"format": "pt", "licence": "ü\n", "epoch": "3"}


def state(seed: int) -> State:
    """Tensors of each width and of odd shapes; one has several blocks, of which a change concerns one."""
    random = torch.Generator().manual_seed(seed)
    made: State = {"blocks": torch.zeros(275, 1000)}
    made["blocks"][270, seed : seed + 3] = 1 + seed
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn"):
        made[name] = torch.randn(33, 7, generator=random).to(getattr(torch, name))
    for name in ("int64", "int32", "int16", "int8", "uint8", "bool"):
        made[name] = torch.randint(0, 2 + 90 * (name != "bool"), (5, 3), generator=random).to(getattr(torch, name))
    made["odd"] = torch.randn(9, 1, dtype=torch.float64, generator=random)
    return {
        **made,
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(1.5 + seed),
        "equal": torch.full((10,), torch.nan),
    }


def changed() -> State:
    """The state with a new, a renamed, a grown, a shrunk and a cast tensor, in another order."""
    made = {**state(1), "new": torch.ones(3), "renamed": before()["old_name"], "cast": before()["cast"].half()}
    grown = before()["grown"]
    made |= {"grown": torch.cat([grown, torch.ones(2, 4)]), "shrunk": before()["shrunk"][:3].clone()}
    made |= {"no_columns": torch.zeros(3, 0), "no_rows": torch.ones(2, 3), "emptied": torch.zeros(0, 4)}
    return dict(reversed(made.items()))


def before() -> State:
    random = torch.Generator().manual_seed(7)
    more = {name: torch.randn(6, 4, generator=random) for name in ("old_name", "cast", "grown", "shrunk", "dropped")}
    empty = {"no_columns": torch.zeros(2, 0), "no_rows": torch.zeros(0, 3), "emptied": torch.ones(6, 4)}
    return {**state(0), **more, **empty}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a new checkpoint in several formats, and the patch between the safetensors files."""
    folder = tmp_path_factory.mktemp("deltas")
    save_file(before(), folder / "base.safetensors")
    save_file(changed(), folder / "new.safetensors", METADATA)
    torch.save(before(), folder / "base.pt")
    torch.save(changed(), folder / "new.pt")
    ckptkit.convert(folder / "base.safetensors", folder / "base_shards", max_shard_size="2MB")
    ckptkit.make_delta(folder / "base.safetensors", folder / "new.safetensors", folder / "patch.safetensors")
    return folder


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def test_the_output_is_the_new_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Names, order, dtypes, shapes, bytes and metadata are those of the new file, as safetensors reads them."""
    out = tmp_path / "out.safetensors"
    written = ckptkit.apply_delta(folder / "base.safetensors", folder / "patch.safetensors", out, verify=True)
    assert written.verified
    assert same_state(load_file(out), changed())
    (found, found_bytes), (wanted, wanted_bytes) = header_of(out), header_of(folder / "new.safetensors")
    assert list(found) == list(wanted)
    assert (found, found_bytes) == (wanted, wanted_bytes)
    assert metadata_of(out) == METADATA


@pytest.mark.parametrize(
    ("base", "out"),
    [("base.safetensors", "out.pt"), ("base.pt", "shards"), ("base_shards", "dcp"), ("in memory", "out.safetensors")],
)
def test_formats_and_shards_may_be_others(base: str, out: str, folder: Path, tmp_path: Path) -> None:
    """The base may be stored otherwise than when the patch was made, and the output than the new checkpoint."""
    given: Any = before() if base == "in memory" else folder / base
    options: dict[str, Any] = {"shards": {"max_shard_size": "2MB"}, "dcp": {"format": "dcp"}}.get(out, {})
    ckptkit.apply_delta(given, folder / "patch.safetensors", tmp_path / out, **options)
    with ckptkit.open_checkpoint(tmp_path / out) as found:
        assert same_state(found.state_dict(), changed())
    assert ckptkit.digest(tmp_path / out).contents == ckptkit.digest(folder / "new.safetensors").contents


@pytest.mark.parametrize(("new", "compression"), [("new.pt", "zlib"), ("new.safetensors", "zstd")])
def test_a_patch_of_any_formats_gives_tensors_in_memory(
    new: str, compression: str, folder: Path, tmp_path: Path
) -> None:
    if compression == "zstd":
        pytest.importorskip("zstandard")
    patch = tmp_path / "patch"
    ckptkit.make_delta(folder / "base.pt", folder / new, patch, compression=compression)  # type: ignore[arg-type]
    plan = ckptkit.plan_apply_delta(before(), patch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody is told that the patch is one
        made = plan.materialize({"base": before(), "patch": patch})
    assert same_state(made, changed())
    assert same_state(dict(plan.tensors({"base": before(), "patch": patch})), changed())


def test_zstd_is_missed_before_anything_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zstandard")
    ckptkit.make_delta(before(), folder / "new.pt", tmp_path / "patch", compression="zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(FormatError, match="zstandard is not installed"):
        ckptkit.plan_apply_delta(before(), tmp_path / "patch")


def test_the_result_says_what_happened_to_each_tensor(folder: Path, tmp_path: Path) -> None:
    made = ckptkit.make_delta(folder / "base.safetensors", folder / "new.safetensors")
    states = {tensor.info.key: tensor.state for tensor in made.tensors}
    assert list(states) == [key for key in header_of(folder / "new.safetensors")[0] if key != "__metadata__"]
    assert {key: states[key] for key in ("equal", "empty", "blocks", "new", "renamed", "cast", "grown", "shrunk")} == {
        "equal": "equal", "empty": "equal", "blocks": "changed", "new": "new", "renamed": "renamed",
        "cast": "replaced", "grown": "replaced", "shrunk": "replaced",
    }  # fmt: skip
    assert {tensor.base_key for tensor in made.tensors if tensor.info.key == "renamed"} == {"old_name"}
    assert [info.key for info in made.dropped] == ["dropped"]
    assert made.new.contents == ckptkit.digest(folder / "new.safetensors").contents
    assert made.base.contents == ckptkit.digest(folder / "base.safetensors").contents
    assert (made.path, names_in(tmp_path)) == ("", [])
    again = ckptkit.make_delta(folder / "base.safetensors", folder / "new.safetensors", tmp_path / "p")
    assert (again.nbytes, again.tensors) == ((tmp_path / "p").stat().st_size, made.tensors)
    assert (tmp_path / "p").read_bytes() == (folder / "patch.safetensors").read_bytes()


def test_equal_tensors_cost_nothing() -> None:
    """A patch to an equal checkpoint has no bytes of tensors, and few of names and digests, whatever their size."""
    made = ckptkit.make_delta(TEN, TEN)
    assert made.counts["equal"] == 10
    assert sum(tensor.packed for tensor in made.tensors) == 0
    assert made.nbytes < 2000


def test_a_name_may_be_empty(tmp_path: Path) -> None:
    """The empty name is a name as any other, also of a tensor that is renamed."""
    base, new = {"": torch.ones(2), "kept": torch.ones(1)}, {"weight": torch.ones(2), "kept": torch.ones(1)}
    for one, other in ((base, new), (new, base)):
        delta = ckptkit.make_delta(one, other, tmp_path / "patch.safetensors", force=True)
        assert {tensor.state: tensor.base_key for tensor in delta.tensors}["renamed"] == next(iter(one))
        plan = ckptkit.plan_apply_delta(one, tmp_path / "patch.safetensors")
        assert same_state(plan.materialize({"base": one, "patch": tmp_path / "patch.safetensors"}), other)


def test_ties_versions_and_metadata_come_back(tmp_path: Path) -> None:
    """A torch output has the ties and the module versions of the new one; equal tensors without a tie stay apart."""
    layer = torch.nn.BatchNorm1d(4)
    base = layer.state_dict()
    new = layer.state_dict()
    new["weight"] = torch.full((4,), 2.0)
    new["tied"] = new["weight"]
    new["alike"] = new["weight"].clone()
    for name, saved in (("base.pt", base), ("new.pt", new)):
        torch.save(saved, tmp_path / name)
    made = ckptkit.make_delta(tmp_path / "base.pt", tmp_path / "new.pt", tmp_path / "patch")
    assert [(tensor.info.key, tensor.tied_to) for tensor in made.tensors if tensor.tied_to] == [("tied", "weight")]
    written = ckptkit.apply_delta(tmp_path / "base.pt", tmp_path / "patch", tmp_path / "out.pt")
    assert written.untied == ()
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found._metadata == new._metadata  # type: ignore[attr-defined]
    assert list(found) == list(new)
    places = {key: found[key].untyped_storage().data_ptr() for key in ("weight", "tied", "alike")}
    assert places["weight"] == places["tied"] != places["alike"]
    apart = ckptkit.apply_delta(tmp_path / "base.pt", tmp_path / "patch", tmp_path / "out.safetensors")
    assert apart.untied == (("weight", "tied"),)
    assert {drop.key for drop in apart.plan.dropped} == {"_metadata"}  # type: ignore[union-attr]


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("key", ["blocks", "equal", "float32", "grown", "old_name", "dropped", "cast"])
def test_another_base_is_refused(key: str, folder: Path, tmp_path: Path) -> None:
    """One flipped bit in any tensor is found, and named with the name of the right base, also where no byte is used."""
    other = before()
    other[key].view(torch.uint8).flatten()[-1] ^= 1
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(PlanError, match=f"'{key}' has other values") as caught:
        ckptkit.apply_delta(tmp_path / "other.safetensors", folder / "patch.safetensors", tmp_path / "out.safetensors")
    assert caught.value.path == str(tmp_path / "other.safetensors")
    assert "made from 'base.safetensors'" in caught.value.reason
    assert names_in(tmp_path) == ["other.safetensors"]


def test_a_patch_that_was_applied_already_says_so(folder: Path, tmp_path: Path) -> None:
    """It names what was compared: only headers where these differ from those of the base, else also digests."""
    seen = r"it looks like the result already: all that was compared \((.*)\) agrees with it"
    with pytest.raises(PlanError, match=seen) as caught:
        ckptkit.apply_delta(folder / "new.safetensors", folder / "patch.safetensors", tmp_path / "out.pt")
    assert "(names, dtypes and shapes)" in caught.value.reason
    base = {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(1), "d": torch.zeros(1)}
    new = {**base, "a": torch.zeros(3), "b": torch.zeros(2), "c": base["d"].clone()}
    ckptkit.make_delta(base, new, tmp_path / "patch")
    with pytest.raises(PlanError, match=r"'a' has other values; it .*\(names, dtypes, shapes and 3 tensors\)"):
        ckptkit.apply_delta(new, tmp_path / "patch", tmp_path / "out.pt")
    for other in ({**new, "b": torch.ones(2)}, {**base, "a": torch.full((3,), 2.0)}):
        with pytest.raises(PlanError, match=r"has other values \(") as caught:
            ckptkit.apply_delta(other, tmp_path / "patch", tmp_path / "out.pt")
    assert names_in(tmp_path) == ["patch"]


CHANGES: dict[str, Callable[[State], object]] = {
    "'equal' is missing": lambda base: base.pop("equal"),
    "'dropped' is missing": lambda base: base.pop("dropped"),
    r"'float16' is F16 \[3\], and not F16 \[33, 7\]": lambda base: base.update(float16=torch.ones(3).half()),
    r"'int8' is I16 \[5, 3\], and not I8 \[5, 3\]": lambda base: base.update(int8=base["int8"].short()),
    "it has 'more' too": lambda base: base.update(more=torch.ones(1)),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_base_with_another_header_is_refused_at_once(reason: str, folder: Path) -> None:
    other = before()
    CHANGES[reason](other)
    with pytest.raises(PlanError, match=f"not the base of this patch, which was made from '.*': {reason}"):
        ckptkit.plan_apply_delta(other, folder / "patch.safetensors")


def test_any_flipped_bit_of_a_patch_is_found(folder: Path, tmp_path: Path) -> None:
    """Damage is refused in one sentence that names the patch, and nothing is written."""
    patch, out = tmp_path / "patch.safetensors", tmp_path / "out.safetensors"
    size = (folder / "patch.safetensors").stat().st_size
    for at in {*range(8, size, size // 12), size - 1}:
        shutil.copy(folder / "patch.safetensors", patch)
        flipped(patch, at)
        with pytest.raises(CkptkitError) as caught:
            ckptkit.apply_delta(folder / "base.safetensors", patch, out)
        assert isinstance(caught.value, FormatError), (at, caught.value)
        assert caught.value.path == str(patch)
        assert not out.exists()


def test_a_truncated_or_newer_patch_and_another_file_are_refused(folder: Path, tmp_path: Path) -> None:
    patch = tmp_path / "patch.safetensors"
    data = (folder / "patch.safetensors").read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        patch.write_bytes(data[:length])
        with pytest.raises(FormatError):
            ckptkit.plan_apply_delta(before(), patch)
    with safe_open(folder / "patch.safetensors", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - no mapping
    document = json.loads(metadata[DELTA])
    save_file(tensors, patch, {DELTA: json.dumps({**document, "version": document["version"] + 1})})
    with pytest.raises(FormatError, match="version") as caught:
        ckptkit.plan_apply_delta(before(), patch)
    assert caught.value.hint is not None
    assert "update ckptkit" in caught.value.hint
    with pytest.raises(FormatError, match="not a patch"):
        ckptkit.plan_apply_delta(before(), folder / "base.safetensors")


def test_what_a_patch_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Entries beside tensors are named, and left out only when asked, or beside a mapping that the path names.

    Tensors without plain bytes are refused.
    """
    with pytest.raises(PlanError, match="cannot hold 'epoch', 'optimizer', 'best_acc'"):
        ckptkit.make_delta(TEN, DDP, tmp_path / "p")
    made = ckptkit.make_delta(TEN, DDP, tmp_path / "p", only_tensors=True)
    assert (made.left_out, made.counts["renamed"]) == (("epoch", "optimizer", "best_acc"), 10)
    torch.save(
        {"model": {"w": torch.ones(2), "b": torch.ones(1), "inside": 3}, "inside": 4, "epoch": 1}, tmp_path / "run.pt"
    )
    base = {"module.w": torch.zeros(2)}
    assert ckptkit.make_delta(TEN, f"{DDP}::model").left_out == made.left_out  # the path names all that is wanted
    with pytest.raises(PlanError, match=r"cannot hold 'inside' \("):
        ckptkit.make_delta(base, tmp_path / "run.pt::model")
    with pytest.raises(PlanError, match="cannot hold 'inside', 'epoch'"):
        ckptkit.make_delta(base, tmp_path / "run.pt")
    sparse = {"s": torch.eye(2).to_sparse(), "w": torch.ones(1)}
    with pytest.raises(
        PlanError, match=r"'s' cannot be copied: it is a sparse tensor \(convert\(new, out, skip_unread=T"
    ):
        ckptkit.make_delta(TEN, sparse)
    torch.save({0: torch.ones(1), "x": {"y": torch.ones(2)}, "z": torch.ones(3)}, tmp_path / "nested.pt")
    names = "'0', 'x.y' will be plain names in what the patch makes: in new they are nested, or not text"
    assert names in ckptkit.make_delta(TEN, tmp_path / "nested.pt").notes
    assert ckptkit.make_delta(sparse, {"w": torch.ones(1)}).notes == (
        "a patch does not compare tensors of the base without plain bytes: 's'",
    )
    with pytest.raises(PlanError, match="has no tensor"):
        ckptkit.make_delta(TEN, {})


def test_an_input_or_an_existing_file_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    base, patch = tmp_path / "base.safetensors", tmp_path / "patch"
    shutil.copy(folder / "base.safetensors", base)
    with pytest.raises(OutputError, match="is an input"):
        ckptkit.make_delta(base, before(), base, force=True)
    patch.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        ckptkit.make_delta(base, before(), patch)
    assert patch.read_text() == "mine"
    with pytest.raises(OutputError, match="is the name of a directory"):
        ckptkit.make_delta(base, before(), f"{tmp_path}/patches/")
    with pytest.raises(FormatError, match="is a patch"), pytest.warns(UserWarning, match="is a patch"):
        ckptkit.make_delta(folder / "patch.safetensors", before())


def test_a_base_that_changes_meanwhile_is_noticed(folder: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    shutil.copy(folder / "base.safetensors", base)
    done: list[int] = []

    def progress(count: int) -> None:
        if not done:
            flipped(base, base.stat().st_size - 1)
        done.append(count)

    with pytest.raises(ChangedError):
        ckptkit.apply_delta(base, folder / "patch.safetensors", out, progress=progress)
    done.clear()
    with pytest.raises(ChangedError):
        ckptkit.make_delta(base, folder / "new.safetensors", out, progress=progress)
    assert not out.exists()


def test_any_system_call_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch is there, whole, or not; the same holds for what is made of it."""
    tiny = {"a": torch.zeros(40), "b": torch.ones(9)}, {"a": torch.arange(40.0), "b": torch.ones(9)}
    paths = []
    for name, one in zip(("base", "new"), tiny, strict=True):
        paths.append(tmp_path / f"{name}.safetensors")
        save_file(one, paths[-1])
    whole = tmp_path / "whole"
    ckptkit.make_delta(paths[0], paths[1], whole)
    with (
        ckptkit.open_checkpoint(paths[0]) as base,
        ckptkit.open_checkpoint(paths[1]) as new,
        ckptkit.open_checkpoint(whole) as patch,
    ):
        runs: list[Callable[[Path], object]] = [
            lambda out: ckptkit.make_delta(base, new, out),
            lambda out: ckptkit.apply_delta(base, patch, out, format="safetensors"),
        ]
        for run, wanted in zip(runs, (sha256(whole), sha256(paths[1])), strict=True):
            for nth in range(1, 200):
                place = tmp_path / f"{wanted[:4]}{nth}"
                place.mkdir()
                faults = Faults(monkeypatch)
                faults.arm(nth, errno.EIO)
                refusal = outcome(lambda: run(place / "out"))  # noqa: B023 - called at once
                faults.disarm()
                assert names_in(place) in ([], ["out"])
                assert (place / "out").exists() or refusal is not None
                assert not (place / "out").exists() or sha256(place / "out") == wanted
                if faults.count < nth:
                    assert refusal is None
                    break
            assert nth > 8


def test_commands_say_that_a_file_is_a_patch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``show`` prints what it holds; every other command says what it is, and the command that applies it."""
    patch = folder / "patch.safetensors"
    shown = run_ckpt(capsys, "show", patch)
    assert shown.code == 0
    for digest in (ckptkit.digest(folder / name).contents for name in ("base.safetensors", "new.safetensors")):
        assert digest in shown.out
    document = json.loads(run_ckpt(capsys, "show", patch, "--json").out)
    made = ckptkit.make_delta(folder / "base.safetensors", folder / "new.safetensors")
    assert {state: document["delta"]["summary"][state] for state in made.counts} == made.counts
    said = f"{patch}: warning: is a patch, and its tensors are not weights; ckpt apply BASE {patch} -o OUT makes"
    for arguments, where in ((("diff", patch, TEN), "EXPECTED"), (("merge", TEN, patch, "-o", "o.pt", "-n"), "DONOR")):
        ran = run_ckpt(capsys, *arguments)
        assert said in ran.err
        hint = (ran.out + ran.err).partition(f"hint: {where} is a patch")[2]
        assert hint.removeprefix(";").strip().startswith(f"ckpt apply BASE {patch} -o OUT makes a checkpoint of it")
    with (
        pytest.warns(UserWarning, match="is a patch"),
        pytest.raises(PlanError, match=r"CHECKPOINT is a patch; apply_delta\(base, '.*', out\) makes"),
    ):
        ckptkit.load_into(torch.nn.Linear(2, 2), patch)


def test_the_hints_of_refusals_work(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands that hints and warnings name run, in the order of arguments that they say."""
    base, patch, out = folder / "base.safetensors", folder / "patch.safetensors", tmp_path / "out.safetensors"
    ran = run_ckpt(capsys, "apply", patch, base, "-o", out)
    assert (ran.code, "hint: its base comes first: ckpt apply BASE PATCH -o OUT" in ran.err) == (2, True)
    ran = run_ckpt(capsys, "delta", patch, base, "-o", out)
    assert (ran.code, "ckpt apply BASE PATCH -o OUT makes a checkpoint of it" in ran.err) == (2, True)
    assert run_ckpt(capsys, "apply", base, patch, "-o", out).code == 0
    ran = run_ckpt(capsys, "apply", TEN, patch, "-o", out, "--force")
    hint = "ckpt show PATCH prints the digests of its base and its result, and ckpt digest PATH that of a checkpoint"
    assert hint in ran.err
    digest = run_ckpt(capsys, "digest", base).out.splitlines()[-2].split()[0]
    assert digest in run_ckpt(capsys, "show", patch).out
    ran = run_ckpt(capsys, "delta", TEN, base, "-n")
    note = "no tensor has the same name on both sides; ckpt align BASE NEW finds the rules that rename one side"
    assert note in ran.out
    assert run_ckpt(capsys, "align", TEN, base).code in {0, 1}


def test_the_commands_write_and_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan of a dry run reads headers only; the output is said to be of the base and of the patch."""
    patch, out = tmp_path / "patch.safetensors", tmp_path / "out.safetensors"
    made = run_ckpt(capsys, "delta", TEN, TUNED, "-o", patch)
    assert (made.code, made.err) == (
        0,
        f"wrote {patch}: {made.out.rpartition('the patch has ')[2].partition(' (')[0]}\n",
    )
    plan = run_ckpt(capsys, "apply", TEN, patch, "-o", out, "--dry-run", "--json")
    assert json.loads(plan.out)["summary"]["by_source"] == {"base": 4, "base and patch": 6}
    assert not out.exists()
    ran = run_ckpt(capsys, "apply", TEN, patch, "-o", out)
    assert ran.err == f"wrote {out}: safetensors, 10 tensors, 248.0 kB: 4 from base, 6 from base and patch\n"
    assert sha256(out) == sha256(Path(TUNED))
    assert run_ckpt(capsys, "apply", TEN, patch, "-o", out).code == 2


def test_a_plan_file_has_the_digests(folder: Path, tmp_path: Path) -> None:
    """A plan that is saved and loaded makes the same output, and refuses another base."""
    base, patch, out = folder / "base.safetensors", folder / "patch.safetensors", tmp_path / "out.safetensors"
    sources = {"base": base, "patch": patch}
    plan = ckptkit.plan_apply_delta(base, patch)
    ckptkit.save_plan(plan, tmp_path / "plan.json", sources)
    loaded = ckptkit.load_plan(tmp_path / "plan.json", sources)
    assert loaded.steps == plan.steps
    ckptkit.execute(loaded, sources, out)
    assert sha256(out) == sha256(folder / "new.safetensors")
    other = before()
    other["equal"][0] = 0
    with pytest.raises(PlanError, match="'equal' has other values"):
        loaded.materialize({"base": other, "patch": patch})


def test_a_quantised_weight_is_patched_bit_by_bit(tmp_path: Path) -> None:
    """Codes and scales are bytes for a patch, also where only one of them changed or has another shape."""
    base = {"q.weight": torch.ones(4, 4, dtype=torch.int8), "q.weight_scale": torch.ones(4, 1), "n": torch.ones(2)}
    new = {**base, "q.weight": torch.full((4, 4), 3, dtype=torch.int8), "q.weight_scale": torch.ones(4, 2)}
    ckptkit.make_delta(base, new, tmp_path / "patch")
    ckptkit.apply_delta(base, tmp_path / "patch", tmp_path / "out.safetensors")
    assert same_state(load_file(tmp_path / "out.safetensors"), new)


def test_a_chain_of_patches_leads_from_version_to_version(tmp_path: Path) -> None:
    versions = [state(seed) for seed in range(3)]
    for number in (1, 2):
        ckptkit.make_delta(versions[number - 1], versions[number], tmp_path / f"{number}")
    found: Any = versions[0]
    for number in (1, 2):
        out = tmp_path / f"v{number}.safetensors"
        ckptkit.apply_delta(found, tmp_path / f"{number}", out)
        found = out
    assert same_state(load_file(found), versions[2])
    with pytest.raises(PlanError, match=r"not the base of this patch: '.*' has other values"):
        ckptkit.apply_delta(versions[0], tmp_path / "2", tmp_path / "x.safetensors")


def test_a_patch_that_does_not_make_the_new_checkpoint_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a patch gets its name, it is read back and makes each tensor that it holds."""
    from ckptkit.deltas import making

    def wrong(checkpoint: ckptkit.Checkpoint) -> object:
        return replace(read_patch(checkpoint), metadata={"other": "x"})

    monkeypatch.setattr(making, "read_patch", wrong)
    with pytest.raises(OutputError, match="not written as planned, so the new file was deleted"):
        ckptkit.make_delta(TEN, TUNED, tmp_path / "patch")
    assert names_in(tmp_path) == []
