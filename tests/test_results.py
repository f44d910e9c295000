"""Every result prints as the page of its command, in a notebook too, and gives the document of ``--json``."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit.core.result import Result
from ckptkit.errors import hint_for_python
from ckptkit.optimizer_state.naming import to_named
from ckptkit.optimizer_state.remapping import remap
from ckptkit.render import results
from ckptkit.render.page import Line, Listing, Table
from tests.helpers_cli import ROOT, run_ckpt

MODEL = "py:fixtures.lenet:build"
PTH, DDP, TIED = "fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt", "fixtures/encoder_tied.pt"
TUNED, SPEC = "fixtures/lenet_tuned.safetensors", "fixtures/groups.toml"
RENAME = "module.*=*"


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def model() -> torch.nn.Module:
    module = importlib.import_module("fixtures.lenet")
    built: torch.nn.Module = module.build()
    return built


def merge_plan(_: Path) -> ckptkit.Plan:
    with ckptkit.open_checkpoint(PTH) as base, ckptkit.open_checkpoint(DDP) as donor:
        return ckptkit.plan_merge(base, donor, [RENAME])


def state(_: Path) -> ckptkit.OptimizerState:
    with ckptkit.open_optimizer(DDP) as found, ckptkit.open_checkpoint(DDP) as weights:
        return to_named(found, weights)


def state_diff(out: Path) -> ckptkit.Report:
    live = replace(state(out), groups=(replace(state(out).groups[0], options={"lr": 9.0}),))
    return ckptkit.optimizer_state_diff(state(out), live)


def lock_diff(out: Path) -> ckptkit.Report:
    return ckptkit.diff_locks(out / "a.json", out / "b.json")


def written(tmp_path: Path) -> ckptkit.Written:
    with ckptkit.open_checkpoint(DDP) as source:
        plan = ckptkit.plan_remap(source, [RENAME])
        return ckptkit.execute(plan, source, tmp_path / "w.safetensors")


def written_state(tmp_path: Path) -> Any:
    with ckptkit.open_optimizer(DDP) as found, ckptkit.open_checkpoint(DDP) as weights:
        edited = remap(to_named(found, weights), [RENAME])
        return ckptkit.write_optimizer_state(edited, ckptkit.choose_output(tmp_path / "s.pt"), found)


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    built = model()
    return built, torch.optim.SGD(built.parameters(), lr=0.1, momentum=0.9)


def check_of_digests(out: Path) -> ckptkit.DigestCheck:
    recorded = ckptkit.digest(PTH)
    (out / "d.digest").write_text(f"{recorded}\n", encoding="ascii")
    return ckptkit.check_digests(recorded, DDP)


def loaded_optimizer(_: Path) -> ckptkit.OptimizerLoadReport:
    built, optimizer = trained()
    for parameter in built.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return ckptkit.load_optimizer_state(optimizer, built, optimizer.state_dict())


class Case(NamedTuple):
    """A result, and the arguments of the command that prints it, on stdout or on stderr; OUT is a folder.

    Without arguments, no command prints the result.
    """

    make: Callable[[Path], Result]
    arguments: str = ""
    prints: Literal["out", "err", "json"] = "out"


CASES: dict[str, Case] = {
    "StateDictDiff": Case(lambda _: ckptkit.diff(MODEL, DDP, [RENAME]), f"diff {MODEL} {DDP} --rename {RENAME}"),
    "StateDictDiff of other files": Case(lambda _: ckptkit.diff(TIED, DDP), f"diff {TIED} {DDP}"),
    "StateDictDiff with values": Case(
        lambda _: ckptkit.diff(PTH, DDP, [RENAME], values=True, expect_changed="fc3.*"),
        f"diff {PTH} {DDP} --rename {RENAME} --values --expect-changed fc3.*",
    ),
    "ValueDiff": Case(lambda _: ckptkit.compare_values(PTH, DDP, [RENAME])),
    "StateDictStats": Case(lambda _: ckptkit.stats(PTH), f"stats {PTH}"),
    "Digests": Case(lambda _: ckptkit.digest(PTH), f"digest {PTH}"),
    "DigestCheck": Case(check_of_digests, f"digest {DDP} --check OUT/d.digest"),
    "Delta": Case(
        lambda out: ckptkit.make_delta(PTH, TUNED, out / "d.safetensors", force=True),
        f"delta {PTH} {TUNED} -o OUT/d.safetensors --force",
    ),
    "Delta that was not written": Case(
        lambda _: ckptkit.make_delta(PTH, DDP, only_tensors=True), f"delta {PTH} {DDP} --only-tensors --dry-run"
    ),
    "Checkpoint": Case(lambda _: ckptkit.open_checkpoint(DDP), f"show {DDP}"),
    "Checkpoint with ties": Case(lambda _: ckptkit.open_checkpoint(TIED), f"show {TIED}"),
    "Alignment": Case(lambda _: ckptkit.suggest_rules(MODEL, DDP), f"align {MODEL} {DDP}"),
    "CheckReport": Case(lambda _: ckptkit.run_checks(PTH), f"check {PTH}"),
    "Plan of a merge": Case(merge_plan, f"merge {PTH} {DDP} --rename {RENAME} -o OUT/p.pt --only-tensors --dry-run"),
    "Plan of a remap": Case(
        lambda _: ckptkit.plan_remap(PTH, ["*=net.*"], dtype="bfloat16"),
        f"remap {PTH} --rename *=net.* --dtype bfloat16 -o OUT/r.pt --only-tensors --dry-run",
    ),
    "Written": Case(written, f"remap {DDP} --rename {RENAME} -o OUT/w.safetensors --force", "err"),
    "Written of a conversion": Case(
        lambda out: ckptkit.convert(PTH, out / "h.pt", dtype="float16", verify=True),
        f"convert {PTH} -o OUT/h.pt --dtype float16 --verify --force",
        "err",
    ),
    "Written of a merge": Case(
        lambda out: ckptkit.merge(MODEL, DDP, out=out / "m.safetensors", rules=[RENAME], on_mismatch="skip"),
        f"merge {MODEL} {DDP} --rename {RENAME} --on-mismatch skip -o OUT/m.safetensors --force",
        "err",
    ),
    "Written with carried files": Case(
        lambda out: ckptkit.convert(out / "hub", out / "h" / "model.safetensors", dtype="float16", carry=True),
        "convert OUT/hub -o OUT/h/model.safetensors --dtype float16 --carry --force",
        "err",
    ),
    "WrittenState": Case(written_state, f"optim remap {DDP} --rename {RENAME} -o OUT/s.pt --force", "err"),
    "ParamGroupsPlan": Case(lambda _: ckptkit.plan_param_groups(MODEL, SPEC), f"groups table --model {MODEL} {SPEC}"),
    "ParamGroupSpec": Case(lambda _: ckptkit.param_group_preset("no-decay"), "groups emit OUT/spec.toml"),
    "Explanation": Case(
        lambda _: ckptkit.explain_param_group(MODEL, SPEC, "fc3.bias"),
        f"groups explain --model {MODEL} {SPEC} fc3.bias",
    ),
    "ParamGroupsLock": Case(
        lambda _: ckptkit.lock_param_groups(MODEL, SPEC), f"groups lock --model {MODEL} {SPEC} -o OUT/c.lock", "json"
    ),
    "Report of locks": Case(lock_diff, "groups diff OUT/a.json OUT/b.json"),
    "OptimizerState": Case(state, f"optim show {DDP}"),
    "Report of states": Case(state_diff),
    "Preflight": Case(
        lambda _: ckptkit.preflight(model(), groups=SPEC, optimizer="SGD"),
        f"preflight --model {MODEL} --groups {SPEC} --optimizer SGD",
    ),
    "Report": Case(
        lambda _: ckptkit.validate_param_groups(*trained()), f"groups validate --model {MODEL} OUT/all.toml"
    ),
    "LoadReport": Case(lambda _: ckptkit.load_into(model(), DDP, [RENAME], on_mismatch="skip")),
    "OptimizerLoadReport": Case(loaded_optimizer),
}
PRINTED = {name: case for name, case in CASES.items() if case.arguments}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with the files that some commands read."""
    (tmp_path / "spec.toml").write_text(ckptkit.param_group_preset("no-decay").to_toml(), encoding="utf-8")
    (tmp_path / "all.toml").write_text("[[group]]\nrest = true\nlr = 0.1\nmomentum = 0.9\n", encoding="utf-8")
    for folder in ("hub", "h"):
        (tmp_path / folder).mkdir()
    save_file({"w": torch.ones(2, 2)}, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text('{"torch_dtype": "float32"}', encoding="utf-8")
    for name, spec in (("a.json", SPEC), ("b.json", {"group": [{"rest": True, "lr": 1.0}]})):
        document = ckptkit.lock_document(ckptkit.lock_param_groups(MODEL, spec))
        (tmp_path / name).write_text(json.dumps(document), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("case", PRINTED.values(), ids=PRINTED)
def test_print_and_to_dict_are_what_the_command_prints(
    case: Case, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``print(result)`` is the text of the command, and ``to_dict()`` its document."""
    result = case.make(out)
    arguments = case.arguments.replace("OUT", str(out)).split()
    if case.prints != "json":
        ran = run_ckpt(capsys, *arguments)
        print(result)  # noqa: T201 - this is what is tested
        err = "".join(ran.err.splitlines(keepends=True)[_notes(ran.err) :])
        speaking = "^(?:hint|values were not compared|gate broken|gate holds|all .* have the recorded contents .*): .*"
        printed = re.sub(speaking, lambda line: hint_for_python(line[0]), ran.out, flags=re.MULTILINE)
        shown = printed + _hints_for_python(ran.err) if case.prints == "out" else err
        assert capsys.readouterr().out == shown
    document = json.loads(run_ckpt(capsys, *arguments, "--json").out)
    if case.arguments.startswith("groups emit"):  # to_dict() of a spec is the spec, which every function takes
        document = document["spec"]
    assert result.to_dict() == document


def _hints_for_python(messages: str) -> str:
    """Return the hints that ``ckpt diff`` prints beside the page, as Python prints them with it."""
    lines = messages.splitlines(keepends=True)
    return "".join(hint_for_python(line) for line in lines if line.startswith("hint: "))


def _notes(messages: str) -> int:
    """Return the number of lines that ``ckpt optim`` prints before the page."""
    return sum(line.startswith(("positions follow", "the weights in the file")) for line in messages.splitlines())


class _Text(HTMLParser):
    """The text of HTML; raises where an element is not closed, or closed twice."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 - the base class asks for it
        if tag != "br":
            self.open.append(tag)
        self.text += "" if tag == "code" else "\n"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_notebook_shows_the_same_page(case: Case, out: Path) -> None:
    """The HTML has each header, cell and word of the page, and no table without rows; its elements are closed.

    Every result can be written as a report too.
    """
    result = case.make(out)
    html = result._repr_html_()
    lines = _Text(html).text.split("\n")
    for block in results._page_in_python(result):
        if isinstance(block, Table):
            cells = {cell for row in block.rows for cell in (*block.headers, *row) if cell and not block.only_tsv}
        elif isinstance(block, Line):
            cells = {"".join(block.parts).strip()}
        else:
            assert isinstance(block, Listing)
            cells = set(filter(None, block.lines))
        assert cells <= {*lines, *(line.strip() for line in lines)}
    assert "<tbody></tbody>" not in html
    assert result.to_html().count("<h1>") == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_repr_is_one_line_and_a_result_has_no_truth(case: Case, out: Path) -> None:
    """``repr`` has the class and the counts; ``bool`` raises and names what to ask, but for a Checkpoint, a mapping."""
    result = case.make(out)
    shown = repr(result)
    assert shown.startswith(f"<{type(result).__name__}")
    assert "\n" not in shown
    assert len(shown) < 200
    json.dumps(result.to_dict(), allow_nan=False)
    if isinstance(result, ckptkit.Checkpoint):
        assert bool(result)
        return
    asked = (
        r"\.ok"
        if isinstance(result, ckptkit.Report)
        else r"\.different"
        if "Diff" in shown
        else r"\.complete|\.contents|\.ok|None"
    )
    with pytest.raises(TypeError, match=asked):
        bool(result)


def test_every_result_has_a_page() -> None:
    """The table of pages has a row for each class of results, and names real functions, in order."""
    for name in ckptkit.__all__:
        getattr(ckptkit, name)
    rows = results._RENDERERS
    assert list(rows) == sorted(rows)
    classes = {f"{kind.__module__}.{kind.__qualname__}".removeprefix("ckptkit."): kind for kind in _below(Result)}
    assert set(classes) <= set(rows)
    for name, row in rows.items():
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(f"ckptkit.{module}"), kind), Result)
        renderer = importlib.import_module(f"ckptkit.render.{row.module}")
        assert callable(getattr(renderer, row.page))
        assert callable(getattr(renderer, row.document))


def _below(kind: type[Result]) -> Iterator[type[Result]]:
    for other in kind.__subclasses__():
        if other.__module__.startswith("ckptkit."):
            yield other
            yield from _below(other)


def test_a_class_of_a_user_prints_as_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    """A subclass of a result has the page of its base class."""

    class Own(ckptkit.Report):
        """A report of a user."""

    print(Own())  # noqa: T201 - this is what is tested
    assert capsys.readouterr().out == "no findings\n"


def test_a_printed_plan_ends_with_its_notes_in_python() -> None:
    """A note of ``ckpt merge --dry-run``, which is on stderr there, is in the text of the plan."""
    donor = {f"net.{key}": value for key, value in model().state_dict().items()}
    donor["fc3.bias"] = model().state_dict()["fc3.bias"]
    plan = ckptkit.plan_merge(model(), donor)
    (note,) = plan.notes
    assert "ckpt align BASE DONOR" in note
    assert str(plan).splitlines()[-1] == hint_for_python(note)


def test_a_printed_diff_and_its_hints_speak_python() -> None:
    """The page has each hint, and a hint prints the argument of Python, alone too; its fields are of --json."""
    result = ckptkit.diff(PTH, DDP)
    said = "all 10 keys match after rules=['module.*=*']"
    assert f"hint: {said}" in str(result).splitlines()
    assert (str(result.hints[0]), repr(result.hints)) == (said, f"(<Hint: {said}>,)")
    assert result.to_dict()["hints"][0]["message"] == "all 10 keys match after --rename 'module.*=*'"


def test_findings_by_severity() -> None:
    """``errors``, ``warnings`` and ``notes`` are the findings of each severity, in their order."""
    finding = ckptkit.Finding("a.b", "error", "k", "m")
    note, warning = replace(finding, severity="note"), replace(finding, severity="warning", message="n")
    report = ckptkit.Report((note, finding, warning, replace(finding, message="second")))
    assert report.errors == (finding, replace(finding, message="second"))
    assert (report.warnings, report.notes) == ((warning,), (note,))


@pytest.mark.parametrize("name", ["StateDictDiff", "Plan of a merge", "CheckReport", "Written"])
def test_a_pickled_result_prints_the_same_page(name: str, out: Path) -> None:
    """What a result needs for its page is pickled with it, without an open file."""
    result = CASES[name].make(out)
    again = pickle.loads(pickle.dumps(result))
    assert (str(again), again.to_dict()) == (str(result), result.to_dict())


def test_the_state_of_a_closed_file_has_a_page(tmp_path: Path) -> None:
    """Without its file, the page of a state has the shapes and slots, and says that step counts are unknown."""
    built = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(built.parameters(), lr=torch.tensor(0.5), capturable=False, foreach=False)
    built(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": built.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    with ckptkit.open_optimizer(tmp_path / "run.pt") as found:
        open_state = to_named(found, built)
        assert "step counts are unknown" not in str(open_state)
        assert "  2   0.5  " in str(open_state)
    assert "weight       [2, 2]   exp_avg, exp_avg_sq" in str(open_state)
    assert "step counts are unknown" in str(open_state)


def test_a_repr_and_a_page_need_no_torch() -> None:
    """Printing a diff loads neither torch nor the pages of other results."""
    program = (
        f"import ckptkit, sys\nresult = ckptkit.diff({PTH!r}, {DDP!r})\nrepr(result); str(result); result.to_dict()\n"
    )
    program += "print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "numpy", "ckptkit.render.groups", "ckptkit.render.plan", "ckptkit.plans"}
