"""``dir()``, completion and ``help()`` show the public names and nothing else, and a script that uses them runs."""

from __future__ import annotations

import inspect
import pydoc
import re
import rlcompleter
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import ckptkit
from ckptkit import optimizer_state
from tests.helpers_cli import ROOT
from tests.helpers_public import MODULES, public_names
from tests.typing import user_script

SUBMODULES = {"errors", "integrations", "optimizer_state", "testing"}


def test_version_is_that_of_the_project() -> None:
    """``ckptkit.__version__`` is the version in pyproject.toml, which is its only source."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if not hasattr(ckptkit, "__version__"):
        pytest.skip("ckptkit is not installed")
    assert ckptkit.__version__ == project["version"]


def test_a_checkout_that_is_not_installed_has_no_version() -> None:
    """Without metadata there is no version to give, and ``hasattr`` says so."""
    program = "import ckptkit; print(hasattr(ckptkit, '__version__'), len(dir(ckptkit)) > 0)"
    command = [sys.executable, "-S", "-c", program]  # -S leaves out site-packages
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_dir_and_completion_show_the_public_names() -> None:
    """No helper of the package, and no package below it that is not public, is among the names."""
    assert set(dir(ckptkit)) == {*ckptkit.__all__, *SUBMODULES, "__version__"}
    assert all(dir(module) == module.__all__ for module in MODULES[1:])
    completed = rlcompleter.Completer({"ckptkit": ckptkit}).attr_matches("ckptkit.")
    assert {name.removeprefix("ckptkit.").rstrip("()") for name in completed} == {*ckptkit.__all__, *SUBMODULES}
    assert all(isinstance(getattr(ckptkit, name), ModuleType) for name in SUBMODULES)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_help_shows_every_public_name_with_its_docstring(module: ModuleType) -> None:
    """``help()`` has each function and class, though the names are fetched when they are first used."""
    text = pydoc.plain(pydoc.render_doc(module))
    for name in module.__all__:
        value = public_names().get(name)
        if value is not None:
            assert re.search(rf"^    (class )?{name}\(", text, re.MULTILINE), name
            assert (inspect.getdoc(value) or "").splitlines()[0] in text
    assert "import_module" not in text
    assert "_HOMES" not in text


def test_public_names_are_found_in_the_package_only() -> None:
    """An unknown name is an ``AttributeError``, as for any module."""
    for module in (ckptkit, optimizer_state):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'check'; run_checks does what ckpt check does$"):
        ckptkit.check  # type: ignore[attr-defined]  # noqa: B018
    assert set(ckptkit._OF_COMMANDS.values()) <= set(ckptkit.__all__)  # type: ignore[attr-defined]


def test_the_script_of_a_user_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script that type checkers accept does its work."""
    monkeypatch.chdir(ROOT)
    user_script.main(tmp_path)
    said = capsys.readouterr().out
    assert "the tensors are not the same: 2 keys missing, 2 keys unexpected" in said
    assert "8 " in said
