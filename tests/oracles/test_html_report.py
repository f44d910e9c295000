"""The HTML report in a real browser: it sorts, filters, draws and prints, loads nothing, and runs no name.

A violation of its policy, an error on the console, a dialog or a request fails every test.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit.cli import main
from tests.helpers_cli import ROOT, run_ckpt
from tests.test_html_report import HOSTILE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 400, "height": 800}
ROW = ".rows > table tbody > tr"
BRIGHTNESS = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number).reduce((a, b) => a + b)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Tab:
    """A page of the browser with a report, and everything that must not happen there."""

    def __init__(self, browser: Any, report: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": WIDE, **options})
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: self.trouble.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.requests: list[str] = []
        self.page.goto(report.as_uri())
        self.report = report

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *raised: object) -> None:
        self.context.close()
        assert self.trouble == []
        assert {url for url in self.requests if not url.startswith("blob:")} == {self.report.as_uri()}


def shown(page: Any, table: str) -> list[str]:
    """Return the text of the column of names of the rows that a table shows."""
    names: list[str] = page.locator(f"#{table} tbody > tr > td:nth-child(1)").all_text_contents()
    return names


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of ``diff --values`` of two checkpoints of thirty layers, of which some keys are on one side only."""
    folder = tmp_path_factory.mktemp("layers")
    generator = torch.Generator().manual_seed(1)
    one = {
        f"layers.{layer}.{name}.weight": torch.randn(8, 8, generator=generator)
        for layer in range(30)
        for name in ("attn", "mlp")
    }
    two = {key: value * (1 + 0.001 * place) for place, (key, value) in enumerate(one.items())}
    two["head.weight"] = two.pop("layers.3.mlp.weight")
    save_file(one, folder / "one.safetensors")
    save_file(two, folder / "two.safetensors")
    sides = [str(folder / "one.safetensors"), str(folder / "two.safetensors")]
    report = folder / "report.html"
    assert main(["diff", *sides, "--values", "--quiet", "--html", str(report)]) == 1
    return report


def test_rows_sort_by_click_and_by_key(browser: Any, layers: Path) -> None:
    """Numbers sort by value, names with their numbers in order; ``aria-sort`` says so; the third time gives the first
    order back.
    """
    with Tab(browser, layers) as page:
        table = page.locator("#t0")
        first = shown(page, "t0")
        largest = table.locator("th", has_text="rel L2")
        button = largest.get_by_role("button")
        button.click()
        assert largest.get_attribute("aria-sort") == "descending"
        values = [float(text) for text in page.locator("#t0 tbody td:nth-child(2)").all_text_contents()]
        assert values == sorted(values, reverse=True)
        button.press("Enter")
        assert largest.get_attribute("aria-sort") == "ascending"
        values = [float(text) for text in page.locator("#t0 tbody td:nth-child(2)").all_text_contents()]
        assert values == sorted(values)
        button.press("Space")
        assert largest.get_attribute("aria-sort") is None
        assert shown(page, "t0") == first
        table.locator("th", has_text="key").get_by_role("button").click()
        numbers = [int(name.split(".")[1]) for name in shown(page, "t0")]
        assert numbers == sorted(numbers)


def test_rows_are_filtered_by_text_and_by_status(browser: Any, layers: Path) -> None:
    """The box takes words in any order, the list takes a status, and the live region says how many rows are left.

    A number finds this number only, and what is in a name is not looked for in other columns.
    """
    with Tab(browser, layers) as page:
        section = page.locator("section.table").nth(1)
        section.get_by_label("Filter").fill("ATTN layers.1")
        names = page.locator("#t1 tbody > tr > td:nth-child(2)").all_text_contents()
        assert len(names) == 11
        assert all("attn" in name and "layers.1" in name for name in names)
        assert section.get_by_role("status").text_content() == "11 of 61 rows"
        section.get_by_label("Filter").fill("layer 8 mlp f32")  # 8 is in all shapes too, f32 in no name
        names = page.locator("#t1 tbody > tr > td:nth-child(2)").all_text_contents()
        assert names == ["layers.8.mlp.weight"]
        section.get_by_label("Filter").fill("")
        section.get_by_label("status").select_option("+")
        assert page.locator("#t1 tbody > tr > td:nth-child(2)").all_text_contents() == ["head.weight"]
        assert section.get_by_role("status").text_content() == "1 of 61 rows"
        section.get_by_label("status").select_option(label="all")
        assert section.get_by_role("status").text_content() == "all 61 rows"


