"""``ckpt git``: what ``git diff`` shows of checkpoints, with the git of this machine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ckptkit
from ckptkit.cli.git.attributes import with_lines, without_lines
from ckptkit.formats.live import build_module
from ckptkit.inputs import opened_model
from tests.helpers_cli import ROOT, run_ckpt

TEN = ROOT / "fixtures" / "lenet_10class.safetensors"
TUNED = ROOT / "fixtures" / "lenet_tuned.safetensors"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new repository, which is the current directory, and an empty configuration of git."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (tmp_path / "repo").mkdir()
    monkeypatch.chdir(tmp_path / "repo")
    git("init", "-q")
    return tmp_path / "repo"


def git(*arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *who, *arguments], capture_output=True, text=True, check=True).stdout


def test_git_diff_names_the_tensors_that_changed(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After ``ckpt git install``, the lines that ``git diff`` has are exactly the tensors whose digests differ."""
    installed = run_ckpt(capsys, "git", "install")
    assert (installed.code, installed.out.count(".gitattributes: added *.")) == (0, 6)
    (repository / "model.safetensors").write_bytes(TEN.read_bytes())
    git("add", "-A")
    (repository / "model.safetensors").write_bytes(TUNED.read_bytes())
    shown = git("diff").splitlines()
    old, new = ckptkit.digest(TEN).tensors, ckptkit.digest(TUNED).tensors
    changed = [key for key in old if old[key].digest != new[key].digest]
    assert changed
    for mark, side in (("-", old), ("+", new)):
        lines = [line[1:] for line in shown if line.startswith(mark) and not line.startswith(mark * 3)]
        assert lines == [f"{key}  {side[key].info}  {side[key].digest.removeprefix('sha256:')[:16]}" for key in changed]
    before = (repository / ".gitattributes").read_bytes()
    run_ckpt(capsys, "git", "install", "-q")
    assert (repository / ".gitattributes").read_bytes() == before
    undone = run_ckpt(capsys, "git", "uninstall", "--json")
    assert (undone.code, (repository / ".gitattributes").exists()) == (0, False)
    assert "Binary files" in git("diff")


def test_text_for_git_has_one_line_for_each_thing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names cannot make another line; every mapping of a training checkpoint is there; each value is on its line."""
    names = {"a\nb": torch.ones(2), "\x1b[2J::x": torch.zeros(2), "h.10": torch.ones(1), "h.9": torch.ones(1)}
    safetensors.torch.save_file(names, tmp_path / "odd.safetensors", {"note": "two\nlines" * 100})
    lines = run_ckpt(capsys, "git", "textconv", tmp_path / "odd.safetensors").out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "format: safetensors", "\\x1b[2J::x", "a\\x0ab", "h.9", "h.10", "metadata note",
    ]  # fmt: skip
    both = {"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}, "epoch": 3}
    torch.save({**both, "other": both["model"]}, tmp_path / "run.pt")
    lines = run_ckpt(capsys, "git", "textconv", tmp_path / "run.pt").out.splitlines()
    assert [line.partition("  ")[0] for line in lines[1:]] == ["ema.w", "model.w", "other.w", "epoch"]
    assert lines[-1] == "epoch  int  3"


def test_frozen_compares_what_is_staged(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The staged version is compared, not the file; a new file has nothing to compare with, and the report says so."""
    for name in ("a.safetensors", "b.safetensors"):
        (repository / name).write_bytes(TEN.read_bytes())
    git("add", "-A")
    new = run_ckpt(capsys, "git", "frozen", "a.safetensors", "--expect-frozen", "fc*")
    assert (new.code, "HEAD does not have this file, so nothing was compared" in new.out) == (0, True)
    git("commit", "-qm", "one")
    (repository / "a.safetensors").write_bytes(TUNED.read_bytes())
    same = run_ckpt(capsys, "git", "frozen", "a.safetensors", "--expect-frozen", "fc*")
    assert (same.code, "HEAD has the same file" in same.out) == (0, True)
    git("add", "-A")
    files = ("a.safetensors", "b.safetensors")
    kept = run_ckpt(capsys, "git", "frozen", *files, "--expect-frozen", "conv*")
    assert kept.out.startswith("a.safetensors: no findings; 4 tensors that match 'conv*' are equal to HEAD\n")
    broken = run_ckpt(capsys, "git", "frozen", *files, "--expect-frozen", "conv*", "--expect-frozen", "fc*", "--json")
    (error,) = [one for one in json.loads(broken.out)["findings"] if one["severity"] == "error"]
    assert (kept.code, broken.code, error["code"]) == (0, 1, "git.frozen")
    assert error["message"].startswith("a.safetensors: --expect-frozen 'fc*': 6 of 6 tensors are not frozen")
    wrong = run_ckpt(capsys, "git", "frozen", *files, "--expect-frozen", "cnv*")
    assert (wrong.code, wrong.out, "matches none of 10 keys" in wrong.err) == (2, "", True)


