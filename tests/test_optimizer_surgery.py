"""Optimizer state follows its weights: after an edit, training continues bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptkit import plan_param_groups
from ckptkit.errors import CkptkitError, PlanError, RuleError
from ckptkit.optimizer_state.compare import optimizer_state_diff
from ckptkit.optimizer_state.forms import to_dict
from ckptkit.optimizer_state.groups import order_like, resplit
from ckptkit.optimizer_state.model import NamedGroup, OptimizerState
from ckptkit.optimizer_state.naming import to_named
from ckptkit.optimizer_state.pruning import prune
from ckptkit.optimizer_state.remapping import remap
from ckptkit.param_groups.lock import lock_param_groups
from ckptkit.rules.parse import parse_rules
from tests.features import needs_optimizer
from tests.helpers_optim import OPTIMIZERS, Net, same_state, trained

ELEMENTWISE = ["SGD", "AdamW"]
APART: list[dict[str, Any]] = [
    {
        "from": "qkv.{leaf}",
        "to": ["q.{leaf}", "k.{leaf}", "v.{leaf}"],
        "op": {"split": {"dim": 0, "sizes": [4, 4, 4]}},
    },
    {"from": "fc.*", "to": "inner.*"},
]
TOGETHER: list[dict[str, Any]] = [
    {"from": ["q.{leaf}", "k.{leaf}", "v.{leaf}"], "to": "qkv.{leaf}", "op": {"concat": {"dim": 0}}},
    {"from": "inner.*", "to": "fc.*"},
]
GROWN: dict[str, Any] = {"from": "head.weight", "to": "head.weight", "op": {"pad": {"dim": 0, "size": 7}}}


class Apart(nn.Module):
    """The parameters of ``Net`` with its fused matrix in three parts, other names and another order."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(4)


