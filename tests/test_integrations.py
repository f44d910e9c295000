"""The callbacks for other training loops name what is missing. ``tests/oracles`` runs them in real training loops."""

from __future__ import annotations

import importlib
import sys

import pytest

from ckptkit.errors import ArgumentError
from ckptkit.integrations.base import ParamGroupsCheck


@pytest.mark.parametrize(
    ("module", "absent", "message"),
    [
        ("transformers", ["transformers"], "needs transformers, which is not installed"),
        (
            "lightning",
            ["lightning", "lightning.pytorch", "pytorch_lightning"],
            "needs lightning or pytorch_lightning, and neither is installed",
        ),
    ],
)
def test_an_absent_library_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, absent: list[str], message: str
) -> None:
    monkeypatch.delitem(sys.modules, f"ckptkit.integrations.{module}", raising=False)
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{module} {message} \(pip install {absent[0]}\)"):
        importlib.import_module(f"ckptkit.integrations.{module}")


def test_an_unknown_on_fault_is_refused() -> None:
    with pytest.raises(ArgumentError, match="on_fault is the string 'ignore'"):
        ParamGroupsCheck(on_fault="ignore")  # type: ignore[arg-type]