def test_the_histogram_follows_the_chosen_row(browser: Any, layers: Path) -> None:
    """A click, the keyboard and the search each choose a tensor; its bars say the counts of both sides."""
    with Tab(browser, layers) as page:
        page.locator("#t0 tbody > tr").nth(4).click()
        name = shown(page, "t0")[4]
        assert page.get_by_label("Histogram of", exact=True).input_value() == name
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        assert page.get_by_label("Histogram of", exact=True).input_value() == shown(page, "t0")[6]
        assert page.locator("#t0 tr[aria-selected=true]").count() == 1
        for _ in range(3):
            page.keyboard.press("PageDown")
        for _ in range(25):
            page.keyboard.press("ArrowUp")
        tops = page.evaluate(
            "[document.activeElement.getBoundingClientRect().top, t0.tHead.getBoundingClientRect().bottom]"
        )
        assert tops[0] >= tops[1]  # the header does not hide the cell that has the focus
        wanted = "layers.7.attn.weight"
        page.get_by_label("Histogram of", exact=True).fill(wanted)
        picture = page.get_by_role("group", name=f"Histogram of {wanted}")
        labels = [mark.get_attribute("aria-label") for mark in picture.get_by_role("img").all()]
        counts = [[int(number.replace(",", "")) for number in re.findall(r": ([\d,]+) \(", label)] for label in labels]
        stats = [
            ckptkit.stats(layers.parent / f"{side}.safetensors").tensors[wanted].numbers for side in ("one", "two")
        ]
        assert all(numbers is not None for numbers in stats)
        assert [sum(side) for side in zip(*counts, strict=True)] == [64, 64]
        for side, numbers in zip(zip(*counts, strict=True), stats, strict=True):
            assert numbers is not None
            assert [count for count in side if count] == [numbers.histogram[at] for at in sorted(numbers.histogram)]
        assert page.locator("#histogram-facts tbody th").all_text_contents() == ["expected", "found"]


def test_the_cells_of_pictures_have_tooltips_for_pointer_and_keyboard(browser: Any, layers: Path) -> None:
    """The tooltip of a cell is shown by hovering and by arrow keys, is its accessible name, and goes with Escape."""
    with Tab(browser, layers) as page:
        heatmap = page.locator("svg.ck-changes")
        mark = heatmap.get_by_role("img").nth(5)
        tip = page.get_by_role("tooltip", include_hidden=True)
        assert not tip.is_visible()
        mark.hover()
        assert tip.text_content() == mark.get_attribute("aria-label")
        page.mouse.move(1, 1)
        assert not tip.is_visible()
        heatmap.locator("[tabindex='0']").focus()
        before = tip.text_content()
        page.keyboard.press("ArrowDown")
        assert tip.is_visible()
        assert tip.text_content() != before
        assert tip.text_content() == page.evaluate("document.activeElement.getAttribute('aria-label')")
        page.keyboard.press("Escape")
        assert not tip.is_visible()
        assert heatmap.locator("[tabindex='0']").count() == 1


def test_hostile_names_do_nothing(browser: Any, tmp_path: Path) -> None:
    """Names that are markup or code are text in tables, lists, tooltips and histograms."""
    one = {name: torch.randn(4) for name in HOSTILE}
    two = {name: value + 1 for name, value in one.items()}
    report = tmp_path / "hostile.html"
    report.write_text(ckptkit.diff(one, two, values=True).to_html(), encoding="utf-8")
    with Tab(browser, report) as page:
        assert page.locator("script").count() == 2
        assert page.locator("img").count() == 0
        assert HOSTILE[0] in shown(page, "t0")
        for place in range(len(HOSTILE)):
            page.locator("#t0 tbody > tr").nth(place).click()
        page.locator("#t0 th button").first.click()
    stats = tmp_path / "stats.html"
    stats.write_text(ckptkit.stats(one).to_html(), encoding="utf-8")
    with Tab(browser, stats) as page:
        for row in page.locator("#t0 tbody > tr").all():
            row.click()
            assert page.get_by_label("Histogram of", exact=True).input_value() == row.locator("td").first.text_content()


