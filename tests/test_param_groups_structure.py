"""``validate_param_groups`` finds parts of a model that are unregistered, shared, replaced or without memory."""

from __future__ import annotations

import copy
import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from ckptkit.core.findings import Finding
from ckptkit.param_groups.validate import validate_param_groups
from tests.features import takes_names


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Adapted(nn.Module):
    """A linear layer with a low-rank update, with the attributes that peft uses."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lm_head(self.body(self.wte(x)))
        return out


def sgd(groups: Any, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups, **{"lr": 0.1, **options})


def findings(model: nn.Module, groups: Any, code: str = "") -> list[Finding]:
    """Return the findings, or those of one code; each must have a hint and a message of one line."""
    found = validate_param_groups(model, groups).findings
    assert all(finding.hint and "\n" not in finding.message for finding in found)
    return [finding for finding in found if not code or finding.code == f"groups.{code}"]


def only(model: nn.Module, groups: Any, code: str) -> Finding:
    (finding,) = findings(model, groups)
    assert finding.code == f"groups.{code}"
    return finding


def moved(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor | None = None) -> set[str]:
    """Make one real training step, and return the parameters that moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(torch.ones(2, 4) if x is None else x).sum().backward()
    optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def test_the_gradient_of_a_missing_parameter_grows() -> None:
    """The .grad of a missing parameter grows, because zero_grad() of the optimizer skips it."""
    model: Any = net()
    optimizer = sgd(model[0].parameters())
    missing = findings(model, optimizer, "missing")
    assert [finding.key for finding in missing] == ["2.weight", "2.bias"]
    assert "'2.weight' (3, 5) is trainable but in no group" in missing[0].message
    assert "its .grad grows, because optimizer.zero_grad() skips it" in missing[0].message
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        norms.append(float(model[2].bias.grad.norm()))
    assert norms[0] < norms[1] < norms[2]


@pytest.mark.parametrize("named", [True, False], ids=["names-recorded", "no-names"])
def test_an_adapter_added_after_the_optimizer_is_missing(named: bool) -> None:
    """An adapter that is added after the optimizer is missing, and the old parameters are frozen."""
    model: Any = net()
    optimizer = sgd(model.named_parameters() if named else model.parameters())
    model[0], model[2] = Adapted(model[0]), Adapted(model[2])
    assert [finding.key for finding in findings(model, optimizer, "missing")] == [
        f"{index}.lora_{factor}.default.weight" for index in (0, 2) for factor in "AB"
    ]
    assert "after you add the adapter" in findings(model, optimizer, "missing")[0].hint
    assert len(findings(model, optimizer, "frozen")) == 4
    renamed = findings(model, optimizer, "names")
    assert [finding.key for finding in renamed] == (
        ["0.base_layer.weight", "0.base_layer.bias", "2.base_layer.weight", "2.base_layer.bias"] if named else []
    )
    if named:
        assert "an adapted layer of a PeftModel" in renamed[0].message
        assert "rename '0.weight' to '0.base_layer.weight'" in renamed[0].hint
    assert moved(model, optimizer) == set()
    again = sgd([pair for pair in model.named_parameters() if pair[1].requires_grad])
    assert findings(model, again) == []