@pytest.mark.parametrize("content", [b"", b"\0\1\2" * 50, b"version https://git-lfs", TEN.read_bytes()[:5000]])
def test_text_for_git_of_anything_else_is_stable(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that cannot be read is described by its content alone, with exit code 0, so ``git diff`` goes on."""
    texts = set()
    for name in ("a.bin", "py:os:getcwd", "-b.pt"):
        (tmp_path / name).write_bytes(content)
        ran = run_ckpt(capsys, "git", "textconv", "--", tmp_path / name)
        assert (ran.code, ran.err) == (0, "")
        texts.add(ran.out)
    os.mkfifo(tmp_path / "pipe.bin")
    assert run_ckpt(capsys, "git", "textconv", tmp_path / "pipe.bin").code == 2
    assert len(texts) == 1
    assert f"{len(content)} bytes" in texts.pop().replace(",", "")


def test_a_file_is_never_taken_for_a_live_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file named as ``py:module:callable`` is a file: listing a folder of other people runs none of their code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("evil.py").write_text("raise SystemExit('ran')", encoding="ascii")
    Path("py:evil:run").write_bytes(TEN.read_bytes())
    with ckptkit.open_checkpoint("py:evil:run") as checkpoint:
        assert (checkpoint.format, len(checkpoint)) == ("safetensors", 10)
    assert ckptkit.diff("py:evil:run", TEN).ok
    with opened_model("py:evil:run") as model:
        assert not isinstance(model, torch.nn.Module)
    torch.save(
        {"model": {"w": torch.ones(2)}, "optimizer": torch.optim.SGD([torch.ones(2)], lr=0.1).state_dict()},
        "py:evil:run.pt",
    )
    with ckptkit.open_checkpoint("py:evil:run.pt::model") as checkpoint:
        assert list(checkpoint) == ["w"]
    with ckptkit.open_optimizer("py:evil:run.pt") as state:
        assert state.envelope == "optimizer"
    with pytest.raises(ckptkit.ModelError, match="is a file"):
        build_module("py:evil:run")
    Path("py:evil:gone").symlink_to("nowhere")
    with pytest.raises(ckptkit.PathError):
        ckptkit.open_checkpoint("py:evil:gone")


@pytest.mark.parametrize("pattern", ["", "a\n*", "!*.pt"])
def test_what_is_not_a_pattern_is_refused(pattern: str, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that git would not take, or would read as another, is not written."""
    assert run_ckpt(capsys, "git", "install", pattern).code == 2
    assert os.listdir(repository) == [".git"]


LFS = "*.pt filter=lfs diff=lfs merge=lfs -text"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "*.pt diff=ckpt\n"),
        ("*.txt text", "*.txt text\n*.pt diff=ckpt\n"),
        (f"{LFS}\r\n", f"{LFS}\r\n*.pt diff=ckpt\r\n"),
        ("# *.pt diff=ckpt\n", "# *.pt diff=ckpt\n*.pt diff=ckpt\n"),
        (f"*.pt diff=ckpt\n{LFS}\n*.x -text\n", f"{LFS}\n*.x -text\n*.pt diff=ckpt\n"),
        (f"{LFS}\n*.pt diff=ckpt -text\n", f"{LFS}\n*.pt diff=ckpt -text\n"),
        ("*.pt diff=ckpt\n*.pt binary\n", "*.pt binary\n*.pt diff=ckpt\n"),
        ("\udcff x\n", "\udcff x\n*.pt diff=ckpt\n"),
        ("a b\r\n*.pt diff=ckpt\nc d", "a b\r\n*.pt diff=ckpt\nc d"),
        ("a b\r\n*.pt -diff\nc d", "a b\r\n*.pt -diff\nc d\r\n*.pt diff=ckpt\r\n"),
    ],
)
def test_lines_of_attributes(before: str, after: str) -> None:
    """Other lines stay as they are; a line is there once, below those that say otherwise; twice changes nothing."""
    text, added, moved = with_lines(before, ["*.pt"], ())
    assert (text, len(added) + len(moved)) == (after, int(before != after))
    assert with_lines(text, ["*.pt"], ()) == (after, [], [])
    assert "*.pt diff=ckpt\n" not in without_lines(text)[0].replace("# *.pt diff=ckpt\n", "")


def test_install_writes_to_no_other_file_and_over_no_other_driver(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The .gitattributes of a cloned repository may be a link to any file; another driver of that name stays."""
    outside = repository.parent / "outside"
    outside.write_text("mine\n", encoding="ascii")
    (repository / ".gitattributes").symlink_to(outside)
    for command in ("install", "uninstall"):
        ran = run_ckpt(capsys, "git", command)
        assert (ran.code, "is a link" in ran.err, outside.read_text(encoding="ascii")) == (2, True, "mine\n")
    (repository / ".gitattributes").unlink()
    git("config", "diff.ckpt.textconv", "mine")
    git("config", "diff.ckpt.binary", "true")
    before = (repository / ".git" / "config").read_bytes()
    assert run_ckpt(capsys, "git", "install").code == 2
    assert "left as it is: diff.ckpt.textconv = mine" in run_ckpt(capsys, "git", "uninstall").err
    assert (os.listdir(repository), (repository / ".git" / "config").read_bytes()) == ([".git"], before)
    git("config", "--unset", "diff.ckpt.textconv")
    before = (repository / ".git" / "config").read_bytes()
    for command in ("install", "uninstall"):
        assert run_ckpt(capsys, "git", command).code == 0
    assert (os.listdir(repository), (repository / ".git" / "config").read_bytes()) == ([".git"], before)
