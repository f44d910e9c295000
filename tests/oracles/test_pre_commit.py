"""The hooks of this repository, run by pre-commit: they pass on good files, and fail with the findings on bad ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers_cli import ROOT, put_on_path

pytest.importorskip("pre_commit")

TEN = ROOT / "fixtures" / "lenet_10class.safetensors"
TUNED = ROOT / "fixtures" / "lenet_tuned.safetensors"
HOOKS = """\
repos:
- repo: {repository}
  rev: {revision}
  hooks:
  - id: ckpt-check
  - id: ckpt-groups-validate
    args: [--model, "py:lenet:build", groups.toml]
  - id: ckpt-diff-expect-frozen
    args: [--expect-frozen, "fc*"]
"""


def run(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def pre_commit(folder: Path, *arguments: str, code: int = 0) -> dict[str, str]:
    """Run the hooks; return what pre-commit says of each, with what the hook printed."""
    out = run(folder, sys.executable, "-m", "pre_commit", "run", *arguments, code=code)
    names = {
        "ckpt-check": "check checkpoints",
        "ckpt-groups-validate": "validate param groups",
        "ckpt-diff-expect-frozen": "check that frozen tensors do not change",
    }
    starts = sorted((out.index(f"{name}."), hook) for hook, name in names.items() if f"{name}." in out)
    ends = [at for at, _ in starts[1:]] + [len(out)]
    return {hook: out[at:end] for (at, hook), end in zip(starts, ends, strict=True)}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that uses the three hooks, with a model, a spec and a checkpoint."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "PRE_COMMIT"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for setting in ("user.name", "user.email"):
        run(tmp_path, "git", "config", "--global", setting, "a@example.org")
    put_on_path(tmp_path / "bin", monkeypatch)
    hooks = tmp_path / "hooks"  # the file alone, as it is in the working tree
    hooks.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    folder = tmp_path / "project"
    folder.mkdir()
    for repository in (hooks, folder):
        run(repository, "git", "init", "-q", "-b", "main")
    run(hooks, "git", "add", "-A")
    run(hooks, "git", "commit", "-qm", "hooks")
    revision = run(hooks, "git", "rev-parse", "HEAD").strip()
    config = HOOKS.format(repository=hooks, revision=revision)
    (folder / ".pre-commit-config.yaml").write_text(config, encoding="utf-8")
    for name in ("lenet.py", "groups.toml"):
        shutil.copy(ROOT / "fixtures" / name, folder)
    (folder / "sub dir").mkdir()
    shutil.copy(TEN, folder / "sub dir" / "model.safetensors")
    run(folder, "git", "add", "-A")
    return folder


def test_hooks_pass_and_fail(project: Path) -> None:
    """Good files pass; a damaged file, a spec with a gap and a changed frozen tensor fail, each with its finding."""
    assert {hook: "Passed" in said for hook, said in pre_commit(project).items()} == {
        "ckpt-check": True, "ckpt-groups-validate": True, "ckpt-diff-expect-frozen": True,
    }  # fmt: skip
    run(project, "git", "commit", "-qm", "one")
    shutil.copy(TUNED, project / "sub dir" / "model.safetensors")
    (project / "cut.ckpt").write_bytes(TEN.read_bytes()[:9000])
    (project / "firmware.bin").write_bytes(b"\1" * 100)  # not named as a file of weights
    spec = (project / "groups.toml").read_text(encoding="utf-8")
    (project / "groups.toml").write_text(spec.replace("rest = true", 'params = "conv1.*"'), encoding="utf-8")
    run(project, "git", "add", "-A")
    said = pre_commit(project, code=1)
    assert "error: truncated" in said["ckpt-check"]
    assert "[groups.unowned]" in said["ckpt-groups-validate"]
    assert "6 of 6 tensors are not frozen" in said["ckpt-diff-expect-frozen"]
    assert "firmware" not in "".join(said.values())


def test_frozen_compares_revisions_where_pre_commit_does(project: Path) -> None:
    """With ``--from-ref``, as in CI, a finished commit is compared with the first revision, and not with itself."""
    run(project, "git", "commit", "-qm", "one")
    shutil.copy(TUNED, project / "sub dir" / "model.safetensors")
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "two")
    refs = ("--from-ref", "HEAD~1", "--to-ref", "HEAD")
    assert "Failed" in pre_commit(project, *refs, code=1)["ckpt-diff-expect-frozen"]
    assert "Passed" in pre_commit(project, "--all-files")["ckpt-diff-expect-frozen"]
    run(project, "git", "checkout", "-qb", "other", "HEAD~1")  # as before a push of a branch that is not checked out
    refs = ("--from-ref", "other", "--to-ref", "main")
    assert "Failed" in pre_commit(project, *refs, code=1)["ckpt-diff-expect-frozen"]


def test_only_the_staged_content_counts(project: Path) -> None:
    """A change that is not staged is not in the commit, so it does not count."""
    run(project, "git", "commit", "-qm", "one")
    (project / "sub dir" / "model.safetensors").write_bytes(b"half written")
    (project / "lenet.py").write_text((project / "lenet.py").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    run(project, "git", "add", "lenet.py")
    assert all("Passed" in said or "Skipped" in said for said in pre_commit(project).values())


def test_the_name_of_a_file_is_never_an_option(project: Path) -> None:
    """A file that is called as an option, which another person may have added, is left out, and runs no code."""
    (project / "evil.py").write_text("open('ran', 'w')", encoding="ascii")
    for name in (
        "--like=py:evil:run.safetensors",
        "--base=v1.safetensors",
        "-x.safetensors",
        "py:evil:run.safetensors",
    ):
        shutil.copy(TEN, project / name)
    run(project, "git", "add", "-A")
    assert "py:evil:run.safetensors: no findings" in pre_commit(project, "--verbose")["ckpt-check"]
    assert not (project / "ran").exists()


def test_a_hook_can_have_its_own_environment(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``language: python`` in the config of the user, pre-commit installs this repository, and the hook works."""
    revision = run(ROOT, "git", "rev-parse", "HEAD").strip()
    config = HOOKS.format(repository=ROOT, revision=revision).partition("  - id: ckpt-groups")[0]
    text = f"{config.rstrip()}\n    language: python\n    args: [--fast]\n"
    (project / ".pre-commit-config.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PIP_CONSTRAINT", str(ROOT / "constraints.txt"))
    monkeypatch.delenv("PYTHONPATH")
    (project / "cut.ckpt").write_bytes(TEN.read_bytes()[:9000])
    run(project, "git", "add", "-A")
    said = pre_commit(project, code=1)["ckpt-check"]
    assert "error: truncated" in said
    assert "sub dir/model.safetensors: no findings" in said
