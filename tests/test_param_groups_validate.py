"""``validate_param_groups`` finds real faults of membership, names and options, each made with torch."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from ckptkit.core.findings import Finding
from ckptkit.errors import GroupsError
from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.validate import validate_param_groups

SPEC = {
    "defaults": {"lr": 0.001},
    "group": [{"name": "head", "params": "fc3.*", "lr": 0.01}, {"name": "base", "rest": True}],
}
BASE = ["fc1.weight", "fc1.bias", "bn.weight", "bn.bias", "fc2.weight", "fc2.bias"]
HEAD = ["fc3.weight", "fc3.bias"]


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 5)
        self.bn = nn.BatchNorm1d(5)
        self.fc2 = nn.Linear(5, 5)
        self.fc3 = nn.Linear(5, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc3(self.fc2(self.bn(self.fc1(x))))
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, 4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.wte.weight


def sgd(groups: Any, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=0.1, **options)


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> set[str]:
    """Make one real step, and return the parameters that moved, to check what the findings claim."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else parameter.grad
    for optimizer in optimizers:
        optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def findings(model: nn.Module, groups: Any) -> tuple[Finding, ...]:
    """Return the findings; every finding must have a hint and a message of one line."""
    report = validate_param_groups(model, groups)
    assert report.error is GroupsError
    assert all(finding.hint and "\n" not in finding.message for finding in report.findings)
    return report.findings


def codes(model: nn.Module, groups: Any) -> list[tuple[str, str]]:
    return [(finding.code, finding.key) for finding in findings(model, groups)]


def by_code(code: str, names: Iterable[str]) -> list[tuple[str, str]]:
    return [(code, name) for name in names]


def only(model: nn.Module, groups: Any, code: str) -> Finding:
    """Return the only finding."""
    (finding,) = findings(model, groups)
    assert finding.code == code
    return finding


CLEAN: dict[str, Callable[[nn.Module], Any]] = {
    "built": lambda model: build_param_groups(model, [{"params": "*", "lr": 0.1}]),
    "optimizer": lambda model: sgd(build_param_groups(model, [{"params": "*", "lr": 0.1}])),
    "bare-generator-consumed": lambda model: sgd(model.parameters()),
    "named": lambda model: sgd(model.named_parameters()),
    "list-of-tensors": lambda model: list(model.parameters()),
    "list-of-pairs": lambda model: list(model.named_parameters()),
    "dict-values": lambda model: dict(model.named_parameters()).values(),
    "one-group-per-tensor": lambda model: [{"params": parameter} for parameter in model.parameters()],
    "the-groups-of-an-optimizer": lambda model: sgd(model.named_parameters()).param_groups,
    "one-optimizer-per-parameter": lambda model: [sgd([parameter]) for parameter in model.parameters()],
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("make", [Net, Tied], ids=lambda make: make.__name__)
@pytest.mark.parametrize("form", CLEAN)
def test_correct_groups_have_no_findings(make: Callable[[], nn.Module], form: str) -> None:
    """Correct groups have no findings in any form, with buffers and tied weights."""
    model = make()
    assert findings(model, CLEAN[form](model)) == ()


KEEPS_OBJECTS: dict[str, Callable[[Net], object]] = {
    "half": lambda model: model.half(),
    "to-double": lambda model: model.to(torch.float64),
    "load_state_dict": lambda model: model.load_state_dict(Net().state_dict()),
    "train": lambda model: model.train(),
    "share_memory": lambda model: model.share_memory(),
    "step": lambda model: model(torch.ones(2, 4)).sum().backward(),
    "sync-batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
}


@pytest.mark.parametrize("change", KEEPS_OBJECTS)
def test_changes_that_keep_the_objects_have_no_findings(change: str) -> None:
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC))
    KEEPS_OBJECTS[change](model)
    assert findings(model, optimizer) == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler
def test_wrapping_the_model_has_no_findings() -> None:
    """The prefixes of torch.compile and DataParallel do not matter for recorded names."""
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC))
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    assert findings(compiled, optimizer) == ()
    assert findings(nn.DataParallel(compiled), optimizer) == ()
    assert findings(model, sgd(build_param_groups(compiled, [{"params": "_orig_mod.*"}]))) == ()


