"""The action of this repository: its step runs in bash, as a runner of GitHub Actions runs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ruamel.yaml

from tests.helpers_actions import Runner
from tests.helpers_cli import ROOT, put_on_path

ACTION = ROOT / ".github" / "actions" / "check"
TEN = ROOT / "fixtures" / "lenet_10class.safetensors"


def step(action: Any, inputs: Mapping[str, str], folder: Path) -> tuple[int, str, Mapping[str, str]]:
    """Run the last step of the action as a runner does; return its exit code, its output, and its own outputs."""
    values = {**{name: one.get("default", "") for name, one in action["inputs"].items()}, **inputs}
    environment = {name: values[text[11:-3]] for name, text in action["runs"]["steps"][-1]["env"].items()}
    variables = {"GITHUB_ACTION_PATH": str(ACTION), "GITHUB_WORKSPACE": str(folder)}
    for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
        variables[name] = str(folder.parent / name)
        Path(variables[name]).write_text("", encoding="ascii")
    (folder.parent / "script.sh").write_text(action["runs"]["steps"][-1]["run"], encoding="utf-8")
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", folder.parent / "script.sh"],
        cwd=folder, env={**os.environ, **environment, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    outputs = Path(variables["GITHUB_OUTPUT"]).read_text(encoding="utf-8").splitlines()
    return done.returncode, done.stdout + done.stderr, dict(line.split("=") for line in outputs)


def test_the_action_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step expands patterns, reports findings, and turns trouble into an annotation; inputs run no commands."""
    action = ruamel.yaml.YAML(typ="safe").load(ACTION / "action.yml")
    folder = tmp_path / "work"
    (folder / "a" / "b").mkdir(parents=True)
    put_on_path(tmp_path / "bin", monkeypatch)
    (folder / "a" / "b" / "x y.safetensors").write_bytes(TEN.read_bytes())
    (folder / "bad.safetensors").write_bytes(TEN.read_bytes()[:3000])
    code, out, outputs = step(action, {"paths": "**/*.safetensors\n", "args": "--fast"}, folder)
    ((kind, properties, message),) = Runner().read(out)
    assert (code, outputs) == (2, {"exit-code": "2"})
    assert (kind, properties) == ("error", {"file": "bad.safetensors", "title": "unreadable"})
    assert message.startswith("truncated: ")
    assert "`a/b/x y.safetensors`" in (tmp_path / "GITHUB_STEP_SUMMARY").read_text(encoding="utf-8")
    hostile = {"paths": "$(touch ran)\n`touch ran`; touch ran", "args": "'::set-output name=a::b' $(touch ran)"}
    code, out, outputs = step(action, hostile, folder)
    assert {(kind, properties["title"]) for kind, properties, _ in Runner().read(out)} == {("error", "unreadable")}
    assert (code, outputs, sorted(os.listdir(folder))) == (2, {"exit-code": "2"}, ["a", "bad.safetensors"])
    odd = folder / "a" / os.fsdecode(b"\xff##[error]\xc3\xa9.pt")
    odd.write_bytes(TEN.read_bytes())
    for encoding in ("utf-8:strict", "cp1252"):  # a terminal, and a pipe on Windows
        monkeypatch.setenv("PYTHONIOENCODING", encoding)
        code, out, outputs = step(action, {"command": "show", "paths": "a/*.pt"}, folder)
        assert (code, Runner().read(out), "udcff##[error]\xe9.pt" in out) == (0, [], True)
    monkeypatch.delenv("PYTHONIOENCODING")
    odd.unlink()
    code, out, outputs = step(action, {"command": "show", "paths": "100%.pt"}, folder)
    assert Runner().read(out) == [("error", {"title": "ckpt"}, "ckpt: 100%.pt: no such file or directory")]
    (folder / "groups.toml").write_text('[[group]]\nname = "head"\nparams = "fc3.*"\n', encoding="ascii")
    inputs = {"command": "groups validate", "paths": "*.toml", "args": "--model 'py:fixtures.lenet:build'"}
    code, out, outputs = step(action, inputs, folder)
    assert (code, outputs) == (1, {"exit-code": "1"})
    assert ("error", {"title": "groups.unowned"}) in [one[:2] for one in Runner().read(out)]
    inputs = {"command": "diff", "paths": f"{TEN}\n{ROOT}/fixtures/lenet_tuned.safetensors", "args": "--values"}
    assert step(action, inputs, folder)[::2] == (1, {"exit-code": "1"})
    assert step(action, {**inputs, "fail-on-findings": "false"}, folder)[::2] == (0, {"exit-code": "1"})
