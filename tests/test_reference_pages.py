"""The tables of the documentation list everything that the code has, with the arguments that it takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields

import pytest

from ckptkit import preset_names
from ckptkit.core import config_files
from ckptkit.core.checkpoint import MOST_TENSORS
from ckptkit.core.patterns import matching
from ckptkit.formats import zip_archive
from ckptkit.formats.pickle import machine
from ckptkit.formats.safetensors import LARGEST_HEADER
from ckptkit.formats.torch import zip as torch_zip
from ckptkit.plans.policies import MISMATCH_ACTIONS
from ckptkit.plans.recipes.parse import INPUT_KEYS, TOP_KEYS
from ckptkit.tensor_ops import registry
from ckptkit.tensor_ops.operation import Arithmetic, Moving, Operation
from ckptkit.wrappers.table import WRAPPERS
from tests.helpers_pages import PAGES

KINDS = registry._BY_NAME


def _section(page: str, title: str) -> str:
    """Return the text below a heading, up to the next one."""
    text = PAGES[f"docs/{page}.md"]
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def _rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables in a text, without their headings."""
    for line in re.findall(r"^\| `.*", text, re.MULTILINE):
        yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("title", ["Exact operations", "Operations that compute"])
def test_operations_are_listed_with_their_arguments(title: str) -> None:
    """Each operation is in the table of its kind, with every argument and its default."""
    rows = {cells[0].strip("`"): cells[1] for cells in _rows(_section("operations", title))}
    assert set(rows) == {name for name, kind in KINDS.items() if _is_exact(kind) == title.startswith("Exact")}
    for name, cell in rows.items():
        shown = dict(re.findall(r"`(\w+)(?:=([^`]+))?`", cell))
        given = {item.name: item.default for item in fields(KINDS[name])}  # type: ignore[arg-type]
        assert set(shown) == set(given), name
        for argument, default in given.items():
            expected = "" if default is MISSING or default is None else _written(default)
            assert shown[argument] == expected, f"{name}: {argument}"


def _is_exact(kind: type[Operation]) -> bool:
    return issubclass(kind, Moving) or kind.name == "pad"


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def test_exact_operations_can_be_undone_and_the_others_cannot() -> None:
    """Every exact operation but slice has an inverse, and no operation that computes has one."""
    inverted = {name for name, kind in KINDS.items() if kind.inverse is not Operation.inverse}
    assert inverted == {name for name, kind in KINDS.items() if _is_exact(kind)} - {"slice"}
    assert not any(issubclass(KINDS[name], Arithmetic) for name in inverted)


def test_every_action_for_a_mismatch_is_listed() -> None:
    """The table has each name that --on-mismatch takes."""
    listed = {
        name
        for cells in _rows(_section("operations", "For shapes that differ"))
        for name in re.findall(r"`(\w+)`", cells[0])
    }
    assert listed | {"error", "skip"} == set(MISMATCH_ACTIONS)


def test_every_preset_is_listed() -> None:
    """The table of presets has each preset, beside its opposite."""
    pairs = [(cells[0].strip("`"), cells[1].strip("`")) for cells in _rows(_section("rules", "Presets"))]
    assert sorted(name for pair in pairs for name in pair) == list(preset_names())


def test_every_wrapper_is_listed() -> None:
    """The table of wrappers has the mark of each wrapper that --strip auto removes."""
    listed = {mark for cells in _rows(_section("rules", "Wrappers")) for mark in re.findall(r"`([\w.]+)\.`", cells[0])}
    assert listed == {row.mark for row in WRAPPERS}


def test_the_limits_are_those_of_the_code() -> None:
    """Each number of the table of limits on size is the one that the code compares with."""
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", _section("limitations", "Limits on size"), re.MULTILINE))
    steps = f"{machine._MOST_OPCODES / 1e6:.0f} million steps or {machine._MOST_OBJECTS / 1e6:.1f} million objects"
    more = f"{machine._OPCODES_PER_STORAGE} steps or {machine._OBJECTS_PER_STORAGE} objects more for each storage"
    sizes = [f"{config_files._MOST_BYTES[kind]:,}" for kind in ("toml", "yaml", "json")]
    assert rows["tensors in a checkpoint"] == f"{MOST_TENSORS:,}"
    assert rows["entries in a zip archive"] == f"{zip_archive._MOST_ENTRIES:,}"
    assert rows["header of safetensors"] == f"{LARGEST_HEADER // 10**6} MB"
    assert rows["pickle"].startswith(f"{steps}, and {more}; ")
    assert (rows["rule file or spec"], sizes) == (
        "1 MB as TOML, 250 kB as YAML, 100 MB as JSON",
        ["1,000,000", "250,000", "100,000,000"],
    )
    assert (rows["a `re:` pattern"], matching._SECONDS) == ("half a second of processor time for each key", 0.5)
    expansion = rows[f"expansion of a part of a zip archive beyond {zip_archive._ALWAYS_INFLATED >> 20} MiB"]
    assert expansion == f"{torch_zip._MOST_COMPRESSION} times for a pickle, else {zip_archive._LARGEST_RATIO} times"


def test_the_page_of_recipes_lists_every_key() -> None:
    """Each key of a recipe and of an ``[[input]]`` is in a table, with its default."""
    for title, keys in (("The top of a recipe", TOP_KEYS), ("Inputs", INPUT_KEYS)):
        listed = {name for cells in _rows(_section("recipes", title)) for name in re.findall(r"`(\w+)`", cells[0])}
        assert listed == {key for key in keys if key not in ("input", "set", "slice")}, title
