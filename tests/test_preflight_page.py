"""``ckpt preflight`` writes a page or a JSON document, and its exit code says whether there are findings."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.lenet import Net
from tests.helpers_cli import ROOT, run_ckpt

MODEL = "py:fixtures.lenet:build"


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run_file(folder: Path, kind: Any = torch.optim.AdamW) -> Path:
    """Return a file with the model, the optimizer and the epoch of a run, as trainers save it."""
    model = Net(classes=4)
    optimizer = kind(model.named_parameters(), lr=1e-3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, folder / "run.ckpt")
    return folder / "run.ckpt"


def test_a_run_with_the_same_optimizer_class_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and optimizer state are in one file; with another class the run is not ready."""
    run = run_file(tmp_path)
    ran = run_ckpt(capsys, "preflight", "--model", MODEL, "--resume", run, "--optimizer", "AdamW")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "ready")
    assert (
        "resume: 10 of 10 tensors of the model are in the run; its optimizer has 10 parameters, 10 with state"
        in ran.out
    )
    part = run_ckpt(capsys, "preflight", "--model", MODEL, "--resume", f"{run}::model", "--optimizer", "AdamW")
    assert (part.code, part.out.partition("resume: ")[2]) == (0, ran.out.partition("resume: ")[2])
    other = run_ckpt(capsys, "preflight", "--model", MODEL, "--resume", run, "--optimizer", "Adagrad")
    assert other.code == 1
    assert other.out.splitlines()[-1].startswith("not ready: ")
    assert "[preflight.resume-class]" in other.out


def test_rules_rename_the_weights_of_a_run_without_an_init(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hint about the prefix of a wrapper is a command that writes a run without it, also where there is an init."""
    state = torch.nn.ModuleDict({"module": Net(classes=4)}).state_dict()
    torch.save({"model": state, "epoch": 1}, tmp_path / "run.ckpt")
    arguments: list[str | Path] = ["preflight", "--model", MODEL, "--resume", tmp_path / "run.ckpt"]
    refused = run_ckpt(capsys, *arguments)
    assert (refused.code, "--rename 'module.*=*'" in refused.out) == (1, True)
    renamed = run_ckpt(capsys, *arguments, "--rename", "module.*=*")
    assert (renamed.code, "10 of 10 tensors of the model are in the run" in renamed.out) == (0, True), renamed.out
    torch.save(Net(classes=4).state_dict(), tmp_path / "init.pt")
    both = run_ckpt(capsys, *arguments, "--init", tmp_path / "init.pt")
    command = re.search(r"  all 10 keys match after (ckpt remap .*)", both.out)
    assert both.code == 1
    assert command is not None
    words = shlex.split(command[1].replace(" OUT", f" {tmp_path / 'out.ckpt'}"))
    assert run_ckpt(capsys, *words[1:]).code == 0
    arguments[-1] = tmp_path / "out.ckpt"
    assert run_ckpt(capsys, *arguments, "--init", tmp_path / "init.pt").code == 0


def test_a_run_may_have_no_optimizer_state(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The page says that the optimizer state was not judged."""
    torch.save(Net(classes=4).state_dict(), tmp_path / "weights.pt")
    ran = run_ckpt(capsys, "preflight", "--model", MODEL, "--resume", tmp_path / "weights.pt")
    assert ran.code == 0
    assert "not measured: the optimizer state of the run: none given" in ran.out


def test_the_document_has_every_section_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Its findings have the same fields as those of every other check."""
    ran = run_ckpt(
        capsys, "preflight", "--json", "--model", MODEL, "--init", "fixtures/lenet_10class.pth",
        "--groups", "fixtures/groups.toml", "--optimizer", "SGD", "--dry-step", "py:fixtures.lenet:loss",
    )  # fmt: skip
    assert ran.code == 1
    document = json.loads(ran.out)
    assert document["schema"] == "ckptkit.preflight/1"
    assert document["verdict"] == "ready, with 1 warning"
    assert document["summary"] == {"errors": 0, "warnings": 1, "notes": 0, "ignored": 0}
    assert set(document["findings"][0]) == {"code", "severity", "key", "message", "hint"}
    assert document["init"]["coverage"] == 61156 / 61496
    assert document["init"]["in_model"] == "all"
    assert [kept["key"] for kept in document["init"]["kept"]] == ["fc3.weight", "fc3.bias"]
    assert [group["options"]["lr"] for group in document["groups"]] == [0.01, 0.001]
    assert [row["module"] for row in document["training"]] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert document["memory"]["total"] == 3 * 4 * 61496
    assert document["memory"]["states"] == [{"optimizer": "SGD", "slots": ["momentum_buffer"], "bytes": 4 * 61496}]
    assert (document["step"]["gradients"], document["step"]["moved"]) == (10, 10)
    assert document["resume"] is None


def test_the_page_can_be_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    """Names are set as code in it."""
    ran = run_ckpt(capsys, "preflight", "--markdown", "--model", MODEL, "--init", "fixtures/lenet_10class.pth")
    assert ran.out.startswith("| from init")
    assert "\n| `conv1` " in ran.out
    assert ran.out.rstrip().endswith("ready, with 1 warning")


def test_a_run_with_two_optimizers_needs_a_choice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A warning says that the file has several optimizer states; a part with weights has none, but the file has."""
    model = Net(classes=4)
    state = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    both = {"model": model.state_dict(), "ema": model.state_dict()}
    torch.save(both | {"optimizer": state}, tmp_path / "run.pt")
    ran = run_ckpt(capsys, "preflight", "--model", MODEL, "--resume", f"{tmp_path / 'run.pt'}::model")
    assert (ran.code, "[optim.unnamed]" in ran.out) == (0, True)  # the state was read
    torch.save({"a": {"model": model.state_dict(), "optimizer": state}, "b": both}, tmp_path / "run.pt")
    for part, is_read in (("a.model", True), ("b.model", False)):
        ran = run_ckpt(capsys, "preflight", "--model", MODEL, "--resume", f"{tmp_path / 'run.pt'}::{part}")
        assert ("'::a.optimizer' is not beside '::b.model'" in ran.err, "optim.unnamed" in ran.out) == (
            not is_read,
            is_read,
        )
    torch.save({"model": model.state_dict(), "optim_g": state, "optim_d": state}, tmp_path / "two.pt")
    ran = run_ckpt(capsys, "preflight", "--model", MODEL, "--resume", tmp_path / "two.pt")
    assert "warning: the optimizer state of the run was not measured" in ran.err
    one = ("preflight", "--model", MODEL, "--resume", tmp_path / "two.pt", "--resume-optimizer")
    assert run_ckpt(capsys, *one, f"{tmp_path / 'two.pt'}::optim_g").err == ""
    assert run_ckpt(capsys, *one, tmp_path / "two.pt").code == 2
