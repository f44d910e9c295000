"""After ``rebind``, real steps give the same values as an optimizer of a model that did not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import rebind, validate_param_groups
from ckptkit.errors import ArgumentError, GroupsError
from tests.features import needs_optimizer

BODY = ["emb.weight", "fc.weight", "fc.bias"]
HEAD = ["head.weight", "head.bias"]


class Net(nn.Module):
    def __init__(self, rows: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.emb = nn.Embedding(rows, 4)
        self.fc = nn.Linear(4, 5)
        self.head = nn.Linear(5, classes)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.1, amsgrad=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "Adamax": lambda groups: torch.optim.Adamax(groups, lr=0.1),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.1),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1, centered=True, momentum=0.5),
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=0.1),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.1),
    "Adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.1),
    "ASGD": lambda groups: torch.optim.ASGD(groups, lr=0.1, t0=2),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.1),
}
OPTIMIZERS = {kind: make for kind, make in OPTIMIZERS.items() if hasattr(torch.optim, kind)}


def adamw(groups: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=0.1)


def grouped(model: Net) -> list[dict[str, Any]]:
    """Return two named groups of ``(name, parameter)`` pairs."""
    named = dict(model.named_parameters())
    return [
        {"name": "body", "params": [(name, named[name]) for name in BODY]},
        {"name": "head", "params": [(name, named[name]) for name in HEAD], "lr": 0.3},
    ]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> None:
    """Take real steps with gradients that depend on the values, so that any difference grows."""
    for _ in range(count):
        for parameter in model.parameters():
            flat = torch.arange(parameter.numel(), dtype=torch.float32, device=parameter.device).reshape(
                parameter.shape
            )
            parameter.grad = (parameter.detach().float() * 0.1 + flat.sin()).to(parameter.dtype)
        optimizer.step()


def codes_and_keys(report: Any) -> list[tuple[str, str]]:
    return [(finding.code.removeprefix("rebind."), finding.key) for finding in report.findings]


def replace_parameters(model: nn.Module) -> None:
    """Replace every parameter of the model by a new one with the same value."""
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def same(model: nn.Module, reference: nn.Module, names: list[str]) -> bool:
    first, second = dict(model.named_parameters()), dict(reference.named_parameters())
    return all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_after_assign_the_training_continues_bit_by_bit(kind: str) -> None:
    """Every parameter is a new object. With its state moved, the next steps are those of an unchanged model."""
    model = Net()
    optimizer = OPTIMIZERS[kind](grouped(model))
    steps(model, optimizer, 3)
    reference, reference_optimizer = copy.deepcopy((model, optimizer))
    groups, dicts = optimizer.param_groups, list(optimizer.param_groups)
    replace_parameters(model)
    report = rebind(optimizer, model)
    assert codes_and_keys(report) == [("repointed", name) for name in [*BODY, *HEAD]]
    assert validate_param_groups(model, optimizer).findings == ()
    assert optimizer.param_groups is groups
    assert all(one is other for one, other in zip(groups, dicts, strict=True))
    steps(model, optimizer, 3)
    steps(reference, reference_optimizer, 3)
    assert same(model, reference, [*BODY, *HEAD])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize(
    ("change", "add"),
    [
        (lambda model: model.add_module("more", nn.Linear(2, 2)), 0),
        (lambda model: model.double(), None),
        (lambda model: setattr(model.head, "bias", nn.Parameter(torch.zeros(3, dtype=torch.float64))), None),
        (lambda model: setattr(model.emb.weight, "data", torch.ones(8, 4)), None),
    ],
    ids=["one-more", "all-double", "one-double", "grown-in-place"],
)
def test_lbfgs_loses_its_state_where_elements_change(change: Callable[[Net], object], add: int | None) -> None:
    """The vectors of its state span all parameters: a step fails with more elements or with another dtype."""
    model = Net()
    optimizer: Any = torch.optim.LBFGS(model.named_parameters(), lr=0.1)

    def closure() -> float:
        for parameter in model.parameters():
            parameter.grad = 4 * (parameter.detach() - 1) ** 3
        return 1.0

    optimizer.step(closure)
    change(model)
    report = rebind(optimizer, model, add_missing=add)
    assert ("state-dropped", "") in codes_and_keys(report)
    assert not optimizer.state
    optimizer.step(closure)
    assert codes_and_keys(rebind(optimizer, model)) == []
    assert optimizer.state


def test_lbfgs_keeps_its_state_where_only_the_objects_changed() -> None:
    """It drops the state after a new head, because each history vector spans all parameters."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> float:
            for parameter in model.parameters():
                parameter.grad = 4 * (parameter.detach() - 1) ** 3
            return sum(((parameter.detach() - 1) ** 4).sum().item() for parameter in model.parameters())

        optimizer.step(closure)

    model = Net()
    optimizer = torch.optim.LBFGS(model.named_parameters(), lr=0.1, max_iter=3)
    run(model, optimizer)
    reference = copy.deepcopy(model)
    reference_optimizer = torch.optim.LBFGS(reference.named_parameters(), lr=0.1, max_iter=3)
    reference_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    replace_parameters(model)
    rebind(optimizer, model)
    run(model, optimizer)
    run(reference, reference_optimizer)
    assert same(model, reference, [*BODY, *HEAD])
    model.head = nn.Linear(5, 7)
    assert ("state-dropped", "") in codes_and_keys(rebind(optimizer, model))
    before = model.head.weight.detach().clone()
    run(model, optimizer)
    assert not torch.equal(before, model.head.weight)


