"""Specs are changed and combined in Python; the optimizer of torch then has the rates that the methods promise."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import (
    ParamGroupSpec,
    build_param_groups,
    explain_param_group,
    param_group_preset,
    plan_param_groups,
    validate_param_groups,
)
from ckptkit.core.torch_optim import OPTIONS, torch_options
from ckptkit.errors import ArgumentError, GroupsError
from ckptkit.param_groups.parse import parse_spec
from tests.helpers_presets import VitLike, bert_like, rates


class Text(nn.Module):
    """Embeddings, one layer with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(7, 4)
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.layer(self.embeddings(tokens)))
        return out


def numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Return the learning rate and weight decay that the optimizer has for each parameter, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def no_decay(**settings: Any) -> ParamGroupSpec:
    return param_group_preset("no-decay", **{"lr": 0.01, "weight_decay": 0.1, **settings})


def head_lr(**settings: Any) -> ParamGroupSpec:
    head = {"params": ["fc.*", "head.*", "classifier.*"]}
    return param_group_preset("head-lr", **{"lr": 0.01, "weight_decay": 0.1, "head": head, **settings})


def muon(lr: float) -> ParamGroupSpec:
    return param_group_preset("muon", lr=lr, first_conv=[])


def test_a_preset_is_changed_in_one_line() -> None:
    """The head learns ten times as fast, vectors do not decay, and the embeddings stay as they are."""
    model = Text()
    spec = no_decay().with_group("head", "fc.*", lr_mult=10).freeze("embeddings.*")
    optimizer = torch.optim.AdamW(build_param_groups(model, spec))
    assert numbers(model, optimizer) == {
        "fc.weight": (pytest.approx(0.1), 0.1),
        "fc.bias": (pytest.approx(0.1), 0.0),
        "layer.0.weight": (0.01, 0.1),
        "layer.0.bias": (0.01, 0.0),
        "layer.1.weight": (0.01, 0.0),
        "layer.1.bias": (0.01, 0.0),
    }
    before = model.embeddings.weight.detach().clone()
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert torch.equal(model.embeddings.weight, before)
    validate_param_groups(model, optimizer, spec=spec).raise_for_errors()
    assert explain_param_group(model, spec, "fc.bias").rule == "head"


def test_the_first_spec_stays_as_it_was() -> None:
    """Each method returns a new spec."""
    spec = no_decay()
    spec.with_group("head", "fc.*", lr_mult=10)
    spec.freeze("embeddings.*")
    spec.with_modifier("slow", "layer.*", lr_mult=0.1)
    spec.with_defaults(lr=1.0)
    spec.combined_with(head_lr())
    assert spec == no_decay()


def test_the_last_change_counts() -> None:
    """A new group takes its parameters from every group before, also from a frozen one."""
    thawed = no_decay().freeze("*.bias").with_group("head", "fc.*", lr_mult=10)
    assert {p.name for p in plan_param_groups(Text(), thawed).freeze} == {"layer.0.bias", "layer.1.bias"}
    frozen = no_decay().with_group("head", "fc.*", lr_mult=10).freeze("fc.bias")
    assert [p.name for p in plan_param_groups(Text(), frozen).freeze] == ["fc.bias"]
    slow = no_decay().with_modifier("slow", "layer.*", lr_mult=0.5).with_modifier("set", "layer.0.*", lr=1.0)
    assert rates(Text(), slow)["layer.0.weight"] == (1.0, 0.1)
    assert rates(Text(), slow)["layer.1.weight"] == (0.005, 0.0)


def test_a_whole_group_may_be_taken() -> None:
    """Only groups of these methods, and those with ``override = true``, leave a later group without parameters."""
    groups: list[dict[str, Any]] = [{"params": "fc.*", "lr": 0.1}, {"rest": True, "lr": 0.01}]
    assert [p.name for p in plan_param_groups(Text(), parse_spec(groups).freeze("fc.*", name="still")).freeze] == [
        "fc.weight",
        "fc.bias",
    ]
    first = {"name": "all of it", "params": "fc.*", "lr": 1.0}
    with pytest.raises(GroupsError, match=r"group 'fc\.\*' owns no parameter"):
        plan_param_groups(Text(), [first, *groups])
    plan = plan_param_groups(Text(), {"overlap": "error", "group": [{**first, "override": True}, *groups]})
    assert [group.name for group in plan.groups] == ["all of it", "rest"]
    assert [rule.name for rule in plan.idle] == ["fc.*"]
    everything = no_decay().with_group("all", "*", lr=1.0)
    assert {lr for lr, _ in rates(Text(), everything).values()} == {1.0}
    with pytest.raises(GroupsError, match="matches no parameter"):  # a typo is still found
        plan_param_groups(Text(), no_decay().with_group("head", "cf.*"))


