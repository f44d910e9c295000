"""Runs of older versions of torch resume without a finding, and train as torch's own load lets them train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import load_optimizer_state, preflight
from ckptkit.core.findings import Finding
from ckptkit.core.torch_optim import options_of_kind
from ckptkit.formats import open_checkpoint, open_optimizer
from ckptkit.optimizer_state.compare import optimizer_state_diff
from ckptkit.optimizer_state.naming import to_named
from tests.features import require, require_option
from tests.helpers_cli import run_ckpt
from tests.helpers_optim import same_state
from tests.make_old_torch import CLASSES, FOLDER, Net

FILES = sorted(FOLDER.glob("*.pt"))
SPEED = dict.fromkeys(options_of_kind("speed"))  # load_optimizer_state keeps those of the live optimizer
RUNS = [(path, kind) for path in FILES for kind in torch.load(path, weights_only=True)["runs"]]


def build(kind: str, weights: dict[str, torch.Tensor], **options: Any) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    model.load_state_dict(weights)
    return model, getattr(torch.optim, kind)(model.parameters(), lr=0.01, **CLASSES[kind], **options)


def unusual(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.message for finding in findings if finding.severity != "note"]


@pytest.mark.parametrize(("path", "kind"), RUNS, ids=[f"{kind}-{path.stem}" for path, kind in RUNS])
def test_a_run_of_an_older_torch_resumes(path: Path, kind: str) -> None:
    """State, options, and two more steps with the scheduler equal those after torch's own load, to the bit."""
    require(torch.optim, kind)
    run = torch.load(path, weights_only=True)["runs"][kind]
    results = []
    for loads_by_name in (False, True):
        model, optimizer = build(kind, run["model"])
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        if loads_by_name:
            with open_optimizer(f"{path}::runs.{kind}.optimizer") as state:
                report = preflight(
                    model, optimizer=optimizer, schedulers=scheduler, resume=run["model"], resume_optimizer=state
                )
                assert report.verdict == "ready", unusual(report.findings)
                assert unusual(load_optimizer_state(optimizer, model, state).findings) == []
        else:
            optimizer.load_state_dict(copy.deepcopy(run["optimizer"]))
        scheduler.load_state_dict(run["scheduler"])
        rates = []
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        results.append((model.state_dict(), optimizer.state_dict(), rates))
    (weights, by_torch, rates), (others, by_name, other_rates) = results
    assert same_state(sorted(weights.items()), sorted(others.items()))
    assert rates == other_rates
    for place in (0, 1):
        left, right = (sorted(state["state"][place].items()) for state in (by_torch, by_name))
        assert same_state(left, right)
    assert {**by_torch["param_groups"][0], **SPEED} == {**by_name["param_groups"][0], **SPEED}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_class_alone_is_enough_for_a_preflight(path: Path) -> None:
    """A preflight that builds the optimizer itself has no scheduler yet, and the moved rate is no finding."""
    model = Net()
    with (
        open_checkpoint(f"{path}::runs.AdamW.model") as weights,
        open_optimizer(f"{path}::runs.AdamW.optimizer") as state,
    ):
        spec = {"defaults": {"lr": 0.01}, "group": [{"name": "all", "rest": True}]}
        report = preflight(model, groups=spec, optimizer="AdamW", resume=weights, resume_optimizer=state)
    assert report.verdict == "ready", unusual(report.findings)


LOST: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "maximize of Adafactor": ("Adafactor", {}, "maximize", "preflight.resume-lost"),
    "maximize that was set": ("AdamW", {"maximize": True}, "maximize", "preflight.resume-options"),
    "amsgrad that was set": ("Adam", {"amsgrad": True}, "amsgrad", "preflight.resume-options"),
    "decoupled decay of Adam": (
        "Adam",
        {"decoupled_weight_decay": True},
        "decoupled_weight_decay",
        "preflight.resume-options",
    ),
    "betas": ("AdamW", {}, "betas", "preflight.resume-lost"),
}


