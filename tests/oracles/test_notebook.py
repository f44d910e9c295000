"""Results in a real notebook, and its outputs in a real browser: pages and pictures are there, and nothing is loaded.

The pages that the browser gets have the classes and attributes by which JupyterLab, VS Code and Colab tell their theme.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers_cli import ROOT

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

SETUP = """
import torch, ckptkit
torch.manual_seed(0)

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 32)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        self.layers = torch.nn.ModuleList(Block() for _ in range(6))
        self.head = torch.nn.Linear(8, 4)

model = Model()
before = {key: value.clone() for key, value in model.state_dict().items()}
after = {key: value * (1 + 1e-4 * 3.0 ** number) for number, (key, value) in enumerate(before.items())}
after |= {"embed.weight": before["embed.weight"], "head.weight": torch.ones(7, 8), "<b>'&\\x1b[31m": torch.ones(2)}
del after["head.bias"]
groups = {
    "group": [
        {"name": "no decay", "match": {"ndim": [1]}, "lr": 1e-3, "weight_decay": 0.0},
        {"name": "rest", "rest": True, "lr": 1e-3, "weight_decay": 0.05},
    ],
    "modifier": [{"name": "deeper", "layers": [["embed.*"], ["layers.{n:int}.*"], ["head.*"]], "layer_decay": 0.7}],
}
"""
# Each result with the pictures that it has.
CELLS = {
    "ckptkit.open_checkpoint('fixtures/lenet_10class.pth')": ["sizes"],
    "ckptkit.diff(before, after, values=True)": ["coverage", "changes", "sizes"],
    "ckptkit.compare_values('fixtures/lenet_10class.pth', 'fixtures/lenet_10class.safetensors')": ["changes"],
    "ckptkit.stats('fixtures/lenet_10class.pth')": ["magnitudes", "sizes"],
    "ckptkit.run_checks('fixtures/lenet_10class.pth')": [],
    "ckptkit.plan_param_groups(model, groups)": ["rates"],
    "ckptkit.preflight(model, groups=groups, init=before)": ["coverage", "rates"],
    "ckptkit.load_into(model, before)": ["coverage"],
    "ckptkit.suggest_rules({'a.' + key: value for key, value in before.items()}, before)": [],
    "ckptkit.plan_remap('fixtures/lenet_10class.pth')": [],
    "ckptkit.digest('fixtures/lenet_10class.pth')": [],
}
# What a host of notebooks says about its theme, and whether the theme is dark.
HOSTS = {
    "jupyterlab, light": ('data-jp-theme-light="true" data-jp-theme-name="JupyterLab Light"', False),
    "jupyterlab, dark": ('data-jp-theme-light="false" data-jp-theme-name="JupyterLab Dark"', True),
    "vscode, light": ('class="vscode-light" data-vscode-theme-kind="vscode-light"', False),
    "vscode, light, high contrast": ('class="vscode-high-contrast-light vscode-high-contrast"', False),
    "vscode, dark, high contrast": ('class="vscode-high-contrast"', True),
    "vscode, dark": ('class="vscode-dark" data-vscode-theme-kind="vscode-dark"', True),
}
# What JupyterLab itself says about the elements in an output.
STYLE = """
body { font: 13px/1.5 system-ui, sans-serif; margin: 8px; }
.jp-RenderedHTMLCommon table { border-collapse: collapse; border: none; font-size: 12px; table-layout: fixed; }
.jp-RenderedHTMLCommon td, .jp-RenderedHTMLCommon th { padding: 0.5em; vertical-align: middle; max-width: none; }
.jp-RenderedHTMLCommon:not(.jp-RenderedMarkdown) :is(td, th, tr) { text-align: right; white-space: normal; }
.jp-RenderedHTMLCommon svg { max-width: 100%; height: auto; }
body.dark { background: #111; color: #e4e4e4; }
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The HTML of each result, as a kernel gives it to the notebook that shows it."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *CELLS)]
    spec = tmp_path_factory.mktemp("jupyter")
    kernel = spec / "kernels" / "python3"
    kernel.mkdir(parents=True)
    # The kernel of this Python, whatever other kernels the machine knows.
    (kernel / "kernel.json").write_text(
        f'{{"argv": ["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"], '
        '"display_name": "Python", "language": "python"}'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(spec))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        nbclient.NotebookClient(
            notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
        ).execute()
    nbformat.validate(notebook)
    results = [cell.outputs[-1].data for cell in notebook.cells[1:]]
    assert all(data["text/plain"].startswith("<") for data in results)
    return ["".join(data["text/html"]) for data in results]


def page_of(outputs: list[str], attributes: str, *, dark: bool) -> str:
    """Return a page that shows the outputs as a host of notebooks does."""
    attributes = attributes.replace('class="', 'class="dark ') if dark and "class=" in attributes else attributes
    plain = ' class="dark"' if dark and "class=" not in attributes else ""
    shown = "".join(f'<div class="jp-RenderedHTMLCommon jp-OutputArea-output">{output}</div><hr>' for output in outputs)
    return f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style><body {attributes}{plain}>{shown}</body>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("width", [1100, 400])
def test_results_in_a_notebook(host: str, width: int, outputs: list[str], browser: Any, tmp_path: Path) -> None:
    """Each result shows its page and its pictures in the colours of the host, at any width; it runs and loads nothing.

    The browser wishes for the other theme than the host has, as it often does.
    """
    attributes, dark = HOSTS[host]
    path = tmp_path / "notebook.html"
    path.write_text(page_of(outputs, attributes, dark=dark), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="light" if dark else "dark")
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(path.as_uri())
    shown = page.locator(".jp-OutputArea-output")
    assert shown.count() == len(CELLS)
    for at, kinds in enumerate(CELLS.values()):
        pictures = shown.nth(at).locator("svg")
        classes = [pictures.nth(number).get_attribute("class") for number in range(pictures.count())]
        assert classes == [f"ck-picture ck-{kind}" for kind in kinds]
        for number in range(pictures.count()):
            box = pictures.nth(number).bounding_box()
            assert box["width"] > 300
            assert box["height"] > 30
            assert box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate(
        """[...document.querySelectorAll('svg text')].filter(text => {
            const own = text.getBoundingClientRect(), all = text.closest('svg').getBoundingClientRect();
            return own.left < all.left - 4 || own.right > all.right + 4 || own.bottom > all.bottom + 2;
        }).map(text => text.textContent)"""
    )
    assert cut == []
    # No word is broken into letters: a table that is too wide scrolls.
    narrowest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('td')].filter(cell => cell.textContent.length > 8)"
        ".map(cell => cell.getBoundingClientRect().width))"
    )
    assert narrowest > 40
    names = page.locator("tbody td:first-child:not(.right)")
    assert set(names.evaluate_all("cells => cells.map(cell => getComputedStyle(cell).textAlign)")) == {"left"}
    fill = page.evaluate("getComputedStyle(document.querySelector('.ck-coverage .ck-s0')).fill")
    assert (sum(map(int, fill.removeprefix("rgb(").rstrip(")").split(","))) > 420) == dark
    assert page.locator("b").count() == 0  # of a name of a tensor
    if pictures_folder := os.environ.get("CKPTKIT_SCREENSHOTS"):
        page.screenshot(path=f"{pictures_folder}/{host.replace(', ', '-')}-{width}.png", full_page=True)
    context.close()
    assert trouble == []


def test_a_notebook_that_is_not_trusted_shows_its_tables(outputs: list[str], browser: Any, tmp_path: Path) -> None:
    """Without the style and the tags of the pictures, none of their words is seen, and a sentence says where they are.

    JupyterLab keeps such words, and an attribute ``hidden`` that has a value.
    """
    kept = [re.sub(r"</?(svg|g|path|rect|circle|text|title|desc)\b[^>]*>", "", output) for output in outputs]
    kept = [re.sub(r"<style>.*?</style>", "", output, flags=re.DOTALL) for output in kept]
    path = tmp_path / "notebook.html"
    path.write_text(page_of(kept, "", dark=False), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    shown = page.locator(".jp-OutputArea-output")
    for at, kinds in enumerate(CELLS.values()):
        text = shown.nth(at).inner_text()
        assert ("Pictures are shown where the notebook is trusted." in text) == bool(kinds)
        assert not shown.nth(at).locator("figure:visible").count()
    assert shown.nth(1).locator("td:visible").count() > 20
    page.close()
