"""``rebind`` puts new parameters where a spec says, and refuses options that no step reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from ckptkit import rebind, validate_param_groups
from ckptkit.errors import GroupsError
from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.parse import parse_spec
from ckptkit.param_groups.presets import param_group_preset

SPEC: dict[str, Any] = {
    "defaults": {"lr": 0.1, "momentum": 0.9},
    "group": [
        {"name": "stem", "params": "0.*", "lr": 0.001},
        {"name": "body", "params": "1.*", "lr": 0.01, "weight_decay": 0.2},
        {"name": "head", "rest": True},
    ],
}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))


def built(model: nn.Module, *frozen: int, **options: Any) -> torch.optim.SGD:
    """Return an optimizer that was built from the spec while some layers were frozen; then unfreeze them."""
    for layer in frozen:
        model.get_submodule(str(layer)).requires_grad_(False)
    spec = {**SPEC, "group": [{**group, "optional": True} for group in SPEC["group"]]}
    optimizer = torch.optim.SGD(build_param_groups(model, spec, **options))
    model.requires_grad_(True)
    return optimizer


def names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda _: (),
    "StepLR": lambda o: lrs.StepLR(o, 2, gamma=0.5),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 0.9**epoch),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1, 3), lrs.CosineAnnealingLR(o, 9)], [3]),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_new_groups_of_a_spec_continue_as_if_they_had_been_there(kind: str) -> None:
    """Two groups are added at once. Their lrs are equal to the lrs of a run that had all groups from the start."""
    runs = []
    for frozen in ((0, 1), ()):
        model = net()
        optimizer = built(model, *frozen)
        schedulers = SCHEDULERS[kind](optimizer)
        all_schedulers = schedulers if isinstance(schedulers, tuple) else (schedulers,)
        for count in (4, 5):
            for _ in range(count):
                optimizer.step()
                for scheduler in all_schedulers:
                    scheduler.step()
            if count == 4:
                rebind(optimizer, model, spec=SPEC, schedulers=schedulers)
        runs.append({group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups})
        findings = validate_param_groups(model, optimizer, schedulers=schedulers, spec=SPEC).findings
        assert {one.code for one in findings} <= {"groups.state-empty", "groups.decay"}
    assert list(runs[0]) == ["head", "stem", "body"]  # new groups come last, in the order of the spec
    assert runs[0].keys() == runs[1].keys()
    assert all(runs[0][name] == pytest.approx(runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("bare", [False, True], ids=["named", "bare"])
def test_parameters_join_the_group_of_the_spec_in_its_order(bare: bool) -> None:
    """A live group corresponds by its name, or without names by its parameters; state stays with its parameter."""
    model = net()
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(build_param_groups(model, SPEC, bare=bare))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {key: value["momentum_buffer"] for key, value in optimizer.state.items()}
    model[1].weight.requires_grad_(True)
    model.append(nn.Linear(1, 1))
    report = rebind(optimizer, model, spec=SPEC)
    assert [one.message for one in report.findings] == [
        "'1.weight' was added to group 1",
        "'3.weight' was added to group 2",
        "'3.bias' was added to group 2",
    ]
    assert names_of(model, optimizer) == names_of(model, torch.optim.SGD(build_param_groups(model, SPEC)))
    assert {key: value["momentum_buffer"] for key, value in optimizer.state.items()} == state
    assert rebind(optimizer, model, spec=SPEC).findings == ()


def test_what_the_spec_gives_to_no_group_of_the_optimizer_is_reported() -> None:
    """The spec may freeze a parameter, or give it to another optimizer class."""
    model = net()
    optimizer = built(model, 0)
    spec = {**SPEC, "group": [{"name": "stem", "params": "0.*", "freeze": True}, *SPEC["group"][1:]]}
    (finding,) = rebind(optimizer, model, spec=spec).findings
    assert (finding.code, finding.severity) == ("rebind.missing", "warning")
    assert finding.message == "'0.weight', '0.bias' are trainable, but the spec freezes them"
    spec = {**SPEC, "optimizer": "SGD", "group": [{**SPEC["group"][0], "optimizer": "AdamW"}, *SPEC["group"][1:]]}
    del spec["defaults"]["momentum"]
    (finding,) = rebind(optimizer, model, spec=spec).findings
    assert finding.message == "'0.weight', '0.bias' are trainable, but the spec gives them to AdamW"
    other = torch.optim.AdamW(model[0].parameters())
    assert rebind(optimizer, model, spec=spec, beside=other).findings == ()


def test_groups_of_the_spec_that_are_still_frozen_are_no_fault() -> None:
    """With gradual unfreezing, one spec serves every stage."""
    model = net()
    optimizer = built(model, 0, 1)
    model[0].requires_grad_(False)
    rebind(optimizer, model, spec=SPEC)
    assert [group["name"] for group in optimizer.param_groups] == ["head", "body"]


class Mixed(torch.optim.Optimizer):
    """An optimizer with two kinds of groups, as Muon with an auxiliary Adam: no defaults, and keys by the kind."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> Any:  # noqa: ARG002 - as the base class has it
        for group in self.param_groups:
            if group["use_muon"]:
                assert group["momentum"]
            else:
                auxiliary_step(group)