def test_a_scheduler_and_a_reloaded_state_leave_no_finding() -> None:
    """Options that schedulers write into groups (initial_lr, max_momentum) cause no finding."""
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC), momentum=0.9)
    for make in (
        lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10),
        lambda: torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1),
        lambda: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.1),
    ):
        make()
        optimizer.load_state_dict(optimizer.state_dict())
        assert findings(model, optimizer) == ()


def test_the_input_is_not_changed() -> None:
    model = Net()
    groups = build_param_groups(model, SPEC)
    before = [dict(group, params=list(group["params"])) for group in groups]
    validate_param_groups(model, groups)
    assert [sorted(group) for group in groups] == [sorted(group) for group in before]
    assert all(
        mine is theirs
        for group, other in zip(groups, before, strict=True)
        for mine, theirs in zip(group["params"], other["params"], strict=True)
    )
    assert findings(model, sgd(groups)) == ()


def test_a_trainable_parameter_in_no_group_is_missing() -> None:
    """A trainable parameter in no group does not move, and the finding says so."""
    model = Net()
    optimizer = sgd([*model.fc1.parameters(), *model.bn.parameters(), *model.fc3.parameters()])
    assert codes(model, optimizer) == by_code("groups.missing", ["fc2.weight", "fc2.bias"])
    assert step(model, optimizer).isdisjoint({"fc2.weight", "fc2.bias"})
    assert "'fc2.weight' (5, 5) is trainable but in no group" in findings(model, optimizer)[0].message


def test_a_frozen_parameter_is_not_missing() -> None:
    """Freezing the parameter, as the hint says, removes the finding."""
    model = Net()
    optimizer = sgd([*model.fc1.parameters(), *model.bn.parameters(), *model.fc3.parameters()])
    model.fc2.requires_grad_(False)
    assert findings(model, optimizer) == ()


def test_twice_in_one_group_is_a_duplicate() -> None:
    """A parameter that is twice in one group is an error; torch only warns, and steps it twice."""
    model = nn.Linear(2, 1, bias=False)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = sgd([model.weight, model.weight])
    finding = only(model, optimizer, "groups.duplicate")
    assert (finding.severity, finding.key) == ("error", "weight")
    assert "2 times (group 0[0] and group 0[1])" in finding.message
    before = model.weight.detach().clone()
    step(model, optimizer)
    assert (before - model.weight).mean().item() == pytest.approx(0.2)  # twice the lr


def test_a_duplicate_across_groups_is_named() -> None:
    model = Net()
    groups = [
        {"params": list(model.parameters()), "name": "all"},
        {"params": list(model.fc3.parameters()), "name": "head"},
    ]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        sgd(groups)
    assert codes(model, groups) == by_code("groups.duplicate", HEAD)
    assert "2 times (group 0 ('all')[6] and group 1 ('head')[0])" in findings(model, groups)[0].message


def test_a_duplicate_across_optimizers_is_found() -> None:
    """Two optimizers are checked together, for duplicates and for missing parameters."""
    model = Net()
    pair = [sgd([*model.fc1.parameters(), *model.fc2.parameters()]), sgd([*model.fc1.parameters(), model.fc3.weight])]
    assert codes(model, pair) == [
        *by_code("groups.duplicate", ["fc1.weight", "fc1.bias"]),
        *by_code("groups.missing", ["bn.weight", "bn.bias", "fc3.bias"]),
    ]
    assert "optimizer 0, group 0[0] and optimizer 1, group 0[0]" in findings(model, pair)[0].message


def test_tied_weights_given_by_both_names_are_a_duplicate() -> None:
    model = Tied()
    assert codes(model, list(model.named_parameters(remove_duplicate=False))) == [("groups.duplicate", "wte.weight")]


def test_equal_values_are_not_the_same_parameter() -> None:
    """Parameters are compared by identity, so clones of the weights are stale."""
    model = Net()
    clones = sgd([nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()])
    found = codes(model, clones)
    assert {code for code, _ in found} == {"groups.stale", "groups.missing"}
    assert [key for code, key in found if code == "groups.missing"] == [*BASE, *HEAD]
    assert step(model, clones) == set()