def test_a_modifier_keeps_the_options_of_groups() -> None:
    """``hf-trainer`` has a group without weight decay: a modifier leaves its members there, a group takes them."""
    spec = param_group_preset("hf-trainer", lr=0.01, weight_decay=0.1)
    assert rates(Text(), spec.with_modifier("head", "fc.*", lr_mult=10))["fc.bias"] == pytest.approx((0.1, 0.0))
    assert rates(Text(), spec.with_group("head", "fc.*", lr_mult=10))["fc.bias"] == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr_mul", "lr_mult"),
        ("lr_multi", "lr_mult"),
        ("lrmult", "lr_mult"),
        ("eps_mul", "eps_mult"),
        ("weight_decay_mutl", "weight_decay_mult"),
        ("overide", "override"),
        ("freez", "freeze"),
    ],
)
def test_a_misspelled_field_is_refused_at_once(wrong: str, right: str) -> None:
    """It would be an option that no optimizer reads, and the group would train with the base rate."""
    given: dict[str, Any] = {wrong: 10}
    calls: list[Callable[[], object]] = [
        lambda: no_decay().with_group("head", "fc.*", **given),
        lambda: build_param_groups(Text(), {"group": [{"params": "fc.*", **given}, {"rest": True}]}),
    ]
    if right.endswith("_mult"):
        calls.append(lambda: no_decay().with_modifier("head", "fc.*", **given))
    for call in calls:
        with pytest.raises(GroupsError, match=rf"there is no '{wrong}' \(did you mean '{right}'\?\)"):
            call()


def test_no_option_is_taken_for_a_misspelled_field() -> None:
    """Options of torch.optim, of schedulers, of common recipes and of other packages go to the optimizer."""
    others = {"use_muon", "layer_scale", "trust_ratio", "d_coef", "lr_ratio", "lr_multiplier", "precondition_frequency"}
    for option in {*torch_options(), *OPTIONS, *others} - {"params", "param_names", "name", "lr_mult", "decay_mult"}:
        given: dict[str, Any] = {option: 0.5}
        assert no_decay().with_group("head", "fc.*", **given).rules[0].options == given
        assert no_decay().with_modifier("less", "fc.*", **given).modifiers[-1].options == given


def test_defaults_are_added_and_replaced() -> None:
    """The optimizer gets them, and multiples multiply them."""
    model = Text()
    spec = no_decay().with_group("head", "fc.*", lr_mult=10).with_defaults(lr=0.5, betas=(0.8, 0.9))
    optimizer = torch.optim.AdamW(build_param_groups(model, spec))
    assert numbers(model, optimizer)["fc.weight"] == (5.0, 0.1)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


def test_layers_can_be_added() -> None:
    """The rate of each layer is that of the layer above, times the decay."""
    spec = no_decay().with_modifier("depth", layers=["embeddings.*", "layer.*", "fc.*"], layer_decay=0.5, min_scale=0.3)
    found = rates(Text(), spec)
    assert [found[name][0] for name in ("embeddings.weight", "layer.0.weight", "fc.weight")] == [0.003, 0.005, 0.01]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: no_decay().with_group("base", "fc.*"), "two groups have the name 'base'"),
        (lambda: no_decay().freeze("fc.*").freeze("fc.*"), r"two groups have the name 'fc\.\*'"),
        (lambda: no_decay().with_modifier("no decay", lr_mult=2), "two modifiers have the name 'no decay'"),
        (lambda: no_decay().with_group("head", "{", lr=1), "has a brace that is not part of a capture"),
        (lambda: no_decay().with_group("head"), "has none of params, match and rest"),
        (lambda: no_decay().with_group("head", "fc.*", lr=-1), "lr is negative"),
        (lambda: no_decay().with_group("head", "fc.*", momentum_mult=2), "multiplies 'momentum'"),
        (lambda: no_decay().with_group("head", "fc.*", rest=True), "has both params and rest"),
        (lambda: no_decay().with_modifier("head", "fc.*"), "changes no option"),
        (lambda: no_decay().with_modifier("depth", layers=["fc.*"]), "has layers but no layer_decay"),
        (lambda: no_decay().with_defaults(params=1), "params is not an option"),
        (lambda: no_decay().with_defaults(override=True), "override is not an option"),
    ],
)
def test_wrong_changes_are_refused_at_once(make: Callable[[], ParamGroupSpec], message: str) -> None:
    """No model is needed to find them."""
    with pytest.raises(GroupsError, match=message):
        make()


