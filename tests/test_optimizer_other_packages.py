"""Optimizers of other packages are loaded as torch loads them: here small ones with the same traits.

The sweep over the packages themselves is in ``tests/oracles/test_third_party_optimizers.py``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import load_optimizer_state, open_optimizer, preflight, validate_param_groups
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.forms import to_dict
from ckptkit.optimizer_state.naming import to_named
from ckptkit.optimizer_state.remapping import remap
from ckptkit.optimizer_state.write import write_optimizer_state
from ckptkit.plans.output import Output


class Base(torch.optim.Optimizer):
    """Signed momentum, with a method for each trait that a subclass has."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"lr": 0.01, "beta": 0.9, **defaults})

    def pairs(self) -> Iterator[tuple[dict[str, Any], Any]]:
        for group in self.param_groups:
            yield from ((group, one) for one in group["params"] if one.grad is not None)

    def step(self, *_: Any) -> None:  # type: ignore[override]
        for group, parameter in self.pairs():
            self.update(group, parameter, self.state[parameter])

    def update(self, group: dict[str, Any], parameter: Any, state: dict[str, Any]) -> None:
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        mean.lerp_(parameter.grad, 1 - group["beta"])
        parameter.data.sub_(mean, alpha=group["lr"])


class Lookahead(Base):
    """Ranger21: a count beside ``state`` decides when the slow weights are mixed in."""

    count = 0

    def step(self, *_: Any) -> None:  # type: ignore[override]
        super().step()
        self.count += 1
        due = [pair[1] for pair in self.pairs()] if self.count % 3 == 0 else []
        for parameter in due:
            slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
            parameter.data.copy_(slow.lerp_(parameter.data, 0.5))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lookahead": self.count, "history": {"counts": [self.count]}}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.count = state_dict["lookahead"]
        assert state_dict["history"] == {"counts": [self.count]}


class StepInState(Base):
    """A count of all parameters, in ``state`` under a string."""

    def step(self, *_: Any) -> None:  # type: ignore[override]
        state: Any = self.state
        state["count"] = state.get("count", 0) + 1
        state["of all"] = {"norm": torch.tensor(float(state["count"]))}
        super().step()

    def update(self, group: dict[str, Any], parameter: Any, state: dict[str, Any]) -> None:
        super().update(group, parameter, state)
        own: Any = self.state
        parameter.data.mul_(1 - 0.01 * own["of all"]["norm"] / own["count"] ** 2)


class Stateless(Base):
    """Fromage: an empty dict for each parameter."""

    def update(self, group: dict[str, Any], parameter: Any, state: dict[str, Any]) -> None:
        assert not state
        parameter.data.sub_(parameter.grad.sign(), alpha=group["lr"])


class NoState(Stateless):
    """Sign descent: no entry at all."""

    def step(self, *_: Any) -> None:  # type: ignore[override]
        for group, parameter in self.pairs():
            self.update(group, parameter, {})


class MatricesOnly(Base):
    """State for matrices alone."""

    def step(self, *_: Any) -> None:  # type: ignore[override]
        for group, parameter in self.pairs():
            if parameter.ndim > 1:
                self.update(group, parameter, self.state[parameter])
            else:
                parameter.data.sub_(parameter.grad, alpha=group["lr"])


