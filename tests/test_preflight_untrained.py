"""``preflight`` sees the tensors that an initial checkpoint has as a new model has them, as after a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ckptkit import load_into, merge, preflight, run_checks, stats
from tests.helpers_cli import run_ckpt

MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self, own_init=False):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.LayerNorm(48), torch.nn.Linear(48, 48))
        self.head = torch.nn.Linear(48, 40)
        if own_init:
            torch.nn.init.normal_(self.head.weight, std=0.02)
            torch.nn.init.zeros_(self.head.bias)
"""
CODE = "preflight.at-init"


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """Write the module that the commands import, and return its class."""
    (tmp_path / "untrained_net.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, type[nn.Module]] = {}
    exec(compile(MODEL, "untrained_net", "exec"), names)  # noqa: S102 - the text above
    return names["Net"]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state that no initialisation makes, without the head."""
    state = {key: value.detach() * 1.7 + 0.1 * torch.randn(value.shape) for key, value in model.state_dict().items()}
    return {key: value for key, value in state.items() if not key.startswith("head")}


@pytest.mark.parametrize("own", [False, True], ids=["torch's init", "an init of the model"])
def test_a_head_that_a_merge_left_at_init_is_seen(
    net: type[nn.Module], own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a warning, as in ``check --like``, and a note where the user says so; the rest of init is silent."""
    init, model = tmp_path / "init.safetensors", f"py:untrained_net:Net(own_init={own})"
    merge(net(own), trained(net(own)), init)
    like = [finding for finding in run_checks(init, like=model).findings if finding.code == "at-init"]
    assert any("head.weight" in finding.message for finding in like)
    ran = run_ckpt(capsys, "preflight", "--model", model, "--init", init)
    assert ran.code == 1
    assert f"warning: all of 'head' have values in init that are distributed as in a new model  [{CODE}]" in ran.out
    assert ran.out.count(CODE) == 1
    meant = run_ckpt(capsys, "preflight", "--model", model, "--init", init, "--fresh", "head.*")
    assert (meant.code, "note: all of 'head'" in meant.out) == (0, True), meant.out


def test_python_judges_a_model_before_and_after_the_load(net: type[nn.Module], tmp_path: Path) -> None:
    """Both find the head; the statistics from before the load show an init that is not torch's."""
    for own in (False, True):
        model, init = net(own), tmp_path / f"{own}.safetensors"
        merge(net(own), trained(net(own)), init)
        initial = stats(model)
        before = preflight(model, init=init, initial=initial)
        load_into(model, init)
        after = preflight(model, init=init, initial=initial)
        for report in (before, after):
            found = [finding for finding in report.findings if finding.code == CODE]
            assert [finding.keys for finding in found] == [("head.weight", "head.bias")]
    assert [f.code for f in preflight(model, init=init).warnings] == []


def test_trained_weights_are_silent(net: type[nn.Module]) -> None:
    """A head with other values is not said to be new; neither is a model of which nothing was trained."""
    model = net()
    state = {**trained(model), "head.weight": torch.randn(40, 48), "head.bias": torch.randn(40)}
    for init in (state, net().state_dict()):
        load_into(model, init)
        assert CODE not in {finding.code for finding in preflight(model, init=init).findings}


def test_the_bias_of_a_trained_matrix_is_silent(net: type[nn.Module]) -> None:
    """A bias can be as in a new model by chance, so it says nothing beside trained weights."""
    model = net()
    state = {**trained(model), "head.weight": torch.randn(40, 48), "head.bias": net().state_dict()["head.bias"]}
    load_into(model, state)
    assert CODE not in {finding.code for finding in preflight(model, init=state).findings}


def test_a_trained_head_must_not_stay_at_init(net: type[nn.Module]) -> None:
    """A pattern of ``fresh`` is still an error where init has other values for its keys."""
    model = net()
    state = {**trained(model), "head.weight": torch.randn(40, 48), "head.bias": torch.randn(40)}
    report = preflight(model, init=state, fresh="head.*")
    assert "preflight.not-fresh" in {finding.code for finding in report.errors}
