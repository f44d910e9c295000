"""Pictures of results: what they show is what the result says, for people who see them and for those who hear them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

import ckptkit
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.result import Result
from ckptkit.core.text import human_bytes, percent, short_number
from ckptkit.inputs import opened
from ckptkit.render.pictures.changes import MISSING, State, changes_picture
from ckptkit.render.pictures.grid import grids_of, in_common_order
from ckptkit.render.pictures.magnitudes import magnitudes_picture
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.scale import LogScale
from ckptkit.render.pictures.sections import OTHERS, WHOLE, sections_of
from ckptkit.render.pictures.style import picture_style
from ckptkit.render.results import pictures_of
from tests.test_printed_names import NAMES

LENET = "fixtures/lenet_10class.pth"
SVG = "{http://www.w3.org/2000/svg}"


def root_of(picture: Picture) -> ET.Element:
    """Return the element of a picture, which a strict parser reads."""
    return ET.fromstring(picture.svg)  # noqa: S314 - the text is ours


def pictures(result: Result) -> dict[str, Picture]:
    """Return the pictures of a result by kind, each a whole and harmless SVG."""
    made = pictures_of(result)
    assert made == pictures_of(result)
    for picture in made:
        root = root_of(picture)
        assert root.get("role") == "img"
        assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"]
        assert (root[0].text, root[1].text) == (picture.title, picture.description)
        assert picture.description.startswith(picture.summary)
        for element in root.iter():
            assert element.tag.removeprefix(SVG) in {"svg", "title", "desc", "g", "path", "rect", "text"}
            assert not [name for name in element.attrib if name in ("id", "style", "href") or name.startswith("on")]
            numbers = (element.get(name, "") for name in ("x", "y", "d", "width", "height", "viewBox"))
            assert not re.search(r"nan|inf|e[+-]", " ".join(numbers))
    return {picture.kind: picture for picture in made}


def tips(picture: Picture) -> list[str]:
    """Return what the shapes of a picture say where the pointer rests."""
    root = root_of(picture)
    shapes = (f"{SVG}rect", f"{SVG}path")
    return [element[0].text or "" for element in root.iter() if element.tag in shapes and len(element)]


def marked(picture: Picture, look: str) -> list[str]:
    """Return the tooltips of the cells with one look."""
    root = root_of(picture)
    return [
        shape[0].text or ""
        for group in root.iter(f"{SVG}g")
        if group.get("class") == look
        for shape in group
        if len(shape)
    ]


def llama(layers: int = 3, experts: int = 0) -> dict[str, torch.Tensor]:
    names = ["embed.weight"]
    for layer in range(layers):
        names += [f"model.layers.{layer}.{name}.weight" for name in ("attn.q", "attn.k", "norm")]
        names += [
            f"model.layers.{layer}.experts.{expert}.{w}.weight" for expert in range(experts) for w in ("up", "down")
        ]
    return {name: torch.ones(2) for name in [*names, "head.weight"]}


def test_coverage_counts_elements() -> None:
    """The bars of coverage have the shares of elements that the diff has, by section too."""
    expected = {"a.w": torch.ones(60), "a.b": torch.ones(20), "c.w": torch.ones(20)}
    found = {"a.w": torch.ones(60), "c.w": torch.ones(2, 10), "d.w": torch.ones(5)}
    result = ckptkit.diff(expected, found)
    picture = pictures(result)["coverage"]
    assert result.coverage == 0.6
    assert picture.summary == (
        "In all: matched 60.0 %, shape-mismatched 20.0 %, missing 20.0 % of 100 elements, unexpected 5 elements."
    )
    assert "a: matched 75.0 %, missing 25.0 % of 80 elements." in picture.description
    assert "c: shape-mismatched 100 % of 20 elements." in picture.description
    assert "d: unexpected 5 elements." in picture.description
    assert "a: matched 60 elements, 75.0 %" in tips(picture)


def test_coverage_of_loads_and_preflights() -> None:
    """A load shows what it loaded, a preflight what it would fill and what trains; equal layers are one row."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    state = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}
    assert pictures(ckptkit.load_into(model, state))["coverage"].summary == (
        "In all: loaded 33.3 %, kept as they were 66.7 % of 18 elements."
    )
    model[0].requires_grad_(requires_grad=False)
    named = torch.nn.ModuleDict({"layers": model})
    ready = pictures(ckptkit.preflight(named, init={f"layers.{key}": value for key, value in state.items()}))
    assert ready["coverage"].summary == "In all: from init 33.3 %, stays at init 66.7 % of 18 elements."
    assert ready["training"].description.endswith("layers.{1..2}: trains 100 % of 12 elements.")