@pytest.mark.parametrize(("kind", "options", "option", "code"), LOST.values(), ids=LOST)
def test_what_a_load_leaves_behind_decides(kind: str, options: dict[str, Any], option: str, code: str) -> None:
    """An option that the file lacks is a finding if the class does not restore it, or restores another value."""
    require(torch.optim, kind)
    if option not in ("betas", "maximize", "amsgrad"):
        require_option(kind, option)
    model, optimizer = build(kind, Net().state_dict(), **options)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0][option]
    before = dict(optimizer.param_groups[0]), dict(optimizer.defaults)
    report = preflight(model, optimizer=optimizer, resume=model, resume_optimizer=saved)
    assert any(finding.code == code and option in finding.message for finding in report.findings), report.findings
    assert (dict(optimizer.param_groups[0]), dict(optimizer.defaults)) == before
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0].get(option) != before[0][option]


def test_an_optimizer_of_another_package_is_asked_too() -> None:
    """A subclass may restore options of its own. Where it raises, the options of the file are compared."""

    class Restoring(torch.optim.AdamW):
        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)  # type: ignore[no-untyped-call]
            for group in self.param_groups:
                group.setdefault("warmth", 3)

    class Failing(Restoring):
        def __setstate__(self, state: dict[str, Any]) -> None:
            raise RuntimeError("not today")

    for kind, codes in ((Restoring, []), (Failing, ["preflight.resume-lost"])):
        model = nn.Linear(2, 2)
        optimizer = kind(model.named_parameters(), lr=torch.tensor(0.01))
        for group in optimizer.param_groups:
            group["warmth"] = 3
        saved = optimizer.state_dict()
        del saved["param_groups"][0]["warmth"]
        report = preflight(model, optimizer=optimizer, resume=model, resume_optimizer=saved)
        found = [one.code for one in report.findings if one.severity != "note" and one.code.startswith("preflight")]
        assert found == codes


@pytest.mark.parametrize(("options", "code"), [({}, None), ({"maximize": True}, "optim.options-lost")])
def test_two_files_differ_in_what_a_load_changes(options: dict[str, Any], code: str | None) -> None:
    """Neither the rate that a scheduler moved nor an option that the class restores is a difference of two states."""
    path = FILES[0]
    run = torch.load(path, weights_only=True)["runs"]["NAdam"]
    model, optimizer = build("NAdam", run["model"], **options)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with open_optimizer(f"{path}::runs.NAdam.optimizer") as saved:
        report = optimizer_state_diff(to_named(saved, model), to_named(optimizer.state_dict(), model))
    assert [finding.code for finding in report.findings] == ([code] if code else [])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_keyed_by_id_is_read_in_the_order_of_the_groups(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch up to 1.4 keyed the state by ``id(parameter)``; the order of the keys means nothing to torch's own load."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    groups: list[dict[str, Any]] = [{"params": model[1].parameters()}, {"params": model[0].parameters(), "lr": 0.1}]
    optimizer = torch.optim.Adam(groups)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    ids = {number: 140178894849224 + 72 * (7 * number % 4) for number in range(4)}
    for group in state["param_groups"]:
        group["params"] = [ids[number] for number in group["params"]]
    state["state"] = {ids[number]: state["state"][number] for number in (2, 0, 3, 1)}
    path = tmp_path / "old.pt"
    weights = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    torch.save({"model": weights, "optimizer": state}, path)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        other = copy.deepcopy(model)
        return other, torch.optim.Adam([{"params": other[1].parameters()}, {"params": other[0].parameters()}])

    _, wanted = fresh()
    wanted.load_state_dict(torch.load(path, weights_only=True)["optimizer"])
    live, found = fresh()
    load_optimizer_state(found, live, path, ["module.*=*"] if prefix else None)
    for one, other in zip(wanted.param_groups, found.param_groups, strict=True):
        for expected, loaded in zip(one["params"], other["params"], strict=True):
            assert torch.equal(wanted.state[expected]["exp_avg"], found.state[loaded]["exp_avg"])
    ran = run_ckpt(capsys, "optim", "show", path)
    assert (ran.code, "keyed by id(parameter)" in ran.err + ran.out) == (0, True)
    out = tmp_path / "new.pt"
    ran = run_ckpt(capsys, "optim", "remap", path, "-o", out, "--strip", "auto")
    assert ran.code == 0, ran.err
    _, renamed = fresh()
    renamed.load_state_dict(torch.load(out, weights_only=True)["optimizer"])
    assert same_state(*(dict(sorted(side.state_dict()["state"].items())) for side in (renamed, wanted)))
