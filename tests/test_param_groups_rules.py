"""Rules own parameters, modifiers change their options, and policies decide the other cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.errors import GroupsError
from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.explain import explain_param_group
from ckptkit.param_groups.parse import parse_spec
from ckptkit.param_groups.plan import assign, plan_param_groups
from ckptkit.param_groups.properties import parameter_table
from ckptkit.param_groups.validate import validate_param_groups
from tests.features import needs_optimizer


class RMSNorm(nn.Module):
    """A norm class outside torch, as in many language models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln = RMSNorm(4)
        self.mlp = nn.Linear(4, 4)


class Transformer(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.zeros(3, dtype=torch.float16))
        self.lora_A = nn.Linear(8, 2, bias=False)
        self.last = nn.Linear(8, 2)


DEFAULTS = {"lr": 0.1, "weight_decay": 0.5}
REST = {"name": "base", "rest": True}


def options(model: nn.Module, spec: Any, key: str) -> dict[str, Any]:
    """Return the value of option ``key`` for each parameter."""
    return {name: group[key] for group in build_param_groups(model, spec) for name in group["param_names"]}


def matched(model: Any, match: dict[str, Any]) -> set[str]:
    """Return the parameters that a ``match`` condition matches."""
    spec = {"group": [{"name": "hit", "match": match, "optional": True}, {**REST, "optional": True}]}
    groups = {group.name: group.parameters for group in plan_param_groups(model, spec).groups}
    return {parameter.name for parameter in groups.get("hit", ())}


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        pytest.param({"params": "bn.*"}, {"bn.weight", "bn.bias"}, id="params"),
        pytest.param(
            {"module": "Conv2d"}, {"conv.weight", "conv.bias", "depthwise.weight", "depthwise.bias"}, id="class"
        ),
        pytest.param({"module": "_ConvNd", "role": "bias"}, {"conv.bias", "depthwise.bias"}, id="base-class-and-role"),
        pytest.param({"module": "torch.nn.BatchNorm2d"}, {"bn.weight", "bn.bias"}, id="dotted-class"),
        pytest.param({"module": "nn.modules.batchnorm.BatchNorm2d"}, set(), id="half-a-path-is-none"),
        pytest.param({"role": "norm"}, {"bn.weight", "bn.bias"}, id="norm"),
        pytest.param({"role": "depthwise"}, {"depthwise.weight"}, id="depthwise"),
        pytest.param({"role": "lora_a"}, {"lora_A.weight"}, id="lora"),
        pytest.param({"role": "head"}, {"last.weight", "last.bias"}, id="head-is-the-last-layer"),
        pytest.param({"dtype": "float16"}, {"scale"}, id="dtype"),
        pytest.param({"ndim": 4}, {"conv.weight", "depthwise.weight"}, id="ndim"),
        pytest.param(
            {"ndim": [2, 4], "not": {"role": "head"}}, {"conv.weight", "depthwise.weight", "lora_A.weight"}, id="not"
        ),
        pytest.param({"shape": ["*", 8]}, {"lora_A.weight", "last.weight"}, id="shape"),
        pytest.param({"min_elements": 100}, {"conv.weight"}, id="min-elements"),
        pytest.param(
            {"any": [{"role": "norm"}, {"all": [{"ndim": 1}, {"params": "last.*"}]}]},
            {"bn.weight", "bn.bias", "last.bias"},
            id="any-all",
        ),
    ],
)
def test_a_condition_matches_names_modules_shapes_and_roles(match: dict[str, Any], expected: set[str]) -> None:
    assert matched(Convs(), match) == expected


def test_roles_follow_from_the_names_of_classes_and_base_classes() -> None:
    """mmengine and the Trainer of transformers miss RMSNorm classes outside torch."""
    model = Transformer(1)
    assert matched(model, {"role": "norm"}) == {"blocks.0.ln.weight", "norm.weight", "norm.bias"}
    assert matched(model, {"role": "embedding"}) == {"cls_token", "embed.weight"}
    assert matched(model, {"role": "head"}) == {"head.weight", "head.bias"}


def test_a_parametrized_weight_has_the_class_of_its_module() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Linear(2, 2))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert matched(model, {"module": "Conv2d"}) == {
        "0.bias",
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    }
    assert matched(model, {"role": "norm"}) == set()