def test_an_optimizer_can_be_rebound_to_a_deep_copy() -> None:
    model = Net()
    optimizer = adamw(model.named_parameters())
    steps(model, optimizer)
    copied = copy.deepcopy(model)
    rebind(optimizer, copied)
    assert validate_param_groups(copied, optimizer).findings == ()
    steps(copied, optimizer)
    assert not same(model, copied, BODY)


def test_state_on_the_meta_device_is_dropped() -> None:
    """It has no values; the parameters of the loaded state_dict do."""
    with torch.device("meta"):
        model = Net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    steps(model, optimizer, 1)
    model.load_state_dict(Net().state_dict(), assign=True)
    report = rebind(optimizer, model)
    assert [code for code, _ in codes_and_keys(report)] == ["repointed"] * 5 + ["state-dropped"] * 5
    assert "is on the meta device" in report.findings[-1].message
    before = copy.deepcopy(model)
    steps(model, optimizer)
    assert not any(same(before, model, [name]) for name in [*BODY, *HEAD])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_new_head_trains_and_the_rest_continues_bit_by_bit(kind: str) -> None:
    """The state of the old head has another shape and is dropped. The other parameters are not affected."""
    model = Net()
    optimizer = OPTIMIZERS[kind](grouped(model))
    steps(model, optimizer)
    reference, reference_optimizer = copy.deepcopy((model, optimizer))
    slots = list(optimizer.state[model.head.weight])
    model.head = nn.Linear(5, 7)
    before = copy.deepcopy(model.head)
    report = rebind(optimizer, model)
    assert codes_and_keys(report) == [("repointed", name) for name in HEAD] + [("state-dropped", name) for name in HEAD]
    assert f"the state of 'head.weight' ({', '.join(slots)}) was dropped: " in report.findings[2].message
    assert [finding for finding in validate_param_groups(model, optimizer).findings if finding.severity != "note"] == []
    assert optimizer.state_dict()["param_groups"][1]["param_names"] == HEAD
    steps(model, optimizer)
    steps(reference, reference_optimizer)
    assert same(model, reference, BODY)
    assert not torch.equal(before.weight, model.head.weight)
    assert not torch.equal(before.bias, model.head.bias)


def test_a_head_with_other_names_needs_add_missing() -> None:
    """The old head is removed with its state. The new parameters are reported, or added with ``add_missing``."""
    for place in ("head", 1):
        model = Net()
        optimizer = adamw(grouped(model))
        steps(model, optimizer)
        kept = copy.deepcopy(optimizer.state_dict()["state"][0])
        model.head = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))  # type: ignore[assignment]
        new = [f"head.{name}" for name, _ in model.head.named_parameters()]
        undecided, reference_optimizer = copy.deepcopy((model, optimizer))
        report = rebind(reference_optimizer, undecided)
        assert codes_and_keys(report) == [
            *[("removed", name) for name in HEAD],
            *[("state-dropped", name) for name in HEAD],
            ("missing", "head.0.weight"),
        ]
        assert report.findings[-1].severity == "warning"
        report = rebind(optimizer, model, add_missing=place)
        assert codes_and_keys(report)[-4:] == [("added", name) for name in new]
        assert validate_param_groups(model, optimizer).ok
        assert [group["param_names"] for group in optimizer.param_groups] == [BODY, new]
        before = copy.deepcopy(model)
        steps(model, optimizer)
        assert not any(same(before, model, [name]) for name in [*BODY, *new])
        assert kept["step"] + 2 == optimizer.state[model.emb.weight]["step"]


