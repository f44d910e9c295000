"""git and Git LFS show checkpoints through ``ckpt git textconv``: real repositories, and a remote on this disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ckptkit
from tests.helpers_cli import ROOT

TEN = ROOT / "fixtures" / "lenet_10class.safetensors"
TUNED = ROOT / "fixtures" / "lenet_tuned.safetensors"
needs_lfs = pytest.mark.skipif(shutil.which("git-lfs") is None, reason="git-lfs is not installed")


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty home and configuration, so that nothing of this machine decides."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    git(tmp_path, "config", "--global", "user.name", "a")
    git(tmp_path, "config", "--global", "user.email", "a@example.org")
    git(tmp_path, "config", "--global", "protocol.file.allow", "always")


def git(folder: Path, *arguments: str, fails: bool = False) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) is fails, done.stderr
    return done.stdout


def ckpt(folder: Path, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-P", "-m", "ckptkit", "git", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def repository(folder: Path) -> Path:
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    return folder


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)


def changed(text: str, mark: str = "+") -> set[str]:
    """Return the names on the lines that a diff has added or removed."""
    lines = [line[1:] for line in text.splitlines() if line.startswith(mark) and not line.startswith(mark * 3)]
    return {line.partition("  ")[0] for line in lines}


def tensors_that_differ() -> set[str]:
    old, new = safetensors.torch.load_file(TEN), safetensors.torch.load_file(TUNED)
    return {key for key in old if not torch.equal(old[key], new[key])}


@pytest.mark.parametrize("name", ["model.safetensors", 'sub dir/it\'s "q".safetensors', "-x.safetensors", "ä\tb.pt"])
def test_every_view_of_git_names_the_changed_tensors(name: str, tmp_path: Path) -> None:
    """``diff``, ``log -p``, ``show`` and ``stash show -p --textconv`` name the tensors that torch tells apart."""
    folder = repository(tmp_path / "a repo")
    (folder / name).parent.mkdir(exist_ok=True)
    ckpt((folder / name).parent, "install")
    (folder / name).write_bytes(TEN.read_bytes())
    commit(folder, "one")
    (folder / name).write_bytes(TUNED.read_bytes())
    views = [git(folder, "diff")]
    git(folder, "add", "-A")
    views.append(git(folder, "diff", "--cached"))
    git(folder, "stash", "-q")
    views.append(git(folder, "stash", "show", "-p", "--textconv"))
    git(folder, "stash", "pop", "-q")
    commit(folder, "two")
    views += [git(folder, "show"), git(folder, "log", "-p", "-1"), git(folder, "diff", "HEAD~1", "HEAD")]
    assert tensors_that_differ()
    for view in views:
        assert changed(view) == changed(view, "-") == tensors_that_differ(), view
    assert "Bin 248792 -> 248792 bytes" in git(folder, "show", "--stat")


def test_added_removed_and_renamed_files_and_other_formats(tmp_path: Path) -> None:
    """A new file is all its tensors; a rename with a change is one diff; another format alone is one line."""
    folder = repository(tmp_path / "repo")
    ckpt(folder, "install")
    (folder / "a.safetensors").write_bytes(TEN.read_bytes())
    commit(folder, "one")
    names = set(safetensors.torch.load_file(TEN))
    assert changed(git(folder, "show", "--", "a.safetensors")) == {"format: safetensors", "metadata format", *names}
    git(folder, "mv", "a.safetensors", "b.safetensors")
    (folder / "b.safetensors").write_bytes(TUNED.read_bytes())
    commit(folder, "two")
    moved = git(folder, "show", "-M10%", "--", "a.safetensors", "b.safetensors")
    assert "rename to b.safetensors" in moved
    assert changed(moved) == tensors_that_differ()
    git(folder, "rm", "-q", "b.safetensors")
    torch.save(safetensors.torch.load_file(TUNED), folder / "b.pt")
    commit(folder, "three")
    between = git(folder, "diff", "HEAD~1:b.safetensors", "HEAD:b.pt")
    assert changed(between) == {"format: torch-zip"}
    assert changed(between, "-") == {"format: safetensors", "metadata format"}


def test_git_keeps_the_texts_and_install_forgets_them(tmp_path: Path) -> None:
    """With the cache, git asks for the text of a blob once; ``install`` removes what it kept."""
    folder = repository(tmp_path / "repo")
    ckpt(folder, "install")
    for source in (TEN, TUNED):
        (folder / "a.safetensors").write_bytes(source.read_bytes())
        commit(folder, "more")
    first = git(folder, "show")
    settings = git(folder, "config", "--get", "diff.ckpt.textconv")
    assert git(folder, "notes", "--ref", "refs/notes/textconv/ckpt", "list")
    assert git(folder, "show") == first
    assert "forgot the texts" in ckpt(folder, "install")
    assert git(folder, "for-each-ref", "refs/notes") == ""
    assert git(folder, "config", "--get", "diff.ckpt.textconv") == settings


def test_a_diff_never_fails(tmp_path: Path) -> None:
    """Files that are no checkpoints, damaged, empty or hostile are described, and nothing of them runs."""
    folder = repository(tmp_path / "repo")
    ckpt(folder, "install")
    (folder / "ckptkit.py").write_text("raise SystemExit('the code of the repository ran')", encoding="ascii")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="ascii")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, with another class in each version
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.pt")
    contents = {
        "random.bin": os.urandom(2000),
        "empty.pt": b"",
        "short.ckpt": b"\x80",
        "cut.safetensors": TEN.read_bytes()[:9000],
        "text.bin": b"hello\n",
        "py:evil:run.pt": b"cposix\nsystem\n(S'touch ran'\ntR.",
        "reduce.pth": b"\x80\x02cposix\nsystem\nX\x09\x00\x00\x00touch ran\x85R.",
        "new.gguf": b"GGUF\xff\0\0\0" + b"\0" * 50,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    commit(folder, "one")
    for name, content in contents.items():
        (folder / name).write_bytes(content + b"\0more")
    (folder / "empty.pt").unlink()
    (folder / "empty.pt").symlink_to("elsewhere.pt")
    shown = git(folder, "diff")
    for name in contents:
        assert name in shown
    assert "+not read: unknown format" in git(folder, "show", "--", "random.bin")
    assert git(folder, "show") == git(folder, "show", "--no-ext-diff")
    assert not (tmp_path / "ran").exists()
    assert not (folder / "ran").exists()


def test_names_of_tensors_cannot_make_lines(tmp_path: Path) -> None:
    """A name with line ends and escape sequences is one line, and reaches no terminal as it is."""
    folder = repository(tmp_path / "repo")
    ckpt(folder, "install")
    names = {"a\n+forged  F32 [1]  0000": 1.0, "\x1b]0;title\x07": 2.0, "diff --git a/x b/x": 3.0, "\u202ex": 4.0}
    safetensors.torch.save_file(
        {key: torch.full((2,), number) for key, number in names.items()}, folder / "a.safetensors"
    )
    commit(folder, "one")
    safetensors.torch.save_file({key: torch.zeros(2) for key in names}, folder / "a.safetensors")
    shown = git(folder, "diff")
    assert len([line for line in shown.splitlines() if line.startswith("+") and not line.startswith("+++")]) == 4
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


def test_places_to_install(tmp_path: Path) -> None:
    """It works in linked working trees, submodules and subfolders, for all repositories, and in none outside of one."""
    outside = tmp_path / "outside"
    outside.mkdir()
    assert ckpt(outside, "install", code=2).splitlines() == [
        "ckpt: the current directory is not in a git repository with a working tree",
        "hint: --global is for all repositories of this user",
    ]
    inner = repository(tmp_path / "inner")
    (inner / "m.safetensors").write_bytes(TEN.read_bytes())
    commit(inner, "one")
    outer = repository(tmp_path / "outer")
    git(outer, "submodule", "add", "-q", str(inner), "models")
    commit(outer, "one")
    ckpt(outer / "models", "install")
    assert (outer / "models" / ".gitattributes").exists()
    assert not (outer / ".gitattributes").exists()
    (outer / "models" / "m.safetensors").write_bytes(TUNED.read_bytes())
    assert changed(git(outer / "models", "diff", "--", "m.safetensors")) == tensors_that_differ()
    git(inner, "worktree", "add", "-q", str(tmp_path / "linked"))
    ckpt(tmp_path / "linked", "install")
    (tmp_path / "linked" / "m.safetensors").write_bytes(TUNED.read_bytes())
    assert changed(git(tmp_path / "linked", "diff", "--", "m.safetensors")) == tensors_that_differ()
    other = repository(tmp_path / "other")
    assert "--global" in ckpt(outside, "install", "--global")
    (other / "m.safetensors").write_bytes(TEN.read_bytes())
    commit(other, "one")
    (other / "m.safetensors").write_bytes(TUNED.read_bytes())
    assert changed(git(other, "diff")) == tensors_that_differ()
    dry = ckpt(outside, "uninstall", "--global", "--dry-run")
    assert ckpt(outside, "uninstall", "--global") == dry.removeprefix("dry run: nothing was changed\n\n")
    assert "Binary files" in git(other, "diff")


def test_what_decides_otherwise_is_named(tmp_path: Path) -> None:
    """A line below, and one of another pattern, is overruled; a line of a deeper folder is named."""
    folder = repository(tmp_path / "repo")
    (folder / "deep").mkdir()
    (folder / "deep" / ".gitattributes").write_text("*.pt diff=lfs\n", encoding="ascii")
    for other in ("*.p* -diff\n", "models/** diff=lfs\n"):
        (folder / ".gitattributes").write_text(f"*.pt diff=ckpt\n{other}", encoding="ascii")
        (folder / "models").mkdir(exist_ok=True)
        for name in ("a.pt", "deep/b.pt", "models/c.pt"):
            torch.save({"w": torch.ones(2)}, folder / name)
        git(folder, "add", "-A")
        said = ckpt(folder, "install", "*.pt")
        assert "moved to the end *.pt diff=ckpt" in said
        assert (folder / ".gitattributes").read_text(encoding="ascii") == f"{other}*.pt diff=ckpt\n"
        assert "1 file still has diff=lfs: 'deep/b.pt'" in said
        assert ckpt(folder, "install", "*.pt", "-q") == "nothing to change\n"


@pytest.mark.parametrize("pattern", ["a b.pt", 'q"q.pt', "#x.pt", "deep/*.pt", "/top.pt", "**/x.pt"])
def test_patterns_are_those_of_git(pattern: str, tmp_path: Path) -> None:
    """git finds the driver for the files of a pattern as it was given, and a second time nothing is to be done."""
    folder = repository(tmp_path / "repo")
    name = pattern.replace("**", "some").replace("*", "some").lstrip("/")
    ckpt(folder, "install", "--", pattern)
    assert git(folder, "check-attr", "-z", "diff", "--", name).split("\0")[2] == "ckpt"
    assert ckpt(folder, "install", "--", pattern) == "nothing to change\n"
    ckpt(folder, "uninstall")
    assert git(folder, "check-attr", "-z", "diff", "--", name).split("\0")[2] == "unspecified"


def test_frozen_compares_the_revisions_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base is anything that git takes for a revision; what is compared is what pre-commit names, whatever is here."""
    folder = repository(tmp_path / "repo")
    (folder / "m").mkdir()
    for source, branch in ((TEN, "old"), (TUNED, "new")):
        git(folder, "checkout", "-q", "-b", branch)
        (folder / "m" / "a.safetensors").write_bytes(source.read_bytes())
        commit(folder, branch)
    options = ("--expect-frozen", "fc*")
    for base in ("old", "HEAD~1", "old:m/a.safetensors", "HEAD^{/ol:?d}"):
        assert "6 of 6 tensors are not" in ckpt(folder, "frozen", "m/a.safetensors", *options, "--base", base, code=1)
    assert "the same file" in ckpt(folder, "frozen", "m/a.safetensors", *options, "--base", "HEAD@{2099-01-01 10:00}")
    for base in ("old:m", "old:", "nothing", "-x"):
        said = ckpt(folder, "frozen", "m/a.safetensors", *options, "--base", base, code=2)
        assert f"ckpt: '{base}' is not a revision, or a file of one" in said
    git(folder, "checkout", "-q", "old")
    monkeypatch.setenv("PRE_COMMIT_FROM_REF", "old")
    monkeypatch.setenv("PRE_COMMIT_TO_REF", "new")
    assert "6 of 6 tensors are not" in ckpt(folder / "m", "frozen", "a.safetensors", *options, code=1)
    monkeypatch.delenv("PRE_COMMIT_FROM_REF")
    monkeypatch.delenv("PRE_COMMIT_TO_REF")
    git(folder, "checkout", "-q", "--orphan", "fresh")
    assert "nothing was compared" in ckpt(folder, "frozen", "m/a.safetensors", *options)