RENAMED: dict[str, tuple[Callable[[nn.Module], object], str, str]] = {
    "prune": (
        lambda module: prune.l1_unstructured(module, "weight", 0.5),  # type: ignore[no-untyped-call]
        "weight_orig",
        "torch.nn.utils.prune was applied",
    ),
    "old-spectral-norm": (nn.utils.spectral_norm, "weight_orig", "torch.nn.utils.spectral_norm was applied"),
    "spectral-norm": (
        nn.utils.parametrizations.spectral_norm,
        "parametrizations.weight.original",
        "spectral_norm of torch.nn.utils.parametrizations was applied",
    ),
    "orthogonal": (
        nn.utils.parametrizations.orthogonal,
        "parametrizations.weight.original",
        "torch.nn.utils.parametrize was applied",
    ),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("change", RENAMED)
def test_a_changed_name_is_a_warning_with_the_new_name(change: str) -> None:
    """A renamed parameter is a warning with the new name, because its saved state would not be found."""
    apply, now, cause = RENAMED[change]
    model = net()
    optimizer = sgd(model.named_parameters())
    apply(model[2])
    finding = only(model, optimizer, "names")
    assert (finding.severity, finding.key) == ("warning", f"2.{now}")
    assert f"group 0[2] (3, 5) is recorded as '2.weight' but is '2.{now}', its name since {cause}" in finding.message
    assert f"rename '2.weight' to '2.{now}'" in finding.hint
    assert f"2.{now}" in moved(model, optimizer)
    assert findings(model, sgd(model.named_parameters())) == []


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("old", [True, False], ids=["nn.utils", "parametrizations"])
def test_weight_norm_makes_two_new_parameters_of_one(old: bool) -> None:
    """Weight norm replaces a weight by two parameters, and the old weight is stale."""
    model = net()
    optimizer = sgd(model.named_parameters())
    (nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm)(model[2])
    first, second = ("2.weight_g", "2.weight_v") if old else (f"2.parametrizations.weight.original{i}" for i in (0, 1))
    (stale,) = findings(model, optimizer, "stale")
    assert stale.key == first
    assert f"'2.weight' became '{first}' and '{second}' when " in stale.message
    assert [finding.key for finding in findings(model, optimizer, "missing")] == [first, second]
    assert moved(model, optimizer) == {"0.weight", "0.bias", "2.bias"}
    assert findings(model, sgd(model.named_parameters())) == []


def test_removing_weight_norm_makes_a_new_parameter() -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model[2])
    optimizer = sgd(model.named_parameters())
    parametrize.remove_parametrizations(model[2], "weight")
    stale = findings(model, optimizer, "stale")
    assert [finding.key for finding in stale] == ["2.weight", "2.weight"]
    assert "became '2.weight' when weight_norm of torch.nn.utils.parametrizations was removed" in stale[0].message
    assert "2.weight" not in moved(model, optimizer)


def test_an_unknown_rename_reports_both_names() -> None:
    model = net()
    optimizer = sgd(model.named_parameters())
    model[2] = nn.ModuleDict({"inner": model[2]})
    finding = findings(model, optimizer)[0]
    assert "group 0[2] (3, 5) is recorded as '2.weight' but is '2.inner.weight', its name in the model now" in (
        finding.message
    )


def test_a_stale_parameter_whose_name_was_recorded_from_a_part_of_the_model() -> None:
    """A stale parameter is found although its name was recorded from a part of the model."""
    model = nn.ModuleDict({"body": nn.Linear(4, 5), "head": nn.Linear(5, 3)})
    optimizer = sgd([{"params": model[part].named_parameters(), "name": part} for part in model])
    (finding, _) = findings(model, optimizer)
    assert (finding.code, finding.severity) == ("groups.names", "warning")
    assert (
        "group 0 ('body')[0] and group 1 ('head')[0] are two parameters, both recorded as 'weight'" in finding.message
    )
    model["head"] = nn.Linear(5, 7)
    assert [finding.key for finding in findings(model, optimizer, "stale")] == ["head.weight", "head.bias"]


def reassign(model: nn.Sequential) -> nn.Module:
    model[2].weight = nn.Parameter(torch.zeros(3, 5))
    return model


def replace(model: nn.Sequential) -> nn.Module:
    model[2] = nn.Linear(5, 3)
    return model


def assign(model: nn.Sequential) -> nn.Module:
    model.load_state_dict(net().state_dict(), assign=True)
    return model


def overwrite(model: nn.Sequential) -> nn.Module:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


REPLACED: dict[str, tuple[Callable[[nn.Sequential], nn.Module], int, str]] = {
    "new-parameter": (reassign, 1, "replacing its module, or assigning a new nn.Parameter"),
    "new-module": (replace, 2, "replacing the module '2', or load_state_dict(assign=True) on it"),
    "assign=True": (assign, 4, "load_state_dict(assign=True), a deep copy, or loading a whole model"),
    "deepcopy": (copy.deepcopy, 4, "load_state_dict(assign=True), a deep copy, or loading a whole model"),
    "average": (
        torch.optim.swa_utils.AveragedModel,
        4,
        "an AveragedModel is a copy, so validate the model that trains",
    ),
    "to-meta": (lambda model: model.to("meta"), 4, "a new parameter on the meta device, as after to('meta')"),
    "overwrite": (overwrite, 4, "a new parameter (torch.float64, cpu), as after a conversion that copies"),
}