def test_state_of_no_parameter_is_dropped() -> None:
    """After ``params`` was changed by hand, such state makes ``state_dict()`` fail with a bare KeyError."""
    model = Net()
    optimizer = adamw(model.named_parameters())
    steps(model, optimizer)
    model.head = nn.Linear(5, 7)
    optimizer.param_groups[0]["params"][3:] = list(model.head.parameters())
    optimizer.state[99] = {"step": torch.tensor(1.0)}  # type: ignore[index]
    with pytest.raises(KeyError):
        optimizer.state_dict()
    assert codes_and_keys(rebind(optimizer, model)) == [("state-dropped", "")] * 3
    assert len(optimizer.state_dict()["state"]) == 3


def resize(model: Net, rows: int, *, new_object: bool) -> None:
    """Add rows to the embedding as transformers does: in place, or in a new parameter with the old rows first."""
    grown = torch.cat([model.emb.weight.detach(), torch.full((rows - len(model.emb.weight), 4), 0.5)])
    if new_object:
        model.emb.weight = nn.Parameter(grown)
    else:
        model.emb.weight.data = grown
    model.emb.num_embeddings = rows


ELEMENTWISE = [kind for kind in OPTIMIZERS if kind != "Adafactor"]


@pytest.mark.parametrize("new_object", [False, True], ids=["in-place", "new-object"])
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_old_rows_continue_bit_by_bit_where_the_state_is_padded(kind: str, *, new_object: bool) -> None:
    """Without ``rebind`` the next step fails in the middle. With it, only the new rows have initial state."""
    model = Net()
    optimizer = OPTIMIZERS[kind](model.named_parameters())
    steps(model, optimizer)
    reference, reference_optimizer = copy.deepcopy((model, optimizer))
    resize(model, 8, new_object=new_object)
    if not new_object:
        with pytest.raises(RuntimeError, match=r"size of tensor|shape"):
            steps(*copy.deepcopy((model, optimizer)))
    report = rebind(optimizer, model, on_shape="pad")
    assert ("state-converted", "emb.weight") in codes_and_keys(report)
    assert "state-dropped" not in dict(codes_and_keys(report))
    assert validate_param_groups(model, optimizer).findings == ()
    old = model.emb.weight.detach()[6:].clone()
    for _ in range(2):
        for one, run in ((model, optimizer), (reference, reference_optimizer)):
            for parameter in one.parameters():
                parameter.grad = torch.full_like(parameter, 0.25)
            run.step()
    assert torch.equal(model.emb.weight[:6], reference.emb.weight)
    assert same(model, reference, [*BODY[1:], *HEAD])
    assert not torch.equal(old, model.emb.weight[6:])