@pytest.mark.parametrize("named", [True, False], ids=["names-recorded", "no-names"])
def test_a_head_replaced_after_the_optimizer_was_built(named: bool) -> None:
    """A replaced head is missing, and the old one is named, even if torch recorded no names."""
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC) if named else model.parameters())
    model.fc3 = nn.Linear(5, 7)
    found = findings(model, optimizer)
    assert [(finding.code, finding.key) for finding in found] == [
        *by_code("groups.stale", HEAD),
        *by_code("groups.missing", HEAD),
    ]
    place = "group 0 ('head')[0]" if named else "group 0[6]"
    maybe = "" if named else "probably "
    assert found[0].message == (
        f"{place} (3, 5) is {maybe}an older 'fc3.weight': "
        "the model has a new parameter of shape (7, 5), as after replacing a head"
    )
    assert f"{place} holds an older object" in found[2].message
    assert step(model, optimizer) == set(BASE)
    assert findings(model, sgd(build_param_groups(model, SPEC))) == ()  # the way out of the hint


def test_an_old_head_beside_the_new_one_is_stale() -> None:
    """After add_param_group() the new head is no longer missing, but the old one is still stale."""
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC))
    model.fc3 = nn.Linear(5, 3)
    optimizer.add_param_group({"params": [(f"fc3.{name}", p) for name, p in model.fc3.named_parameters()]})
    assert codes(model, optimizer) == by_code("groups.stale", HEAD)
    assert step(model, optimizer) == {*BASE, *HEAD}


@pytest.mark.parametrize("named", [True, False], ids=["names-recorded", "no-names"])
def test_load_state_dict_with_assign_makes_every_group_stale(named: bool) -> None:
    model = Net()
    optimizer = sgd(model.named_parameters() if named else model.parameters())
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    found = findings(model, optimizer)
    assert [finding.key for finding in found if finding.code == "groups.missing"] == [*BASE, *HEAD]
    assert [finding.key for finding in found if finding.code == "groups.stale"] == [*BASE, *HEAD]
    assert "load_state_dict(assign=True)" in found[0].message
    assert step(model, optimizer) == set()


def test_a_model_materialised_after_the_optimizer_was_built() -> None:
    """The parameters on the meta device are stale, although the optimizer steps them silently."""
    with torch.device("meta"):
        model = Net()
    optimizer = sgd(build_param_groups(model, SPEC))
    model.load_state_dict(Net().state_dict(), assign=True)
    found = [finding for finding in findings(model, optimizer) if finding.code == "groups.stale"]
    assert sorted(finding.key for finding in found) == sorted([*BASE, *HEAD])
    assert all("stayed on the meta device" in finding.message for finding in found)


def test_a_model_converted_by_copy() -> None:
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    stale = [finding for finding in findings(model, optimizer) if finding.code == "groups.stale"]
    assert len(stale) == 8
    assert "a new parameter (torch.float64, cpu)" in stale[0].message


def test_an_optimizer_of_a_copied_model() -> None:
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC))
    twin = copy.deepcopy(model)
    assert {code for code, _ in codes(twin, optimizer)} == {"groups.stale", "groups.missing"}
    twin, optimizer = copy.deepcopy((model, optimizer))
    assert findings(twin, optimizer) == ()


@pytest.mark.parametrize("named", [True, False], ids=["names-recorded", "no-names"])
@pytest.mark.parametrize("source", ["state_dict", "data"])
def test_an_optimizer_built_from_state_dict_or_data(source: str, named: bool) -> None:
    """Tensors of state_dict() or .data share memory with the parameters but get no gradient."""
    model = Net()
    pairs = [(name, tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    if source == "data":
        pairs = [(name, parameter.data) for name, parameter in model.named_parameters()]
    pairs = [(name, tensor) for name, tensor in pairs if "running" not in name]
    optimizer = sgd(pairs if named else [tensor for _, tensor in pairs])
    found = findings(model, optimizer)
    assert [(finding.code, finding.key) for finding in found] == [
        *by_code("groups.stale", [*BASE, *HEAD]),
        *by_code("groups.missing", [*BASE, *HEAD]),
    ]
    assert "group 0[0] (5, 4) shares the memory of 'fc1.weight' but is another object" in found[0].message
    assert "never from state_dict()" in found[0].hint
    assert step(model, optimizer) == set()


def test_weight_norm_applied_after_the_optimizer_was_built() -> None:
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC))
    nn.utils.parametrizations.weight_norm(model.fc2)
    found = findings(model, optimizer)
    assert [(finding.code, finding.key) for finding in found] == [
        ("groups.stale", "fc2.parametrizations.weight.original0"),
        ("groups.missing", "fc2.parametrizations.weight.original0"),
        ("groups.missing", "fc2.parametrizations.weight.original1"),
    ]
    assert (
        "'fc2.weight' became 'fc2.parametrizations.weight.original0' and 'fc2.parametrizations.weight.original1' "
        "when weight_norm of torch.nn.utils.parametrizations was applied" in found[0].message
    )