class CodeBook(Base):
    """bitsandbytes: 8-bit codes and one table for all parameters; a ``state_dict()`` that wraps both."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.table = torch.linspace(-1, 1, 256)

    def update(self, group: dict[str, Any], parameter: Any, state: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, code=torch.full_like(parameter, 127, dtype=torch.uint8), table=self.table)
            state["scale"] = torch.zeros(1)
        state["step"] += 1
        mean = state["table"][state["code"].long()] * state["scale"]
        mean.lerp_(parameter.grad, 1 - group["beta"])
        state["scale"] = mean.abs().max().reshape(1)
        state["code"] = torch.bucketize(mean / state["scale"], state["table"]).clamp(max=255).to(torch.uint8)
        parameter.data.sub_(mean.sign(), alpha=group["lr"])

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        wrapped = {
            key: {"step": slots["step"], "__quant__": {name: slots[name] for name in ("code", "table", "scale")}}
            for key, slots in saved["state"].items()
        }
        return {**saved, "state": wrapped}

    def load_state_dict(self, state_dict: Any) -> None:
        saved = copy.deepcopy(state_dict["state"])
        state = {key: {"step": slots["step"], **slots["__quant__"]} for key, slots in saved.items()}
        codes = {key: slots["code"] for key, slots in state.items()}
        super().load_state_dict({**state_dict, "state": state})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, code in codes.items():  # torch casts the codes to the dtype of the parameter
            self.state[parameters[key]]["code"] = code


class TwoKinds(Base):
    """Muon with auxiliary Adam: the groups have different options."""

    def __init__(self, params: Any) -> None:
        named = list(params)
        matrices = [pair for pair in named if pair[1].ndim > 1]
        others = [pair for pair in named if pair[1].ndim < 2]
        first = {"params": matrices, "lr": 0.02, "momentum": 0.95, "use_muon": True}
        second = {"params": others, "lr": 0.003, "betas": (0.9, 0.95), "eps": 1e-10, "use_muon": False}
        torch.optim.Optimizer.__init__(self, [first, second], {})

    def update(self, group: dict[str, Any], parameter: Any, state: dict[str, Any]) -> None:
        beta = group["momentum"] if group["use_muon"] else group["betas"][0]
        super().update({**group, "beta": beta}, parameter, state)


class Numbered(Base):
    """heavyball: the slots of each parameter are under numbers, and a count of elements is in the group."""

    def update(self, group: dict[str, Any], parameter: Any, state: dict[Any, Any]) -> None:
        group["betas"] = parameter.numel()
        super().update(group, parameter, state.setdefault(0, {}))


class Factored(Base):
    """Nero: a slot with a well-known name has one number for each row of a matrix; Amos keeps a single one."""

    def update(self, group: dict[str, Any], parameter: Any, state: dict[str, Any]) -> None:
        square = parameter.grad.square()
        square = square.mean(1, keepdim=True) if parameter.ndim > 1 else square.mean()
        mean = state.setdefault("exp_avg_sq", torch.zeros_like(square))
        mean.lerp_(square, 1 - group["beta"])
        parameter.data.sub_(parameter.grad / (mean.sqrt() + 1), alpha=group["lr"])


class Dtyped(Base):
    """ROSE: a dtype among the options; DAdaptAdan: a number that becomes a tensor with the first step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, compute=torch.float64, growth=0.1)

    def update(self, group: dict[str, Any], parameter: Any, state: dict[str, Any]) -> None:
        super().update(group, parameter, state)
        group["growth"] = torch.as_tensor(group["growth"], dtype=torch.float32) * 1.1
        parameter.data.mul_(torch.tensor(0.99, dtype=group["compute"]) + group["growth"] / 1000)


KINDS: dict[str, Callable[[Any], Any]] = {
    kind.__name__: kind
    for kind in (
        *(Lookahead, StepInState, Stateless, NoState, MatricesOnly, CodeBook, TwoKinds),
        *(Numbered, Factored, Dtyped),
    )
}


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    for number in range(steps):
        data = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()


def is_same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


# The options of Dtyped change with each step, so they must be those of the file.
RUNS = [(kind, hyper) for kind in KINDS for hyper in ("saved", "live", "error") if hyper == "saved" or kind != "Dtyped"]