@pytest.mark.parametrize("named", [True, False], ids=["names-recorded", "no-names"])
@pytest.mark.parametrize("change", REPLACED)
def test_each_way_to_replace_the_objects_is_explained(change: str, named: bool) -> None:
    """Each way to replace the objects gives stale and missing pairs, with its cause."""
    change_objects, count, cause = REPLACED[change]
    model = net()
    optimizer = sgd(model.named_parameters() if named else model.parameters())
    changed = change_objects(model)
    stale, missing = findings(changed, optimizer, "stale"), findings(changed, optimizer, "missing")
    assert len(stale) == len(missing) == count == len(findings(changed, optimizer)) // 2
    assert [finding.key for finding in stale] == [finding.key for finding in missing]
    assert all(cause in finding.message for finding in stale), stale[0].message
    if change not in {"to-meta", "overwrite"}:
        assert moved(changed, optimizer).isdisjoint(finding.key for finding in missing)


def test_swapping_the_content_keeps_the_objects() -> None:
    """A conversion that swaps the content of parameters keeps the objects, and has no findings."""
    model = net()
    optimizer = sgd(model.named_parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert findings(model, optimizer) == []


def test_a_model_that_was_given_memory_after_the_optimizer_was_built() -> None:
    """Parameters that stayed on the meta device after to_empty() are stale."""
    model = net().to("meta")
    optimizer = sgd(model.named_parameters())
    model.to_empty(device="cpu").load_state_dict(net().state_dict())
    stale = findings(model, optimizer, "stale")
    assert len(stale) == 4
    assert "it stayed on the meta device when the model got memory" in stale[0].message
    assert moved(model, optimizer) == set()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.ao.quantization
def test_fused_modules_say_where_the_batch_norm_went() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    optimizer = sgd(model.named_parameters())
    fused = torch.ao.quantization.fuse_modules(model, [["0", "1"]])  # type: ignore[no-untyped-call]
    assert [finding.key for finding in findings(fused, optimizer, "missing")] == ["0.weight", "0.bias"]
    stale = findings(fused, optimizer, "stale")
    assert [finding.key for finding in stale] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert "group 0[2] (4,) was '1.weight': '1' is now an Identity, as after fuse_modules()" in stale[2].message


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, of its quantisation
def test_a_quantised_model_has_no_parameter() -> None:
    """A quantised model has no parameters: a note says so, and each old parameter has its reason."""
    model = net()
    optimizer = sgd(model.named_parameters())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})  # type: ignore[no-untyped-call]
    assert list(quantised.parameters()) == []
    stale = findings(quantised, optimizer, "stale")
    assert [finding.key for finding in stale] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert "'0' is now a quantised Linear, which does not train" in stale[0].message
    (note,) = findings(quantised, optimizer, "no-parameters")
    assert note.severity == "note"
    assert "no parameter ('LinearPackedParams' and 'Tanh')" in note.message


def test_a_weight_that_was_tied_after_the_optimizer_was_built() -> None:
    model = Tied()
    model.lm_head.weight = nn.Parameter(torch.zeros(6, 4))
    optimizer = sgd(model.named_parameters())
    assert findings(model, optimizer) == []
    model.lm_head.weight = model.wte.weight
    finding = only(model, optimizer, "stale")
    assert "'lm_head.weight' was tied to 'wte.weight' after the groups were built" in finding.message


def test_a_weight_that_was_untied_after_the_optimizer_was_built() -> None:
    model = Tied()
    optimizer = sgd(model.named_parameters())
    model.lm_head.weight = nn.Parameter(model.wte.weight.detach().clone())
    assert only(model, optimizer, "missing").key == "lm_head.weight"
    assert "lm_head.weight" not in moved(model, optimizer, torch.tensor([0, 1]))