def auxiliary_step(group: dict[str, Any]) -> Any:
    return group["betas"], group["eps_root"]


class Renamed(torch.optim.SGD):
    """A class that inherits the step of torch."""


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.1, "name": "new", "lr_scale": 0.5, "weight_decay": 0}),
        (torch.optim.AdamW, {"own": 3}),
        (Mixed, {"use_muon": False, "lr": 0.1, "betas": (0.9, 0.99), "eps_root": 1e-8}),
        (Renamed, {"nesterov": False}),
    ],
    ids=["torch", "key-of-another-group", "other-kind-of-group", "subclass"],
)
def test_options_that_a_step_may_read_are_accepted(kind: Any, options: dict[str, Any]) -> None:
    """A step reads the options of its class, the keys of the groups that exist, and the keys in its own code."""
    model = net()
    optimizer = kind([{"params": list(model[0].parameters()), "use_muon": True, "momentum": 0.9, "own": 1}])
    assert rebind(optimizer, model, add_missing=options).ok
    assert options.items() <= optimizer.param_groups[1].items()


def sgd(model: Any) -> Any:
    return torch.optim.SGD(model[0].parameters(), lr=0.1)


REFUSALS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "learning_rate": (sgd, {"add_missing": {"learning_rate": 1e-5}}, "no step of SGD reads 'learning_rate' .*'lr'"),
    "near": (sgd, {"add_missing": {"weight_decy": 0}}, "reads 'weight_decy' .did you mean 'weight_decay'"),
    "upper-case": (sgd, {"add_missing": {"LR": 1e-5}}, "no step of SGD reads 'LR' .did you mean 'lr'"),
    "far": (sgd, {"add_missing": {"parms": 1}}, "reads 'parms' .the options of SGD are dampening, "),
    "of-another-class": (sgd, {"add_missing": {"betas": (0.9, 0.99)}}, "no step of SGD reads 'betas'"),
    "param-names": (sgd, {"add_missing": {"param_names": ["x"]}}, "leave out param_names"),
    "subclass": (lambda m: Renamed(m[0].parameters()), {"add_missing": {"epsilon": 1}}, "no step of Renamed reads"),
    "own-step": (
        lambda m: Mixed([{"params": m[0].parameters(), "use_muon": True}]),
        {"add_missing": {"learning_rate": 0.1, "use_muon": True}},
        "no step of Mixed reads 'learning_rate'",
    ),
    "a-spec": (sgd, {"add_missing": SPEC}, "add_missing is a spec of param groups .pass it as spec="),
    "a-parsed-spec": (sgd, {"add_missing": parse_spec(SPEC)}, "pass it as spec="),
    "a-preset": (sgd, {"add_missing": param_group_preset("no-decay", net(), lr=1e-3)}, "pass it as spec="),
    "a-list": (sgd, {"add_missing": SPEC["group"]}, "add_missing is a list .*spec= takes a spec"),
    "both": (sgd, {"add_missing": 0, "spec": SPEC}, "spec and add_missing both decide"),
    "option-of-the-spec": (
        sgd,
        {"spec": {"defaults": {"momentun": 0.5}, "group": [{"name": "all", "params": "1.*"}, {"rest": True}]}},
        "group 'all' of the spec: no step of SGD reads 'momentun' .did you mean 'momentum'",
    ),
    "pattern-of-the-spec": (sgd, {"spec": [{"params": "hd.*"}, {"rest": True}]}, "hd"),
    "key-of-the-spec": (sgd, {"spec": {"groups": []}}, "unknown key 'groups'"),
    "bytes": (sgd, {"spec": b"spec.toml"}, "not a list of tables"),
    "scheduler": (sgd, {"schedulers": "cosine", "add_missing": 0}, "a scheduler cannot be of type str"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_typos_are_refused_and_nothing_is_changed(case: str) -> None:
    make, choices, message = REFUSALS[case]
    model = net()
    optimizer = make(model)
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(GroupsError, match=message):
        rebind(optimizer, model, **choices)
    assert [dict(group) for group in optimizer.param_groups] == before


class TwoGroups(torch.optim.SGD):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if len(self.param_groups) == 2:
            raise ValueError("two are enough")
        super().add_param_group(param_group)


def test_a_class_that_refuses_the_second_new_group_keeps_neither() -> None:
    model = net()
    optimizer = TwoGroups(model[2].parameters(), lr=0.1)
    with pytest.raises(GroupsError, match="TwoGroups refuses a new group: two are enough"):
        rebind(optimizer, model, spec=SPEC)
    assert len(optimizer.param_groups) == 1


def test_the_example_in_the_documentation_runs() -> None:
    text = inspect.getdoc(rebind) or ""
    example = text.partition("::\n\n")[2].partition("\n\nCodes:")[0]
    names: dict[str, Any] = {"torch": torch, "rebind": rebind}
    exec(inspect.cleandoc(example), names)  # noqa: S102 - the example of our own docstring
    assert [(group["name"], group["lr"]) for group in names["optimizer"].param_groups] == [
        ("head", 0.1),
        ("body", 0.01),
    ]
