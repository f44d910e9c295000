"""validate_param_groups checks the modules too: assignments over methods, lost ties, and dtypes within a module."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import preflight, validate_param_groups
from ckptkit.core.findings import Finding


def findings(model: nn.Module) -> tuple[Finding, ...]:
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    return validate_param_groups(model, optimizer).findings


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


ASSIGNED: dict[str, tuple[str, str, object, str]] = {
    "a method of a parameter": ("0.weight", "requires_grad_", False, "parameter.requires_grad_(False)"),
    "a near miss on a parameter": ("0.weight", "require_grad", False, "parameter.requires_grad_(False)"),
    "requires_grad of a module": ("0", "requires_grad", False, "module.requires_grad_(False)"),
    "requires_grad of the model": ("", "requires_grad", False, "module.requires_grad_(False)"),
    "requires_grad_ of a module": ("0", "requires_grad_", False, "module.requires_grad_(False)"),
    "a near miss on a module": ("0", "requires_gradient", False, "module.requires_grad_(False)"),
    "train": ("0", "train", False, "module.train(False)"),
    "eval": ("", "eval", True, "module.eval()"),
    "zero_grad": ("", "zero_grad", None, "module.zero_grad()"),
}


@pytest.mark.parametrize(("path", "name", "value", "meant"), ASSIGNED.values(), ids=ASSIGNED.keys())
def test_an_assignment_over_a_method_is_an_error(path: str, name: str, value: object, meant: str) -> None:
    """It freezes nothing; the hint has the call that was meant, and preflight says the same."""
    model = two_layers()
    target = model.get_parameter(path) if path.endswith("weight") else model.get_submodule(path)
    target.__dict__[name] = value
    (finding,) = findings(model)
    assert (finding.code, finding.severity, finding.key) == ("groups.assignment", "error", path)
    assert meant in finding.hint
    report = preflight(
        model, optimizer=torch.optim.SGD(model.parameters()), dry_step=lambda m: m(torch.ones(1, 4)).sum()
    )
    assert not report.ok


OWN: dict[str, Callable[[Any], None]] = {
    "true of the parameters": lambda model: (
        model[0].requires_grad_(False),
        model[0].__dict__.update(requires_grad=False),
    )[0],
    "a function in place of a method": lambda model: model[0].__dict__.update(forward=lambda x: x),
    "data under the name of a cast": lambda model: model[0].__dict__.update(type="linear", half=True),
    "an attribute of Megatron": lambda model: model[0].weight.__dict__.update(
        sequence_parallel=True, is_embedding=False, _no_weight_decay=True
    ),
}


@pytest.mark.parametrize("change", OWN.values(), ids=OWN.keys())
def test_attributes_that_change_nothing_have_no_finding(change: Callable[[Any], None]) -> None:
    """Libraries keep data of their own on modules and parameters."""
    model = two_layers()
    change(model)
    assert findings(model) == ()


class Language(nn.Module):
    """A model with an embedding and a head, and a configuration that may tie them."""

    def __init__(self, tie: bool, tied: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=tie)
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize(("tie", "tied", "is_fault"), [(True, False, True), (True, True, False), (False, False, False)])
def test_a_tie_of_the_configuration_that_the_model_lost(tie: bool, tied: bool, is_fault: bool) -> None:
    """Two parameters would train apart, and a file keeps one of them."""
    found = findings(Language(tie, tied))
    assert [finding.code for finding in found] == (["groups.tie-lost"] if is_fault else [])


def test_a_tied_model_of_transformers_that_lost_its_tie() -> None:
    """to_empty() unties; tie_weights() ties again."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    assert findings(model) == ()
    model.load_state_dict(transformers.LlamaForCausalLM(config).state_dict(), assign=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    (finding,) = findings(model)
    assert (finding.code, finding.severity, finding.key) == ("groups.tie-lost", "error", "lm_head.weight")
    model.tie_weights()
    assert findings(model) == ()


def test_parameters_of_one_module_with_two_dtypes() -> None:
    """A linear layer with a bias in another dtype fails; norms in float32 beside layers in bfloat16 are usual."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).bfloat16()
    model[1].float()
    assert findings(model) == ()
    model[0].weight = nn.Parameter(torch.ones(4, 4))
    assert [(finding.code, finding.severity) for finding in findings(model)] == [("groups.siblings", "warning")]