def test_a_fresh_batch_norm_is_not_taken_for_another_one_of_equal_values() -> None:
    """Two new BatchNorms have equal values but are different parameters."""
    model: Any = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    assert torch.equal(model[0].weight, model[1].weight)
    assert torch.equal(model[0].bias, model[1].bias)
    optimizer = sgd(model[0].parameters())
    missing = findings(model, optimizer)
    assert [(finding.code, finding.key) for finding in missing] == [
        ("groups.missing", "1.weight"),
        ("groups.missing", "1.bias"),
    ]
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, torch.ones(4))


def test_no_recycled_id_makes_a_new_layer_look_like_the_old_one() -> None:
    """A recycled id never makes a new layer look like the old one, because compared objects are kept alive."""
    for _ in range(30):
        model = net()
        old = [id(parameter) for parameter in model[2].parameters()]
        optimizer = sgd(model.parameters())
        model[2] = nn.Linear(5, 3)
        del model[2].bias
        gc.collect(0)
        model[2].register_parameter("bias", nn.Parameter(torch.zeros(3)))
        assert not {id(parameter) for parameter in model.parameters()} & set(old)  # the optimizer holds them
        assert [finding.key for finding in findings(model, optimizer, "stale")] == ["2.weight", "2.bias"]
        assert [finding.key for finding in findings(model, optimizer, "missing")] == ["2.weight", "2.bias"]


class Pair(tuple[nn.Module, ...]):
    """A tuple that refuses ``len()`` and iteration, as the irreps of e3nn do."""

    __slots__ = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Any:
        raise NotImplementedError


