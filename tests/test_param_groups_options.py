"""Validation of options in live groups, with faults that torch itself accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.param_groups.validate import validate_param_groups
from tests.features import distribute_tensor, needs_optimizer, needs_option
from tests.helpers_optimizers import Net, codes, message, step

# Values on both sides of each limit that the constructor of a class of torch.optim checks.
RANGES: list[tuple[str, str, Any]] = [
    *((kind, "lr", value) for kind in ("SGD", "Adam", "Adafactor", "Muon", "LBFGS") for value in (-0.1, 0.0, 0.1)),
    *((kind, "weight_decay", value) for kind in ("SGD", "AdamW", "RAdam") for value in (-1, 0, 0.5)),
    *(
        (kind, "betas", value)
        for kind in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SparseAdam")
        for value in ((0.9, 1.0), (1.5, 0.9), (-0.1, 0.9), (0.0, 0.0), (0.9, 0.999))
    ),
    *((kind, "eps", value) for kind in ("Adam", "Adadelta", "Adagrad", "RMSprop", "NAdam") for value in (-1e-8, 1e-8)),
    *((kind, "momentum", value) for kind in ("SGD", "RMSprop", "Muon") for value in (-0.9, 0.0, 0.9)),
    *(("Adadelta", "rho", value) for value in (-0.1, 0.0, 0.9, 1.0, 1.1)),
    *(("RMSprop", "alpha", value) for value in (-0.1, 0.99, 1.5)),
    *(("ASGD", "alpha", value) for value in (-0.1, 0.75)),
    *(("Adagrad", "lr_decay", value) for value in (-0.1, 0.0)),
    *(("NAdam", "momentum_decay", value) for value in (-0.1, 0.004)),
    *(("Rprop", "etas", value) for value in ((0.5, 1.2), (0.0, 1.2), (0.5, 0.9), (1.1, 1.2))),
    *(("Adafactor", "beta2_decay", value) for value in (-0.8, 0.0, 0.8)),
    *(("Adafactor", "eps", value) for value in ((None, 1e-3), (1e-30, 1e-3), (-1.0, 1e-3), (None, -1e-3))),
    *(("Adafactor", "d", value) for value in (0.5, 1.0, 2.0)),
]
RANGES = [row for row in RANGES if hasattr(torch.optim, row[0])]


@pytest.mark.parametrize(("kind", "key", "value"), RANGES, ids=str)
def test_a_group_must_have_values_that_the_constructor_accepts(kind: str, key: str, value: Any) -> None:
    """torch checks the defaults and accepts any value in a group: the finding is there where the default is refused."""
    make = getattr(torch.optim, kind)
    model = nn.Linear(2, 2, bias=False)
    try:
        make(model.parameters(), **{key: value})
        refused = False
    except ValueError:
        refused = True
    optimizer = make([{"params": list(model.parameters()), key: value}])
    refused |= (kind, key, value) == ("LBFGS", "lr", -0.1)  # some versions of torch accept it, and climb
    assert codes(model, optimizer) == ([("option-value", "error", "")] if refused else [])
    if refused:
        assert f"group 0: {key}" in message(model, optimizer)


@pytest.mark.parametrize(
    ("key", "value"),
    [("betas", 0.9), ("betas", "0.9"), ("betas", (0.9,)), ("betas", ("0.9", 0.99)), ("eps", "1e-8"), ("eps", True)],
    ids=str,
)
def test_an_option_of_another_type(key: str, value: Any) -> None:
    """A value of the wrong type, as a config file can give it."""
    model = Net()
    optimizer = torch.optim.Adam([{"params": list(model.parameters()), key: value}])
    assert codes(model, optimizer) == [("option-value", "error", "")]


def test_nesterov_without_momentum() -> None:
    """torch checks this for the defaults only."""
    model = Net()
    with pytest.raises(ValueError, match="Nesterov momentum requires"):
        torch.optim.SGD(model.parameters(), nesterov=True)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "nesterov": True}])
    assert codes(model, optimizer) == [("option-value", "error", "")]


def test_groups_without_an_optimizer_are_checked_for_what_every_class_requires() -> None:
    model = Net()
    listed = list(model.parameters())
    assert codes(model, [{"params": listed, "betas": [0.9, 1.5]}]) == [("option-value", "error", "")]
    assert codes(model, [{"params": listed, "betas": (0.9, 0.9, 0.99), "eps": (None, 1e-3), "alpha": -1}]) == []


@needs_optimizer("Muon")
@pytest.mark.parametrize("part", ["bias", "conv"])
def test_muon_takes_matrices_only(part: str) -> None:
    """The constructor of Muon checks this, ``add_param_group`` does not."""
    model: Any = nn.ModuleDict({"fc": nn.Linear(3, 3), "conv": nn.Conv2d(1, 1, 2, bias=False)})
    other = model["fc"].bias if part == "bias" else model["conv"].weight
    model["fc" if part == "conv" else "conv"].requires_grad_(False)
    optimizer: Any = torch.optim.Muon([model["fc"].weight])
    model["fc"].weight.requires_grad_(True)
    optimizer.add_param_group({"params": [other]})
    name = "fc.bias" if part == "bias" else "conv.weight"
    assert codes(model, optimizer) == [("matrices-only", "error", name)]
    other.grad = torch.ones_like(other)
    with pytest.raises(ValueError, match="2D matrix"):
        optimizer.step()


def test_lbfgs_has_one_group() -> None:
    model = Net()
    optimizer = torch.optim.LBFGS([*model.body.parameters(), *model.norm.parameters()])
    optimizer.add_param_group({"params": list(model.head.parameters())})
    assert codes(model, optimizer) == [("one-group", "error", "")]
    with pytest.raises(AssertionError, match=r"exactly one param_group|^$"):
        step(model, optimizer)


class MuonWithAuxAdam(torch.optim.Optimizer):
    """The assertions of the optimizer with this name about its groups, without its step."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            own = {"momentum"} if group["use_muon"] else {"betas", "eps"}
            assert set(group) == {"params", "lr", "weight_decay", "use_muon"} | own
        super().__init__(groups, {})


