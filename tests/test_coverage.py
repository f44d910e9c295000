"""A merge says how much of the base got values, names what did not, and refuses where too little would get them."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import (
    diff,
    extract_lora,
    load_into,
    merge,
    merge_lora,
    parse_rules,
    plan_extract_lora,
    plan_merge,
    preflight,
)
from ckptkit.errors import ArgumentError, ModelError, PlanError, RuleError
from fixtures.lenet import build
from tests.helpers_cli import run_ckpt

LAYERS = 12


def base_state() -> dict[str, torch.Tensor]:
    """Return 12 layers of two tensors with 6 elements each, and a head of 8, in the order of safetensors."""
    layers = {f"layers.{i}.{name}.weight": torch.zeros(2, 3) for i in range(LAYERS) for name in ("attn", "fc")}
    return dict(sorted({**layers, "head.weight": torch.zeros(4, 2)}.items()))


def donor_state() -> dict[str, torch.Tensor]:
    """Return only the attention of each layer, and a head of another shape: 72 of 152 elements."""
    layers = {f"layers.{i}.attn.weight": torch.ones(2, 3) for i in range(LAYERS)}
    return {**layers, "head.weight": torch.ones(5, 2)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Write a base and a donor, and return their paths and that of an output."""
    base, donor = tmp_path / "base.safetensors", tmp_path / "donor.safetensors"
    save_file(base_state(), base)
    save_file(donor_state(), donor)
    return base, donor, tmp_path / "out.safetensors"


