"""``require`` and ``min_coverage`` are checked on the plan; a refusal has a reason and a hint and changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckptkit import load_into
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.coverage import ModuleCoverage, coverage_by_module, group_by_module
from ckptkit.errors import ArgumentError, CkptkitError, ModelError, RuleError
from tests.helpers_outputs import same_state


def net(classes: int = 3) -> nn.Module:
    return nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
            "neck": nn.Linear(4, 4),
            "head": nn.Linear(4, classes),
        }
    )


def donor() -> dict[str, torch.Tensor]:
    """Return a state_dict with another head and without the bias of the neck."""
    state = dict(net(classes=5).state_dict())
    del state["neck.bias"]
    return state


REACHED: dict[str, dict[str, Any]] = {
    "a module": {"require": "body.*"},
    "several patterns": {"require": ["body.*", "neck.weight"]},
    "one segment": {"require": "{module}.{i:int}.weight"},
    "a regex": {"require": r"re:body\.\d+\.(weight|bias)"},
    "no pattern": {"require": []},
    "a share": {"min_coverage": 53 / 72},
    "nothing at all": {"min_coverage": 0},
}


@pytest.mark.parametrize("asked", REACHED.values(), ids=REACHED.keys())
def test_met_requirements_change_nothing(asked: dict[str, Any]) -> None:
    """A requirement that the plan meets changes nothing; 53 of 72 elements are loaded."""
    report = load_into(net(), donor(), on_mismatch="skip", **asked)
    assert report.coverage == 53 / 72


REFUSED: dict[str, tuple[dict[str, Any], type[CkptkitError], str, str]] = {
    "another shape": (
        {"require": "head.*"},
        ModelError,
        "--require 'head.*': 2 of 2 tensors would not be filled, 'head.weight' (its shape is [5, 4], not [3, 4]), ",
        "require less, or on_mismatch={'head.*': 'slice'}",
    ),
    "not there": (
        {"require": ["body.*", "neck.*"]},
        ModelError,
        "--require 'neck.*': 1 of 2 tensors would not be filled, 'neck.bias' (not in the checkpoint)",
        "rename the keys with the rules that suggest_rules finds",
    ),
    "fits no key": (
        {"require": "backbone.*"},
        RuleError,
        "--require 'backbone.*' matches none of 11 keys of the model",
        "",
    ),
    "a module, not its keys": (
        {"require": "body"},
        RuleError,
        "--require 'body' matches none",
        "did you mean 'body.*'?",
    ),
    "no pattern": ({"require": "a{"}, RuleError, "'a{' has a brace", "regex"),
    "one element below": (
        {"min_coverage": 54 / 72},
        ModelError,
        "the checkpoint fills 53 of 72 elements (73.6 %), below --min-coverage 0.75; the largest tensors that would ",
        "require less",
    ),
    "percent": (
        {"min_coverage": 95},
        ArgumentError,
        "min_coverage is 95",
        "a share between 0 and 1: for 95 % write 0.95",
    ),
    "negative": ({"min_coverage": -0.1}, ArgumentError, "min_coverage is -0.1", "a share"),
    "nan": ({"min_coverage": float("nan")}, ArgumentError, "min_coverage is a float", "a share"),
    "a word": ({"min_coverage": "all"}, ArgumentError, "min_coverage is the string 'all'", "a share"),
    "a flag": ({"min_coverage": True}, ArgumentError, "min_coverage is True", "a share"),
}


@pytest.mark.parametrize(("asked", "kind", "reason", "hint"), REFUSED.values(), ids=REFUSED.keys())
def test_unmet_requirements_are_refused_before_loading(
    asked: dict[str, Any], kind: type[CkptkitError], reason: str, hint: str
) -> None:
    """The error names the missing keys and the reasons before the first value is copied."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind) as caught:
        load_into(model, donor(), on_mismatch="skip", **asked)
    assert caught.value.reason.startswith(reason)
    assert hint in (caught.value.call or caught.value.hint or "")
    assert same_state(model.state_dict(), before)


def test_a_missing_prefix_is_in_the_hint() -> None:
    """The hint gives the rename that removes a prefix."""
    state = {f"module.{key}": value for key, value in net().state_dict().items() if key != "head.bias"}
    state["head.bias"] = torch.zeros(3)
    with pytest.raises(ModelError) as caught:
        load_into(net(), state, require="body.*")
    assert "'module.*=*'" in (caught.value.hint or "")


def test_a_tie_counts_as_loaded() -> None:
    """A key that is loaded through a tie meets a requirement."""
    model = nn.ModuleDict({"wte": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["wte"].weight
    report = load_into(model, {"wte.weight": torch.ones(6, 4)}, require="head.*", min_coverage=1)
    assert report.coverage == 1.0


def test_coverage_by_module() -> None:
    """A module that is loaded whole has one row; another is divided into its children."""
    report = load_into(net(), donor(), on_mismatch="skip")
    assert report.modules == (
        ModuleCoverage("body", 7, 7, 37, 37),
        ModuleCoverage("neck.weight", 1, 1, 16, 16),
        ModuleCoverage("neck.bias", 0, 1, 0, 4),
        ModuleCoverage("head", 0, 2, 0, 15),
    )
    whole = load_into(nn.ModuleDict({"model": net()}), nn.ModuleDict({"model": net()}))
    assert [row.module for row in whole.modules] == ["model.body", "model.neck", "model.head"]


KEYS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(KEYS, st.booleans(), max_size=30))
def test_sections_are_a_partition(labels: dict[str, bool]) -> None:
    """Every key is in one section, in order, and below the prefix of the section."""
    found = group_by_module(labels)
    assert sorted(key for _, keys in found for key in keys) == sorted(labels)
    assert all(key == prefix or key.startswith(f"{prefix}.") for prefix, keys in found for key in keys)
    assert all(len({labels[key] for key in keys}) == 1 for _, keys in found)


def test_sections_stay_few() -> None:
    """A model with every layer loaded in part is not divided into all its layers."""
    infos = [TensorInfo(f"net.layers.{i}.{name}", "F32", (2,)) for i in range(100) for name in ("w", "lora")]
    rows = coverage_by_module([*infos, TensorInfo("head", "F32", (3,))], {i.key for i in infos if i.key.endswith("w")})
    assert rows == (ModuleCoverage("net.layers", 100, 200, 200, 400), ModuleCoverage("head", 0, 1, 0, 3))


MISTAKES: dict[str, dict[str, Any]] = {
    "model of None": {"model": None},
    "model that is a state": {"model": net().state_dict()},
    "a class": {"model": nn.Linear},
    "no checkpoint": {"checkpoint": None},
    "a path": {"checkpoint": "run.pt"},
    "rules of None": {"rules": [None]},
    "a number as rules": {"rules": 5},
    "require None": {"require": None},
    "require a number": {"require": 5},
    "require numbers": {"require": [5]},
    "require bytes": {"require": b"body.*"},
    "require nothing": {"require": ""},
    "no coverage": {"min_coverage": None},
    "a list of policies": {"on_mismatch": ["skip"]},
    "no policy": {"on_unexpected": None},
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_wrong_arguments_are_refused(mistake: dict[str, Any]) -> None:
    """A wrong argument gives an error of ckptkit."""
    with pytest.raises(CkptkitError):
        load_into(**{"model": net(), "checkpoint": donor(), "on_mismatch": "skip", **mistake})