def test_several_candidates_of_one_shape_are_all_named() -> None:
    """If several parameters could be the old one, the finding lists them and has no key."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    old = model[0].weight
    model[0] = nn.Linear(2, 2, bias=False)
    finding = findings(model, [old, model[2].weight])[0]
    assert (finding.code, finding.key) == ("groups.stale", "")
    assert (
        "group 0[0] (2, 2) is not in the model; it may be an older '0.weight' or '1.weight', which was replaced"
        in finding.message
    )


def test_ids_cannot_be_recycled_while_they_are_compared() -> None:
    """A recycled id never makes a new parameter look like one in the groups."""

    class Fleeting(nn.Module):
        def named_parameters(self, *_: Any, **__: Any) -> Any:
            for name in "uvw":
                yield name, nn.Parameter(torch.zeros(2))

    groups = [parameter for _, parameter in Fleeting().named_parameters()]
    assert codes(Fleeting(), groups) == [*by_code("groups.stale", "uvw"), *by_code("groups.missing", "uvw")]


@pytest.mark.parametrize("named", [True, False], ids=["names-recorded", "no-names"])
def test_a_parameter_of_another_model_is_foreign(named: bool) -> None:
    model, other = Net(), nn.Linear(9, 9, bias=False)
    groups: list[Any] = [*model.named_parameters(), ("extra.weight", other.weight)]
    finding = only(model, sgd(groups if named else [tensor for _, tensor in groups]), "groups.foreign")
    assert finding.key == ("extra.weight" if named else "")
    assert "group 0[8]" in finding.message
    assert (
        "no parameter of that name" if named else "the model has no parameter that it could have been"
    ) in finding.message


def test_a_module_in_a_plain_list_is_unregistered() -> None:
    """A module in a plain list is unregistered; nn.ModuleList, as the hint says, removes the finding."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.blocks: Any = [nn.Linear(3, 3)]

    model = Hidden()
    groups = [*model.first.parameters(), *model.blocks[0].parameters()]
    finding = only(model, groups, "groups.unregistered")
    assert (finding.key, finding.severity) == ("blocks[0]", "warning")
    assert "it trains, but state_dict() does not save it" in finding.message
    assert "nn.ModuleList" in finding.hint
    assert not any(name.startswith("blocks") for name in model.state_dict())
    model.blocks = nn.ModuleList(model.blocks)
    assert findings(model, groups) == ()


def test_a_buffer_is_not_a_parameter() -> None:
    """A buffer in a group is an error, although torch accepts it."""
    model = Net()
    optimizer = sgd([*model.parameters(), *model.buffers()])
    assert codes(model, optimizer) == by_code(
        "groups.buffer", ["bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    )


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        pytest.param(nn.Linear(1, 1), "a Linear", id="module"),
        pytest.param("fc1.weight", "a str", id="name"),
        pytest.param(None, "a NoneType", id="none"),
        pytest.param(nn.Parameter(torch.ones(1)) * 2, "result of a computation", id="not-a-leaf"),
    ],
)
def test_what_no_optimizer_can_train_is_named(thing: Any, words: str) -> None:
    model = Net()
    groups = [{"params": [*model.parameters(), thing]}]
    with pytest.raises((TypeError, ValueError)):
        sgd(groups)
    finding = only(model, groups, "groups.not-a-parameter")
    assert "group 0[8]" in finding.message
    assert words in finding.message


@pytest.mark.parametrize(
    ("params", "words"),
    [
        pytest.param(dict(Net().named_parameters()), "has a dict as params", id="dict"),
        pytest.param("fc1.*", "has a str as params", id="str"),
        pytest.param(Net(), "has a Net as params", id="module"),
        pytest.param(None, "has no params", id="none"),
    ],
)
def test_unreadable_params_leave_the_missing_unknown(params: Any, words: str) -> None:
    """Unreadable params give one finding, and no parameter is reported as missing."""
    finding = only(Net(), [{"params": params, "name": "all"}], "groups.not-a-parameter")
    assert finding.message == f"group 0 ('all') {words}"
    assert only(Net(), [{"lr": 0.1}], "groups.not-a-parameter").message == "group 0 has no params"


