"""Policies by pattern: what happens to each key that is missing, unexpected or of another shape."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ckptkit import OnMismatch, load_into, merge, parse_rules, plan_merge
from ckptkit.core.patterns import pattern_for
from ckptkit.errors import ArgumentError, CkptkitError, ModelError, PlanError, RuleError
from ckptkit.plans.policies import MISMATCH_ACTIONS, parse_policy
from tests.helpers_cli import run_ckpt
from tests.helpers_outputs import described


def net(channels: int, classes: int) -> nn.ModuleDict:
    """Return a model with a first convolution, a body and a head."""
    names = {"conv1": nn.Conv2d(channels, 4, 3), "body": nn.Linear(4, 3), "fc": nn.Linear(3, classes)}
    return nn.ModuleDict(names)


BY_PATTERN: OnMismatch = {"conv1.*": "conv_in_channels", "fc.*": "skip"}
OPTIONS = ["--on-mismatch", "conv1.*=conv_in_channels", "--on-mismatch", "fc.*=skip"]
BASE = described(fc__weight=(2, 5), fc__bias=(2,), body=(3,))


def refusal(*given: Any, **policies: Any) -> CkptkitError:
    with pytest.raises(CkptkitError) as caught:
        plan_merge(*given, **policies)
    return caught.value


def rules_of(plan: Any) -> dict[str, tuple[str, str]]:
    """Return the role and the rule of each step."""
    return {step.out.key: (step.sources[0].role, step.rule) for step in plan.steps}


def test_each_pattern_has_its_own_action(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The convolution is adapted, the head is the base's, and all else is the donor's; torch loads it all."""
    model, donor = net(1, 2).state_dict(), net(3, 10).state_dict()
    base, old, out = (tmp_path / f"{name}.safetensors" for name in ("base", "old", "out"))
    save_file(model, base)
    save_file(donor, old)
    ran = run_ckpt(capsys, "merge", base, old, "-o", out, *OPTIONS, "--verify")
    assert ran.code == 0, ran.err
    loaded = net(1, 2)
    loaded.load_state_dict(load_file(out), strict=True)
    made = loaded.state_dict()
    assert torch.equal(made["fc.weight"], model["fc.weight"])
    assert torch.equal(made["body.weight"], donor["body.weight"])
    assert torch.allclose(made["conv1.weight"], donor["conv1.weight"].sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(made["conv1.bias"], donor["conv1.bias"])
    live = net(1, 2)
    live.load_state_dict(model)
    report = load_into(live, donor, on_mismatch={"conv1.*": "conv_in_channels", "fc.*": "skip"})
    assert report.kept == ("fc.weight", "fc.bias")
    for key, value in live.state_dict().items():
        assert torch.equal(value, made[key])


@pytest.mark.parametrize(
    ("on_mismatch", "on_missing", "severities"),
    [
        ({"fc.*": "skip"}, {"body": "keep"}, {"note"}),
        ({"*": "skip"}, {"*": "keep"}, {"warning"}),
        ("skip", "keep", {"warning"}),
    ],
    ids=["by pattern", "all others", "one action"],
)
def test_what_a_pattern_asked_for_is_a_note_of_the_load(
    on_mismatch: Any, on_missing: Any, severities: set[str]
) -> None:
    """A tensor that stays as it is because of the action for all keys can be a surprise, and is a warning."""
    model = nn.Module()
    model.body, model.same = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    model.fc = nn.Linear(2, 2, bias=False)
    donor = {"fc.weight": torch.ones(5, 2), "same": torch.ones(2)}
    report = load_into(model, donor, on_mismatch=on_mismatch, on_missing=on_missing)
    assert sorted(finding.code for finding in report.findings) == ["load.missing", "load.shape"]
    assert {finding.severity for finding in report.findings} == severities
    assert set(report.kept) == {"body", "fc.weight"}


def test_the_plan_records_what_decided() -> None:
    """A step names its policy, and one without a policy that decided names none."""
    plan = plan_merge(net(1, 2), net(3, 10), on_mismatch=BY_PATTERN)
    assert rules_of(plan) == {
        "conv1.weight": ("donor", "--on-mismatch 'conv1.*=conv_in_channels'"),
        "conv1.bias": ("donor", ""),
        "body.weight": ("donor", ""),
        "body.bias": ("donor", ""),
        "fc.weight": ("base", "--on-mismatch 'fc.*=skip'"),
        "fc.bias": ("base", "--on-mismatch 'fc.*=skip'"),
    }


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"fc.bias": "pad", "fc.*": "skip"}, ["skip", "pad", "error"]),
        ({"*": "skip", "fc.bias": "pad"}, ["skip", "pad", "skip"]),
        ({"fc.{part}": "slice", "*": "error"}, ["slice", "slice", "error"]),
        ({"re:.*=.*|fc[.].*": "pad"}, ["pad", "pad", "error"]),
        ({}, ["error", "error", "error"]),
        ("skip", ["skip", "skip", "skip"]),
    ],
    ids=["first", "others first", "capture", "regex", "empty", "one action"],
)
def test_the_first_pattern_that_matches_decides(policy: Any, expected: list[str]) -> None:
    """``"*"`` is for all other keys wherever it stands; without it, they are an error."""
    parsed = parse_policy("on_mismatch", policy, MISMATCH_ACTIONS)
    assert [parsed.action(key) for key in ("fc.weight", "fc.bias", "body")] == expected


