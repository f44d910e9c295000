"""``build_param_groups`` puts every trainable parameter into exactly one group that torch optimizers accept."""

from __future__ import annotations

import fnmatch
import inspect
import json
import pickle
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from ckptkit.errors import GroupsError
from ckptkit.param_groups import ownership
from ckptkit.param_groups import plan as plan_module
from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.parse import parse_spec
from ckptkit.param_groups.plan import assign, plan_param_groups
from ckptkit.param_groups.properties import parameter_table
from ckptkit.param_groups.spec import ParamGroupSpec
from ckptkit.param_groups.spec.fields import GroupRule
from ckptkit.param_groups.validate import validate_param_groups
from ckptkit.readiness import preflight
from ckptkit.render.groups import groups_document, groups_page, groups_rows
from ckptkit.render.page import as_text
from tests.features import needs_optimizer
from tests.helpers_cli import run_ckpt

HEAD_AND_REST = {
    "defaults": {"lr": 0.001},
    "group": [{"name": "head", "params": "fc3.*", "lr": 0.01}, {"name": "base", "rest": True}],
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 5)
        self.bn = nn.BatchNorm1d(5)
        self.fc3 = nn.Linear(5, 3)
        self.fc31 = nn.Linear(3, 3, bias=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.wte.weight


def names(groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in groups}


def pairs(group: dict[str, Any]) -> list[tuple[str, nn.Parameter]]:
    return list(zip(group["param_names"], group["params"], strict=True))


def fault(model: nn.Module, spec: Any) -> GroupsError:
    with pytest.raises(GroupsError) as caught:
        build_param_groups(model, spec)
    assert "\n" not in str(caught.value)
    return caught.value


def test_groups_hold_the_live_parameters_under_their_names() -> None:
    """The groups hold the parameter objects in the order of the model, and ``fc3.*`` does not match ``fc31``."""
    model = Net()
    groups = build_param_groups(model, HEAD_AND_REST)
    assert names(groups) == {
        "head": ["fc3.weight", "fc3.bias"],
        "base": ["fc1.weight", "fc1.bias", "bn.weight", "bn.bias", "fc31.weight"],
    }
    assert [group["lr"] for group in groups] == [0.01, 0.001]
    live = dict(model.named_parameters())
    assert all(parameter is live[name] for group in groups for name, parameter in pairs(group))


def test_a_step_changes_the_head_ten_times_as_much() -> None:
    """In one real step with equal gradients, the updates have the ratio of the learning rates."""
    model = Net()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(build_param_groups(model, HEAD_AND_REST))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - parameter).mean().item() for name, parameter in model.named_parameters()}
    assert {name for name, by in moved.items() if by == pytest.approx(0.01, rel=1e-4)} == {"fc3.weight", "fc3.bias"}
    assert {name for name, by in moved.items() if by == pytest.approx(0.001, rel=1e-3)} == set(moved) - {
        "fc3.weight",
        "fc3.bias",
    }


OPTIMIZERS = [
    kind
    for _, kind in sorted(vars(torch.optim).items())
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_of_torch_takes_the_groups(kind: type[torch.optim.Optimizer]) -> None:
    """Names, group names and lr arrive, the state_dict loads again, and validation finds nothing."""
    one_group = kind is torch.optim.LBFGS  # LBFGS does not support per-parameter options
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))  # Muon takes 2-D parameters only
    spec: list[dict[str, Any]] = [{"name": "all", "params": "*", "lr": 0.1}]
    if not one_group:
        spec = [{"name": "head", "params": "1.*", "lr": 0.1}, {"name": "base", "rest": True}]
    optimizer = kind(build_param_groups(model, spec), lr=0.2)  # type: ignore[call-arg]
    assert [group["name"] for group in optimizer.param_groups] == [rule["name"] for rule in spec]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2][: len(spec)]
    recorded = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(recorded) == ["0.weight", "1.weight"]
    assert validate_param_groups(model, optimizer).findings == ()
    sparse = kind is torch.optim.SparseAdam
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter).to_sparse() if sparse else torch.ones_like(parameter)
    optimizer.step(lambda: 0.0) if one_group else optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert validate_param_groups(model, optimizer).findings == ()