@pytest.mark.parametrize(
    "given",
    [
        pytest.param("fc1", id="str"),
        pytest.param({"params": []}, id="one-dict"),
        pytest.param(Net(), id="module"),
        pytest.param(torch.ones(2), id="tensor"),
        pytest.param(None, id="none"),
        pytest.param(3, id="int"),
        pytest.param([{"params": []}, torch.ones(1)], id="mixed"),
        pytest.param([sgd([nn.Parameter(torch.ones(1))]), torch.ones(1)], id="optimizer-and-tensor"),
    ],
)
def test_other_types_of_groups_are_refused(given: Any) -> None:
    with pytest.raises(GroupsError) as caught:
        validate_param_groups(Net(), given)
    assert "pass the list of group dicts" in (caught.value.hint or "")


def test_other_types_of_models_are_refused() -> None:
    with pytest.raises(GroupsError, match=r"the model is an OrderedDict"):
        validate_param_groups(Net().state_dict(), [])  # type: ignore[arg-type]


def test_a_frozen_parameter_in_a_group_is_a_warning() -> None:
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC))
    model.fc1.requires_grad_(False)
    assert codes(model, optimizer) == by_code("groups.frozen", ["fc1.weight", "fc1.bias"])
    assert validate_param_groups(model, optimizer).ok
    assert step(model, optimizer).isdisjoint({"fc1.weight", "fc1.bias"})


def test_a_frozen_parameter_with_a_gradient_left_is_an_error() -> None:
    """A frozen parameter with a .grad is an error: momentum and weight decay still move it."""
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC), momentum=0.9)
    assert step(model, optimizer) == {*BASE, *HEAD}
    model.fc1.requires_grad_(False)
    optimizer.zero_grad(set_to_none=False)
    found = findings(model, optimizer)
    assert [(finding.severity, finding.key) for finding in found] == [("error", "fc1.weight"), ("error", "fc1.bias")]
    assert "a step still changes it, even if .grad is 0" in found[0].message
    assert step(model, optimizer) >= {"fc1.weight", "fc1.bias"}
    optimizer.zero_grad(set_to_none=True)  # the way out
    assert validate_param_groups(model, optimizer).ok
    assert step(model, optimizer).isdisjoint({"fc1.weight", "fc1.bias"})


def test_an_uninitialised_parameter_in_a_group_is_a_warning_until_the_first_forward_pass() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    optimizer = sgd(model.parameters())
    assert codes(model, optimizer) == by_code("groups.lazy", ["0.weight", "0.bias"])
    model(torch.ones(1, 5))
    assert findings(model, optimizer) == ()


def test_stale_and_missing_ones_may_be_uninitialised() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    optimizer = sgd(model.named_parameters())
    model[0] = nn.LazyLinear(4)
    assert [code for code, _ in codes(model, optimizer)] == ["groups.stale"] * 2 + ["groups.missing"] * 2


ONE_SHOT: dict[str, Callable[[nn.Module], Any]] = {
    "generator": lambda model: (parameter for parameter in model.parameters()),
    "parameters()": lambda model: model.parameters(),
    "named_parameters()": lambda model: model.named_parameters(),
    "filter": lambda model: filter(lambda parameter: parameter.requires_grad, model.parameters()),
    "map": lambda model: map(operator.itemgetter(1), model.named_parameters()),
    "zip": lambda model: zip(HEAD, model.parameters(), strict=False),
    "chain": lambda model: itertools.chain(model.parameters()),
    "iter": lambda model: iter(list(model.parameters())),
}


@pytest.mark.parametrize("kind", ONE_SHOT)
def test_a_one_shot_iterator_is_reported_and_not_consumed(kind: str) -> None:
    """An iterator is reported and not consumed, and no parameter is reported as missing."""
    model = Net()
    params = ONE_SHOT[kind](model)
    finding = only(model, [{"params": params, "name": "base"}], "groups.one-shot")
    assert f"group 0 ('base') has a {type(params).__name__} as params, which can be read only once" in finding.message
    assert "list(" in finding.hint
    only(model, params, "groups.one-shot")
    assert len(list(params)) == len(list(ONE_SHOT[kind](model))) > 0


def test_other_faults_are_found_beside_a_one_shot_iterator() -> None:
    model = Net()
    groups = [{"params": [model.fc3.weight, model.fc3.weight]}, {"params": model.fc1.parameters()}]
    assert codes(model, groups) == [("groups.one-shot", ""), ("groups.duplicate", "fc3.weight")]