def test_a_key_that_no_pattern_matches_is_an_error() -> None:
    """The hints show the option for the module where all its keys need it, else for the key."""
    donor = described(fc__weight=(9, 5), fc__bias=(9,), body=(4,))
    error = refusal(BASE, donor, on_mismatch={"body": "skip"})
    assert error.reason == "'fc.weight' is [2, 5] in the base and [9, 5] in the donor, and 1 more differ in shape"
    assert "--on-mismatch 'fc.*=slice': " in str(error.hint)
    assert str(error.hint).startswith("--on-mismatch 'fc.*=skip' keeps the base's values there; ")
    assert "--on-mismatch 'body=skip' keeps" in str(refusal(BASE, donor, on_mismatch={"fc.*": "skip"}).hint)


def test_the_hint_has_a_pattern_for_each_module() -> None:
    """With these, the merge goes through. A hint is short: of many patterns it shows four."""
    base = described(words__weight=(12, 4), fc__weight=(2, 4), fc__bias=(2,), patch__weight=(8, 1, 3, 3), same=(2,))
    donor = described(words__weight=(10, 4), fc__weight=(9, 4), fc__bias=(9,), patch__weight=(8, 3, 3, 3), same=(2,))
    hint = str(refusal(base, donor).hint)
    shown = dict(re.findall(r"--on-mismatch '([^=]*)=(\w+)'", hint))
    assert shown == {"words.weight": "pad_mean", "fc.*": "skip", "patch.weight": "conv_in_channels"}
    plan_merge(base, donor, on_mismatch=shown)
    many = [described(**{f"m{number}__w": (size, 4) for number in range(7)}, same=(2,)) for size in (3, 2)]
    assert "; 3 more patterns to give; without" in str(refusal(*many).hint)


def test_a_missing_key_may_be_kept_by_pattern() -> None:
    """Only the head may be new: any other missing key is refused."""
    plan = plan_merge(BASE, described(body=(3,)), on_missing={"fc.*": "keep"})
    assert rules_of(plan)["fc.weight"] == ("base", "--on-missing 'fc.*=keep'")
    error = refusal(BASE, described(fc__bias=(2,)), on_missing={"fc.*": "keep"})
    assert error.reason == "no donor has 'body'"
    assert error.hint == "--on-missing 'body=keep' keeps the base's own values"
    error = refusal(BASE, described(body=(3,)), on_missing="error")
    assert error.hint is not None
    assert error.hint.startswith("--on-missing 'fc.*=keep' keeps the base's own values")


def test_an_unexpected_key_may_be_added_by_pattern() -> None:
    """The patterns match the key in the donor's file, before it is renamed."""
    donor = described(m__body=(3,), m__head=(7,), m__other=(1,))
    plan = plan_merge(BASE, donor, ["m.*=*"], on_unexpected={"m.head": "add", "*": "skip"})
    assert rules_of(plan)["head"] == ("donor", "--rename 'm.*=*', --on-unexpected 'm.head=add'")
    assert ("m.other", "the base does not have it") in {(drop.key, drop.reason) for drop in plan.dropped}
    error = refusal(BASE, donor, ["m.*=*"], on_unexpected={"m.head": "add"})
    assert error.reason == "the base has no 'm.other'"
    assert error.hint == "--on-unexpected 'm.other=skip' leaves it out, --on-unexpected 'm.other=add' adds it"