def test_groups_for_muon_with_adam_have_exactly_the_asserted_keys() -> None:
    model = Net()
    muon = {"params": [model.body.weight, model.head.weight], "lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
    rest = [p for p in model.parameters() if p.ndim < 2]
    adam = {"params": rest, "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    groups = [{**muon, "use_muon": True}, {**adam, "use_muon": False}]
    assert codes(model, groups) == []
    assert codes(model, MuonWithAuxAdam(groups)) == []
    named = [dict(group, name=name) for group, name in zip(groups, "ab", strict=True)]
    assert codes(model, named) == [("option-set", "warning", "")] * 2
    with pytest.raises(AssertionError):
        MuonWithAuxAdam(named)
    groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]
    vectors = ["body.bias", "norm.weight", "norm.bias", "head.bias"]
    assert codes(model, groups) == [("matrices-only", "error", name) for name in vectors]


@needs_option("Adam", "decoupled_weight_decay")
def test_decoupled_weight_decay_loaded_into_adam_is_reported() -> None:
    """The state_dict of an AdamW makes an Adam decay like AdamW, without an error from torch."""
    model = Net()
    before = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    step(model, before)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.05)
    optimizer.load_state_dict(before.state_dict())
    assert codes(model, optimizer) == [("decoupled", "error", "")]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = model.body.weight.detach().clone()
    for slots in optimizer.state.values():
        slots["exp_avg"].zero_()
    optimizer.step()  # without gradient and momentum, only the weight decay of AdamW changes the values
    assert torch.allclose(model.body.weight, weight * (1 - 0.001 * 0.05), rtol=0, atol=1e-7)
    optimizer.param_groups[0]["decoupled_weight_decay"] = False  # as the hint says
    assert codes(model, optimizer) == []


@needs_option("Adam", "decoupled_weight_decay")
def test_decoupled_weight_decay_that_was_passed_to_adam_is_accepted() -> None:
    model = Net()
    assert codes(model, torch.optim.Adam(model.parameters(), decoupled_weight_decay=True)) == []
    groups: list[dict[str, Any]] = [
        {"params": list(model.body.parameters()), "decoupled_weight_decay": True},
        {"params": [*model.norm.parameters(), *model.head.parameters()]},
    ]
    assert codes(model, torch.optim.Adam(groups)) == [("decoupled", "warning", "")]
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["decoupled_weight_decay"] = False
    assert codes(model, optimizer) == [("decoupled", "error", "")]