def test_frozen_takes_a_mapping_of_a_training_checkpoint(tmp_path: Path) -> None:
    """``FILE::KEY`` does what the error about several mappings proposes, also where the file is not here any more."""
    folder = repository(tmp_path / "repo")
    for number in (1.0, 2.0):
        both = {"model": {"a": torch.full((2,), number), "b": torch.ones(2)}, "ema": {"a": torch.ones(2)}}
        torch.save(both, folder / "run.pt")
        commit(folder, str(number))
    options = ("--base", "HEAD~1", "--expect-frozen", "a")
    said = ckpt(folder, "frozen", "run.pt", *options, code=2)
    assert "select one by adding '::model', '::ema' to the path" in said
    (folder / "run.pt").unlink()
    assert "1 of 1 tensor is not frozen" in ckpt(folder, "frozen", "run.pt::model", *options, code=1)
    assert "run.pt at ::ema: no findings; 1 tensor that" in ckpt(folder, "frozen", "run.pt::ema", *options)
    assert "error: HEAD~1:run.pt: holds nothing at" in ckpt(folder, "frozen", "run.pt::nothing", *options, code=2)
    assert "is not staged" in ckpt(folder, "frozen", "no.pt::model", *options, code=2)


@needs_lfs
def test_lfs(tmp_path: Path) -> None:
    """Below ``git lfs track``, a diff shows tensors: of files, and of pointers whose objects are here, wherever."""
    remote = tmp_path / "remote.git"
    git(tmp_path, "init", "-q", "--bare", "-b", "main", str(remote))
    folder = repository(tmp_path / "repo")
    git(folder, "lfs", "install", "--local")
    ckpt(folder, "install")
    git(folder, "lfs", "track", "*.safetensors")
    git(folder, "remote", "add", "origin", f"file://{remote}")
    for source in (TEN, TUNED):
        (folder / "m.safetensors").write_bytes(source.read_bytes())
        commit(folder, "more")
    assert "oid sha256" in git(folder, "show", "HEAD:m.safetensors")
    assert "oid sha256" in git(folder, "show")  # diff=lfs of the later line
    assert "added *.safetensors diff=ckpt" in ckpt(folder, "install")  # git lfs track has replaced the line
    assert changed(git(folder, "show")) == tensors_that_differ()
    for pattern, code in (("conv*", 0), ("fc*", 1)):
        ckpt(folder, "frozen", "m.safetensors", "--expect-frozen", pattern, "--base", "HEAD~1", code=code)
    ckpt(folder, "uninstall")
    git(folder, "checkout", "-q", ".")
    ckpt(folder, "install")
    commit(folder, "attributes")
    git(folder, "push", "-q", "-u", "origin", "main")

    skipped = {**os.environ, "GIT_LFS_SKIP_SMUDGE": "1"}
    clone = tmp_path / "clone"
    command = ["git", "clone", "-q", f"file://{remote}", str(clone)]
    subprocess.run(command, env=skipped, check=True, capture_output=True)
    git(clone, "lfs", "install", "--local", "--skip-smudge")
    ckpt(clone, "install")
    assert (clone / "m.safetensors").stat().st_size < 200
    pointers = git(clone, "diff", "HEAD~2", "HEAD~1", "--", "m.safetensors")
    sums = [ckptkit_sha(path) for path in (TEN, TUNED)]
    assert f"-Git LFS object: 248,792 bytes, sha256 {sums[0]}" in pointers
    assert f"+Git LFS object: 248,792 bytes, sha256 {sums[1]}" in pointers
    assert "git lfs fetch" in pointers
    missing = ckpt(clone, "frozen", "m.safetensors", "--expect-frozen", "*", "--base", "HEAD~2", code=2)
    assert "the Git LFS object is not in this repository" in missing
    git(clone, "lfs", "fetch", "--all")
    ckpt(clone, "install")  # forgets the texts of objects that were not here
    assert changed(git(clone, "diff", "HEAD~2", "HEAD~1", "--", "m.safetensors")) == tensors_that_differ()
    git(clone, "worktree", "add", "-q", str(tmp_path / "linked"), "HEAD~1", "--detach")
    ckpt(tmp_path / "linked", "install")
    shown = git(tmp_path / "linked", "diff", "HEAD~1", "HEAD", "--", "m.safetensors")
    assert changed(shown) == tensors_that_differ()
    shutil.move(clone / ".git" / "lfs", tmp_path / "elsewhere")
    git(clone, "config", "lfs.storage", str(tmp_path / "elsewhere"))
    ckpt(clone, "install")
    assert changed(git(clone, "diff", "HEAD~2", "HEAD~1", "--", "m.safetensors")) == tensors_that_differ()


def ckptkit_sha(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_digests_are_those_of_ckpt_digest(tmp_path: Path) -> None:
    """The line of a tensor has the start of what ``ckpt digest`` prints for it, in every format."""
    torch.save(safetensors.torch.load_file(TEN), tmp_path / "a.pt")
    expected = [f"{key}  {one.info}  {one.digest[7:23]}" for key, one in ckptkit.digest(TEN).tensors.items()]
    for path in (TEN, tmp_path / "a.pt"):
        lines = ckpt(tmp_path, "textconv", str(path)).splitlines()
        assert [line for line in lines if line.partition("  ")[0] in ckptkit.digest(TEN).tensors] == expected