def test_modifiers_apply_whichever_rule_owns_the_parameter() -> None:
    """A rule with another lr for the head does not disable no-decay for the bias of the head."""
    spec = {
        "defaults": DEFAULTS,
        "group": [{"name": "head", "params": "head.*", "lr_mult": 10}, REST],
        "modifier": [
            {"name": "no decay", "match": {"any": [{"ndim": [0, 1]}, {"role": "norm"}]}, "weight_decay": 0.0},
            {"name": "slow bias", "match": {"role": "bias"}, "lr_mult": 0.5},
        ],
    }
    model = Transformer(1)
    decay, lr = options(model, spec, "weight_decay"), options(model, spec, "lr")
    assert {name for name, value in decay.items() if value == 0} == {
        name for name, parameter in model.named_parameters() if parameter.ndim < 2
    }
    assert (lr["head.weight"], lr["head.bias"], lr["norm.bias"], lr["embed.weight"]) == (1.0, 0.5, 0.05, 0.1)
    plan = plan_param_groups(model, spec)
    assert [group.name for group in plan.groups] == [
        "head",
        "head/no decay/slow bias",
        "base",
        "base/no decay",
        "base/no decay/slow bias",
    ]
    assert validate_param_groups(model, torch.optim.AdamW(build_param_groups(model, spec))).findings == ()


def test_later_modifiers_set_and_multiply_the_values_of_earlier_ones() -> None:
    spec = {
        "defaults": DEFAULTS,
        "group": [{"name": "head", "params": "head.*", "lr": 2.0}, REST],
        "modifier": [
            {"name": "half", "params": "head.*", "lr_mult": 0.5},
            {"name": "set", "params": "head.bias", "lr": 7},
            {"name": "third", "params": "head.bias", "lr_mult": 3},
        ],
    }
    lr = options(Transformer(), spec, "lr")
    assert (lr["head.weight"], lr["head.bias"], lr["norm.bias"]) == (1.0, 21, 0.1)


LAYERS = [["cls_token", "embed.*"], "blocks.{i:int}.*", ["norm.*", "head.*"]]


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "first-block-frozen"])
def test_the_learning_rate_decays_by_layer_and_freezing_renumbers_no_layer(frozen: bool) -> None:
    """The factor is decay ** (number of layers above), and frozen parameters count as layers too."""
    model = Transformer(3)
    model.blocks[0].requires_grad_(not frozen)
    spec = {
        "defaults": DEFAULTS,
        "group": [REST],
        "modifier": [{"name": "depth", "layers": LAYERS, "layer_decay": 0.5, "min_scale": 0.1}],
    }
    lr = options(model, spec, "lr")
    for name, value in lr.items():
        layer = 0 if name[0] in "ce" else int(name.split(".")[1]) + 1 if name.startswith("blocks") else 4
        assert value == pytest.approx(0.1 * max(0.1, 0.5 ** (4 - layer))), name
    if not frozen:
        assert {
            parameter.layer for group in plan_param_groups(model, spec).groups for parameter in group.parameters
        } == {
            0,
            1,
            2,
            3,
            4,
        }


def test_a_parameter_in_no_layer_and_a_gap_in_layer_numbers_are_reported() -> None:
    model = Transformer(4)
    del model.blocks[1]
    model.blocks = nn.ModuleList()
    model.blocks.add_module("0", Block())
    model.blocks.add_module("2", Block())
    spec = {
        "defaults": DEFAULTS,
        "group": [REST],
        "modifier": [{"name": "depth", "layers": ["embed.*", "blocks.{i:int}.*", "head.*"], "layer_decay": 0.5}],
    }
    found = {finding.code: finding for finding in assign(parameter_table(model), spec).report.findings}
    assert set(found) == {"groups.layer-unmatched", "groups.layer-gap"}
    assert "'cls_token', 'norm.weight', 'norm.bias'" in found["groups.layer-unmatched"].message
    assert "finds no layer 1 in the model" in found["groups.layer-gap"].message


def test_lr_scale_is_written_only_on_request() -> None:
    """Without it, ``lr`` is already multiplied, which every scheduler keeps."""
    spec: dict[str, Any] = {
        "defaults": DEFAULTS,
        "group": [{"name": "head", "params": "head.*", "lr_mult": 10}, REST],
        "modifier": [{"name": "depth", "layers": LAYERS, "layer_decay": 0.5}],
    }
    plain = build_param_groups(Transformer(1), spec)
    assert not any("lr_scale" in group for group in plain)
    scaled = build_param_groups(Transformer(1), {**spec, "lr_scale": True})
    assert {group["lr"] for group in scaled} == {0.1}
    assert [group["lr"] * group["lr_scale"] for group in scaled] == [group["lr"] for group in plain]