GRIDS: Mapping[str, tuple[list[str], list[tuple[list[str], list[str]]]]] = {
    "layers": (
        [f"h.{layer}.{name}" for layer in (0, 1, 2) for name in ("attn.w", "mlp.w")] + ["emb.w"],
        [(["h: 0 1 2"], ["attn.w", "mlp.w"]), ([": "], ["emb.w"])],
    ),
    "experts": (
        [f"h.{layer}.experts.{n}.w" for layer in (0, 1) for n in range(5)] + ["h.0.q.w", "h.1.q.w"],
        [(["h: 0 1"], ["experts.*.w", "q.w"])],
    ),
    "numbered parts of a layer": (
        [f"h.{layer}.{name}" for layer in (0, 1) for name in ("q.w", "k.w", "ff.0.w", "ff.1.w")],
        [(["h: 0 1"], ["q.w", "k.w", "ff.0.w", "ff.1.w"])],
    ),
    "stages": (
        [f"layer{s}.{n}.{name}" for s in (1, 2) for n in range(s + 1) for name in ("conv.weight", "bn.weight")],
        [(["layer1: 0 1", "layer2: 0 1 2"], ["conv.weight", "bn.weight"])],
    ),
    "small networks in a layer": (
        [f"conv.{n}.{name}.layers.{m}.weight" for n in (0, 1) for name in ("core", "gate", "out") for m in (0, 3)],
        [(["conv: 0 1"], [f"{name}.layers.{m}.weight" for name in ("core", "gate", "out") for m in (0, 3)])],
    ),
    "stages of blocks": (
        [f"stages.{s}.blocks.{n}.{name}" for s in (0, 1) for n in (0, 1) for name in ("dw.weight", "pw.weight")],
        [(["stages.0.blocks: 0 1", "stages.1.blocks: 0 1"], ["dw.weight", "pw.weight"])],
    ),
    "encoder and decoder": (
        [f"enc.{n}.{name}" for n in (0, 1) for name in ("attn.w", "fc.w")]
        + [f"dec.{n}.{name}" for n in (0, 1) for name in ("attn.w", "cross.w", "fc.w")],
        [(["enc: 0 1", "dec: 0 1"], ["attn.w", "cross.w", "fc.w"])],
    ),
    "no layers": (
        ["conv1.weight", "conv1.bias", "fc.weight", "fc.bias", "scale"],
        [([": weight bias "], ["conv1", "fc", "scale"])],
    ),
    "many without modules": ([f"p{number}" for number in range(100)], [([], [])]),
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name: str) -> None:
    """A model has the grid that people expect, and each key is in exactly one cell."""
    keys, expected = GRIDS[name]
    found = grids_of(keys)
    shown = [([f"{band.name}: {' '.join(band.columns)}" for band in grid.bands], list(grid.rows)) for grid in found]
    assert shown == expected
    assert sorted(key for grid in found for cell in grid.cells.values() for key in cell) == sorted(keys)


def test_orders_are_merged() -> None:
    """What several lists have is in an order that agrees with each of them."""
    assert in_common_order([["b", "d"], ["a", "b", "c", "d", "e"], ["d", "x", "e"]]) == ["a", "b", "c", "d", "x", "e"]