@pytest.mark.parametrize(("kind", "hyper"), RUNS)
def test_training_goes_on_to_the_last_bit(kind: str, hyper: Any, tmp_path: Path) -> None:
    """As after torch's own load, and as in the uninterrupted run; live, from a file, and through an edited file."""
    model = net()
    optimizer = KINDS[kind](model.named_parameters())
    train(model, optimizer)
    assert not validate_param_groups(model, optimizer).findings
    saved = copy.deepcopy(optimizer.state_dict())
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "run.pt")
    loads: list[Callable[[Any, Any], Any]] = [
        lambda fresh, _: fresh.load_state_dict(copy.deepcopy(saved)),
        lambda fresh, other: load_optimizer_state(fresh, other, saved, hyper=hyper),
    ]
    if hyper == "saved":
        with open_optimizer(tmp_path / "run.pt") as source:
            edited = remap(to_named(source, model), None)
            write_optimizer_state(edited, Output(str(tmp_path / "copy.pt"), "torch"), source)
            if kind != "Dtyped":  # only a copy of the file keeps a dtype
                write_optimizer_state(edited, Output(str(tmp_path / "alone.pt"), "torch", only_tensors=True), source)
            as_dict = to_dict(edited)
        loads.append(lambda fresh, _: fresh.load_state_dict(as_dict))
        loads += [functools.partial(load_file, path) for path in tmp_path.iterdir()]
    others = []
    for load in loads:
        other = copy.deepcopy(model)
        fresh = KINDS[kind](other.named_parameters())
        report = load(fresh, other)
        assert report is None or {finding.severity for finding in report.findings} <= {"note"}
        assert not validate_param_groups(other, fresh).findings
        others.append((other, fresh))
    train(model, optimizer)
    for other, fresh in others:
        train(other, fresh)
        assert is_same(model, other)


def load_file(path: Path, optimizer: Any, model: nn.Module) -> Any:
    with open_optimizer(path) as source:
        return load_optimizer_state(optimizer, model, source)


def trained(kind: Callable[[Any], Any]) -> tuple[Any, Any]:
    model = net()
    optimizer = kind(model.named_parameters())
    train(model, optimizer)
    return model, optimizer


def with_hooks(params: Any) -> Any:
    """Return an AdamW whose hooks keep a value beside ``state``."""
    optimizer: Any = torch.optim.AdamW(params)
    optimizer.extra = 0

    def save(one: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "extra": one.extra}

    def load(one: Any, state_dict: dict[str, Any]) -> None:
        one.extra = state_dict.get("extra", -1)

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    return optimizer


@pytest.mark.parametrize("value", [7, 2.5, None, [1, (2, "a")], {"a": {0: 1}}], ids=str)
def test_hooks_get_every_key(value: Any, tmp_path: Path) -> None:
    model, optimizer = trained(with_hooks)
    optimizer.extra = value
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    for source in (optimizer.state_dict(), None):
        fresh = with_hooks(model.named_parameters())
        report = (
            load_file(tmp_path / "o.pt", fresh, model) if source is None else load_optimizer_state(fresh, model, source)
        )
        assert fresh.extra == value
        assert not report.findings


def test_hooks_get_tensors_in_memory_of_their_own() -> None:
    model, optimizer = trained(with_hooks)
    optimizer.extra = {"mean": torch.arange(6.0).reshape(2, 3).t()}
    fresh = with_hooks(model.named_parameters())
    load_optimizer_state(fresh, model, optimizer.state_dict())
    assert torch.equal(fresh.extra["mean"], optimizer.extra["mean"])
    assert fresh.extra["mean"].stride() == (1, 3)
    assert fresh.extra["mean"].data_ptr() != optimizer.extra["mean"].data_ptr()
    other = with_hooks(list(model.named_parameters())[::-1])
    with pytest.raises(PlanError, match="the state has tensors in 'extra', which can be by position"):
        load_optimizer_state(other, model, optimizer.state_dict())