@pytest.mark.parametrize(
    ("kind", "change", "why"),
    [
        ("AdamW", lambda model: setattr(model, "emb", nn.Embedding(8, 4)), "does not begin with the rows of the older"),
        ("AdamW", lambda model: setattr(model.emb.weight, "data", torch.ones(4, 4)), "did not grow by rows"),
        ("AdamW", lambda model: setattr(model.emb.weight, "data", torch.ones(8, 5)), "did not grow by rows"),
        pytest.param(
            *("Adafactor", lambda model: resize(model, 8, new_object=False), "initial value of a new row is not known"),
            marks=needs_optimizer("Adafactor"),
        ),
    ],
    ids=["another-embedding", "shrunk", "wider", "factored"],
)
def test_state_that_cannot_be_padded_is_dropped_with_the_reason(
    kind: str, change: Callable[[Net], object], why: str
) -> None:
    model = Net()
    optimizer = OPTIMIZERS[kind](model.named_parameters())
    steps(model, optimizer)
    change(model)
    report = rebind(optimizer, model, on_shape="pad")
    (dropped,) = [finding for finding in report.findings if finding.code == "rebind.state-dropped"]
    assert dropped.key == "emb.weight"
    assert why in dropped.message
    steps(model, optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_is_cast_to_the_dtype_of_the_model(kind: str) -> None:
    """As torch casts it when it loads a state_dict."""
    model = Net()
    optimizer = OPTIMIZERS[kind](model.named_parameters())
    steps(model, optimizer)
    model.double()
    reference, reference_optimizer = copy.deepcopy((model, optimizer))
    reference_optimizer.load_state_dict(copy.deepcopy(reference_optimizer.state_dict()))
    report = rebind(optimizer, model)
    assert set(codes_and_keys(report)) == {("state-converted", name) for name in [*BODY, *HEAD]}
    assert "cast from torch.float32 to torch.float64" in report.findings[0].message
    steps(model, optimizer)
    steps(reference, reference_optimizer)
    assert same(model, reference, [*BODY, *HEAD])


def test_weight_norm_on_and_off() -> None:
    """One weight becomes two with other meanings, and one again. Both train, and the bias keeps its state."""
    model = Net()
    optimizer = adamw(grouped(model))
    steps(model, optimizer)
    step = optimizer.state[model.head.bias]["step"].item()
    nn.utils.parametrizations.weight_norm(model.head)
    parts = [f"head.parametrizations.weight.original{part}" for part in (0, 1)]
    report = rebind(optimizer, model)
    assert codes_and_keys(report) == [*[("repointed", part) for part in parts], ("state-dropped", "head.weight")]
    assert validate_param_groups(model, optimizer).ok
    assert optimizer.param_groups[1]["param_names"] == [*parts, "head.bias"]
    steps(model, optimizer)
    nn.utils.parametrize.remove_parametrizations(model.head, "weight")
    report = rebind(optimizer, model)
    assert codes_and_keys(report)[:2] == [("repointed", "head.weight"), ("removed", parts[1])]
    assert validate_param_groups(model, optimizer).ok
    assert optimizer.param_groups[1]["param_names"] == HEAD
    assert optimizer.state[model.head.bias]["step"].item() == step + 2
    before = copy.deepcopy(model)
    steps(model, optimizer)
    assert not any(same(before, model, [name]) for name in [*BODY, *HEAD])


def test_state_is_dropped_where_the_only_successor_is_in_a_group_already() -> None:
    """The new weight was added by hand and has a state of its own, so the old state has no place."""
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    optimizer = adamw(model.named_parameters())
    steps(model, optimizer)
    plain = nn.Linear(4, 4)
    optimizer.add_param_group({"params": [("weight", plain.weight)]})
    report = rebind(optimizer, plain)
    original = "parametrizations.weight.original"
    assert ("state-dropped", original) in codes_and_keys(report)
    (dropped,) = [finding for finding in report.findings if finding.code == "rebind.state-dropped"]
    assert dropped.message.endswith("was dropped: spectral_norm of torch.nn.utils.parametrizations was removed")
    assert validate_param_groups(plain, optimizer).ok
    assert len(optimizer.state_dict()["state"]) == 1
    before = copy.deepcopy(plain)
    steps(plain, optimizer)
    assert not any(same(before, plain, [name]) for name in ("weight", "bias"))


def test_names_that_torch_overwrote_are_corrected() -> None:
    """A state_dict of a model with its layers in another order puts the names on the wrong parameters."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    other = nn.ModuleDict({"b": nn.Linear(3, 3), "a": nn.Linear(3, 3)})
    optimizer = adamw(model.named_parameters())
    optimizer.load_state_dict(adamw(other.named_parameters()).state_dict())
    assert not validate_param_groups(model, optimizer).ok
    assert [code for code, _ in codes_and_keys(rebind(optimizer, model))] == ["renamed"] * 4
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert rebind(optimizer, model).findings == ()


def test_weights_that_were_tied_later_are_kept_once() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    optimizer = adamw(model.named_parameters())
    steps(model, optimizer)
    model["head"].weight = model["emb"].weight
    report = rebind(optimizer, model)
    assert codes_and_keys(report)[0] == ("removed", "head.weight")
    assert "the model now has 'emb.weight' instead" in report.findings[0].message
    assert validate_param_groups(model, optimizer).ok


def test_without_recorded_names_rebind_needs_guess() -> None:
    model = Net()
    optimizer = adamw(model.parameters())
    steps(model, optimizer)
    reference, reference_optimizer = copy.deepcopy((model, optimizer))
    replace_parameters(model)
    with pytest.raises(GroupsError, match=r"group 0\[0\] \(6, 4\) .* it was 'emb.weight' \(and 4 more\)"):
        rebind(optimizer, model)
    rebind(optimizer, model, guess=True)
    assert "param_names" not in optimizer.param_groups[0]
    assert validate_param_groups(model, optimizer).findings == ()
    steps(model, optimizer)
    steps(reference, reference_optimizer)
    assert same(model, reference, [*BODY, *HEAD])


def test_names_recorded_in_a_submodule_need_guess() -> None:
    """In a LightningModule, ``head.weight`` may be ``net.head.weight``: the parameter is not removed."""
    whole = nn.ModuleDict({"net": Net()})
    optimizer = adamw(whole["net"].named_parameters())
    whole["net"].head = nn.Linear(5, 7)
    with pytest.raises(GroupsError, match=r"it was 'net\.head\.weight'"):
        rebind(optimizer, whole)
    rebind(optimizer, whole, guess=True)
    assert validate_param_groups(whole, optimizer).findings == ()


def test_parameters_of_modules_in_beside_are_left_alone() -> None:
    """A loss with parameters of its own is not in the model; without ``beside``, they are removed."""
    model, loss = Net(), nn.Linear(1, 1)
    optimizer = adamw([*model.named_parameters(), *((f"loss.{name}", one) for name, one in loss.named_parameters())])
    assert rebind(optimizer, model, beside=[loss]).findings == ()
    assert codes_and_keys(rebind(optimizer, model)) == [("removed", "loss.weight"), ("removed", "loss.bias")]


def test_parameters_of_optimizers_in_beside_are_not_missing() -> None:
    model = Net()
    others = torch.optim.SGD(model.head.named_parameters(), lr=0.1)
    optimizer = adamw([("fc.weight", model.fc.weight), ("fc.bias", model.fc.bias)])
    model.fc = nn.Linear(4, 5)
    report = rebind(optimizer, model, beside=[others], add_missing=0)
    assert codes_and_keys(report) == [("repointed", "fc.weight"), ("repointed", "fc.bias"), ("added", "emb.weight")]
    assert validate_param_groups(model, [optimizer, others]).ok


class Nested(torch.optim.Optimizer):
    """An optimizer with lists and dicts of tensors in its state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, *_: Any) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"all": [{"mean": torch.ones_like(parameter)}, None, 3], "count": 1}


