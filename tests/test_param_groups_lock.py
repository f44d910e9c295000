"""A lock keeps the groups of a run; models, specs, optimizers and other locks are compared with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.errors import GroupsError
from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.compare.locks import diff_locks
from ckptkit.param_groups.explain import explain_param_group
from ckptkit.param_groups.lock import (
    ParamGroupsLock,
    lock_document,
    lock_model,
    lock_optimizer,
    lock_param_groups,
    parse_lock,
)
from ckptkit.param_groups.properties import parameter_table
from ckptkit.param_groups.validate import assert_param_groups, validate_param_groups
from tests.features import needs_optimizer
from tests.helpers_cli import ROOT, run_ckpt


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.fc2 = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)


SPEC: dict[str, Any] = {
    "optimizer": "AdamW",
    "defaults": {"lr": 0.001, "weight_decay": 0.1, "betas": [0.9, 0.95]},
    "group": [{"name": "head", "params": "head.*", "lr_mult": 10}, {"name": "base", "rest": True}],
    "modifier": [{"name": "no decay", "match": {"ndim": [0, 1]}, "weight_decay": 0.0}],
}


def optimizer_of(model: nn.Module, spec: Any = None) -> torch.optim.AdamW:
    return torch.optim.AdamW(build_param_groups(model, spec or SPEC))


def codes(expected: ParamGroupsLock, found: ParamGroupsLock) -> dict[str, str]:
    return {finding.code.removeprefix("groups."): finding.key for finding in diff_locks(expected, found).findings}


def test_a_lock_has_the_position_of_each_parameter_in_the_optimizer_state() -> None:
    """The index is the one that torch's own state_dict gives to the parameter of that name."""
    model = Net()
    lock = lock_param_groups(model, SPEC)
    packed = optimizer_of(model).state_dict()["param_groups"]
    assert [group["name"] for group in packed] == [group.name for group in lock.groups]
    for group, locked in zip(packed, lock.groups, strict=True):
        pairs = list(zip(group["param_names"], group["params"], strict=True))
        assert pairs == [(one.name, one.index) for one in locked.parameters]
        assert {key: group[key] for key in locked.options} == locked.options


def test_a_lock_is_the_same_after_writing_and_parsing() -> None:
    model = Net()
    model.fc1.requires_grad_(False)
    lock = lock_param_groups(model, SPEC)
    document = json.loads(json.dumps(lock_document(lock), allow_nan=False))
    assert parse_lock(document) == lock
    assert document["schema"] == "ckptkit.groups-lock/1"
    assert [one["name"] for one in document["outside"]] == ["fc1.weight", "fc1.bias"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler
@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel], ids=["bare", "compile", "dp"])
def test_an_optimizer_built_from_the_spec_equals_its_lock(wrap: Callable[[Any], Any]) -> None:
    """Also after steps, under a scheduler, and after the model was wrapped."""
    model = Net()
    lock = lock_param_groups(model, SPEC)
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert diff_locks(lock, lock_optimizer(wrap(model), optimizer)).findings == ()
    assert diff_locks(lock, lock_model(parameter_table(wrap(model)))).findings == ()


def replaced_head(model: Net) -> None:
    model.head = nn.Linear(4, 7)


def added(model: Net) -> None:
    model.extra = nn.Linear(2, 2)


def removed(model: Net) -> None:
    del model.fc2
    model.fc2 = nn.Identity()  # type: ignore[assignment]


def renamed(model: Net) -> None:
    model.classifier = model.head
    del model.head


def halved(model: Net) -> None:
    model.half()


def tied(model: Net) -> None:
    model.fc2.weight = model.fc1.weight


def frozen(model: Net) -> None:
    model.fc1.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(replaced_head, {"shape": "head.bias"}, id="head-replaced"),
        pytest.param(added, {"new": "extra.bias"}, id="layer-added"),
        pytest.param(removed, {"gone": "fc2.bias"}, id="layer-removed"),
        pytest.param(renamed, {"gone": "head.bias"}, id="renamed"),
        pytest.param(halved, {"dtype": "fc2.bias"}, id="other-dtype"),
        pytest.param(tied, {"gone": "fc2.weight", "ties": "fc1.weight"}, id="tied"),
    ],
)
def test_each_change_of_the_model_is_reported(change: Callable[[Net], None], expected: dict[str, str]) -> None:
    model = Net()
    lock = lock_param_groups(model, SPEC)
    change(model)
    assert codes(lock, lock_model(parameter_table(model))) == expected