def test_unmatched_can_be_the_name_of_a_group_or_freeze() -> None:
    model = Transformer(1)
    spec: dict[str, Any] = {"group": [{"name": "norms", "params": "*norm.*"}, {"name": "head", "params": "head.*"}]}
    named = build_param_groups(model, {**spec, "unmatched": "norms"})
    assert sum(len(group["params"]) for group in named) == len(list(model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    plan = plan_param_groups(model, {**spec, "unmatched": "freeze"})
    assert {parameter.name.split(".")[0] for parameter in plan.freeze} == {"cls_token", "embed", "blocks"}
    assert all(parameter.requires_grad for parameter in model.parameters()), "planning changes nothing"
    groups = build_param_groups(model, {**spec, "unmatched": "freeze"})
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for group in groups for name in group["param_names"]
    }
    assert validate_param_groups(model, groups).findings == ()


def test_a_group_with_freeze_freezes_its_parameters() -> None:
    model = Transformer(1)
    spec = {"group": [{"name": "still", "params": "embed.*", "freeze": True}, REST]}
    (group,) = build_param_groups(model, spec)
    assert not model.embed.weight.requires_grad
    assert "embed.weight" not in group["param_names"]
    assert build_param_groups(model, spec), "a second time it is frozen already, which is as asked"


def test_frozen_parameters_are_skipped_included_or_refused() -> None:
    model = Transformer(1)
    model.embed.requires_grad_(False)
    spec: dict[str, Any] = {"group": [REST]}
    assert "embed.weight" not in options(model, spec, "name")
    assert "embed.weight" in options(model, {**spec, "frozen": "include"}, "name")
    with pytest.raises(GroupsError, match=r"1 parameter has requires_grad=False, .*: 'embed.weight'"):
        build_param_groups(model, {**spec, "frozen": "error"})


def test_overlap_can_be_an_error() -> None:
    spec: dict[str, Any] = {"group": [{"name": "a", "params": "head.*"}, {"name": "b", "params": "*.weight"}, REST]}
    assert options(Transformer(), spec, "name")["head.weight"] == "a"
    with pytest.raises(GroupsError, match=r"'head\.weight' matches groups 'a' and 'b'"):
        build_param_groups(Transformer(), {**spec, "overlap": "error"})


def test_a_tied_parameter_with_different_modifiers_is_refused_or_uses_its_first_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    spec: dict[str, Any] = {
        "defaults": DEFAULTS,
        "group": [REST],
        "modifier": [{"name": "no decay", "match": {"role": "embedding"}, "weight_decay": 0.0}],
    }
    with pytest.raises(GroupsError, match="one tied parameter, but would get different values of 'weight_decay'"):
        build_param_groups(model, spec)
    (group,) = build_param_groups(model, {**spec, "tied": "first"})
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("merge", "order", "expected"),
    [
        ("rule", "rule", {"head": 2, "norm": 2, "base": 5}),
        ("rule", "model", {"base": 5, "norm": 2, "head": 2}),
        ("options", "rule", {"head": 2, "norm+base": 7}),
        ("never", "rule", None),
    ],
)
def test_groups_are_merged_and_ordered_by_policy(merge: str, order: str, expected: dict[str, int] | None) -> None:
    spec = {
        "merge": merge,
        "order": order,
        "group": [{"name": "head", "params": "head.*", "lr": 1.0}, {"name": "norm", "params": "norm.*"}, REST],
    }
    groups = build_param_groups(Transformer(1), spec)
    if expected is None:
        assert len(groups) == 9
        assert {len(group["params"]) for group in groups} == {1}
    else:
        assert [(group["name"], len(group["params"])) for group in groups] == list(expected.items())


