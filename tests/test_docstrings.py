"""The examples in docstrings run as they are written, and every public function and method has one."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ckptkit
from ckptkit import optimizer_state, testing
from tests.helpers_cli import ROOT

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


def public_docstrings() -> Iterator[tuple[str, str]]:
    """Yield the name and the docstring of every public name, and of every method with an argument of a public class."""
    public = {name: getattr(module, name) for module in (ckptkit, optimizer_state, testing) for name in module.__all__}
    for name, value in public.items():
        if callable(value):
            yield name, value.__doc__ or ""
        if isinstance(value, type):
            yield from _methods(value)


def _methods(cls: type) -> Iterator[tuple[str, str]]:
    for owner in cls.__mro__:
        for name, value in vars(owner).items():
            if name.startswith("_") or not owner.__module__.startswith("ckptkit."):
                continue
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and len(inspect.signature(function).parameters) > 1:
                yield f"{owner.__name__}.{name}", function.__doc__ or ""


def test_every_public_docstring_has_an_example() -> None:
    """Each public function, each public class, and each method that takes arguments shows how it is used."""
    assert sorted({name for name, text in public_docstrings() if ">>> " not in text}) == []
