"""Unusual optimizers, unusual files and wrong arguments are refused with a clear error, or loaded unchanged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import load_optimizer_state
from ckptkit.errors import CkptkitError, FormatError, GroupsError, PlanError
from ckptkit.optimizer_state.groups import resplit
from ckptkit.optimizer_state.model import NamedGroup
from ckptkit.optimizer_state.naming import to_named
from ckptkit.param_groups.plan import plan_param_groups
from tests.features import needs_option


class Odd(torch.optim.Optimizer):
    """An optimizer whose step keeps for each parameter the result of ``make``."""

    def __init__(self, params: Any, make: Callable[[torch.Tensor], dict[Any, Any]]) -> None:
        self.make = make
        super().__init__(params, {"lr": 0.1})

    def step(self, *_: Any) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self.make(parameter)


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def stepped(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1, **options)
    step(model, optimizer)
    return optimizer


MISTAKES: dict[str, dict[str, Any]] = {
    "no-optimizer": {"optimizer": None},
    "class": {"optimizer": torch.optim.AdamW},
    "groups": {"optimizer": [{"params": []}]},
    "no-model": {"model": None},
    "no-state": {"state": None},
    "empty-state": {"state": {}},
    "path": {"state": "run.pt"},
    "rules-number": {"rules": 5},
    "rules-of-numbers": {"rules": [5]},
    "rules-text": {"rules": "a=b"},
    "names-number": {"names": 5},
    "names-of-none": {"names": [None] * 4},
    "hyper-list": {"hyper": ["live"]},
    "policy-none": {"on_missing": None},
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_argument_is_refused(mistake: dict[str, Any]) -> None:
    """An argument of another type raises an error of ckptkit, not one from inside the code."""
    model = net()
    optimizer = stepped(model)
    given: dict[str, Any] = {"optimizer": optimizer, "model": model, "state": optimizer.state_dict(), **mistake}
    with pytest.raises(CkptkitError):
        load_optimizer_state(given.pop("optimizer"), given.pop("model"), given.pop("state"), **given)


def test_a_value_that_is_not_a_number_is_loaded() -> None:
    """A NaN is loaded like any other value, although it is not equal to itself."""
    model = net()
    old, new = (Odd(model.named_parameters(), lambda _: {"loss": math.nan}) for _ in range(2))
    old.step()
    load_optimizer_state(new, model, old.state_dict())
    assert all(math.isnan(slots["loss"]) for slots in new.state.values())
    assert len(new.state) == 4


@pytest.mark.parametrize("key", [None, ("a", 1)], ids=repr)
def test_a_slot_name_that_is_not_a_string_is_refused(key: Any) -> None:
    """A slot name that is not a string is refused, unless it is an integer."""
    model = net()
    optimizer = Odd(model.named_parameters(), lambda tensor: {key: torch.zeros_like(tensor)})
    optimizer.step()
    with pytest.raises(FormatError, match=r"has a slot named .*, which is not a string"):
        load_optimizer_state(optimizer, model, optimizer.state_dict())
    saved = stepped(model).state_dict()
    saved["param_groups"][0][0] = 1.0
    with pytest.raises(FormatError, match="an option named 0, which is not a string"):
        to_named(saved)


def test_state_that_the_file_does_not_have_is_kept() -> None:
    """State that the file does not have keeps its values and dtype, which torch would cast."""
    model = net().bfloat16()
    optimizer = Odd(model.named_parameters(), lambda tensor: {"master": torch.full_like(tensor, 1 / 3).double()})
    optimizer.step()
    own = optimizer.state[model[0].bias]["master"]
    optimizer.state["of all"] = {"count": 3}  # type: ignore[index]
    saved = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    saved["state"] = {0: {"master": torch.ones(4, 3)}}
    report = load_optimizer_state(optimizer, model, saved)
    assert report.missing == ("0.bias", "1.weight", "1.bias")
    assert optimizer.state[model[0].bias]["master"] is own
    assert own.dtype == torch.float64
    assert optimizer.state["of all"] == {"count": 3}  # type: ignore[index]


def test_state_of_no_group_is_reported_as_unused() -> None:
    model = net()
    optimizer = stepped(model)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][99] = {"exp_avg": torch.ones(3)}
    report = load_optimizer_state(optimizer, model, saved)
    assert report.unused == ("99",)
    assert [finding.code for finding in report.findings] == ["optim.unused"]


@pytest.mark.parametrize("value", [3.0, "x", [1]], ids=repr)
def test_a_slot_that_must_be_a_tensor_is_refused(value: Any) -> None:
    model = net()
    optimizer = stepped(model)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = value
    with pytest.raises(PlanError, match=r"'0.weight' has a \w+ as its exp_avg, but AdamW keeps a tensor there"):
        load_optimizer_state(optimizer, model, saved)
    saved["state"][0]["exp_avg"], saved["state"][0]["step"] = torch.zeros(4, 3), [1]
    with pytest.raises(PlanError, match="has a list as its step"):
        load_optimizer_state(optimizer, model, saved)


def test_a_step_count_may_be_a_tensor_of_one_element() -> None:
    """A step of shape [1] loads and trains, as ``validate_param_groups`` says."""
    model = net()
    optimizer = stepped(model)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.tensor([3.0])
    assert load_optimizer_state(optimizer, model, saved).loaded == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert optimizer.state[model[0].weight]["step"].item() == 3
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"].item() == 4


def test_a_file_without_state_is_refused() -> None:
    model = net()
    fresh = torch.optim.AdamW(model.named_parameters()).state_dict()
    with pytest.raises(PlanError, match="the file has groups but no state") as caught:
        load_optimizer_state(stepped(model), model, fresh)
    assert caught.value.hint == "it was saved before the first step, so start without it"


@pytest.mark.parametrize("when", ["before", "after"])
def test_changes_of_a_failed_hook_are_undone(when: str) -> None:
    """Changes that a hook made to groups and state before it failed are undone."""
    model = net()
    optimizer = stepped(model)
    saved = copy.deepcopy(optimizer.state_dict())
    groups, state = optimizer.param_groups, optimizer.state
    group, slots = groups[0], dict(state[model[0].weight])

    def fail(hooked: Any, *_: Any) -> None:
        hooked.param_groups[0]["lr"] = 99.0
        hooked.state.clear()
        group["lr"] = 98.0
        raise ValueError("no more\nof this")

    if when == "before":
        optimizer.register_load_state_dict_pre_hook(fail)
    else:
        optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(GroupsError, match=r"load_state_dict failed: no more of this"):
        load_optimizer_state(optimizer, model, saved)
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert groups[0] is group
    assert group["lr"] == 0.1
    assert all(state[model[0].weight][slot] is value for slot, value in slots.items())


@pytest.mark.parametrize("hyper", ["saved", "error"])
def test_groups_keep_their_names(hyper: Any) -> None:
    """The names of groups do not stop a load, and are not loaded."""
    model = net()
    apart = [
        {"params": list(part.named_parameters(prefix=str(n))), "name": f"part {n}"} for n, part in enumerate(model)
    ]
    whole = [{"params": list(model.named_parameters()), "name": "all"}]
    for before, after in ((apart, whole), (whole, apart)):
        old = torch.optim.AdamW(copy.copy(before))
        step(model, old)
        new = torch.optim.AdamW(after)
        load_optimizer_state(new, model, old.state_dict(), hyper=hyper)
        assert [group["name"] for group in new.param_groups] == [group["name"] for group in after]


def test_new_groups_get_the_names_of_their_spec() -> None:
    model = net()
    old = torch.optim.AdamW([{"params": list(model.named_parameters()), "name": "all"}])
    spec = {"defaults": {"lr": 0.1}, "group": [{"name": "head", "params": "1.*"}, {"name": "base", "rest": True}]}
    state = to_named(old.state_dict())
    assert [g.options["name"] for g in resplit(state, plan_param_groups(model, spec)).groups] == ["head", "base"]
    apart = resplit(state, [NamedGroup(("0.weight",), {"name": "a"}), NamedGroup(state.names[1:], {"name": "b"})])
    assert "name" not in resplit(apart, [NamedGroup(state.names, {})]).groups[0].options


def test_an_lr_is_loaded_as_the_number_that_the_optimizer_has() -> None:
    """A tensor lr of the file is loaded as a number, because ``foreach`` needs one."""
    model = net()
    saved = stepped(model, foreach=False).state_dict()
    saved["param_groups"][0] |= {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.5), torch.tensor(0.75))}
    other = torch.optim.AdamW(model.named_parameters(), lr=0.1, betas=(0.5, 0.75), foreach=True)
    load_optimizer_state(other, model, saved, hyper="error")  # 0.1 is what 32 bits hold of it
    assert other.param_groups[0]["lr"] == pytest.approx(0.1)
    assert isinstance(other.param_groups[0]["lr"], float)
    assert other.param_groups[0]["betas"] == (0.5, 0.75)
    step(model, other)
    live = torch.optim.AdamW(model.named_parameters(), lr=torch.tensor(0.1), betas=(0.5, 0.75), foreach=False)
    load_optimizer_state(live, model, saved, hyper="error")
    live.param_groups[0]["lr"].fill_(0.5)
    with pytest.raises(PlanError, match=r"'lr' of group 0 was 0\.1 in the file and would be 0\.5"):
        load_optimizer_state(live, model, saved, hyper="error")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@needs_option("Adam", "decoupled_weight_decay")
def test_an_old_file_of_adam_or_adamw_is_noted(kind: Any) -> None:
    """A note tells that an old file can be from Adam or from AdamW, because both wrote the same keys."""
    model = net()
    saved = stepped(model, weight_decay=0.1).state_dict()
    del saved["param_groups"][0]["decoupled_weight_decay"]
    report = load_optimizer_state(kind(model.named_parameters()), model, saved)
    assert [(one.code, one.severity) for one in report.findings] == [("optim.decay-untold", "note")]
    saved["param_groups"][0]["weight_decay"] = 0.0
    assert load_optimizer_state(kind(model.named_parameters()), model, saved).findings == ()