@needs_optimizer("Muon")
def test_a_spec_with_two_optimizer_classes_builds_the_groups_of_each() -> None:
    """Muon trains hidden matrices and AdamW the rest: together every parameter once, and both optimizers step."""
    spec = {
        "optimizer": "AdamW",
        "defaults": {"weight_decay": 0.1},
        "optimizers": {"Muon": {"lr": 0.02, "momentum": 0.9}, "AdamW": {"lr": 0.001, "betas": [0.9, 0.95]}},
        "group": [
            {"name": "hidden", "match": {"ndim": 2, "not": {"role": ["embedding", "head"]}}, "optimizer": "Muon"},
            REST,
        ],
    }
    model = Transformer(2)
    plan = plan_param_groups(model, spec)
    assert plan.optimizers == ("Muon", "AdamW")
    made = [getattr(torch.optim, name)(build_param_groups(model, spec, optimizer=name)) for name in ("Muon", "AdamW")]
    assert [name for group in made[0].param_groups for name in group["param_names"]] == [
        "blocks.0.mlp.weight",
        "blocks.1.mlp.weight",
    ]
    assert (made[0].param_groups[0]["lr"], made[1].param_groups[0]["lr"]) == (0.02, 0.001)
    assert validate_param_groups(model, made).findings == ()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in made:
        optimizer.step()
    with pytest.raises(GroupsError, match="names several optimizer classes: Muon, AdamW"):
        build_param_groups(model, spec)
    with pytest.raises(GroupsError, match="no group of the spec trains with 'SGD'"):
        build_param_groups(model, spec, optimizer="SGD")


def test_bare_groups_have_no_names() -> None:
    (group,) = build_param_groups(nn.Linear(2, 2), {"defaults": {"lr": 1}, "group": [REST]}, bare=True)
    assert set(group) == {"params", "lr"}
    assert all(isinstance(parameter, nn.Parameter) for parameter in group["params"])


def test_a_checkpoint_can_be_planned_by_names_and_shapes() -> None:
    """The plan is equal to the plan of the live model, and the assumptions are reported."""
    spec = {
        "defaults": DEFAULTS,
        "group": [{"name": "head", "match": {"role": "head"}, "lr_mult": 10}, REST],
        "modifier": [{"name": "no decay", "match": {"role": ["norm", "bias"]}, "weight_decay": 0.0}],
    }
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(2, 3, 1))
    model.add_module("bn1", nn.BatchNorm2d(3))
    model.add_module("fc", nn.Linear(3, 2))
    live, offline = plan_param_groups(model, spec), plan_param_groups(model.state_dict(), spec)
    assert offline == live
    assert {finding.code for finding in assign(parameter_table(model.state_dict()), spec).report.findings} == {
        "groups.assumed"
    }


def test_a_condition_that_needs_the_live_model_is_reported_for_a_checkpoint() -> None:
    spec = {"group": [{"name": "convs", "match": {"module": "Conv2d"}, "optional": True}, REST]}
    report = assign(
        parameter_table({"conv.weight": torch.zeros(2, 2, 1, 1), "fc.weight": torch.zeros(2, 2)}), spec
    ).report
    unsure = next(finding for finding in report.findings if finding.code == "groups.needs-model")
    assert (unsure.severity, unsure.key) == ("warning", "conv.weight")
    assert "'convs' matches 'conv.weight', 'fc.weight'" in unsure.message


def modified(**table: Any) -> dict[str, Any]:
    return {"defaults": {"lr": 1.0}, "group": [REST], "modifier": [{"name": "m", **table}]}


def nested(depth: int) -> dict[str, Any]:
    match: dict[str, Any] = {"ndim": 1}
    for _ in range(depth):
        match = {"not": match}
    return match