@pytest.mark.parametrize("dry", [False, True], ids=["written", "dry run"])
@pytest.mark.parametrize("report", ["text", "--json", "--markdown"])
def test_a_merge_ends_with_its_coverage(
    files: tuple[Path, Path, Path], dry: bool, report: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report has the share of the base and the names that stay, joined as rows of tables are."""
    base, donor, out = files
    options = [*(["--dry-run"] if dry else []), *([report] if report != "text" else [])]
    ran = run_ckpt(capsys, "merge", base, donor, "-o", out, "--on-mismatch", "skip", *options)
    assert ran.code == 0
    stay = [key for key, value in base_state().items() if key not in donor_state() or key == "head.weight"]
    if not dry:
        written = load_file(out)
        assert stay == [key for key in base_state() if not written[key].any()]
    if report == "--json":
        summary = json.loads(ran.out)["summary"]
        assert (summary["coverage"], summary["from_base"]) == (72 / 152, stay)
        return
    lines = (ran.out if dry or report == "--markdown" else ran.err).strip().splitlines()[-2:]
    assert "coverage 47.4 % of 152 elements: 12 of 25 tensors of the base" in lines[0]
    assert lines[1].replace("\\", "").endswith("stays as in the base: head.weight, layers.{0..11}.fc.weight ×12")


def test_python_has_the_coverage_of_a_merge(files: tuple[Path, Path, Path]) -> None:
    """The plan and the description of the output have the share and the names; so has the text of both."""
    base, donor, out = files
    plan = plan_merge(base, donor, on_mismatch="skip")
    written = merge(base, donor, out, on_mismatch="skip")
    assert plan.coverage == written.coverage == 72 / 152
    assert plan.from_base == written.from_base == tuple(k for k in base_state() if "attn" not in k)
    assert "layers.{0..11}.fc.weight" in str(plan).splitlines()[-1] == str(written).splitlines()[-1]


def test_what_donors_add_is_not_a_part_of_the_base() -> None:
    """A key that only a donor has does not raise the coverage."""
    plan = plan_merge({"a": torch.zeros(2), "b": torch.zeros(2)}, {"a": torch.ones(2), "c": torch.ones(9)},
                      on_unexpected="add")  # fmt: skip
    assert (plan.coverage, plan.from_base) == (0.5, ("b",))


def test_several_donors_fill_a_base_together() -> None:
    """A key counts once, whichever donor fills it."""
    base = {name: torch.zeros(2) for name in "abcd"}
    plan = plan_merge(base, [{"a": torch.ones(2), "b": torch.ones(2)}, {"b": torch.ones(2), "c": torch.ones(2)}])
    assert (plan.coverage, plan.from_base) == (0.75, ("d",))
    with pytest.raises(PlanError, match="the donors fill"):
        plan_merge(base, [{"a": torch.ones(2)}, {"b": torch.ones(2)}], min_coverage=0.9)


UNMET: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "a pattern": ({"require": "*.fc.weight"}, ["--require", "*.fc.weight"], "12 of 12 tensors"),
    "the second pattern": (
        {"require": ["*.attn.weight", "head.*"]},
        ["--require", "*.attn.weight", "--require", "head.*"],
        "--require 'head.*': 1 of 1 tensor would not be filled, 'head.weight' (its shape is [5, 2], not [4, 2])",
    ),
    "a share": ({"min_coverage": 0.48}, ["--min-coverage", "0.48"], "72 of 152 elements (47.4 %), below"),
    "percent": ({"min_coverage": 0.48}, ["--min-coverage", "48%"], "72 of 152 elements (47.4 %), below"),
}


@pytest.mark.parametrize(("asked", "options", "reason"), UNMET.values(), ids=UNMET.keys())
def test_an_unmet_requirement_refuses_the_merge(
    asked: dict[str, Any], options: list[str], reason: str, files: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nothing is written, by the command and by the function, also where the output exists; a dry run refuses too."""
    base, donor, out = files
    out.write_bytes(b"before")
    with pytest.raises(PlanError) as caught:
        merge(base, donor, out, on_mismatch="skip", force=True, **asked)
    assert reason in caught.value.reason
    for more in ([], ["--dry-run"]):
        ran = run_ckpt(capsys, "merge", base, donor, "-o", out, "--on-mismatch", "skip", "--force", *options, *more)
        assert (ran.code, ran.out) == (2, "")
        assert reason in ran.err
        assert "hint: " in ran.err
    assert out.read_bytes() == b"before"


def test_met_requirements_do_not_change_a_plan(files: tuple[Path, Path, Path]) -> None:
    """The plan is the one without requirements, at exactly the least share too."""
    base, donor, _ = files
    plan = plan_merge(base, donor, on_mismatch="skip")
    assert plan_merge(base, donor, on_mismatch="skip", require="*.attn.*", min_coverage=72 / 152) == plan


def adapter_files(folder: Path) -> tuple[Path, Path, Path]:
    """Write a base of three weights with 24, 24 and 48 elements, an adapter of the first, and the two merged."""
    base = {"a.weight": torch.zeros(4, 6), "b.weight": torch.zeros(4, 6), "head.weight": torch.zeros(6, 8)}
    factors = {"lora_A": torch.ones(1, 6), "lora_B": torch.ones(4, 1)}
    (folder / "adapter").mkdir()
    save_file(base, folder / "base.safetensors")
    save_file(base | {"a.weight": torch.ones(4, 6)}, folder / "tuned.safetensors")
    save_file({f"base_model.model.a.{name}.weight": value for name, value in factors.items()},
              folder / "adapter" / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "base.safetensors", folder / "adapter", folder / "tuned.safetensors"


REASONS = {"lora": "not in the adapter", "extract-lora": "it did not change"}


@pytest.mark.parametrize("method", REASONS)
def test_an_adapter_must_change_what_is_required(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pattern is for keys of the base, and the share for its elements, in the command and in Python."""
    base, adapter, tuned = adapter_files(tmp_path)
    out = tmp_path / "out" / "adapter_model.safetensors"
    out.parent.mkdir()
    donor = adapter if method == "lora" else tuned
    asked: dict[tuple[str, ...], tuple[dict[str, Any], str]] = {
        ("--require", "a.*", "--require", "b.*"): (
            {"require": ["a.*", "b.*"]},
            f"1 of 1 tensor would not be changed, 'b.weight' ({REASONS[method]})",
        ),
        ("--min-coverage", "26%"): ({"min_coverage": 0.26}, "the adapter changes 24 of 96 elements (25.0 %), below"),
        ("--require", "a.*", "--min-coverage", "25%"): ({"require": "a.*", "min_coverage": 0.25}, ""),
    }
    for options, (arguments, reason) in asked.items():
        ran = run_ckpt(capsys, "merge", "--method", method, "-o", out, base, donor, *options)
        assert (ran.code, out.exists(), reason in ran.err) == (2 if reason else 0, not reason, True), ran.err
        call = partial(merge_lora if method == "lora" else extract_lora, base, donor, out, force=True, **arguments)
        if reason:
            with pytest.raises(PlanError, match=re.escape(reason)):
                call()
        else:
            assert call().plan is not None
    with pytest.raises(RuleError, match="matches none of 3 keys of the base"):
        call(require="fc.*")


def test_a_requirement_says_which_rule_left_out_what_it_wants(tmp_path: Path) -> None:
    """A tensor that the tuned model has, and a rule leaves out, is not said to be absent."""
    base, _, tuned = adapter_files(tmp_path)
    with pytest.raises(PlanError, match=re.escape("'b.weight' (drop='b.*')")):
        plan_extract_lora(base, tuned, 1, parse_rules(drop=["b.*"]), require="b.*")


def test_wrong_requirements_are_refused(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A pattern must match a key of the base, and a share is between 0 and 1, or a percentage with its sign."""
    base, donor, out = files
    with pytest.raises(RuleError, match="matches none of 25 keys of the base"):
        plan_merge(base, donor, on_mismatch="skip", require="backbone.*")
    with pytest.raises(ArgumentError, match=r"for 95 % write 0\.95"):
        plan_merge(base, donor, on_mismatch="skip", min_coverage=95)
    for share in ("95", "101%", "-1", "nan", "all", "%", ""):
        ran = run_ckpt(capsys, "merge", base, donor, "-o", out, f"--min-coverage={share}")
        assert (ran.code, out.exists()) == (2, False)
        assert "write 0.95 or 95%" in ran.err
    ran = run_ckpt(capsys, "merge", base, donor, "-o", out, "--method", "lora", "--require", "head.*")
    assert (ran.code, out.exists()) == (2, False)


MODEL = "py:fixtures.lenet:build"
TEN = "fixtures/lenet_10class.pth"


def test_diff_and_preflight_judge_as_load_into_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Each reports a requirement that is not met in text and JSON, with exit code 1 and the words of load_into."""
    model = build()
    with pytest.raises(ModelError) as caught:
        load_into(model, TEN, on_mismatch="skip", require="fc3.*")
    with pytest.raises(ModelError) as share:
        load_into(model, TEN, on_mismatch="skip", min_coverage=0.9999)
    sentences = [caught.value.reason, share.value.reason]
    options = ["--require", "fc3.*", "--min-coverage", "99.99%"]
    ran = run_ckpt(capsys, "diff", MODEL, TEN, *options)
    assert ran.code == 1
    assert [line for line in ran.out.splitlines() if line.startswith("not met: ")] == [
        f"not met: {s}" for s in sentences
    ]
    document = json.loads(run_ckpt(capsys, "diff", MODEL, TEN, *options, "--json").out)
    assert [unmet["message"] for unmet in document["unmet"]] == sentences
    assert document["unmet"][0]["keys"] == document["unmet"][1]["keys"] == ["fc3.weight", "fc3.bias"]
    assert [unmet.message for unmet in diff(MODEL, TEN, require="fc3.*", min_coverage=0.9999).unmet] == sentences
    ran = run_ckpt(capsys, "preflight", "--model", MODEL, "--init", TEN, "--fresh", "fc3.*", *options, "--json")
    found = [finding for finding in json.loads(ran.out)["findings"] if finding["code"] == "preflight.required"]
    assert ran.code == 1
    assert [finding["message"].replace("in init", "in the checkpoint") for finding in found] == [
        sentence.replace("the checkpoint fills", "init fills") for sentence in sentences
    ]
    assert [f.message for f in preflight(build(), init=TEN, require="fc3.*").errors][-1] == sentences[0]


def test_met_requirements_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the diff nor the verdict changes where the checkpoint fills what is required."""
    options = ["--require", "conv*", "--min-coverage", "99%"]
    assert run_ckpt(capsys, "diff", MODEL, TEN, *options).out == run_ckpt(capsys, "diff", MODEL, TEN).out
    asked = ["preflight", "--model", MODEL, "--init", TEN, "--fresh", "fc3.*"]
    assert run_ckpt(capsys, *asked, *options) == run_ckpt(capsys, *asked)
    ran = run_ckpt(capsys, "preflight", "--model", MODEL, "--require", "conv*")
    assert (ran.code, "--init" in ran.err) == (2, True)
    with pytest.raises(ArgumentError, match="init"):
        preflight(build(), min_coverage=0.5)


def test_a_tied_key_counts_everywhere() -> None:
    """A key that the model ties to a stored key is filled: by a load, a merge, a diff and a preflight alike."""
    model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(6, 4), "head": torch.nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["wte"].weight
    state = {"wte.weight": torch.ones(6, 4)}
    asked: dict[str, Any] = {"require": "head.*", "min_coverage": 1}
    result = diff(model, state, **asked)
    assert (result.coverage, result.unmet) == (1.0, ())
    assert plan_merge(model, state, **asked).coverage == 1.0
    report = preflight(model, init=state, **asked)
    assert report.init is not None
    assert (report.init.coverage, [f.code for f in report.errors]) == (1.0, [])


def test_an_almost_whole_load_is_not_called_whole() -> None:
    """3 of 10,003 elements are missing, and no report shows 100 %."""
    model = torch.nn.Linear(10_000, 1, bias=False)
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    state = {"weight": torch.ones(1, 10_000)}
    texts = [str(report(model, state)) for report in (diff, load_into, plan_merge)]
    texts.append(str(preflight(model, init=state)))
    for text in texts:
        assert "99.9 %" in text
    assert not re.search(r"\b100(\.0)? ?%", texts[0] + texts[2])