def test_two_calls_share_nothing() -> None:
    """Two calls return different lr tensors and lists, and the spec does not change."""
    model = Net()
    lr, betas = torch.tensor(0.1), [0.9, 0.99]
    spec = parse_spec({"defaults": {"lr": lr, "betas": betas}, "group": HEAD_AND_REST["group"][1:]})  # type: ignore[index]
    first, second = build_param_groups(model, spec)[0], build_param_groups(model, spec)[0]
    torch.optim.Adam([first], lr=1.0, foreach=False)
    assert "eps" in first.keys() - second.keys()
    assert first["lr"] is not second["lr"] is not lr
    assert first["betas"] is not second["betas"]
    assert first["param_names"] is not second["param_names"]
    first["betas"][0] = 0.0
    first["lr"].fill_(9)
    assert second["betas"] == betas == [0.9, 0.99]
    assert second["lr"].item() == lr.item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam], ids=lambda kind: kind.__name__
)
def test_betas_from_a_file_are_a_list_and_train(kind: type[torch.optim.Adam]) -> None:
    """TOML and JSON have no tuples: a real step with a list is equal to a step with a tuple."""
    moved = []
    for betas in ([0.5, 0.6], (0.5, 0.6)):
        model = nn.Linear(2, 2)
        nn.init.ones_(model.weight)
        optimizer = kind(build_param_groups(model, [{"rest": True, "betas": betas, "lr": 0.1}]))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved.append(model.weight.detach())
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], torch.ones(2, 2))


def test_a_tensor_lr_from_the_defaults_is_not_shared_by_two_groups() -> None:
    """Otherwise a change of the lr of one group would change the other group."""
    spec = {"defaults": {"lr": torch.tensor(0.1)}, "group": [{"params": "fc3.*"}, {"rest": True}]}
    head, base = build_param_groups(Net(), spec)
    head["lr"].fill_(0)
    assert base["lr"].item() == pytest.approx(0.1)


def test_frozen_parameters_are_left_out() -> None:
    model = Net()
    model.fc1.requires_grad_(False)
    plan = plan_param_groups(model, HEAD_AND_REST)
    assert [parameter.name for parameter in plan.frozen] == ["fc1.weight", "fc1.bias"]
    assert names(build_param_groups(model, HEAD_AND_REST))["base"] == ["bn.weight", "bn.bias", "fc31.weight"]


def test_a_meta_model_can_be_planned() -> None:
    """A plan needs no parameter values."""
    with torch.device("meta"):
        model = Net()
    assert plan_param_groups(model, HEAD_AND_REST).elements == sum(p.numel() for p in model.parameters())


def test_a_tied_parameter_is_in_one_group_under_its_first_name() -> None:
    model = Tied()
    spec = [{"name": "embed", "params": ["wte.*", "lm_head.*"], "lr": 0.1}, {"name": "base", "rest": True}]
    assert names(build_param_groups(model, spec)) == {"embed": ["wte.weight"], "base": ["body.weight", "body.bias"]}
    assert plan_param_groups(model, spec).groups[0].parameters[0].aliases == ("lm_head.weight",)


@pytest.mark.parametrize("params", ["wte.*", "lm_head.*"], ids=["first-name", "alias"])
def test_tied_names_in_groups_with_different_options_are_refused(params: str) -> None:
    """Otherwise the lr of the head would silently be used for the embedding, or the reverse."""
    error = fault(Tied(), [{"name": "special", "params": params, "lr": 0.1}, {"name": "base", "rest": True}])
    assert error.reason.startswith("'wte.weight' and 'lm_head.weight' are one tied parameter")
    assert "'special'" in error.reason
    assert "'base'" in error.reason
    assert error.hint == "put both names into one group: params = ['wte.weight', 'lm_head.weight']"


def test_tied_names_in_groups_with_equal_options_are_accepted() -> None:
    spec = [{"name": "embed", "params": "wte.*", "lr": 0.1}, {"name": "base", "rest": True, "lr": 0.1}]
    assert names(build_param_groups(Tied(), spec))["embed"] == ["wte.weight"]


def test_a_group_that_matches_only_the_other_name_of_a_tied_parameter_is_refused() -> None:
    error = fault(Tied(), [{"name": "head", "params": "lm_head.*"}, {"name": "base", "rest": True}])
    assert "'lm_head.weight' is tied to 'wte.weight', which group 'base' owns" in error.reason
    assert "'wte.weight'" in (error.hint or "")


REST = {"name": "base", "rest": True}