def split_fused(old: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return values with the names of ``Net`` as values with the names of ``Apart``."""
    made = {name.replace("fc.", "inner."): tensor for name, tensor in old.items() if "qkv" not in name}
    for leaf in ("weight", "bias"):
        made |= {f"{name}.{leaf}": part for name, part in zip("qkv", old[f"qkv.{leaf}"].chunk(3), strict=True)}
    return made


def named(model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Return the state by the real names of the parameters."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    return to_named(optimizer.state_dict(), [names[id(p)] for g in optimizer.param_groups for p in g["params"]])


def rules(tables: list[dict[str, Any]]) -> Any:
    return parse_rules(file={"rule": tables})


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_training_goes_on_after_surgery(kind: str) -> None:
    """After a split, renames, reordering and three new groups, the same gradients give the same steps."""
    model, other = Net(), Apart()
    optimizer = trained(model, OPTIMIZERS[kind](model.parameters()))
    other.load_state_dict(split_fused(model.state_dict()))
    parameters = dict(other.named_parameters())
    members = [
        [name for name in parameters if name.startswith(start)]
        for start in (("inner", "head"), ("q", "k", "v"), "norm")
    ]
    state = remap(named(model, optimizer), rules(APART))
    state = resplit(state, [NamedGroup(tuple(names), {}) for names in members])
    resumed = OPTIMIZERS[kind]([{"params": [parameters[name] for name in names]} for names in members])
    resumed.load_state_dict(to_dict(state))
    for step in range(3):
        trained(model, optimizer, 1, seed=step + 1)
        gradients = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
        for name, gradient in split_fused(gradients).items():
            parameters[name].grad = gradient.clone()
        resumed.step()
        expected = split_fused(dict(model.named_parameters()))
        assert all(torch.equal(expected[name], tensor) for name, tensor in parameters.items())


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_steps_are_bit_identical(kind: str) -> None:
    """After renames, reordering and three new groups, each step equals that of an uninterrupted run."""
    model = Net()
    optimizer = trained(model, OPTIMIZERS[kind](model.parameters()))
    twin = copy.deepcopy(model)
    parameters = {name.replace("fc.", "inner."): tensor for name, tensor in twin.named_parameters()}
    names = [["head.bias", "inner.weight"], ["norm.weight", "qkv.weight", "norm.bias"], ["inner.bias", "head.weight"]]
    names[2] += ["qkv.bias"]
    state = remap(named(model, optimizer), ["fc.*=inner.*"])
    state = resplit(state, [NamedGroup(tuple(members), {}) for members in names])
    resumed = OPTIMIZERS[kind]([{"params": [parameters[name] for name in members]} for members in names])
    resumed.load_state_dict(to_dict(state))
    trained(model, optimizer, 3, seed=1)
    trained(twin, resumed, 3, seed=1)
    assert same_state(dict(model.state_dict()), dict(twin.state_dict()))


@given(st.sampled_from(ELEMENTWISE), st.lists(st.integers(0, 2), min_size=8, max_size=8))
@settings(max_examples=10, deadline=None)
def test_a_split_and_a_join_change_nothing(kind: str, deal: list[int]) -> None:
    """A split and a join, and new groups and the old ones again, restore the same state."""
    model = Net()
    before = named(model, trained(model, OPTIMIZERS[kind](model.parameters()), 1))
    split = remap(before, rules(APART))
    members = [[name for name, at in zip(split.names, deal * 2, strict=False) if at == number] for number in range(3)]
    in_groups = resplit(split, [NamedGroup(tuple(names), {}) for names in members if names])
    back = order_like(remap(resplit(in_groups, split), rules(TOGETHER)), model)
    assert same_state(to_dict(back, "param-names"), to_dict(before, "param-names"))


def test_every_slot_moves_like_its_weight() -> None:
    """Rules change each moment like its weight, and copy the step count."""
    model = Net()
    state = named(model, trained(model, OPTIMIZERS["AdamW"](model.parameters())))
    operations = ["transpose", {"pad": {"dim": 1, "size": 7, "fill": "mean"}}]
    made = remap(state, rules([{"from": "fc.weight", "to": "fc.kernel", "op": operations}]))
    for slot in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        old = state.slot(slot)["fc.weight"].read()
        assert torch.equal(made.slot(slot)["fc.kernel"].read(), nn.functional.pad(old.T, (0, 2)))
    assert made.slot("step")["fc.kernel"].read() == 3
    assert "fill=zeros" in " ".join(made.remarks)


def with_another_step(state: OptimizerState) -> OptimizerState:
    """Return the state with another step count for one parameter."""
    old = remap(state, rules(APART)).state
    other = named(model := Net(), trained(model, OPTIMIZERS["AdamW"](model.parameters()), 5))
    changed = {**old, "k.weight": {**old["k.weight"], "step": other.state["qkv.weight"]["step"]}}
    return OptimizerState(changed, (NamedGroup(tuple(old), {"lr": 0.1}),))


def without_one_state(state: OptimizerState) -> OptimizerState:
    old = dict(remap(state, rules(APART)).state)
    del old["k.bias"]
    return OptimizerState(old, (NamedGroup((*old, "k.bias"), {"lr": 0.1}),))


def in_two_groups(state: OptimizerState) -> OptimizerState:
    old = remap(state, rules(APART)).state
    first = NamedGroup(("q.weight", "q.bias"), {"lr": 0.1})
    return OptimizerState(old, (first, NamedGroup(tuple(name for name in old if name not in first.names), {"lr": 1})))


@pytest.mark.parametrize(
    ("prepare", "tables", "message"),
    [
        (None, [{"from": "fc.weight", "to": "fc.weight", "op": {"scale": {"factor": 2.0}}}], "scale computes"),
        (None, [{"from": "fc.weight", "to": "fc.weight", "op": {"cast": {"dtype": "BF16"}}}], "cast computes"),
        (None, [{"from": "fc.*", "to": "head.*"}], "head"),
        (with_another_step, TOGETHER, "'q.weight' with step 3.0 and 'k.weight' with step 5.0"),
        (without_one_state, TOGETHER, "'k.bias' too, which has no step"),
        (in_two_groups, TOGETHER, "groups 0 and 1, which differ in lr"),
    ],
    ids=["scale", "cast", "collision", "steps", "no state", "groups"],
)
def test_what_a_state_cannot_follow(prepare: Any, tables: list[dict[str, Any]], message: str) -> None:
    """A rule that computes values, or would merge different numbers, is refused by name."""
    state = named(model := Net(), trained(model, OPTIMIZERS["AdamW"](model.parameters())))
    with pytest.raises(CkptkitError, match=message):
        remap(state if prepare is None else prepare(state), rules(tables))


@needs_optimizer("Adafactor")
def test_factored_slots_can_only_be_renamed() -> None:
    """Factored slots can be renamed but not split, because the sums of a matrix are not those of its parts."""
    state = named(model := Net(), trained(model, OPTIMIZERS["Adafactor"](model.parameters())))
    with pytest.raises(PlanError, match=r"Adafactor computes each update from the whole parameter"):
        remap(state, rules(APART))
    renamed = remap(state, ["qkv.*=fused.*"])
    assert same_state(to_dict(renamed), to_dict(state))
    assert renamed.names[:2] == ("fused.weight", "fused.bias")


def spec_groups(model: nn.Module, **head: Any) -> Any:
    return plan_param_groups(model, [{"name": "head", "params": "head.*", **head}, {"name": "rest", "rest": True}])


@pytest.mark.parametrize(
    ("hyper", "lr"), [("live", [0.5, 0.01, 1e-8]), ("saved", [0.01, 0.01, 1e-8])], ids=["live", "saved"]
)
def test_options_follow_the_parameters(hyper: Any, lr: list[float]) -> None:
    """A spec splits a group: ``hyper`` chooses its options or the saved ones, and all others are kept."""
    state = named(model := Net(), trained(model, OPTIMIZERS["AdamW"](model.parameters())))
    made = resplit(state, spec_groups(model, lr=0.5, lr_scale=2.0), hyper)
    assert [made.groups[0].options["lr"], made.groups[1].options["lr"], made.groups[0].options["eps"]] == lr
    assert made.groups[0].options["lr_scale"] == 2.0
    assert "lr_scale" not in made.groups[1].options
    OPTIMIZERS["AdamW"]([{"params": model.head.parameters()}, {"params": [*model.parameters()][:6]}]).load_state_dict(
        to_dict(made)
    )


def test_a_lock_restores_its_groups() -> None:
    """The groups of a lock restore by name which parameter trained with which options."""
    spec = [{"name": "head", "params": "head.*", "lr": 0.5}, {"name": "rest", "rest": True, "lr": 0.1}]
    state = named(model := Net(), trained(model, OPTIMIZERS["SGD"](model.parameters())))
    made = resplit(state, lock_param_groups(model, spec))
    assert [(group.names[0], group.options["lr"]) for group in made.groups] == [
        ("head.weight", 0.5),
        ("qkv.weight", 0.1),
    ]


def test_different_values_are_not_merged() -> None:
    """Groups with different lrs merge only if the new group has its own lr; ``error`` refuses any difference."""
    model = Net()
    groups = [{"params": model.head.parameters(), "lr": 0.5}, {"params": [*model.parameters()][:6]}]
    state = named(model, trained(model, OPTIMIZERS["SGD"](groups)))
    hypers: tuple[Any, ...] = ("live", "saved")
    for hyper in hypers:
        with pytest.raises(
            PlanError, match=r"different values of 'lr': 0.5 \(head.weight\), 0.1 \(qkv.weight\)"
        ) as refused:
            resplit(state, [NamedGroup(state.names, {})], hyper)
        assert "its own lr, as a key of the group in its spec" in str(refused.value.hint)
        assert ("--hyper live" in str(refused.value.hint)) == (hyper == "saved")
    assert resplit(state, [NamedGroup(state.names, {"lr": 1.0})]).groups[0].options["lr"] == 1.0
    initial = tuple(NamedGroup(group.names, {**group.options, "initial_lr": 0.5}) for group in state.groups)
    scheduled = replace(state, groups=initial)
    for own, count in (({}, 1), ({"initial_lr": 0.5}, 0)):  # a group that chose its initial_lr needs no remark
        made = resplit(scheduled, [NamedGroup(state.names, {"lr": 1.0, **own})])
        assert (len(made.remarks), made.groups[0].options["initial_lr"]) == (count, 0.5)
    with pytest.raises(PlanError, match=r"'lr' of group 0 was 0.5 in the file and would be 1"):
        resplit(state, [NamedGroup(group.names, {**group.options, "lr": 1.0}) for group in state.groups], "error")
    assert resplit(state, state, "error").groups == state.groups


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [NamedGroup(("head.weight",), {})],
            "'qkv.weight', 'qkv.bias', 'norm.weight', 'norm.bias', 'fc.weight', 'fc.bias', 'head.bias'",
        ),
        ([NamedGroup(("head.weight", "head.weight"), {})], "'head.weight' would be in the groups more than once"),
    ],
)
def test_no_parameter_is_lost_in_new_groups(groups: list[NamedGroup], message: str) -> None:
    """A parameter in no new group, or in two, is refused by name."""
    state = named(model := Net(), trained(model, OPTIMIZERS["SGD"](model.parameters())))
    with pytest.raises(PlanError, match=message):
        resplit(state, groups)


def test_prune_to_a_model() -> None:
    """The state without what a changed model cannot use loads into that model and steps."""
    state = named(model := Net(), trained(model, OPTIMIZERS["AdamW"](model.parameters())))
    other = Net(7)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "head" not in k}, strict=False)
    other.norm.requires_grad_(False)
    made = prune(state, other)
    assert {change.name: change.operation for change in made.changes if change.operation != "copy"} == {
        "norm.weight": "dropped", "norm.bias": "dropped", "head.weight": "reset", "head.bias": "reset"
    }  # fmt: skip
    optimizer = OPTIMIZERS["AdamW"]([tensor for tensor in other.parameters() if tensor.requires_grad])
    optimizer.load_state_dict(to_dict(made))
    trained(other, optimizer, 1)
    steps = {name: float(step.read()) for name, step in named(other, optimizer).slot("step").items()}
    assert steps == {"qkv.weight": 4, "qkv.bias": 4, "fc.weight": 4, "fc.bias": 4, "head.weight": 1, "head.bias": 1}


def test_prune_by_patterns() -> None:
    """Patterns drop parameters or only their state; it is an error to match or to keep nothing."""
    state = named(model := Net(), trained(model, OPTIMIZERS["SGD"](model.parameters())))
    made = prune(state, drop=["head.*"], reset=["fc.*"])
    assert made.names == ("qkv.weight", "qkv.bias", "norm.weight", "norm.bias", "fc.weight", "fc.bias")
    assert list(made.state) == ["qkv.weight", "qkv.bias", "norm.weight", "norm.bias"]
    with pytest.raises(RuleError, match="matches none of 8 parameters"):
        prune(state, drop=["tail.*"])
    with pytest.raises(PlanError, match="no parameter would be left of 8"):
        prune(state, drop=["*"])


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [*model.parameters()][:6], "lr": 0.5}, {"params": [*model.parameters()][6:]}]


def other_two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [*model.parameters()][:2]}, {"params": [*model.parameters()][2:]}]


def two_groups_with_lr_scale(model: nn.Module) -> list[dict[str, Any]]:
    return [{**group, "lr_scale": 2.0} for group in two_groups(model)]


@pytest.mark.parametrize(
    ("groups", "change", "codes"),
    [
        (two_groups, None, []),
        (lambda model: list(model.parameters()), None, ["groups", "membership", "options"]),
        (other_two_groups, None, ["groups", "membership", "options"]),
        (lambda model: [{**g, "params": g["params"][::-1]} for g in two_groups(model)], None, ["order"]),
        (lambda model: [{**g, "lr": 1.0} for g in two_groups(model)], None, ["options", "options"]),
        (two_groups_with_lr_scale, None, ["options-lost"]),
        (two_groups, lambda state: remap(state, ["fc.*=inner.*"]), ["parameters", "parameters"]),
        (two_groups, lambda state: prune(state, reset=["fc.*"]), ["coverage"]),
        (two_groups, lambda state: remap(state, rules([GROWN])), ["shape"]),
    ],
    ids=["same", "one group", "other groups", "order", "lr", "lr_scale", "names", "no state", "shape"],
)
def test_the_effects_of_loading_are_found(groups: Any, change: Any, codes: list[str]) -> None:
    """The comparison finds, by name, what torch would refuse, change silently, or delete."""
    saved = named(model := Net(), trained(model, OPTIMIZERS["SGD"](two_groups(model))))
    live = named(other := Net(), trained(other, OPTIMIZERS["SGD"](groups(other))))
    report = optimizer_state_diff(saved if change is None else change(saved), live)
    assert [finding.code for finding in report.findings] == [f"optim.{code}" for code in codes]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), "the live state momentum_buffer"),
        (lambda groups: torch.optim.SGD(groups, lr=0.1), "only the live ones momentum, dampening, nesterov"),
        (torch.optim.NAdam, "only the live ones momentum_decay"),
        (torch.optim.Adamax, "the live state step, exp_avg, exp_inf"),
        (torch.optim.AdamW, ""),
        (lambda groups: torch.optim.Adam(groups, amsgrad=True), ""),
    ],
    ids=["SGD", "SGD without momentum", "NAdam", "Adamax", "AdamW", "amsgrad"],
)
def test_the_state_of_another_class_is_an_error(other: Any, told: str) -> None:
    """torch loads the state of another class without a word, so the comparison tells it by slots and options."""
    saved = named(model := Net(), trained(model, torch.optim.Adam(model.parameters())))
    live = named(model := Net(), trained(model, other(model.parameters())))
    found = [finding.message for finding in optimizer_state_diff(saved, live).findings if finding.code == "optim.class"]
    assert len(found) == bool(told)
    assert told in "".join(found)


def test_options_that_scripts_add_do_not_tell_another_class() -> None:
    """A new optimizer has no slots yet, and a script that changed keeps options of other names in its groups."""
    model = Net()
    saved = named(model, torch.optim.AdamW([{"params": [*model.parameters()], "their_own": 1}]))
    for kind, is_other in ((torch.optim.AdamW, False), (torch.optim.SGD, True)):
        live = named(model, kind([{"params": [*model.parameters()], "of_today": 1}]))
        report = optimizer_state_diff(saved, live)
        codes = {finding.code for finding in report.findings}
        assert ("optim.class" in codes, "optim.options-lost" in codes) == (is_other, not is_other)


def test_each_way_of_a_parameter_between_groups_is_told() -> None:
    """Two groups that change places are two findings, each with its own parameters."""
    saved = named(model := Net(), trained(model, OPTIMIZERS["SGD"](two_groups(model))))
    live = named(other := Net(), trained(other, OPTIMIZERS["SGD"](two_groups(other)[::-1])))
    sizes = [len(group["params"]) for group in two_groups(model)]
    told = [found.message for found in optimizer_state_diff(saved, live).findings if found.code == "optim.membership"]
    ways = [text.partition(": ")[2] for text in told]
    assert ways == ["saved in group 1, now in group 0", "saved in group 0, now in group 1"]
    assert [text.count("'") // 2 for text in told] == sizes[::-1]


def test_a_rate_that_a_scheduler_moved_is_no_finding_and_is_named() -> None:
    """Two states of one run with a schedule agree, but not in the rate, and the report does not say that it agrees."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    first = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    scheduler.step()
    report = optimizer_state_diff(first, optimizer.state_dict(), names=model)
    assert report.findings == ()
    assert str(report) == "groups, options (but lr, which a scheduler set) and shapes agree; values were not compared"


def test_values_of_slots_are_compared_by_parameter_name() -> None:
    """With values, the comparison names the slot and the parameter whose tensor changed, and by how much."""
    model = Net()
    live = trained(model, torch.optim.Adam(model.parameters())).state_dict()
    saved = copy.deepcopy(live)
    name, position = "fc.weight", [one for one, _ in model.named_parameters()].index("fc.weight")
    moment = saved["state"][position]["exp_avg"]
    moment *= 2
    saved["state"][position]["step"] = saved["state"][position]["step"] + 1
    assert optimizer_state_diff(saved, live, names=model).findings == ()
    report = optimizer_state_diff(saved, live, names=model, values=True)
    assert [(one.code, one.severity, one.key) for one in report.findings] == [("optim.values", "warning", name)] * 2
    by_slot = {one.message: one.hint for one in report.findings}
    assert by_slot[f"loading changes exp_avg of '{name}'"] == (
        f"the largest change is that of '{name}', 1 relative to its norm"
    )
    assert f"loading changes step of '{name}'" in by_slot
    same = optimizer_state_diff(live, copy.deepcopy(live), names=model, values=True)
    tensors = sum(len(slots) for slots in live["state"].values())
    assert same.proved.endswith(f"and so do the values of {tensors} tensors")
    del saved["state"][position]["exp_avg"]
    lost = optimizer_state_diff(saved, live, names=model, values=True).findings
    assert f"only the live state has exp_avg of '{name}'" in [one.message for one in lost]


ELEMENTWISE_OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "AdamW": torch.optim.AdamW,
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, initial_accumulator_value=0.5),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.9, centered=True),
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=0.02),
}


