"""The examples in docstrings run as they are written, and every public function and method has one."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

import ckptkit
from tests.helpers_cli import ROOT
from tests.helpers_public import public_methods, public_names

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def with_examples() -> list[str]:
    """Return the name of each module of the package with an example."""
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "ckptkit").rglob("*.py"))
        if ">>> " in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", with_examples())
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example in a module prints what it shows, in a folder with ``fixtures/``, and with its imports alone."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    module = pytest.importorskip(name, exc_type=ImportError)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    said: list[str] = []
    for example in finder.find(module, extraglobs={"ckptkit": ckptkit, "torch": torch}):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            runner.run(example, out=said.append)
    assert runner.tries > 0, f"the examples of {name} are in no docstring that doctest finds"
    assert runner.failures == 0, "".join(said)


def test_every_public_docstring_has_an_example() -> None:
    """Each public function, each public class, and each method that takes arguments shows how it is used."""
    public = public_names() | public_methods()
    assert [name for name, value in public.items() if ">>> " not in (value.__doc__ or "")] == []