@pytest.mark.parametrize(
    ("params", "hint"),
    [
        pytest.param("fc4.*", "did you mean 'fc3.*'?", id="typo"),
        pytest.param("fc3", "did you mean 'fc3.*'?", id="module"),
        pytest.param("fc3.", "did you mean 'fc3.*'?", id="module-dot"),
        pytest.param("module.fc3.*", "did you mean 'fc3.*'?", id="prefix-too-much"),
        pytest.param("weight", "did you mean '*.weight'?", id="prefix-missing"),
        pytest.param("fc3.wieght", "did you mean 'fc3.weight'?", id="name-typo"),
        pytest.param("re:fc3", "did you mean 're:(?:fc3).*'?", id="regex-not-whole"),
        pytest.param("fc3[.]*", "did you mean", id="other-glob"),
        pytest.param("qqq", "the model has 'fc1.weight', 'fc1.bias', 'bn.weight' and 4 more", id="no-idea"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused_with_the_nearest_pattern(params: str, hint: str) -> None:
    error = fault(Net(), [{"name": "head", "params": params}, REST])
    assert error.reason == f"group 'head' matches no parameter of the model: params = '{params}'"
    assert (error.hint or "").startswith(hint)


def test_every_suggested_pattern_can_be_used() -> None:
    """The pattern of the hint matches a parameter."""
    for params in ("fc4.*", "fc3", "module.fc3.*", "re:fc3", "fc3.wieght"):
        hint = fault(Net(), [{"params": params}, REST]).hint or ""
        assert build_param_groups(Net(), [{"params": hint.split("'")[1]}, REST])


def test_one_pattern_of_a_list_that_matches_nothing_is_refused() -> None:
    """The rule owns something, so without the error the second head would be missing unnoticed."""
    error = fault(Net(), [{"name": "head", "params": ["fc3.*", "fc4.*"]}, REST])
    assert error.reason == "pattern 'fc4.*' of group 'head' matches no parameter of the model"


def test_patterns_of_one_rule_may_overlap() -> None:
    groups = build_param_groups(Net(), [{"params": ["fc3.*", "*.bias", "fc3.bias"]}, REST])
    assert len(groups[0]["params"]) == 4


def test_buffers_are_not_parameters() -> None:
    error = fault(Net(), [{"name": "stats", "params": "bn.running_*"}, REST])
    assert "only buffers such as 'bn.running_mean'" in error.reason


def test_the_error_of_a_shadowed_rule_names_the_earlier_rule() -> None:
    error = fault(Net(), [{"name": "all fc", "params": "fc*"}, {"name": "head", "params": "fc3.*"}, REST])
    assert "group 'head' owns no parameter" in error.reason
    assert "'fc3.weight', 'fc3.bias'" in error.reason
    assert "every parameter that it matches is in an earlier group, 'all fc'" in error.reason
    assert "move the group with the narrower patterns up" in (error.hint or "")


def test_a_rule_that_matches_only_frozen_parameters_is_refused() -> None:
    model = Net()
    model.fc3.requires_grad_(False)
    error = fault(model, HEAD_AND_REST)
    assert (
        "group 'head' matches only frozen parameters ('fc3.weight', 'fc3.bias' with requires_grad=False)"
        in error.reason
    )
    assert "requires_grad_(True)" in (error.hint or "")


def test_parameters_that_match_no_rule_are_refused() -> None:
    error = fault(Net(), [{"params": "fc3.*"}])
    assert error.reason == (
        "5 trainable parameters match no group: 'fc1.weight', 'fc1.bias', 'bn.weight', 'bn.bias', 'fc31.weight'"
    )
    assert "rest = true" in (error.hint or "")


def test_a_long_list_of_parameters_is_cut_and_counted() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    assert fault(model, [{"params": "3.bias"}]).reason == (
        "7 trainable parameters match no group: '0.weight', '0.bias', '1.weight', '1.bias', '2.weight' and 2 more"
    )


def test_a_rest_rule_that_owns_nothing_is_refused() -> None:
    error = fault(Net(), [{"params": "*"}, REST])
    assert "group 'base' has rest = true, but the groups before it own all 7 parameters" in error.reason


def test_a_model_without_trainable_parameters_is_refused() -> None:
    for model in (nn.ReLU(), Net().requires_grad_(False)):
        assert "the model has no trainable parameter" in fault(model, [REST]).reason


def test_an_optional_rule_may_own_nothing_and_leaves_no_empty_group() -> None:
    spec: list[dict[str, Any]] = [
        {"name": "nobody", "params": "zz.*", "optional": True},
        {"name": "all", "params": "*"},
        {"name": "late", "params": "fc1.*", "optional": True},
        {"name": "left", "rest": True, "optional": True},
    ]
    assert list(names(build_param_groups(Net(), spec))) == ["all"]
    assert [rule.name for rule in plan_param_groups(Net(), spec).idle] == ["nobody", "late", "left"]


def test_an_uninitialised_parameter_is_refused_until_the_first_forward_pass() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    error = fault(model, [REST])
    assert "'0.weight' is uninitialised" in error.reason
    assert "run the model once" in (error.hint or "")
    model(torch.ones(1, 5))
    assert build_param_groups(model, [REST])


def test_not_a_module_is_refused() -> None:
    with pytest.raises(GroupsError, match=r"the model is an OrderedDict, not a torch\.nn\.Module"):
        build_param_groups(Net().state_dict(), [REST])  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", ["validate", "table", "lock", "preflight", "preflight_live", "build", "against_spec"])
@needs_optimizer("Muon")
def test_a_spec_is_assigned_to_a_model_once(
    entry: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each entry point matches the rules against the parameters once, and passes the plan on."""
    assigned: list[ParamGroupSpec] = []

    class CountingMatcher(ownership.RuleMatcher):
        def __init__(self, spec: ParamGroupSpec, table: Any) -> None:
            assigned.append(spec)
            super().__init__(spec, table)

    monkeypatch.setattr(plan_module, "RuleMatcher", CountingMatcher)
    two_classes = tmp_path / "muon.toml"
    two_classes.write_text(
        'defaults = { lr = 0.1 }\n[[group]]\nmatch = { ndim = 2 }\noptimizer = "Muon"\n'
        '[[group]]\nname = "rest"\nrest = true\noptimizer = "AdamW"\n'
    )
    spec = tomllib.loads(two_classes.read_text())
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    live = [getattr(torch.optim, name)(build_param_groups(model, spec, optimizer=name)) for name in ("Muon", "AdamW")]
    assigned.clear()
    lenet = ("--model", "py:fixtures.lenet:build", str(two_classes))
    entries: dict[str, Callable[[], object]] = {
        "validate": lambda: run_ckpt(capsys, "groups", "validate", *lenet),
        "table": lambda: run_ckpt(capsys, "groups", "table", *lenet),
        "lock": lambda: run_ckpt(capsys, "groups", "lock", *lenet, "-o", str(tmp_path / "lock.json")),
        "preflight": lambda: preflight(model, groups=spec, dry_step=lambda twin: twin(torch.ones(1, 2)).sum()),
        "preflight_live": lambda: preflight(model, groups=spec, optimizer=live),
        "build": lambda: build_param_groups(model, spec, optimizer="Muon"),
        "against_spec": lambda: validate_param_groups(model, live, spec=spec),
    }
    entries[entry]()
    assert len(assigned) == 1


def test_assign_finds_everything_at_once() -> None:
    """``plan_param_groups`` raises the first error; the report of ``assign`` has every finding."""
    spec = [{"name": "a", "params": "fc4.*"}, {"name": "b", "params": "fc1.*"}, {"name": "c", "params": "fc1.weight"}]
    report = assign(parameter_table(Net()), spec).report
    assert [(finding.code, finding.key) for finding in report.findings] == [
        ("groups.rule-unmatched", "a"),
        ("groups.rule-shadowed", "c"),
        ("groups.unowned", "bn.weight"),
    ]
    with pytest.raises(GroupsError, match=r"group 'a' matches no parameter .* \(and 2 more\)"):
        report.raise_for_errors()
    assert assign(parameter_table(Net()), HEAD_AND_REST).report.findings == ()


def test_a_plan_holds_no_live_object() -> None:
    """Two plans can be compared, and a plan can be pickled."""
    plan = plan_param_groups(Net(), HEAD_AND_REST)
    assert plan == plan_param_groups(Net(), HEAD_AND_REST) == pickle.loads(pickle.dumps(plan))


def test_the_table_and_the_document_show_what_the_optimizer_gets() -> None:
    model = Net()
    model.fc31.requires_grad_(False)
    spec = {
        "defaults": {"lr": 0.001, "betas": [0.9, 0.99]},
        "group": [
            {"name": "head", "params": ["fc3.*"], "lr": torch.tensor(0.5), "weight_decay": 0},
            {"name": "zz", "params": "zz.*", "optional": True, "lr": 0.0},
            {"name": "b\x1b", "rest": True, "eps": 1e-12},
        ],
    }
    plan = plan_param_groups(model, spec)
    headers, rows = groups_rows(plan)
    assert dict(zip(headers, rows[0], strict=True)) == {
        "group": "head",
        "rule": "fc3.*",
        "parameters": "2",
        "elements": "18",
        "share": "34.0 %",
        "lr": "0.5",
        "weight_decay": "0",
        "other options": "betas=[0.9, 0.99]",
        "examples": "fc3.weight, fc3.bias",
    }
    assert rows[1][:8] == ("b\\x1b", "(rest)", "4", "35", "66.0 %", "0.001", "", "betas=[0.9, 0.99], eps=1e-12")
    assert rows[1][8].endswith(", ... 2 more")
    text = "\n".join(as_text(groups_page(plan)))
    assert "6 parameters in 2 groups, 53 elements" in text
    assert "1 frozen parameter in no group, 9 elements" in text
    assert "optional group 'zz' owns nothing" in text
    document: Any = groups_document(plan)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["schema"] == "ckptkit.groups/1"
    assert document["groups"][0]["options"] == {"lr": 0.5, "betas": [0.9, 0.99], "weight_decay": 0}
    assert document["groups"][0]["parameters"][1] == {
        "key": "fc3.bias",
        "shape": [3],
        "elements": 3,
        "aliases": [],
        "rule": "head",
        "modifiers": [],
        "layer": None,
    }
    assert document["summary"] == {
        "groups": 2,
        "parameters": 6,
        "elements": 53,
        "frozen_parameters": 1,
        "frozen_elements": 9,
    }


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Draw a tree of modules with parameters, some frozen, some tied."""
    tree = st.recursive(
        st.tuples(st.integers(1, 3), st.booleans()),
        lambda inner: st.dictionaries(st.sampled_from(["a", "b", "ab", "fc1", "fc10"]), inner, min_size=1, max_size=3),
        max_leaves=8,
    )

    def grow(node: Any) -> nn.Module:
        module = nn.Module()
        if isinstance(node, dict):
            for name, inner in node.items():
                module.add_module(name, grow(inner))
            return module
        count, trainable = node
        for name in ("weight", "bias", "b")[:count]:
            module.register_parameter(name, nn.Parameter(torch.zeros(2), requires_grad=trainable))
        return module

    model = grow(draw(tree))
    parameters = list(model.parameters())
    if draw(st.booleans()):
        model.register_parameter("tied", parameters[0])
    return model


GLOBS = st.lists(st.sampled_from(["a", "b", "fc1", "*", ".", "weight", "bias"]), min_size=1, max_size=4).map("".join)


@settings(deadline=None)
@given(models(), st.lists(st.lists(GLOBS, min_size=1, max_size=3), max_size=4))
def test_every_trainable_parameter_is_owned_by_the_first_rule_that_matches(
    model: nn.Module, rules: list[list[str]]
) -> None:
    """For any spec and any model: fnmatch decides what matches, and torch decides what is trainable."""
    assume(any(parameter.requires_grad for parameter in model.parameters()))
    spec = [{"name": str(i), "params": globs, "optional": True, "lr": 0.1} for i, globs in enumerate(rules)]
    groups = build_param_groups(model, [*spec, {"name": "rest", "rest": True, "optional": True, "lr": 0.1}])
    expected: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():  # torch leaves out the later names of a tied parameter
        if parameter.requires_grad:
            owners = [str(i) for i, globs in enumerate(rules) if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
            expected.setdefault((owners or ["rest"])[0], []).append(name)
    assert names(groups) == expected
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert validate_param_groups(model, torch.optim.SGD(groups)).findings == ()


@settings(deadline=None)
@given(models(), st.lists(st.lists(GLOBS, min_size=1, max_size=2), min_size=1, max_size=3), st.booleans())
def test_a_spec_is_refused_exactly_where_something_matches_nothing(
    model: nn.Module, rules: list[list[str]], rest: bool
) -> None:
    """Without ``optional``, every rule must own a parameter, every pattern match, and every parameter be owned."""
    spec: list[dict[str, Any]] = [{"name": str(i), "params": globs} for i, globs in enumerate(rules)]
    spec += [{"name": "rest", "rest": True}] if rest else []
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    owner = {
        name: next((i for i, globs in enumerate(rules) if any(fnmatch.fnmatchcase(name, glob) for glob in globs)), None)
        for name in trainable
    }
    idle_rule = any(i not in owner.values() for i in range(len(rules))) or (rest and None not in owner.values())
    idle_pattern = any(not fnmatch.filter(every, glob) for globs in rules for glob in globs)
    is_unowned = not rest and None in owner.values()
    try:
        plan_param_groups(model, spec)
    except GroupsError:
        refused = True
    else:
        refused = False
    assert refused == (idle_rule or idle_pattern or is_unowned)


def test_a_spec_made_of_dataclasses_builds_groups() -> None:
    spec = ParamGroupSpec((GroupRule("all", rest=True, options={"lr": 0.5}),), {"momentum": 0.9})
    (group,) = build_param_groups(Net(), spec)
    assert {key: group[key] for key in ("name", "lr", "momentum")} == {"name": "all", "lr": 0.5, "momentum": 0.9}
