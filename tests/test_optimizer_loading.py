"""Optimizer state is loaded by name: training continues to the last bit, or the load is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from ckptkit import OptimizerLoadReport, load_optimizer_state, open_checkpoint, validate_param_groups
from ckptkit.core.text import listed
from ckptkit.errors import ArgumentError, FormatError, GroupsError, PlanError, RuleError
from ckptkit.optimizer_state.naming import to_named
from ckptkit.optimizer_state.remapping import remap
from ckptkit.rules.parse import parse_rules
from tests.features import needs_optimizer, needs_option, require, require_option
from tests.helpers_optimizers import OPTIMIZERS as ALL
from tests.helpers_optimizers import net_for, step

PROVED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.01),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, lr_decay=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True, momentum=0.9),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01, weight_decay=0.01),
    "Muon": lambda groups: torch.optim.Muon(groups, lr=0.01),
}
PROVED = {kind: make for kind, make in PROVED.items() if hasattr(torch.optim, kind)}
WHOLE = {"Adafactor", "Muon"}
RENAME = ["fc.*=body.inner.*", "qkv.*=attn.qkv.*"]
SPLIT = {
    "rule": [
        {
            "from": "qkv.{leaf}",
            "to": ["q.{leaf}", "k.{leaf}", "v.{leaf}"],
            "op": {"split": {"dim": 0, "sizes": [4, 4, 4]}},
        }
    ]
}


class Old(nn.Module):
    def __init__(self, classes: int = 3, *, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=bias)
        self.fc = nn.Linear(4, 4, bias=bias)
        self.head = nn.Linear(4, classes, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        out: torch.Tensor = self.head(self.fc(query * key.sigmoid() + value))
        return out


class New(nn.Module):
    """``Old`` with other names, registered in another order."""

    def __init__(self, old: Old) -> None:
        super().__init__()
        self.head = copy.deepcopy(old.head)
        self.body = nn.ModuleDict({"inner": copy.deepcopy(old.fc)})
        self.attn = nn.ModuleDict({"qkv": copy.deepcopy(old.qkv)})

    forward = Old.forward

    @property
    def fc(self) -> Any:
        return self.body["inner"]

    @property
    def qkv(self) -> Any:
        return self.attn["qkv"]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    for number in range(steps):
        data = torch.randn(6, 4, generator=torch.Generator().manual_seed(100 * seed + number))
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()


def trained_model(kind: str = "AdamW", classes: int = 3, groups: Callable[[Old], Any] | None = None) -> tuple[Old, Any]:
    torch.manual_seed(0)
    model = Old(classes, bias=kind != "Muon")
    optimizer = PROVED[kind](model.named_parameters() if groups is None else groups(model))
    train(model, optimizer, 3)
    return model, optimizer


def reordered_groups(model: nn.Module, *starts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return groups by the beginnings of names, each in the reverse order of the model."""
    named = list(model.named_parameters())[::-1]
    return [{"params": [(name, p) for name, p in named if name.startswith(some)]} for some in starts]


THREE_OLD = (("qkv",), ("fc",), ("head",))
THREE_NEW = (("head",), ("attn",), ("body",))


