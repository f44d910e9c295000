"""``preflight`` sees the tensors that an initial checkpoint has as a new model has them, as after a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptkit import load_into, merge, preflight, run_checks, stats
from ckptkit.core.findings import Report
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

class Kinds(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 8)
        self.padded = torch.nn.Embedding(9, 8, padding_idx=0)
        self.attn = torch.nn.MultiheadAttention(8, 2)
        self.mixed = torch.nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.conv = torch.nn.Conv1d(8, 8, 3)
        self.bn = torch.nn.BatchNorm1d(8)
        self.rnn = torch.nn.GRU(8, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.body = torch.nn.Linear(8, 8)
        self.body.lora_A = torch.nn.Linear(8, 4, bias=False)
        self.body.lora_B = torch.nn.Linear(4, 8, bias=False)
        torch.nn.init.zeros_(self.body.lora_B.weight)
        self.gate = torch.nn.Parameter(torch.zeros(8))
        self.wide = torch.nn.Linear(8, 200)
        torch.nn.init.normal_(self.wide.weight, std=0.02)
        torch.nn.init.zeros_(self.wide.bias)
        self.head = torch.nn.Linear(8, 3)
        self.tiny = torch.nn.Linear(8, 1)

def seeded():
    torch.manual_seed(7)
    return Kinds()
"""
CODE = "preflight.at-init"


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Write the module that the commands import, and return what it defines."""
    (tmp_path / "untrained_net.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(MODEL, "untrained_net", "exec"), found)  # noqa: S102 - the text above
    return found


@pytest.fixture
def net(names: dict[str, Any]) -> type[nn.Module]:
    """Return the class of the model with one head."""
    found: type[nn.Module] = names["Net"]
    return found


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state that no initialisation makes, without the head."""
    return {key: value for key, value in moved(model).items() if not key.startswith("head")}


def moved(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state that no initialisation makes."""
    return {
        key: value.detach() * 1.7 + 0.1 * torch.randn(value.shape) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }


HEAD = {"head.weight", "head.bias"}
NEW: dict[str, tuple[list[str], set[str]]] = {
    "a small head": (["head."], HEAD),
    "its bias alone": (["head.bias"], set()),
    "a wide head with an initialisation of its own": (["wide."], {"wide.weight", "wide.bias"}),
    "an embedding": (["embed."], {"embed.weight"}),
    "an embedding with a row of padding": (["padded."], {"padded.weight"}),
    "attention": (
        ["attn.", "mixed."],
        {
            *(
                f"{name}.{leaf}"
                for name in ("attn", "mixed")
                for leaf in ("in_proj_bias", "out_proj.weight", "out_proj.bias")
            ),
            "attn.in_proj_weight",
            *(f"mixed.{leaf}_proj_weight" for leaf in "qkv"),
        },
    ),
    "a convolution and a head": (["conv.", "head."], {"conv.weight", "conv.bias", *HEAD}),
    "a recurrent layer": (["rnn."], {f"rnn.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}),
    "norms and meant zeros": (["norm.", "bn.", "body.lora_B.", "gate"], set()),
    "too few numbers": (["tiny."], set()),
    "nothing": ([], set()),
}


@pytest.mark.parametrize(("prefixes", "expected"), NEW.values(), ids=NEW)
@pytest.mark.parametrize("build", ["Kinds", "seeded"])
def test_check_and_preflight_name_the_same_tensors(
    names: dict[str, Any], build: str, prefixes: list[str], expected: set[str]
) -> None:
    """``check --like`` and ``preflight --init`` have one judgement of what is as in a new model, for every layer.

    A function that builds a model with its own seed makes the same values each time: then equal values prove nothing,
    since the model may be built with trained ones, and only torch's own initialisation is known. So it is for a Module.
    """
    torch.manual_seed(3)
    new = names[build]().state_dict()
    state = {
        key: new[key] if key.startswith(tuple(prefixes)) else value for key, value in moved(names["Kinds"]()).items()
    }
    save_file(state, "init.safetensors")
    model = names[build]()
    initial = stats(model)
    load_into(model, "init.safetensors")
    reports = (
        run_checks("init.safetensors", like=f"py:untrained_net:{build}"),
        preflight(model, init="init.safetensors", initial=initial),
        run_checks("init.safetensors", like=model),
        preflight(model, init="init.safetensors"),
    )
    known = {key for key in expected if not key.startswith("wide.")}
    expected = expected if build == "Kinds" else known
    assert [untrained_in(report) for report in reports] == [expected, expected, known, known]


def untrained_in(report: Report) -> set[str]:
    """Return the keys about which a report warns that they have the values of a new model."""
    return {key for finding in report.warnings if finding.code in ("at-init", CODE) for key in finding.keys}


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
