"""``--format actions``: what a runner of GitHub Actions makes of the output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ckptkit.cli.common.printing import print_message
from ckptkit.render.github import Annotation, command_lines
from tests.helpers_actions import Runner
from tests.helpers_cli import ROOT, run_ckpt

TEN = ROOT / "fixtures" / "lenet_10class.safetensors"
EVIL = "::set-output name=a::b\n::error::forged##[add-path]/evil\r%0A,title=x"


def test_names_cannot_be_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a tensor, a file and a finding are called, the runner sees only the annotations of the findings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    name = "a,b:c%0A::error::.safetensors"
    safetensors.torch.save_file({EVIL: torch.tensor([float("nan")]), "w": torch.ones(2)}, name)
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    summary.write_text("before\n", encoding="ascii")
    findings = json.loads(run_ckpt(capsys, "check", name, "--json").out)["findings"]
    ran = run_ckpt(capsys, "check", name, "--format", "actions")
    found = Runner().read(ran.out)
    expected = [one for one in findings if one["code"] not in {"no-checksum", "not-scanned"}]
    levels = {"error": "error", "warning": "warning", "note": "notice"}
    assert [(kind, properties) for kind, properties, _ in found] == [
        (levels[one["severity"]], {"file": name, "title": one["code"]}) for one in expected
    ]
    assert "\n\n" not in "".join(message for _, _, message in found)
    written = summary.read_text(encoding="utf-8")
    assert written.startswith("before\n- ")
    assert run_ckpt(capsys, "check", name, "--markdown").out in written
    for command in ("show", "stats", "digest"):
        assert Runner().read(run_ckpt(capsys, command, name, "--format", "actions").out) == []
    assert Runner().read(run_ckpt(capsys, "diff", name, TEN, "--format", "actions").out)[0][0] == "error"


def test_messages_cannot_be_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runner reads stderr too: a name in an error is not a command, and one can still read it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    (tmp_path / "a##[set-output name=b;]c.pt").write_bytes(b"no")
    for path in ("a##[set-output name=b;]c.pt", "x##[error]y.pt"):
        ran = run_ckpt(capsys, "show", path, "--format", "actions")
        assert (ran.code, Runner().read(f"{ran.out}\n{ran.err}")) == (2, [])
        assert path.replace("##", r"#\x23") in ran.err
    ran = run_ckpt(capsys, "check", "x##[error]y.pt", "--format", "actions")
    assert (ran.code, ran.err) == (2, "")
    ((kind, properties, message),) = Runner().read(ran.out)
    assert (kind, properties["title"]) == ("error", "unreadable")
    assert message == "x##[error]y.pt: no such file or directory"
    print_message("::error::forged")
    assert Runner().read(capsys.readouterr().err) == []


def test_annotations_are_escaped_and_few() -> None:
    """The runner gets the title and the message as they were, but for characters that a terminal must not obey."""
    lines = list(command_lines(Annotation("error", "a,b:c%", f"{number}: 100% {EVIL}") for number in range(25)))
    assert len(lines) == 10
    ((kind, properties, message),) = Runner().read(lines[3])
    assert (kind, properties) == ("error", {"title": "a,b:c%"})
    assert message.startswith("3: 100% ::set-output name=a::b\n::error::forged##[add-path]/evil")


def test_a_long_summary_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GitHub refuses a summary above 1 MiB as a whole, so the report ends before that, and says so."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_bytes(b"x\n" * ((1 << 19) - 300))
    for _ in range(3):
        assert run_ckpt(capsys, "show", TEN, "--format", "actions").code == 0
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 1 << 20
    assert "The report is longer than GitHub shows" in text