@pytest.mark.parametrize("kind", ELEMENTWISE_OPTIMIZERS)
def test_new_rows_start_like_those_of_a_new_parameter(kind: str) -> None:
    """New rows start as torch does: with ``initial_accumulator_value`` for Adagrad, with ``lr`` for Rprop."""
    model = Net()
    state = named(model, trained(model, ELEMENTWISE_OPTIMIZERS[kind](model.parameters())))
    rows, columns = model.head.weight.shape
    fresh = nn.Parameter(torch.ones(2, columns))
    optimizer = ELEMENTWISE_OPTIMIZERS[kind]([fresh])
    fresh.grad = torch.zeros_like(fresh)
    optimizer.step()
    pad = {"from": "head.weight", "to": "head.weight", "op": {"pad": {"size": rows + 2}}}
    grown = remap(state, rules([pad]))
    elementwise = {slot: value for slot, value in optimizer.state[fresh].items() if value.shape == fresh.shape}
    assert elementwise
    for slot, value in elementwise.items():
        assert torch.equal(grown.slot(slot)["head.weight"].read()[rows:], value)
        assert torch.equal(grown.slot(slot)["head.weight"].read()[:rows], state.slot(slot)["head.weight"].read())


@pytest.mark.parametrize(
    "ask",
    [
        lambda _: remap(None, ["a=b"]),  # type: ignore[arg-type]
        lambda state: remap(to_dict(state), ["a=b"]),  # type: ignore[arg-type]
        lambda state: prune(to_dict(state)),  # type: ignore[arg-type]
        lambda state: prune(state, drop=[5]),  # type: ignore[list-item]
        lambda state: prune(state, reset=None),  # type: ignore[arg-type]
        lambda state: prune(state, 5),  # type: ignore[arg-type]
        lambda state: resplit(state, None),  # type: ignore[arg-type]
        lambda state: resplit(state, [{"params": list(state.names)}]),  # type: ignore[list-item]
        lambda state: resplit(state, {"group": [{"rest": True}]}),  # type: ignore[dict-item]
        lambda state: order_like(state, None),  # type: ignore[arg-type]
        lambda state: order_like(to_dict(state), Net()),  # type: ignore[arg-type]
        lambda state: to_dict(state, None),  # type: ignore[arg-type]
        to_dict,
    ],
)
def test_a_wrong_argument_is_refused(ask: Any) -> None:
    """An argument of another type raises an error of ckptkit, not one from inside the code."""
    model = Net()
    state = named(model, trained(model, OPTIMIZERS["AdamW"](model.parameters()), 1))
    with pytest.raises(CkptkitError):
        ask(to_dict(state) if ask is to_dict else state)


def test_one_pattern_can_be_a_string() -> None:
    model = Net()
    state = named(model, trained(model, OPTIMIZERS["AdamW"](model.parameters()), 1))
    assert prune(state, drop="head.*").names == prune(state, drop=["head.*"]).names