def test_a_key_that_nobody_reads_is_named() -> None:
    """Plain torch drops it in silence."""
    model, optimizer = trained(with_hooks)
    plain = torch.optim.AdamW(model.named_parameters())
    report = load_optimizer_state(plain, model, optimizer.state_dict())
    (found,) = report.findings
    assert (found.code, found.severity, found.key) == ("optim.key-unread", "warning", "extra")
    fresh = torch.optim.AdamW(model.named_parameters())
    with pytest.raises(PlanError, match="the state has 'extra', which the optimizer does not have"):
        load_optimizer_state(fresh, model, optimizer.state_dict(), on_unexpected="error")
    assert not fresh.state
    state = to_named(optimizer.state_dict())
    assert "'extra'" in state.remarks[0]
    with pytest.raises(PlanError, match="the flattened form has no place for 'extra'"):
        to_dict(state, "flattened")
    assert to_dict(state, "named")["extra"] == 0


def test_a_hook_that_loses_a_value_is_named() -> None:
    model, optimizer = trained(with_hooks)
    optimizer.extra = 5
    fresh = with_hooks(model.named_parameters())
    fresh.register_load_state_dict_post_hook(lambda one: setattr(one, "extra", 1))
    (found,) = load_optimizer_state(fresh, model, optimizer.state_dict()).findings
    assert (found.code, found.severity) == ("optim.key-unread", "warning")


def test_a_file_without_state_loads_the_options() -> None:
    """A class of torch that keeps state is refused: the file was saved before the first step."""
    model, optimizer = trained(NoState)
    optimizer.param_groups[0]["lr"] = 0.5
    fresh = NoState(model.named_parameters())
    (found,) = load_optimizer_state(fresh, model, optimizer.state_dict()).findings
    assert (found.code, found.severity, fresh.param_groups[0]["lr"]) == ("optim.options-only", "note", 0.5)
    adam = torch.optim.Adam(model.named_parameters())
    with pytest.raises(PlanError, match="the file has groups but no state"):
        load_optimizer_state(torch.optim.Adam(model.named_parameters()), model, adam.state_dict())


def test_shared_state_that_a_step_changes_is_still_an_error() -> None:
    """A table for all parameters is none; one step count or one moment for two parameters is."""
    for slot in ("step", "code", "scale"):
        model, optimizer = trained(CodeBook)
        shared = torch.tensor(3.0) if slot == "step" else None
        first, last = (optimizer.state[parameter] for parameter in (model[0].bias, model[1].bias))
        first[slot] = last[slot] if shared is None else shared
        last[slot] = first[slot]
        assert [f.code for f in validate_param_groups(model, optimizer).findings] == ["groups.state-shared"], slot


def test_groups_with_other_options_are_merged_by_their_members() -> None:
    """An option that only another group has is neither asked for nor added; a real conflict is an error."""
    model, optimizer = trained(TwoKinds)
    saved = optimizer.state_dict()
    other = copy.deepcopy(model)
    third = other[2].weight
    fresh = TwoKinds([pair for pair in other.named_parameters() if pair[1] is not third])
    fresh.add_param_group({"params": [("2.weight", third)], "lr": 1.0, "momentum": 0.1, "use_muon": True})
    load_optimizer_state(fresh, other, saved)
    options = [{key: value for key, value in group.items() if "param" not in key} for group in fresh.param_groups]
    assert options[2] == options[0] == {"lr": 0.02, "momentum": 0.95, "use_muon": True}
    assert set(options[1]) == {"lr", "betas", "eps", "use_muon"}
    one_group = Base(other.named_parameters())
    with pytest.raises(PlanError, match="had different values of 'lr'"):
        load_optimizer_state(one_group, other, saved)


@pytest.mark.parametrize("kind", [Lookahead, TwoKinds, CodeBook, StepInState])
def test_preflight_accepts_the_resume(kind: Any) -> None:
    model, optimizer = trained(kind)
    other = copy.deepcopy(model)
    report = preflight(
        other,
        optimizer=kind(other.named_parameters()),
        resume=model.state_dict(),
        resume_optimizer=optimizer.state_dict(),
    )
    assert {finding.severity for finding in report.findings} <= {"note"}, str(report)


