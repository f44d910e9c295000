"""The main use: load an old network into a model with a new head, and train the head at another rate."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ckptkit import build_param_groups, diff, execute, load_into, open_checkpoint, plan_merge, validate_param_groups
from fixtures.lenet import Net, build
from tests.helpers_cli import ROOT, run_ckpt

REAL = ROOT.parent / "shared" / "data" / "net_params.pkl"
LOCAL = ROOT / "fixtures" / "lenet_10class.pth"
SPEC = tomllib.loads((ROOT / "fixtures" / "groups.toml").read_text(encoding="utf-8"))


@pytest.fixture(params=[LOCAL, REAL], ids=["fixture", "a file of 2018"])
def pretrained(request: pytest.FixtureRequest) -> Path:
    """Return a legacy file of a network with ten classes; the real one only if it is beside the checkout."""
    path = Path(request.param)
    if not path.exists():
        pytest.skip("the real file is not beside this checkout")
    return path


def _oracle(path: Path) -> Mapping[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)
    assert isinstance(state, Mapping)
    return state


def _assert_merged(state: Mapping[str, torch.Tensor], model: Net, pretrained: Path) -> None:
    old = _oracle(pretrained)
    for key, value in model.state_dict().items():
        expected = value if key.startswith("fc3.") else old[key]
        assert torch.equal(state[key], expected), key


def test_in_python(pretrained: Path, tmp_path: Path) -> None:
    """Diff, merge, load, group, validate; then one step moves the head ten times as far as the other layers."""
    torch.manual_seed(7)
    model = build()
    with open_checkpoint(pretrained) as checkpoint:
        result = diff(model, checkpoint)
        assert [pair.key for pair in result.shape_mismatched] == ["fc3.weight", "fc3.bias"]
        assert (len(result.matched), result.missing, result.unexpected) == (8, (), ())
        assert (result.loads, result.loads_strict) == (False, False)
        plan = plan_merge(model, checkpoint, on_mismatch="skip")
        out = tmp_path / "init.safetensors"
        written = execute(plan, {"base": model, "donor": checkpoint}, out)
    assert written.tensors == 10
    with open_checkpoint(out) as merged:
        _assert_merged({key: merged.read(key) for key in merged}, model, pretrained)
        report = load_into(model, merged)
    assert (report.ok, report.coverage, report.kept) == (True, 1.0, ())

    optimizer = torch.optim.SGD(build_param_groups(model, SPEC), lr=SPEC["defaults"]["lr"])
    assert validate_param_groups(model, optimizer).findings == ()
    assert [(group["lr"], group["momentum"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.01, 0.9, 1e-4),
        (0.001, 0.9, 1e-4),
    ]
    with torch.no_grad():  # equal values and equal gradients: only the learning rate can make a difference
        for parameter in model.parameters():
            parameter.fill_(0.5)
            parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    moved = {name: 0.5 - parameter.double() for name, parameter in model.named_parameters()}
    assert torch.allclose(moved["fc3.weight"].mean(), 10 * moved["fc1.weight"].mean(), rtol=1e-4)


def test_on_the_command_line(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same on the command line, with the exit code of each command."""
    monkeypatch.chdir(ROOT)
    model, out = "py:fixtures.lenet:build", tmp_path / "init.safetensors"
    compared = run_ckpt(capsys, "diff", model, pretrained, "--json")
    assert compared.code == 1
    assert json.loads(compared.out)["summary"]["shape_mismatched"] == 2
    assert run_ckpt(capsys, "merge", model, pretrained, "-o", out).code == 2
    assert run_ckpt(capsys, "merge", model, pretrained, "-o", out, "--on-mismatch", "skip").code == 0
    assert run_ckpt(capsys, "diff", model, out).code == 0
    assert run_ckpt(capsys, "groups", "validate", "--model", model, "fixtures/groups.toml").code == 0
    old = _oracle(pretrained)
    with open_checkpoint(out) as merged:
        assert all(torch.equal(merged.read(key), old[key]) for key in merged if not key.startswith("fc3."))


def test_a_head_replaced_after_the_optimizer_was_built_is_found() -> None:
    """Replacing the head after building the optimizer is found, with the names of the parameters that do not train."""
    model = build()
    optimizer = torch.optim.SGD(build_param_groups(model, SPEC), lr=0.001)
    model.fc3 = torch.nn.Linear(84, 7)
    report = validate_param_groups(model, optimizer)
    assert not report.ok
    assert {finding.key for finding in report.findings if finding.severity == "error"} >= {"fc3.weight", "fc3.bias"}