def test_an_exhausted_filter_leaves_an_empty_group_in_the_optimizer() -> None:
    """An exhausted filter() leaves an empty group, and its parameters are missing; torch accepts it."""
    model = Net()
    head = set(map(id, model.fc3.parameters()))
    base = filter(lambda parameter: id(parameter) not in head, model.parameters())
    sum(parameter.numel() for parameter in base)
    optimizer = sgd([{"params": base}, {"params": model.fc3.parameters(), "lr": 0.01}])
    assert codes(model, optimizer) == [("groups.empty", ""), *by_code("groups.missing", BASE)]
    assert "group 0 is empty" in findings(model, optimizer)[0].message
    message = findings(model, optimizer)[0].message
    assert "was it built from a filter() or a generator that had been read before?" in message
    assert step(model, optimizer) == set(HEAD)


def test_no_groups_are_one_empty_group() -> None:
    assert codes(Net(), []) == [("groups.empty", ""), *by_code("groups.missing", [*BASE, *HEAD])]


@pytest.mark.parametrize("inside", [True, False], ids=["in-a-dict", "bare"])
@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_has_no_order(kind: Callable[[Iterable[Any]], Any], inside: bool) -> None:
    """A set is an error in a dict and on its own; torch accepts the second."""
    model = Net()
    params = kind(model.parameters())
    finding = only(model, [{"params": params}] if inside else params, "groups.unordered")
    assert "saved by position" in finding.message