class Wrapper:
    """A wrapper that keeps slow weights of its own beside the state of the optimizer inside."""

    def __init__(self, optimizer: Any, *, has_own_state: bool) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state
        self.has_own_state = has_own_state

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = self.optimizer.state_dict()
        return {"base": saved, "slow": []} if self.has_own_state else saved


def test_a_wrapper_with_state_of_its_own_is_refused() -> None:
    """The wrappers of accelerate and others save what the optimizer inside saves, so they are loaded."""
    model, optimizer = trained(Base)
    fresh: Any = Wrapper(Base(model.named_parameters()), has_own_state=True)
    with pytest.raises(PlanError, match="Wrapper keeps state of its own around Base"):
        load_optimizer_state(fresh, model, optimizer.state_dict())
    fresh = Wrapper(Base(model.named_parameters()), has_own_state=False)
    assert load_optimizer_state(fresh, model, optimizer.state_dict()).loaded


def test_state_of_another_size_is_refused_for_an_unknown_class() -> None:
    """Only a class that keeps less than one number for each element of most matrices can have other shapes."""
    for kind in (Factored, Base):
        model, optimizer = trained(kind)
        saved = optimizer.state_dict()
        slot = next(iter(saved["state"][0]))
        if kind is Base:
            for slots in saved["state"].values():
                slots["exp_avg"] = slots.pop(slot)
            slot = "exp_avg"
        saved["state"][0][slot] = torch.zeros(5, 4)
        with pytest.raises(PlanError, match=r"the state of '0\.weight' has shape \(5, 4\)"):
            load_optimizer_state(kind(model.named_parameters()), model, saved)


def test_an_option_that_the_class_sets_is_no_typo_and_a_typo_is() -> None:
    model, optimizer = trained(Numbered)
    assert not validate_param_groups(model, optimizer).findings
    optimizer.param_groups[0]["betaa"] = 1
    assert [found.code for found in validate_param_groups(model, optimizer).findings] == ["groups.option-unread"]


def test_a_tensor_that_is_made_of_others_is_copied() -> None:
    """torchao keeps 8-bit state in such tensors; a live state can have them, and a file is refused by name."""
    from torch.testing._internal import two_tensor

    TwoTensor: Any = two_tensor.TwoTensor  # noqa: N806 - a class

    model, optimizer = trained(NoState)
    for number, parameter in enumerate(model.parameters()):
        first, second = torch.full_like(parameter, number), torch.full_like(parameter, -number)
        optimizer.state[parameter]["mean"] = TwoTensor(first.detach(), second.detach())
    fresh = NoState(model.named_parameters())
    load_optimizer_state(fresh, model, optimizer.state_dict())
    for parameter in model.parameters():
        ours, theirs = fresh.state[parameter]["mean"], optimizer.state[parameter]["mean"]
        assert type(ours) is TwoTensor
        assert torch.equal(ours.a, theirs.a)
        assert torch.equal(ours.b, theirs.b)
        assert ours.a.data_ptr() != theirs.a.data_ptr()


def test_values_under_tensors_are_refused() -> None:
    """TRAC keeps the first weights under the parameters themselves, which another process does not have."""
    model, optimizer = trained(with_hooks)
    optimizer.extra = dict.fromkeys(model.parameters(), 1.0)
    with pytest.raises(PlanError, match="the state has tensors as the keys of 'extra'"):
        load_optimizer_state(with_hooks(model.named_parameters()), model, optimizer.state_dict())


def test_a_wrapper_that_writes_into_the_state_of_its_optimizer_is_refused() -> None:
    """Only the wrapper knows what its values in the state belong to; a fresh wrapper has not written them yet."""
    model, optimizer = trained(Base)
    saved = optimizer.state_dict()
    saved["state"] = {**saved["state"], "reference": {0: torch.zeros(2)}}
    fresh: Any = Wrapper(Base(model.named_parameters()), has_own_state=False)
    with pytest.raises(PlanError, match="Wrapper keeps state of its own around Base"):
        load_optimizer_state(fresh, model, saved)