class Unregistered(nn.Module):
    """Trainable parts in attributes that ``parameters()`` does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks: Any = [nn.Linear(4, 4), nn.Tanh()]
        self.by_name: Any = {"a": {"deep": Pair([nn.Linear(4, 4, bias=False)])}}
        self.scale = torch.ones(4, requires_grad=True)
        self.queue = deque([torch.ones(4, requires_grad=True)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[1](self.blocks[0](self.first(x)))
        out: torch.Tensor = self.by_name["a"]["deep"][0](x) * self.scale + self.queue[0]
        return out


def test_unregistered_parts_never_train() -> None:
    model = Unregistered()
    optimizer = sgd(model.named_parameters())
    found = findings(model, optimizer)
    assert [(finding.code, finding.severity) for finding in found] == [("groups.unregistered", "warning")] * 4
    assert [finding.key for finding in found] == ["blocks[0]", "by_name['a']['deep'][0]", "scale", "queue[0]"]
    assert "'blocks[0]' (Linear, 2 trainable parameters, 20 elements) is in a plain list" in found[0].message
    assert "in a plain dict" in found[1].message
    assert "'scale' (4,) is a trainable tensor in a plain attribute" in found[2].message
    assert "it gets a gradient but never trains" in found[2].message
    before = model.blocks[0].weight.detach().clone()
    assert moved(model, optimizer) == {"first.weight", "first.bias"}
    assert model.blocks[0].weight.grad is not None
    assert model.scale.grad is not None
    assert torch.equal(model.blocks[0].weight, before)


def test_an_unregistered_part_in_a_group_is_not_saved() -> None:
    """An unregistered part in a group has one finding, and is not foreign."""
    model = Unregistered()
    inside = [*model.parameters(), *model.blocks[0].parameters(), model.scale]
    found = findings(model, sgd(inside))
    assert [finding.code for finding in found] == ["groups.unregistered"] * 4
    assert "it trains, but state_dict() does not save it" in found[0].message
    assert "never trains" in found[1].message
    some = findings(model, sgd([*model.parameters(), model.blocks[0].weight]))[0]
    assert "1 of its 2 parameters get a gradient and are in no group" in some.message


def test_registered_and_frozen_modules_in_lists_are_no_fault() -> None:
    """Registered layers in a list, a frozen teacher, and the weight list of an LSTM have no findings."""

    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rnn = nn.Linear(4, 4), nn.LSTM(4, 4)
            self.layers: Any = [self.first, self.rnn]
            self.teacher: Any = [nn.Linear(4, 4).requires_grad_(False)]
            self.mean, self.cache = torch.ones(4), {"last": torch.ones(4, requires_grad=True) * 2}
            self.layers.append(self.layers)

    model = Open()
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    assert findings(model, sgd(model.named_parameters())) == []


def test_a_tied_weight_in_two_groups_is_one_parameter() -> None:
    """A tied weight in two groups is an error with both names and both places."""
    model = Tied()
    groups = [
        {"params": [*model.wte.parameters(), *model.body.parameters()], "name": "base", "lr": 0.1},
        {"params": list(model.lm_head.parameters()), "name": "head", "lr": 1.0},
    ]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        sgd(groups)
    (error,) = findings(model, groups, "tied")
    assert (error.severity, error.key) == ("error", "wte.weight")
    assert "'wte.weight' and 'lm_head.weight' are one tied parameter (6, 4)" in error.message
    assert "several groups hold it (group 0 ('base')[0] and group 1 ('head')[0])" in error.message


def test_a_tied_weight_is_noted_if_lrs_differ() -> None:
    """A tied weight is noted only if the groups have different lrs."""
    model: Any = Tied()
    head = {id(parameter) for parameter in model.lm_head.parameters()}
    base = [parameter for parameter in model.parameters() if id(parameter) not in head]
    groups: list[dict[str, Any]] = [{"params": base}, {"params": [model.lm_head.weight], "lr": 1.0, "name": "head"}]
    optimizer = sgd(groups)
    note = only(model, optimizer, "tied")
    assert (note.severity, note.key) == ("note", "wte.weight")
    assert "it trains in group 1 ('head') with lr=1 under each of its names" in note.message
    before = model.wte.weight.detach().clone()
    moved(model, optimizer, torch.tensor([0]))
    assert torch.allclose(before - model.wte.weight, 1.0 * model.wte.weight.grad)  # at the rate of the head
    optimizer.param_groups[1]["lr"] = 0.1
    assert findings(model, optimizer) == []


@pytest.mark.parametrize("part", [slice(None), slice(2, 6)], ids=["all", "part"])
def test_two_parameters_with_one_memory_are_stepped_twice(part: slice) -> None:
    """Two parameters with one memory are a warning, because each step changes both."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    memory = torch.arange(24.0).view(6, 4)
    model[0].weight = nn.Parameter(memory[:4])
    model[1].weight = nn.Parameter(memory[:4] if part == slice(None) else memory[part])
    optimizer = sgd(model.parameters())
    finding = only(model, optimizer, "shared-memory")
    assert (finding.severity, finding.key) == ("warning", "1.weight")
    assert "'0.weight' (4, 4) in group 0[0] and '1.weight' (4, 4) in group 0[1]" in finding.message
    assert (
        "are two parameters with the same memory" if part == slice(None) else "overlap in memory"
    ) in finding.message
    shared, before = (3, 0), memory[3, 0].item()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert memory[shared].item() == pytest.approx(before - 2 * 0.1)  # twice the lr


def test_views_without_a_common_element_do_not_overlap() -> None:
    """Rows or columns of one matrix do not overlap, although columns alternate in memory."""
    memory = torch.zeros(6, 4)
    model = nn.ParameterDict({"rows": memory[:3, :2], "more": memory[:3, 2:], "rest": memory[3:]})
    assert findings(model, sgd(model.parameters())) == []
    model = nn.ParameterDict({"left": memory[:, :2], "right": memory[:, 1:3]})
    assert only(model, sgd(model.parameters()), "shared-memory").key == "right"


def test_two_frozen_parameters_may_share_memory() -> None:
    memory = torch.zeros(4)
    model = nn.ParameterDict({"a": memory, "b": memory, "c": torch.ones(1)})
    model["a"].requires_grad_(False)
    model["b"].requires_grad_(False)
    assert findings(model, sgd([model["c"]])) == []