def test_state_in_lists_and_dicts_is_dropped_for_another_shape() -> None:
    """Otherwise only the next step would fail at a tensor of the old shape in a list."""
    model = Net()
    optimizer = Nested(grouped(model))
    optimizer.step()
    model.head = nn.Linear(model.head.in_features, 7)
    model.emb.weight = nn.Parameter(model.emb.weight.detach().clone())
    report = rebind(optimizer, model)
    dropped = [one.key for one in report.findings if one.code == "rebind.state-dropped"]
    assert dropped == ["head.weight", "head.bias"]
    assert model.head.weight not in optimizer.state
    assert optimizer.state[model.emb.weight]["all"][0]["mean"].shape == model.emb.weight.shape


def test_beside_can_be_one_module_or_optimizer() -> None:
    model = Net()
    others = torch.optim.SGD(model.head.named_parameters(), lr=0.1)
    optimizer = adamw([("fc.weight", model.fc.weight), ("fc.bias", model.fc.bias), ("emb.weight", model.emb.weight)])
    assert codes_and_keys(rebind(optimizer, model, beside=others)) == []
    assert codes_and_keys(rebind(optimizer, model, beside=model.head)) == []


def crossed(model: Net) -> torch.optim.Optimizer:
    optimizer = adamw([{"params": [("fc.bias", model.fc.bias), ("fc.bias", nn.Parameter(torch.zeros(5)))]}])
    model.fc = nn.Linear(4, 5)
    return optimizer