def test_capturable_from_a_gpu_is_reported_on_a_cpu() -> None:
    """A state_dict sets the flag, and then every step on the CPU fails."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["capturable"] = True
    optimizer.load_state_dict(saved)
    assert codes(model, optimizer) == [("capturable", "error", "body.weight")]
    with pytest.raises(AssertionError, match="capturable=True"):
        step(model, optimizer)
    optimizer.param_groups[0]["fused"] = True  # the fused step supports capturable on every device
    step(model, optimizer)
    assert codes(model, optimizer) == []


def test_a_tensor_as_lr_and_foreach() -> None:
    model = Net()
    optimizer = torch.optim.Adam([{"params": list(model.parameters()), "lr": torch.tensor(0.1), "foreach": True}])
    assert codes(model, optimizer) == [("option-value", "error", "")]
    with pytest.raises(RuntimeError, match="lr as a Tensor is not supported"):
        step(model, optimizer)


def test_dtypes_may_differ_in_one_group() -> None:
    """torch groups tensors by dtype before its kernels run."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double()])
    for options in ({"foreach": True}, {"fused": True}):
        optimizer = torch.optim.AdamW(model.parameters(), **options)  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert codes(model, optimizer) == []


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu")
def test_plain_tensors_beside_dtensors_in_one_group_are_reported(tmp_path: Path) -> None:
    """A fused or foreach kernel cannot step both."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.ParameterDict({"plain": torch.ones(2, 2), "spread": distribute_tensor(torch.ones(2, 2), mesh)})
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert codes(model, optimizer) == []
        optimizer.param_groups[0]["foreach"] = True
        assert codes(model, optimizer) == [("mixed", "error", "plain")]
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_one_lr_tensor_in_two_groups_is_reported() -> None:
    """A scheduler that changes the lr of one group changes the other."""
    model = Net()
    groups = [
        {"params": list(model.body.parameters())},
        {"params": [*model.norm.parameters(), *model.head.parameters()]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.1))
    assert codes(model, optimizer) == [("shared-lr", "warning", "")]
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert float(optimizer.param_groups[1]["lr"]) == 0.5
    optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"].clone()  # as the hint says
    assert codes(model, optimizer) == []


def test_many_groups_with_equal_options_get_a_note() -> None:
    """Only where nearly all of the groups have the same options."""
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(40))
    each = [{"params": [parameter]} for parameter in model.parameters()]
    assert codes(model, torch.optim.SGD(each)) == [("many", "note", "")]
    assert "80 groups but only 1 set of options" in message(model, torch.optim.SGD(each))
    layers = [{"params": [parameter], "lr": 0.1 / number} for number, parameter in enumerate(model.parameters(), 1)]
    assert codes(model, torch.optim.SGD(layers)) == []


def test_a_norm_with_weight_decay_is_reported_where_others_have_none() -> None:
    """Recipes select norms by name: a norm with an unusual name stays in the group with weight decay."""
    model: Any = nn.ModuleDict({"fc": nn.Linear(3, 3), "ln_1": nn.RMSNorm(3), "norm": nn.LayerNorm(3)})
    spared = [p for name, p in model.named_parameters() if "norm" in name or "bias" in name]
    decayed = [p for name, p in model.named_parameters() if "norm" not in name and "bias" not in name]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
    assert codes(model, torch.optim.AdamW(groups)) == [("decay", "note", "ln_1.weight")]
    before = model["ln_1"].weight.detach().clone()
    model["ln_1"].weight.grad = torch.zeros(3)
    torch.optim.AdamW(groups).step()
    assert (model["ln_1"].weight < before).all()  # without a gradient, only the weight decay changes the values


def test_strong_weight_decay_for_every_parameter_gets_a_note() -> None:
    """The default weight decay of torch gets none."""
    model = Net()
    assert codes(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1)) == []
    assert codes(model, torch.optim.AdamW(model.parameters(), weight_decay=0.3)) == [("decay", "note", "body.bias")]
    assert validate_param_groups(model, torch.optim.AdamW(model.parameters(), weight_decay=0.3)).ok


def test_a_head_without_weight_decay_does_not_count_as_a_split() -> None:
    model = Net()
    rest = [*model.body.parameters(), *model.norm.parameters()]
    groups = [{"params": rest, "weight_decay": 0.01}, {"params": list(model.head.parameters()), "weight_decay": 0.0}]
    assert codes(model, torch.optim.AdamW(groups)) == []


@pytest.mark.parametrize("key", ["lr_mult", "decay_mult"])
def test_a_multiplier_that_was_applied_is_accepted(key: str) -> None:
    """mmengine writes the product into the group and keeps the factor beside it."""
    model = Net()
    option = "lr" if key == "lr_mult" else "weight_decay"
    rest: dict[str, Any] = {"params": [*model.body.parameters(), *model.norm.parameters()]}
    head: dict[str, Any] = {"params": list(model.head.parameters()), key: 5.0}
    done = torch.optim.SGD([rest, {**head, option: 0.05}], lr=0.01, weight_decay=0.01)
    assert codes(model, done) == []
    waiting = torch.optim.SGD([rest, head], lr=0.01, weight_decay=0.01)
    assert codes(model, waiting) == [("multiplier", "warning", "")]
    assert f"{key} is in 1 group of SGD (the first is group 1), where {option} is still" in message(model, waiting)