@pytest.mark.parametrize(
    ("policies", "reason", "hint"),
    [
        (
            {"on_mismatch": {"fc.weigth": "skip"}},
            "--on-mismatch 'fc.weigth' matches none of 3 keys of the base",
            "'fc.weight'",
        ),
        ({"on_missing": {"fc": "keep"}}, "--on-missing 'fc' matches none of 3 keys of the base", "'fc.*'"),
        ({"on_unexpected": {"x": "add"}}, "--on-unexpected 'x' matches none of 2 keys of the donor", "the donor has"),
        (
            {"on_mismatch": {"fc.*": "skip", "fc.bias": "pad"}},
            "--on-mismatch 'fc.bias' is shadowed: the earlier 'fc.*' matches 'fc.bias'",
            "write the narrower pattern first",
        ),
    ],
    ids=["mismatch", "missing", "unexpected", "shadowed"],
)
def test_a_pattern_that_decides_nothing_is_refused(policies: dict[str, Any], reason: str, hint: str) -> None:
    """It is refused as an unused rule is, and where unused rules are allowed, a note names it."""
    donor = described(fc__weight=(2, 5), body=(3,))
    error = refusal(BASE, donor, **policies)
    assert isinstance(error, RuleError)
    assert error.reason == reason
    assert hint in str(error.hint)
    others: Any = {
        name: {**policy, "*": "skip" if name != "on_missing" else "keep"} for name, policy in policies.items()
    }
    assert reason in plan_merge(BASE, donor, parse_rules(allow_unused=True), **others).notes


@pytest.mark.parametrize(
    ("policies", "reason"),
    [
        ({"on_mismatch": {"fc.*": "pda"}}, "on_mismatch['fc.*'] is the string 'pda'"),
        ({"on_mismatch": {"*": None}}, 'on_mismatch["*"] is None'),
        ({"on_mismatch": ["skip"]}, "on_mismatch is a list"),
        ({"on_mismatch": ""}, "on_mismatch is the string ''"),
        ({"on_missing": {5: "keep"}}, "a pattern of on_missing is 5"),
        ({"on_missing": {"": "keep"}}, "a pattern is empty"),
        ({"on_unexpected": {"re:(": "skip"}}, "'re:(' is not a valid regular expression"),
    ],
    ids=["action", "none", "list", "no word", "number", "empty", "regex"],
)
def test_wrong_policies_are_refused(policies: dict[str, Any], reason: str) -> None:
    """The message names the argument and the possible actions."""
    error = refusal(BASE, BASE, **policies)
    assert error.reason.startswith(reason)
    if reason.startswith("on_mismatch"):
        assert '"error" or "skip" or "conv_in_channels"' in str(error.hint)
    if set(policies) == {"on_mismatch"} and not isinstance(policies["on_mismatch"], dict):
        assert str(error.hint).endswith('or a dict of patterns, such as {"fc.*": "skip"}')


