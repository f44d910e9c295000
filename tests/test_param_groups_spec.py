"""``parse_spec`` gives the same spec for each form, and refuses a wrong spec in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import pytest
import torch

from ckptkit.core.patterns import parse_pattern
from ckptkit.errors import GroupsError
from ckptkit.param_groups.ownership import resolve_options
from ckptkit.param_groups.parse import parse_spec
from ckptkit.param_groups.spec import ParamGroupSpec
from ckptkit.param_groups.spec.fields import GroupRule

TOML = """
[defaults]
lr = 0.001
momentum = 0.9
weight_decay = 1e-4

[[group]]
name = "head"
params = ["fc3.*", "{block}.head.{i:int}.weight"]
lr = 0.01

[[group]]
params = "re:fc[12]\\\\..*"
optional = true

[[group]]
name = "base"
rest = true
"""


def test_toml_json_and_python_give_the_same_spec() -> None:
    """Parsed TOML, its JSON, and a list of groups give equal specs, and a spec parses to itself."""
    table = tomllib.loads(TOML)
    spec = parse_spec(table)
    assert spec == ParamGroupSpec(
        (
            GroupRule("head", tuple(map(parse_pattern, ["fc3.*", "{block}.head.{i:int}.weight"])), {"lr": 0.01}),
            GroupRule("re:fc[12]\\..*", (parse_pattern("re:fc[12]\\..*"),), optional=True),
            GroupRule("base", rest=True),
        ),
        {"lr": 0.001, "momentum": 0.9, "weight_decay": 1e-4},
    )
    assert parse_spec(json.loads(json.dumps(table))) == spec
    assert parse_spec(spec) == spec
    assert parse_spec(table["group"]) == ParamGroupSpec(spec.rules)
    assert parse_spec(tuple(spec.rules)) == ParamGroupSpec(spec.rules)


def test_a_group_without_a_name_has_the_name_of_its_first_pattern() -> None:
    spec = parse_spec([{"params": ["b.*", "a.*"]}, {"rest": True}])
    assert [rule.name for rule in spec.rules] == ["b.*", "rest"]


def test_options_of_a_group_replace_the_defaults() -> None:
    spec = parse_spec({"defaults": {"lr": 1, "momentum": 0.9}, "group": [{"params": "*", "lr": 2, "nesterov": True}]})
    assert resolve_options(spec, spec.rules[0], ())[0] == {"lr": 2, "momentum": 0.9, "nesterov": True}


def test_a_spec_does_not_change_with_the_dict_of_the_caller() -> None:
    table: dict[str, Any] = {"defaults": {"lr": 1.0}, "group": [{"params": "*", "momentum": 0.5}]}
    spec = parse_spec(table)
    table["defaults"]["lr"] = 2.0
    table["group"][0]["momentum"] = 0.0
    assert resolve_options(spec, spec.rules[0], ())[0] == {"lr": 1.0, "momentum": 0.5}
    with pytest.raises(FrozenInstanceError):
        spec.rules[0].name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "lr", [0, 0.0, 1e-3, 1, Fraction(1, 3), torch.tensor(0.1), torch.tensor([1e-3]), torch.tensor(0.1, device="meta")]
)
def test_numbers_that_torch_takes_as_a_learning_rate(lr: Any) -> None:
    """A tensor can be a learning rate too, and the spec holds the same object."""
    assert parse_spec([{"params": "*", "lr": lr}]).rules[0].options["lr"] is lr


@pytest.mark.parametrize(
    ("lr", "reason"),
    [
        pytest.param("1e-3", "lr is the string '1e-3'", id="string"),
        pytest.param(-0.1, "lr is negative (-0.1)", id="negative"),
        pytest.param(float("nan"), "lr is nan", id="nan"),
        pytest.param(float("inf"), "lr is inf", id="inf"),
        pytest.param(10**400, "lr is too large for a float", id="huge"),
        pytest.param(True, "lr is true", id="bool"),
        pytest.param(None, "lr is null", id="null"),
        pytest.param([0.1], "lr is a list", id="list"),
        pytest.param(1j, "lr is a complex", id="complex"),
        pytest.param(torch.ones(2), "lr is a tensor of shape (2,)", id="tensor-of-two"),
        pytest.param(torch.tensor(-1.0), "lr is negative (-1.0)", id="negative-tensor"),
    ],
)
def test_a_wrong_learning_rate_is_refused(lr: Any, reason: str) -> None:
    """In a group and in the defaults. torch accepts most of these values in a group without an error."""
    with pytest.raises(GroupsError) as caught:
        parse_spec([{"name": "head", "params": "*", "lr": lr}])
    assert caught.value.reason == f"[[group]] 'head': {reason}"
    assert "lr = 0.01" in (caught.value.hint or "")
    with pytest.raises(GroupsError) as caught:
        parse_spec({"defaults": {"lr": lr}, "group": [{"rest": True}]})
    assert caught.value.reason == f"[defaults]: {reason}"


ALL = {"name": "all", "rest": True}


@pytest.mark.parametrize(
    ("spec", "reason", "hint"),
    [
        pytest.param({}, "the spec has no group", "[[group]]", id="empty"),
        pytest.param([], "the spec has no group", "rest = true", id="empty-list"),
        pytest.param({"defaults": {"lr": 1}}, "the spec has no group", "[[group]]", id="only-defaults"),
        pytest.param({"groups": [ALL]}, "unknown key 'groups'", "[[group]] and [[modifier]] tables", id="unknown-key"),
        pytest.param({"lr": 0.1, "group": [ALL]}, "unknown key 'lr'", "options go into", id="option-outside"),
        pytest.param({"group": ALL}, "a dict, not a list of tables", "[[group]]", id="one-table"),
        pytest.param(7, "an int, not a list", "[[group]]", id="int"),
        pytest.param({"group": ["fc3.*"]}, "[[group]] 1 is the string 'fc3.*'", "params", id="string-in-list"),
        pytest.param({"defaults": [1], "group": [ALL]}, "defaults is a list", "[defaults]", id="defaults-list"),
        pytest.param([{"lr": 0.1}], "[[group]] 1 has none of params, match and rest", "rest = true", id="no-params"),
        pytest.param(
            [{"name": "a", "rest": False}],
            "'a' has none of params, match and rest",
            "rest = true",
            id="rest-false",
        ),
        pytest.param([{"params": "*", "rest": True}], "has both params and rest", "keep one", id="both"),
        pytest.param([{"params": 3}], "params is an int", "names, not tensors", id="params-int"),
        pytest.param([{"params": ["a", 3]}], "params is a list, not", "names, not tensors", id="params-mixed"),
        pytest.param([{"params": []}], "params is an empty list", "names that the group owns", id="params-empty"),
        pytest.param([{"params": ""}], "[[group]] 1: a pattern is empty", "'*' matches", id="pattern-empty"),
        pytest.param([{"params": "a{"}], "brace that is not part of a capture", "re:", id="brace"),
        pytest.param([{"params": "re:("}], "is not a valid regular expression", "", id="regex"),
        pytest.param([{"name": "", "rest": True}], "name is the string ''", "name = ", id="name-empty"),
        pytest.param([{"name": 3, "rest": True}], "name is an int", "name = ", id="name-int"),
        pytest.param([{"rest": 1}], "rest is an int", "rest = true", id="rest-int"),
        pytest.param([{"params": "*", "optional": "yes"}], "optional is the string", "optional = true", id="optional"),
        pytest.param([{"params": "a"}, {"params": "a"}], "two groups have the name 'a'", "name =", id="same-name"),
        pytest.param([ALL, {"params": "a"}], "not the last group", "move it to the end", id="rest-first"),
        pytest.param([ALL, {"rest": True}], "'all' has rest = true but is not the last", "at most one", id="two-rests"),
        pytest.param([{**ALL, "param_names": []}], "param_names is not an option", "leave param_names", id="names"),
        pytest.param({"defaults": {"params": "*"}, "group": [ALL]}, "params is not an option", "", id="default-params"),
        pytest.param({"defaults": {"name": "x"}, "group": [ALL]}, "name is not an option", "", id="default-name"),
        pytest.param([{**ALL, "": 1}], "'' is not the name of an option", "torch.optim", id="option-empty"),
        pytest.param([{**ALL, "weight_decay": -1}], "weight_decay is negative (-1)", "0 or more", id="decay"),
        pytest.param(ParamGroupSpec(()), "the spec has no group", "", id="python-empty"),
        pytest.param(
            ParamGroupSpec((GroupRule("a"),)),
            "either patterns (or a condition) or rest",
            "keep one",
            id="python-neither",
        ),
        pytest.param(
            ParamGroupSpec((GroupRule("a", (parse_pattern("*"),), rest=True),)),
            "not both",
            "keep one",
            id="python-both",
        ),
        pytest.param(
            ParamGroupSpec((GroupRule("a", rest=True, options={"params": []}),)),
            "not an option",
            "",
            id="python-params",
        ),
    ],
)
def test_a_wrong_spec_is_refused(spec: Any, reason: str, hint: str) -> None:
    """The error is one sentence with the name or number of the group, and a hint."""
    with pytest.raises(GroupsError) as caught:
        parse_spec(spec)
    assert reason in caught.value.reason
    assert hint in (caught.value.hint or "")
    assert "\n" not in str(caught.value)


def test_parameters_in_place_of_names_are_refused() -> None:
    """A common mistake in Python."""
    with pytest.raises(GroupsError, match=r"params is a generator, not a pattern .*params takes names, not tensors"):
        parse_spec([{"params": torch.nn.Linear(1, 1).parameters()}])


def test_control_characters_of_a_name_are_escaped_in_the_error() -> None:
    with pytest.raises(GroupsError) as caught:
        parse_spec([{"name": "a\n\x1b[31m", "params": "*", "lr": -1}])
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_parsing_a_spec_does_not_import_torch() -> None:
    """An error in a spec must appear without the wait for torch."""
    code = (
        "import sys; from ckptkit.param_groups.parse import parse_spec; "
        "parse_spec([{'rest': True}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
