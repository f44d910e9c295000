"""``--html`` and ``to_html()``: one file that loads nothing, runs only its own script, and takes no name for markup."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit.errors import OutputError
from ckptkit.render.html import blocks, histograms, report
from ckptkit.render.html.report import START_BYTES, is_report
from tests.helpers_cli import ROOT, run_ckpt

TEN, TUNED, MODEL = "fixtures/lenet_10class.pth", "fixtures/lenet_tuned.safetensors", "py:fixtures.lenet:build"
DIFF = ["diff", TEN, TUNED, "--values"]
HOSTILE = (
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "\ud800<b>",
    "<!--\u202e\x1b[31m\u2028\x00]]>",
    "k" * 10_000,
)


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


class Tree(HTMLParser):
    """The elements of a file in order, each with its attributes and the text directly in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in {"meta", "input", "br", "img", "link"}:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.elements[self.open[-1]][2].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.elements if name == tag]


def hostile_report() -> str:
    """Return the report of two checkpoints whose names are markup, and code for a template."""
    one = {name: torch.ones(2) for name in HOSTILE}
    return ckptkit.diff(one, {name: torch.zeros(2) for name in HOSTILE[1:]}, values=True).to_html()


def test_the_policy_allows_one_style_and_one_script() -> None:
    """The hashes of the policy are those of the only style and the only script that a browser would run."""
    tree = Tree(hostile_report())
    (policy,) = [
        attributes["content"] or ""
        for name, attributes, _ in tree.elements
        if name == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    scripts = [("".join(text), attributes) for name, attributes, text in tree.elements if name == "script"]
    (script,) = [text for text, attributes in scripts if attributes.get("type") != "application/json"]
    for kind, text in (("style", tree.texts("style")[0]), ("script", script)):
        digest = b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert len(tree.texts("style")) == 1


def test_names_from_files_are_text() -> None:
    """No name becomes an element, an attribute or the end of the script; names are printed as in the terminal."""
    text = hostile_report()
    tree = Tree(text)
    assert tree.open == []
    for name, attributes, _ in tree.elements:
        assert name not in {"img", "iframe", "link", "object"}
        assert not {key for key in attributes if key.startswith("on") or key in {"style", "src"}}
        assert not (attributes.get("href") or "#").lower().startswith(("javascript", "http"))
    assert "49" not in "".join(tree.texts("td"))
    assert "".join(text.split("\n")).isprintable()
    assert HOSTILE[0] in tree.texts("td")
    assert not any("\u202e" in text for text in tree.texts("td"))


def test_the_document_is_in_the_file() -> None:
    """The embedded JSON document is the one of ``to_dict()``, with names that end an element too."""
    model = {name: torch.ones(2) for name in HOSTILE}
    result = ckptkit.stats(model)
    tree = Tree(result.to_html())
    data = next("".join(text) for _, attributes, text in tree.elements if attributes.get("id") == "document")
    assert json.loads(data) == result.to_dict()
    assert "<" not in data


def test_nothing_is_loaded_and_a_report_is_the_same_each_time() -> None:
    """The file has no address that a browser would ask, and two reports of one result are the same text."""
    result = ckptkit.stats(TEN)
    text = result.to_html()
    assert text == result.to_html()
    assert set(re.findall(r"https?://[^\"' ]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\burl\(|@import|fetch\(|XMLHttp|innerHTML|outerHTML|insertAdjacent|eval\(", text)


def test_all_rows_are_in_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A report has a row for each tensor, where the terminal shows ten or joins layers."""
    one = {f"layers.{number}.weight": torch.full((2,), float(number)) for number in range(40)}
    save_file(one, tmp_path / "a.safetensors")
    save_file({key: value + 1 for key, value in one.items()}, tmp_path / "b.safetensors")
    path = tmp_path / "r.html"
    result = run_ckpt(
        capsys,
        "diff",
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "b.safetensors"),
        "--values",
        "--html",
        str(path),
    )
    assert result.code == 1
    tree = Tree(path.read_text(encoding="utf-8"))
    assert sum(text.startswith("layers.") for text in tree.texts("td")) == 80
    assert "more tensors" not in "".join(tree.texts("li"))


def test_both_sides_have_a_histogram(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """``diff --values`` measures both sides: the counts are those of ``stats`` of each file."""
    path = tmp_path / "r.html"
    run_ckpt(capsys, *DIFF, "--html", str(path))
    tree = Tree(path.read_text(encoding="utf-8"))
    numbers = json.loads(
        next("".join(text) for _, attributes, text in tree.elements if attributes.get("id") == "histogram-numbers")
    )
    assert numbers["sides"] == ["expected", "found"]
    measured = [ckptkit.stats(side) for side in (TEN, TUNED)]
    assert len(numbers["tensors"]) == 6
    for name, *sides in numbers["tensors"]:
        for (count, zeros, first, counts, _), stats in zip(sides, measured, strict=True):
            tensor = stats.tensors[name].numbers
            assert tensor is not None
            assert (count, zeros) == (tensor.count, tensor.zeros)
            assert {first + at: times for at, times in enumerate(counts) if times} == dict(tensor.histogram)


def test_the_head_is_not_repeated() -> None:
    """The verdict and the descriptions of both sides stand in the head alone, and what explains the verdict below."""
    tree = Tree(ckptkit.diff(MODEL, TEN, values=True).to_html())
    assert tree.texts("h1") == ["8 of 8 tensors differ"]
    lines = tree.texts("li")
    assert not any(TEN in line or "tensors differ" in line for line in lines)
    assert sum("the largest relative change is" in text for text in tree.texts("span")) == 1
    assert "below" not in {attributes.get("class") for _, attributes, _ in tree.elements}


def test_the_page_says_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bounds, rows, histograms and the document are left out, and the page says how many."""
    monkeypatch.setattr(blocks, "_MOST_ROWS", 7)
    monkeypatch.setattr(histograms, "MOST_TENSORS", 4)
    monkeypatch.setattr(report, "_MOST_DOCUMENT", 100)
    tree = Tree(ckptkit.stats(TEN).to_html())
    notes = " ".join(tree.texts("p"))
    assert "3 more rows would make this page slow" in notes
    assert "6 more histograms would make this file too large, and are left out" in notes
    assert "and is left out;  prints it" in notes
    assert not any(attributes.get("id") in {"document", "save"} for _, attributes, _ in tree.elements)


@pytest.mark.parametrize("more", [[], ["--json"], ["-q"]], ids=["table", "json", "quiet"])
def test_the_terminal_is_as_without_the_report(
    capsys: pytest.CaptureFixture[str], more: list[str], tmp_path: Path
) -> None:
    """``--html`` changes neither stdout nor the exit code; stderr says what was written, unless ``--quiet``."""
    path = tmp_path / "r.html"
    without, beside = run_ckpt(capsys, *DIFF, *more), run_ckpt(capsys, *DIFF, *more, "--html", str(path))
    assert (beside.out, beside.code) == (without.out, without.code)
    wrote = f"wrote {path}: HTML, " in beside.err
    assert wrote == ("-q" not in more)


def test_only_an_earlier_report_is_replaced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An earlier report is replaced; any other file stays as it is, and nothing is computed."""
    path = tmp_path / "r.html"
    run_ckpt(capsys, *DIFF, "--html", str(path))
    first = path.read_bytes()
    assert is_report(first[:START_BYTES])
    run_ckpt(capsys, "diff", TEN, TEN, "--html", str(path))
    assert path.read_bytes() != first
    for text in (b"<!doctype html>\n<title>mine</title>", b"", b"\x80\x02}q\x00."):
        path.write_bytes(text)
        result = run_ckpt(capsys, *DIFF, "--html", str(path))
        assert result.code == 2
        assert result.out == ""
        assert f"{path}: already exists and is not a report of ckptkit" in result.err
        assert path.read_bytes() == text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("-", "--html needs the name of a file"),
        ("/no/such/r.html", "the directory /no/such does not exist"),
        ("/", "is a directory"),
        ("/dev/null", "is not a regular file"),
    ],
)
def test_a_place_that_cannot_have_a_report_is_refused_first(
    capsys: pytest.CaptureFixture[str], path: str, message: str
) -> None:
    """The place is checked before the checkpoints are opened."""
    result = run_ckpt(capsys, "diff", "missing.pth", TEN, "--html", path)
    assert result.code == 2
    assert message in result.err
    assert "missing.pth" not in result.err


def test_each_of_several_checkpoints_stands_above_its_findings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A finding of one of several files can be told from those of the others."""
    torch.save({"w": torch.full((2,), torch.nan)}, tmp_path / "bad.pt")
    assert run_ckpt(capsys, "check", TEN, tmp_path / "bad.pt", "--html", tmp_path / "r.html").code == 1
    tree = Tree((tmp_path / "r.html").read_text(encoding="utf-8"))
    places = [at for at, (_, _, text) in enumerate(tree.elements) if str(tmp_path / "bad.pt") in "".join(text)]
    finding = next(at for at, (_, shown, _) in enumerate(tree.elements) if shown.get("data-tone") == "error")
    heading = next(at for at, (_, shown, _) in enumerate(tree.elements) if shown.get("id") == "summary")
    assert [at for at in places if heading < at < finding]


def test_the_head_names_the_model_and_what_was_given_with_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A result that does not know the path of its model has it in the report of its command."""
    path = tmp_path / "r.html"
    assert run_ckpt(capsys, "groups", "table", "--model", TEN, "--preset", "no-decay", "--html", path).code == 0
    tree = Tree(path.read_text(encoding="utf-8"))
    assert tree.texts("dt") == ["model", "groups"]
    assert {TEN, "preset no-decay"} <= set(tree.texts("code"))


def test_the_result_is_printed_even_where_its_report_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while the report is written costs nobody a result that took hours."""
    without = run_ckpt(capsys, *DIFF)

    def refuse(*_: object) -> None:
        raise OutputError("not enough disk space", path="r.html")

    monkeypatch.setattr("ckptkit.formats.writing.outputs.write_small_file", refuse)
    failed = run_ckpt(capsys, *DIFF, "--html", tmp_path / "r.html")
    assert (failed.out, failed.code) == (without.out, 2)
    assert "not enough disk space" in failed.err
    assert not list(tmp_path.iterdir())