def test_a_model_gets_no_new_keys_by_pattern() -> None:
    """``load_into`` refuses ``add`` in a mapping too."""
    with pytest.raises(ModelError, match="a model cannot get keys"):
        load_into(net(1, 2), net(1, 2).state_dict(), on_unexpected={"head.*": "add", "*": "skip"})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["skip"], "base --on-mismatch skip"),
        (["error", "a=b*=skip"], "base --on-mismatch 'a=b*=skip'"),
        (["re:.*=b.*=skip"], "base --on-mismatch 're:.*=b.*=skip'"),
        (["a=b.w=pad", "skip"], "donor --on-mismatch 'a=b.w=pad'"),
        (["*=skip"], "base --on-mismatch skip"),
    ],
    ids=["bare", "equals sign", "regex", "two", "star"],
)
def test_the_last_equals_sign_separates(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything before the last ``=`` is the pattern, and an action alone is for all other keys."""
    base, donor = tmp_path / "base.safetensors", tmp_path / "donor.safetensors"
    save_file({"a=b.w": torch.zeros(3), "c": torch.zeros(1)}, base)
    save_file({"a=b.w": torch.ones(2), "c": torch.ones(1)}, donor)
    given = [part for option in options for part in ("--on-mismatch", option)]
    ran = run_ckpt(capsys, "merge", base, donor, "-o", tmp_path / "out.safetensors", "-n", *given)
    assert ran.code == 0, ran.err
    row = next(line for line in ran.out.splitlines() if line.startswith("a=b.w"))
    role, rule = expected.split(" ", 1)
    assert row.endswith(rule)
    assert role in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fc.*=pda"], "'pda' is not one of 'error', 'skip', 'conv_in_channels'"),
        (["pda"], "'pda' is not one of 'error', 'skip', 'conv_in_channels'"),
        (["skip", "error"], "an action for all other keys is given twice"),
        (["fc.*=skip", "fc.*=pad"], "'fc.*' is given twice"),
        (["=skip"], "a pattern is empty"),
    ],
    ids=["action", "bare action", "two bare", "twice", "empty"],
)
def test_wrong_options_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong action names the possible ones."""
    path = tmp_path / "base.safetensors"
    save_file({"fc.weight": torch.zeros(3)}, path)
    given = [part for option in options for part in ("--on-mismatch", option)]
    ran = run_ckpt(capsys, "merge", path, path, "-o", tmp_path / "out.safetensors", *given)
    assert ran.code == 2
    assert message in ran.err


def test_hints_show_the_module_only_where_all_of_it_fits() -> None:
    """A key with signs of the pattern language gets a pattern for itself alone."""
    keys = ["fc.weight", "fc.bias", "a*.w", "a*.b"]
    assert pattern_for("fc.weight", keys) == "fc.*"
    assert pattern_for("fc.weight", keys, lambda key: key != "fc.bias") == "fc.weight"
    assert pattern_for("fc.weight", ["fc.weight", "body"]) == "fc.weight"
    assert pattern_for("a*.w", keys) == r"re:a\*\.w"
    assert pattern_for("pos_embed", ["pos_embed", "x.y"]) == "pos_embed"


@pytest.mark.parametrize(
    ("policy", "action", "hint"),
    [("on_missing", "skip", '"keep" or "error"'), ("on_unexpected", "keep", '"skip" or "add" or "error"')],
)
def test_each_policy_has_its_own_actions(policy: str, action: str, hint: str) -> None:
    """A wrong action is the error even where the donor is wrong too."""
    with pytest.raises(ArgumentError, match=f"{policy} is the string '{action}'") as caught:
        plan_merge(BASE, [], **{policy: action})  # type: ignore[arg-type]
    assert hint in str(caught.value.hint)


def test_a_pattern_for_keys_of_the_base_is_an_error_of_the_base(tmp_path: Path) -> None:
    """The error names the file whose keys the pattern should match."""
    for name in ("base.pt", "donor.pt"):
        torch.save({"fc.weight": torch.ones(2)}, tmp_path / name)
    with pytest.raises(RuleError) as caught:
        merge(tmp_path / "base.pt", tmp_path / "donor.pt", tmp_path / "out.pt", on_mismatch={"x.*": "skip"})
    assert caught.value.path == str(tmp_path / "base.pt")


def test_an_error_of_a_call_names_its_arguments() -> None:
    """The text in Python has what can be passed there; the hint of the command line has its options."""
    base, donor = {"fc.w": torch.zeros(4, 2), "fc.b": torch.zeros(4)}, {"fc.w": torch.ones(7, 2), "fc.b": torch.ones(7)}
    error = refusal(base, donor)
    assert "; on_mismatch={'fc.*': 'slice'}: the first 4 of 7 rows" in str(error)
    assert "--on-mismatch 'fc.*=slice': the first" in str(error.hint)
    plan_merge(base, donor, on_mismatch={"fc.*": "slice"})
    error = refusal(base, {"m.fc.w": torch.ones(4, 2)})
    assert str(error).endswith("1 of 2 keys match after rules=['m.*=*'])")
    assert str(error.hint).endswith("--rename 'm.*=*'")
    plan_merge(base, {"m.fc.w": torch.ones(4, 2)}, ["m.*=*"])
    with pytest.raises(PlanError, match=r"\(on_missing={'fc.b': 'keep'} keeps the base's own values\)"):
        plan_merge(base, {"fc.w": torch.ones(4, 2)}, on_missing="error")


@pytest.mark.parametrize(
    ("state", "policies"),
    [
        ({"fc.weight": torch.ones(9, 3)}, {}),
        ({"fc.bias": torch.ones(2)}, {"on_missing": "error"}),
        ({"fc.bias": torch.ones(2), "head": torch.ones(1)}, {"on_unexpected": "error"}),
        ({"x": torch.ones(2)}, {}),
        ({}, {}),
        ({"fc.bias": torch.ones(2)}, {"on_mismatch": {"absent.*": "skip"}}),
    ],
    ids=["mismatch", "missing", "unexpected", "no match", "empty", "unused"],
)
def test_loading_speaks_of_the_model_and_the_checkpoint(state: dict[str, torch.Tensor], policies: Any) -> None:
    """It has no base and no donor, and its hints give no action that it refuses."""
    with pytest.raises(CkptkitError) as caught:
        load_into(net(1, 2), state, **policies)
    said = str(caught.value)
    assert "model" in said or "checkpoint" in said
    assert all(word not in said.lower() for word in ("base", "donor", "'add'", "merge"))