def test_names_that_a_loaded_state_dict_put_in_the_wrong_order() -> None:
    """Names that a load_state_dict() put in another order are errors."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    pairs = list(model.named_parameters())
    optimizer = sgd(pairs)
    optimizer.load_state_dict(sgd(pairs[::-1]).state_dict())
    found = findings(model, optimizer)
    assert [(finding.code, finding.severity, finding.key) for finding in found] == [
        ("groups.names", "error", "0.weight"),
        ("groups.names", "error", "1.weight"),
    ]
    assert "group 0[0] (2, 2) is recorded as '1.weight' but is '0.weight'" in found[0].message


def test_an_old_name_is_a_warning() -> None:
    """A renamed parameter still trains, so its old recorded name is only a warning."""
    model = Net()
    optimizer = sgd(build_param_groups(model, SPEC))
    prune.l1_unstructured(model.fc2, "weight", 0.5)  # type: ignore[no-untyped-call]
    finding = only(model, optimizer, "groups.names")
    assert (finding.severity, finding.key) == ("warning", "fc2.weight_orig")


def test_an_alias_is_a_valid_name() -> None:
    model = Tied()
    assert findings(model, sgd([("lm_head.weight", model.lm_head.weight)])) == ()


def test_names_and_parameters_that_disagree_in_number() -> None:
    model = Net()
    optimizer = sgd(list(model.named_parameters()))
    del optimizer.param_groups[0]["param_names"][0]
    finding = only(model, optimizer, "groups.names")
    assert "7 names in param_names for 8 parameters" in finding.message


def test_names_for_some_parameters_are_an_error() -> None:
    model = nn.Linear(2, 2)
    groups = [{"params": [("weight", model.weight), model.bias]}]
    assert "names 1 of its 2 parameters" in only(model, groups, "groups.names").message
    with pytest.raises((ValueError, TypeError), match=r"with/without names|can only optimize Tensors"):
        sgd(groups)


@pytest.mark.parametrize("lr", ["1e-3", -1, float("nan"), True], ids=str)
def test_a_learning_rate_that_torch_does_not_check(lr: Any) -> None:
    """A wrong lr of a group is an error, which torch does not check."""
    model = Net()
    optimizer = sgd([{"params": list(model.parameters()), "lr": lr}])
    finding = only(model, optimizer, "groups.option-value")
    assert finding.message.startswith("group 0: lr is ")


@pytest.mark.parametrize(
    ("key", "intended"),
    [("learning_rate", "lr"), ("wd", "weight_decay"), ("weight_decy", "weight_decay"), ("momentun", "momentum")],
)
def test_an_option_that_the_optimizer_does_not_read(key: str, intended: str) -> None:
    """An option that the optimizer does not read is a warning with a suggestion."""
    model = Net()
    finding = only(model, sgd([{"params": list(model.parameters()), key: 0.5}]), "groups.option-unread")
    assert (finding.severity, finding.hint) == ("warning", f"did you mean '{intended}'?")
    assert f"'{key}' is not read by SGD" in finding.message


def test_betas_are_not_for_sgd() -> None:
    model = Net()
    groups = build_param_groups(model, [{"rest": True, "betas": [0.9, 0.99], "learning_rate": 1.0}])
    assert [(finding.code, finding.message) for finding in findings(model, groups)] == [
        ("groups.option-unread", "group 0 ('rest'): 'learning_rate' is not read by torch.optim")
    ]
    assert [finding.code for finding in findings(model, sgd(groups))] == ["groups.option-unread"] * 2
    assert [finding.code for finding in findings(model, torch.optim.Adam(model.parameters()))] == []


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lrr", "did you mean 'lr'?"),
        ("weight_dekay", "did you mean 'weight_decay'?"),
        ("wd", "did you mean 'weight_decay'?"),
        ("whatever", "remove it, or correct its name"),
        ("rho", None),
        ("fused", None),
        ("lr_scale", None),
    ],
)
def test_an_option_that_no_optimizer_reads(key: str, hint: str | None) -> None:
    """Groups without an optimizer can have every option of any class of torch.optim."""
    model = Net()
    groups = build_param_groups(model, [{"rest": True, key: 0.5}])
    if hint is None:
        assert findings(model, groups) == ()
    else:
        finding = only(model, groups, "groups.option-unread")
        assert (finding.severity, finding.hint) == ("warning", hint)


def test_a_report_has_a_line_for_each_finding_and_its_hint() -> None:
    model = Net()
    report = validate_param_groups(model, [{"params": [p for n, p in model.named_parameters() if n != "fc3.bias"]}])
    line, hint, count = str(report).splitlines()
    assert line.startswith("error: 'fc3.bias' (3,) is trainable but in no group")
    assert line.endswith("  [groups.missing]")
    assert hint == f"  {report.findings[0].hint}"
    assert count == "1 error"
    found_nothing = validate_param_groups(model, list(model.parameters()))
    assert str(found_nothing) == f"{len(list(model.parameters()))} trainable parameters, each in exactly one of 1 group"


def test_other_optimizers_may_keep_counters_in_a_group() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": None, "scale": 1.0})

    model = Net()
    optimizer = Own(model.parameters())
    optimizer.param_groups[0]["k"] = 3
    assert findings(model, optimizer) == ()
    optimizer.param_groups[0]["scales"] = 3
    assert only(model, optimizer, "groups.option-unread").hint == "did you mean 'scale'?"


def test_a_missing_option_is_an_error() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    del optimizer.param_groups[0]["betas"]
    assert "group 0 has no 'betas'" in only(model, optimizer, "groups.option-missing").message
    with pytest.raises(KeyError, match="betas"):
        step(model, optimizer)


@settings(deadline=None)
@given(st.data())
def test_findings_are_exactly_the_faults_that_were_put_in(data: st.DataObject) -> None:
    """For random groups, the missing, duplicate, stale and foreign tensors are exactly those that were put in."""
    model, other = Net(), nn.Linear(7, 7)
    live = list(model.named_parameters())
    chosen = data.draw(st.lists(st.sampled_from(range(len(live))), max_size=14))
    old = data.draw(st.lists(st.sampled_from(range(len(live))), unique=True, max_size=4))
    pairs = [live[index] for index in chosen]
    pairs += [(live[index][0], nn.Parameter(live[index][1].detach().clone())) for index in old]
    pairs += data.draw(st.sampled_from([[], [("other.weight", other.weight)]]))
    pairs = data.draw(st.permutations(pairs))
    cut = data.draw(st.integers(0, len(pairs)))
    groups = [{"params": part} for part in (pairs[:cut], pairs[cut:]) if part]
    if not groups:
        return
    found = codes(model, groups)
    names = [name for name, _ in live]
    assert sorted(key for code, key in found if code == "groups.missing") == sorted(
        names[index] for index in range(len(live)) if index not in chosen
    )
    assert sorted(key for code, key in found if code == "groups.duplicate") == sorted(
        names[index] for index in set(chosen) if chosen.count(index) > 1
    )
    assert sorted(key for code, key in found if code == "groups.stale") == sorted(names[index] for index in old)
    assert [key for code, key in found if code == "groups.foreign"] == [n for n, _ in pairs if n == "other.weight"]
    assert {code for code, _ in found} <= {"groups.missing", "groups.duplicate", "groups.stale", "groups.foreign"}