class OneGroup(torch.optim.SGD):
    """An optimizer that refuses a second group."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError("one is enough")
        super().add_param_group(param_group)


REFUSALS: dict[str, tuple[Callable[[Net], Any], dict[str, Any], str]] = {
    "no-optimizer": (lambda model: model.parameters(), {}, "an optimizer cannot be a generator"),
    "another-model": (
        lambda _: adamw([("x", nn.Parameter(torch.ones(1)))]),
        {},
        "none of the 1 parameter of the optimizer is in the model, by identity or by name",
    ),
    "two-of-one-name": (crossed, {}, "would both become 'fc.bias'"),
    "no-such-group": (lambda model: adamw(grouped(model)), {"add_missing": "tail"}, "no group has the name 'tail'"),
    "no-such-index": (lambda model: adamw(grouped(model)), {"add_missing": 2}, "there is no group 2"),
    "params-given": (
        lambda model: adamw([("fc.bias", model.fc.bias)]),
        {"add_missing": {"params": []}},
        "leave out params",
    ),
    "lbfgs": (
        lambda model: torch.optim.LBFGS([("fc.bias", model.fc.bias)]),
        {"add_missing": {}},
        "LBFGS takes one group only",
    ),
    "its-own": (
        lambda model: OneGroup([model.fc.bias]),
        {"add_missing": {}},
        "OneGroup refuses a new group: one is enough",
    ),
    "on-shape": (lambda model: adamw(grouped(model)), {"on_shape": "keep"}, "on_shape is the string 'keep'"),
    "on-shape-list": (lambda model: adamw(grouped(model)), {"on_shape": ["drop"]}, "on_shape is"),
    "beside-number": (lambda model: adamw(grouped(model)), {"beside": [5]}, "beside has an int"),
    "beside-none": (lambda model: adamw(grouped(model)), {"beside": None}, "beside has null"),
    "beside-tensors": (lambda model: adamw(grouped(model)), {"beside": [torch.ones(1)]}, "beside has a Tensor"),
    "add-list": (lambda model: adamw([("fc.bias", model.fc.bias)]), {"add_missing": [0]}, "add_missing is a list"),
    "add-fraction": (lambda model: adamw([("fc.bias", model.fc.bias)]), {"add_missing": 0.5}, "add_missing is a float"),
    "negative-rate": (
        lambda model: adamw([("fc.bias", model.fc.bias)]),
        {"add_missing": {"lr": -1}},
        r"add_missing: lr is negative \(-1\)",
    ),
    "no-rate": (lambda model: adamw([("fc.bias", model.fc.bias)]), {"add_missing": {"lr": "x"}}, "lr is the string"),
    "no-name": (
        lambda model: adamw([("fc.bias", model.fc.bias)]),
        {"add_missing": {1: 2}},
        "1 is not the name of an option",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments_are_refused(case: str) -> None:
    build, choices, message = REFUSALS[case]
    model = Net()
    optimizer = build(model)
    with pytest.raises((ArgumentError, GroupsError), match=message):
        rebind(optimizer, model, **choices)


def test_a_refusal_changes_nothing() -> None:
    """Nothing is changed even where part of it could be done: the head can be replaced, the embedding cannot."""
    model = Net()
    optimizer = adamw(grouped(model))
    steps(model, optimizer)
    model.head = nn.Linear(5, 3)
    resize(model, 8, new_object=False)
    before = [(list(group["params"]), dict(group)) for group in optimizer.param_groups]
    state = {key: dict(slots) for key, slots in optimizer.state.items()}
    with pytest.raises(GroupsError, match=r"the state of 'emb\.weight' does not fit: exp_avg \(6, 4\)"):
        rebind(optimizer, model, on_shape="error")
    for group, (params, options) in zip(optimizer.param_groups, before, strict=True):
        assert all(one is other for one, other in zip(group["params"], params, strict=True))
        assert group == options
    assert {key: dict(slots) for key, slots in optimizer.state.items()}.keys() == state.keys()
    assert all(optimizer.state[key][slot] is value for key, slots in state.items() for slot, value in slots.items())