def test_heatmap_tells_each_kind_of_change() -> None:
    """Equal, changed, not finite, missing, unexpected and reshaped tensors each have their own look."""
    before = llama() | {"zero": torch.zeros(2), "cast": torch.ones(2)}
    after = {key: value.clone() for key, value in before.items()}
    after["model.layers.1.attn.q.weight"] += 0.5
    after["model.layers.2.attn.q.weight"][0] = math.nan
    after["zero"] += 1
    after["cast"] = after["cast"].to(torch.bfloat16)
    after["model.layers.1.norm.weight"] = torch.ones(3)
    after["more.weight"] = torch.ones(1)
    del after["head.weight"]
    result = ckptkit.diff(before, after, values=True)
    picture = pictures(result)["changes"]
    assert marked(picture, "ck-solid") == ["model.layers.2.attn.q.weight: 1 element with NaN or Inf on one side"]
    assert marked(picture, "ck-hatched") == ["head.weight: missing"]
    assert marked(picture, "ck-plus") == ["more.weight: unexpected"]
    assert marked(picture, "ck-crossed") == ["model.layers.1.norm.weight: another shape"]
    assert marked(picture, "ck-ring") == ["zero: was all zero; the largest difference is 1"]
    assert "1 was all zero" in picture.description
    # The bars of the terminal say less than the picture, and are not beside it.
    assert "change by layer" in str(result)
    assert "change by layer:" not in result._repr_html_() + result.to_html()
    zeros, ones = ({name: make(1) for name in "ab"} for make in (torch.zeros, torch.ones))
    assert "2 were all zero" in pictures(ckptkit.diff(zeros, ones, values=True))["changes"].description
    assert marked(picture, "ck-s0") == ["cast: equal numbers of another dtype"]
    assert len(marked(picture, "ck-same")) == len(before) - 6
    assert "model.layers.1.attn.q.weight: relative L2 0.5" in tips(picture)
    assert len(tips(picture)) == len(before) + 1
    assert "1 missing" in picture.summary
    assert "1 NaN or Inf" in picture.summary
    values = pictures(ckptkit.compare_values(before, before))["changes"]
    assert values.title == "Change by layer and module"
    assert values.summary == f"{len(before)} tensors: {len(before)} identical."


def test_numbers_stand_beside_cells_only_where_they_end_before_the_next_cell() -> None:
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "coords")
    for columns, count in ((2, 6), (6, 0)):
        before = {f"{module}.{leaf}": torch.ones(4) for module in ("up", "down", "head") for leaf in leaves[:columns]}
        after = {key: value * 1.0123 for key, value in before.items()}
        root = root_of(pictures(ckptkit.diff(before, after, values=True))["changes"])
        assert [element.text for element in root.iter(f"{SVG}text")].count("0.012") == count


def test_a_cell_of_experts_has_the_largest_change_and_what_is_missing() -> None:
    """A cell of many tensors has the colour of the largest change, and a mark where one is missing."""
    before = llama(2, experts=6)
    after = {key: value.clone() for key, value in before.items()}
    after["model.layers.1.experts.2.up.weight"] *= 1.25
    after["model.layers.1.experts.3.up.weight"] *= 1.5
    del after["model.layers.1.experts.0.up.weight"]
    picture = pictures(ckptkit.diff(before, after, values=True))["changes"]
    (tip,) = marked(picture, "ck-hatched")
    assert tip.endswith("the largest change is relative L2 0.5 of model.layers.1.experts.3.up.weight")
    assert tip.startswith("6 tensors, 3 identical, 2 changed, 1 missing")


