"""What a shell completes, asked as each shell asks, and in a real bash."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from ckptkit.param_groups.presets import param_group_preset_names
from tests.helpers_cli import ROOT, run_ckpt

TEN, DDP = "fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt"
MODULES = ["conv1.*", "conv2.*", "fc1.*", "fc2.*", "fc3.*"]
# bash cuts a word at colons and equals signs. The lines are enough to see that words are put together again.
IN_BASH: Mapping[str, list[str]] = {
    "ckpt conv": ["convert"],
    f"ckpt remap --drop fc1.* {TEN} --keep conv1.": ["conv1.weight", "conv1.bias"],
    f"ckpt show {DDP}::model --drop module.fc": ["module.fc1.*", "module.fc2.*", "module.fc3.*"],
    f"ckpt diff {TEN} {DDP} --rename module.fc3.bias=fc3.": ["fc3.weight", "fc3.bias"],
    f"ckpt diff 'py:fixtures.lenet:build(num_classes=4)' {TEN} --keep fc3.b": ["fc3.bias"],
    "ckpt remap x --rules preset:vit-": ["vit-hf-to-timm", "vit-timm-to-hf"],
}
LINES: Mapping[str, list[str]] = {
    "ckpt groups e": ["emit", "explain"],
    f"ckpt remap {TEN} --keep ": MODULES,
    f"ckpt merge {TEN} nowhere.pt {DDP} --keep module.fc3.w": ["module.fc3.weight"],
    f"ckpt diff {TEN} {DDP} --rename module.fc3.": ["module.fc3.weight=", "module.fc3.bias="],
    f"ckpt diff {TEN} {DDP} --expect-frozen fc3.": ["fc3.weight", "fc3.bias"],
    f"ckpt diff py:fixtures.lenet:build {TEN} --require fc3.": ["fc3.weight", "fc3.bias"],
    f"ckpt preflight --init {TEN} --fresh fc3": ["fc3.*", "fc3.weight", "fc3.bias"],
    f"ckpt merge {TEN} {DDP} --on-mismatch fc3": ["fc3.*=", "fc3.weight=", "fc3.bias="],
    f"ckpt merge {TEN} {DDP} --on-mismatch fc3.*=s": ["fc3.*=skip", "fc3.*=slice"],
    "ckpt merge --method bread": ["breadcrumbs", "breadcrumbs_ties"],
    f"ckpt merge x={TEN} {DDP} --method ties --base ": ["x", "lenet_ddp"],
    f"ckpt merge {TEN} {DDP} --method ties --weight lenet_1": ["lenet_10class="],
    f"ckpt merge {TEN} {DDP} --method ties --param e": ["elect="],
    f"ckpt merge {TEN} x={DDP} --method ties --param x.": ["x.weight=", "x.density="],
    f"ckpt merge {TEN} {DDP} --method ties --param elect=": ["elect=weighted", "elect=plain", "elect=count"],
    f"ckpt merge {TEN} {DDP} --param ": [],
    "ckpt show nowhere.pt --keep ": [],
    "ckpt diff py:fixtures.nowhere:build nowhere.pt --keep ": [],
    "ckpt preflight --optimizer adam": ["Adam", "AdamW", "Adamax"],
}


def in_bash(lines: list[str]) -> list[list[str]]:
    """Return what a real bash would offer for each line, after it has read the script of ``ckpt completion bash``."""
    script = 'eval "$(ckpt completion bash)"\ncompopt() { :; }\n'
    for line in lines:
        quoted = line.replace("'", "'\\''")
        script += f"COMP_LINE='{quoted}'; COMP_POINT=${{#COMP_LINE}}; COMPREPLY=(); _ckpt_completion ckpt\n"
        script += 'printf "%s\\n" "${COMPREPLY[@]}"; echo ----\n'
    program = f'ckpt() {{ \'{sys.executable}\' -m ckptkit "$@"; }}\nenv() {{ (export "${{@:1:3}}"; ckpt); }}\n'
    done = subprocess.run(["bash", "-c", program + script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [block.split() for block in done.stdout.split("----\n")[:-1]]


def test_bash_completes() -> None:
    """bash offers what belongs behind the colons and equals signs of a word."""
    assert dict(zip(IN_BASH, in_bash(list(IN_BASH)), strict=True)) == IN_BASH


@pytest.mark.parametrize("line", LINES)
def test_a_line_completes(line: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of the file on the line, presets and optimizers are offered, asked as fish asks."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("_CKPT_COMPLETE", "fish_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", line.rpartition(" ")[2])
    offered = run_ckpt(capfd).out.split("\n")
    assert [word.partition(",")[2].partition("\t")[0] for word in offered if word] == LINES[line]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete(shell: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """zsh and fish get whole words, and the summaries of presets."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("_CKPT_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", f"ckpt show {DDP}::model --drop module.fc3.")
    monkeypatch.setenv("COMP_CWORD", "4" if shell == "zsh" else "module.fc3.")
    ran = run_ckpt(capfd)
    assert (ran.code, ran.err) == (0, "")
    assert {"module.fc3.weight", "module.fc3.bias"} <= set(ran.out.replace(",", "\n").split())
    monkeypatch.setenv("COMP_WORDS", "ckpt groups table --preset ")
    monkeypatch.setenv("COMP_CWORD", "4" if shell == "zsh" else "")
    offered = run_ckpt(capfd).out
    assert [name for name in param_group_preset_names() if name not in offered] == []


def test_a_key_press_runs_no_code_of_the_user(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live model on the line is not built while the user types."""
    (tmp_path / "nets.py").write_text("open('ran', 'w')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_CKPT_COMPLETE", "zsh_complete")
    monkeypatch.setenv("COMP_WORDS", "ckpt show py:nets:build --keep ")
    monkeypatch.setenv("COMP_CWORD", "4")
    assert run_ckpt(capfd).code == 0
    assert os.listdir(tmp_path) == ["nets.py"]
