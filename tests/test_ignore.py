"""Expected findings: ``ignore=``, ``--ignore`` and the ignore list of a spec leave them out, count them and say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import assert_param_groups, preflight, run_checks, validate_param_groups
from ckptkit.core.findings import Report
from ckptkit.core.findings.code_names import CODE_NAMES
from ckptkit.errors import CkptkitError, GroupsError, RuleError
from ckptkit.integrations.base import ParamGroupsCheck
from ckptkit.param_groups.parse import parse_spec
from ckptkit.param_groups.spec.writing import dump_spec, spec_table
from tests.generated import code_tables
from tests.helpers_cli import run_ckpt

LENET = "py:fixtures.lenet:build"
UNEQUAL = ["groups.decay", "groups.missing"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def half_trained(model: Net) -> torch.optim.Optimizer:
    """Return an optimizer without the head; its strong decay also acts on the vectors of body and norm."""
    rest = [*model.body.parameters(), *model.norm.parameters()]
    return torch.optim.AdamW(rest, weight_decay=0.5)


def split(report: Report) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the codes and keys of the findings that stay, and of those that are ignored."""
    return [(f.code, f.key) for f in report.findings], [(f.code, f.key) for f in report.ignored]


MISSING = [("groups.missing", "head.weight"), ("groups.missing", "head.bias")]
DECAY = ("groups.decay", "body.bias")


@pytest.mark.parametrize(
    ("ignore", "stays", "ignored"),
    [
        ((), [DECAY, *MISSING], []),
        ("groups.missing", [DECAY], MISSING),
        (["groups.missing:head.*", "groups.decay"], [], [DECAY, *MISSING]),
        (["groups.missing:*.bias"], [DECAY, MISSING[0]], [MISSING[1]]),
        (["groups.missing:re:.*(weight|bias)"], [DECAY], MISSING),
        (["groups.mis*"], [DECAY], MISSING),
        (["groups.*:head.*"], [DECAY], MISSING),
        (["*"], [], [DECAY, *MISSING]),
        (["groups.decay:body.bias", "groups.decay:norm.*"], MISSING, [DECAY]),
        (["groups.decay:norm.*"], [DECAY, *MISSING, ("ignore-unused", "groups.decay:norm.*")], []),
        (["groups.tied"], [DECAY, *MISSING, ("ignore-unused", "groups.tied")], []),
        (["nan"], [DECAY, *MISSING, ("ignore-unused", "nan")], []),
        (["groups.tied", "ignore-unused"], [DECAY, *MISSING], [("ignore-unused", "groups.tied")]),
    ],
)
def test_an_entry_leaves_out_the_findings_it_matches(
    ignore: Any, stays: list[tuple[str, str]], ignored: list[tuple[str, str]]
) -> None:
    """A finding about several parameters is left out only if the entries match all of them; an idle entry is a note."""
    model = Net()
    optimizer = half_trained(model)
    report = validate_param_groups(model, optimizer, ignore=ignore)
    assert split(report) == (stays, ignored)
    assert {f.severity for f in report.findings if f.code == "ignore-unused"} <= {"note"}


def test_a_pattern_matches_the_name_of_the_parameter_before_it_was_wrapped() -> None:
    """The entries of one script hold under DataParallel and torch.compile, as the patterns of a spec do."""
    model = Net()
    wrapped = nn.DataParallel(model)
    report = validate_param_groups(wrapped, half_trained(model), ignore=["groups.missing:head.*", "groups.decay"])
    assert (report.findings, len(report.ignored)) == ((), 3)


@pytest.mark.parametrize(
    ("ignore", "reason", "hint"),
    [
        (["groups.state-stepz"], "no finding has the code 'groups.state-stepz'", "did you mean groups.state-steps"),
        (["decay"], "no finding has the code 'decay'", "did you mean groups.decay?"),
        (["group.*"], "no finding has the code 'group.*'", "did you mean groups.*"),
        ([""], "no finding has the code ''", "CODE:KEY-PATTERN"),
        (["groups.decay:"], "'groups.decay:' has no pattern after the colon", "CODE:KEY-PATTERN"),
        (["groups.decay:{"], "'groups.decay:{'", "brace"),
        (["groups.decay:re:("], "'groups.decay:re:('", ""),
        (["groups.{x}*{"], "'groups.{x}*{'", "brace"),
        ([3], "ignore is", "CODE"),
        ({"groups.decay": "*"}, "ignore is", "CODE"),
        (None, "ignore is", "CODE"),
    ],
)
def test_an_entry_that_is_not_valid_is_refused(ignore: Any, reason: str, hint: str) -> None:
    """Every function and the spec refuse a code that no check has, and name similar codes."""
    model = Net()
    optimizer = half_trained(model)
    calls: list[Callable[[], object]] = [
        lambda: validate_param_groups(model, optimizer, ignore=ignore),
        lambda: assert_param_groups(model, optimizer, ignore=ignore),
        lambda: preflight(model, optimizer=optimizer, ignore=ignore),
        lambda: run_checks({}, ignore=ignore),
        lambda: ParamGroupsCheck(ignore=ignore),
        lambda: parse_spec({"ignore": ignore, "group": [{"params": "*"}]}),
    ]
    for call in calls:
        with pytest.raises(CkptkitError) as caught:
            call()
        assert isinstance(caught.value, RuleError | GroupsError)
        assert reason in caught.value.reason
        assert hint in (caught.value.hint or "")


def test_every_declared_code_can_be_ignored() -> None:
    """The list of names that is checked at run time holds every code, also of packages that are not imported."""
    assert {code.name for codes in code_tables().values() for code in codes} == CODE_NAMES