def test_scale() -> None:
    """The bins of the scale hold all numbers, a larger number is never in a lower bin, and the legend names edges."""
    for numbers in ([1e-3], [1e-4, 3e-4, 9e-3], [2e-7, 1.4], [1e-12, 1e3], [5e-324, 1e308], [0.5, 0.5]):
        scale = LogScale.of(numbers)
        assert 1 <= len(scale.edges) <= 8
        assert scale.is_open or scale.edges[0] <= min(numbers)
        looks = [scale.look(number) for number in sorted(numbers)]
        assert looks == sorted(looks)
    assert LogScale.of([2e-7, 1.4]).edges == (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    assert LogScale.of([1.5e-3, 7e-3]).edges == (1e-3, 2e-3, 5e-3)


SPEC: dict[str, Any] = {
    "group": [
        {"name": "vectors", "match": {"ndim": [1]}, "lr": 1e-2, "weight_decay": 0.0},
        {"name": "rest", "rest": True, "lr": 1e-2, "weight_decay": 0.5},
    ],
    "modifier": [{"name": "deep", "layers": [["layers.{n:int}.*"], ["head.*"]], "layer_decay": 0.1}],
}


def test_learning_rates_are_on_a_log_axis() -> None:
    """Layers whose rates have equal ratios are at equal distances; frozen ones are hatched."""
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))
    layers[0].requires_grad_(requires_grad=False)
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "layers": layers})
    plan = ckptkit.plan_param_groups(model, SPEC)
    picture = pictures(plan)["rates"]
    root = root_of(picture)
    places = {rect[0].text: float(rect.get("x", "")) for rect in root.iter(f"{SVG}rect") if len(rect)}
    at = [
        places[f"layers.{n}: 1 parameter with lr {short_number(10.0 ** (n - 6))} and weight_decay 0.5"]
        for n in (1, 2, 3)
    ]
    assert at[0] < at[1] < at[2]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0], abs=0.2)
    assert marked(picture, "ck-hatched") == ["layers.0: 2 parameters frozen"]
    assert picture.summary == "Learning rates are from 1e-5 to 0.01."
    assert "head: lr 0.01 and weight_decay 0" in picture.description
    assert (
        picture.description.index("layers.1:")
        < picture.description.index("layers.2:")
        < picture.description.index("head:")
    )
    ready = pictures(ckptkit.preflight(model, groups=SPEC))
    assert ready["rates"].summary == picture.summary
    assert marked(ready["rates"], "ck-hatched") == ["layers.0: 1 parameter frozen"]


def test_without_numbers_there_are_no_rates() -> None:
    """Groups without a learning rate have no picture."""
    assert pictures(ckptkit.plan_param_groups(LENET, {"group": [{"name": "all", "rest": True}]})) == {}


def test_sizes_are_those_of_the_file() -> None:
    """The bytes of all sections are the bytes of the file; both sides of a diff are there where they differ."""
    with ckptkit.open_checkpoint(LENET) as checkpoint:
        picture = pictures(checkpoint)["sizes"]
        nbytes = sum(info.nbytes for info in checkpoint.values())
        fc1 = sum(info.nbytes for key, info in checkpoint.items() if key.startswith("fc1"))
    assert picture.summary == f"{human_bytes(nbytes)} in all, F32 {human_bytes(nbytes)}."
    assert f"fc1: {human_bytes(fc1)} ({percent(fc1 / nbytes)})." in picture.description
    half = {"a.w": torch.ones(10, dtype=torch.float16), "b.w": torch.ones(10)}
    both = pictures(ckptkit.diff(half, {key: value.float() for key, value in half.items()}))["sizes"]
    assert both.summary == "expected: 60 B in all, of which F32 40 B, F16 20 B. found: 80 B in all, F32 80 B."
    assert "expected" not in pictures(ckptkit.diff(half, half))["sizes"].summary


def test_sections() -> None:
    """The heaviest section is divided, a list of layers is not, and many light ones are one section."""
    weights = {f"model.layers.{n}.w": 10.0 for n in range(9)} | {"model.embed.w": 5.0, "head.w": 5.0}
    assert [name for name, _ in sections_of(weights)] == ["model.layers", "model.embed", "head"]
    light = {f"m{number}.w": 1.0 for number in range(40)}
    assert [name for name, _ in sections_of({"heavy.w": 100.0} | light)][::11] == ["heavy", OTHERS]
    assert [(name, len(keys)) for name, keys in sections_of(light)] == [(WHOLE, 40)]
    assert sections_of({}) == []
    for keys in (["", ".", "..", "a"], ["a", "a.b", "a.b.c"]):
        found = sections_of(dict.fromkeys(keys, 1.0))
        assert sorted(key for _, section in found for key in section) == sorted(keys)