def test_a_renamed_parameter_is_recognised_by_its_shape_and_position() -> None:
    model = Net()
    lock = lock_param_groups(model, SPEC)
    renamed(model)
    (weight, _) = diff_locks(lock, lock_model(parameter_table(model))).findings
    assert "'classifier.weight' has the same shape and position" in weight.message
    assert weight.hint == "rename its state: head.weight=classifier.weight"


def test_a_parameter_that_was_frozen_later_is_a_warning() -> None:
    model = Net()
    lock = lock_param_groups(model, SPEC)
    frozen(model)
    report = diff_locks(lock, lock_param_groups(model, SPEC))
    assert [(finding.code, finding.key, finding.severity) for finding in report.findings] == [
        ("groups.thawed", "fc1.weight", "warning"),
        ("groups.thawed", "fc1.bias", "warning"),
    ]


def test_swapped_groups_of_one_size_are_found() -> None:
    """torch loads such a file without an error, and each parameter gets the state and options of another."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = [{"name": "a", "params": "0.*", "lr": 1.0}, {"name": "b", "params": "1.*", "lr": 2.0}]
    after = [{"name": "a", "params": "1.*", "lr": 1.0}, {"name": "b", "params": "0.*", "lr": 2.0}]
    saved, live = optimizer_of(model, before), optimizer_of(model, after)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.get_parameter("0.weight").grad = torch.full((3, 3), 5.0)
    saved.step()
    live.load_state_dict(saved.state_dict())
    assert torch.equal(
        live.state[model.get_parameter("1.weight")]["exp_avg"], saved.state[model.get_parameter("0.weight")]["exp_avg"]
    ), "torch gives the state to another parameter"
    found = codes(lock_param_groups(model, before), lock_param_groups(model, after))
    assert found == {"moved": "1.bias", "order": "0.weight"}


def test_a_parameter_in_another_group_is_reported_with_both_groups() -> None:
    model = Net()
    spec = copy.deepcopy(SPEC)
    spec["group"][0]["params"] = ["head.*", "fc2.weight"]
    report = diff_locks(lock_param_groups(model, SPEC), lock_optimizer(model, optimizer_of(model, spec)))
    moved = next(finding for finding in report.findings if finding.code == "groups.moved")
    assert moved.message == "'fc2.weight' was in group 'base' and is now in 'head'"


def test_only_options_that_the_lock_has_are_compared() -> None:
    model = Net()
    lock = lock_param_groups(model, SPEC)
    optimizer = optimizer_of(model)
    assert codes(lock, lock_optimizer(model, optimizer)) == {}
    optimizer.param_groups[0]["lr"] = 0.5
    del optimizer.param_groups[1]["betas"]
    assert [finding.message for finding in diff_locks(lock, lock_optimizer(model, optimizer)).findings] == [
        "group 'head' has other options: lr 0.01 -> 0.5",
        "group 'head/no decay' has other options: betas [0.9, 0.95] -> nothing",
    ]


def test_a_parameter_that_the_optimizer_lacks_is_outside_the_groups() -> None:
    model = Net()
    lock = lock_param_groups(model, SPEC)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if name != "fc1.weight"])
    assert {"thawed": "fc1.weight"}.items() <= codes(lock, lock_optimizer(model, optimizer)).items()


def test_a_parameter_in_the_groups_twice_is_locked_once() -> None:
    """parse_lock refuses a name that occurs twice; the validator reports the duplicate."""
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([*model.parameters(), model.weight])
    lock = lock_optimizer(model, optimizer)
    assert parse_lock(json.loads(json.dumps(lock_document(lock)))) == lock


@needs_optimizer("Muon")
def test_positions_are_counted_for_each_optimizer() -> None:
    model = Net()
    spec = {
        "optimizer": "AdamW",
        "group": [{"name": "hidden", "params": ["fc*.weight"], "optimizer": "Muon"}, {"name": "base", "rest": True}],
    }
    lock = lock_param_groups(model, spec)
    made = [getattr(torch.optim, name)(build_param_groups(model, spec, optimizer=name)) for name in ("Muon", "AdamW")]
    assert [[one.index for one in group.parameters] for group in lock.groups] == [[0, 1], [0, 1, 2, 3, 4, 5]]
    assert diff_locks(lock, lock_optimizer(model, made)).findings == ()


def test_validating_with_a_lock_reports_what_changed() -> None:
    """An unchanged optimizer has no findings, also under a scheduler that writes learning rates of its own."""
    model = Net()
    lock = lock_param_groups(model, SPEC)
    optimizer = optimizer_of(model)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1.0] * 4, total_steps=10)
    assert assert_param_groups(model, optimizer, lock=lock, spec=SPEC, strict=True).findings == ()
    spec = copy.deepcopy(SPEC)
    spec["group"][0]["params"] = "fc2.*"
    moved = optimizer_of(model, spec)
    assert "groups.moved" in {finding.code for finding in validate_param_groups(model, moved, lock=lock).findings}
    with pytest.raises(GroupsError, match=r"'head.weight' was in group 'head' and is now in 'base'"):
        assert_param_groups(model, moved, lock=lock)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda _: [], "not a valid lock", id="list"),
        pytest.param(lambda lock: lock | {"schema": "x"}, "not a valid lock", id="schema"),
        pytest.param(lambda lock: lock | {"groups": {}}, "a dict as 'groups'", id="groups"),
        pytest.param(lambda lock: lock | {"groups": [3]}, "an entry of a wrong type in 'groups'", id="group"),
        pytest.param(lambda lock: lock | {"outside": lock["groups"][0]["parameters"]}, "twice", id="twice"),
        pytest.param(lambda lock: lock | {"groups": lock["groups"][1:]}, "changed after it was written", id="edited"),
    ],
)
def test_an_invalid_lock_is_refused(change: Callable[[Any], Any], reason: str) -> None:
    with pytest.raises(GroupsError) as caught:
        parse_lock(change(lock_document(lock_param_groups(Net(), SPEC))))
    assert reason in caught.value.reason


def test_an_explanation_has_every_step_that_sets_an_option() -> None:
    model = Net()
    explanation = explain_param_group(model, SPEC, "head.bias")
    assert (explanation.outcome, explanation.rule, explanation.shadowed, explanation.modifiers) == (
        "trained",
        "head",
        ("base",),
        ("no decay",),
    )
    steps = [(step.source, step.key, step.value, step.factor) for step in explanation.steps if step.key != "betas"]
    assert steps == [
        ("defaults", "lr", 0.001, None),
        ("defaults", "weight_decay", 0.1, None),
        ("head", "lr", 0.01, 10),
        ("no decay", "weight_decay", 0.0, None),
    ]
    group = next(group for group in build_param_groups(model, SPEC) if "head.bias" in group["param_names"])
    assert {key: group[key] for key in explanation.options or ()} == explanation.options


def test_an_explanation_says_why_a_parameter_does_not_train() -> None:
    model = Net()
    model.fc1.requires_grad_(False)
    spec = {"group": [{"name": "still", "params": "fc2.*", "freeze": True}, {"name": "head", "params": "head.*"}]}
    outcomes = {name: explain_param_group(model, spec, name) for name in ("fc1.bias", "fc2.bias", "norm.bias")}
    assert {name: explanation.outcome for name, explanation in outcomes.items()} == {
        "fc1.bias": "frozen",
        "fc2.bias": "freeze",
        "norm.bias": "unowned",
    }
    assert outcomes["fc2.bias"].rule == "still"


def test_a_tied_parameter_is_explained_under_any_of_its_names() -> None:
    model = Net()
    model.fc2.weight = model.fc1.weight
    explanation = explain_param_group(model, {"group": [{"rest": True}]}, "fc2.weight")
    assert explanation.parameter.name == "fc1.weight"
    assert [alias.name for alias in explanation.parameter.aliases] == ["fc2.weight"]


@pytest.mark.parametrize("name", [None, 5, ["fc1.weight"]], ids=repr)
def test_an_argument_that_is_not_a_name_is_refused(name: Any) -> None:
    with pytest.raises(GroupsError, match="the name of the parameter is"):
        explain_param_group(Net(), SPEC, name)


@pytest.mark.parametrize("lock", [{}, b"groups.lock.json", 5], ids=repr)
def test_an_argument_that_is_not_a_lock_is_refused(lock: Any) -> None:
    """A parsed JSON document must be parsed to a lock first."""
    model = Net()
    with pytest.raises(GroupsError, match="a lock cannot be"):
        assert_param_groups(model, optimizer_of(model), lock=lock)
    with pytest.raises(GroupsError, match="a lock cannot be"):
        diff_locks(lock_model(parameter_table(model)), lock)


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(GroupsError) as caught:
        explain_param_group(Net(), SPEC, "head.weigth")
    assert caught.value.hint == "did you mean 'head.weight'?"


MODEL = "py:fixtures.lenet:build"
LENET = "fixtures/groups.toml"


def test_a_lock_is_written_and_compared_with_model_spec_and_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 0 without a change and 1 with one; replacing a lock needs --force."""
    lock, spec = tmp_path / "groups.lock.json", tmp_path / "other.toml"
    ran = run_ckpt(capsys, "groups", "lock", "--model", MODEL, LENET, "-o", lock)
    assert (ran.code, ran.out) == (0, "")
    assert "10 parameters in 2 groups" in ran.err
    assert run_ckpt(capsys, "groups", "lock", "--model", MODEL, LENET, "-o", lock).code == 2
    for other in ((), (LENET,)):
        assert run_ckpt(capsys, "groups", "diff", lock, "--model", MODEL, *other).out == "no findings\n"
    assert run_ckpt(capsys, "groups", "diff", lock, lock).code == 0
    preset = ("--preset", "head-lr", "--set", "lr=0.5")
    assert run_ckpt(capsys, "groups", "lock", "--model", MODEL, *preset, "-o", lock, "--force").code == 0
    assert run_ckpt(capsys, "groups", "diff", lock, LENET, "--model", MODEL).code == 1
    assert run_ckpt(capsys, "groups", "lock", "--model", MODEL, LENET, "-o", lock, "--force").code == 0
    spec.write_text((ROOT / LENET).read_text().replace("fc3", "fc2"))
    ran = run_ckpt(capsys, "groups", "diff", lock, spec, "--model", MODEL, "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["schema"]) == (1, "ckptkit.check/1")
    assert {one["message"] for one in found["findings"] if one["code"] == "groups.moved"} >= {
        "'fc3.weight' was in group 'head' and is now in 'base'",
        "'fc2.weight' was in group 'base' and is now in 'head'",
    }


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param((LENET,), "not valid JSON", id="a-spec-as-lock"),
        pytest.param(("LOCK",), "nothing to compare the lock with", id="nothing-else"),
        pytest.param(("LOCK", LENET), "is a spec, which has no parameters of its own", id="spec-without-model"),
        pytest.param(("LOCK", "none.json"), "none.json: no such file", id="no-file"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "lock.json"
    run_ckpt(capsys, "groups", "lock", "--model", MODEL, LENET, "-o", lock)
    ran = run_ckpt(capsys, "groups", "diff", *(lock if one == "LOCK" else one for one in arguments))
    assert (ran.code, ran.out) == (2, "")
    assert reason in ran.err


def test_explain_prints_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_ckpt(capsys, "groups", "explain", "--model", MODEL, LENET, "fc3.bias")
    assert ran.code == 0
    assert "owned by group 'head'" in ran.out
    assert ["0.01", "head"] in [line.split() for line in ran.out.splitlines()]
    document = json.loads(run_ckpt(capsys, "groups", "explain", "--model", MODEL, LENET, "fc3.bias", "--json").out)
    assert document["steps"][-1]["who"] in ("head", "defaults")
    assert document["options"]["lr"] == 0.01
    ran = run_ckpt(capsys, "groups", "explain", "--model", MODEL, LENET, "fc4.bias")
    assert (ran.code, ran.out) == (2, "")
    assert "did you mean 'fc" in ran.err