def test_texts_and_tables_are_read_back() -> None:
    """A changed spec is the same after TOML, JSON and its table."""
    spec = (
        no_decay()
        .combined_with(head_lr(), Text())
        .with_modifier("depth", layers=["embeddings.*", ["layer.*", "fc.*"]], layer_decay=0.5)
        .with_group("norms", match={"role": "norm"}, optional=True, eps=1e-6)
        .freeze(["embeddings.*", "layer.0.*"], name="still")
    )
    assert parse_spec(tomllib.loads(spec.to_toml())) == spec
    with pytest.raises(GroupsError, match=r"the spec is a text, not the path of a file \(parse it first: tomllib"):
        parse_spec(spec.to_toml())
    assert parse_spec(spec.to_dict()) == spec
    assert parse_spec(json.loads(json.dumps(spec.to_dict()))) == spec
    assert rates(Text(), spec.to_dict()) == rates(Text(), spec)  # type: ignore[arg-type]
    with pytest.raises(GroupsError, match="cannot be written as toml"):
        spec.with_defaults(lr=torch.tensor(0.1)).to_toml()


def test_presets_combine() -> None:
    """Decay by layers, a faster head, and no decay for norms: the rates multiply."""
    model = VitLike()
    layers = param_group_preset("timm-layer-decay", model, lr=0.01, weight_decay=0.1, layer_decay=0.5)
    combined = layers.combined_with(head_lr(), model).combined_with(no_decay())
    expected: dict[str, Any] = {
        name: (pytest.approx(rate * (10 if name.startswith("head.") else 1)), decay)
        for name, (rate, decay) in rates(model, layers).items()
    }
    assert rates(model, combined) == expected
    optimizer = torch.optim.AdamW(build_param_groups(model, combined))
    assert numbers(model, optimizer) == expected
    validate_param_groups(model, optimizer, spec=combined).raise_for_errors()
    assert (combined.tied, combined.merge, combined.order) == ("first", "options", "model")
    reverse = no_decay().combined_with(head_lr()).combined_with(layers, model)
    assert rates(model, reverse) == expected
    assert [modifier.name for modifier in reverse.modifiers] == ["no decay", "depth", "no decay 2"]


def test_rates_of_lr_scale_stay_apart() -> None:
    """Where one spec leaves the scaling to a scheduler, the multiples of the other are in ``lr_scale`` too."""
    model = VitLike()
    layers = param_group_preset("timm-layer-decay", model, lr=0.01, weight_decay=0.1, lr_scale=True)
    groups = build_param_groups(model, layers.combined_with(head_lr(), model))
    assert {group["lr"] for group in groups} == {0.01}
    assert max(group["lr_scale"] for group in groups) == 10.0


def test_a_spec_combined_with_itself_is_the_same() -> None:
    """What both have is there once."""
    spec = no_decay().combined_with(head_lr())
    assert spec.combined_with(spec) == spec


def test_a_group_for_the_rest_gives_way() -> None:
    """The rest of one spec sets nothing, so the other decides about the remaining parameters."""
    own = parse_spec([{"params": "fc.*", "lr": 0.1}, {"name": "slow", "rest": True, "lr": 0.5}])
    assert [rule.name for rule in no_decay().combined_with(own).rules] == ["fc.*", "slow"]
    covered = parse_spec([{"params": "fc.*", "lr": 0.1}, {"params": ["layer.*", "embeddings.*"], "lr": 0.2}])
    assert {lr for lr, _ in rates(Text(), no_decay().combined_with(covered)).values()} == {0.1, 0.2}
    frozen = parse_spec({"unmatched": "freeze", "group": [{"params": "fc.*", "lr": 0.1}]})
    assert set(rates(Text(), no_decay().combined_with(frozen))) == {"fc.weight", "fc.bias"}