def test_magnitudes_have_the_shares_of_the_histogram() -> None:
    """A bar has the height of its share, zeros have a bar of their own, and the second side is a line."""
    one = ckptkit.stats({"w": torch.tensor([0.0, 0.3, 0.3, 0.6])})
    picture = pictures(one)["magnitudes"]
    root = root_of(picture)
    heights = {rect[0].text: float(rect.get("height", "")) for rect in root.iter(f"{SVG}rect") if len(rect)}
    assert heights == {
        "zeros: 25.0 %": 75.0,
        "magnitudes from 0.25 to 0.5: 50.0 %": 150.0,
        "magnitudes from 0.5 to 1: 25.0 %": 75.0,
    }
    assert picture.summary.startswith("4 values, 25.0 % zeros; nearly all others have magnitudes from 0.25 to 1")
    other = ckptkit.stats({"w": torch.tensor([1.0, 2.0])})
    both = magnitudes_picture([("expected", one.total), ("found", other.total)])
    assert both is not None
    assert both.svg.count('class="ck-l1"') == 3  # in the legend, of the zeros, and of the other values
    assert "magnitudes from 0.25 to 0.5: expected 50.0 %, found 0.0 %" in tips(both)
    assert magnitudes_picture([("", ckptkit.stats({"w": torch.zeros(2)}).total)]) is None


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_are_text(name: str) -> None:
    """No name of a file is markup in a picture, or makes it invalid."""
    state = {name: torch.ones(2), f"{name}.0.w": torch.ones(2), f"{name}.1.w": torch.ones(2), "plain.w": torch.ones(1)}
    pictures(ckptkit.diff(state, {key: value * 2 for key, value in state.items()}, values=True))


ODD: Mapping[str, dict[str, torch.Tensor]] = {
    "nothing": {},
    "no elements": {"a": torch.ones(0)},
    "a scalar": {"a": torch.tensor(1.0)},
    "extremes": {"a": torch.tensor([1e308, 5e-324], dtype=torch.float64)},
    "no numbers": {"a": torch.tensor([math.nan, math.inf])},
    "deep": {".".join(["0"] * 200): torch.ones(1)},
    "integers": {"a": torch.tensor([2**62, 0])},
    "many layers": {f"l.{number}.w": torch.ones(1) for number in range(300)},
    "many stacks": {f"l{stack}.{layer}.w{stack}": torch.ones(1) for stack in range(20) for layer in range(2)},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_state_dicts(name: str) -> None:
    """Pictures of odd tensors are whole."""
    state = ODD[name]
    for result in (
        ckptkit.diff(state, state, values=True),
        ckptkit.diff(state, {}),
        ckptkit.diff({}, state),
        ckptkit.stats(state),
    ):
        pictures(result)


def test_many_tensors_stay_small() -> None:
    """A heatmap of many tensors has few elements, and the HTML of a checkpoint with 10,000 is below 1 MB."""
    states = {f"p{number}": MISSING if number % 2 else State("", "", 10.0 ** -(number % 7)) for number in range(4000)}
    picture = changes_picture(states)
    assert picture is not None
    assert picture.svg.count("<") < 100
    infos = {
        f"layers.{number}.w{number % 97}": TensorInfo(f"layers.{number}.w{number % 97}", "F32", (2, number))
        for number in range(10_000)
    }
    with opened(infos, "checkpoint") as checkpoint:
        assert len(checkpoint._repr_html_()) < 1_000_000


def test_style_has_a_colour_for_each_class() -> None:
    """Each class that a picture uses as a colour has one on light and on dark pages, and no other page is changed."""
    style = picture_style(in_notebook=True)
    used = set(
        re.findall(
            r'class="(ck-[rsl][0-9]|ck-same)"',
            "".join(p.svg for p in pictures_of(ckptkit.diff(LENET, LENET, values=True))),
        )
    )
    assert used
    assert all(f".ck-picture .{name}{{" in style and style.count(f"--{name}:") == 4 for name in used)
    assert all("ck-picture" in selector for selector in re.findall(r"([^{}]*)\{", style) if "@media" not in selector)
