"""The hints about the conversions of transformers are commands that work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.helpers_hint_following import Follower
from tests.helpers_hint_situations import Situation

_MODEL = """
from transformers import MixtralConfig, MixtralForCausalLM

def build():
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1))
"""
_BUILD = "py:tiny_mixtral:build"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of a tiny model, as the library saves it, beside the module that builds the model."""
    (tmp_path / "tiny_mixtral.py").write_text(_MODEL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Callable[[], Any]] = {}
    exec(compile(_MODEL, "tiny_mixtral", "exec"), names)  # noqa: S102 - the text above
    names["build"]().save_pretrained(tmp_path / "saved")
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / "saved" / "model.safetensors").read_bytes())
    return tmp_path


HINTS: dict[str, tuple[list[str], str]] = {
    "a diff": (["diff", _BUILD, "saved"], "comparison/hints.py: --rules transformers:auto"),
    "a merge": (
        ["merge", _BUILD, "saved", "-o", "out.safetensors"],
        "plans/overlays/requirements.py: --rules transformers:auto",
    ),
    "no configuration": (
        ["remap", "alone.safetensors", "-o", "out.safetensors", "--rules", "transformers:auto"],
        "rules/transformers/__init__.py: name the model type, such as",
    ),
    "another type": (
        ["remap", "saved", "-o", "out.safetensors", "--rules", "transformers:qwen2_moe"],
        "rules/transformers/skeleton.py: --rules transformers:auto takes",
    ),
}


@pytest.mark.parametrize(("arguments", "hint"), HINTS.values(), ids=HINTS)
def test_each_way_out_works(arguments: list[str], hint: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rules of the library end the trouble of the command, as the hint promises."""
    Follower(Situation(lambda _: arguments, (hint,), is_called=False), files, capsys).run()