def same(old: Iterable[tuple[Any, Any]], one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    """Return whether each pair of parameters and all tensors of their states are equal to the last bit."""
    pairs = list(old)
    for mine, theirs in pairs:
        left, right = one.state[mine], other.state[theirs]
        assert left.keys() == right.keys()
        assert left
        assert all(left[slot].dtype == right[slot].dtype for slot in left)
        if not torch.equal(mine, theirs) or not all(torch.equal(left[slot], right[slot]) for slot in left):
            return False
    return bool(pairs)


@pytest.mark.parametrize("form", ["state_dict", "file"])
@pytest.mark.parametrize("split", ["1->3", "3->1", "3->3"])
@pytest.mark.parametrize("kind", PROVED)
def test_training_goes_on_bit_by_bit(kind: str, split: str, form: str, tmp_path: Any) -> None:
    """After a save, renames, other groups and a load, two more steps equal those of an uninterrupted run."""
    model, optimizer = trained_model(
        kind, groups=None if split == "1->3" else lambda old: reordered_groups(old, *THREE_OLD)
    )
    saved: Any = optimizer.state_dict()
    resumed = New(model)
    groups = list(resumed.named_parameters())[::-1] if split == "3->1" else reordered_groups(resumed, *THREE_NEW)
    other = PROVED[kind](groups)
    if form == "file":
        torch.save(saved, tmp_path / "optimizer.pt")
        with open_checkpoint(tmp_path / "optimizer.pt") as saved:
            report = load_optimizer_state(other, resumed, saved, RENAME)
    else:
        report = load_optimizer_state(other, resumed, saved, RENAME)
    assert isinstance(report, OptimizerLoadReport)
    assert sorted(report.loaded) == sorted(name for name, _ in resumed.named_parameters())
    assert report.findings == () == report.dropped + report.missing + report.unused + report.reshaped
    pairs = [
        (p, q)
        for part in ("qkv", "fc", "head")
        for p, q in zip(getattr(model, part).parameters(), getattr(resumed, part).parameters(), strict=True)
    ]
    assert same(pairs, optimizer, other)
    for seed in (1, 2):
        train(model, optimizer, 1, seed)
        train(resumed, other, 1, seed)
        assert same(pairs, optimizer, other)
    assert validate_param_groups(resumed, other).findings == ()


class Apart(nn.Module):
    """``Old`` with its fused matrix in three parts."""

    def __init__(self, old: Old) -> None:
        super().__init__()
        self.head, self.fc = copy.deepcopy(old.head), copy.deepcopy(old.fc)
        for number, name in enumerate("vkq"):
            made = nn.Linear(4, 4, bias=old.qkv.bias is not None)
            for leaf, tensor in made.named_parameters():
                tensor.data.copy_(getattr(old.qkv, leaf).chunk(3)[2 - number])
            self.add_module(name, made)


def apart(old: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return values with the names of ``Old`` as values with the names of ``Apart``."""
    made = {name: tensor for name, tensor in old.items() if "qkv" not in name}
    for name, tensor in old.items():
        if name.startswith("qkv."):
            made |= {f"{part}{name[3:]}": piece for part, piece in zip("qkv", tensor.chunk(3), strict=True)}
    return made


@pytest.mark.parametrize("kind", sorted(set(PROVED) - WHOLE))
def test_training_goes_on_after_a_split(kind: str) -> None:
    """Each element has its own update, so the parts train like the whole with the same gradients."""
    model, optimizer = trained_model(kind)
    resumed = Apart(model)
    other = PROVED[kind](reordered_groups(resumed, ("q", "head"), ("k",), ("v", "fc")))
    report = load_optimizer_state(other, resumed, optimizer.state_dict(), parse_rules(file=SPLIT))
    assert sorted(report.reshaped) == sorted(name for name, _ in resumed.named_parameters() if name[1] == ".")
    parameters = dict(resumed.named_parameters())
    for seed in (1, 2):
        train(model, optimizer, 1, seed)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, gradient in apart(grads).items():
            parameters[name].grad = gradient.clone()
        other.step()
        expected = apart(dict(model.named_parameters()))
        assert all(torch.equal(expected[name], parameter) for name, parameter in parameters.items())
        for slot in next(iter(optimizer.state.values())):
            states = {name: optimizer.state[p][slot] for name, p in model.named_parameters()}
            if next(iter(states.values())).ndim:
                assert all(torch.equal(t, other.state[parameters[n]][slot]) for n, t in apart(states).items())


@pytest.mark.parametrize("kind", sorted(WHOLE & PROVED.keys()))
def test_a_split_that_would_train_otherwise_is_refused(kind: str) -> None:
    """The update depends on the whole matrix, so the parts would train otherwise with the same state and gradients."""
    model, optimizer = trained_model(kind)
    resumed = Apart(model)
    other = PROVED[kind](resumed.named_parameters())
    with pytest.raises(PlanError, match=f"{kind} computes each update from the whole parameter|no number for each"):
        load_optimizer_state(other, resumed, optimizer.state_dict(), parse_rules(file=SPLIT))
    assert len(other.state) == 0
    parameters = dict(resumed.named_parameters())
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    if kind == "Muon":  # what the refusal is for: the momentum itself could be cut
        cut = apart({name: slots["momentum_buffer"] for name, slots in states.items()})
        for name, tensor in cut.items():
            other.state[parameters[name]] = {"momentum_buffer": tensor.clone()}
        train(model, optimizer, 1, 1)
        for name, gradient in apart({n: p.grad for n, p in model.named_parameters() if p.grad is not None}).items():
            parameters[name].grad = gradient.clone()
        other.step()
        assert not torch.equal(apart(dict(model.named_parameters()))["q.weight"], parameters["q.weight"])


@needs_optimizer("Muon")
def test_a_state_that_was_already_split_is_refused() -> None:
    """A split is refused also if only the live optimizer shows that it is Muon."""
    model, optimizer = trained_model("Muon")
    found = to_named(optimizer.state_dict())
    bare = [{**group, "params": group["params"]} for group in optimizer.state_dict()["param_groups"]]
    assert "ns_coefficients" in bare[0]
    with pytest.raises(PlanError, match="computes each update from the whole parameter"):
        remap(found, parse_rules(file=SPLIT))
    unsaid = type(found)(found.state, tuple(type(g)(g.names, {}) for g in found.groups))
    resumed = Apart(model)
    with pytest.raises(PlanError, match="computes each update from the whole parameter"):
        load_optimizer_state(
            PROVED["Muon"](resumed.named_parameters()), resumed, remap(unsaid, parse_rules(file=SPLIT))
        )


def test_gradients_are_not_used_and_no_step_is_made() -> None:
    """Loading works with and without gradients and makes no step, unlike the tools of torch."""
    model, optimizer = trained_model("Adam")
    for leftover in (False, True):
        other = PROVED["Adam"](model.named_parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if leftover else None
        before = [parameter.detach().clone() for parameter in model.parameters()]
        report = load_optimizer_state(other, model, optimizer.state_dict())
        assert len(report.loaded) == len(other.state) == 6
        assert {float(slots["step"]) for slots in other.state.values()} == {3.0}
        assert all(map(torch.equal, before, model.parameters()))
        assert all((parameter.grad is not None) == leftover for parameter in model.parameters())


def test_nothing_is_shared_with_the_state_that_was_given() -> None:
    """Two optimizers can load one state without sharing tensors, which torch would share."""
    model, optimizer = trained_model()
    twin = copy.deepcopy(model)
    other = PROVED["AdamW"](twin.named_parameters())
    load_optimizer_state(other, twin, optimizer.state_dict())
    assert validate_param_groups(nn.ModuleList([model, twin]), [optimizer, other]).ok
    before = {id(s): s["exp_avg"].clone() for s in other.state.values()}
    train(model, optimizer, 1)
    assert all(torch.equal(before[id(slots)], slots["exp_avg"]) for slots in other.state.values())


def test_the_order_of_a_state_without_names_is_proved_by_shapes() -> None:
    """A file without names gets them from shapes; if two assignments fit, loading is refused."""
    model, optimizer = trained_model()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["param_names"]
    other = PROVED["AdamW"](list(model.parameters())[::-1])
    load_optimizer_state(other, model, saved)
    assert same(((p, p) for p in model.parameters()), optimizer, other)
    other = PROVED["AdamW"](list(model.parameters())[::-1])
    load_optimizer_state(other, model, saved, names=[name for name, _ in model.named_parameters()])
    assert same(((p, p) for p in model.parameters()), optimizer, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_and_ties_change_no_name() -> None:
    """State from a compiled model, from DataParallel, and under any name of a tied parameter is loaded."""
    model, optimizer = trained_model("Adam")
    saved = optimizer.state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        saved["param_groups"][0]["param_names"] = [f"{prefix}{name}" for name, _ in model.named_parameters()]
        other = PROVED["Adam"](model.parameters())
        assert len(load_optimizer_state(other, model, saved).loaded) == 6
    tied: Any = nn.ModuleDict({"wte": nn.Embedding(4, 4), "lm_head": nn.Linear(4, 4, bias=False)})
    tied["lm_head"].weight = tied["wte"].weight
    first = torch.optim.SGD([("lm_head.weight", tied["lm_head"].weight)], momentum=0.9)
    tied["wte"].weight.grad = torch.ones(4, 4)
    first.step()
    second = torch.optim.SGD(tied.parameters(), momentum=0.9)
    assert load_optimizer_state(second, tied, first.state_dict()).loaded == ("wte.weight",)


def test_options_that_only_the_live_groups_have_stay() -> None:
    """Options that the file does not have are kept, which torch would delete."""
    model, optimizer = trained_model()
    groups = [
        {**group, "lr_scale": 0.5, "name": group["params"][0][0]} for group in reordered_groups(model, *THREE_OLD)
    ]
    other = PROVED["AdamW"](groups)
    load_optimizer_state(other, model, optimizer.state_dict())
    assert [group["lr_scale"] for group in other.param_groups] == [0.5] * 3
    assert [group["param_names"][0] for group in other.param_groups] == ["qkv.bias", "fc.bias", "head.bias"]
    assert [group["name"] for group in other.param_groups] == ["qkv.bias", "fc.bias", "head.bias"]


@pytest.mark.parametrize(("hyper", "lr"), [("saved", [0.01] * 3), ("live", [0.5, 0.25, 0.125])])
def test_which_options_are_loaded(hyper: Any, lr: list[float]) -> None:
    model, optimizer = trained_model()
    groups = [
        {**group, "lr": rate}
        for group, rate in zip(reordered_groups(model, *THREE_OLD), (0.5, 0.25, 0.125), strict=True)
    ]
    other = PROVED["AdamW"](groups)
    load_optimizer_state(other, model, optimizer.state_dict(), hyper=hyper)
    assert [group["lr"] for group in other.param_groups] == lr
    with pytest.raises(PlanError, match=r"'lr' of group 0 was 0.01 in the file and would be 0.5"):
        load_optimizer_state(PROVED["AdamW"](groups), model, optimizer.state_dict(), hyper="error")


def test_groups_with_different_lrs_are_not_merged_silently() -> None:
    """Merging groups with different lrs is refused; the tools of torch take one of the values."""
    rates = (0.5, 0.25, 0.125)
    model, optimizer = trained_model(
        groups=lambda old: [{**g, "lr": rate} for g, rate in zip(reordered_groups(old, *THREE_OLD), rates, strict=True)]
    )
    other = PROVED["AdamW"](model.named_parameters())
    with pytest.raises(PlanError, match="had different values of 'lr'"):
        load_optimizer_state(other, model, optimizer.state_dict())
    assert len(other.state) == 0
    load_optimizer_state(other, model, optimizer.state_dict(), hyper="live")
    assert other.param_groups[0]["lr"] == 0.01
    assert same(((p, p) for p in model.parameters()), optimizer, other)


def test_options_for_speed_are_kept() -> None:
    """capturable=True from a GPU file is not loaded, because no CPU can step that way."""
    model, optimizer = trained_model()
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(capturable=True, fused=True)
    other = PROVED["AdamW"](model.named_parameters())
    load_optimizer_state(other, model, saved)
    assert (other.param_groups[0]["capturable"], other.param_groups[0]["fused"]) == (False, None)
    train(model, other, 1)


def test_an_lr_that_is_a_tensor_stays_a_tensor() -> None:
    model, optimizer = trained_model()
    other = torch.optim.AdamW(model.named_parameters(), lr=torch.tensor(0.5), amsgrad=True)
    load_optimizer_state(other, model, optimizer.state_dict())
    assert torch.equal(other.param_groups[0]["lr"], torch.tensor(0.01))
    back = PROVED["AdamW"](model.named_parameters())
    load_optimizer_state(back, model, other.state_dict())
    assert float(back.param_groups[0]["lr"]) == pytest.approx(0.01)


def test_an_initial_lr_of_the_file_is_reported() -> None:
    """A finding warns that a scheduler built after loading starts from the initial_lr of the file."""
    model, optimizer = trained_model()
    lr_scheduler.StepLR(optimizer, 1)
    saved = optimizer.state_dict()
    other = torch.optim.AdamW(model.named_parameters(), lr=7.0, amsgrad=True)
    report = load_optimizer_state(other, model, saved)
    assert [finding.code for finding in report.findings] == ["optim.initial-lr"]
    assert lr_scheduler.CosineAnnealingLR(other, 10).base_lrs == [0.01]
    other = torch.optim.AdamW(model.named_parameters(), lr=7.0, amsgrad=True)
    assert load_optimizer_state(other, model, saved, hyper="live").findings == ()  # the way out of the hint
    assert lr_scheduler.CosineAnnealingLR(other, 10).base_lrs == [7.0]


SWITCHES = {
    "AdamW-to-Adam": ("AdamW", "Adam", "decoupled_weight_decay=True, but this Adam was built with False"),
    "Adam-to-AdamW": ("Adam", "AdamW", "decoupled_weight_decay=False, but this AdamW was built with True"),
    "SGD-to-AdamW": ("SGD", "AdamW", "another class than AdamW: one of its groups has dampening"),
    "SGD-to-Muon": ("SGD", "Muon", "another class than Muon: one of its groups has dampening"),
    "Muon-to-SGD": ("Muon", "SGD", "another class than SGD: one of its groups has adjust_lr_fn"),
    "NAdam-to-Adam": ("NAdam", "Adam", "another class than Adam"),
    "RMSprop-to-Adagrad": ("RMSprop", "Adagrad", "another class than Adagrad"),
    "Adam-to-Adafactor": ("Adam", "Adafactor", "another class than Adafactor"),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_state_of_another_class_is_refused(switch: str) -> None:
    """torch would load each of these, then fail in a later step or train otherwise."""
    saved, live, message = SWITCHES[switch]
    for kind in (saved, live):
        require(torch.optim, kind)
    if "decoupled" in message:
        require_option("Adam", "decoupled_weight_decay")
    model, optimizer = trained_model(saved)
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    other = PROVED[live](matrices)
    with pytest.raises(PlanError, match=message):
        load_optimizer_state(other, model, optimizer.state_dict())
    options = copy.deepcopy(other.param_groups[0])
    assert options["lr"] == PROVED[live](matrices).param_groups[0]["lr"]


@needs_option("Adam", "decoupled_weight_decay")
def test_no_class_of_torch_takes_the_state_of_another() -> None:
    """Every pair of classes is refused, with the options and slots that torch gives them."""
    kinds = [name for name in ALL if name not in {"SparseAdam", "AdamW-tensor-lr"}]
    saved: dict[str, Any] = {}
    for name in kinds:
        model = net_for("Muon")
        optimizer = ALL[name](model.named_parameters())
        step(model, optimizer)
        saved[name] = optimizer.state_dict()
    for one in kinds:
        for other in kinds:
            live = ALL[other](model.named_parameters())
            if one.partition("-")[0] == other.partition("-")[0]:
                load_optimizer_state(live, model, saved[one])
                continue
            with pytest.raises(PlanError, match=r"from another class than|decoupled_weight_decay"):
                load_optimizer_state(live, model, saved[one])


def test_an_unknown_optimizer_is_loaded_by_names() -> None:
    """For an unknown class, only slots that tell the shape of a parameter are compared with it."""

    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1, "own": (1, 2)})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            del closure
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter] = {"exp_avg": parameter.grad.clone(), "k": 3, "seen": torch.ones(2).byte()}

    torch.manual_seed(0)
    model = Old()
    optimizer = Own(model.named_parameters())
    train(model, optimizer, 1)
    other = Own(list(model.named_parameters())[::-1])
    load_optimizer_state(other, model, optimizer.state_dict())
    for parameter in model.parameters():
        mine, theirs = optimizer.state[parameter], other.state[parameter]
        assert (mine["k"], list(mine)) == (theirs["k"], list(theirs))
        assert all(torch.equal(mine[slot], theirs[slot]) for slot in ("exp_avg", "seen"))
    model.head = nn.Linear(4, 7)
    with pytest.raises(PlanError, match=r"'head.weight' has shape \(3, 4\), but the parameter has shape \(7, 4\)"):
        load_optimizer_state(Own(model.named_parameters()), model, optimizer.state_dict())


def test_slots_of_another_class_are_refused_without_options() -> None:
    model, optimizer = trained_model("SGD")
    found = to_named(optimizer.state_dict())
    bare = type(found)(found.state, tuple(type(group)(group.names, {}) for group in found.groups))
    with pytest.raises(PlanError, match="it has momentum_buffer, but Adam keeps step, exp_avg"):
        load_optimizer_state(PROVED["Adam"](model.named_parameters()), model, bare)


def test_a_replaced_head_starts_without_state_on_request() -> None:
    """A replaced head starts without state on request; torch would load the old state and fail in the next step."""
    model, optimizer = trained_model()
    model.head = nn.Linear(4, 7)
    other = PROVED["AdamW"](model.named_parameters())
    with pytest.raises(
        PlanError,
        match=r"'head.weight' has exp_avg of shape \(3, 4\), but a parameter of shape \(7, 4\) needs \(7, 4\)",
    ) as error:
        load_optimizer_state(other, model, optimizer.state_dict())
    assert "1 more do not fit" in str(error.value)
    assert len(other.state) == 0
    report = load_optimizer_state(other, model, optimizer.state_dict(), on_mismatch="skip")
    assert report.dropped == ("head.weight", "head.bias")
    assert [finding.code for finding in report.findings] == ["optim.dropped"] * 2
    assert "loaded the state of 4 parameters: 0 reshaped, 2 dropped, 0 missing, 0 unused" in str(report)
    train(model, other, 1)
    steps = {name: float(other.state[p]["step"]) for name, p in model.named_parameters()}
    assert {name: step for name, step in steps.items() if step != 4} == {"head.weight": 1, "head.bias": 1}


@pytest.mark.parametrize("kind", [kind for kind in ("Adafactor", "SGD") if kind in PROVED])
def test_factored_and_elementwise_shapes_are_compared_with_the_parameter(kind: str) -> None:
    model, optimizer = trained_model(kind)
    model.head = nn.Linear(4, 7)
    other = PROVED[kind](model.named_parameters())
    with pytest.raises(
        PlanError, match=r"'head.weight' has (row_var of shape \(3, 1\)|momentum_buffer of shape \(3, 4\))"
    ):
        load_optimizer_state(other, model, optimizer.state_dict())


def test_a_parameter_that_the_file_does_not_have() -> None:
    """A new parameter keeps the state of the optimizer, if any, and the report lists it as missing."""
    model, optimizer = trained_model()
    saved = optimizer.state_dict()
    grown: Any = nn.ModuleDict({"old": model, "extra": nn.Linear(4, 4)})
    rules = ["*=old.*"]
    other = PROVED["AdamW"](grown.named_parameters())
    with pytest.raises(PlanError, match=r"no state for 'extra.weight', 'extra.bias'"):
        load_optimizer_state(other, grown, saved, rules, on_missing="error")
    report = load_optimizer_state(other, grown, saved, rules)
    assert report.missing == ("extra.weight", "extra.bias")
    assert [(f.code, f.severity, f.key) for f in report.findings] == [
        ("optim.missing", "warning", name) for name in report.missing
    ]
    for parameter in grown["extra"].parameters():
        other.state[parameter] = {slot: value.clone() for slot, value in other.state[model.fc.weight].items()}
        other.state[parameter]["exp_avg"] = torch.ones_like(parameter)
    load_optimizer_state(other, grown, saved, rules)
    assert torch.equal(other.state[grown["extra"].bias]["exp_avg"], torch.ones(4))


def test_state_without_a_parameter() -> None:
    model, optimizer = trained_model()
    other = PROVED["AdamW"](model.fc.named_parameters(prefix="fc"))
    unused = ("qkv.weight", "qkv.bias", "head.weight", "head.bias")
    report = load_optimizer_state(other, model, optimizer.state_dict())
    assert (report.loaded, report.unused) == (("fc.weight", "fc.bias"), unused)
    assert report.summary == {"errors": 0, "warnings": 0, "notes": 4}
    with pytest.raises(PlanError, match=f"the state has {listed(unused)}, which the optimizer does not have"):
        load_optimizer_state(other, model, optimizer.state_dict(), on_unexpected="error")


def test_a_load_that_would_load_nothing_is_refused() -> None:
    """The names of another model are refused; torch would load by position."""
    model, optimizer = trained_model()
    resumed = New(model)
    resumed.head = nn.Linear(4, 3)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = [f"x.{name}" for name, _ in model.named_parameters()]
    other = PROVED["AdamW"](resumed.named_parameters())
    with pytest.raises(PlanError, match="nothing would be loaded"):
        load_optimizer_state(other, resumed, saved)


def test_a_slot_that_the_options_need() -> None:
    """A state that was saved without amsgrad is refused with it, because the next step would fail."""
    model, _ = trained_model()
    plain = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    train(model, plain, 1)
    other = PROVED["AdamW"](model.named_parameters())
    with pytest.raises(PlanError, match="has no max_exp_avg_sq, which AdamW with amsgrad=True reads"):
        load_optimizer_state(other, model, plain.state_dict(), hyper="live")
    load_optimizer_state(other, model, plain.state_dict())
    assert other.param_groups[0]["amsgrad"] is False
    train(model, other, 1)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, optimizer = trained_model()
    with pytest.raises(GroupsError, match=r"group 0\[0\] \(12, 4\) is not a parameter of the model"):
        load_optimizer_state(optimizer, Old(), optimizer.state_dict())
    del model


def test_a_damaged_state_changes_nothing() -> None:
    model, optimizer = trained_model()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = [0, 1, 2, 3, 4, 4]
    other = PROVED["AdamW"](model.named_parameters())
    with pytest.raises(FormatError, match="more than once"):
        load_optimizer_state(other, model, saved)
    assert len(other.state) == 0


@pytest.mark.parametrize(
    "policy", [{"hyper": "mine"}, {"on_missing": "skip"}, {"on_unexpected": "add"}, {"on_mismatch": "pad"}], ids=str
)
def test_an_unknown_policy_is_refused(policy: dict[str, Any]) -> None:
    model, optimizer = trained_model()
    with pytest.raises(ArgumentError, match=f"{next(iter(policy))} is the string"):
        load_optimizer_state(optimizer, model, optimizer.state_dict(), **policy)


def test_patterns_choose_which_state_may_be_left_out() -> None:
    """Only the replaced head starts without state; anything else that does not fit is an error."""
    model, optimizer = trained_model()
    saved = optimizer.state_dict()
    model.head = nn.Linear(4, 7)
    other = PROVED["AdamW"](model.named_parameters())
    report = load_optimizer_state(other, model, saved, on_mismatch={"head.*": "skip"})
    assert report.dropped == ("head.weight", "head.bias")
    by_name = dict(model.named_parameters())
    assert {name for name, tensor in by_name.items() if tensor in other.state} == by_name.keys() - {*report.dropped}
    with pytest.raises(PlanError, match=r"the state of 'head.bias' .*on_mismatch=\{\"head.bias\": \"skip\"\}"):
        load_optimizer_state(other, model, saved, on_mismatch={"head.weight": "skip"})
    with pytest.raises(RuleError, match=r"on_mismatch='hed.\*' matches none of 6 keys of the optimizer"):
        load_optimizer_state(other, model, saved, on_mismatch={"hed.*": "skip"})
    del saved["state"][0]
    with pytest.raises(PlanError, match=r"the file has no state for 'qkv.weight'"):
        load_optimizer_state(other, model, saved, on_mismatch="skip", on_missing={"fc.bias": "keep"})
    smaller = nn.ModuleDict({name: child for name, child in model.named_children() if name != "head"})
    fewer = PROVED["AdamW"](smaller.named_parameters())
    left = load_optimizer_state(fewer, smaller, optimizer.state_dict(), on_unexpected={"head.*": "skip"})
    assert left.unused == ("head.weight", "head.bias")
    with pytest.raises(PlanError, match=r"the state has 'head.weight', which the optimizer does not have"):
        load_optimizer_state(fewer, smaller, optimizer.state_dict(), on_unexpected={"head.bias": "skip"})


def test_a_hook_that_changes_values_is_detected() -> None:
    """Loaded values are compared with the saved ones, and the optimizer is restored if they differ."""
    model, optimizer = trained_model()
    other = torch.optim.AdamW(model.named_parameters(), lr=0.5, amsgrad=True)

    def doubled(loaded: Any) -> None:
        loaded.state[model.fc.weight]["exp_avg"].mul_(2)

    other.register_load_state_dict_post_hook(doubled)
    with pytest.raises(GroupsError, match=r"exp_avg of 'fc.weight' does not have the saved value"):
        load_optimizer_state(other, model, optimizer.state_dict())
    assert (len(other.state), other.param_groups[0]["lr"]) == (0, 0.5)
    train(model, other, 1)


def test_a_file_from_before_steps_were_tensors() -> None:
    """Plain step counts of old files are loaded as the tensors that torch makes from them."""
    model, optimizer = trained_model("NAdam")
    saved = copy.deepcopy(optimizer.state_dict())
    for slots in saved["state"].values():
        slots["step"], slots["mu_product"] = int(slots["step"]), float(slots["mu_product"])
    other = PROVED["NAdam"](model.named_parameters())
    load_optimizer_state(other, model, saved)
    assert same(((p, p) for p in model.parameters()), optimizer, other)


def test_a_bfloat16_model_gets_the_state_as_torch_casts_it() -> None:
    model, optimizer = trained_model("Adam")
    model.bfloat16()
    other = PROVED["Adam"](model.named_parameters())
    load_optimizer_state(other, model, optimizer.state_dict())
    expected = PROVED["Adam"](model.named_parameters())
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(((p, p) for p in model.parameters()), expected, other)
    assert other.state[model.fc.weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in PROVED if kind != "Muon"])
def test_training_goes_on_bit_by_bit_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    """Training continues in any dtype, although torch would cast the 32-bit product of NAdam."""
    torch.manual_seed(0)
    model = Old().to(dtype)
    optimizer = PROVED[kind](model.named_parameters())

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for number in range(steps):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 8, dtype=dtype).reshape(2, 4) * (number + 1)).square().sum().backward()
            optimizer.step()

    go_on(model, optimizer, 3)
    resumed = copy.deepcopy(model)
    other = PROVED[kind](resumed.named_parameters())
    load_optimizer_state(other, resumed, optimizer.state_dict())
    go_on(model, optimizer, 2)
    go_on(resumed, other, 2)
    assert same(zip(model.parameters(), resumed.parameters(), strict=True), optimizer, other)


def test_lbfgs_has_one_state_in_the_order_of_its_parameters() -> None:
    torch.manual_seed(0)
    model = Old()
    optimizer: Any = torch.optim.LBFGS(model.named_parameters(), lr=0.1, max_iter=4)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    other = torch.optim.LBFGS(model.named_parameters(), lr=0.1, max_iter=4)
    assert load_optimizer_state(other, model, optimizer.state_dict()).loaded == ("qkv.weight",)
    assert torch.equal(other.state[model.qkv.weight]["d"], optimizer.state[model.qkv.weight]["d"])
    turned = torch.optim.LBFGS(list(model.named_parameters())[::-1], lr=0.1, max_iter=4)
    with pytest.raises(PlanError, match="one state for all its parameters in their order"):
        load_optimizer_state(turned, model, optimizer.state_dict())