@pytest.mark.parametrize(
    ("spec", "reason", "hint"),
    [
        pytest.param(
            {"group": [REST], "modifier": {"a": 1}}, "the modifiers of a spec are a dict", "[[modifier]]", id="no-list"
        ),
        pytest.param(modified(), "'m' changes no option", "weight_decay", id="changes-nothing"),
        pytest.param(modified(lr_mult="10"), "lr_mult is the string '10'", "lr_mult = 10", id="string-multiple"),
        pytest.param(modified(lr_mult=-1), "lr_mult is negative", "0 or more", id="negative-multiple"),
        pytest.param(modified(lr=1, lr_mult=2), "both lr and lr_mult", "keep one", id="both"),
        pytest.param(
            modified(weight_decay_mult=2),
            "multiplies 'weight_decay', for which the spec has no value",
            "[defaults]",
            id="nothing-to-multiply",
        ),
        pytest.param(modified(match=[]), "match is a list, not a table", "match = {", id="match-list"),
        pytest.param(
            modified(match="fc*"), "match is the string 'fc*', not a table", 'params = "fc*" takes', id="match-pattern"
        ),
        pytest.param(modified(match={}), "match is an empty table", "match = {", id="match-empty"),
        pytest.param(modified(match={"type": "Linear"}), "unknown key 'type'", "module", id="match-key"),
        pytest.param(modified(match={"role": "nrom"}), "role is the string 'nrom', not", "norm", id="role"),
        pytest.param(modified(match={"ndim": "1"}), "ndim is the string '1'", "ndim = 1", id="ndim"),
        pytest.param(modified(match={"shape": 3}), "shape is an int", "a star matches any size", id="shape"),
        pytest.param(
            modified(match={"role": [["bias"]]}), "role is a list, not a known", "the roles are", id="role-list"
        ),
        pytest.param(modified(match=nested(40)), "nested more than 32 levels deep", "", id="deep"),
        pytest.param(modified(match={"dtype": "f99"}), "dtype is 'f99', not a known dtype", "F32", id="dtype"),
        pytest.param(modified(match={"any": []}), "any is a list, not a list of conditions", "any = [", id="any-empty"),
        pytest.param(modified(layer_decay=0.5), "layer_decay but no layers", "layers =", id="decay-alone"),
        pytest.param(modified(layers=["a"]), "layers but no layer_decay", "layer_decay =", id="layers-alone"),
        pytest.param(modified(layers="a", layer_decay=1), "layers is the string 'a'", "layers =", id="layers-string"),
        pytest.param(
            {**modified(lr=1), "merge": "all"},
            "merge is the string 'all'",
            "'rule' or 'options' or 'never'",
            id="policy",
        ),
        pytest.param(
            {**modified(lr=1), "unmatched": "zz"}, "unmatched is the string 'zz'", "name of a group", id="unmatched"
        ),
        pytest.param({**modified(lr=1), "unmatched": "freeze"}, "has rest = true", "keep one", id="unmatched-and-rest"),
        pytest.param({**modified(lr=1), "lr_scale": 1}, "lr_scale is an int", "lr_scale = true", id="lr-scale"),
        pytest.param(
            [{"params": "a", "optimizer": "Muon"}, REST],
            "'a' names its optimizer, but 'base' does not",
            "at the top",
            id="half-hybrid",
        ),
        pytest.param({**modified(lr=1), "optimizer": 3}, "optimizer is an int", "AdamW", id="optimizer"),
        pytest.param(
            {**modified(lr=1), "optimizers": {"A": 3}}, "optimizers.A is an int", "[optimizers.A]", id="optimizers"
        ),
        pytest.param(
            [{"name": "a", "match": {"ndim": 1}, "rest": True}], "both match and rest", "keep one", id="match-and-rest"
        ),
    ],
)
def test_a_wrong_modifier_condition_or_policy_is_refused(spec: Any, reason: str, hint: str) -> None:
    with pytest.raises(GroupsError) as caught:
        parse_spec(spec)
    assert reason in caught.value.reason
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    "modifier",
    [{"lr_mult": 1e308}, {"layers": ["{i:int}.*"], "layer_decay": 1e200}],
    ids=["multiple", "layers"],
)
def test_multiples_that_give_an_infinite_lr_are_refused(modifier: dict[str, Any]) -> None:
    """The first step would make every parameter NaN. ``explain_param_group`` refuses the spec too."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    spec = {"defaults": {"lr": 100.0}, "group": [{"name": "base", "rest": True}], "modifier": [modifier]}
    for ask in (lambda: build_param_groups(model, spec), lambda: explain_param_group(model, spec, "0.weight")):
        with pytest.raises(GroupsError, match="'lr' of group 'base' is inf after all its multiples"):
            ask()


def test_a_modifier_that_matches_nothing_is_refused_with_the_nearest_pattern() -> None:
    with pytest.raises(GroupsError) as caught:
        build_param_groups(Transformer(), modified(params="haed.*", lr=1))
    assert caught.value.reason == "modifier 'm' matches no parameter of the model: params = 'haed.*'"
    assert caught.value.hint == "did you mean 'head.*'?"


def test_the_error_of_a_condition_that_matches_nothing_shows_the_condition() -> None:
    with pytest.raises(GroupsError, match=r'matches no parameter of the model: match = \{ role = "lora_a" \}'):
        build_param_groups(Transformer(), modified(match={"role": "lora_a"}, lr=1))