COLLISIONS: dict[str, tuple[Callable[[], ParamGroupSpec], str]] = {
    "owners": (
        lambda: param_group_preset(
            "timm-weight-decay", bert_like(), lr=0.01, weight_decay=0.1, no_weight_decay=[]
        ).combined_with(head_lr(), bert_like()),
        "'classifier.bias' would be owned by group 'no_decay' of one spec and by group 'head' of the other",
    ),
    "rest": (
        lambda: param_group_preset("hf-trainer", lr=0.01, weight_decay=0.1).combined_with(head_lr(), Text()),
        "'fc.weight' would be owned by group 'decay' of one spec and by group 'head' of the other",
    ),
    "no model": (
        lambda: param_group_preset("hf-trainer", lr=0.01, weight_decay=0.1).combined_with(head_lr()),
        "groups 'decay' and 'head' could own the same parameters",
    ),
    "names": (
        lambda: head_lr().combined_with(head_lr(head_lr_mult=5.0)),
        "both specs have a group 'head', and they differ",
    ),
    "layers": (
        lambda: param_group_preset("bert-layer-decay", lr=0.01).combined_with(
            no_decay(weight_decay=0.01).with_modifier("slices", layers=["*"], layer_decay=0.5)
        ),
        "modifiers 'depth' and 'slices' both scale the learning rate by layers",
    ),
    "defaults": (
        lambda: no_decay().combined_with(head_lr(weight_decay=0.0)),
        "[defaults] of one spec has weight_decay = 0.1, and of the other weight_decay = 0.0",
    ),
    "optimizers": (
        lambda: param_group_preset("muon", first_conv=[]).combined_with(
            param_group_preset("muon", lr=1, first_conv=[])
        ),
        "[optimizers.Muon] of one spec has lr = 0.02, and of the other lr = 1",
    ),
    "policies": (
        lambda: parse_spec({"tied": "first", "merge": "never", "group": [{"rest": True}]}).combined_with(
            parse_spec({"merge": "options", "group": [{"rest": True}]})
        ),
        "merge is 'never' in one spec and 'options' in the other",
    ),
}


@pytest.mark.parametrize(("make", "message"), COLLISIONS.values(), ids=COLLISIONS.keys())
def test_collisions_name_both_sides(make: Callable[[], ParamGroupSpec], message: str) -> None:
    """Specs that contradict each other are refused, with a way out."""
    with pytest.raises(GroupsError) as caught:
        make()
    assert caught.value.reason == message
    assert caught.value.hint


def test_the_order_of_shared_groups_counts() -> None:
    """Two specs with the same groups in another order own a parameter by different groups, which is refused."""
    head, weights, rest = (
        {"name": "A", "params": "fc.*", "lr": 1.0},
        {"name": "B", "params": "*.weight"},
        {"rest": True},
    )
    one, other = (
        parse_spec({"defaults": {"lr": 0.1}, "group": [*groups, rest]}) for groups in ([head, weights], [weights, head])
    )
    with pytest.raises(GroupsError, match="groups 'A' and 'B' could own the same parameters"):
        one.combined_with(other)
    with pytest.raises(GroupsError, match=r"'fc\.weight' would be owned by group 'A' of one spec and by group 'B'"):
        one.combined_with(other, Text())
    without_both = nn.ModuleDict({"x": nn.Linear(2, 2)})
    assert one.combined_with(other, without_both) == one


def test_options_that_are_tensors_are_compared() -> None:
    """Two tensors of several elements are equal only where they are one object; there is no error of torch."""
    tensor = torch.ones(2)
    one = no_decay().with_defaults(foo=tensor)
    assert one.combined_with(no_decay().with_defaults(foo=tensor)).defaults["foo"] is tensor
    with pytest.raises(GroupsError, match="of one spec has foo"):
        one.combined_with(no_decay().with_defaults(foo=torch.ones(2)))


def test_only_specs_are_combined() -> None:
    """A table is parsed first."""
    with pytest.raises(ArgumentError, match="other is a dict"):
        no_decay().combined_with({"group": []})  # type: ignore[arg-type]