def test_the_document_is_saved(browser: Any, layers: Path) -> None:
    """The button saves the document of ``--json`` under the policy of the file."""
    with Tab(browser, layers) as page:
        with page.expect_download() as download:
            page.get_by_role("button", name="Save the JSON document").click()
        assert download.value.suggested_filename == "ckpt-diff.json"
        saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    sides = [str(layers.parent / f"{name}.safetensors") for name in ("one", "two")]
    assert saved == ckptkit.diff(*sides, values=True).to_dict()


REPORTS = {
    "diff": "diff fixtures/lenet_10class.pth fixtures/lenet_tuned.safetensors --values --expect-frozen fc*",
    "diff of a model": "diff py:fixtures.lenet:build fixtures/lenet_ddp.pt",
    "check": "check fixtures/lenet_ddp.pt fixtures/encoder_tied.pt",
    "stats": "stats fixtures/encoder_tied.pt",
    "stats of modules": "stats fixtures/encoder_tied.pt --depth 2",
    "preflight": "preflight --model py:fixtures.lenet:build --groups fixtures/groups.toml --init fixtures/lenet_ddp.pt",
    "groups": "groups table --model fixtures/encoder_tied.pt --preset no-decay",
}


@pytest.mark.parametrize("name", REPORTS)
def test_every_report_is_quiet_and_fits(
    name: str, browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No report has trouble in light and dark, at 400 px without scrolling sideways, without a script, and printed."""
    monkeypatch.chdir(ROOT)
    report = tmp_path / "r.html"
    assert run_ckpt(capsys, *REPORTS[name].split(), "--html", report).code in {0, 1}
    brightness = []
    for scheme in ("light", "dark"):
        with Tab(browser, report, color_scheme=scheme, viewport=NARROW) as page:
            assert page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
            brightness.append(page.evaluate(BRIGHTNESS))
            assert page.get_by_role("heading", level=1).count() == 1
            assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
    assert brightness[0] > 700
    assert brightness[1] < 100
    with Tab(browser, report) as page:
        rows = page.locator(ROW).count()
        assert page.pdf().startswith(b"%PDF")
        page.emulate_media(media="print")
        assert not page.locator(".controls:visible, #save:visible").count()
    with Tab(browser, report, java_script_enabled=False) as page:
        assert page.locator(f"{ROW}:visible").count() == rows
        assert not page.locator("button:visible, input:visible, select:visible").count()


def test_screen_readers_find_tables_and_landmarks(browser: Any, layers: Path) -> None:
    """The accessibility tree has the headings, the tables with names, headers and cells, and a skip link first."""
    with Tab(browser, layers) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the tables"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"
        tree = page.locator("body").aria_snapshot()
    for text in (
        "- banner:", "- main:", "- contentinfo:", 'heading "58 of 59 tensors differ" [level=1]',
        'heading "Pictures" [level=2]', 'figure "Change by layer and module":',
        'group "Tensors with other values 58"', 'grid "Tensors with other values 58"', 'columnheader "rel L2"',
        'rowheader "layers.', 'gridcell "0.059"', 'table "Keys, dtypes and shapes 61"', 'searchbox "Filter"',
        'combobox "status"', "- status",
    ):  # fmt: skip
        assert text in tree, text


def test_ten_thousand_tensors_are_all_there(browser: Any, tmp_path: Path) -> None:
    """Ten thousand rows sort, filter, and are found by the search of the page; only those in sight are laid out."""
    report = tmp_path / "r.html"
    tensors = {f"layers.{number}.weight": torch.full((1,), float(number)) for number in range(10_000)}
    report.write_text(ckptkit.stats(tensors).to_html(), encoding="utf-8")
    with Tab(browser, report) as page:
        section = page.locator("section.table")
        assert page.locator("#t0 tbody > tr").count() == 10_000
        assert page.evaluate("window.find('layers.9876.weight')")
        section.locator("th button", has_text="max").click()
        assert shown(page, "t0")[0] == "layers.9999.weight"
        page.locator("#t0 td").first.click()
        page.keyboard.press("Control+End")  # the last rows are there when they are asked for
        assert page.evaluate("document.activeElement.parentNode.cells[0].textContent") == "layers.0.weight"
        assert page.locator("#t0 tbody > tr").count() == 10_000
        section.get_by_label("Filter").fill("layers.99")
        assert section.get_by_role("status").text_content() == "111 of 10,000 rows"
        assert page.evaluate("getComputedStyle(document.querySelector('#t0 tbody')).contentVisibility") == "auto"
        page.emulate_media(media="print")
        assert page.locator(".print-note:visible").count() == 1