def test_a_module_that_is_registered_twice_is_noted_once() -> None:
    """A module that is registered twice is noted once, without its inner modules."""
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.decoder, model.relu, model.again = model.encoder, nn.ReLU(), nn.ReLU()
    note = only(model, sgd(model.named_parameters()), "shared-module")
    assert (note.severity, note.key) == ("note", "decoder")
    assert "'decoder' is the same module as 'encoder', so its 4 parameters" in note.message
    assert note.message.endswith(" train once")
    assert len(findings(model, list(model.named_parameters(remove_duplicate=False)), "duplicate")) == 4
    model.decoder = model.encoder = nn.Linear(4, 4, bias=False)
    one = only(model, sgd(model.named_parameters()), "shared-module")
    assert one.message.endswith("so its 1 parameter ('encoder.weight') trains once")


def test_an_optimizer_that_steps_on_the_meta_device() -> None:
    """Parameters on the meta device are an error for an optimizer, and allowed in a list of groups."""
    model = net().to("meta")
    groups = [{"params": list(model.parameters()), "name": "all"}]
    assert findings(model, groups) == []
    optimizer = sgd(groups)
    finding = only(model, optimizer, "meta")
    assert (finding.severity, finding.key) == ("error", "0.weight")
    assert "group 0 ('all') holds 4 parameters on the meta device ('0.weight', '0.bias', '2.weight' and 1 more)" in (
        finding.message
    )
    model(torch.ones(1, 4, device="meta")).sum().backward()
    optimizer.step()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_list_of_groups_that_two_optimizers_are_built_from() -> None:
    """A list of groups that two optimizers share is an error, because both read the same dicts."""
    model = net()
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "name": "all"}]
    first = sgd(groups, lr=0.1)
    second = sgd(groups, lr=5.0)
    assert second.param_groups[0]["lr"] == 0.1
    (finding,) = findings(model, [first, second], "shared")
    assert finding.severity == "error"
    assert "optimizer 0, group 0 ('all') and optimizer 1, group 0 ('all') are one dict" in finding.message
    assert "are one dict (now lr=0.1), as when one list of groups is used for two optimizers" in finding.message
    first.param_groups[0]["lr"] = 3.0
    assert second.param_groups[0]["lr"] == 3.0


def test_one_optimizer_given_twice_is_one_finding_beside_the_duplicates() -> None:
    model = net()
    optimizer = sgd([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    (finding,) = findings(model, [optimizer, optimizer], "shared")
    assert "are of one optimizer, which was given twice" in finding.message
    assert len(findings(model, [optimizer, optimizer], "duplicate")) == 4


class Lookahead(torch.optim.Optimizer):
    """A common kind of wrapper, which stores the groups of its inner optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.defaults, self.state = optimizer.defaults, optimizer.state
        self.param_groups = optimizer.param_groups

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def test_a_wrapper_that_kept_the_groups_of_before_a_load() -> None:
    """A wrapper with the dicts of before load_state_dict() is a warning: a new lr does not reach the optimizer."""
    model = net()
    wrapper = Lookahead(sgd(model.parameters()))
    assert findings(model, wrapper) == []
    wrapper.load_state_dict(wrapper.optimizer.state_dict())
    finding = only(model, wrapper, "cached")
    assert finding.severity == "warning"
    assert "Lookahead.param_groups are not the groups of Lookahead.optimizer (SGD)" in finding.message
    wrapper.param_groups[0]["lr"] = 0.0
    assert moved(model, wrapper) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_name_that_is_recorded_for_two_parameters() -> None:
    """One name for two parameters is an error, although torch accepts it."""
    model = net()
    optimizer = sgd([("x", parameter) for parameter in model[0].parameters()])
    (finding,) = findings(model, optimizer, "names")[:1]
    assert finding.severity == "error"
    assert "group 0[0] and group 0[1] are two parameters, both recorded as 'x'" in finding.message


def test_groups_with_names_beside_groups_without() -> None:
    model = net()
    groups = [{"params": list(model[0].named_parameters(prefix="0"))}, {"params": list(model[2].parameters())}]
    if takes_names():
        with pytest.raises(ValueError, match="with/without names"):
            sgd(groups)
    assert only(model, groups, "names").message == (
        "group 1 names none of its 2 parameters while group 0 names all, which torch refuses"
    )
    apart = [sgd(model[0].named_parameters(prefix="0")), sgd(model[2].parameters())]
    assert findings(model, apart) == []
