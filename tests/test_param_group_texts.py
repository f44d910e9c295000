"""A spec can be written as TOML, JSON or Python, and means the same in each form."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ckptkit.core.config_files import parse_table
from ckptkit.errors import GroupsError, RuleError
from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.emit import write_python
from ckptkit.param_groups.parse import parse_spec
from ckptkit.param_groups.plan import plan_param_groups
from ckptkit.param_groups.presets import param_group_preset
from ckptkit.param_groups.spec import ParamGroupSpec
from ckptkit.param_groups.spec.writing import dump_spec
from ckptkit.param_groups.validate import validate_param_groups
from tests.features import needs_optimizer
from tests.helpers_presets import Mixed, NextLike, VitLike

YAML = """
defaults: {lr: 1e-5, weight_decay: .5, amsgrad: no, fused: true}
group:
  - name: head
    params: ["fc.*", '{block}.head.{i:int}.weight']
    lr_mult: 10
  - rest: true
"""


def test_yaml_is_parsed_as_version_1_2() -> None:
    """``1e-5`` is a number and ``no`` is a string. TOML and JSON give the same spec."""
    table = parse_table(YAML, "yaml")
    assert table["defaults"] == {"lr": 1e-5, "weight_decay": 0.5, "amsgrad": "no", "fused": True}
    assert type(table["defaults"]["lr"]) is float
    assert parse_spec(parse_table(json.dumps(table), "json")) == parse_spec(table)
    assert parse_spec(parse_table(dump_spec(parse_spec(table), "toml"), "toml")) == parse_spec(table)


@pytest.mark.parametrize(
    ("text", "form", "reason"),
    [
        ("a: 1\na: 2", "yaml", 'not valid YAML: .*duplicate key "a"'),
        ("a: [", "yaml", "not valid YAML"),
        ("- a", "yaml", "holds a YAML array, not an object"),
        ("a: !!python/object/apply:os.getcwd []", "yaml", "could not determine a constructor for the tag"),
        ("a = 1\na = 2", "toml", "not valid TOML: Cannot overwrite a value"),
        ("[1]", "json", "holds a JSON array, not an object"),
    ],
    ids=["yaml-twice", "yaml-broken", "yaml-list", "yaml-tag", "toml-twice", "json-list"],
)
def test_text_that_is_not_a_table_is_refused(text: str, form: str, reason: str) -> None:
    with pytest.raises(RuleError, match=reason):
        parse_table(text, form)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
KEYS = st.sampled_from(["momentum", "eps", "betas", "odd key", "ünï", "a.b"])
NUMBERS = st.floats(0, 1e300, allow_nan=False) | st.integers(0, 10**20)
VALUES = st.recursive(
    st.booleans() | WORDS | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
OPTIONS = st.dictionaries(KEYS, VALUES, max_size=2).flatmap(
    lambda given: st.fixed_dictionaries({}, optional={"lr": NUMBERS, "weight_decay": NUMBERS}).map(
        lambda more: {**given, **more}
    )
)
PATTERNS = st.sampled_from(["a.*", "{b}.c", "d.{i:int}.*", r"re:^e\.\"[0-9]+", "*", "ü'\\x"])
LISTS = PATTERNS | st.lists(PATTERNS, min_size=1, max_size=3)
SIMPLE_CONDITIONS = st.one_of(
    st.fixed_dictionaries({"params": LISTS}),
    st.fixed_dictionaries({"role": st.sampled_from(["bias", "norm"])}),
    st.fixed_dictionaries({"module": WORDS | st.lists(WORDS, min_size=1, max_size=2)}),
    st.fixed_dictionaries({"ndim": st.integers(0, 5) | st.lists(st.integers(0, 5), min_size=1, max_size=3)}),
    st.fixed_dictionaries({"min_elements": st.lists(st.integers(0, 99), min_size=1, max_size=2)}),
    st.fixed_dictionaries({"shape": st.lists(st.just("*") | st.integers(0, 9), max_size=3)}),
    st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "bfloat16"])}),
)
CONDITIONS = st.recursive(
    SIMPLE_CONDITIONS,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"not": inner}),
        st.fixed_dictionaries({"any": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"all": st.lists(inner, min_size=1, max_size=2), "role": st.just("head")}),
    ),
    max_leaves=4,
)


@st.composite
def specs(draw: st.DrawFn) -> ParamGroupSpec:
    """Draw a spec that may have every kind of key."""
    names = draw(st.lists(WORDS, min_size=2, max_size=5, unique=True))
    groups: list[dict[str, Any]] = []
    for name in names:
        own: dict[str, Any] = {"name": name, **draw(OPTIONS)}
        own |= draw(
            st.sampled_from([{}, {"optional": True}, {"optimizer": "Muon"}, {"freeze": True}, {"override": True}])
        )
        own |= {"params": draw(LISTS)} if draw(st.booleans()) else {"match": draw(CONDITIONS)}
        groups.append(own)
    if draw(st.booleans()):
        groups.append({"name": "".join(names), "rest": True})
    modifiers = [
        {
            "name": name,
            "params": draw(LISTS),
            "lr_mult": draw(NUMBERS),
            **draw(st.dictionaries(KEYS, VALUES, max_size=1)),
        }
        for name in names[1:]
    ]
    if draw(st.booleans()):
        levels = draw(st.lists(st.lists(PATTERNS, min_size=1, max_size=2), min_size=1, max_size=3))
        modifiers.append({"name": "depth" * 3, "layers": levels, "layer_decay": 0.5, "min_scale": draw(NUMBERS)})
    return parse_spec(
        {
            "optimizer": "AdamW",
            "defaults": {"lr": 0.1, **draw(st.dictionaries(KEYS, VALUES, max_size=2))},
            "optimizers": draw(st.dictionaries(st.sampled_from(["Muon", "Ädam W"]), OPTIONS, max_size=2)),
            "group": groups,
            "modifier": modifiers,
            **draw(
                st.fixed_dictionaries(
                    {}, optional={"tied": st.just("first"), "merge": st.just("never"), "lr_scale": st.just(True)}
                )
            ),
        }
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs())
def test_a_written_spec_is_parsed_as_the_same_spec(spec: ParamGroupSpec) -> None:
    """In TOML and in JSON."""
    assert parse_spec(parse_table(dump_spec(spec, "toml"), "toml")) == spec
    assert parse_spec(parse_table(dump_spec(spec, "json"), "json")) == spec


def test_a_value_that_a_form_cannot_express_is_refused() -> None:
    spec = parse_spec({"defaults": {"foreach": None}, "group": [{"rest": True}]})
    with pytest.raises(GroupsError, match="TOML has no null"):
        dump_spec(spec, "toml")
    assert parse_spec(parse_table(dump_spec(spec, "json"), "json")) == spec
    with pytest.raises(GroupsError, match="the spec cannot be written as json"):
        dump_spec(parse_spec({"defaults": {"lr": torch.tensor(1.0)}, "group": [{"rest": True}]}), "json")


MODELS = {
    "timm-layer-decay": VitLike,
    "timm-weight-decay": VitLike,
    "gradual-unfreezing": VitLike,
    "slices": VitLike,
    "hf-trainer": Mixed,
    "detectron2": Mixed,
    "no-decay": Mixed,
    "convnext-layer-decay": lambda: NextLike((1, 1, 4, 1)),
}


@pytest.mark.parametrize(("name", "model"), MODELS.items(), ids=MODELS)
def test_emitted_specs_and_python_make_the_same_groups(name: str, model: Any) -> None:
    """As TOML, as JSON, and as a Python function that needs only the model."""
    spec = param_group_preset(name, model())
    live = model()
    expected = _plain(build_param_groups(live, spec))
    for form in ("toml", "json"):
        assert _plain(build_param_groups(model(), parse_table(dump_spec(spec, form), form))) == expected
    pasted = model()
    groups = _run(write_python(plan_param_groups(model(), spec), f"preset {name}"))["param_groups"](pasted)
    assert _plain(groups) == expected
    assert validate_param_groups(pasted, torch.optim.AdamW(groups)).ok
    frozen = {key for key, parameter in pasted.named_parameters() if not parameter.requires_grad}
    assert frozen == {key for key, parameter in live.named_parameters() if not parameter.requires_grad}


def test_names_of_any_alphabet_are_kept() -> None:
    """Also characters outside the BMP, which JSON escapes as two code units, and characters that are not printable."""
    spec = parse_spec({"defaults": {"lr": 1.0}, "group": [{"name": "\U0001f600\x85\u202e", "rest": True}]})
    for form in ("toml", "json"):
        text = dump_spec(spec, form)
        assert parse_spec(parse_table(text, form)) == spec
        assert all(line.isprintable() for line in text.split("\n"))
    model = nn.Linear(1, 1)
    (group,) = _run(write_python(plan_param_groups(model, spec), "a spec"))["param_groups"](model)
    assert group["name"] == spec.rules[0].name


@needs_optimizer("Muon")
def test_python_for_several_optimizers_is_a_function_for_each_and_refuses_another_model() -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2), nn.Linear(2, 4))
    made = _run(write_python(plan_param_groups(model, param_group_preset("muon", model)), "preset muon"))
    assert [key for key in made if key.startswith("param_groups")] == ["param_groups_muon", "param_groups_adamw"]
    muon = torch.optim.Muon(made["param_groups_muon"](model))
    adamw = torch.optim.AdamW(made["param_groups_adamw"](model))
    assert validate_param_groups(model, [muon, adamw]).findings == ()
    alone = _run(write_python(plan_param_groups(model, [{"rest": True}]), "a spec"))["param_groups"]
    with pytest.raises(ValueError, match=re.escape("written for another model: ['2.bias', '2.weight']")):
        alone(model[:2])
    with pytest.raises(ValueError, match=re.escape("written for another model: ['3.weight', '3.bias']")):
        alone(nn.Sequential(*model, nn.Linear(4, 1)))


def _run(text: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    exec(text, made)  # noqa: S102 - a user pastes the text and runs it
    return made


def _plain(groups: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]