def test_strict_passes_where_every_finding_is_ignored() -> None:
    """Ignored errors and warnings do not raise; the others do."""
    model = Net()
    optimizer = half_trained(model)
    report = assert_param_groups(model, optimizer, strict=True, ignore=UNEQUAL)
    assert (report.ok, report.findings, report.ignored_counts) == (True, (), "3 findings ignored (2 errors, 1 note)")
    assert str(report) == "no findings; 3 findings ignored (2 errors, 1 note)"
    assert "3 findings ignored" in report._repr_html_()
    with pytest.raises(GroupsError, match=r"head\.weight"):
        assert_param_groups(model, optimizer, ignore=["groups.missing:*.bias"])


def test_the_callbacks_and_a_spec_have_an_ignore_list() -> None:
    """The list of a spec adds to the argument, for validate, assert, preflight and the callbacks."""
    model = Net()
    optimizer = half_trained(model)
    spec = parse_spec({"ignore": ["groups.missing", "groups.decay"], "group": [{"params": "*"}], "defaults": {}})
    rest = ["groups.moved", "groups.options"]
    for report in (
        validate_param_groups(model, optimizer, spec=spec, ignore=rest),
        assert_param_groups(model, optimizer, spec=spec, ignore=rest, strict=True),
        preflight(model, optimizer=optimizer, groups=spec, ignore=[*rest, "preflight.*"]),
        ParamGroupsCheck(strict=True, spec=spec, ignore=rest).run(model, [optimizer], []),
    ):
        assert {f.code for f in report.findings} <= {"ignore-unused"}
        assert {f.code for f in report.ignored} >= {"groups.missing"}
    with pytest.raises(GroupsError, match="head"):
        ParamGroupsCheck(strict=True).run(model, [optimizer], [])


def test_a_written_spec_keeps_its_ignore_list() -> None:
    """TOML, JSON and Python say the same."""
    table = {"ignore": ["groups.state-steps", "groups.decay:*.norm.*"], "group": [{"name": "all", "rest": True}]}
    spec = parse_spec(table)
    assert spec.ignore == ("groups.state-steps", "groups.decay:*.norm.*")
    assert parse_spec(spec_table(spec)) == spec
    assert parse_spec(json.loads(dump_spec(spec, "json"))) == spec
    assert dump_spec(spec, "toml").startswith('ignore = ["groups.state-steps", "groups.decay:*.norm.*"]')


def test_the_verdict_follows_what_remains() -> None:
    """Preflight is ready where the only errors are ignored, and the report says how many they are."""
    model = Net()
    optimizer = half_trained(model)
    assert preflight(model, optimizer=optimizer).verdict.startswith("not ready")
    report = preflight(model, optimizer=optimizer, ignore=UNEQUAL)
    assert report.verdict == "ready"
    assert str(report).endswith("\n3 findings ignored (2 errors, 1 note)\nready")


def test_a_check_leaves_findings_out_before_it_counts_them() -> None:
    """Of 40 findings, only those that are not ignored count for the limit; the list of what was checked stays last."""
    tensors = {f"layer_{number}": torch.tensor([float("nan")] * 3) for number in range(40)}
    report = run_checks(tensors, ignore=["nan:layer_1*", "nan:layer_2*", "nan:layer_3*", "inf"])
    assert [f.key for f in report.findings if f.code == "nan"] == ["layer_0", *(f"layer_{n}" for n in range(4, 10))]
    assert len(report.ignored) == 33
    assert [f.code for f in report.findings[-2:]] == ["ignore-unused", "not-scanned"]


def test_the_commands_have_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--ignore`` counts in the page, in ``summary`` of the document, and for the exit code; a typo exits with 2."""
    spec = tmp_path / "groups.toml"
    spec.write_text('[defaults]\nlr = 0.1\n[[group]]\nname = "head"\nparams = "fc3.*"\n', encoding="utf-8")
    validate = ("groups", "validate", "--model", LENET, spec)
    assert run_ckpt(capsys, *validate).code == 1
    ran = run_ckpt(capsys, *validate, "--ignore", "groups.unowned", "--ignore", "groups.missing")
    assert (ran.code, ran.out) == (0, "no findings; 9 findings ignored (9 errors)\n")
    document = json.loads(run_ckpt(capsys, *validate, "--json", "--ignore", "groups.unowned:conv*").out)
    assert document["summary"]["ignored"] == 0
    assert [finding["code"] for finding in document["findings"]] == ["groups.unowned", "ignore-unused"]

    spec.write_text('ignore = ["groups.unowned", "groups.missing"]\n' + spec.read_text(encoding="utf-8"), "utf-8")
    assert run_ckpt(capsys, *validate).code == 0
    ready = run_ckpt(capsys, "preflight", "--model", LENET, "--groups", spec, "--optimizer", "SGD")
    assert (ready.code, ready.out.splitlines()[-2:]) == (0, ["1 finding ignored (1 error)", "ready"])

    bad, good = tmp_path / "bad.pt", tmp_path / "good.pt"
    torch.save({"w": torch.tensor([float("nan"), 1.0])}, bad)
    torch.save({"w": torch.tensor([2.0, 1.0])}, good)
    assert run_ckpt(capsys, "check", bad, good).code == 1
    ran = run_ckpt(capsys, "check", bad, good, "--ignore", "nan:w", "--json")
    document = json.loads(ran.out)
    assert (ran.code, document["summary"]["errors"], document["summary"]["ignored"]) == (0, 0, 1)
    assert "ignore-unused" not in ran.out, "the entry is of use at one of the paths"
    for arguments in (("check", bad), validate, ("preflight", "--model", LENET)):
        refused = run_ckpt(capsys, *arguments, "--ignore", "groups.unowed")
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.splitlines()[-1] == "hint: did you mean groups.unowned or groups.unordered or groups.moved?"
