"""``assert_param_groups`` raises at errors, also for wrapped models and optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import Finding, Report, assert_param_groups, validate_param_groups
from ckptkit.errors import GroupsError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def sgd(groups: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=0.1)


def test_correct_groups_return_an_empty_report() -> None:
    model = net()
    assert assert_param_groups(model, sgd(model.parameters()), strict=True) == Report((), GroupsError)


def test_the_first_fault_is_raised_with_the_number_of_the_others() -> None:
    model = net()
    optimizer = sgd(model[0].parameters())
    with pytest.raises(
        GroupsError, match=r"^'2\.weight' \(2, 4\) is trainable but in no group: .* \(and 1 more\)"
    ) as error:
        assert_param_groups(model, optimizer)
    assert error.value.__notes__ == [str(validate_param_groups(model, optimizer))]


def test_warnings_raise_only_with_strict() -> None:
    """Errors come before warnings in the exception; notes never raise."""
    model = net()
    model[0].requires_grad_(requires_grad=False)
    optimizer = sgd(model.parameters())
    report = assert_param_groups(model, optimizer)
    assert [finding.severity for finding in report.findings] == ["warning", "warning"]
    with pytest.raises(GroupsError, match=r"'0\.weight' \(4, 3\) in group 0\[0\] is frozen .* \(and 1 more\)"):
        assert_param_groups(model, optimizer, strict=True)
    both = Report((Finding("a", "note", "", "n"), Finding("b", "warning", "", "w"), Finding("c", "error", "", "e")))
    with pytest.raises(both.error, match=r"^e \(and 1 more\)$"):
        both.raise_for_errors(warnings=True)
    Report(both.findings[:1]).raise_for_errors(warnings=True)


def test_an_empty_group_is_a_note_where_every_parameter_is_in_another_group() -> None:
    """transformers makes such groups for a model with neither norms nor biases."""
    model = net()
    optimizer = sgd([{"params": model.parameters()}, {"params": [], "weight_decay": 0.1}])
    (finding,) = assert_param_groups(model, optimizer, strict=True).findings
    assert (finding.code, finding.severity) == ("groups.empty", "note")


def test_names_recorded_in_a_submodule_are_accepted() -> None:
    """A LightningModule holds the network as a submodule. The name of another parameter is still an error."""
    whole = nn.ModuleDict({"net": net(), "0": nn.Linear(4, 3)})
    inner, outer = [{"params": list(whole[part].named_parameters())} for part in ("net", "0")]
    (wrong_name, *others) = validate_param_groups(whole, sgd([inner, outer])).findings
    assert (wrong_name.code, wrong_name.severity, wrong_name.key) == ("groups.names", "error", "net.0.weight")
    assert [finding.key for finding in others] == ["net.0.bias"]
    assert_param_groups(nn.ModuleDict({"net": whole["net"]}), sgd([inner]), strict=True)


def test_a_distributed_data_parallel_model_is_accepted(tmp_path: Path) -> None:
    """Correct groups pass, and an error has the name in the wrapped model."""
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net()
        optimizer = sgd(model.named_parameters())
        assert_param_groups(nn.parallel.DistributedDataParallel(model), optimizer, strict=True)
        model[2] = nn.Linear(4, 5)
        with pytest.raises(GroupsError, match=r"older 'module\.2\.weight'"):
            assert_param_groups(nn.parallel.DistributedDataParallel(model), optimizer)
    finally:
        distributed.destroy_process_group()


def test_a_deepspeed_optimizer_is_refused_by_name() -> None:
    """Its groups hold flat copies and no parameter of the model, even where nothing is wrong."""
    model = net()
    inner = sgd(model.parameters())
    kind = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    wrapper = kind()
    wrapper.optimizer, wrapper.param_groups = inner, inner.param_groups
    with pytest.raises(
        GroupsError, match=r"DeepSpeed's DeepSpeedZeroOptimizer, .* before you pass it to deepspeed\.initialize"
    ):
        assert_param_groups(model, wrapper)
